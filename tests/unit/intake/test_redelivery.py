"""Messages of the requests queue that kill the function, take its time or fail: what they cost the others."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intake.redelivery import FAILURES_LIMIT, KILLS_LIMIT, NEEDED_SECONDS, RETURN_SECONDS
from predictions.pipelines.definition import Definition, Step
from predictions.pipelines.store import PipelinesTable
from predictions.store.predictions import PredictionsTable

from tests.support.apps import Context
from tests.support.fakes import Clock, Died, Executed, Wakes, refusing
from tests.support.requests import BODY, Function, function, items, look, record, requests
from tests.support.template import load_template, resources

__all__ = ["function", "requests"]  # fixtures

BATCH_SIZE: int = load_template()["Resources"]["RequestsEventSource"]["Properties"]["BatchSize"]
RECEIVES: int = resources("AWS::SQS::Queue")["RequestsQueue"]["Properties"]["RedrivePolicy"]["maxReceiveCount"]
POISON = {**BODY, "input": {"prompt": "POISON"}}


class Queue:
    """A queue that Lambda reads: each turn hands over what is there, and what is not done comes again.

    Attributes:
        receives: How often each message was received that is not done.
        done: How often each was received until it was done.
        killed: How often the function was killed.
    """

    def __init__(self, function: Function, bodies: Mapping[str, Any]) -> None:
        self._function = function
        self._bodies = dict(bodies)
        self.receives = dict.fromkeys(bodies, 0)
        self.done: dict[str, int] = {}
        self.returned: list[tuple[str, int]] = []
        self.killed = 0

    def turn(self, batch_size: int = 10, remaining: Callable[[], float] = lambda: 25.0) -> None:
        """Everything that is there is received once."""
        waiting = list(self.receives)
        while waiting:
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            assert all(self.receives[id_] < RECEIVES for id_ in batch), "SQS would have moved it, without a reason"
            for id_ in batch:
                self.receives[id_] += 1
            records = [self._record(id_) for id_ in batch]
            context = Context()
            context.get_remaining_time_in_millis = lambda: int(remaining() * 1000)  # type: ignore[method-assign]
            with self._calls():
                try:
                    answer = self._function._app.handler({"Records": records}, context)
                except Died:
                    self.killed += 1  # Lambda deletes nothing
                    continue
            stay = {each["itemIdentifier"] for each in answer["batchItemFailures"]}
            for id_ in set(batch) - stay:
                self._delete(id_)

    def _record(self, id_: str) -> dict[str, Any]:
        made = record(self._bodies[id_], id=id_)
        made["attributes"]["ApproximateReceiveCount"] = str(self.receives[id_])
        return {**made, "receiptHandle": f"handle of {id_}"}

    def _delete(self, id_: str) -> None:
        if id_ in self.receives:
            self.done[id_] = self.receives.pop(id_)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Answers what the function asks of the requests queue."""

        def answer(params: Any, model: Any, **_: Any) -> tuple[Any, dict[str, Any]] | None:
            body = json.loads(params["body"])
            if body["QueueUrl"].endswith("/dead-requests"):
                return None
            id_ = body["ReceiptHandle"].removeprefix("handle of ")
            if model.name == "DeleteMessage":
                self._delete(id_)
            else:
                assert model.name == "ChangeMessageVisibility"
                self.returned.append((id_, body["VisibilityTimeout"]))
            return type("Http", (), {"status_code": 200})(), {}

        events: Any = clients.client("sqs").meta.events
        events.register_first("before-call.sqs", answer)
        try:
            yield
        finally:
            events.unregister("before-call.sqs", answer)


@contextmanager
def killed_over(text: str) -> Iterator[None]:
    """The function is killed, as by its memory, when it handles a message with that text."""

    def kill(params: Any, **_: Any) -> None:
        if text in str(params["body"]):
            raise Died

    events: Any = clients.client("dynamodb").meta.events
    events.register_first("before-call.dynamodb.PutItem", kill)
    try:
        yield
    finally:
        events.unregister("before-call.dynamodb.PutItem", kill)


def ids(count: int) -> list[str]:
    return [f"m-{n}" for n in range(count)]


def bodies(poisoned: set[str], count: int = 10) -> dict[str, Any]:
    return {
        id_: {**POISON, "task_token": f"token-{id_}"} if id_ in poisoned else {**BODY, "input": {"prompt": id_}}
        for id_ in ids(count)
    }


def tries(id_: str) -> dict[str, int]:
    found = [item for item in items("tries") if item["pk"] == f"message#{id_}"]
    return {name: found[0].get(name, 0) for name in ("begun", "failed")} if found else {"begun": 0, "failed": 0}


# -- one among ten ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", ids(10))
@pytest.mark.parametrize("batch_size", [10, BATCH_SIZE])
def test_message_that_kills_the_function_costs_the_nine_others_one_receive_at_most(
    function: Function, executed: Executed, wakes: Wakes, poisoned: str, batch_size: int
) -> None:
    queue = Queue(function, bodies({poisoned}))
    with killed_over("POISON"):
        queue.turn(batch_size)
        queue.turn(batch_size)
        assert queue.done.keys() == set(ids(10)) - {poisoned}
        assert max(queue.done.values()) <= 2
        assert len(executed.inputs) == 9
        assert wakes.told == []
        while queue.receives:
            queue.turn(batch_size)
    assert queue.killed == KILLS_LIMIT + 1
    (letter,) = look()
    assert letter.id == poisoned
    assert f"did not finish it in {KILLS_LIMIT + 1} tries" in letter.reason
    assert wakes.told == [(f"token-{poisoned}", ("RequestNotStarted", letter.reason))]
    assert len(executed.inputs) == 9


def test_several_that_kill_the_function_are_all_given_up_and_the_others_done(
    function: Function, executed: Executed
) -> None:
    poisoned = {"m-0", "m-4", "m-9"}
    queue = Queue(function, bodies(poisoned))
    with killed_over("POISON"):
        for _ in range(RECEIVES):
            if queue.receives:
                queue.turn()
    assert queue.receives == {}
    assert {letter.id for letter in look()} == poisoned
    assert len(executed.inputs) == 7
    assert all(queue.done[id_] <= len(poisoned) + 2 for id_ in ids(10) if id_ not in poisoned)


def test_message_that_kills_and_comes_again_with_new_ones_is_handled_after_them(
    function: Function, executed: Executed
) -> None:
    queue = Queue(function, bodies({"m-0"}, 1))
    with killed_over("POISON"):
        queue.turn()
        queue._bodies |= {"m-1": BODY, "m-2": BODY}
        queue.receives |= {"m-1": 0, "m-2": 0}
        queue.turn()
    assert queue.done == {"m-1": 1, "m-2": 1}
    assert queue.killed == 2


def test_message_that_is_given_up_can_be_redriven(function: Function, executed: Executed) -> None:
    queue = Queue(function, bodies({"m-0"}, 1))
    with killed_over("POISON"):
        while queue.receives:
            queue.turn()
    (letter,) = look()
    # What killed it is repaired: its tries of then do not count.
    assert function(*letter.event()["Records"]) == []
    assert len(executed.inputs) == 1


# -- time ------------------------------------------------------------------------------------------------------------


def test_message_that_nobody_looked_at_loses_no_try_and_returns_soon(function: Function, executed: Executed) -> None:
    queue = Queue(function, bodies(set(), 3))
    for _ in range(RECEIVES // 2):
        queue.turn(remaining=lambda: NEEDED_SECONDS - 1)
    assert queue.returned[:3] == [(id_, RETURN_SECONDS) for id_ in ids(3)]
    assert [tries(id_)["begun"] for id_ in ids(3)] == [0, 0, 0]
    assert items("tries") == []
    queue.turn()
    assert queue.receives == {}
    assert len(executed.inputs) == 3
    assert look() == []


def test_messages_behind_one_that_takes_all_the_time_return_untouched_and_are_done_next(
    function: Function, executed: Executed
) -> None:
    queue = Queue(function, bodies(set(), 3))
    left = iter([25.0, NEEDED_SECONDS - 1])
    queue.turn(remaining=lambda: next(left))
    assert queue.done == {"m-0": 1}
    assert [id_ for id_, _ in queue.returned] == ["m-1", "m-2"]
    queue.turn()
    assert queue.receives == {}


def test_time_is_enough_for_every_message_of_a_batch_to_use_up_its_allowance() -> None:
    from predictions.templating import SECONDS_LIMIT

    timeout = resources("AWS::Serverless::Function")["StartFromQueueFunction"]["Properties"]["Timeout"]
    assert timeout >= (BATCH_SIZE * 2 * SECONDS_LIMIT) + NEEDED_SECONDS


def test_placeholders_that_are_not_filled_in_time_are_given_up_with_the_reason_after_some_tries(
    function: Function, monkeypatch: pytest.MonkeyPatch, wakes: Wakes
) -> None:
    from predictions.templating import TooSlow

    def slow(_: Any) -> Any:
        raise TooSlow("not in time")

    monkeypatch.setattr(function._app.requests, "take", slow)
    queue = Queue(function, {"m-0": {**BODY, "task_token": "token"}})
    for _ in range(KILLS_LIMIT + 1):
        queue.turn()
    assert look() == [], "the machine may have stalled"
    queue.turn()
    (letter,) = look()
    assert "ran out of memory or time" in letter.reason
    assert [token for token, _ in wakes.told] == ["token"]


# -- errors ----------------------------------------------------------------------------------------------------------


def test_message_that_aws_refuses_is_kept_with_a_reason_after_an_hour_and_its_state_still_waits(
    function: Function, executed: Executed, wakes: Wakes
) -> None:
    queue = Queue(function, {"m-0": {**BODY, "task_token": "token"}})
    visibility = resources("AWS::SQS::Queue")["RequestsQueue"]["Properties"]["VisibilityTimeout"]
    with refusing("StartExecution", "ThrottlingException"):
        for _ in range(3600 // visibility):
            queue.turn()
        assert look() == []
        for _ in range(2):
            queue.turn()
    assert queue.receives == {}
    (letter,) = look()
    assert letter.reason.startswith(f"start_from_queue failed in each of {FAILURES_LIMIT + 1} tries")
    assert wakes.told == [], "a redrive starts it"
    assert function(*letter.event()["Records"]) == []
    assert len(executed.inputs) == 1


def test_tries_that_cannot_be_counted_hold_up_no_new_message(function: Function, executed: Executed) -> None:
    queue = Queue(function, bodies(set(), 2))
    with refusing("StartExecution", "ThrottlingException"):
        queue.turn()
    queue._bodies["m-2"] = BODY
    queue.receives["m-2"] = 0
    for refused in ("BatchGetItem", "UpdateItem"):
        with refusing(refused, "ThrottlingException", service="dynamodb"):
            queue.turn()
        assert queue.done == {"m-2": 1}
        assert sorted(queue.receives) == ["m-0", "m-1"]
    queue.turn()
    assert queue.receives == {}
    assert len(executed.inputs) == 3


def test_tries_whose_counts_are_written_and_not_confirmed_do_not_count_as_cut_off(
    function: Function, executed: Executed
) -> None:
    queue = Queue(function, bodies(set(), 1))
    with refusing("StartExecution", "ThrottlingException"):
        queue.turn()

    events: Any = clients.client("dynamodb").meta.events

    def lose(**_: Any) -> None:
        events.unregister("after-call.dynamodb.UpdateItem", lose)
        raise ReadTimeoutError(endpoint_url="https://aws.example")

    for _ in range(KILLS_LIMIT + 1):
        # Of the turn's writes the first: that a try begins.
        events.register_first("after-call.dynamodb.UpdateItem", lose)
        queue.turn()
        assert list(queue.receives) == ["m-0"]
    assert tries("m-0")["begun"] == KILLS_LIMIT + 1
    queue.turn()
    assert queue.receives == {}
    assert len(executed.inputs) == 1
    assert look() == []


def test_message_that_cannot_be_deleted_or_returned_at_once_is_done_all_the_same(
    function: Function, executed: Executed
) -> None:
    records = [{**record(BODY, id=id_), "receiptHandle": "handle"} for id_ in ids(3)]
    with (
        refusing("DeleteMessage", "AccessDenied", service="sqs"),
        refusing("ChangeMessageVisibility", "AccessDenied", service="sqs"),
    ):
        assert function(*records) == []
        assert function(*records, remaining_seconds=NEEDED_SECONDS - 1) == ids(3)
    assert len(executed.inputs) == 3


def test_given_up_message_that_cannot_be_kept_stays(function: Function, wakes: Wakes) -> None:
    queue = Queue(function, bodies({"m-0"}, 1))
    with killed_over("POISON"):
        for _ in range(KILLS_LIMIT + 1):
            queue.turn()
    with refusing("SendMessage", "AccessDenied", service="sqs"):
        queue.turn()
    assert list(queue.receives) == ["m-0"]
    queue.turn()
    assert queue.receives == {}
    assert len(look()) == 1


def test_new_message_is_counted_nowhere(function: Function) -> None:
    Queue(function, bodies(set())).turn()
    assert items("tries") == [], "a write for each message is money"


def test_counts_of_tries_expire_after_the_message(function: Function) -> None:
    queue = Queue(function, bodies(set(), 1))
    with refusing("StartExecution", "ThrottlingException"):
        queue.turn()
        queue.turn()
    found = map(deserialize, clients.client("dynamodb").scan(TableName="predictions")["Items"])
    (item,) = [item for item in found if item["sk"] == "tries"]
    keeps = resources("AWS::SQS::Queue")["RequestsQueue"]["Properties"]["MessageRetentionPeriod"]
    assert item["expires_at"] > time.time() + keeps


def test_step_of_a_pipeline_that_kills_the_function_fails_its_pipeline_with_the_reason(
    function: Function, table: PredictionsTable, outputs: OutputsBucket, clock: Clock
) -> None:
    pipelines = PipelinesTable("predictions", outputs, clients.client("dynamodb"))
    step = Step("image", {"model": BODY["model"]}, {"prompt": "{{ input.prompt }}"}, None, ())
    pipelines.put_pipeline(
        "p" * 26, Definition({"prompt": "POISON"}, (step,)), owner="alice", fingerprint="f",
        deadline=int(clock.now()) + 600, expires=int(clock.now()) + 6000, depth=0, now=clock.now(),
    )  # fmt: skip
    queue = Queue(function, {"m-0": {"pipeline_id": "p" * 26, "step": "image", "index": 0}, "m-1": BODY})
    with killed_over("POISON"):
        while queue.receives:
            queue.turn()
    stored = pipelines.read_pipeline("p" * 26)
    assert stored is not None
    (letter,) = look()
    assert stored.notes["image"].errors == {0: letter.reason}
    assert stored.pipeline.events == 1, "its execution looks at it"
