"""The holder of a claim sends nothing after its window, takes no longer than its limit, and leaves nothing behind."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.errors import PredictionThrottled
from predictions.intake.invocation import RunJobs
from predictions.store.predictions import PredictionsTable
from predictions.upstream.client import Replicate, Target
from predictions.upstream.create_window import CreateTooLateError, SendWindow, single_use_client
from predictions.upstream.errors import NotAccepted, OutcomeUnknown

from tests.support.code_reach import reach
from tests.support.fakes import VERSION, Clock, Executed, ReplicateInMemory, Wakes
from tests.support.fixtures import make_submissions
from tests.support.hosts import HostileHost, endless, head, hostile_host, silent, whole
from tests.support.predictions import waiting, wanted
from tests.support.protocol import Submissions
from tests.support.template import ROOT, logical_name, timeout_of

TARGET = Target("version", None, VERSION)
CREATED = b'{"id": "aaaa", "status": "starting"}'


def answers(connection: socket.socket) -> None:
    """Answer a create."""
    connection.sendall(whole(CREATED, "application/json"))


class _Token:
    def __init__(self, read: Callable[[], None] = lambda: None) -> None:
        self._read = read

    def value(self) -> str:
        self._read()
        return "r8_token"

    def forget(self) -> None:
        """Nothing is cached here."""


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """The client that creates are sent with."""
    with single_use_client(timeout=httpx.Timeout(5)) as client:
        yield client


def upstream(host: HostileHost, client: httpx.Client, token: _Token | None = None) -> Replicate:
    given: object = token or _Token()
    return Replicate(f"{host.origin}/v1", given, client, lambda: client)  # type: ignore[arg-type]  # stands for the secret


def create(replicate: Replicate, window: SendWindow) -> str:
    return replicate.create(TARGET, {"input": {}}, cancel_after_seconds=60, window=window).id


def test_create_within_its_window_is_sent(client: httpx.Client, clock: Clock) -> None:
    window = SendWindow(clock.now() + 10, clock.now() + 25, clock.now)
    with hostile_host({"": answers}) as host:
        assert create(upstream(host, client), window) == "aaaa"


def test_holder_frozen_after_its_claim_sends_nothing_when_it_is_thawed(client: httpx.Client, clock: Clock) -> None:
    window = SendWindow(clock.now() + 10, clock.now() + 25, clock.now)
    with hostile_host({"": answers}) as host:
        # Frozen while the token is read, before anything of the request exists.
        replicate = upstream(host, client, _Token(lambda: clock.advance(600)))
        with pytest.raises(NotAccepted):
            create(replicate, window)
        assert host.connections == 0


def test_holder_frozen_while_it_connects_sends_no_byte_of_its_request(client: httpx.Client, clock: Clock) -> None:
    # The clock is read before the request, for the limit of the whole, before the connection and for the connection's
    # timeout: only the fifth reading, before the first byte, comes after the freeze.
    looks = itertools.count()
    began = clock.now()

    def now() -> float:
        return began + (600 if next(looks) >= 4 else 0)

    with hostile_host({"": answers}) as host, pytest.raises(NotAccepted):
        create(upstream(host, client), SendWindow(began + 10, began + 10_000, now))
    assert host.asked == []
    assert next(looks) == 5, "it gave up before it was connected"


def test_first_byte_is_checked_after_the_connection_is_made(client: httpx.Client, clock: Clock) -> None:
    late = SendWindow(clock.now() - 1, clock.now() + 25, clock.now)
    with (
        hostile_host({"": silent()}) as host,
        pytest.raises(CreateTooLateError),
    ):
        client.post(host.origin, content=b"x", extensions={"window": late})


def test_response_that_trickles_ends_by_the_wall_clock_and_is_unknown(client: httpx.Client, clock: Clock) -> None:
    moments = (clock.now() + n for n in itertools.count())  # a second for each look at the clock
    window = SendWindow(clock.now() + 10, clock.now() + 25, lambda: next(moments))
    start = head("Content-Type: application/json", "Content-Length: 1000000")
    with (
        hostile_host({"": endless(b" ", start=start, every=0.01)}) as host,
        pytest.raises(OutcomeUnknown) as unknown,
    ):
        create(upstream(host, client), window)
    assert unknown.value.status is None


def test_lost_response_resets_the_connection(client: httpx.Client, clock: Clock) -> None:
    closed: list[str] = []

    def quiet(connection: socket.socket) -> None:
        try:
            while connection.recv(65536):
                pass
            closed.append("closed in order")
        except ConnectionResetError:
            closed.append("reset")

    window = SendWindow(clock.now() + 10, clock.now() + 0.3, clock.now)
    with hostile_host({"": quiet}) as host, pytest.raises(OutcomeUnknown):
        create(upstream(host, client), window)
    assert closed == ["reset"]


def test_every_create_has_a_connection_of_its_own(client: httpx.Client, clock: Clock) -> None:
    window = SendWindow(clock.now() + 10, clock.now() + 25, clock.now)

    def answers_and_waits(connection: socket.socket) -> None:
        answers(connection)
        connection.recv(1)

    with hostile_host({"": answers_and_waits}) as host:
        for _ in range(3):
            create(upstream(host, client), window)
        assert host.connections == 3


def test_functions_send_each_create_over_a_connection_of_its_own(
    cloud: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def quiet(connection: socket.socket) -> None:
        try:
            while connection.recv(65536):
                pass
            closed.append("closed in order")
        except ConnectionResetError:
            closed.append("reset")

    window = SendWindow(clock.now() + 10, clock.now() + 0.3, clock.now)
    with hostile_host({"": quiet}) as host:
        monkeypatch.setenv("REPLICATE_API_URL", f"{host.origin}/v1")
        replicate = Replicate.from_env()
        for _ in range(2):
            with pytest.raises(OutcomeUnknown):
                create(replicate, window)
    assert closed == ["reset", "reset"]
    replicate._creates().close()
    replicate._reads().close()


def test_status_of_the_response_is_told_of_an_unknown_outcome(client: httpx.Client, clock: Clock) -> None:
    window = SendWindow(clock.now() + 10, clock.now() + 25, clock.now)
    bad = head("Content-Length: 0", status="502 Bad Gateway")
    with hostile_host({"": lambda c: c.sendall(bad)}) as host, pytest.raises(OutcomeUnknown) as unknown:
        create(upstream(host, client), window)
    assert unknown.value.status == 502


def test_connection_that_is_refused_is_not_accepted(client: httpx.Client, clock: Clock) -> None:
    window = SendWindow(clock.now() + 10, clock.now() + 25, clock.now)
    with hostile_host({"": silent()}) as host:
        replicate = upstream(host, client)
    with pytest.raises(NotAccepted):
        create(replicate, window)


class _FreezingToken:
    """A token whose reading takes as long as its function may run: it is frozen, and thawed after its end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = 0

    def value(self) -> str:
        self._clock.advance(self.seconds)
        return ReplicateInMemory.TOKEN

    def forget(self) -> None:
        """Nothing is cached here."""


def _run(submissions: Submissions, table: PredictionsTable, _: Clock) -> None:
    presenter: Any = None  # nothing is shown: the start fails
    jobs = RunJobs(submissions.starting, table, presenter, owner="alice", allow_loopback_webhooks=False)
    jobs.run({"model": VERSION, "prompt": "a fox"}, "c6af9ac6-7b61-11e6-9a41-93e8deadbeef", lambda: 900)


CLAIMERS: dict[str, Callable[[Submissions, PredictionsTable, Clock], object]] = {
    "start_prediction": lambda submissions, _, __: submissions.start(wanted()),
    "submit_prediction": lambda submissions, table, clock: submissions.submit(waiting(table, clock).id),
    "poll_prediction": lambda submissions, table, clock: submissions.poll(waiting(table, clock).id),
    "run_prediction": _run,
}
"""How each function that can claim does it."""


def test_functions_that_can_claim_are_these() -> None:
    folders = [path.parent.name for path in (ROOT / "functions").glob("*/app.py")]
    assert {folder for folder in folders if "Replicate.create" in reach(folder).methods} == CLAIMERS.keys()


@pytest.mark.parametrize("folder", CLAIMERS)
def test_function_that_claims_sends_nothing_after_its_window_however_long_it_may_run(
    folder: str,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    executed: Executed,
    wakes: Wakes,
    clock: Clock,
) -> None:
    token = _FreezingToken(clock)
    given: Any = token
    upstream = Replicate(ReplicateInMemory.URL, given, replicate.client())
    submissions = make_submissions(table, replicate, executed, clock, upstream=upstream, schemas=None)
    token.seconds = timeout_of(logical_name(folder))
    assert token.seconds > 10
    with contextlib.suppress(PredictionThrottled, AttributeError):
        CLAIMERS[folder](submissions, table, clock)
    assert replicate.creates == []
    token.seconds = 0
    (prediction_id,) = {
        item["id"]["S"]
        for item in clients.client("dynamodb").scan(TableName="predictions")["Items"]
        if "visible" in item
    }
    left = table.get(prediction_id)
    assert left is not None
    assert (left.claimed, left.submit_until) == (None, None)


def test_threads_do_not_share_a_window(client: httpx.Client, clock: Clock) -> None:
    open_, shut = (SendWindow(clock.now() + n, clock.now() + 25, clock.now) for n in (10, -1))
    outcomes: list[str] = []

    def attempt(window: SendWindow) -> None:
        with contextlib.suppress(NotAccepted):
            outcomes.append(create(upstream(host, client), window))

    with hostile_host({"": answers}) as host:
        threads = [threading.Thread(target=attempt, args=(window,)) for window in (open_, shut)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes == ["aaaa"]
