"""What functions die over: the sweep survives it, looks at it ever more rarely, and ends it without asking."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import PRESENT
from predictions.intents.model import create_intent
from predictions.observability import metrics
from predictions.pipelines.advance import PipelineExecutions
from predictions.pipelines.store import PipelinesTable
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import PARSED_LIMIT_BYTES, UpstreamPrediction

from tests.support.batches import LLAMA, World, plenty
from tests.support.batches import world as batch_world  # noqa: F401  # a fixture
from tests.support.fakes import VERSION, Clock, Died, Executed, ReplicateInMemory, accept_then, answer, refusing
from tests.support.predictions import hold_token
from tests.support.protocol import Submissions

HOUR = 3600


def start(submissions: Submissions, *, lifetime: str = "24h", source: str = "fox") -> Prediction:
    body = json.dumps({"version": VERSION, "input": {"prompt": source}, "lifetime": lifetime}).encode()
    asked = {"content-type": "application/json"}
    return submissions.start(create_intent(body, asked, owner="alice", reference=None, allow_loopback_webhooks=False))


def current(table: PredictionsTable, prediction_id: str) -> Prediction:
    found = table.get(prediction_id)
    assert found is not None
    return found


def until_due(clock: Clock, next_check_at: int | None) -> None:
    """Lets time pass until the first sweep, one a minute, that finds an item due."""
    minutes = max(1, -(-((next_check_at or 0) - clock.now()) // 60))
    clock.advance(60 * minutes)


def dies(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
    raise Died


def swept(submissions: Submissions) -> bool:
    """Whether a sweep ended by itself."""
    try:
        submissions.sweep(100, lambda: 300)
    except Died:
        return False
    return True


def large(replicate: ReplicateInMemory, upstream_id: str, **told: Any) -> Callable[..., httpx.Response]:
    """An answer whose output is 12 MB of empty lists."""
    body = json.dumps({**replicate.predictions[upstream_id], "output": "HERE", **told})
    content = body.replace('"HERE"', "[" + "[]," * 4_000_000 + "[]]").encode()
    return lambda *_: httpx.Response(200, content=content)


class TestDeadLooks:
    def test_cancel_over_which_the_sweep_dies_does_not_keep_it_from_the_next_item(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        first = start(submissions)
        table.request_cancel(first.id, clock.now())
        clock.advance(1)
        second = start(submissions, source="hare")
        hold_token(table, second.id, "token", next_check_at=clock.now() + 180)
        executed.stop(f"{second.id}-1")
        clock.advance(181)
        replicate.read_faults = [dies]
        assert not swept(submissions)
        assert (current(table, first.id).next_check_at or 0) >= clock.now() + 180
        assert f"{second.id}-2" not in executed.inputs
        assert swept(submissions)
        assert f"{second.id}-2" in executed.inputs

    def test_orphan_over_which_the_sweep_dies_does_not_keep_it_from_the_next_item(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        first, second = start(submissions), start(submissions, source="hare")
        table.merge(first.id, UpstreamPrediction.parse({"id": "other", "status": "processing"}), clock.now())
        executed.stop(f"{second.id}-1")
        clock.advance(181)
        replicate.read_faults = [dies, dies]
        assert not swept(submissions)
        assert swept(submissions)
        assert f"{second.id}-2" in executed.inputs

    def test_prediction_that_is_not_bound_is_looked_for_four_times_an_hour_however_often_executions_died(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [accept_then(500)]
        prediction = start(submissions)
        waits = []
        for _ in range(12):
            there = current(table, prediction.id)
            assert there.upstream_id is None
            executed.stop(f"{prediction.id}-{there.execution_n}")
            until_due(clock, there.next_check_at)
            assert swept(submissions)
            waits.append((current(table, prediction.id).next_check_at or 0) - int(clock.now()))
        assert max(waits) == 900, waits

    def test_first_dead_execution_is_replaced_by_the_first_check_that_succeeds_however_many_failed(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [accept_then(500)]
        prediction = start(submissions)
        # Not the first number: its create had no clear answer, so it is tracked by the machine that looks for it.
        executed.stop(f"{prediction.id}-2")
        waits = []
        with refusing("DescribeExecution", "ThrottlingException"):
            for _ in range(3):
                until_due(clock, current(table, prediction.id).next_check_at)
                assert swept(submissions)
                waits.append((current(table, prediction.id).next_check_at or 0) - int(clock.now()))
        assert waits == [180, 360, 720], "the check that fails keeps the time that it has written first"
        until_due(clock, current(table, prediction.id).next_check_at)
        assert swept(submissions)
        assert f"{prediction.id}-3" in executed.inputs

    def test_cancel_that_replicate_did_not_answer_is_asked_again_soon_however_often_looks_died(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        prediction = start(submissions)
        executed.stop(f"{prediction.id}-1")
        table.request_cancel(prediction.id, clock.now())
        replicate.read_faults = [dies, dies, answer(500)]
        for _ in range(2):
            until_due(clock, current(table, prediction.id).next_check_at)
            assert not swept(submissions)
        until_due(clock, current(table, prediction.id).next_check_at)
        assert swept(submissions)
        assert current(table, prediction.id).next_check_at == int(clock.now()) + 180, "not after 24 minutes"
        until_due(clock, current(table, prediction.id).next_check_at)
        assert swept(submissions)
        assert replicate.predictions[current(table, prediction.id).upstream_id or ""]["status"] == "canceled"

    @pytest.mark.parametrize("what", ["cancel", "orphan"])
    def test_item_over_which_every_look_dies_is_looked_at_ever_more_rarely_and_ended_an_hour_past_its_deadline(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock, what: str
    ) -> None:
        prediction = start(submissions)
        if what == "cancel":
            table.request_cancel(prediction.id, clock.now())
        else:
            table.merge(prediction.id, UpstreamPrediction.parse({"id": "other", "status": "starting"}), clock.now())
        replicate.read_faults = [dies] * 1000
        died_at = []
        while not current(table, prediction.id).terminal and clock.now() < prediction.deadline + 2 * HOUR:
            until_due(clock, current(table, prediction.id).next_check_at)
            if not swept(submissions):
                died_at.append(clock.now())
        ended = current(table, prediction.id)
        assert (ended.visible, ended.ended) == ("failed", int(clock.now()))
        assert prediction.deadline + HOUR <= clock.now() <= prediction.deadline + HOUR + 60
        assert "without asking Replicate again" in (ended.error or "")
        waits = [later - earlier for earlier, later in pairwise(died_at)]
        assert waits[:5] == [180, 360, 720, 1440, 2880]
        assert all(wait <= HOUR + 60 for wait in waits)
        assert len(died_at) < 35
        asked = len(replicate.asked)
        assert swept(submissions)
        assert len(replicate.asked) == asked
        assert current(table, prediction.id).next_check_at is None, "it is off the list"

    def test_polls_that_die_are_started_ever_more_rarely_and_their_prediction_ended_without_asking(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        prediction = start(submissions)
        replicate.read_faults = [dies] * 1000
        n, polled_at = 1, []
        while not (there := current(table, prediction.id)).terminal and clock.now() < there.deadline + 2 * HOUR:
            name = f"{prediction.id}-{n}"
            if there.execution_n == n:
                # The state AwaitWebhook notes its own time, and waits; the poll after it dies.
                table._change(prediction.id, set={"next_check_at": int(clock.now()) + 180}, condition=PRESENT)
                clock.advance(60)
                polled_at.append(clock.now())
                with pytest.raises(Died):
                    submissions.poll(prediction.id)
                executed.stop(name)
                n += 1
            until_due(clock, current(table, prediction.id).next_check_at)
            assert swept(submissions)
        assert current(table, prediction.id).visible == "failed"
        assert clock.now() <= prediction.deadline + HOUR + 120
        assert len(polled_at) < 40, "every three minutes it would be 500"
        assert len(replicate.asked) == len(polled_at) + 1, "the create, and each poll: the end was not asked for"

    def test_poll_past_the_last_hour_of_one_over_which_polls_died_ends_it_before_asking(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = start(submissions)
        table._change(prediction.id, set={"stalled_looks": 2}, condition=PRESENT)
        clock.advance(86400 + HOUR)
        asked = len(replicate.asked)
        submissions.poll(prediction.id)
        assert current(table, prediction.id).visible == "failed"
        assert len(replicate.asked) == asked

    def test_poll_past_the_last_hour_of_one_whose_execution_was_stopped_once_still_asks(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = start(submissions)
        table._change(prediction.id, set={"stalled_looks": 1}, condition=PRESENT)
        replicate.finish(current(table, prediction.id).upstream_id or "", output="done")
        clock.advance(86400 + HOUR)
        submissions.poll(prediction.id)
        assert current(table, prediction.id).visible == "succeeded"

    def test_look_that_completes_resets_the_count(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = start(submissions)
        table.request_cancel(prediction.id, clock.now())
        clock.advance(61)
        replicate.read_faults = [dies, answer(500)]
        assert not swept(submissions)
        assert current(table, prediction.id).stalled_looks == 1
        clock.advance(181)
        assert swept(submissions)
        assert current(table, prediction.id).stalled_looks == 0

    def test_poll_that_completes_resets_the_count_and_any_other_poll_writes_nothing_for_it(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        prediction = start(submissions)
        executed.stop(f"{prediction.id}-1")
        clock.advance(181)
        assert swept(submissions)
        assert current(table, prediction.id).stalled_looks == 1
        writes: list[str] = []
        events: Any = clients.client("dynamodb").meta.events
        events.register_first("before-call.dynamodb.UpdateItem", lambda **_: writes.append("update"))
        submissions.poll(prediction.id)
        assert (current(table, prediction.id).stalled_looks, len(writes)) == (0, 1)
        submissions.poll(prediction.id)
        assert len(writes) == 1

    def test_two_sweeps_at_once_look_once(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = start(submissions)
        clock.advance(181)
        seen = current(table, prediction.id)
        assert table.begin_look(seen, clock.now() + 180) is not None
        assert table.begin_look(seen, clock.now() + 180) is None

    def test_copy_over_which_functions_die_ends_three_hours_after_the_end_with_the_reason(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        prediction = start(submissions)
        replicate.finish(current(table, prediction.id).upstream_id or "", output="https://replicate.delivery/x/out.png")
        submissions.poll(prediction.id)
        ended_at, n = clock.now(), 1
        while current(table, prediction.id).awaits_copy and clock.now() < ended_at + 6 * HOUR:
            if current(table, prediction.id).execution_n == n:
                executed.stop(f"{prediction.id}-{n}")
                n += 1
            until_due(clock, current(table, prediction.id).next_check_at)
            assert swept(submissions)
        ended = current(table, prediction.id)
        assert (ended.visible, clock.now() <= ended_at + 4 * HOUR) == ("succeeded", True)
        [lost] = table.stored_files(ended)
        assert "could not be copied" in (lost.error or "")
        assert metrics.provider.metric_set["CopiesFailed"]["Value"] == [1.0]


class TestTooLarge:
    def test_output_beyond_the_bound_ends_the_prediction_failed_with_the_reason(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        prediction = start(submissions)
        upstream_id = current(table, prediction.id).upstream_id or ""
        replicate.finish(upstream_id)
        replicate.read_faults = [large(replicate, upstream_id)]
        submissions.poll(prediction.id)
        ended = current(table, prediction.id)
        assert (ended.visible, ended.metrics_json) == ("failed", '{"predict_time": 1.5}')
        for said in ("12000", "4000018 values", f"limit is {PARSED_LIMIT_BYTES // 1024**2} MiB", "return it as a file"):
            assert said in (ended.error or ""), ended.error
        assert table.result_output(ended) is None
        assert replicate.canceled == []

    def test_output_beyond_the_bound_of_one_that_runs_is_canceled_first(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        prediction = start(submissions)
        upstream_id = current(table, prediction.id).upstream_id or ""
        running = large(replicate, upstream_id, status="processing")
        replicate.read_faults = [running, answer(500), running]
        submissions.poll(prediction.id)
        assert not current(table, prediction.id).terminal, "Replicate did not hear the cancel"
        submissions.poll(prediction.id)
        assert replicate.canceled == [upstream_id, upstream_id]
        assert current(table, prediction.id).visible == "failed"
        assert "too large" in (current(table, prediction.id).error or "")

    def test_create_whose_answer_is_beyond_the_bound_is_bound(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        def accepted(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
            made = replicate.accept(request, status="processing")
            return large(replicate, made["id"])()

        replicate.faults = [accepted]
        prediction = start(submissions)
        [upstream_id] = replicate.predictions
        bound = current(table, prediction.id)
        assert (bound.upstream_id, bound.status) == (upstream_id, "processing")

    def test_answer_longer_than_what_is_received_ends_the_prediction(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        prediction = start(submissions)
        upstream_id = current(table, prediction.id).upstream_id or ""
        monkeypatch.setattr("predictions.upstream.client._ANSWER_LIMIT_BYTES", 2000)
        body = b'{"id": "%s", "output": "%s", "status": "succeeded"}' % (upstream_id.encode(), b"x" * 4000)
        pieces = (body[at : at + 100] for at in range(0, len(body), 100))
        replicate.read_faults = [lambda *_: httpx.Response(200, content=pieces)]
        submissions.poll(prediction.id)
        assert replicate.canceled == [upstream_id], "whether it still runs is behind what was received"
        assert current(table, prediction.id).visible == "failed"

    def test_of_the_answer_to_a_cancel_only_the_status_is_needed(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        prediction = start(submissions)
        upstream_id = current(table, prediction.id).upstream_id or ""
        replicate.finish(upstream_id, output="small")
        replicate.read_faults = [large(replicate, upstream_id)]
        submissions.cancel(current(table, prediction.id))
        ended = current(table, prediction.id)
        # The end is what a GET says of it.
        assert (ended.visible, table.result_output(ended)) == ("succeeded", "small")

    def test_list_with_a_large_prediction_of_somebody_else_still_finds_ours(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        def lost(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
            replicate.accept(request)
            return httpx.Response(502)

        replicate.faults = [lost]
        prediction = start(submissions)
        [ours] = replicate.predictions.values()
        theirs = {**ours, "id": "large", "webhook": "https://example.com/theirs", "output": "HERE"}
        page = json.dumps({"next": None, "results": [theirs, ours]})
        content = page.replace('"HERE"', "[" + "[]," * 4_000_000 + "[]]").encode()
        replicate.read_faults = [lambda *_: httpx.Response(200, content=content)]
        clock.advance(100)
        submissions.poll(prediction.id)
        assert current(table, prediction.id).upstream_id == ours["id"]


class TestBatches:
    def test_batch_over_which_executions_die_is_looked_at_ever_more_rarely_and_ended(
        self,
        batch_world: World,  # noqa: F811
        clock: Clock,
    ) -> None:
        world = batch_world
        batch = world.make(LLAMA)
        looks = []
        while not world.there(batch).ended and clock.now() < batch.expires_at:
            there = world.there(batch)
            world.stop_execution(f"{batch.id}-1-{there.execution_n}")
            until_due(clock, there.next_check_at)
            looks.append(clock.now())
            world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
            if len(looks) == 8:
                clock.advance(batch.expires_at - 86400 - HOUR - clock.now())
        ended = world.there(batch)
        assert (ended.status, ended.next_check_at) == ("failed", None)
        assert "failed without results" in (ended.error or "")
        waits = [later - earlier for earlier, later in pairwise(looks)]
        assert waits[:5] == [300, 600, 1200, 2400, 3600]
        assert batch.expires_at - 86400 <= clock.now() <= batch.expires_at - 86400 + 2 * HOUR

    def test_canceling_over_which_the_sweep_dies_is_put_off_further_each_time(
        self,
        batch_world: World,  # noqa: F811
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        world = batch_world

        def dead(*_: Any) -> None:
            raise Died

        batch = world.make(LLAMA)
        world.batches.running(batch, lines=1, total=1, refused=0)
        world.batches.stop(batch, "canceled")
        with monkeypatch.context() as broken:
            broken.setattr("predictions.batches.manage.read_jsonl", dead)
            waits = []
            for _ in range(4):
                with pytest.raises(Died):
                    world.control.sweep_one(batch.id, world.submissions.canceling, plenty)
                waits.append((world.there(batch).next_check_at or 0) - int(clock.now()))
                clock.advance(waits[-1])
        assert waits == [60, 120, 240, 480]
        world.batches.stopped(world.there(batch), 0)
        assert world.there(batch).stalled_looks == 0


class TestPipelines:
    def test_pipeline_over_which_executions_die_is_looked_at_ever_more_rarely_and_ended_past_its_deadline(
        self, table: PredictionsTable, pipeline_executed: Executed, clock: Clock
    ) -> None:
        from predictions.aws.executions import Executions
        from predictions.files.outputs_bucket import OutputsBucket
        from predictions.pipelines.definition import create_definition

        pipelines = PipelinesTable("predictions", OutputsBucket("outputs"), clients.client("dynamodb"))
        executions = Executions(pipeline_executed.machine_arn, clients.client("stepfunctions"))
        runs = PipelineExecutions(pipelines, executions, now=clock.now)
        definition = create_definition({"steps": [{"name": "one", "model": "meta/llama", "input": {}}]}, lambda *_: [])
        deadline = int(clock.now()) + 86400
        pipeline = pipelines.put_pipeline(
            "p" * 26, definition, owner="alice", fingerprint="f", deadline=deadline, expires=deadline * 2, depth=0,
            now=clock.now(),
        )  # fmt: skip
        runs.run(pipeline)
        looks = []
        while (there := pipelines.get_pipeline(pipeline.id)) and not there.ended and clock.now() < deadline + 5 * HOUR:
            pipeline_executed.stop(f"{pipeline.id}-{there.execution_n}")
            until_due(clock, there.next_check_at)
            looks.append(clock.now())
            runs.restart(pipeline.id)
        assert there is not None
        assert (there.status, "ran out of memory or time" in (there.error or "")) == ("failed", True)
        assert deadline + HOUR <= clock.now() <= deadline + 2 * HOUR + 120
        assert len(looks) < 35
