"""Ways to break the real code, each of which some schedule has to notice: without them a green run would prove little.

Each one takes out what a promise rests on, as a careless change could. They are patches of the running library, in
tests only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

from predictions import status as statuses
from predictions.admission import schedule
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import Schedule
from predictions.aws.dynamodb import (
    PRESENT,
    Condition,
    ConditionFailed,
    PutWrite,
    Sum,
    TransactionRefused,
    UpdateWrite,
)
from predictions.aws.executions import Executions, wake_by_error
from predictions.aws.executions import wake as wake_by_success
from predictions.batches import prepare
from predictions.batches.manage import BatchControl
from predictions.files import copier, output_references
from predictions.files.copier import Copier, _Announced
from predictions.files.outputs_bucket import OutputsBucket
from predictions.ids import random_id
from predictions.intake import redelivery
from predictions.intake.queue import Requests
from predictions.intake.redelivery import ReceivedRequests
from predictions.intents import model as intents
from predictions.lifecycle import merging, orphans, poll, sweep, tracking, transitions, unknown_claims
from predictions.lifecycle.abandonment import Abandonment
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.cancel import CancelPrediction
from predictions.lifecycle.evidence import Evidence, told_by
from predictions.lifecycle.live_reads import LiveReads
from predictions.lifecycle.orphans import Breaker, Orphans
from predictions.lifecycle.poll import PollPrediction
from predictions.lifecycle.readings import Readings
from predictions.lifecycle.reconcile import UnknownSubmissions
from predictions.lifecycle.sweep import SweepPredictions
from predictions.lifecycle.targets import target_of
from predictions.lifecycle.tracking import Tracking
from predictions.lifecycle.unknown_claims import UnknownClaims
from predictions.money.budgets import Reservation
from predictions.money.cost import Cost
from predictions.money.stored import StackPrices
from predictions.notifications import webhook_queue
from predictions.notifications.stream import Changes
from predictions.notifications.stream_retries import Effect
from predictions.notifications.webhook_order import WebhookOrder
from predictions.notifications.webhook_sender import Receivers
from predictions.notifications.webhook_slots import NoSlotFree, Slot, WebhookSlots
from predictions.pipelines.advance import PipelineExecutions
from predictions.pipelines.manage import PipelineApi
from predictions.store import endings, settlements
from predictions.store import predictions as table
from predictions.store.callers import WaitingCallers
from predictions.store.idempotency_keys import IdempotencyKeys
from predictions.store.keys import prediction_key
from predictions.store.predictions import PredictionsTable
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import Change, Prediction
from predictions.store.settlements import Settlements
from predictions.upstream.client import Replicate
from predictions.upstream.create_window import SendWindow
from predictions.upstream.errors import NotAccepted, OutcomeUnknown
from predictions.upstream.list_reader import ListReader, Reading, digest_of

from tests.simulation.attacks import Backlog, Killer, OldKeys, Overload, PoisonMessage, Tarpit, TokenFlood
from tests.simulation.budgets import Budgets
from tests.simulation.jobs import Batches, Pipelines, ToldBatches, Trainings
from tests.simulation.notices import (
    Events,
    HastyDeletions,
    Redelivery,
    TaskTokens,
    TroubleOfTheBus,
    Webhooks,
    WebhooksInARow,
)
from tests.simulation.scenario import Scenario
from tests.simulation.unknown import (
    Frozen,
    HiddenDeployments,
    HiddenInputs,
    HiddenWebhooks,
    LateCreates,
    LateLists,
    Outage,
    StaleLists,
    UnknownCreates,
)
from tests.simulation.upgrades import Upgrade
from tests.simulation.watchers import BusyWatchers, Watchers
from tests.simulation.worlds import worlds_of

Sabotage = Callable[[], AbstractContextManager[Any]]


def _method(of: type, name: str, make: Callable[[Any], Any]) -> Sabotage:
    """Puts another method in the place of one, made from it."""
    return lambda: mock.patch.object(of, name, make(getattr(of, name)))


def _value(of: Any, name: str, value: Any) -> Sabotage:
    return lambda: mock.patch.object(of, name, value)


def _value_made(of: Any, name: str, make: Callable[[Any], Any]) -> Sabotage:
    """Puts another value in the place of one, made from it."""
    return lambda: mock.patch.object(of, name, make(getattr(of, name)))


def _all(*sabotages: Sabotage) -> Sabotage:
    def apply() -> ExitStack:
        stack = ExitStack()
        for sabotage in sabotages:
            stack.enter_context(sabotage())
        return stack

    return apply


def _without_condition(change: Any) -> Any:
    def changed(self: PredictionsTable, prediction_id: str, *, condition: Condition, **what: Any) -> Any:
        return change(self, prediction_id, condition=PRESENT, **what)

    return changed


def _cost_of_nothing(cost_of: Any) -> Any:
    return lambda self, run, now: Cost(cost_of(self, run, now).micro_dollars or 0, "Not billed.")


def _reserved_apart(_: Any) -> Any:
    def write_with(self: Reservation, items: Any, write: PutWrite | UpdateWrite) -> None:
        items.transact([self._write(budget) for budget in self.budgets])
        try:
            items.transact([write])
        except TransactionRefused as refused:
            raise ConditionFailed(refused.items[0]) from None

    return write_with


def _claimed_by_anybody(_: Any) -> Any:
    def claim(self: PredictionsTable, prediction_id: str, version: Any, now: float, **_: Any) -> Any:
        return self._change(
            prediction_id,
            set={"claimed": int(now)},
            condition=table._UNBOUND & table._NOT_FINISHED,
        )

    return claim


def _put_unclaimed(put: Any) -> Any:
    def put_intent(self: PredictionsTable, intent: Any, **how: Any) -> Any:
        return put(self, intent, **{**how, "claim": False})

    return put_intent


def _posted_again(create: Any) -> Any:
    def create_twice(self: Replicate, *given: Any, **options: Any) -> Any:
        try:
            return create(self, *given, **options)
        except OutcomeUnknown:
            return create(self, *given, **options)

    return create_twice


def _released_when_unknown(create: Any) -> Any:
    def create_or_not(self: Replicate, *given: Any, **options: Any) -> Any:
        try:
            return create(self, *given, **options)
        except OutcomeUnknown as error:
            raise NotAccepted(None, "unknown") from error

    return create_or_not


def _started_whatever_is_there(start: Any) -> Any:
    def started(self: Executions, prediction_id: str, n: int) -> bool:
        start(self, prediction_id, n)
        return True

    return started


def _tracked_in_the_machine_that_is_needed(_: Any) -> Any:
    """The number stays the same in the other machine."""

    def track(self: Tracking, prediction: Prediction, *, submit: bool, takes_copy: bool = False) -> None:
        machine = self._submitting if submit else self._submitted
        following: Prediction | None = prediction
        while following is not None and not machine.start(following.id, following.execution_n):
            following = self._next(following, submit=submit, takes_copy=takes_copy)

    return track


def _woken_by_error_whatever_it_catches(prediction: Prediction) -> bool:
    if prediction.awaits_copy:
        return wake_by_error(prediction.task_token, "OutputsToCopy", "")
    return wake_by_success(prediction.task_token)


def _without_the_lease_before(next_execution: Any) -> Any:
    def counted_up(self: PredictionsTable, *given: Any, **options: bool) -> Any:
        return next_execution(self, *given, **{**options, "takes_copy": False})

    return counted_up


def _without_token_when_closed(merge: Any) -> Any:
    """Only what ends a prediction learns of the token."""

    def merged(self: PredictionsTable, *given: Any, **options: Any) -> Any:
        outcome = merge(self, *given, **options)
        if outcome.change is not Change.CLOSED:
            return outcome
        return replace(outcome, prediction=replace(outcome.prediction, task_token=None))

    return merged


def _ended_without_looking(_: Any) -> Any:
    def end(
        self: PredictionsTable, prediction: Any, status: Any, error: Any, now: float, *, refusal: Any = None
    ) -> Any:
        return self._change(
            prediction.id,
            set={
                "rank": 9,
                "status": status.value,
                "visible": statuses.visible(status),
                "completed_at": str(now),
                "ended": 0,
            },
            remove=["open", "next_check_at"],
            condition=PRESENT,
        )

    return end


def _swept_without_orphans(_: Any) -> Any:
    def cancel_orphans(self: Orphans, prediction: Any) -> None:
        for upstream_id in sorted(prediction.orphans):
            self._table.orphan_canceled(prediction, upstream_id)

    return cancel_orphans


def _file_given_up(copy: Any) -> Any:
    def copied(self: Copier, *given: Any, **options: Any) -> Any:
        outcome = copy(self, *given, **options)
        return (
            output_references.StoredFile(given[0].path, given[0].index, error="no")
            if isinstance(outcome, Exception)
            else outcome
        )

    return copied


def _shown_as_told(refresh: Any) -> Any:
    def refreshed(self: LiveReads, detail: Any) -> Any:
        after = refresh(self, detail)
        if detail.prediction.terminal or not after.prediction.awaits_copy:
            return after
        return replace(after, prediction=replace(after.prediction, visible=after.prediction.status))

    return refreshed


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: lambda *__, **___: value


def _nothing_listed(_: Any) -> Any:
    def read(self: ListReader, *_: Any, **__: Any) -> Reading:
        return Reading(began=self._now(), why_not="nobody looks")

    return read


def _first_reading_is_evidence(note: Any) -> Any:
    def noted(self: PredictionsTable, prediction: Any, values: Any) -> Any:
        more = {"evidence_at": values["absent_at"]} if "absent_at" in values else {}
        return note(self, prediction, {**values, **more})

    return noted


def _excluded_by_input(judge: Any) -> Any:
    def judged(self: Evidence, prediction: Any, reading: Any, *more: Any) -> Any:
        wanted = digest_of(self._table.input_json(prediction) or "")
        same = {id_: entry for id_, entry in reading.entries.items() if entry.input_digest == wanted}
        return judge(self, prediction, replace(reading, entries=same), *more)

    return judged


def _excluded_by_target(judge: Any) -> Any:
    def judged(self: Evidence, prediction: Any, reading: Any, *more: Any) -> Any:
        target = target_of(prediction)
        same = {id_: entry for id_, entry in reading.entries.items() if target.ran(told_by(entry))}
        return judge(self, prediction, replace(reading, entries=same), *more)

    return judged


def _nothing_undecided(judge: Any) -> Any:
    def judged(self: Evidence, *given: Any) -> Any:
        return replace(judge(self, *given), undecided=(), candidates=())

    return judged


def _why_not_for_answered(why: Any) -> Any:
    def why_not(self: UnknownClaims, prediction: Any, creates: int) -> Any:
        return why(self, replace(prediction, unanswered=False), creates)

    return why_not


# -- rules of what one owner does to others, and of those who are told -------------------------------------------------


def _told_at_the_end_alone(tell: Any) -> Any:
    def told(self: Changes, record: Any, *given: Any) -> Any:
        if record["dynamodb"]["Keys"]["sk"]["S"].startswith("caller#"):
            return ()
        return tell(self, record, *given)

    return told


def _looked_at_first(_: Any) -> Any:
    """The next look is not put off before anything is asked."""
    return lambda self, prediction, moment: prediction  # as of the method


def _callers_deleted(delete: Any) -> Any:
    def delete_data(self: PredictionsTable, prediction: Any, now: float) -> None:
        for sk, *_ in list(WaitingCallers.from_env().callers_of(prediction.id)):
            self._table.delete_item(prediction_key(prediction.id, sk))
        delete(self, prediction, now)

    return delete_data


def _put_without_looking(start: Any) -> Any:
    """A message that comes again writes its input before it is known to be the same."""

    class Blind:
        def __init__(self, table: PredictionsTable) -> None:
            self._table = table

        def __getattr__(self, name: str) -> Any:
            return (lambda _: None) if name == "get" else getattr(self._table, name)

    def started(self: Requests, *given: Any, **options: Any) -> Any:
        table, self._table = self._table, Blind(self._table)  # type: ignore[assignment]
        try:
            return start(self, *given, **options)
        finally:
            self._table = table

    return started


def _only_changes_of_the_status(found: Any) -> Any:
    """The end by itself tells nobody of output or logs."""

    def of_status(new: Any, old: Any) -> Any:
        return ((event, n) for event, n in found(new, old) if event in ("start", "completed"))

    return of_status


def _retried_by_the_stream(later: Any) -> Any:
    """An event that the bus did not take holds up its record, whose webhooks are queued again with it."""

    def retry_later(self: Changes, effect: Effect, *given: Any) -> None:
        if effect is Effect.EVENT:
            raise NoSlotFree
        later(self, effect, *given)

    return retry_later


def _without_time(tell: Any) -> Any:
    def told(self: Changes, record: Any, only: Any, _: Any) -> Any:
        return tell(self, record, only, lambda: 1e9)

    return told


def _used_again(_: Any) -> Any:
    """A start that was given back is handed out to everybody who asks for it."""

    def plan_free(self: Schedule, lane: str, number: int) -> Any:
        plan = schedule.Plan("free", 0, number)
        plan.conditions.append(PRESENT)
        plan.set[f"{lane}_at"] = Sum(f"{lane}_at", 0)
        return plan

    return plan_free


def _without_deadline(reserve: Any) -> Any:
    def reserved(self: Limiter, lane: Any, owner: str, latest: float, turn_at: float | None) -> Any:
        return reserve(self, lane, owner, latest + 10**6, turn_at)

    return reserved


def _as_they_come(handle: Any) -> Any:
    """All messages of a batch share its fate."""

    def handled(self: ReceivedRequests, records: Any, *given: Any) -> Any:
        with mock.patch.object(redelivery, "_in_turn", list):
            return handle(self, [{**r, "attributes": {**r["attributes"], **_FIRST}} for r in records], *given)

    return handled


_FIRST = {"ApproximateReceiveCount": "1"}


def _key_for_ever(make: Any) -> Any:
    def made(self: IdempotencyKeys, *given: Any, **options: Any) -> None:
        make(self, *given, **options)
        self._now = lambda: 0.0

    return made


SABOTAGE_SCHEDULES = 3000
"""In so many schedules each of these has to be noticed."""

SABOTAGES: dict[str, Sabotage] = {
    "no claim": _method(PredictionsTable, "claim", _claimed_by_anybody),
    "the intent is not claimed": _method(PredictionsTable, "put_intent", _put_unclaimed),
    "keys are ignored": _value(intents, "derived_id", lambda *_: random_id()),
    "blind re-post": _method(Replicate, "create", _posted_again),
    "release after an unknown outcome": _method(Replicate, "create", _released_when_unknown),
    "unconditional writes": _method(PredictionsTable, "_change", _without_condition),
    "a terminal status may be written over": _value(table, "_NOT_FINISHED", PRESENT),
    "an end by our own word that looks at nothing": _method(PredictionsTable, "end", _ended_without_looking),
    "no sweep": _method(SweepPredictions, "sweep", _constant(0)),
    "no poll": _method(PollPrediction, "poll", _constant(None)),
    "no look for creates of unknown outcome": _method(ListReader, "read", _nothing_listed),
    "submitted again without evidence": _method(UnknownSubmissions, "has_evidence", _constant(True)),
    "one reading is evidence": _method(PredictionsTable, "note_unknown", _first_reading_is_evidence),
    "an incomplete reading is complete": _method(Reading, "covers", _constant(True)),
    "no control group": _method(Readings, "missing_controls", _constant([])),
    "exclusion by input": _method(Evidence, "judge", _excluded_by_input),
    "exclusion by target": _method(Evidence, "judge", _excluded_by_target),
    "undecided entries are passed over": _method(Evidence, "judge", _nothing_undecided),
    "the holder of a claim is not bounded": _method(SendWindow, "check", _constant(None)),
    "no second reading after a resubmission": _method(UnknownSubmissions, "find_orphans", _constant(None)),
    "the breaker is off": _method(Breaker, "stop", _constant(None)),
    "a caller without an answer is submitted for again": _method(UnknownClaims, "why_not_again", _why_not_for_answered),
    "the create's answer is not bound": _method(Binding, "bind", lambda _: lambda self, prediction, told: prediction),
    "no orphan is canceled": _method(Orphans, "cancel", _swept_without_orphans),
    "a cancel is not passed on": _method(CancelPrediction, "pass_on", lambda _: lambda self, prediction: prediction),
    "ExecutionAlreadyExists is taken for success": _method(Executions, "start", _started_whatever_is_there),
    "a file's size is not checked": _value(copier, "_length", lambda _: None),
    "an upload takes a file that broke off": _method(_Announced, "read", lambda _: lambda self, size: self._read(size)),
    "a file that broke off is given up": _method(Copier, "_copy", _file_given_up),
    "a copy without a lease": _method(PredictionsTable, "lease_copy", _constant(True)),
    "files are not waited for": _method(OutputsBucket, "holds_files", _constant(False)),
    "aborted is unknown": _value(table, "rank_of", lambda word: 0 if word == "aborted" else statuses.rank_of(word)),
    "aborted is shown": _value(table, "visible", lambda word: "starting" if word == "queued" else str(word)),
    "the token is not sent again": _all(
        _method(PredictionsTable, "merge", _without_token_when_closed),
        _value(merging, "wake", lambda _: False),
        _value(transitions, "wake", lambda _: False),
        _value(sweep, "wake", lambda _: False),
    ),
    "executions are woken by success although files are to be copied": _value(
        tracking, "wake_by_error", lambda task_token, *_: wake_by_success(task_token)
    ),
    "an old execution is woken by an error that it does not catch": _all(
        *(_value(module, "wake", _woken_by_error_whatever_it_catches) for module in (merging, transitions, sweep))
    ),
    "two machines run one prediction": _method(Tracking, "track", _tracked_in_the_machine_that_is_needed),
    "the lease of an execution that copied nothing is not taken over": _method(
        PredictionsTable, "next_execution", _without_the_lease_before
    ),
    "the SDK's retry is another request": _all(
        _method(RecentRequests, "find", _constant(None)),
        _method(RecentRequests, "note", lambda _: lambda self, new_id, *_: new_id),
    ),
    "the SDK's retry finds only what is there already": _method(
        RecentRequests, "note", lambda note: lambda self, new_id, *told: note(self, new_id, *told) and new_id
    ),
    "late writers are not waited for after a deletion": _value(table, "_LATE_WRITER_SECONDS", 0),
    "an intent is not looked after": _value(table, "_START_CHECK_SECONDS", 10**7),
    "executions are not counted up": _method(PredictionsTable, "next_execution", _constant(None)),
    "a submission is given up before its deadline": _value(unknown_claims, "GIVE_UP_SECONDS", -(10**6)),
    "one 404 is believed": _all(_value(poll, "NOT_FOUND_LIMIT", 1), _value(orphans, "NOT_FOUND_LIMIT", 1)),
    "the sweep asks before it puts the next look off": _method(PredictionsTable, "begin_look", _looked_at_first),
    "nothing is ended without asking": _method(Abandonment, "is_due", _constant(False)),
    "owners reserve starts far ahead": _value(schedule, "NEAR_SECONDS", (10**6, 10**6)),
    "starts are reserved beyond the deadline": _method(Limiter, "_reserve", _without_deadline),
    "a start that was given back is used by many": _method(Schedule, "_plan_free", _used_again),
    "one message takes the others along": _all(
        _method(ReceivedRequests, "handle", _as_they_come),
        _method(ReceivedRequests, "_delete", _constant(None)),
    ),
    "a batch that is written down is answered 5xx": _method(
        BatchControl, "_run_or_leave", lambda _: lambda self, batch: self._run(batch)
    ),
    "a pipeline that is written down is answered 5xx": _method(
        PipelineApi, "_run_or_leave", lambda _: lambda self, pipeline: self._executions.run(pipeline)
    ),
    "a batch is started by its request alone": _method(BatchControl, "sweep_one", _constant(None)),
    "a pipeline is started by its request alone": _method(PipelineExecutions, "restart", _constant(None)),
    "keys name what has expired": _method(IdempotencyKeys, "__init__", _key_for_ever),
    "task tokens are deleted with a prediction": _method(PredictionsTable, "delete_data", _callers_deleted),
    "callers are told from the first on, each time": _method(Changes, "_tell_callers", _without_time),
    "who comes after the end is not told": _method(Changes, "_tell_callers", _told_at_the_end_alone),
    "a deleted input comes back": _method(Requests, "start", _put_without_looking),
    "output and logs are told only while it runs": _value_made(
        webhook_queue, "_of_status", _only_changes_of_the_status
    ),
    "trouble of the bus repeats webhooks": _method(Changes, "_retry_later", _retried_by_the_stream),
    "an event that the bus refuses is forgotten": _method(
        Changes, "_not_taken", lambda put: lambda self, news: put(self, news) and []
    ),
    "a webhook is tried once": _method(Receivers, "_defer", _constant(True)),
    "hanging receivers occupy all consumers": _all(
        _value(webhook_queue, "_owner_of", lambda _: ""),
        _method(WebhookSlots, "acquire", lambda _: lambda self, owner, origin, now: Slot(owner, "never_marked", now)),
    ),
    "the end of a batch is told to nobody": _value(webhook_queue, "_completed", lambda *_: False),
    "a batch keeps its labels to itself": _value(prepare, "with_common_labels", lambda made, _: made),
    "webhooks are sent in any order": _method(WebhookOrder, "begin", _constant(True)),
    "a training is looked for among predictions": _value(Prediction, "collection", "predictions"),
    "a GET asks Replicate each time": _method(PredictionsTable, "begin_live_read", _constant(True)),
    "an unknown cost is 0": _method(StackPrices, "cost_of", _cost_of_nothing),
    "what may have been accepted costs nothing": _value(
        endings, "cost_without_report", lambda *_, **__: Cost(0, "Not billed.")
    ),
    "the cost is left for a later write": _value(endings, "cost_attributes", lambda _: {}),
    "a GET shows what Replicate says": _method(LiveReads, "refresh", _shown_as_told),
    "a budget is not given back": _method(Settlements, "settle", _constant(None)),
    "a budget is settled twice": _value_made(
        settlements, "_mark", lambda mark: lambda *of, **how: mark(*of, **how)._replace(condition=PRESENT)
    ),
    "a budget is reserved without its condition": _method(
        Reservation, "_write", lambda write: lambda self, budget: write(self, budget)._replace(condition=None)
    ),
    "a budget is reserved before its prediction": _method(Reservation, "write_with", _reserved_apart),
}
"""By what is taken out."""

ONLY_IN: dict[str, type[Scenario]] = {
    "the sweep asks before it puts the next look off": Killer,
    "nothing is ended without asking": Killer,
    "owners reserve starts far ahead": Backlog,
    "starts are reserved beyond the deadline": Overload,
    "a start that was given back is used by many": Backlog,
    "webhooks are sent in any order": WebhooksInARow,
    "late writers are not waited for after a deletion": HastyDeletions,
    "one message takes the others along": PoisonMessage,
    "a batch that is written down is answered 5xx": Batches,
    "a pipeline that is written down is answered 5xx": Pipelines,
    "a batch is started by its request alone": Batches,
    "a pipeline is started by its request alone": Pipelines,
    "keys name what has expired": OldKeys,
    "task tokens are deleted with a prediction": TaskTokens,
    "callers are told from the first on, each time": TokenFlood,
    "who comes after the end is not told": TaskTokens,
    "a deleted input comes back": Redelivery,
    "output and logs are told only while it runs": Webhooks,
    "trouble of the bus repeats webhooks": TroubleOfTheBus,
    "an event that the bus refuses is forgotten": Events,
    "a webhook is tried once": Webhooks,
    "hanging receivers occupy all consumers": Tarpit,
    "a training is looked for among predictions": Trainings,
    "the end of a batch is told to nobody": ToldBatches,
    "a batch keeps its labels to itself": ToldBatches,
    "a GET asks Replicate each time": BusyWatchers,
    "a GET shows what Replicate says": Watchers,
    "a budget is not given back": Budgets,
    "a budget is settled twice": Budgets,
    "a budget is reserved without its condition": Budgets,
    "a budget is reserved before its prediction": Budgets,
    "what may have been accepted costs nothing": HiddenDeployments,
    "an old execution is woken by an error that it does not catch": Upgrade,
    "the lease of an execution that copied nothing is not taken over": Upgrade,
    "no look for creates of unknown outcome": UnknownCreates,
    "submitted again without evidence": UnknownCreates,
    "one reading is evidence": LateLists,
    "an incomplete reading is complete": Outage,
    "no control group": StaleLists,
    "exclusion by input": HiddenInputs,
    "exclusion by target": HiddenDeployments,
    "undecided entries are passed over": HiddenWebhooks,
    "the holder of a claim is not bounded": Frozen,
    "no second reading after a resubmission": LateLists,
    "the breaker is off": LateCreates,
    "a caller without an answer is submitted for again": Frozen,
}
"""The world in which each of these has to be noticed; the others where there is no world but predictions."""


def seeds_of(name: str, schedules: int) -> list[int]:
    """The seeds, of so many schedules, in which a sabotage has to be noticed."""
    if (world := ONLY_IN.get(name)) is not None:
        return [seed for seed in range(schedules) if world in worlds_of(seed)]
    return [seed for seed in range(schedules) if not worlds_of(seed)]
