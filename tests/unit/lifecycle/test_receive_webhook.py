"""What verified webhooks do: merge, wake, or nothing."""

import json
from typing import Any

import pytest
from predictions.aws import clients
from predictions.lifecycle.orphan_polls import OrphanPolls
from predictions.lifecycle.receive_webhook import Receipt, receive
from predictions.observability import metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.fakes import API_URL, Clock, Wakes
from tests.support.predictions import FILE, hold_token, put, raw_items


def body(status: str, upstream_id: str = "u" * 26, **more: Any) -> bytes:
    return json.dumps({"id": upstream_id, "status": status, **more}).encode()


@pytest.mark.parametrize(
    "hostile",
    [b"", b"null", b"[]", b"{}", b'{"id": 7, "status": "succeeded"}', b"[" * 100_000, b"\xff\xfe", b'{"id": "A/B"}'],
)
def test_signed_body_that_is_no_prediction_changes_nothing(
    table: PredictionsTable, clock: Clock, hostile: bytes
) -> None:
    prediction = put(table, clock)
    before = raw_items(prediction.id)
    assert receive(table, prediction.id, hostile, clock.now()) is Receipt.UNKNOWN
    assert raw_items(prediction.id) == before


def test_unknown_prediction_changes_nothing(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    assert receive(table, "c" * 26, body("succeeded"), clock.now()) is Receipt.UNKNOWN
    assert raw_items("c" * 26) == {}
    assert wakes.tokens == []


def test_webhook_of_another_prediction_cannot_bind_this_one(table: PredictionsTable, clock: Clock) -> None:
    first, second = put(table, clock), put(table, clock)
    receive(table, first.id, body("processing"), clock.now())
    before = raw_items(second.id)
    assert receive(table, second.id, body("succeeded"), clock.now()) is Receipt.UNKNOWN
    named = body("succeeded", "v" * 26, webhook=f"{API_URL}/webhooks/replicate/{first.id}")
    assert receive(table, second.id, named, clock.now()) is Receipt.UNKNOWN
    assert raw_items(second.id) == before


def test_webhook_before_the_create_answer_binds(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    assert receive(table, prediction.id, body("processing"), clock.now()) is Receipt.MERGED
    bound = table.get(prediction.id)
    assert bound is not None
    assert (bound.upstream_id, bound.visible) == ("u" * 26, "processing")


def test_end_wakes_with_the_token_that_its_own_write_returned(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    hold_token(table, prediction.id, "token-1")
    hold_token(table, prediction.id, "token-2")
    assert wakes.tokens == []
    receive(table, prediction.id, body("succeeded", output="text"), clock.now())
    assert wakes.tokens == ["token-2"]


@pytest.mark.parametrize("late", ["starting", "processing", "succeeded", "failed", "canceled"])
def test_late_webhook_changes_nothing_but_sends_the_token_again(
    table: PredictionsTable, clock: Clock, wakes: Wakes, late: str
) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    hold_token(table, prediction.id, "token-1")
    receive(table, prediction.id, body("succeeded", output=[FILE]), clock.now())
    before = raw_items(prediction.id)
    assert receive(table, prediction.id, body(late, output="other", logs="x" * 99), clock.now()) is Receipt.NOTHING_NEW
    assert raw_items(prediction.id) == before
    assert (wakes.tokens, wakes.copies) == ([], ["token-1", "token-1"])


def test_stale_token_is_expected(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    prediction = put(table, clock)
    hold_token(table, prediction.id, "token-1")
    wakes.stale.add("token-1")
    assert receive(table, prediction.id, body("succeeded", output="text"), clock.now()) is Receipt.MERGED


def test_second_upstream_prediction_is_an_orphan(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    assert receive(table, prediction.id, body("processing", "v" * 26), clock.now()) is Receipt.ORPHAN
    assert list(table.due(clock.now(), 10)) == [f"prediction#{prediction.id}"]


def test_output_that_json_does_not_have_becomes_null(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    hostile = b'{"id": "uuuuuuuuuuuuuuuuuuuuuuuuuu", "status": "succeeded", "output": [NaN, Infinity, 1e999, 1]}'
    receive(table, prediction.id, hostile, clock.now())
    whole = table.read(prediction.id)
    assert whole is not None
    assert whole.output == [None, None, None, 1]


class TestOrphans:
    @pytest.fixture
    def invoked(self, cloud: None) -> list[dict[str, Any]]:
        """The asynchronous invocations that were made; Lambda refuses all but the first."""
        made: list[dict[str, Any]] = []

        def answer(params: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Any]]:
            made.append({"path": params["url_path"], "how": params["headers"].get("X-Amz-Invocation-Type"),
                         "event": json.loads(params["body"])})  # fmt: skip
            if len(made) > 1:
                return type("Http", (), {"status_code": 429})(), {"Error": {"Code": "TooManyRequestsException"}}
            return type("Http", (), {"status_code": 202})(), {"StatusCode": 202}

        answered: Any = answer  # the stubs do not know that a handler may answer in AWS's place
        client: Any = clients.client("lambda")
        client.meta.events.register_first("before-call.lambda.Invoke", answered)
        return made

    @pytest.mark.parametrize("status", ["processing", "succeeded"])
    def test_orphan_is_recorded_and_a_poll_asked_for_at_once(
        self, table: PredictionsTable, clock: Clock, invoked: list[dict[str, Any]], status: str
    ) -> None:
        prediction = put(table, clock)
        receive(table, prediction.id, body("processing"), clock.now())
        polls = OrphanPolls("poll", clients.client("lambda"))
        assert receive(table, prediction.id, body(status, "v" * 26), clock.now(), polls) is Receipt.ORPHAN
        orphaned = table.get(prediction.id)
        assert orphaned is not None
        assert orphaned.orphans == {"v" * 26}
        assert invoked == [
            {"path": "/2015-03-31/functions/poll/invocations", "how": "Event", "event": {"id": prediction.id}}
        ]

    def test_poll_that_cannot_be_asked_for_is_left_to_the_sweep(
        self, table: PredictionsTable, clock: Clock, invoked: list[dict[str, Any]]
    ) -> None:
        prediction = put(table, clock)
        receive(table, prediction.id, body("processing"), clock.now())
        polls = OrphanPolls("poll", clients.client("lambda"))
        for _ in range(2):
            assert receive(table, prediction.id, body("processing", "v" * 26), clock.now(), polls) is Receipt.ORPHAN
        assert f"prediction#{prediction.id}" in list(table.due(clock.now(), 10))

    def test_orphan_that_is_canceled_already_asks_for_no_poll_and_counts_where_it_was_paid(
        self, table: PredictionsTable, clock: Clock, invoked: list[dict[str, Any]]
    ) -> None:
        prediction = put(table, clock)
        receive(table, prediction.id, body("processing"), clock.now())
        receive(table, prediction.id, body("processing", "v" * 26), clock.now())
        orphaned = table.get(prediction.id)
        assert orphaned is not None
        table.orphan_canceled(orphaned, "v" * 26)
        polls = OrphanPolls("poll", clients.client("lambda"))
        metrics.clear_metrics()
        receive(table, prediction.id, body("canceled", "v" * 26), clock.now(), polls)
        assert "PaidTwice" not in metrics.provider.metric_set
        receive(table, prediction.id, body("succeeded", "v" * 26), clock.now(), polls)
        assert "PaidTwice" in metrics.provider.metric_set
        assert invoked == []


@pytest.fixture
def reads() -> list[str]:
    """The reads of the table."""
    made: list[str] = []
    events: Any = clients.client("dynamodb").meta.events

    def note(model: Any, **_: Any) -> None:
        if model.name in ("GetItem", "Query", "BatchGetItem"):
            made.append(model.name)

    events.register_first("before-call.dynamodb", note)
    return made


@pytest.mark.parametrize("told", [body("processing"), body("succeeded", output="text"), body("starting")])
def test_webhook_of_a_bound_prediction_costs_one_read_and_so_does_its_duplicate(
    table: PredictionsTable, clock: Clock, cloud: None, reads: list[str], told: bytes
) -> None:
    # This process has read the prices, as it does once in five minutes.
    receive(table, put(table, clock).id, body("succeeded", "w" * 26), clock.now())
    prediction = put(table, clock)
    receive(table, prediction.id, body("starting"), clock.now())
    for _ in range(2):
        reads.clear()
        receive(table, prediction.id, told, clock.now())
        assert reads == ["GetItem"]


def test_webhook_that_another_function_overtakes_reads_again_and_changes_nothing(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    known = table.get(prediction.id)
    receive(table, prediction.id, body("failed", error="first"), clock.now())
    before = raw_items(prediction.id)
    outcome = table.merge(
        prediction.id, UpstreamPrediction.parse(json.loads(body("canceled"))), clock.now(), known=known
    )
    assert outcome.change is Change.CLOSED
    assert raw_items(prediction.id)["status"] == before["status"]


def test_lease_to_copy_is_that_of_the_execution_that_tracks_it_by_then(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    known = table.get(prediction.id)
    assert known is not None
    assert table.next_execution(known, "arn:2", clock.now())
    told = UpstreamPrediction.parse(json.loads(body("succeeded", output=[FILE])))
    outcome = table.merge(prediction.id, told, clock.now(), known=known)
    assert outcome.prediction is not None
    assert (outcome.change, outcome.prediction.copy_by) == (Change.ENDED, 2)


@pytest.mark.parametrize(("planned", "kept"), [(119, False), (120, True), (180, True), (181, False), (720, False)])
def test_end_with_files_keeps_a_check_that_is_due_in_two_to_three_minutes(
    table: PredictionsTable, clock: Clock, planned: int, kept: bool
) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    hold_token(table, prediction.id, "token", next_check_at=clock.now() + planned)
    receive(table, prediction.id, body("succeeded", output=[FILE]), clock.now())
    ended = table.get(prediction.id)
    assert ended is not None
    assert ended.next_check_at == int(clock.now()) + (planned if kept else 120)


def test_check_that_is_put_off_meanwhile_does_not_stay(table: PredictionsTable, clock: Clock) -> None:
    prediction = put(table, clock)
    receive(table, prediction.id, body("processing"), clock.now())
    hold_token(table, prediction.id, "token-1", next_check_at=clock.now() + 130)
    known = table.get(prediction.id)
    # The state that waits longer comes between this read and the write.
    hold_token(table, prediction.id, "token-2", next_check_at=clock.now() + 720)
    told = UpstreamPrediction.parse(json.loads(body("succeeded", output=[FILE])))
    ended = table.merge(prediction.id, told, clock.now(), known=known).prediction
    assert ended is not None
    assert (ended.task_token, ended.next_check_at) == ("token-2", int(clock.now()) + 120)
