"""The protocol, sentence by sentence; each test's name is the promise it keeps."""

import json
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.errors import PredictionThrottled, Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.intents.model import Attempt, create_intent, model_reference
from predictions.lifecycle.fan_out import FanOut
from predictions.observability import metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import Prediction

from tests.support.fakes import (
    API_URL,
    VERSION,
    Clock,
    Executed,
    ReplicateInMemory,
    Wakes,
    accept_then,
    answer,
    attempt,
    fail,
    refusing,
)
from tests.support.predictions import current, forget_expired, hold_token, look, waiting, wanted
from tests.support.protocol import Submissions


def above_the_item_limit(update: dict[str, Any]) -> bool:
    """Whether an update's own values are larger than an item of DynamoDB may be: 400 KB, texts counted as UTF-8."""
    values = update["ExpressionAttributeValues"].values()
    return sum(len(text.encode()) for value in values for text in value.values() if isinstance(text, str)) > 400 * 1024


class TestStart:
    @pytest.mark.parametrize(
        ("status", "detail"), [(422, "prompt is required"), (404, "no such version"), (400, "bad"), (413, "large")]
    )
    def test_refused_by_replicate_is_the_callers_answer_and_a_failed_prediction(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, status: int, detail: str
    ) -> None:
        replicate.faults = [answer(status, {"detail": detail})]
        intent = wanted()
        with pytest.raises(Problem) as problem:
            submissions.start(intent)
        assert (problem.value.status, problem.value.detail) == (status, detail)
        ended = current(table, intent.id)
        assert (ended.visible, ended.error) == ("failed", detail)

    @pytest.mark.parametrize("text", ["ж" * 1000, "🦊" * 1000, "\x01" * 1000, '"' * 1000])
    @pytest.mark.parametrize(("count", "left_out"), [(50, 0), (51, 1), (100, 50), (1000, 950)])
    def test_refusal_of_any_size_ends_the_prediction_and_is_answered_alike_when_it_is_repeated(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory,
        text: str, count: int, left_out: int,
    ) -> None:  # fmt: skip
        fields = [{"field": f"{n}{text}", "detail": text} for n in range(count)]
        replicate.faults = [answer(422, {"detail": text * 2, "invalid_fields": fields})]
        intent = wanted(key="k1")
        problems = []
        # The emulator writes what it then refuses: the limit is kept here, as DynamoDB keeps it, on the new values.
        with refusing("UpdateItem", "ValidationException", above_the_item_limit, service="dynamodb"):
            for _ in range(2):
                with pytest.raises(Problem) as problem:
                    submissions.start(intent)
                problems.append(problem.value.body())
        assert problems[0] == problems[1]
        assert problems[0]["status"] == 422
        assert [field["field"][:3] for field in problems[0]["invalid_fields"]] == [f"{n}{text}"[:3] for n in range(50)]
        more = f"{left_out} more fields were refused; `invalid_fields` lists the first 50."
        assert problems[0]["detail"].endswith(more) == bool(left_out)
        ended = current(table, intent.id)
        assert (ended.visible, ended.terminal, len(replicate.creates)) == ("failed", True, 1)

    @pytest.mark.parametrize("status", [401, 402, 403])
    def test_refused_token_is_a_502_and_without_a_key_the_prediction_has_failed(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, status: int
    ) -> None:
        replicate.faults = [answer(status)]
        intent = wanted()
        with pytest.raises(Problem) as problem:
            submissions.start(intent)
        assert problem.value.status == 502
        assert current(table, intent.id).visible == "failed"

    def test_refused_token_with_a_key_is_submitted_later_by_the_sweep(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [answer(402)]
        intent = wanted(key="k1")
        with pytest.raises(Problem):
            submissions.start(intent)
        assert current(table, intent.id).claimed is None
        clock.advance(400)
        submissions.sweep(10, lambda: 300)
        assert executed.inputs == {f"{intent.id}-2": {"id": intent.id, "submit": True}}

    def test_unknown_model_is_a_404_before_anything_is_written(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory
    ) -> None:
        intent = wanted(version="nobody/nothing")
        with pytest.raises(Problem) as problem:
            submissions.start(intent)
        assert problem.value.status == 404
        assert table.get(intent.id) is None
        assert replicate.creates == []

    def test_version_that_cannot_be_looked_up_is_a_503_before_anything_is_written(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory
    ) -> None:
        replicate.read_faults = [answer(500)]
        intent = wanted(version="stability-ai/sdxl")
        with pytest.raises(Problem) as problem:
            submissions.start(intent)
        assert (problem.value.status, problem.value.headers) == (503, {"Retry-After": "5"})
        assert table.get(intent.id) is None

    def test_accepted_prediction_is_posted_once_bound_and_tracked(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed
    ) -> None:
        started = submissions.start(wanted())
        bound = current(table, started.id)
        assert bound.upstream_id in replicate.predictions
        assert (bound.status, bound.rank, bound.visible) == ("starting", 1, "starting")
        assert executed.inputs == {f"{started.id}-1": {"id": started.id, "submit": False}}
        assert replicate.creates == [
            {
                "version": VERSION,
                "input": {"prompt": "a fox"},
                "webhook": f"{API_URL}/webhooks/replicate/{started.id}",
                "webhook_events_filter": ["start", "completed"],
            }
        ]

    @pytest.mark.parametrize(
        ("headers", "body", "seconds"),
        [
            ({}, {}, 86400),
            ({"cancel-after": "5m"}, {}, 300),
            ({}, {"lifetime": "1h30m45s"}, 5445),
            ({}, {"lifetime": 30}, 30),
            ({"cancel-after": "7"}, {"lifetime": "1h"}, 7),
        ],
    )
    def test_deadline_of_the_caller_or_the_default_one_is_sent_as_cancel_after(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        clock: Clock,
        headers: dict[str, str],
        body: dict[str, Any],
        seconds: int,
    ) -> None:
        started = submissions.start(wanted(headers=headers, **body))
        sent = next(r for r in replicate.asked if r.method == "POST")
        assert sent.headers["cancel-after"] == f"{seconds}s"
        assert "lifetime" not in json.loads(sent.content)
        assert started.deadline == int(clock.now()) + seconds

    @pytest.mark.parametrize(
        ("body", "events"),
        [
            ({"webhook": "https://example.com/h"}, ["start", "output", "completed"]),
            ({"webhook": "https://example.com/h", "webhook_events_filter": ["logs"]}, ["start", "logs", "completed"]),
            ({"webhook_events_filter": ["logs"]}, ["start", "completed"]),
        ],
    )
    def test_start_and_completed_are_always_among_the_events(
        self, submissions: Submissions, replicate: ReplicateInMemory, body: dict[str, Any], events: list[str]
    ) -> None:
        submissions.start(wanted(**body))
        assert replicate.creates[0]["webhook_events_filter"] == events

    @pytest.mark.parametrize(
        ("kind", "name", "path", "version"),
        [
            ("model", "stability-ai/sdxl", "/v1/predictions", VERSION),
            ("model", "meta/llama", "/v1/models/meta/llama/predictions", None),
            ("deployment", "acme/painter", "/v1/deployments/acme/painter/predictions", None),
        ],
    )
    def test_community_model_runs_its_latest_version_and_others_by_name(
        self, submissions: Submissions, replicate: ReplicateInMemory, kind: Any, name: str, path: str, version: Any
    ) -> None:
        intent = create_intent(
            b'{"input": {}}',
            {},
            owner="alice",
            reference=model_reference(kind, *name.split("/")),
            allow_loopback_webhooks=False,
        )
        submissions.start(intent)
        sent = next(r for r in replicate.asked if r.method == "POST")
        assert sent.url.path == path
        assert json.loads(sent.content).get("version") == version

    def test_throttled_create_is_accepted_and_left_to_the_state_machine_at_the_time_it_gave(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [answer(429, {"detail": "Request was throttled. Your rate limit resets in ~30s."})]
        started = submissions.start(wanted())
        assert current(table, started.id).visible == "starting"
        assert executed.inputs == {f"{started.id}-2": {"id": started.id, "submit": True}}
        with pytest.raises(PredictionThrottled) as throttled:
            submissions.submit(started.id)
        assert throttled.value.seconds in (30, 31)
        assert len(replicate.creates) == 1, "it asked again before its turn"
        clock.advance(throttled.value.seconds)
        submissions.submit(started.id)
        assert current(table, started.id).upstream_id in replicate.predictions
        assert len(replicate.predictions) == 1

    @pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout])
    def test_connection_never_made_is_submitted_again(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
        error: type[httpx.HTTPError],
    ) -> None:
        replicate.faults = [fail(error)]
        started = submissions.start(wanted())
        assert executed.inputs[f"{started.id}-2"]["submit"] is True
        clock.advance(11)
        submissions.submit(started.id)
        assert current(table, started.id).upstream_id in replicate.predictions

    def test_start_whose_answer_was_lost_and_whose_execution_submits_first_is_accepted(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [fail(httpx.ConnectError)]
        intent = wanted()

        def submits(_: Any) -> bool:
            clock.advance(11)
            submissions.submit(intent.id)
            return True

        with refusing("StartExecution", "ThrottlingException", submits):
            started = submissions.start(intent)
        assert started.upstream_id in replicate.predictions
        assert current(table, started.id).visible == "starting"

    def test_start_that_can_neither_be_tracked_nor_ended_is_accepted(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [fail(httpx.ConnectError)]
        intent = wanted()
        with (
            refusing("StartExecution", "ThrottlingException"),
            refusing(
                "UpdateItem",
                "ThrottlingException",
                lambda update: ":set_completed_at" in update["ExpressionAttributeValues"],
                service="dynamodb",
            ) as _,
        ):
            started = submissions.start(intent)
        assert current(table, started.id).visible == "starting"
        clock.advance(300)
        submissions.sweep(10, lambda: 300.0)
        assert current(table, started.id).visible == "failed"

    @pytest.mark.parametrize(
        "error",
        [
            httpx.ReadTimeout,
            httpx.WriteTimeout,
            httpx.ReadError,
            httpx.WriteError,
            httpx.RemoteProtocolError,
            500,
            502,
            503,
            504,
            302,
            408,
        ],
    )
    def test_unknown_outcome_is_never_posted_again(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
        error: Any,
    ) -> None:
        replicate.faults = [accept_then(error)]
        started = submissions.start(wanted())
        assert current(table, started.id).upstream_id is None
        assert executed.inputs[f"{started.id}-2"]["submit"] is True
        with pytest.raises(PredictionThrottled):
            submissions.submit(started.id)
        for _ in range(3):
            clock.advance(60)
            look(submissions, started.id)
            look(submissions, started.id)
        assert len(replicate.creates) == 1
        assert current(table, started.id).upstream_id in replicate.predictions

    def test_crash_after_the_claim_is_found_by_the_sweep_and_reconciled(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        clock: Clock,
    ) -> None:
        def die(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
            replicate.accept(request)
            raise KeyboardInterrupt

        replicate.faults = [die]
        intent = wanted()
        with pytest.raises(KeyboardInterrupt):
            submissions.start(intent)
        assert current(table, intent.id).submit_until == int(clock.now()) + 25
        clock.advance(29)
        assert submissions.sweep(10, lambda: 300) == 0
        clock.advance(2)
        assert submissions.sweep(10, lambda: 300) == 1
        assert executed.inputs == {f"{intent.id}-2": {"id": intent.id, "submit": True}}
        clock.advance(90)
        submissions.submit(intent.id)
        assert current(table, intent.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 1

    def test_tracking_that_cannot_be_started_is_left_to_the_sweep_and_the_caller_is_not_told_to_repeat(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        with refusing("StartExecution", "StateMachineDeleting"):
            started = submissions.start(wanted())
        assert current(table, started.id).upstream_id is not None
        assert executed.inputs == {}
        clock.advance(200)
        submissions.sweep(10, lambda: 300)
        assert list(executed.inputs) == [f"{started.id}-1"]


class TestSameRequest:
    def test_same_key_and_request_answers_with_the_existing_prediction(
        self, submissions: Submissions, replicate: ReplicateInMemory
    ) -> None:
        first, second = (submissions.start(wanted(key="order-7")) for _ in range(2))
        assert first.id == second.id
        assert len(replicate.creates) == 1

    def test_same_key_and_request_at_once_is_posted_once(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, monkeypatch: Any
    ) -> None:
        # The second has looked before the first wrote.
        first = submissions.start(wanted(key="order-7"))
        monkeypatch.setattr(submissions.table, "get", lambda _: None)
        second = submissions.start(wanted(key="order-7"))
        assert first.id == second.id
        assert len(replicate.creates) == 1

    @pytest.mark.parametrize(
        "other",
        [{"input": {"prompt": "a cat"}}, {"webhook": "https://example.com/"}, {"lifetime": "9s"}, {"stream": True}],
    )
    def test_same_key_and_other_request_is_refused(
        self, submissions: Submissions, replicate: ReplicateInMemory, other: dict[str, Any]
    ) -> None:
        submissions.start(wanted(key="order-7"))
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(key="order-7", **other))
        assert problem.value.status == 422
        assert problem.value.invalid_fields[0]["field"] == "Idempotency-Key"
        assert len(replicate.creates) == 1

    def test_same_key_of_another_owner_is_another_prediction(self, submissions: Submissions) -> None:
        assert submissions.start(wanted(key="k")).id != submissions.start(wanted(key="k", owner="bob")).id

    def test_key_of_a_refused_request_gets_the_same_refusal(
        self, submissions: Submissions, replicate: ReplicateInMemory
    ) -> None:
        replicate.faults = [answer(422, {"detail": "prompt is required"})]
        for _ in range(2):
            with pytest.raises(Problem) as problem:
                submissions.start(wanted(key="k"))
            assert (problem.value.status, problem.value.detail) == (422, "prompt is required")
        assert len(replicate.creates) == 1

    def test_requests_without_a_key_are_all_their_own(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        assert submissions.start(wanted()).id != submissions.start(wanted()).id
        first = submissions.start(wanted(), attempt=attempt(clock, 0))
        assert submissions.start(wanted(), attempt=attempt(clock, 0)).id != first.id
        assert len(replicate.creates) == 4

    def test_retry_of_the_sdk_finds_the_same_owners_same_request(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        first = submissions.start(wanted(), attempt=attempt(clock, 0))
        clock.advance(119)
        assert submissions.start(wanted(), attempt=attempt(clock, 1)).id == first.id
        assert submissions.start(wanted(owner="bob"), attempt=attempt(clock, 1)).id != first.id
        other = wanted(input={"prompt": "a cat"})
        assert submissions.start(other, attempt=attempt(clock, 1)).id != first.id
        clock.advance(2)
        assert submissions.start(wanted(), attempt=attempt(clock, 1)).id != first.id

    @pytest.mark.parametrize("first_to_put", [0, 1])
    def test_retry_while_the_first_attempt_is_at_work_starts_the_same_one(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        first_to_put: int,
    ) -> None:
        note = RecentRequests.note
        attempts = [attempt(clock, 0), Attempt(1, attempt(clock, 0).asked_at + 2000)]
        others: list[str] = []

        def overtaken(self: RecentRequests, *args: Any) -> str:
            # The other attempt comes all the way through, just before or just after this one's note.
            monkeypatch.undo()
            noted = note(self, *args) if first_to_put else ""
            others.append(submissions.start(wanted(), attempt=attempts[1]).id)
            return noted or note(self, *args)

        monkeypatch.setattr(RecentRequests, "note", overtaken)
        assert [submissions.start(wanted(), attempt=attempts[0]).id] == others
        assert len(replicate.creates) == 1

    def test_later_request_is_not_taken_for_the_first_attempt_of_a_retry(
        self, submissions: Submissions, clock: Clock
    ) -> None:
        retried = submissions.start(wanted(), attempt=attempt(clock, 1))
        clock.advance(5)
        assert submissions.start(wanted(), attempt=attempt(clock, 0)).id != retried.id

    @pytest.mark.parametrize("number", [0, 1])
    def test_note_of_an_earlier_release_is_none(self, submissions: Submissions, clock: Clock, number: int) -> None:
        started = submissions.start(wanted(), attempt=attempt(clock, 0))
        dynamodb = clients.client("dynamodb")
        items = dynamodb.scan(TableName="predictions")["Items"]
        (note,) = (item for item in items if item["pk"]["S"].startswith("recent#"))
        del note["asked_at"], note["attempt"]
        dynamodb.put_item(TableName="predictions", Item=note | {"created": {"N": str(int(clock.now()))}})
        assert submissions.start(wanted(), attempt=attempt(clock, number)).id != started.id

    def test_little_time_is_left_for_the_create_so_the_execution_submits(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed
    ) -> None:
        prediction = submissions.start(wanted(), remaining_seconds=lambda: 9.9)
        assert (replicate.creates, current(table, prediction.id).claimed) == ([], None)
        assert executed.inputs == {f"{prediction.id}-1": {"id": prediction.id, "submit": True}}
        submissions.submit(prediction.id)
        assert len(replicate.creates) == 1
        submissions.start(wanted(), remaining_seconds=lambda: 10)
        assert len(replicate.creates) == 2


class TestSubmit:
    def test_intent_is_claimed_posted_and_bound(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        prediction = waiting(table, clock)
        submissions.submit(prediction.id)
        submissions.submit(prediction.id)
        assert current(table, prediction.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 1

    def test_claim_needs_an_intent_that_was_not_canceled(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        prediction = waiting(table, clock)
        table.request_cancel(prediction.id, clock.now())
        assert table.claim(prediction.id, None, clock.now()) is None
        submissions.submit(prediction.id)
        assert current(table, prediction.id).visible == "canceled"
        assert replicate.creates == []

    def test_refused_is_the_predictions_failure(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(422, {"detail": "prompt is required"})]
        prediction = waiting(table, clock)
        submissions.submit(prediction.id)
        ended = current(table, prediction.id)
        assert (ended.visible, ended.error) == ("failed", "prompt is required")

    @pytest.mark.parametrize(
        ("fault", "seconds"),
        [
            (answer(429, {}, {"Retry-After": "7"}), 7),
            (answer(429, {"retry_after": 9}), 9),
            (answer(429, {"detail": "Your rate limit resets in ~12s."}), 12),
            (answer(429, {}), 10),
            (answer(401), 300),
            (fail(httpx.ConnectError), 10),
        ],
    )
    def test_not_accepted_gives_the_claim_back_and_says_when_to_come_again(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        fault: Any,
        seconds: int,
    ) -> None:
        replicate.faults = [fault]
        prediction = waiting(table, clock)
        with pytest.raises(PredictionThrottled, match=f"^{seconds}$"):
            submissions.submit(prediction.id)
        assert current(table, prediction.id).claimed is None
        clock.advance(seconds)
        submissions.submit(prediction.id)
        assert current(table, prediction.id).upstream_id in replicate.predictions

    @pytest.mark.parametrize("state", ["throttled", "put off"])
    def test_no_wait_outlasts_the_deadline(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        state: str,
    ) -> None:
        replicate.faults = [answer(429, {}, {"Retry-After": "3600"})]
        prediction = waiting(table, clock, lifetime="60s")
        if state == "put off":
            table.defer(prediction, int(clock.now()) + 3600, counted=False)
        with pytest.raises(PredictionThrottled, match=r"^61$"):
            submissions.submit(prediction.id)
        clock.advance(61)
        submissions.submit(prediction.id)
        assert current(table, prediction.id).visible == "failed"

    def test_version_that_cannot_be_looked_up_is_asked_for_ever_more_rarely(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        prediction = waiting(table, clock, version="acme/fox")
        replicate.read_faults = [answer(503)] * 5
        waits = []
        for _ in range(5):
            with pytest.raises(PredictionThrottled) as throttled:
                submissions.submit(prediction.id)
            waits.append(throttled.value.seconds)
            clock.advance(400)
        assert waits == [10, 100, 200, 300, 300]

    def test_intent_past_its_deadline_is_failed_and_not_started(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        prediction = waiting(table, clock, lifetime="60s")
        clock.advance(61)
        submissions.submit(prediction.id)
        assert current(table, prediction.id).visible == "failed"
        assert replicate.creates == []


class TestReconcile:
    def lost(self, submissions: Submissions, replicate: ReplicateInMemory, **options: Any) -> Prediction:
        replicate.faults = [accept_then(httpx.ReadTimeout)]
        return submissions.start(wanted(**options))

    def test_before_the_first_look_nothing_is_asked(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = self.lost(submissions, replicate)
        asked = len(replicate.asked)
        clock.advance(9)
        with pytest.raises(PredictionThrottled, match=r"^1$"):
            submissions.poll(prediction.id)
        assert len(replicate.asked) == asked
        assert current(table, prediction.id).upstream_id is None

    @pytest.mark.parametrize(
        "differs",
        [
            {"input": {"prompt": "a cat"}},
            {"model": "acme/other", "version": "other"},
            {"version": "0" * 64},
            {"created_at": "2020-01-01T00:00:00Z"},
            {"webhook": f"{API_URL}/webhooks/replicate/aaaaaaaaaaaaaaaaaaaaaaaaaa"},
            {"input": None, "data_removed": True},
        ],
    )
    def test_candidate_of_another_version_input_time_or_webhook_is_not_taken(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        clock: Clock,
        differs: dict[str, Any],
    ) -> None:
        prediction = self.lost(submissions, replicate)
        (upstream,) = replicate.predictions.values()
        upstream |= differs
        clock.advance(100)
        look(submissions, prediction.id)
        assert current(table, prediction.id).upstream_id is None

    def test_candidate_that_another_item_is_bound_to_is_not_taken(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        replicate.faults = [answer(500)]
        lost = submissions.start(wanted())
        submissions.start(wanted())
        clock.advance(100)
        look(submissions, lost.id)
        assert current(table, lost.id).upstream_id is None

    def test_two_candidates_are_not_guessed_between_unless_one_names_us(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        first, second = self.lost(submissions, replicate), self.lost(submissions, replicate)
        clock.advance(100)
        look(submissions, first.id)
        assert current(table, first.id).upstream_id is None
        upstream_ids = list(replicate.predictions)
        clock.advance(7200)  # what was seen of an entry is remembered so long
        forget_expired(clock)
        replicate.predictions[upstream_ids[0]]["webhook"] = f"{API_URL}/webhooks/replicate/{first.id}"
        look(submissions, first.id)
        assert current(table, first.id).upstream_id == upstream_ids[0]
        clock.advance(300)
        look(submissions, second.id)
        assert current(table, second.id).upstream_id == upstream_ids[1]

    def test_no_match_stays_starting_until_five_minutes_past_the_deadline_then_fails(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        replicate.faults = [answer(500)]
        prediction = submissions.start(wanted(lifetime="10m"))
        clock.advance(600 + 299)
        look(submissions, prediction.id)
        assert current(table, prediction.id).visible == "starting"
        clock.advance(2)
        submissions.poll(prediction.id)
        ended = current(table, prediction.id)
        assert ended.visible == "failed"
        assert ended.error is not None
        assert len(replicate.creates) == 1

    def test_replicate_out_of_reach_for_long_still_ends(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = self.lost(submissions, replicate, lifetime="10m")
        clock.advance(600 + 3599)
        replicate.read_faults = [answer(500), answer(500)]
        look(submissions, prediction.id)
        assert current(table, prediction.id).visible == "starting"
        clock.advance(2)
        submissions.poll(prediction.id)
        assert current(table, prediction.id).visible == "failed"

    def test_reconciled_prediction_that_was_to_be_canceled_is_canceled_upstream(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = self.lost(submissions, replicate)
        submissions.cancel(current(table, prediction.id))
        assert current(table, prediction.id).visible == "starting"
        clock.advance(100)
        submissions.poll(prediction.id)
        assert replicate.canceled == list(replicate.predictions)
        assert current(table, prediction.id).visible == "canceled"


class TestPoll:
    def test_end_that_no_webhook_told_is_found(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        started = submissions.start(wanted())
        replicate.finish(current(table, started.id).upstream_id or "", output="done")
        submissions.poll(started.id)
        whole = table.read(started.id)
        assert whole is not None
        assert (whole.prediction.visible, whole.output) == ("succeeded", "done")

    def test_at_the_deadline_cancel_is_posted_and_polling_goes_on_until_replicate_ends_it(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        started = submissions.start(wanted(lifetime="10m"))
        clock.advance(601)
        unavailable = answer(500)
        running = lambda _, r: httpx.Response(200, json=next(iter(r.predictions.values())))  # noqa: E731  # one line
        replicate.read_faults = [running, unavailable]
        submissions.poll(started.id)
        assert len(replicate.canceled) == 1
        assert current(table, started.id).visible == "starting", "ended by our own word"
        submissions.poll(started.id)
        assert current(table, started.id).visible == "canceled"

    def test_one_hour_past_the_deadline_it_is_failed_by_our_own_word(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        started = submissions.start(wanted(lifetime="10m"))
        replicate.read_faults = [answer(500)] * 4
        clock.advance(600 + 3599)
        submissions.poll(started.id)
        assert current(table, started.id).visible == "starting"
        clock.advance(2)
        submissions.poll(started.id)
        assert current(table, started.id).visible == "failed"

    def test_repeated_404s_and_only_repeated_ones_end_it(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        started = submissions.start(wanted())
        gone = answer(404)
        ok = lambda _, r: httpx.Response(200, json=next(iter(r.predictions.values())))  # noqa: E731  # one line
        replicate.read_faults = [gone, gone, gone, gone, ok, gone, gone, gone, gone]
        for _ in range(9):
            submissions.poll(started.id)
        assert current(table, started.id).visible == "starting"
        replicate.read_faults = [gone]
        submissions.poll(started.id)
        assert current(table, started.id).visible == "failed"

    @pytest.mark.parametrize("status", [429, 500, 503, 401])
    def test_unanswered_poll_changes_nothing(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        status: int,
    ) -> None:
        before = current(table, submissions.start(wanted()).id)
        replicate.read_faults = [answer(status)]
        submissions.poll(before.id)
        assert current(table, before.id) == before

    def test_ended_or_unknown_prediction_is_left_alone(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        started = submissions.start(wanted())
        replicate.finish(current(table, started.id).upstream_id or "")
        submissions.poll(started.id)
        asked = len(replicate.asked)
        submissions.poll(started.id)
        submissions.poll("a" * 26)
        assert len(replicate.asked) == asked


class TestCancel:
    def test_bound_prediction_is_canceled_upstream_and_its_execution_woken(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        wakes: Wakes,
    ) -> None:
        started = submissions.start(wanted())
        hold_token(table, started.id, "token-1")
        submissions.cancel(current(table, started.id))
        assert current(table, started.id).visible == "canceled"
        assert wakes.tokens == ["token-1"]

    def test_intent_that_nobody_submitted_is_canceled_at_once(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        prediction = waiting(table, clock)
        submissions.cancel(prediction)
        assert current(table, prediction.id).visible == "canceled"
        submissions.submit(prediction.id)
        assert replicate.asked == []

    def test_cancel_between_claim_and_bind_is_read_back_by_the_bind(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        intent = wanted()

        def cancel_meanwhile(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
            submissions.cancel(current(table, intent.id))
            return httpx.Response(201, json=replicate.accept(request))

        replicate.faults = [cancel_meanwhile]
        submissions.start(intent)
        assert replicate.canceled == list(replicate.predictions)
        assert current(table, intent.id).visible == "canceled"

    def test_cancel_that_replicate_did_not_hear_is_repeated_by_the_sweep(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        started = submissions.start(wanted())
        replicate.read_faults = [answer(500)]
        submissions.cancel(current(table, started.id))
        assert current(table, started.id).visible == "starting"
        clock.advance(61)
        submissions.sweep(10, lambda: 300)
        assert current(table, started.id).visible == "canceled"

    def test_terminal_status_of_replicate_wins_the_race(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable
    ) -> None:
        started = submissions.start(wanted())
        replicate.finish(current(table, started.id).upstream_id or "", output="done")
        submissions.cancel(current(table, started.id))
        assert current(table, started.id).visible == "succeeded"
        submissions.cancel(current(table, started.id))
        assert current(table, started.id).visible == "succeeded"


class TestSweep:
    def test_http_intent_without_key_and_claim_is_failed_and_not_started(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        prediction = waiting(table, clock)
        clock.advance(61)
        submissions.sweep(10, lambda: 300)
        assert current(table, prediction.id).visible == "failed"
        assert executed.inputs == {}
        assert replicate.asked == []

    def test_throttled_intent_whose_execution_was_stopped_is_submitted_by_the_next_one(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        executed: Executed,
        clock: Clock,
    ) -> None:
        replicate.faults = [answer(429, {"retry_after": 5})]
        started = submissions.start(wanted())
        executed.stop(f"{started.id}-2")
        clock.advance(66)
        submissions.sweep(10, lambda: 300)
        assert executed.inputs[f"{started.id}-3"] == {"id": started.id, "submit": True}

    def test_execution_that_was_stopped_is_followed_by_the_next_number(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        started = submissions.start(wanted())
        executed.stop(f"{started.id}-1")
        clock.advance(181)
        submissions.sweep(10, lambda: 300)
        assert executed.inputs[f"{started.id}-2"] == {"id": started.id, "submit": False}
        again = current(table, started.id)
        assert again.execution_n == 2
        assert again.execution_arn == executed.arn(f"{started.id}-2")

    def test_execution_that_runs_is_left_alone(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        started = submissions.start(wanted())
        clock.advance(181)
        assert submissions.sweep(10, lambda: 300) == 1
        assert submissions.sweep(10, lambda: 300) == 0
        assert list(executed.inputs) == [f"{started.id}-1"]

    def test_name_used_up_does_not_count_as_running(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        prediction = waiting(table, clock, key="k")
        clients.client("stepfunctions").start_execution(
            stateMachineArn=executed.machine_arn, name=f"{prediction.id}-1", input='{"other": "input"}'
        )
        executed.stop(f"{prediction.id}-1")
        clock.advance(61)
        submissions.sweep(10, lambda: 300)
        assert executed.inputs[f"{prediction.id}-2"]["submit"] is True

    def test_orphan_is_recorded_canceled_once_and_forgotten(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        clock: Clock,
    ) -> None:
        started = submissions.start(wanted())
        request = next(r for r in replicate.asked if r.method == "POST")
        second = replicate.accept(request, status="processing")
        from predictions.upstream.prediction import UpstreamPrediction

        for _ in range(2):
            table.merge(started.id, UpstreamPrediction.parse(second), clock.now())
        assert current(table, started.id).orphans == {second["id"]}
        submissions.sweep(10, lambda: 300)
        assert replicate.canceled == [second["id"]]
        assert current(table, started.id).orphans == set()
        table.merge(started.id, UpstreamPrediction.parse({**second, "status": "processing"}), clock.now())
        clock.advance(1000)
        submissions.sweep(10, lambda: 300)
        assert replicate.canceled == [second["id"]]

    def test_end_that_waits_for_its_copy_wakes_the_execution(
        self,
        submissions: Submissions,
        replicate: ReplicateInMemory,
        table: PredictionsTable,
        wakes: Wakes,
        clock: Clock,
    ) -> None:
        from predictions.upstream.prediction import UpstreamPrediction

        started = submissions.start(wanted())
        hold_token(table, started.id, "token-1")
        told = replicate.finish(
            current(table, started.id).upstream_id or "", output="https://replicate.delivery/x/out.png"
        )
        # The webhook's function dies between its write and its message.
        table.merge(started.id, UpstreamPrediction.parse(told), clock.now())
        assert wakes.told == []
        clock.advance(121)
        submissions.sweep(10, lambda: 300)
        assert (wakes.tokens, wakes.copies) == ([], ["token-1"])

    def test_one_that_cannot_be_mended_does_not_keep_the_others_back(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        first, second = submissions.start(wanted()), submissions.start(wanted())
        executed.stop(f"{second.id}-1")
        clock.advance(181)

        with refusing("DescribeExecution", "InvalidArn", lambda asked: f"{first.id}-1" in asked["executionArn"]):
            submissions.sweep(10, lambda: 300)
        assert f"{second.id}-2" in executed.inputs

    def test_sweep_stops_in_time(self, submissions: Submissions, table: PredictionsTable, clock: Clock) -> None:
        for _ in range(3):
            submissions.start(wanted())
        clock.advance(181)
        left = iter([300.0, 10.0])
        assert submissions.sweep(10, lambda: next(left)) == 1


def test_wait_ends_with_the_visible_end_or_the_time(
    submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
) -> None:
    started = submissions.start(wanted())
    before = clock.now()
    assert submissions.wait_for_end(started.id, 5) is False
    assert clock.now() == pytest.approx(before + 5)
    replicate.finish(current(table, started.id).upstream_id or "", output="done")
    submissions.poll(started.id)
    assert submissions.wait_for_end(started.id, 5) is True


def test_database_that_fails_before_the_post_spends_nothing(
    submissions: Submissions, replicate: ReplicateInMemory, outputs: OutputsBucket
) -> None:
    clients.client("dynamodb").delete_table(TableName="predictions")
    with pytest.raises(ClientError):
        submissions.start(wanted())
    assert replicate.creates == []


class TestMeasured:
    """What alarms and the dashboard read: a metric that nobody emits is an alarm that never comes."""

    @staticmethod
    def measured() -> dict[str, list[float]]:
        found = {name: list(each["Value"]) for name, each in metrics.provider.metric_set.items()}
        metrics.clear_metrics()
        return found

    def test_poll_counts_the_end_that_it_finds_and_no_other(
        self, submissions: Submissions, replicate: ReplicateInMemory, table: PredictionsTable, clock: Clock
    ) -> None:
        started = submissions.start(wanted())
        clock.advance(60)
        self.measured()
        submissions.poll(started.id)
        found = self.measured()
        assert "EndsByPoll" not in found
        assert found["OpenSeconds"] == [60]
        assert "SecondsPastDeadline" not in found
        assert len(found["UpstreamSeconds"]) == 1
        replicate.finish(current(table, started.id).upstream_id or "", output="done")
        submissions.poll(started.id)
        assert self.measured()["EndsByPoll"] == [1]
        submissions.poll(started.id)
        assert self.measured() == {}

    def test_what_is_open_past_its_deadline_is_told_with_how_long(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        started = submissions.start(wanted(lifetime="10m"))
        replicate.read_faults = [answer(500)]
        clock.advance(600 + 1800)
        self.measured()
        submissions.poll(started.id)
        assert self.measured()["SecondsPastDeadline"] == [1800]

    def test_execution_that_the_sweep_starts_is_counted_and_one_that_runs_is_not(
        self, submissions: Submissions, table: PredictionsTable, executed: Executed, clock: Clock
    ) -> None:
        waiting(table, clock, key="k")
        self.measured()
        clock.advance(61)
        assert submissions.sweep(10, lambda: 300) == 1
        assert self.measured()["ExecutionsReplaced"] == [1]
        assert len(executed.inputs) == 1
        clock.advance(600)
        assert submissions.sweep(10, lambda: 300) == 1
        assert "ExecutionsReplaced" not in self.measured()

    def test_what_is_open_is_counted_and_a_pause_noted_where_there_is_any(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        fan_out = FanOut(table, clients.client("lambda"))
        self.measured()
        fan_out.share("function")
        submissions.measure()
        assert self.measured() == {}
        for key in ("a", "b"):
            waiting(table, clock, key=key)
        submissions.limiter.pause_by_command("Moving.")  # the table's, as the command writes it
        fan_out.share("function")
        submissions.measure()
        assert self.measured() == {"OpenItems": [2], "Paused": [1]}

    def test_429_of_replicate_is_counted(self, submissions: Submissions, replicate: ReplicateInMemory) -> None:
        replicate.faults = [answer(429, {})]
        submissions.start(wanted(key="k"))
        assert self.measured()["UpstreamThrottles"] == [1]
