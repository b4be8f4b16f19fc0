"""The protocol under faults: every call to AWS that is lost, refused, repeated or the last of its function."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import httpx
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from predictions.aws import clients
from predictions.errors import CopyInterrupted, PredictionThrottled, Problem
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intents.model import LIFETIME_LIMIT_SECONDS, Intent
from predictions.lifecycle.archive_outputs import copy
from predictions.lifecycle.receive_webhook import receive
from predictions.observability import metrics
from predictions.status import Status
from predictions.store.keys import shard_of
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

from tests.support.apps import AwsCalls, Context, load_app, sample
from tests.support.fakes import (
    API_URL,
    PNG,
    VERSION,
    Answer,
    Clock,
    Died,
    Executed,
    Fault,
    ReplicateInMemory,
    Wakes,
    accept_then,
    answer,
    answers_lost,
    attempt,
    fail,
    faulty,
    meanwhile,
    refusing,
    served,
)
from tests.support.fixtures import make_submissions
from tests.support.predictions import FILE, current, hold_token, look, put, raw_items, told, waiting, wanted
from tests.support.protocol import Submissions, Timing

# -- repeated writes ------------------------------------------------------------------------------------------


def bound(table: PredictionsTable, clock: Clock) -> Prediction:
    put_ = put(table, clock)
    merged = table.merge(put_.id, told("starting"), clock.now()).prediction
    assert merged is not None
    return merged


def ended_with_files(table: PredictionsTable, clock: Clock) -> Prediction:
    merged = table.merge(put(table, clock).id, told("succeeded", output=[FILE]), clock.now()).prediction
    assert merged is not None
    return merged


def bound_with_orphan(table: PredictionsTable, clock: Clock) -> Prediction:
    prediction = bound(table, clock)
    table.merge(prediction.id, told("processing", "v" * 26), clock.now())
    return current(table, prediction.id)


def ended_with_canceled_orphan(table: PredictionsTable, clock: Clock) -> Prediction:
    prediction = bound_with_orphan(table, clock)
    table.merge(prediction.id, told("failed", error="bad"), clock.now())
    table.orphan_canceled(prediction, "v" * 26)
    return current(table, prediction.id)


STORED = StoredFile("/0", 0, "alice/a/u/0", 10, "ab" * 32, "image/png")
Write = Callable[[PredictionsTable, Prediction, float], Any]
WRITES: dict[str, tuple[Callable[[PredictionsTable, Clock], Prediction], Write]] = {
    "claim": (lambda t, c: put(t, c, claim=False), lambda t, p, now: t.claim(p.id, "v1", now)),
    "release": (put, lambda t, p, now: t.release(p, now, 30)),
    "release_absent": (put, lambda t, p, now: t.release_absent(p, now, 5, 1)),
    "note_unknown": (put, lambda t, p, now: t.note_unknown(p, {"submit_over": int(now)})),
    "merge that binds": (put, lambda t, p, now: t.merge(p.id, told("starting"), now)),
    "merge of progress": (bound, lambda t, p, now: t.merge(p.id, told("processing", output=["a"], logs="1"), now)),
    "merge of large progress": (bound, lambda t, p, now: t.merge(p.id, told("processing", logs="1" * 200_000), now)),
    "merge of an end": (bound, lambda t, p, now: t.merge(p.id, told("failed", error="bad", logs="1"), now)),
    "merge of an end with files": (bound, lambda t, p, now: t.merge(p.id, told("succeeded", output=[FILE]), now)),
    "merge of an orphan": (bound, lambda t, p, now: t.merge(p.id, told("processing", "v" * 26), now)),
    "merge of an end beside an orphan": (bound_with_orphan, lambda t, p, now: t.merge(p.id, told("failed"), now)),
    "end": (put, lambda t, p, now: t.end(p, Status.FAILED, "given up", now)),
    "end with a refusal": (put, lambda t, p, now: t.end(p, Status.FAILED, "no", now, refusal={"status": 422})),
    "end beside an orphan": (bound_with_orphan, lambda t, p, now: t.end(p, Status.FAILED, "given up", now)),
    "end_copy": (ended_with_files, lambda t, p, now: t.end_copy(p, [STORED], now)),
    "end_copy of many files": (ended_with_files, lambda t, p, now: t.end_copy(p, [STORED] * 200, now)),
    "next_execution": (bound, lambda t, p, now: t.next_execution(p, "arn:2", now)),
    "request_cancel": (bound, lambda t, p, now: t.request_cancel(p.id, now)),
    "check_again_at": (bound, lambda t, p, now: t.check_again_at(p, now + 99)),
    "count_not_found": (bound, lambda t, p, now: t.count_not_found(p, 3)),
    "lease_copy": (ended_with_files, lambda t, p, now: t.lease_copy(p, 1, 1200, now)),
    "orphan_canceled": (bound_with_orphan, lambda t, p, now: t.orphan_canceled(p, "v" * 26)),
    "close": (ended_with_canceled_orphan, lambda t, p, now: t.close(p)),
}


@pytest.mark.parametrize(("arrange", "write"), WRITES.values(), ids=WRITES)
def test_write_that_botocore_repeats_after_a_lost_answer_leaves_what_one_leaves(
    table: PredictionsTable, clock: Clock, arrange: Callable[[PredictionsTable, Clock], Prediction], write: Write
) -> None:
    once, twice = arrange(table, clock), arrange(table, clock)
    before = comparable(once)
    write(table, once, clock.now())
    with answers_lost() as lost:
        write(table, twice, clock.now())
    assert "UpdateItem" in lost
    assert comparable(twice) == comparable(once)
    assert comparable(once) != before


def comparable(prediction: Prediction) -> Any:
    """All of a prediction's items without what differs from one prediction to the next."""
    text = json.dumps(raw_items(prediction.id), sort_keys=True).replace(prediction.id, "id")
    text = text.replace(shard_of(prediction.id), "open")
    return json.loads(re.sub(r'"written_by": {"S": "\w+"}', '"written_by": {}', text))


def test_writes_that_give_a_right_give_it_though_their_first_answer_was_lost(
    table: PredictionsTable, clock: Clock
) -> None:
    with answers_lost():
        assert put(table, clock).claimed == int(clock.now())
        unclaimed = put(table, clock, claim=False)
        assert table.claim(unclaimed.id, None, clock.now()) is not None
        assert table.reserve("w" * 26, unclaimed)
        ended = ended_with_files(table, clock)
        clock.advance(1021)
        assert table.lease_copy(ended, 2, 900, clock.now())
    assert table.claim(unclaimed.id, None, clock.now()) is None
    assert not table.reserve("w" * 26, ended)
    assert not table.lease_copy(ended, 1, 900, clock.now())


# -- the world around one prediction --------------------------------------------------------------------------


def forget(*pks: str) -> None:
    """Remove the items with these keys."""
    dynamodb = clients.client("dynamodb")
    for item in dynamodb.scan(TableName="predictions")["Items"]:
        if item["pk"]["S"] in pks:
            dynamodb.delete_item(TableName="predictions", Key={"pk": item["pk"], "sk": item["sk"]})


class World:
    """Everything that goes on around one prediction when nobody interferes any more."""

    def __init__(
        self,
        table: PredictionsTable,
        outputs: OutputsBucket,
        replicate: ReplicateInMemory,
        executed: Executed,
        wakes: Wakes,
        clock: Clock,
    ) -> None:
        self.table = table
        self.outputs = outputs
        self.replicate = replicate
        self.executed = executed
        self.wakes = wakes
        self.clock = clock
        self.prediction_id = ""
        self.intent: Intent = wanted()
        self.begun = 0
        self.submissions = make_submissions(table, replicate, executed, clock)

    def begin(self) -> None:
        """A function that was never warm, and a Replicate that knows of nothing."""
        self.begun += 1
        self.clock.advance(7200)
        forget("unknown", "readings")  # of the world before
        self.submissions = make_submissions(self.table, self.replicate, self.executed, self.clock)
        self.replicate.predictions.clear()
        self.replicate.asked.clear()
        self.replicate.faults.clear()
        self.replicate.files = {FILE: served(PNG)}
        self.wakes.tokens.clear()
        self.wakes.copies.clear()
        clients._api_url = None

    @property
    def upstream_id(self) -> str:
        """What the prediction is bound to, or Replicate's only one."""
        return current(self.table, self.prediction_id).upstream_id or next(iter(self.replicate.predictions))

    def copy(self, n: int) -> None:
        copy(self.table, self.outputs, self.prediction_id, n, remaining_seconds=lambda: 900, now=self.clock.now)

    def track(self, n: int, *, submit: bool) -> Iterator[tuple[float, str]]:
        """The state machine's steps; yields how long it waits, and for which token."""
        if submit:
            yield from self._take_turns(self.submissions.submit)
        wait_seconds = 60
        for number in count():
            token = f"{self.prediction_id}-{n}#{number}"
            check_at = self.clock.now() + wait_seconds + 120
            try:
                arn = self.executed.arn(f"{self.prediction_id}-{n}")
                hold_token(self.table, self.prediction_id, token, next_check_at=check_at, execution_arn=arn)
            except clients.client("dynamodb").exceptions.ConditionalCheckFailedException:
                break
            yield wait_seconds, token
            if token in self.wakes.tokens:
                return
            if token in self.wakes.copies:
                break
            yield from self._take_turns(self.submissions.poll)
            wait_seconds = 600
        for seconds in (10, 20, 40, 80, 160, 320, 600, 600, 600, 600):
            try:
                return self.copy(n)
            except CopyInterrupted:
                yield seconds, ""
        return None

    def _take_turns(self, step: Callable[[str], None]) -> Iterator[tuple[float, str]]:
        while True:
            try:
                return step(self.prediction_id)
            except PredictionThrottled as throttled:
                yield throttled.seconds, ""
                step = self.submissions.submit

    def go_on(self) -> None:
        """Lets time pass until nobody has to look after the prediction any more."""
        began_at = self.clock.now()
        running: dict[int, tuple[float, str, Iterator[tuple[float, str]]]] = {}
        for _ in range(60):
            prediction = self.table.get(self.prediction_id)
            if prediction is None or prediction.next_check_at is None:
                return
            n = prediction.execution_n
            if n not in running and (submit := self._submits(n)) is not None:
                running[n] = self.clock.now(), "", self.track(n, submit=submit)
            soonest = min([prediction.next_check_at, *(until for until, _, _ in running.values())])
            self.clock.moment = max(self.clock.moment, soonest)
            self._finish(self.clock.now() - began_at)
            if prediction.next_check_at <= self.clock.now():
                self.submissions.sweep(10, lambda: 300)
            for n, (until, token, steps) in list(running.items()):
                if until <= self.clock.now() or token in (*self.wakes.tokens, *self.wakes.copies):
                    try:
                        seconds, token = next(steps)
                        running[n] = self.clock.now() + seconds, token, steps
                    except StopIteration:
                        self.executed.stop(f"{self.prediction_id}-{n}")
                        del running[n]
        raise AssertionError(f"it never ends: {self.table.get(self.prediction_id)}")

    def _submits(self, n: int) -> bool | None:
        """Whether the nth execution has to submit; None where it does not run."""
        return self.executed.running(f"{self.prediction_id}-{n}")

    def _finish(self, seconds: float) -> None:
        for upstream_id, upstream in self.replicate.predictions.items():
            # Orphans run longer, so that whoever cancels them has something to cancel.
            if (upstream["status"] == "starting" and seconds >= 30) or (
                upstream["status"] == "processing" and seconds >= 300
            ):
                self.replicate.finish(upstream_id, output=[FILE])

    def check(self) -> None:
        """What has to hold of the prediction in the end, whatever happened."""
        whole = self.table.read(self.prediction_id)
        accepted = self.replicate.predictions
        if whole is None:
            assert accepted == {}, "accepted, and nobody knows of it"
            return
        prediction = whole.prediction
        assert prediction.visible in ("succeeded", "failed", "canceled")
        assert not prediction.orphans
        others = [upstream["status"] for id_, upstream in accepted.items() if id_ != prediction.upstream_id]
        assert set(others) <= {"canceled"}, "a prediction that nobody owns was left to run"
        if not accepted:
            assert prediction.visible in ("failed", "canceled")
            return
        assert prediction.upstream_id in accepted, "accepted, and not bound"
        assert prediction.visible == accepted[prediction.upstream_id]["status"]
        if prediction.visible == "succeeded":
            s3 = clients.client("s3")
            stored = [s3.get_object(Bucket="outputs", Key=str(file.key))["Body"].read() for file in whole.files]
            assert stored == [PNG]


@pytest.fixture
def world(
    table: PredictionsTable,
    outputs: OutputsBucket,
    replicate: ReplicateInMemory,
    executed: Executed,
    wakes: Wakes,
    clock: Clock,
) -> World:
    return World(table, outputs, replicate, executed, wakes, clock)


@dataclass(frozen=True)
class Situation:
    """A run of one function.

    Attributes:
        arrange: What happened before.
        act: What the function does.
        creates: How many predictions Replicate accepts at the most; more than one where the situation itself has two.
        repeated: Whether the function's caller calls again where it got no answer.
        in_execution: Whether the state machine calls it: then its execution ends with it.
    """

    arrange: Callable[[World], Any]
    act: Callable[[World], Any]
    creates: int = 1
    repeated: bool = False
    in_execution: bool = False


def intend(*faults: Answer, keyed: bool = False, **options: Any) -> Callable[[World], None]:
    def arrange(world: World) -> None:
        world.replicate.faults = list(faults)
        world.intent = wanted(lifetime="15m", key=f"key-{world.begun}" if keyed else None, **options)
        world.prediction_id = world.intent.id

    return arrange


def start(world: World) -> None:
    # As an SDK does, which says how often it has tried where it has no key.
    world.submissions.start(world.intent, attempt=None if world.intent.keyed else attempt(world.clock, 0))


def started(*faults: Answer, **options: Any) -> Callable[[World], None]:
    def arrange(world: World) -> None:
        intend(*faults, **options)(world)
        start(world)

    return arrange


def started_and_ended(world: World) -> None:
    started()(world)
    world.replicate.finish(world.upstream_id, output=[FILE])


def lost_and_waited(world: World) -> None:
    started(accept_then(httpx.ReadTimeout))(world)
    world.clock.advance(100)


def past_deadline(world: World) -> None:
    started()(world)
    world.clock.advance(901)


def waiting_and_tracked(world: World) -> None:
    prediction = waiting(world.table, world.clock, lifetime="15m")
    world.prediction_id = prediction.id
    clients.client("stepfunctions").start_execution(
        stateMachineArn=world.executed.machine_arn,
        name=f"{prediction.id}-1",
        input=json.dumps({"id": prediction.id}),
    )


def ended_upstream(world: World) -> None:
    started_and_ended(world)
    world.submissions.poll(world.prediction_id)


def stopped(world: World) -> None:
    started()(world)
    world.executed.stop(f"{world.prediction_id}-1")
    world.clock.advance(181)


def with_second(world: World) -> None:
    started()(world)
    post = next(r for r in world.replicate.asked if r.method == "POST")
    webhook = f"{API_URL}/webhooks/replicate/{world.prediction_id}"
    world.replicate.accept(post, status="processing", webhook=webhook)


def webhook_of(world: World, upstream_id: str) -> None:
    body = json.dumps(world.replicate.predictions[upstream_id]).encode()
    receive(world.table, world.prediction_id, body, world.clock.now())


def receive_second(world: World) -> None:
    webhook_of(world, next(i for i in world.replicate.predictions if i != world.upstream_id))


def with_recorded_orphan(world: World) -> None:
    with_second(world)
    receive_second(world)


def sweep(world: World) -> None:
    world.submissions.sweep(10, lambda: 300)


def poll(world: World) -> None:
    world.submissions.poll(world.prediction_id)


def submit(world: World) -> None:
    world.submissions.submit(world.prediction_id)


def cancel(world: World) -> None:
    world.submissions.cancel(current(world.table, world.prediction_id))


def receive_webhook(world: World) -> None:
    webhook_of(world, world.upstream_id)


THROTTLED = answer(429, {"retry_after": 5})
SITUATIONS: dict[str, Situation] = {
    "start": Situation(intend(), start),
    "start with a key and a large input": Situation(
        intend(keyed=True, input={"text": "x" * 110_000}), start, repeated=True
    ),
    "start that is throttled": Situation(intend(THROTTLED), start),
    "start that is refused": Situation(intend(answer(422)), start),
    "start whose answer is lost": Situation(intend(accept_then(502)), start),
    "submit": Situation(waiting_and_tracked, submit, in_execution=True),
    "poll that finds the end": Situation(started_and_ended, poll, in_execution=True),
    "poll that reconciles": Situation(lost_and_waited, poll, in_execution=True),
    "poll past the deadline": Situation(past_deadline, poll, in_execution=True),
    "webhook that binds": Situation(started(accept_then(httpx.ReadTimeout)), receive_webhook),
    "webhook of the end": Situation(started_and_ended, receive_webhook),
    "webhook of an orphan": Situation(with_second, receive_second, creates=2, repeated=True),
    "copy": Situation(ended_upstream, lambda w: w.copy(1), in_execution=True),
    "sweep after a stopped execution": Situation(stopped, sweep),
    "sweep of an orphan": Situation(with_recorded_orphan, sweep, creates=2),
    "cancel": Situation(started(), cancel, repeated=True),
    "cancel before the turn": Situation(started(THROTTLED), cancel, repeated=True),
}
EXPECTED_FAILURES = (ClientError, BotoCoreError, Problem, PredictionThrottled, CopyInterrupted)


READ = re.compile(r"\w+\.(BatchGet|Describe|Get|Query)")


def faults(situation: Situation, call: str) -> list[Fault]:
    """What differs in its outcome: a read changes nothing, and an execution ends with an error as with a death."""
    if READ.match(call):
        return [] if situation.in_execution else [Fault.REFUSED]
    return [Fault.DIED_BEFORE, Fault.DIED_AFTER] if situation.in_execution else list(Fault)


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_fault_at_any_call_to_aws_ends_with_at_most_one_create_bound_stored_and_told(
    world: World, situation: Situation
) -> None:
    calls = run(world, situation, Fault.REFUSED, 1000)
    assert len(calls) > 1
    for n, call in enumerate(calls):
        for fault in faults(situation, call):
            assert run(world, situation, fault, n)[n] == call


def run(world: World, situation: Situation, fault: Fault, n: int) -> list[str]:
    """One run whose nth call to AWS does not go well, and all that follows; the calls of the run."""
    world.begin()
    # Each run is the first one of its version.
    clients.client("dynamodb").delete_item(
        TableName="predictions", Key={"pk": {"S": f"schema#{VERSION}"}, "sk": {"S": "input"}}
    )
    situation.arrange(world)
    failure: BaseException | None = None
    with faulty(fault, n) as made:
        try:
            situation.act(world)
        except (Died, *EXPECTED_FAILURES) as error:
            failure = error
    try:
        if situation.act is start and isinstance(failure, ClientError | BotoCoreError | Problem):
            assert world.replicate.predictions == {}, "accepted, and the caller is told to try again"
        if situation.in_execution and isinstance(failure, Died | ClientError | BotoCoreError):
            world.executed.stop(f"{world.prediction_id}-{current(world.table, world.prediction_id).execution_n}")
        if situation.repeated and failure:
            world.clock.advance(10)
            with suppress(*EXPECTED_FAILURES):
                situation.act(world)
        world.go_on()
        world.check()
        assert len(world.replicate.predictions) <= situation.creates
    except AssertionError as error:
        raise AssertionError(f"{fault}: call {n + 1} of {made}: {error}") from error
    return made


@pytest.mark.parametrize("key", [None, "k"])
def test_life_in_which_the_first_answer_of_every_call_is_lost_has_one_create_and_its_files(
    world: World, key: str | None
) -> None:
    world.begin()
    world.intent = wanted(key=key)
    world.prediction_id = world.intent.id
    with answers_lost("dynamodb", "s3", "secretsmanager", "ssm", "stepfunctions") as lost:
        start(world)
        world.go_on()
    assert {"PutItem", "UpdateItem", "StartExecution", "PutObject"} <= set(lost)
    assert len(world.replicate.creates) == 1
    world.check()


def test_claim_whose_answer_is_lost_is_still_posted(world: World) -> None:
    waiting_and_tracked(world)
    with answers_lost():
        submit(world)
    assert current(world.table, world.prediction_id).upstream_id in world.replicate.predictions


def test_alarm_for_lost_files_is_raised_though_the_answer_to_the_last_write_is_lost(world: World) -> None:
    ended_upstream(world)
    world.replicate.files.clear()
    metrics.clear_metrics()
    with answers_lost():
        world.copy(1)
    assert current(world.table, world.prediction_id).visible == "succeeded"
    assert "CopiesFailed" in metrics.metric_set


# -- start and submit -----------------------------------------------------------------------------------------

REFUSED_CREATES = {"throttled": THROTTLED, "no connection": fail(httpx.ConnectError)}


@pytest.mark.parametrize("create", REFUSED_CREATES.values(), ids=REFUSED_CREATES)
def test_create_not_accepted_that_cannot_be_tracked_either_is_a_503_and_has_failed(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, create: Answer
) -> None:
    replicate.faults = [create]
    intent = wanted()
    with refusing("StartExecution", "ThrottlingException"), pytest.raises(Problem) as problem:
        submissions.start(intent)
    assert problem.value.status == 503
    assert int(problem.value.headers["Retry-After"]) > 0
    assert current(table, intent.id).visible == "failed"
    clock.advance(1000)
    submissions.sweep(10, lambda: 300)
    submissions.submit(intent.id)
    assert replicate.predictions == {}


@pytest.mark.parametrize("create", REFUSED_CREATES.values(), ids=REFUSED_CREATES)
def test_create_with_a_key_not_accepted_that_cannot_be_tracked_either_is_submitted_after_a_sweep(
    world: World, create: Answer
) -> None:
    world.begin()
    world.replicate.faults = [create]
    world.intent = wanted(key="k")
    world.prediction_id = world.intent.id
    with refusing("StartExecution", "ThrottlingException"):
        start(world)
    assert current(world.table, world.prediction_id).visible == "starting"
    world.go_on()
    world.check()
    assert current(world.table, world.prediction_id).visible == "succeeded"


def test_throttled_request_whose_next_execution_was_only_counted_is_not_failed(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    replicate.faults = [THROTTLED]
    prediction = submissions.start(wanted())
    executed.stop(f"{prediction.id}-2")
    clock.advance(66)
    with refusing("StartExecution", "ThrottlingException", lambda asked: asked["name"].endswith("-3")):
        submissions.sweep(10, lambda: 300)
    assert current(table, prediction.id).execution_n == 3
    clock.advance(601)
    submissions.sweep(10, lambda: 300)
    assert current(table, prediction.id).visible == "starting"
    assert executed.inputs[f"{prediction.id}-3"]["submit"] is True


@pytest.mark.parametrize(
    ("service", "operation"), [("ssm", "GetParameter"), ("s3", "GetObject"), ("dynamodb", "GetItem")]
)
def test_submit_that_cannot_read_what_it_sends_leaves_no_claim(
    submissions: Submissions,
    table: PredictionsTable,
    replicate: ReplicateInMemory,
    clock: Clock,
    service: str,
    operation: str,
) -> None:
    prediction = waiting(table, clock, input={"prompt": "x" * 200_000})
    with refusing(operation, "ThrottlingException", service=service), pytest.raises(ClientError):
        submissions.submit(prediction.id)
    assert current(table, prediction.id).claimed is None
    submissions.submit(prediction.id)
    assert len(replicate.creates) == 1


def test_note_of_a_recent_request_that_cannot_be_written_leaves_no_intent(
    submissions: Submissions, table: PredictionsTable, clock: Clock
) -> None:
    intent = wanted()
    note = refusing("PutItem", "ThrottlingException", lambda asked: "recent#" in str(asked), service="dynamodb")
    with note, pytest.raises(ClientError):
        submissions.start(intent, attempt=attempt(clock, 0))
    assert table.get(intent.id) is None


@pytest.mark.parametrize("operation", ["Query", "GetItem"])
def test_read_that_fails_after_the_create_is_still_a_201(
    submissions: Submissions, replicate: ReplicateInMemory, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    app = load_app("start_prediction", monkeypatch)
    submissions.put_into(app, monkeypatch)
    event = sample("start_prediction", "version")
    event["headers"] |= {"Prefer": "wait=5"}
    with refusing(operation, "ThrottlingException", lambda _: bool(replicate.creates), service="dynamodb"):
        answered = app.handler(event, Context())
    assert len(replicate.creates) == 1
    assert (answered["statusCode"], json.loads(answered["body"])["status"]) == (201, "starting")


@pytest.mark.parametrize("secret", [" ", "{}", '{"token": ""}', "two words"])
def test_token_that_is_none_is_a_502_and_nothing_is_sent(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, secret: str
) -> None:
    clients.client("secretsmanager").put_secret_value(SecretId="replicate-token", SecretString=secret)
    intent = wanted()
    with pytest.raises(Problem) as problem:
        submissions.start(intent)
    assert problem.value.status == 502
    assert replicate.asked == []
    assert current(table, intent.id).visible == "failed"


def test_retry_of_a_request_that_the_stacks_token_could_not_pay_gets_the_same_refusal(
    submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [answer(402)]
    for number in range(2):
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(), attempt=attempt(clock, number))
        assert problem.value.status == 502
    assert len(replicate.creates) == 1


def test_cancel_while_the_token_is_refused_ends_a_keyed_request(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory
) -> None:
    intent = wanted(key="k")

    def cancel_meanwhile(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        submissions.cancel(current(table, intent.id))
        return httpx.Response(401, json={"detail": "no"})

    replicate.faults = [cancel_meanwhile]
    with pytest.raises(Problem):
        submissions.start(intent)
    assert current(table, intent.id).visible == "canceled"


# -- reconciling ----------------------------------------------------------------------------------------------


def test_candidate_whose_numbers_are_written_differently_is_the_same(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [accept_then(httpx.ReadTimeout)]
    prediction = submissions.start(wanted(input={"guidance_scale": 7.0}))
    [upstream] = replicate.predictions.values()
    upstream["input"] = {"guidance_scale": 7}
    clock.advance(100)
    submissions.poll(prediction.id)
    assert current(table, prediction.id).upstream_id == upstream["id"]


def test_same_request_twice_with_both_answers_lost_never_binds_one_upstream_prediction_twice(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [accept_then(httpx.ReadTimeout), answer(502)]
    first, second = submissions.start(wanted()), submissions.start(wanted(owner="bob"))
    clock.advance(100)

    def lag(params: dict[str, Any], **_: Any) -> Any:
        if "by_upstream_id" not in str(params["body"]):
            return None
        return type("Http", (), {"status_code": 200})(), {"Items": [], "Count": 0}

    answered: Any = lag  # the stubs do not know that a handler may answer in AWS's place
    clients.client("dynamodb").meta.events.register_first("before-call.dynamodb.Query", answered)
    look(submissions, first.id)
    look(submissions, second.id)
    ids = [current(table, p.id).upstream_id for p in (first, second)]
    assert sorted(ids, key=str) == sorted([*replicate.predictions, None], key=str)


def test_several_candidates_are_no_reason_to_submit_again(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    submissions = make_submissions(table, replicate, executed, clock, resubmit=True)
    replicate.faults = [accept_then(httpx.ReadTimeout)] * 2
    first, _ = (submissions.start(wanted(lifetime="10m")) for _ in range(2))
    clock.advance(901)
    submissions.poll(first.id)
    assert len(replicate.creates) == 2
    assert current(table, first.id).visible == "failed"


def test_longest_prediction_submitted_twice_ends_before_the_shortest_retention(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    timing = Timing(lifetime=86400, training_lifetime=604800, grace=90, first_poll=60, retention=8 * 86400)
    submissions = make_submissions(table, replicate, executed, clock, resubmit=True, timing=timing)
    replicate.faults = [answer(500)]
    prediction = submissions.start(wanted(lifetime=str(LIFETIME_LIMIT_SECONDS)))
    for _ in range(3):
        clock.advance(100)
        look(submissions, prediction.id)
    assert len(replicate.creates) == 2
    again = current(table, prediction.id)
    assert again.deadline == prediction.deadline
    assert again.expires_at > again.deadline + 2 * 3600


# -- orphans --------------------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[PredictionsTable, Prediction, float], Any]] = {
    "merge": lambda t, p, now: t.merge(p.id, told("succeeded", output="x"), now),
    "end": lambda t, p, now: t.end(p, Status.FAILED, "given up", now),
    "end_copy": lambda t, p, now: t.end_copy(p, [], now),
}


@pytest.mark.parametrize("how", ENDS)
def test_orphan_that_is_recorded_while_the_prediction_ends_stays_on_the_sweeps_list(
    table: PredictionsTable, clock: Clock, how: str
) -> None:
    prediction = ended_with_files(table, clock) if how == "end_copy" else bound(table, clock)
    with meanwhile("UpdateItem", lambda: table.merge(prediction.id, told("processing", "v" * 26), clock.now())):
        ENDS[how](table, prediction, clock.now())
    ended = current(table, prediction.id)
    assert ended.visible in ("succeeded", "failed")
    assert ended.orphans == {"v" * 26}
    assert f"prediction#{prediction.id}" in list(table.due(clock.now() + 1e6, 10))


def test_webhook_of_a_bound_prediction_at_anothers_address_cancels_nothing(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    first, second = submissions.start(wanted()), submissions.start(wanted(input={"prompt": "b"}))
    upstream = replicate.predictions[current(table, second.id).upstream_id or ""]
    receive(table, first.id, json.dumps({**upstream, "status": "processing"}).encode(), clock.now())
    clock.advance(1)
    submissions.sweep(10, lambda: 300)
    assert replicate.canceled == []


def test_orphan_whose_cancel_is_answered_404_is_asked_five_times_before_it_is_taken_for_gone(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    prediction = bound_with_orphan(table, clock)
    table.merge(prediction.id, told("failed", error="bad"), clock.now())
    replicate.read_faults = [answer(404)] * 5
    for times in range(1, 5):
        clock.advance(60)
        submissions.sweep(10, lambda: 300)
        there = current(table, prediction.id)
        assert (there.orphans, there.orphans_not_found) == (frozenset({"v" * 26}), times)
    clock.advance(60)
    submissions.sweep(10, lambda: 300)
    assert current(table, prediction.id).orphans == frozenset()
    assert replicate.canceled == ["v" * 26] * 5


# -- poll and sweep -------------------------------------------------------------------------------------------


def test_result_that_cannot_be_kept_ends_an_hour_past_the_deadline(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    prediction = submissions.start(wanted(lifetime="10m"))
    replicate.finish(current(table, prediction.id).upstream_id or "", output="x" * 200_000)
    with refusing("PutObject", "AccessDenied", service="s3"):
        clock.advance(600)
        with pytest.raises(ClientError):
            submissions.poll(prediction.id)
        assert current(table, prediction.id).visible == "starting"
        clock.advance(3600)
        submissions.poll(prediction.id)
    assert current(table, prediction.id).visible == "failed"


def test_end_that_a_webhook_told_while_a_poll_ran_keeps_its_own_check(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    prediction = submissions.start(wanted())
    upstream_id = current(table, prediction.id).upstream_id or ""

    def webhook_meanwhile(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        body = json.dumps(replicate.finish(upstream_id, output=[FILE])).encode()
        receive(table, prediction.id, body, clock.now())
        return httpx.Response(500)

    replicate.read_faults = [webhook_meanwhile]
    submissions.poll(prediction.id)
    ended = current(table, prediction.id)
    assert (ended.awaits_copy, ended.next_check_at) == (True, int(clock.now()) + 120)


def test_sweep_between_polls_keeps_the_count_of_404s(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    prediction = submissions.start(wanted())
    replicate.read_faults = [answer(404)] * 3
    for _ in range(3):
        submissions.poll(prediction.id)
    executed.stop(f"{prediction.id}-1")
    clock.advance(721)
    submissions.sweep(10, lambda: 300)
    assert current(table, prediction.id).not_found_count == 3


def test_unexpected_error_about_one_prediction_does_not_keep_the_sweep_from_the_next(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock
) -> None:
    first = submissions.start(wanted())
    clock.advance(1)
    second = submissions.start(wanted())
    executed.stop(f"{second.id}-1")
    table.request_cancel(first.id, clock.now())
    clock.advance(181)

    def break_down(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
        raise RuntimeError("unexpected")

    replicate.read_faults = [break_down]
    submissions.sweep(10, lambda: 300)
    assert f"{second.id}-2" in executed.inputs
    assert (current(table, first.id).next_check_at or 0) > clock.now(), "it stays before the others"


@pytest.mark.parametrize("operation", ["GetSecretValue", "PutSecretValue"])
def test_sweep_goes_on_where_the_signing_secret_cannot_be_refreshed(
    submissions: Submissions,
    table: PredictionsTable,
    executed: Executed,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
) -> None:
    prediction = submissions.start(wanted())
    executed.stop(f"{prediction.id}-1")
    clock.advance(181)
    app = load_app("sweep_predictions", monkeypatch)
    submissions.put_into(app, monkeypatch)
    with refusing(operation, "InternalServiceError", service="secretsmanager"):
        assert app.handler(sample("sweep_predictions", "schedule"), Context(300)) == {"found": 1}
    assert f"{prediction.id}-2" in executed.inputs


# -- reading --------------------------------------------------------------------------------------------------


def test_payload_whose_object_has_expired_is_shown_as_removed(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("succeeded", output="x" * 200_000), clock.now())
    s3 = clients.client("s3")
    for found in s3.list_objects_v2(Bucket="outputs")["Contents"]:
        s3.delete_object(Bucket="outputs", Key=found["Key"])
    [listed] = table.list("alice", None, older=True, size=100).predictions
    for whole in (table.read(prediction.id), listed):
        assert whole is not None
        assert (whole.output, whole.prediction.data_removed) == (None, True)
        assert (whole.prediction.visible, whole.input) == ("succeeded", {"n": 1})


def test_payload_that_cannot_be_read_now_is_no_removed_one(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("succeeded", output="x" * 200_000), clock.now())
    with refusing("GetObject", "SlowDown", service="s3"), pytest.raises(ClientError):
        table.read(prediction.id)


def test_id_longer_than_a_key_may_be_is_not_found_and_not_asked_for(
    table: PredictionsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = load_app("read_prediction", monkeypatch)
    calls = AwsCalls()
    event = {**sample("read_prediction", "one"), "path": "/predictions/" + "a" * 4000}
    assert app.handler(event, Context())["statusCode"] == 404
    assert calls.made == []
