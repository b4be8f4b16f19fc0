"""What becomes of a create without a clear answer: read, never guessed, and submitted again on evidence only."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from botocore.exceptions import EndpointConnectionError
from predictions.admission.quotas import OwnerLimits, OwnersLimits
from predictions.aws import clients
from predictions.errors import PredictionThrottled
from predictions.lifecycle.orphans import STOP_SECONDS
from predictions.lifecycle.readings import CALLS_AT_ONCE, CALLS_PER_MINUTE, Budget
from predictions.observability import metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.fakes import (
    API_URL,
    VERSION,
    Clock,
    Executed,
    ReplicateInMemory,
    Wakes,
    accept_then,
    answer,
    fail,
)
from tests.support.fixtures import make_submissions
from tests.support.predictions import current, forget_expired, waiting, wanted
from tests.support.protocol import Submissions, Timing

GRACE = 45
TIMING = Timing(lifetime=86400, training_lifetime=604800, grace=GRACE, first_poll=60, retention=30 * 86400)
LISTS = "/v1/predictions"


@pytest.fixture
def submissions(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, wakes: Wakes, clock: Clock
) -> Submissions:
    """The protocol as new stacks have it."""
    replicate.shows_webhook = {"get"}
    return make_submissions(table, replicate, executed, clock, timing=TIMING, resubmit=True)


def execute(submissions: Submissions, clock: Clock, prediction_id: str, *, seconds: float = 86_400) -> float:
    """The states SubmitPrediction and WaitForTurn, for so long; returns how long they took."""
    began = clock.now()
    while clock.now() - began < seconds:
        try:
            submissions.submit(prediction_id)
        except PredictionThrottled as throttled:
            clock.advance(throttled.seconds)
        else:
            break
    return clock.now() - began


def lists(replicate: ReplicateInMemory) -> int:
    """How often the list was asked for."""
    return sum(r.method == "GET" and r.url.path == LISTS for r in replicate.asked)


def fall_silent(clock: Clock) -> Any:
    """A create that Replicate neither takes nor answers."""

    def silent(request: httpx.Request, _: ReplicateInMemory) -> httpx.Response:
        clock.advance(20)
        raise httpx.ReadTimeout("silent")

    return silent


def measured(name: str) -> list[float]:
    found = {n: list(each["Value"]) for n, each in metrics.provider.metric_set.items()}
    return found.get(name, [])


def upstream(replicate: ReplicateInMemory, prediction: Prediction, clock: Clock, **told: Any) -> dict[str, Any]:
    """Another prediction at Replicate with this one's webhook, as if accepted late."""
    request = next(r for r in replicate.asked if r.method == "POST" and prediction.id in r.content.decode())
    return replicate.accept(request, **{"status": "processing", **told})


class TestFound:
    @pytest.mark.parametrize("shown", [{"list"}, {"get"}, {"list", "get"}])
    @pytest.mark.parametrize(("lost", "seconds"), [(accept_then(502), 4), (accept_then(httpx.ReadTimeout), 11)])
    def test_entry_with_our_webhook_is_bound_at_the_first_look(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        shown: set[str],
        lost: Any,
        seconds: int,
    ) -> None:
        replicate.shows_webhook = shown
        replicate.faults = [lost]
        started = submissions.start(wanted())
        assert execute(submissions, clock, started.id) <= seconds
        assert current(table, started.id).upstream_id in replicate.predictions
        assert (lists(replicate), len(replicate.creates)) == (1, 1)

    @pytest.mark.parametrize(
        "changed",
        [{"input": {"prompt": "***"}}, {"input": {}, "data_removed": True}, {"model": "an/alias"}, {"input": None}],
    )
    def test_our_webhook_is_enough_whatever_else_the_entry_shows(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        changed: dict[str, Any],
    ) -> None:
        replicate.faults = [accept_then(502)]
        started = submissions.start(wanted())
        next(iter(replicate.predictions.values())).update(changed)
        execute(submissions, clock, started.id)
        assert current(table, started.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 1

    def test_entry_is_asked_for_once_however_often_the_list_is_read(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        started = submissions.start(wanted())
        stranger = replicate.accept(next(r for r in replicate.asked if r.method == "POST"))
        replicate.webhooks[stranger["id"]] = "https://example.com/theirs"
        replicate.faults = [answer(502)]
        lost = submissions.start(wanted(input={"prompt": "b"}))
        execute(submissions, clock, lost.id)
        gets = [r.url.path for r in replicate.asked if r.method == "GET"]
        assert gets.count(f"/v1/predictions/{stranger['id']}") == 1
        assert lists(replicate) >= 3
        assert started.id != lost.id

    def test_crash_after_the_claim_is_looked_for_once_its_holder_is_done(
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
        intent = wanted(key="k")
        with pytest.raises(KeyboardInterrupt):
            submissions.start(intent)
        clock.advance(30)
        submissions.sweep(10, lambda: 300)
        assert executed.inputs[f"{intent.id}-2"]["submit"] is True
        execute(submissions, clock, intent.id)
        assert current(table, intent.id).upstream_id in replicate.predictions


class TestEvidence:
    @pytest.mark.parametrize(("lost", "least"), [(answer(502), GRACE), ("silence", GRACE)])
    def test_two_complete_readings_without_it_submit_it_again(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        lost: Any,
        least: int,
    ) -> None:
        began = clock.now()
        replicate.faults = [fall_silent(clock) if lost == "silence" else lost]
        started = submissions.start(wanted(lifetime="10m"))
        over = clock.now()
        execute(submissions, clock, started.id)
        bound = current(table, started.id)
        assert bound.upstream_id in replicate.predictions
        assert (len(replicate.creates), bound.unknown_creates) == (2, 1)
        again_at = clock.now()
        assert least + 5 <= again_at - over <= least + 15
        # What is left of its time is sent, and its deadline stays.
        assert bound.deadline == int(began) + 600
        sent = [r.headers["cancel-after"] for r in replicate.asked if r.method == "POST" and r.url.path == LISTS]
        assert sent == ["600s", f"{600 - int(again_at - began)}s"]

    def test_one_reading_is_no_evidence_however_late(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        clock.advance(3600)
        with pytest.raises(PredictionThrottled):
            submissions.submit(started.id)
        assert (lists(replicate), len(replicate.creates)) == (1, 1)
        assert current(table, started.id).claimed is not None

    def test_readings_before_the_grace_are_no_evidence(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        execute(submissions, clock, started.id, seconds=GRACE - 1)
        assert lists(replicate) == 3
        assert len(replicate.creates) == 1

    @pytest.mark.parametrize(("lost", "looks"), [(answer(502), [3, 10, 30, 46]), ("silence", [10, 30, 46, 90])])
    def test_list_is_read_at_these_seconds_after_the_holder_was_done(
        self, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, clock: Clock, lost: Any,
        looks: list[int],
    ) -> None:  # fmt: skip
        submissions = make_submissions(table, replicate, executed, clock, timing=TIMING)
        replicate.faults = [fall_silent(clock) if lost == "silence" else lost]
        started = submissions.start(wanted())
        over, read = clock.now(), []
        for second in range(1, 92):
            clock.moment = over + second
            before = lists(replicate)
            with pytest.raises(PredictionThrottled):
                submissions.submit(started.id)
            if lists(replicate) > before:
                read.append(second)
        assert read == looks

    def test_twenty_open_predictions_of_the_same_time_are_the_control_group(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        clock.advance(1)
        for n in range(22):
            shown = submissions.start(wanted(input={"prompt": f"control {n}"}))
            table.check_again_at(current(table, shown.id), clock.now() + 600)
            del replicate.predictions[current(table, shown.id).upstream_id or ""]
        execute(submissions, clock, started.id, seconds=100)
        (reading, *_) = json.loads(current(table, started.id).readings_json or "[]")[-1:]
        assert reading["why_not"].startswith("it does not show 20 predictions")

    def test_entry_that_is_listed_late_within_the_grace_is_bound_and_not_submitted_again(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [accept_then(502)]
        started = submissions.start(wanted())
        late = dict(replicate.predictions)
        replicate.predictions.clear()
        execute(submissions, clock, started.id, seconds=GRACE - 2)
        replicate.predictions.update(late)
        execute(submissions, clock, started.id)
        assert current(table, started.id).upstream_id in late
        assert len(replicate.creates) == 1

    @pytest.mark.parametrize("odd", ["500", "html", "no date", "circle", "no results"])
    def test_readings_that_are_not_complete_are_no_evidence_and_harm_nobody(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, odd: str
    ) -> None:
        answers: dict[str, Callable[[], httpx.Response]] = {
            "500": lambda: httpx.Response(500),
            "html": lambda: httpx.Response(200, content=b"<html>"),
            "no date": lambda: httpx.Response(200, json={"results": [], "next": None}, headers={"date": ""}),
            "circle": lambda: httpx.Response(200, json={"results": [], "next": f"{replicate.URL}/predictions"}),
            "no results": lambda: httpx.Response(200, json={"next": None}),
        }
        replicate.others["GET", "/predictions"] = answers[odd]
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        execute(submissions, clock, started.id, seconds=1800)
        assert len(replicate.creates) == 1
        assert current(table, started.id).visible == "starting"
        # Replicate is there again: it costs minutes.
        del replicate.others["GET", "/predictions"]
        assert execute(submissions, clock, started.id) < 300
        assert current(table, started.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 2

    @pytest.mark.parametrize("others", [0, 300])
    def test_control_group_that_is_not_shown_is_no_evidence(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock, others: int
    ) -> None:
        for n in range(others):  # open items that wait for other things, and are due before the control
            clients.client("dynamodb").put_item(
                TableName="predictions",
                Item={"pk": {"S": f"batch#{n}"}, "sk": {"S": "status"}, "open": {"S": "open"},
                      "next_check_at": {"N": str(int(clock.now()) + 179)}},
            )  # fmt: skip
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        clock.advance(1)
        control = submissions.start(wanted(input={"prompt": "control"}))
        table.check_again_at(current(table, control.id), clock.now() + 180)
        shown = current(table, control.id).upstream_id or ""
        hidden = replicate.predictions.pop(shown)
        execute(submissions, clock, started.id, seconds=900)
        assert len(replicate.creates) == 2
        seen = json.loads(current(table, started.id).readings_json or "[]")
        assert any("does not show" in each.get("why_not", "") for each in seen)
        replicate.predictions[shown] = hidden
        execute(submissions, clock, started.id)
        assert len(replicate.creates) == 3

    def test_entry_that_nothing_decides_is_no_evidence_and_fails_by_the_deadline_naming_it(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.shows_webhook = set()
        replicate.faults = [answer(502)]
        started = submissions.start(wanted(lifetime="10m"))
        stranger = replicate.accept(next(r for r in replicate.asked if r.method == "POST"), input={"prompt": "theirs"})
        took = execute(submissions, clock, started.id)
        ended = current(table, started.id)
        assert (ended.visible, len(replicate.creates)) == ("failed", 1)
        assert stranger["id"] in (ended.error or "")
        assert 900 <= took <= 902
        assert measured("UndecidableSubmissions")
        assert lists(replicate) < 12

    @pytest.mark.parametrize("excluded", ["webhook", "address", "bound", "orphan", "version"])
    def test_entry_that_is_anothers_is_passed_over(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        excluded: str,
    ) -> None:
        replicate.shows_webhook = {"get"} if excluded == "webhook" else set()
        replicate.faults = [answer(502)]
        lost = submissions.start(wanted())
        clock.advance(1)
        if excluded == "address":
            # Another stack of the same account, whose ids are made of the same owners and keys.
            upstream(replicate, lost, clock, webhook=f"https://staging.example.com/v1/webhooks/replicate/{lost.id}")
        elif excluded == "version":
            replicate.accept(next(r for r in replicate.asked if r.method == "POST"), version="0" * 64)
        else:
            other = submissions.start(wanted(lifetime="1h"))
            if excluded == "webhook":
                upstream(replicate, other, clock)
            if excluded == "orphan":
                second = upstream(replicate, other, clock)
                table.merge(other.id, UpstreamPrediction.parse(second), clock.now())
                submissions.poll(other.id)
        execute(submissions, clock, lost.id)
        assert current(table, lost.id).upstream_id in replicate.predictions
        assert current(table, lost.id).unknown_creates == 1

    def test_entry_that_is_bound_after_it_was_seen_is_passed_over_from_then_on(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.shows_webhook = set()
        replicate.faults = [answer(502)]
        lost = submissions.start(wanted())
        other = waiting(table, clock, key="k")
        table.claim(other.id, VERSION, clock.now())
        request = next(r for r in replicate.asked if r.method == "POST")
        accepted = replicate.accept(request, input={"prompt": "of the other"})
        execute(submissions, clock, lost.id, seconds=GRACE + 20)
        assert len(replicate.creates) == 1
        table.merge(other.id, UpstreamPrediction.parse(accepted), clock.now())
        execute(submissions, clock, lost.id)
        assert current(table, lost.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 2

    def test_first_reading_without_it_after_an_undecided_one_is_followed_by_the_second_at_once(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.shows_webhook = set()
        replicate.faults = [answer(502)]
        lost = submissions.start(wanted())
        other = waiting(table, clock, key="k")
        table.claim(other.id, VERSION, clock.now())
        accepted = replicate.accept(
            next(r for r in replicate.asked if r.method == "POST"), input={"prompt": "of the other"}
        )
        execute(submissions, clock, lost.id, seconds=GRACE + 60)
        assert current(table, lost.id).evidence_at == 0
        table.merge(other.id, UpstreamPrediction.parse(accepted), clock.now())
        before = lists(replicate)
        execute(submissions, clock, lost.id)
        begins = [each["at"] for each in json.loads(current(table, lost.id).readings_json or "[]")]
        assert lists(replicate) - before >= 2
        assert begins[-1] - begins[-2] <= 6, "the second reading waited as long as one after an undecided one"

    def test_404_of_an_entry_excludes_nothing(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted(lifetime="10m"))
        stranger = replicate.accept(next(r for r in replicate.asked if r.method == "POST"), input={"prompt": "theirs"})
        replicate.others["GET", f"/predictions/{stranger['id']}"] = lambda: httpx.Response(404, json={})
        execute(submissions, clock, started.id)
        assert (current(table, started.id).visible, len(replicate.creates)) == ("failed", 1)

    def test_only_candidate_of_same_target_and_input_is_bound_after_the_grace(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.shows_webhook = set()
        replicate.faults = [accept_then(502)]
        started = submissions.start(wanted())
        assert execute(submissions, clock, started.id) >= GRACE
        assert current(table, started.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 1

    def test_candidate_that_could_not_be_asked_for_is_not_bound_by_its_likeness(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        theirs = upstream(replicate, started, clock)
        replicate.webhooks[theirs["id"]] = "https://example.com/theirs"
        replicate.others["GET", f"/predictions/{theirs['id']}"] = lambda: httpx.Response(503)
        execute(submissions, clock, started.id, seconds=300)
        assert (current(table, started.id).upstream_id, len(replicate.creates)) == (None, 1)
        # Once it can be asked for, its webhook tells that it is another's.
        del replicate.others["GET", f"/predictions/{theirs['id']}"]
        execute(submissions, clock, started.id)
        assert current(table, started.id).upstream_id not in (None, theirs["id"])
        assert len(replicate.creates) == 2

    def test_entries_are_named_although_the_last_reading_before_the_end_failed(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.shows_webhook = set()
        replicate.faults = [answer(502)]
        started = submissions.start(wanted(lifetime="10m"))
        stranger = replicate.accept(next(r for r in replicate.asked if r.method == "POST"), input={"prompt": "theirs"})
        execute(submissions, clock, started.id, seconds=500)
        replicate.others["GET", "/predictions"] = lambda: httpx.Response(503)
        execute(submissions, clock, started.id)
        ended = current(table, started.id)
        assert ended.visible == "failed"
        assert stranger["id"] in (ended.error or "")


class TestAgain:
    def test_wait_of_a_caller_covers_the_second_submission(
        self, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, wakes: Wakes, clock: Clock
    ) -> None:
        due = clock.now() + 1
        started: list[Prediction] = []

        def sleep(seconds: float) -> None:
            nonlocal due
            clock.advance(seconds)
            if not started or clock.now() < due:
                return
            try:
                protocol.submit(started[0].id)
            except PredictionThrottled as throttled:
                due = clock.now() + throttled.seconds
            else:
                replicate.finish(current(table, started[0].id).upstream_id or "", output="done")
                protocol.poll(started[0].id)

        protocol = make_submissions(table, replicate, executed, clock, timing=TIMING, resubmit=True, sleep=sleep)
        replicate.faults = [answer(502)]
        started.append(protocol.start(wanted(), wait_seconds=120))
        assert started[0].visible == "starting"
        assert protocol.wait_for_end(started[0].id, 120) is True
        assert len(replicate.creates) == 2

    def test_unknown_creates_are_bounded_and_spaced(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)] * 10
        started = submissions.start(wanted())
        took = execute(submissions, clock, started.id)
        ended = current(table, started.id)
        assert (ended.visible, len(replicate.creates)) == ("failed", 5)
        assert "5 submissions" in (ended.error or "")
        assert 5 * GRACE + 5 + 20 + 80 + 300 <= took <= 5 * (GRACE + 12) + 405

    def test_webhook_of_an_earlier_submission_binds_before_the_next_post(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        claim = PredictionsTable.claim

        def bound_meanwhile(self: PredictionsTable, *args: Any, **options: Any) -> Any:
            claimed = claim(self, *args, **options)
            told = upstream(replicate, started, clock)
            table.merge(started.id, UpstreamPrediction.parse(told), clock.now())
            return claimed

        monkeypatch.setattr(PredictionsTable, "claim", bound_meanwhile)
        execute(submissions, clock, started.id)
        assert current(table, started.id).upstream_id in replicate.predictions
        assert len(replicate.creates) == 1

    def test_cancel_between_the_second_claim_and_its_post_ends_it_canceled(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        claim = PredictionsTable.claim

        def canceled_meanwhile(self: PredictionsTable, *args: Any, **options: Any) -> Any:
            claimed = claim(self, *args, **options)
            submissions.cancel(current(table, started.id))
            return claimed

        monkeypatch.setattr(PredictionsTable, "claim", canceled_meanwhile)
        execute(submissions, clock, started.id)
        assert (current(table, started.id).visible, len(replicate.creates)) == ("canceled", 1)

    def test_next_submission_takes_a_start_and_no_place_in_its_owners_limits(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        OwnersLimits("predictions", clients.client("dynamodb")).set_limits("alice", OwnerLimits(per_day=1))
        replicate.faults = [answer(502)]
        intent = replace(wanted(), source="queue")
        started = table.put_intent(
            intent, version=VERSION, deadline=int(clock.now()) + 86400, expires=int(clock.now()) + 864000, claim=False,
            execution_arn="arn:x", now=clock.now(),
        )  # fmt: skip
        lanes: list[int] = []
        for seconds in (1, 600):
            execute(submissions, clock, started.id, seconds=seconds)
            limiter = clients.client("dynamodb").get_item(
                TableName="predictions", Key={"pk": {"S": "limiter"}, "sk": {"S": "creates"}}
            )
            lanes.append(int(limiter["Item"]["queue_at"]["N"]))
        assert len(replicate.creates) == 2
        assert current(table, started.id).upstream_id in replicate.predictions
        assert lanes[0] < lanes[1]

    def test_cancel_between_evidence_and_release_ends_it_canceled(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        release = PredictionsTable.release_absent

        def canceled_meanwhile(self: PredictionsTable, *args: Any) -> Any:
            submissions.cancel(current(table, started.id))
            return release(self, *args)

        monkeypatch.setattr(PredictionsTable, "release_absent", canceled_meanwhile)
        execute(submissions, clock, started.id)
        assert (current(table, started.id).visible, len(replicate.creates)) == ("canceled", 1)

    @pytest.mark.parametrize("resubmit", [True, False])
    def test_canceled_one_ends_canceled_with_the_evidence(
        self,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        executed: Executed,
        wakes: Wakes,
        clock: Clock,
        *,
        resubmit: bool,
    ) -> None:
        submissions = make_submissions(table, replicate, executed, clock, timing=TIMING, resubmit=resubmit)
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        submissions.cancel(current(table, started.id))
        assert execute(submissions, clock, started.id) < 70
        assert (current(table, started.id).visible, len(replicate.creates)) == ("canceled", 1)

    def test_caller_that_was_not_answered_is_not_submitted_for_again(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
    ) -> None:
        def die(_: httpx.Request, __: ReplicateInMemory) -> httpx.Response:
            raise KeyboardInterrupt

        replicate.faults = [die]
        intent = wanted()
        with pytest.raises(KeyboardInterrupt):
            submissions.start(intent)
        clock.advance(30)
        submissions.sweep(10, lambda: 300)
        execute(submissions, clock, intent.id)
        ended = current(table, intent.id)
        assert (ended.visible, len(replicate.creates)) == ("failed", 1)
        assert "its caller received an error" in (ended.error or "")

    def test_policy_fail_leaves_it_to_its_deadline(
        self, table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, wakes: Wakes, clock: Clock
    ) -> None:
        submissions = make_submissions(table, replicate, executed, clock, timing=TIMING)
        replicate.faults = [answer(502)]
        started = submissions.start(wanted(lifetime="1h"))
        assert execute(submissions, clock, started.id) > 3600
        assert (current(table, started.id).visible, len(replicate.creates)) == ("failed", 1)
        assert lists(replicate) < 25

    def test_claim_of_older_code_is_never_submitted_again(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        started = waiting(table, clock, lifetime="10m")
        table.claim(started.id, None, clock.now())
        clients.client("dynamodb").update_item(
            TableName="predictions",
            Key={"pk": {"S": f"prediction#{started.id}"}, "sk": {"S": "status"}},
            UpdateExpression="REMOVE submit_until",
        )
        for _ in range(20):
            clock.advance(60)
            submissions.submit(started.id)
            submissions.poll(started.id)
        assert (current(table, started.id).visible, replicate.creates) == ("failed", [])

    def test_connection_that_was_never_made_counts_as_no_unknown_create(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [fail(httpx.ConnectError)]
        started = submissions.start(wanted())
        execute(submissions, clock, started.id)
        bound = current(table, started.id)
        assert bound.upstream_id in replicate.predictions
        assert (bound.unknown_creates, lists(replicate)) == (0, 0)


class TestShared:
    def test_sixty_unknown_creates_at_once_are_submitted_again_in_minutes_and_few_list_calls(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        number = 60
        replicate.faults = [answer(502)] * number
        started = [submissions.start(wanted(input={"prompt": str(n)})) for n in range(number)]
        due = {p.id: clock.now() + 3 for p in started}
        began = clock.now()
        while due:
            prediction_id, moment = min(due.items(), key=lambda each: each[1])
            clock.moment = max(clock.moment, moment)
            try:
                submissions.submit(prediction_id)
            except PredictionThrottled as throttled:
                due[prediction_id] = clock.now() + throttled.seconds
            else:
                del due[prediction_id]
        assert clock.now() - began < 120
        assert all(current(table, p.id).upstream_id for p in started)
        assert len(replicate.predictions) == number
        assert lists(replicate) < 12

    def test_claim_whose_outcome_could_not_be_recorded_is_registered_all_the_same(
        self, submissions: Submissions, replicate: ReplicateInMemory
    ) -> None:
        def fail(**_: Any) -> None:
            raise EndpointConnectionError(endpoint_url="https://dynamodb")

        def lose(request: httpx.Request, replicate: ReplicateInMemory) -> httpx.Response:
            clients.client("dynamodb").meta.events.register("before-call.dynamodb.UpdateItem", fail, unique_id="fail")
            return httpx.Response(502)

        replicate.faults = [lose]
        try:
            started = submissions.start(wanted())
        finally:
            clients.client("dynamodb").meta.events.unregister("before-call.dynamodb.UpdateItem", unique_id="fail")
        items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert [item["id"]["S"] for item in items if item["pk"]["S"] == "unknown"] == [started.id]

    def test_claim_that_is_registered_when_a_reading_has_asked_is_not_taken_for_read(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        late: list[Prediction] = []

        def register_another(**_: Any) -> None:
            if not late:
                late.append(started)
                clock.advance(1)
                late[0] = submissions.start(wanted(input={"prompt": "other"}))
                clock.advance(4)

        replicate.faults = [answer(502), answer(502)]
        started = submissions.start(wanted())
        clock.advance(3)
        events = clients.client("dynamodb").meta.events
        events.register("before-call.dynamodb.BatchGetItem", register_another, unique_id="another")
        try:
            with pytest.raises(PredictionThrottled):
                submissions.submit(started.id)
        finally:
            events.unregister("before-call.dynamodb.BatchGetItem", unique_id="another")
        clock.advance(2)
        before = lists(replicate)
        with pytest.raises(PredictionThrottled):
            submissions.submit(late[0].id)
        assert lists(replicate) == before + 1

    def test_lease_keeps_a_second_reader_out_until_it_is_over(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502), answer(502)]
        first, second = (submissions.start(wanted(input={"prompt": str(n)})) for n in range(2))

        def die(_: httpx.Request, __: ReplicateInMemory) -> httpx.Response:
            raise KeyboardInterrupt

        clock.advance(5)
        replicate.read_faults = [die]
        with pytest.raises(KeyboardInterrupt):
            submissions.submit(first.id)
        asked = lists(replicate)
        with pytest.raises(PredictionThrottled):
            submissions.submit(second.id)
        assert lists(replicate) == asked
        clock.advance(60)
        execute(submissions, clock, second.id, seconds=60)
        assert lists(replicate) > asked

    def test_fewer_than_sixty_calls_begin_in_any_minute(self, clock: Clock) -> None:
        budget = Budget(0, clock.now, clock.sleep)
        made = []
        for _ in range(300):
            assert budget.may_ask(clock.now() + 10)
            made.append(clock.now())
        assert all(sum(moment <= other < moment + 60 for other in made) < 60 for moment in made)
        assert CALLS_AT_ONCE + CALLS_PER_MINUTE < 60

    def test_call_whose_turn_comes_too_late_is_not_made(self, clock: Clock) -> None:
        budget = Budget(clock.now() + 100, clock.now, clock.sleep)
        assert not budget.may_ask(clock.now() + 10)


class TestWrong:
    """The evidence was wrong: what Replicate accepted later than the second reading."""

    def resubmitted(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> Prediction:
        replicate.faults = [answer(502)]
        started = submissions.start(wanted())
        execute(submissions, clock, started.id)
        bound = current(table, started.id)
        assert bound.unknown_creates == 1
        return bound

    @pytest.mark.parametrize("status", ["processing", "succeeded"])
    def test_second_reading_finds_the_orphan_cancels_it_and_stops_resubmission(
        self,
        submissions: Submissions,
        table: PredictionsTable,
        replicate: ReplicateInMemory,
        clock: Clock,
        status: str,
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        late = upstream(replicate, bound, clock, status=status)
        assert submissions.look_again() == 0
        clock.advance(60)
        assert submissions.look_again() == 1
        assert replicate.canceled == [late["id"]]
        assert current(table, bound.id).orphans_canceled == {late["id"]}
        assert bool(measured("PaidTwice")) == (status == "succeeded")
        assert measured("ResubmissionStopped") == [1]
        # Others wait, for an hour.
        replicate.faults = [answer(502)]
        lost = submissions.start(wanted(input={"prompt": "other"}))
        took = execute(submissions, clock, lost.id)
        assert STOP_SECONDS <= took <= STOP_SECONDS + 600
        assert current(table, lost.id).upstream_id in replicate.predictions

    def test_list_is_read_after_one_minute_and_five_and_after_the_end_and_then_no_more(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        began, before = clock.now(), lists(replicate)
        read = []
        for _ in range(40):
            clock.advance(60)
            if clock.now() - began == 1200:
                replicate.finish(bound.upstream_id or "", output="done")
                submissions.poll(bound.id)
            if submissions.look_again():
                read.append(clock.now() - began)
        assert read == [60, 300, 1260]
        assert lists(replicate) - before == 3

    def test_list_is_read_again_also_where_it_ended_without_being_bound(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502)] * 5
        started = submissions.start(wanted())
        execute(submissions, clock, started.id)
        failed = current(table, started.id)
        assert (failed.visible, failed.upstream_id) == ("failed", None)
        late = upstream(replicate, failed, clock)
        began, read = clock.now(), []
        for _ in range(10):
            clock.advance(60)
            if submissions.look_again():
                read.append(clock.now() - began)
        assert read == [60, 300]
        assert replicate.canceled == [late["id"]]
        assert not measured("PaidTwice")
        items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert not [item["sk"]["S"] for item in items if item["sk"]["S"].startswith("again#")]

    def test_end_in_the_second_of_a_reading_is_read_after_once_more_and_leaves_nothing_registered(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        clock.advance(300)
        submissions.look_again()
        replicate.finish(bound.upstream_id or "", output="done")
        submissions.poll(bound.id)
        clock.advance(60)
        assert submissions.look_again() == 1
        items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert not [item["sk"]["S"] for item in items if item["sk"]["S"].startswith("again#")]

    def test_end_that_was_written_while_the_list_was_read_leaves_nothing_registered(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        clock.advance(300)
        submissions.look_again()
        clock.advance(-5)  # the function that writes it down began before the reading
        replicate.finish(bound.upstream_id or "", output="done")
        submissions.poll(bound.id)
        clock.advance(65)
        assert submissions.look_again() == 0
        items = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert not [item["sk"]["S"] for item in items if item["sk"]["S"].startswith("again#")]

    def test_orphan_that_a_webhook_tells_is_canceled_by_the_poll_that_follows(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        from predictions.lifecycle.receive_webhook import receive

        bound = self.resubmitted(submissions, table, replicate, clock)
        late = upstream(replicate, bound, clock, status="succeeded", webhook=f"{API_URL}/webhooks/replicate/{bound.id}")
        replicate.finish(bound.upstream_id or "", output="done")
        submissions.poll(bound.id)
        receive(table, bound.id, json.dumps(late).encode(), clock.now())
        submissions.poll(bound.id)
        assert replicate.canceled == [late["id"]]
        assert measured("PaidTwice") == [1]

    def test_reading_that_shows_two_of_them_binds_the_first_and_cancels_the_other(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        replicate.faults = [answer(502), accept_then(502)]
        started = submissions.start(wanted())
        while len(replicate.creates) < 2:
            execute(submissions, clock, started.id, seconds=1)
        clock.advance(1)
        upstream(replicate, started, clock)
        first, second = replicate.predictions
        execute(submissions, clock, started.id)
        bound = current(table, started.id)
        assert (bound.upstream_id, set(bound.orphans_canceled)) == (first, {second})
        assert replicate.canceled == [second]

    def test_prediction_of_another_stack_with_the_same_id_is_no_orphan(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        upstream(replicate, bound, clock, webhook=f"https://staging.example.com/v1/webhooks/replicate/{bound.id}")
        clock.advance(60)
        assert submissions.look_again() == 1
        assert replicate.canceled == []
        assert not measured("ResubmissionStopped")

    def test_breaker_holds_what_was_released_before_it(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        replicate.faults = [answer(502), answer(502)]
        lost = submissions.start(wanted(input={"prompt": "other"}))
        while (released := current(table, lost.id)).unknown_creates < 2 or released.claimed:
            execute(submissions, clock, lost.id, seconds=1)
        upstream(replicate, bound, clock)
        submissions.look_again()
        creates = len(replicate.creates)
        stopped_at = clock.now()
        execute(submissions, clock, lost.id)
        assert STOP_SECONDS <= clock.now() - stopped_at <= STOP_SECONDS + 600
        assert len(replicate.creates) == creates + 1

    def test_breaker_is_over_by_itself(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        bound = self.resubmitted(submissions, table, replicate, clock)
        upstream(replicate, bound, clock)
        clock.advance(60)
        submissions.look_again()
        assert submissions.breaker.stopped_seconds() == STOP_SECONDS  # the item, as the alarm's remedy names it
        clock.advance(STOP_SECONDS)
        assert submissions.breaker.stopped_seconds() == 0


def test_history_names_submissions_and_readings_and_is_bounded(
    submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
) -> None:
    replicate.faults = [answer(502), accept_then(httpx.ReadTimeout)]
    started = submissions.start(wanted())
    execute(submissions, clock, started.id)
    bound = current(table, started.id)
    outcomes = [each["outcome"] for each in json.loads(bound.submissions_json or "[]")]
    assert outcomes == ["answered 502", "no answer"]
    assert len(json.loads(bound.readings_json or "[]")) <= 8
    assert bound.version == VERSION
    forget_expired(clock)
