"""The cost of a prediction: written with its end, unknown rather than guessed, and never why an end is lost."""

import json
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from predictions.aws import clients
from predictions.aws.dynamodb import Table, deserialize
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.merging import merge
from predictions.lifecycle.reservations import Reservations
from predictions.lifecycle.transitions import Transitions
from predictions.money.cost import Cost
from predictions.money.stored import AGE_SECONDS, StackPrices
from predictions.money.unknown import UnknownCosts
from predictions.notifications.event_bus import event_of_prediction
from predictions.observability import metrics
from predictions.pipelines.state import StepState
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change, Prediction, prediction_of
from predictions.views.prediction import Presenter

from tests.support.apps import AwsCalls
from tests.support.fakes import Clock, Died, Fault, Wakes, faulty, refusing
from tests.support.predictions import FILE, current, put, raw_items, told
from tests.support.stream import Bus, make
from tests.support.webhook_queue import stream

SCHNELL = "black-forest-labs/flux-schnell"
IMAGE: dict[str, Any] = {"model": SCHNELL, "metrics": {"image_output_count": 1, "predict_time": 0.8}}
PRICE = f"{SCHNELL}#1@2026-10-07"
KNOWN = {"micro_dollars": 3000, "reason": None, "price": PRICE}


@pytest.fixture
def prices(table: PredictionsTable) -> StackPrices:
    """The stack's prices, for the command line."""
    return StackPrices(Table("predictions", clients.client("dynamodb")))


def ended(table: PredictionsTable, clock: Clock, status: str = "succeeded", **report: Any) -> Prediction:
    """A prediction that Replicate has ended."""
    prediction = put(table, clock)
    outcome = merge(table, prediction.id, told(status, **report), clock.now())
    assert outcome.change is Change.ENDED
    assert outcome.prediction is not None
    return outcome.prediction


def unknown(prediction: Prediction) -> str:
    """Why the cost of a prediction is unknown."""
    cost = prediction.cost
    assert cost is not None
    assert (cost.micro_dollars, cost.price) == (None, None)
    return cost.reason or ""


# -- written with the end -----------------------------------------------------------------------------------------


def test_cost_is_written_with_the_terminal_status_and_by_no_further_write(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = put(table, clock)
    calls = AwsCalls()
    table.merge(prediction.id, told("succeeded", **IMAGE), clock.now())
    writes = [call for call in calls.made if call in ("dynamodb.PutItem", "dynamodb.UpdateItem")]
    assert len(writes) == 1, "the status, with the output"
    there = current(table, prediction.id)
    assert there.cost == Cost(3000, None, PRICE)


@pytest.mark.parametrize(("report", "counted"), [(IMAGE, False), ({"model": "o/other", "metrics": {}}, True)])
def test_unknown_cost_is_counted(
    table: PredictionsTable, clock: Clock, wakes: Wakes, report: dict[str, Any], counted: bool
) -> None:
    metrics.clear_metrics()
    prediction = ended(table, clock, **report)
    merge(table, prediction.id, told("succeeded", **report), clock.now())
    assert ("CostsUnknown" in metrics.provider.metric_set) == counted
    if counted:
        assert metrics.provider.metric_set["CostsUnknown"]["Value"] == [1.0], "once, although it was reported twice"


@pytest.mark.parametrize("status", ["failed", "canceled", "aborted"])
def test_what_never_ran_costs_0(table: PredictionsTable, clock: Clock, wakes: Wakes, status: str) -> None:
    cost = ended(table, clock, status, model="o/other").cost
    assert cost is not None
    assert cost.micro_dollars == 0
    assert "Not billed" in (cost.reason or "")


@pytest.mark.parametrize("status", ["failed", "canceled"])
def test_what_was_seen_to_run_is_unknown_without_metrics(
    table: PredictionsTable, clock: Clock, wakes: Wakes, status: str
) -> None:
    prediction = put(table, clock)
    table.merge(prediction.id, told("processing"), clock.now())
    table.merge(prediction.id, told(status, model=SCHNELL), clock.now())
    assert "lack image_output_count" in unknown(current(table, prediction.id))


def test_output_that_is_too_large_was_paid_for(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    prediction = put(table, clock)
    report = told("succeeded", **IMAGE)
    report._too_large = "The output is too large."
    table.merge(prediction.id, report.failed_for_its_size(), clock.now())
    there = current(table, prediction.id)
    assert (there.visible, there.cost) == ("failed", Cost(3000, None, PRICE))


@pytest.mark.parametrize(
    "metrics_of_the_model",
    [*({"image_output_count": value} for value in (-1, 1e300, "4", [4], {"$": 1}, True)), {"predict_time": 2}],
)
def test_absurd_metrics_end_the_prediction_at_an_unknown_cost(
    table: PredictionsTable, clock: Clock, wakes: Wakes, metrics_of_the_model: dict[str, Any]
) -> None:
    prediction = ended(table, clock, model=SCHNELL, metrics=metrics_of_the_model)
    assert prediction.visible == "succeeded"
    assert "image_output_count" in unknown(prediction)


def test_metrics_too_large_to_store_are_priced_all_the_same(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = ended(table, clock, model=SCHNELL, metrics={"image_output_count": 2, "noise": "x" * 5000})
    assert (prediction.metrics_json, prediction.cost_micro_dollars) == (None, 6000)


def test_deployment_and_training_are_not_priced_as_the_model(
    table: PredictionsTable, clock: Clock, wakes: Wakes, prices: StackPrices
) -> None:
    assert unknown(ended(table, clock, **IMAGE, deployment="acme/mine")) == "No price of deployment:acme/mine is known."
    read = {"date": "2026-11-30", "source": "https://replicate.com/deployments/acme/mine"}
    prices.write_entries(lambda there: {**there, "deployment:acme/mine": {**read, "tiers": [{"hardware": "gpu-t4"}]}})
    clock.advance(AGE_SECONDS)
    assert ended(table, clock, **IMAGE, deployment="acme/mine").cost_micro_dollars == 180


# -- ends without Replicate ---------------------------------------------------------------------------------------


class NoReservations(Reservations):
    """No start has to be given back."""

    def __init__(self) -> None: ...

    def release(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    ("claim", "bound", "how", "micro_dollars", "reason"),
    [
        (False, False, {}, 0, "Not billed: Replicate did not accept it, or it was never submitted."),
        (True, False, {"refusal": {"status": 422}}, 0, "Not billed"),
        (True, False, {"not_accepted": True}, 0, "Not billed"),
        (True, False, {}, None, "Whether Replicate accepted it is unknown"),
        (True, True, {}, None, "Replicate did not report how it ended"),
        (True, True, {"refusal": {"status": 422}}, None, "Replicate did not report how it ended"),
    ],
)
def test_end_without_replicate_is_free_only_if_nothing_was_accepted(
    table: PredictionsTable,
    clock: Clock,
    wakes: Wakes,
    claim: bool,
    bound: bool,
    how: Any,
    micro_dollars: int | None,
    reason: str,
) -> None:
    prediction = put(table, clock, claim=claim)
    if bound:
        table.merge(prediction.id, told("processing", model=SCHNELL), clock.now())
        prediction = current(table, prediction.id)
    metrics.clear_metrics()
    transitions = Transitions(table, NoReservations(), now=clock.now)
    cost = transitions.end(prediction, Status.FAILED, "why", **how).cost
    assert cost is not None
    assert cost.micro_dollars == micro_dollars
    assert reason in (cost.reason or "")
    assert ("CostsUnknown" in metrics.provider.metric_set) == (micro_dollars is None)


# -- failures -----------------------------------------------------------------------------------------------------


def test_prices_that_cannot_be_read_do_not_hold_up_the_end(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    # As in the seconds of an upgrade in which the code is there and its permission is not.
    def of_prices(body: Any) -> bool:
        return bool(body["Key"]["pk"]["S"] == "prices")

    with refusing("GetItem", "AccessDeniedException", of_prices, service="dynamodb"):
        prediction = ended(table, clock, **IMAGE)
    assert prediction.visible == "succeeded"
    assert unknown(prediction) == "The prices of this stack could not be read."
    clock.advance(30)
    assert ended(table, clock, **IMAGE).cost_micro_dollars == 3000


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("n", range(5))
def test_end_that_is_reported_again_after_any_fault_has_its_one_cost(
    table: PredictionsTable, clock: Clock, wakes: Wakes, fault: Fault, n: int
) -> None:
    prediction = put(table, clock)
    try:
        with faulty(fault, n):
            merge(table, prediction.id, told("succeeded", **IMAGE), clock.now())
    except (Died, ClientError, BotoCoreError):
        pass
    merge(table, prediction.id, told("succeeded", **IMAGE), clock.now())
    there = current(table, prediction.id)
    assert there.ended_visibly
    assert there.cost_micro_dollars == 3000 or there.cost_reason == "The prices of this stack could not be read."


# -- what callers see ---------------------------------------------------------------------------------------------


def shown(table: PredictionsTable, prediction_id: str) -> dict[str, Any]:
    """What GET shows."""
    whole = table.read(prediction_id)
    assert whole is not None
    return Presenter(OutputsBucket("outputs"), 3600).show(whole)


def test_cost_is_shown_from_the_visible_end_on(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    prediction = put(table, clock)
    assert "cost" not in shown(table, prediction.id)
    table.merge(prediction.id, told("processing"), clock.now())
    assert "cost" not in shown(table, prediction.id)
    there = table.merge(prediction.id, told("succeeded", output=[FILE], **IMAGE), clock.now()).prediction
    assert there is not None
    assert "cost" not in shown(table, prediction.id), "not before its files are copied"
    assert event_of_prediction(there, [], "outputs", 0).detail["cost"] is None
    table.end_copy(there, [StoredFile(path="/0", index=0, error="gone")], clock.now())
    assert shown(table, prediction.id)["cost"] == KNOWN
    assert event_of_prediction(current(table, prediction.id), [], "outputs", 0).detail["cost"] == KNOWN


def test_item_of_an_earlier_release_is_shown_at_an_unknown_cost(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = ended(table, clock, **IMAGE)
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": f"prediction#{prediction.id}"}, "sk": {"S": "status"}},
        UpdateExpression="REMOVE cost_micro_dollars, cost_reason, cost_price",
    )
    assert shown(table, prediction.id)["cost"] == {
        "micro_dollars": None, "reason": "It ended before this stack recorded costs.", "price": None
    }  # fmt: skip


def test_earlier_release_reads_an_item_with_a_cost(table: PredictionsTable, clock: Clock, wakes: Wakes) -> None:
    # An earlier release passes over the attributes that it does not know, as this one does.
    item = raw_items(ended(table, clock, **IMAGE).id)["status"]
    assert item["cost_micro_dollars"] == {"N": "3000"}
    assert prediction_of({**deserialize(item), "attribute_of_a_later_release": 1}).cost_micro_dollars == 3000


def test_step_costs_the_sum_of_its_predictions_and_nothing_is_known_of_a_sum_with_an_unknown(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    one, other = ended(table, clock, **IMAGE), ended(table, clock, model="o/other", metrics={"predict_time": 1})
    assert StepState(None, "succeeded", {0: one, 1: one}).cost == Cost(6000)  # type: ignore[arg-type]
    assert StepState(None, "succeeded", {0: one, 1: other}).cost == Cost(  # type: ignore[arg-type]
        None, "The cost of 1 of 2 predictions is unknown."
    )
    assert StepState(None, "skipped", {}).cost == Cost(0)  # type: ignore[arg-type]
    assert StepState(None, "processing", {0: one}).cost is None  # type: ignore[arg-type]


# -- the register -------------------------------------------------------------------------------------------------


def test_stream_records_what_ended_at_an_unknown_cost(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, wakes: Wakes
) -> None:
    Bus()
    register = UnknownCosts(Table("predictions", clients.client("dynamodb")))
    changes = make(table, outputs, now=clock.now, unknown_costs=register)
    ended(table, clock, **IMAGE)
    put(table, clock)
    last = ended(table, clock, model="o/other", metrics={"predict_time": 1})
    for _ in range(2):
        assert changes.publish(stream()) is None
    (entry,) = register.entries(clock.now())
    assert (entry.key, entry.reason, entry.example) == ("o/other", "No price of o/other is known.", last.id)
    assert entry.owners == {"alice"}


def test_register_that_fails_holds_up_no_event(
    table: PredictionsTable, outputs: OutputsBucket, clock: Clock, wakes: Wakes
) -> None:
    bus = Bus()
    register = UnknownCosts(Table("predictions", clients.client("dynamodb")))
    ended(table, clock, model="o/other")
    with refusing("UpdateItem", "AccessDeniedException", service="dynamodb"):
        assert make(table, outputs, now=clock.now, unknown_costs=register).publish(stream()) is None
    assert bus.types[-1] == "Prediction Succeeded"
    assert json.dumps(bus.calls).count("No price of o/other is known.") == 1


# -- prices that come later ---------------------------------------------------------------------------------------


def test_later_price_is_written_once_and_a_known_cost_stays(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = ended(table, clock, model="o/other", metrics={"predict_time": 1})
    assert table.price_later(prediction, Cost(5, None, "o/other#1@2026-11-30"))
    assert not table.price_later(prediction, Cost(7, None, "o/other#1@2026-12-01"))
    assert current(table, prediction.id).cost == Cost(5, None, "o/other#1@2026-11-30")


def test_later_price_of_an_item_that_is_gone_or_another_by_now_writes_nothing(
    table: PredictionsTable, clock: Clock, wakes: Wakes
) -> None:
    prediction = ended(table, clock, model="o/other", metrics={"predict_time": 1})
    open_one = put(table, clock)
    assert not table.price_later(open_one, Cost(5))
    clients.client("dynamodb").delete_item(
        TableName="predictions", Key={"pk": {"S": f"prediction#{prediction.id}"}, "sk": {"S": "status"}}
    )
    assert not table.price_later(prediction, Cost(5))
    assert table.get(prediction.id) is None, "TTL has removed it, and nothing brings it back"
