"""Budgets: no order of starts passes one, and what was reserved is settled once, whatever crashes in between."""

import contextlib
import json
import threading
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from predictions.admission.quotas import OwnerLimits, OwnersLimits
from predictions.aws import clients
from predictions.aws.dynamodb import Key, Table
from predictions.errors import PredictionThrottled, Problem
from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.merging import merge
from predictions.money.budgets import Budgets, dollars
from predictions.money.cost import Cost
from predictions.money.stored import StackPrices
from predictions.notifications.stream import Changes
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.store.settlements import Settlements

from tests.support.apps import AwsCalls
from tests.support.fakes import (
    Clock,
    Died,
    Fault,
    Queued,
    ReplicateInMemory,
    Wakes,
    answer,
    answers_lost,
    faulty,
    refusing,
)
from tests.support.lanes import queued
from tests.support.predictions import current, told, wanted
from tests.support.protocol import Submissions
from tests.support.stream import Bus, make
from tests.support.webhook_queue import stream

DAY = "2025-06-15"
"""The day of the tests' clock."""
SCHNELL = "black-forest-labs/flux-schnell"
IMAGE: dict[str, Any] = {"model": SCHNELL, "metrics": {"image_output_count": 10}}
"""What Replicate says of a run that cost $0.03."""
UNKNOWN = 100_000
"""What a request by a bare version reserves, whose model and so price is not known yet."""
ONE = OwnerLimits(budget_day=150_000)
"""A budget with room for one of these, and not for two."""


@pytest.fixture
def items(cloud: None) -> Table:
    return Table("predictions", clients.client("dynamodb"))


@pytest.fixture
def changes(table: PredictionsTable, outputs: OutputsBucket, items: Table, clock: Clock, wakes: Wakes) -> Changes:
    settlements = Settlements(items, Budgets(items, StackPrices(items)))
    return make(table, outputs, now=clock.now, settlements=settlements)


def used(owner: str = "alice") -> dict[str, int]:
    """What an owner's budget has as used, and the stack's by no owner."""
    key = {"pk": {"S": f"usage#{owner}"}, "sk": {"S": f"budget#{DAY[:7]}"}}
    item = clients.client("dynamodb").get_item(TableName="predictions", Key=key).get("Item", {})
    names = {"d15": "day", "month": "month", "unknown": "unknown"}
    return {names[name]: int(value["N"]) for name, value in item.items() if name in names}


def settled(changes: Changes) -> None:
    """Has the whole stream read again and again: the settlement's own changes, and the thresholds that they reach."""
    for _ in range(3):
        assert changes.publish(stream()) is None


class TestRefused:
    @pytest.mark.parametrize(
        ("limits", "stack", "said", "retry_after"),
        [
            (OwnerLimits(budget_day=150_000), {}, ("owner alice", "day 2025-06-15", "$0.10 of $0.15"), "32001"),
            (
                OwnerLimits(budget_month=150_000),
                {},
                ("owner alice", "month 2025-06", "2025-07-01T00:00:00Z"),
                "1328001",
            ),
            (OwnerLimits(), {"budget_day": 199_999}, ("the stack", "day 2025-06-15", "$0.199999"), "32001"),
            (OwnerLimits(), {"budget_month": 150_000}, ("the stack", "month 2025-06"), "1328001"),
            (OwnerLimits(budget_day=10**6), {"budget_day": 150_000}, ("the stack",), "32001"),
        ],
    )
    def test_caller_without_room_in_a_budget_is_told_which_and_when_it_resets(
        self, submissions: Submissions, replicate: ReplicateInMemory, limits: OwnerLimits, stack: dict[str, int],
        said: tuple[str, ...], retry_after: str,
    ) -> None:  # fmt: skip
        if stack:
            submissions.limiter.change_stack_budget(set_={**stack, "budget_unknown": UNKNOWN})
        submissions.start(wanted(), limits=limits)
        before = used("" if stack else "alice")
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(), limits=limits)
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": retry_after})
        assert all(part in problem.value.detail for part in (*said, "$0.10."))
        assert len(replicate.creates) == 1
        assert used("" if stack else "alice") == before

    def test_estimate_above_the_whole_budget_is_refused_too(self, submissions: Submissions) -> None:
        with pytest.raises(Problem, match=r"\$0\.00 of \$0\.05"):
            submissions.start(wanted(), limits=OwnerLimits(budget_day=50_000))
        assert used() == {}

    def test_queued_prediction_waits_at_most_an_hour_for_room_and_then_goes(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock,
        changes: Changes,
    ) -> None:  # fmt: skip
        OwnersLimits("predictions", clients.client("dynamodb")).set_budget("alice", {"budget_day": 150_000})
        first, second = queued(table, clock), queued(table, clock)
        submissions.submit(first)
        with pytest.raises(PredictionThrottled, match=r"^3600$"):
            submissions.submit(second)
        assert not current(table, second).claimed
        merge(table, first, told("succeeded", current(table, first).upstream_id or "", **IMAGE), clock.now())
        settled(changes)
        assert used() == {"day": 30_000, "month": 30_000, "unknown": 0}
        clock.advance(61)  # the estimate may be a minute old
        submissions.submit(second)
        assert len(replicate.creates) == 2
        assert current(table, second).reserved_micro_dollars == 30_000

    def test_next_day_has_a_budget_of_its_own(self, submissions: Submissions, clock: Clock) -> None:
        submissions.start(wanted(), limits=ONE)
        clock.advance(32001)
        assert submissions.start(wanted(), limits=ONE).reserved_on == "2025-06-16"


class TestReserved:
    def test_start_without_any_budget_makes_the_same_calls_as_ever(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock
    ) -> None:
        submissions.start(wanted())
        calls = AwsCalls()
        prediction = submissions.start(wanted())
        assert "dynamodb.TransactWriteItems" not in calls.made
        assert "dynamodb.BatchGetItem" not in calls.made
        assert calls.made.count("dynamodb.GetItem") <= 2
        assert current(table, prediction.id).reserved_on is None
        assert used() == used("") == {}

    def test_parallel_starts_never_pass_a_budget(self, submissions: Submissions, replicate: ReplicateInMemory) -> None:
        refused: list[int] = []

        def start() -> None:
            try:
                submissions.start(wanted(), limits=OwnerLimits(budget_day=350_000))
            except Problem as problem:
                refused.append(problem.status)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(replicate.creates), refused) == (3, [429] * 5)
        assert used()["day"] == 300_000

    def test_start_that_was_planned_before_another_reserved_is_refused_by_the_write_itself(
        self, submissions: Submissions, items: Table, replicate: ReplicateInMemory
    ) -> None:
        plan = submissions.starting._spending.plan_intent
        late = wanted()
        reservation = plan(late, None, ONE, submissions.starting._now())
        submissions.start(wanted(), limits=ONE)
        spending: Any = submissions.starting._spending
        spending.plan_intent = lambda *_: reservation
        limits = OwnerLimits(per_day=5, in_flight=5, budget_day=150_000)
        with pytest.raises(Problem, match="has no room"):
            submissions.start(late, limits=limits)
        del spending.plan_intent
        assert len(replicate.creates) == 1
        assert used()["day"] == UNKNOWN
        assert (items.get_item(Key("usage#alice", f"day#{DAY}")) or {})["n"] == 0

    def test_repeated_request_reserves_once(self, submissions: Submissions, table: PredictionsTable) -> None:
        for _ in range(3):
            submissions.start(wanted(key="k"), limits=ONE)
        assert used()["day"] == UNKNOWN

    def test_reservation_whose_answer_was_lost_is_one(self, submissions: Submissions) -> None:
        with answers_lost("dynamodb"):
            submissions.start(wanted(), limits=OwnerLimits(budget_day=10**6))
        assert used()["day"] == UNKNOWN

    def test_prediction_that_is_submitted_again_reserves_no_second_time(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        OwnersLimits("predictions", clients.client("dynamodb")).set_budget("alice", {"budget_day": 150_000})
        prediction_id = queued(table, clock)
        replicate.faults = [answer(429, headers={"Retry-After": "5"})]
        with pytest.raises(PredictionThrottled):
            submissions.submit(prediction_id)
        clock.advance(60)
        submissions.submit(prediction_id)
        assert len(replicate.predictions) == 1
        assert used()["day"] == UNKNOWN

    @pytest.mark.parametrize("fault", list(Fault))
    def test_crash_at_any_call_of_a_start_leaves_the_reservation_and_its_prediction_or_neither(
        self, submissions: Submissions, table: PredictionsTable, items: Table, fault: Fault
    ) -> None:
        for n in range(1, 14):
            with faulty(fault, n), contextlib.suppress(Died, Problem, ClientError, BotoCoreError):
                submissions.start(wanted(), limits=OwnerLimits(budget_month=10**9))
            found = clients.client("dynamodb").scan(TableName="predictions")["Items"]
            reserved = [int(item["reserved_micro_dollars"]["N"]) for item in found if "reserved_on" in item]
            assert used().get("month", 0) == sum(reserved)


class TestSettled:
    def start(self, submissions: Submissions, table: PredictionsTable, **limits: Any) -> Prediction:
        return submissions.start(wanted(), limits=OwnerLimits(**(limits or {"budget_day": 10**6})))

    @pytest.mark.parametrize(
        ("status", "report", "amount", "unknown"),
        [
            ("succeeded", IMAGE, 30_000, 0),
            ("succeeded", {"model": "o/other", "metrics": {}}, UNKNOWN, UNKNOWN),
            ("failed", {"model": SCHNELL}, 0, 0),
            ("canceled", {"model": SCHNELL}, 0, 0),
        ],
    )
    def test_true_cost_takes_the_place_of_the_estimate_once(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes, status: str,
        report: dict[str, Any], amount: int, unknown: int,
    ) -> None:  # fmt: skip
        Bus()
        submissions.limiter.change_stack_budget(set_={"budget_month": 10**6, "budget_unknown": UNKNOWN})
        prediction = self.start(submissions, table)
        assert used() == {"day": UNKNOWN, "month": UNKNOWN}
        merge(table, prediction.id, told(status, prediction.upstream_id or "", **report), clock.now())
        settled(changes)
        assert used() == used("") == {"day": amount, "month": amount, "unknown": unknown}
        there = current(table, prediction.id)
        assert (there.settled_micro_dollars, there.settled_unknown) == (amount, bool(unknown))

    def test_refused_create_and_canceled_wait_give_it_back(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, changes: Changes
    ) -> None:
        Bus()
        replicate.faults = [answer(422)]
        with pytest.raises(Problem):
            self.start(submissions, table)
        assert used()["day"] == UNKNOWN
        settled(changes)
        assert used()["day"] == 0

    def test_deleted_prediction_was_settled_and_stays_so(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        Bus()
        prediction = self.start(submissions, table)
        merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **IMAGE), clock.now())
        assert table.request_delete(prediction.id, clock.now())
        settled(changes)
        assert used()["day"] == 30_000

    def test_settlement_counts_in_the_day_of_the_reservation(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        Bus()
        prediction = self.start(submissions, table)
        clock.advance(40_000)
        merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **IMAGE), clock.now())
        settled(changes)
        assert used()["day"] == 30_000

    @pytest.mark.parametrize("fault", list(Fault))
    def test_crash_at_any_call_of_a_settlement_settles_once_in_the_end(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes, fault: Fault
    ) -> None:
        Bus()
        settlements = changes._settlements
        assert settlements is not None
        for n in range(1, 5):
            prediction = self.start(submissions, table, budget_month=10**9)
            merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **IMAGE), clock.now())
            with faulty(fault, n), contextlib.suppress(Died, ClientError, BotoCoreError):
                settlements.settle(current(table, prediction.id), clock.now())
            settled(changes)
            assert used()["month"] == n * 30_000

    def test_failed_settlement_is_retried_by_itself(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        bus = Bus()
        prediction = self.start(submissions, table)
        merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **IMAGE), clock.now())
        retries = Queued("changes-retry")
        with refusing("TransactWriteItems", "AccessDeniedException", service="dynamodb"):
            assert changes.publish(stream()) is None
        assert "Prediction Succeeded" in bus.types, "nothing else waits for it"
        assert used()["day"] == UNKNOWN
        (message,) = [each for each in retries.take() if json.loads(each["body"])["effect"] == "budget"]
        assert changes.retry([message]) == []
        assert used()["day"] == 30_000

    def test_price_that_comes_later_corrects_the_budget_once(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        Bus()
        prediction = self.start(submissions, table)
        report = told("succeeded", prediction.upstream_id or "", model="o/other", metrics={"predict_time": 1})
        merge(table, prediction.id, report, clock.now())
        settled(changes)
        assert used() == {"day": UNKNOWN, "month": UNKNOWN, "unknown": UNKNOWN}
        assert table.price_later(current(table, prediction.id), Cost(7_000, None, "o/other#1@2026-12-01"))
        settled(changes)
        assert used() == {"day": 7_000, "month": 7_000, "unknown": 0}

    def test_recent_runs_of_the_model_are_the_next_estimate(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        Bus()
        estimates = []
        for images in (10, 60):
            prediction = self.start(submissions, table)
            estimates.append(prediction.reserved_micro_dollars)
            report = {**IMAGE, "metrics": {"image_output_count": images}}
            merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **report), clock.now())
            settled(changes)
            clock.advance(61)
        estimates.append(self.start(submissions, table).reserved_micro_dollars)
        assert estimates == [UNKNOWN, 30_000, 60_000]
        assert submissions.start(wanted(owner="bob"), limits=ONE).reserved_micro_dollars == UNKNOWN


class TestThresholds:
    def test_each_threshold_is_one_event(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        bus = Bus()
        limits = OwnerLimits(budget_day=240_000)
        seen: list[list[tuple[str, int, int]]] = []
        for _ in range(4):
            with_room = True
            try:
                submissions.start(wanted(), limits=limits)
            except Problem:
                with_room = False
            settled(changes)
            told_ = {
                (detail["of"], detail["percent"], detail["used_micro_dollars"])
                for type_, detail in bus.taken
                if type_ == "Budget Threshold Reached"
            }
            seen.append(sorted(told_))
            assert with_room == (len(seen) < 3)
        assert seen == [
            [],
            [(DAY, 80, 200_000)],
            [(DAY, 80, 200_000), (DAY, 100, 300_000)],
            [(DAY, 80, 200_000), (DAY, 100, 300_000)],
        ]
        (detail,) = {json.dumps(d) for t, d in bus.taken if t == "Budget Threshold Reached" and d["percent"] == 80}
        assert json.loads(detail) == {
            "version": "1", "event_id": f"budget-alice-{DAY}-80", "budget": "owner", "owner": "alice", "period": "day",
            "of": DAY, "percent": 80, "used_micro_dollars": 200_000, "limit_micro_dollars": 240_000,
        }  # fmt: skip

    def test_cost_above_its_estimate_is_noticed_when_it_is_settled(
        self, submissions: Submissions, table: PredictionsTable, clock: Clock, changes: Changes
    ) -> None:
        bus = Bus()
        submissions.limiter.change_stack_budget(set_={"budget_month": 200_000, "budget_unknown": UNKNOWN})
        prediction = submissions.start(wanted())
        report = {**IMAGE, "metrics": {"image_output_count": 100}}
        merge(table, prediction.id, told("succeeded", prediction.upstream_id or "", **report), clock.now())
        settled(changes)
        found = {
            (d["budget"], d["owner"], d["period"], d["of"], d["percent"])
            for t, d in bus.taken
            if t == "Budget Threshold Reached"
        }
        assert found == {("stack", None, "month", "2025-06", 80), ("stack", None, "month", "2025-06", 100)}


@pytest.mark.parametrize(
    ("micro_dollars", "text"), [(0, "$0.00"), (1_250_000, "$1.25"), (1, "$0.000001"), (10**12, "$1000000.00")]
)
def test_amount_is_written_in_dollars(micro_dollars: int, text: str) -> None:
    assert dollars(micro_dollars) == text
