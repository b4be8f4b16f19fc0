"""State transitions of predictions: each is one conditional write, and no other module changes a status item.

One item per prediction or training (`pk` = `prediction#{id}`, `sk` = `status`) is small, because each of its updates is
billed by its size. Of a training it says `object` = `training`. Payloads are items of their own under the same `pk`,
written once each, or objects in the outputs bucket above `PAYLOAD_LIMIT_BYTES` (see `store.payloads`); small inputs and
results are in the status item itself, where they cost less (see `store.inline`):

    input#{fingerprint}     the model's input, written before the intent, so that an intent always has one
    progress                output and logs of a prediction that runs; replaced by longer ones only, as an item and as
                            an object, always of the same key. If the caller subscribed to them: `notify` and digests,
                            for the table's stream
    result#{upstream_id}    output and logs at the end, written before the status turns terminal; the first one stays
    files                   where the outputs are stored, if they are too many for the status item
    live                    when the last live read began (see `lifecycle.live_reads`)
    caller#{token's hash}   the task token of another state machine that waits for the end (see `store.callers`)

A write that comes twice, late or out of order is refused by its condition, and its caller gets what is there instead.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from predictions.aws.dynamodb import NEW, PRESENT, Condition, ConditionFailed, IfNotExists
from predictions.clock import timestamp
from predictions.files.output_references import StoredFile
from predictions.money.cost import Cost
from predictions.status import TERMINAL_RANK, Status, rank_of, visible
from predictions.store.endings import cost_attributes, ended_here, ended_upstream
from predictions.store.inline import input_fits, result_fits
from predictions.store.keys import CALLER, input_sk, list_of, prediction_key, shard_of, upstream_key
from predictions.store.payloads import result_text
from predictions.store.reads import PredictionReads
from predictions.store.records import (
    NOTHING_RESERVED,
    AlreadyExists,
    Change,
    Merge,
    Prediction,
    Waits,
    prediction_of,
)  # fmt: skip

if TYPE_CHECKING:
    from predictions.intents.model import Intent
    from predictions.money.budgets import Reservation
    from predictions.upstream.prediction import UpstreamPrediction

COPY_LEASE_SECONDS = 1020
"""Longer than the longest life of copy_outputs (900 s) and the way there."""

SUBMIT_SECONDS = 25
"""How long the holder of a claim may act on it, besides the time for which Replicate is asked to hold its response."""

# After `submit_until` the holder of a claim has sent all it will ever send.
_AFTER_SUBMIT_SECONDS = 5

# How long before the sweep looks at an item that should have changed by itself.
_START_CHECK_SECONDS = 60
_COPY_CHECK_SECONDS = 120
_COPY_CHECK_MARGIN_SECONDS = 60

# No function lives longer that could have read a prediction while it was open: what such a one may still write after a
# deletion is removed by then. The copier lives longest.
_LATE_WRITER_SECONDS = COPY_LEASE_SECONDS

# -- conditions of writes -----------------------------------------------------------------------------------------

_OPEN = Condition("attribute_exists(open)")
_UNCLAIMED = Condition("attribute_not_exists(claimed)")
_UNBOUND = Condition("attribute_not_exists(upstream_id)")
_NOT_CANCELED = Condition("attribute_not_exists(cancel_requested)")
_NOT_DELETED = Condition("attribute_not_exists(deleted)")

# Upstream: callers see `processing` until the files are copied.
_NOT_FINISHED = Condition("rank < :terminal", terminal=TERMINAL_RANK)
_FINISHED = Condition("rank = :terminal", terminal=TERMINAL_RANK)
_COPYING = _FINISHED & Condition("visible = :processing", processing=Status.PROCESSING.value)
_VISIBLY_FINISHED = _FINISHED & Condition("visible <> :processing", processing=Status.PROCESSING.value)

# What leaves the sweep's list must hold no orphan, also none that was recorded since the item was read.
_NO_ORPHANS = Condition("attribute_not_exists(orphans)")


def _this_claim(prediction: Prediction) -> Condition:
    # Not only the second of the claim: another one may be made in it, once a release was made but its response lost,
    # and botocore writes again.
    return _as_read(prediction, "claimed", "written_by") & _UNBOUND & _NOT_FINISHED


def _as_read(prediction: Prediction, *names: str) -> Condition:
    """Require that attributes are as they were when the prediction was read."""
    values = {name: getattr(prediction, name) for name in names}
    return Condition(
        " AND ".join(f"attribute_not_exists({n})" if v is None else f"{n} = :{n}" for n, v in values.items()),
        **{name: value for name, value in values.items() if value is not None},
    )


class PredictionsTable(PredictionReads):
    """The predictions of the table, and the conditions under which they change."""

    # -- intent and claim -------------------------------------------------------------------------------------

    def put_intent(
        self, intent: "Intent", *, version: str | None, deadline: int, expires: int, claim: bool, execution_arn: str,
        now: float, submit_at: int | None = None, waits: Waits = NOTHING_RESERVED, wait_seconds: int = 0,
        reservation: "Reservation | None" = None,
    ) -> Prediction:  # fmt: skip
        """Write the intent of a prediction and, in the same write, the claim of a writer that submits it now.

        The second of two writers gets what the first has written. If the function crashes right after, the sweep finds
        the item a minute later.

        Args:
            intent: The intent.
            version: The version that will run, if it is known.
            deadline: When the prediction has to have finished, as sent to Replicate.
            expires: When the item expires.
            claim: Whether the caller of this method submits it now.
            execution_arn: The execution that will track it, `{id}-1`.
            now: The time.
            submit_at: When it may be submitted, if the caller of this method does not do it.
            waits: What it waits for until then (see `admission.rate_limiter`).
            wait_seconds: How long Replicate may hold its response to the create.
            reservation: What it reserves in budgets in the same write, if there are any.

        Raises:
            AlreadyExists: The id is taken by one that has not expired.
            BudgetReached: A budget has no room.
        """
        created_at = timestamp(now)
        values: dict[str, Any] = {
            "id": intent.id,
            "owner": list_of(intent.owner, "trainings" if intent.object == "training" else "predictions"),
            "object": intent.object if intent.object != "prediction" else None,
            "destination": intent.destination,
            "listed_at": f"{created_at}#{intent.id}",
            "created_at": created_at,
            "created": int(now),
            "fingerprint": intent.fingerprint,
            "source": intent.source,
            "keyed": intent.keyed,
            "kind": intent.reference.kind,
            "name": intent.reference.name,
            "version": version,
            "deployment": intent.reference.name if intent.reference.kind == "deployment" else None,
            "webhook": intent.webhook,
            "webhook_events_filter": list(intent.webhook_events_filter) if intent.webhook_events_filter else None,
            "stream": intent.stream,
            "origin": dict(intent.origin) or None,
            "depth": intent.depth or None,
            "output_prefix": intent.output_prefix,
            "labels": dict(intent.labels) or None,
            "traceparent": intent.traceparent,
            "rank": 0,
            "status": Status.QUEUED.value,
            "visible": Status.STARTING.value,
            "deadline": deadline,
            **(_lease(now, wait_seconds) if claim else _check_after(submit_at or int(now))),
            "submit_at": submit_at,
            **waits.attributes(),
            **(reservation.attributes() if reservation else {}),
            "written_by": secrets.token_hex(8),
            "execution_n": 1,
            "execution_arn": execution_arn,
            "open": shard_of(intent.id),
            "expires_at": expires,
        }
        key, sk = prediction_key(intent.id), input_sk(intent.fingerprint)
        item = {name: value for name, value in values.items() if value is not None}
        if inline := claim and input_fits({**key._asdict(), **item}, intent.input_json):
            item["input_json"] = intent.input_json
        else:
            self._payloads.put_text(intent.id, sk, intent.input_json, expires)
        # An expired item may be there for days until TTL deletes it: its key is free already.
        expired = Condition("expires_at <= :now", now=int(now)) & _VISIBLY_FINISHED
        try:
            put = partial(reservation.put, self._table) if reservation else self._table.put_item
            put(key, item, NEW | expired)
        except ConditionFailed as failed:
            there = prediction_of(failed.item or item)
            # botocore repeats a write whose response it did not receive: then what is there is this very one.
            if there.written_by != item["written_by"]:
                if there.deleted and not inline:
                    # Its owner had the data deleted: what this write brought back must not stay. Writers of intents may
                    # not delete items; the last look of the sweep deletes what is empty then.
                    self._payloads.put_text(intent.id, sk, "{}", there.expires_at)
                    self._payloads.empty_object(intent.id, intent.input_json)
                raise AlreadyExists(there) from None
        return prediction_of({**key._asdict(), **item})

    def claim(
        self, prediction_id: str, version: str | None, now: float, *, counted: bool = False,
        reservation: "Reservation | None" = None,
    ) -> Prediction | None:  # fmt: skip
        """Claim a prediction for submission; return None if it is already claimed, canceled or finished.

        Args:
            prediction_id: Our id.
            version: The version that will run, if it is known.
            now: The time.
            counted: Whether it has its place in its owner's limits (see `admission.quotas`).
            reservation: As for `put_intent`.
        """
        written_by = secrets.token_hex(8)
        given = {"written_by": written_by, "version": version or None, "counted": counted or None}
        values = {**_lease(now, 0), **{name: value for name, value in given.items() if value is not None}}
        condition, claimed = _UNCLAIMED & _NOT_CANCELED & _UNBOUND & _NOT_FINISHED, None
        if reservation:
            reservation.update(self._table, prediction_key(prediction_id), values, condition)
        else:
            claimed = self._change(prediction_id, set=values, condition=condition)
        if claimed is None:
            # botocore repeats a write whose response it did not receive: then the claim in the way is this very one.
            there = self.get(prediction_id)
            claimed = there if there and there.claimed and there.written_by == written_by else None
        return claimed

    def defer(
        self, prediction: Prediction, submit_at: int, *, counted: bool, waits: Waits = NOTHING_RESERVED
    ) -> Prediction | None:
        """Set when an unclaimed prediction may be submitted; return None if it has changed meanwhile.

        Args:
            prediction: The prediction.
            submit_at: When; nobody submits it before.
            counted: Whether it has its place in its owner's limits.
            waits: What it waits for until then.
        """
        return self._change(
            prediction.id,
            set={
                "submit_at": submit_at,
                **_check_after(submit_at),
                **waits.attributes(without_none=True),
                **({"counted": True} if counted else {}),
            },
            remove=NOTHING_RESERVED.attributes(),
            condition=_UNCLAIMED & _UNBOUND & _NOT_FINISHED,
        )

    def note_counted(self, prediction: Prediction) -> None:
        """Record that a waiting prediction has its place in its owner's limits, so that it takes no second one."""
        self._change(prediction.id, set={"counted": True}, condition=_UNCLAIMED & _UNBOUND & _NOT_FINISHED)

    def release(
        self, prediction: Prediction, now: float, wait_seconds: int, *, waits: Waits = NOTHING_RESERVED
    ) -> Prediction | None:
        """Release a claim with which certainly nothing was started; return None if the item has changed meanwhile.

        Nobody submits it before `wait_seconds` have passed; `waits` says what it waits for.
        """
        submit_at = int(now) + wait_seconds
        if prediction.input_json is not None:
            # Another function submits it: one of an earlier release, if a stack is just updated, knows no other place.
            sk = input_sk(prediction.fingerprint)
            self._payloads.put_text(prediction.id, sk, prediction.input_json, prediction.expires_at)
        return self._change(
            prediction.id,
            set={"submit_at": submit_at, **_check_after(submit_at), **waits.attributes(without_none=True)},
            remove=["claimed", "submit_until", *NOTHING_RESERVED.attributes()],
            condition=_this_claim(prediction),
        )

    # -- unknown outcomes: see `lifecycle.reconcile` ------------------------------------------------

    def note_unknown(self, prediction: Prediction, values: Mapping[str, Any]) -> Prediction | None:
        """Record something about a claim of unknown outcome; return None if it is no longer this claim, or bound."""
        return self._change(prediction.id, set=values, condition=_this_claim(prediction))

    def release_absent(
        self, prediction: Prediction, now: float, wait_seconds: int, unknown_creates: int
    ) -> Prediction | None:
        """Release a claim for which there is evidence that Replicate accepted nothing.

        Twice: the second finds another claim, or none. If the function crashes right after, the sweep starts an
        execution, which submits it.

        Returns:
            The prediction, or None if it is no longer this claim, is bound, or was canceled meanwhile.
        """
        submit_at = int(now) + wait_seconds
        return self._change(
            prediction.id,
            set={
                "submit_at": submit_at,
                **_check_after(submit_at),
                "first_claimed": prediction.searched_from,
                "unknown_creates": unknown_creates,
            },
            remove=["claimed", "submit_until", "submit_over", "submit_answered", "read_at", "read_failed", "absent_at",
                    "evidence_at", *NOTHING_RESERVED.attributes()],
            condition=_this_claim(prediction) & _NOT_CANCELED,
        )  # fmt: skip

    # -- what Replicate says ----------------------------------------------------------------------------------

    def merge(
        self, prediction_id: str, report: "UpstreamPrediction", now: float, *, next_check_at: int | None = None,
        known: Prediction | None = None,
    ) -> Merge:  # fmt: skip
        """Merge Replicate's report of a prediction: by one rule for webhook, poll, response to the create and list.

        Writes only if the item is unbound or bound to that upstream id, and the rank is higher; a terminal item never
        changes. The first write of an upstream id binds it; a second upstream id is an orphan, recorded for the
        sweep to cancel.

        Args:
            prediction_id: Our id.
            report: What Replicate says of it.
            now: The time.
            next_check_at: When the sweep should look, if the caller knows better than the item.
            known: The prediction as just read or written: the write checks what it rests on, and it is read again then.
        """
        rank = rank_of(report.status)
        prediction = known or self.get(prediction_id)
        stored_result = stored_progress = False
        while True:
            if prediction is None:
                return Merge(Change.UNKNOWN, None)
            if prediction.upstream_id != report.id and (prediction.upstream_id or prediction.terminal):
                return self._add_orphan(prediction, report, now)
            if prediction.terminal:
                return Merge(Change.CLOSED, prediction)
            if rank >= TERMINAL_RANK and report.data_removed and not stored_result:
                report = self._payloads.put_result(prediction, report)
                stored_result = True
            elif 0 < rank < TERMINAL_RANK and rank >= prediction.rank and not stored_progress:
                self._payloads.put_progress(prediction, report)
                stored_progress = True
            if rank <= prediction.rank and prediction.upstream_id:
                return Merge(Change.NOTHING, prediction)
            closed = self._closed_by(prediction, report, rank)
            # Replicate's report was read to the end: no function crashed on it.
            read = ["stalled_looks", "resume_n"] if prediction.stalled_looks else []
            newer = Condition("rank < :rank", rank=max(rank, prediction.rank)) | _UNBOUND
            same_id = Condition("upstream_id = :upstream_id", upstream_id=report.id) | _UNBOUND
            mergeable = newer & same_id & _NOT_FINISHED
            changes = self._reported(prediction, report, rank, now, next_check_at)
            if rank >= TERMINAL_RANK and not stored_result:
                text = result_text(report.output, report.logs)
                if changes["visible"] != Status.PROCESSING and result_fits(prediction, changes, closed, text):
                    changes["result_json"] = text
                else:
                    self._payloads.put_result(prediction, report)
                    stored_result = True
            if "copy_by" in changes:
                # The lease is for the execution that tracks it, and the check that stays must not be put off meanwhile.
                mergeable &= _as_read(prediction, "execution_n", "next_check_at")
            changed = self._change(
                prediction_id,
                set=changes,
                remove=closed + read,
                condition=mergeable & _NO_ORPHANS if closed else mergeable,
            )
            if changed is not None:
                return Merge(Change.ENDED if changed.terminal else Change.PROGRESS, changed)
            # Another writer came in between: read again. Each turn raises the rank or records an orphan, so this ends.
            prediction = self.get(prediction_id)

    def _reported(
        self, prediction: Prediction, report: "UpstreamPrediction", rank: int, now: float, next_check_at: int | None
    ) -> dict[str, Any]:
        # A status of the lowest rank binds, but is never taken over: it may be one that is unknown here.
        status = report.status if rank > prediction.rank else prediction.status
        rank = max(rank, prediction.rank)
        values: dict[str, Any] = {
            "upstream_id": report.id,
            "rank": rank,
            "status": status,
            "visible": visible(status),
            "model": report.model,
            "upstream_version": report.version if report.version != prediction.version else None,
            "deployment": report.deployment,
            "started_at": report.started_at,
            "stream_url": _short(report.urls.get("stream")),
            "next_check_at": next_check_at,
        }
        if prediction.unknown_creates and not prediction.upstream_id:
            values["bound_at"] = int(now)
        if prediction.cancel_requested and not prediction.upstream_id and next_check_at is None:
            # The writer that binds an item that is to be canceled may lack the token for it: the sweep has it.
            values["next_check_at"] = int(now)
        if rank >= TERMINAL_RANK:
            values |= ended_upstream(prediction, report, status, self._prices, now)
            if self._outputs.holds_files(report.output):
                # The running execution copies first; the lease is granted here to save it a write.
                values |= {
                    "visible": Status.PROCESSING.value,
                    "copy_by": prediction.execution_n,
                    "copy_until": int(now) + COPY_LEASE_SECONDS,
                    "next_check_at": self._copy_check(prediction, int(now)),
                }
            elif not prediction.orphans:
                values["next_check_at"] = None
        return {name: value for name, value in values.items() if value is not None}

    def _copy_check(self, prediction: Prediction, now: int) -> int | None:
        """Return when the sweep should look at a copy; None if it will about then: a change costs index units."""
        soon = now + _COPY_CHECK_SECONDS
        planned = prediction.next_check_at
        return None if planned and soon <= planned <= soon + _COPY_CHECK_MARGIN_SECONDS else soon

    def _closed_by(self, prediction: Prediction, report: "UpstreamPrediction", rank: int) -> list[str]:
        if rank < TERMINAL_RANK or prediction.orphans or self._outputs.holds_files(report.output):
            return []
        return ["open", "next_check_at"]

    def _add_orphan(self, prediction: Prediction, report: "UpstreamPrediction", now: float) -> Merge:
        # One that has finished is recorded too: it was paid for.
        if report.id in prediction.orphans | prediction.orphans_canceled:
            return Merge(Change.ORPHAN, prediction)
        changed = self._change(
            prediction.id,
            set={**_reopened(prediction.id), "next_check_at": int(now)},
            add={"orphans": {report.id}},
            condition=PRESENT & Condition("NOT contains(orphans, :id)", id=report.id),
        )
        return Merge(Change.ORPHAN, changed or prediction)

    def end(
        self,
        prediction: Prediction,
        status: Status,
        error: str | None,
        now: float,
        *,
        refusal: Mapping[str, Any] | None = None,
        not_accepted: bool = False,
    ) -> Prediction | None:
        """Finish a prediction without Replicate, if it is still claimed and bound as `prediction` says.

        Only for what Replicate cannot finish any more: an intent that was never accepted, or a bound one that Replicate
        does not find or leaves open an hour past its deadline (the callers' rules).

        Returns:
            The finished prediction, or None if it has changed meanwhile.
        """
        values = ended_here(prediction, status, error, refusal, now, not_accepted=not_accepted)
        closed = [] if prediction.orphans else ["open", "next_check_at"]
        unchanged = _NOT_FINISHED & _as_read(prediction, "upstream_id", "claimed")
        ended = self._change(
            prediction.id, set=values, remove=closed, condition=unchanged & _NO_ORPHANS if closed else unchanged
        )
        if ended is None and closed and (there := self.get(prediction.id)) and there.orphans:
            # Only an orphan came in between: it stays on the sweep's list, and the end is the same.
            known = replace(prediction, orphans=there.orphans)
            return self.end(known, status, error, now, refusal=refusal, not_accepted=not_accepted)
        return ended

    # -- cancel, checks, executions -----------------------------------------------------------------------------

    def request_cancel(self, prediction_id: str, now: float) -> Prediction | None:
        """Mark an open prediction as canceled by its owner; return None if it has finished. Twice changes nothing."""
        return self._change(
            prediction_id,
            set={"cancel_requested": int(now), **_check_after(int(now))},
            condition=PRESENT & _NOT_FINISHED & _NOT_CANCELED,
        )

    def check_again_at(self, prediction: Prediction, moment: float) -> None:
        """Set when the sweep should look at an open prediction next, unless it has changed meanwhile."""
        self._change(prediction.id, set={"next_check_at": int(moment)}, condition=_OPEN & _as_read(prediction, "rank"))

    def begin_look(self, prediction: Prediction, moment: float) -> Prediction | None:
        """Postpone the next check of an open prediction before the sweep asks anything about it.

        The same write counts the look in `stalled_looks`. A look that completes resets the count (`end_look`), so the
        attribute holds how many looks in a row died or found the execution dead.

        Returns:
            The prediction, or None if it changed since it was read, or another sweep has begun this look.
        """
        return self._change(
            prediction.id,
            set={"next_check_at": int(moment), "stalled_looks": prediction.stalled_looks + 1},
            condition=_OPEN & _as_read(prediction, "next_check_at"),
        )

    def end_look(self, prediction: Prediction, moment: float, *, stalled: bool, deferred: bool = False) -> None:
        """Schedule the next check of an open prediction at the end of a look, unless it changed meanwhile.

        Args:
            prediction: The prediction as the look left it.
            moment: When the sweep should look next.
            stalled: Whether the look found the execution dead; only a healthy one resets `stalled_looks`.
            deferred: Whether the dead execution is replaced by the next look instead of this one.
        """
        self._change(
            prediction.id,
            set={"next_check_at": int(moment), **({"resume_n": prediction.execution_n} if deferred else {})},
            remove=[] if stalled else ["stalled_looks", "resume_n"],
            condition=_OPEN & _as_read(prediction, "rank"),
        )

    def forget_stalled_looks(self, prediction: Prediction) -> None:
        """Reset the count of stalled looks: a function has dealt with this prediction and did not die."""
        self._change(prediction.id, remove=["stalled_looks", "resume_n"], condition=_OPEN)

    def count_not_found(self, prediction: Prediction, count: int) -> None:
        """Record how often in a row Replicate did not find an open prediction."""
        self._change(prediction.id, set={"not_found_count": count}, condition=_OPEN)

    def count_orphans_not_found(self, prediction: Prediction) -> None:
        """Count one more 404 to the cancel of an orphan; the item stays due as it is."""
        count = prediction.orphans_not_found + 1
        self._change(prediction.id, set={"orphans_not_found": count}, condition=_OPEN)

    def reserve(self, upstream_id: str, prediction: Prediction) -> bool:
        """Reserve an upstream id for a prediction that is about to be bound to it by its likeness alone.

        The index of bound ids lags behind, so two predictions that look the same could both find the other's.
        """
        item = {"id": prediction.id, "expires_at": prediction.expires_at}
        try:
            self._table.put_item(upstream_key(upstream_id), item, NEW | _as_read(prediction, "id"))
        except ConditionFailed:
            return False
        return True

    def next_execution(
        self, prediction: Prediction, execution_arn: str, now: float, *, takes_copy: bool = False, unbound: bool = False
    ) -> Prediction | None:
        """Count up the execution that tracks a prediction; return None if another writer did so first.

        Args:
            prediction: The prediction.
            execution_arn: The next execution: `{id}-{n+1}`, in the state machine whose first state it needs.
            now: The time.
            takes_copy: Whether the next execution takes over the lease to copy that this one was granted.
            unbound: Whether only while the prediction is unbound.
        """
        n = prediction.execution_n + 1
        lease = {"copy_by": n} if takes_copy else {}
        counted = _OPEN & _as_read(prediction, "execution_n")
        return self._change(
            prediction.id,
            set={"execution_n": n, "execution_arn": execution_arn, **_check_after(int(now)), **lease},
            condition=counted & _UNBOUND if unbound else counted,
        )

    def orphan_canceled(self, prediction: Prediction, upstream_id: str) -> None:
        """Remove an orphan that is canceled; its id stays known as an orphan's in `orphans_canceled`."""
        self._change(
            prediction.id,
            add={"orphans_canceled": {upstream_id}},
            delete={"orphans": {upstream_id}},
            remove=["orphans_not_found"],
            condition=PRESENT,
        )

    def close(self, prediction: Prediction) -> None:
        """Take a prediction that has finished, visibly and without open orphans, off the sweep's list."""
        self._change(
            prediction.id,
            remove=["open", "next_check_at"],
            condition=_VISIBLY_FINISHED & _NO_ORPHANS & _as_read(prediction, "deleted"),
        )

    # -- deleting -------------------------------------------------------------------------------------------------

    def request_delete(self, prediction_id: str, now: float) -> Prediction | None:
        """Mark a prediction that has visibly finished as deleted: from this write on nobody is shown its data.

        Returns:
            The prediction as it is then, or None if it has not finished, was marked before, or is not there.
        """
        return self._change(
            prediction_id,
            set={
                "deleted": int(now),
                "data_removed": True,
                **_reopened(prediction_id),
                **_check_after(int(now)),
            },
            # They are data, or lead to it: places in the bucket, and Replicate's stream.
            remove=["files_json", "stream_url", "input_json", "result_json"],
            condition=_VISIBLY_FINISHED & _NOT_DELETED,
        )

    def delete_data(self, prediction: Prediction, now: float) -> None:
        """Delete input, output, logs and files of a prediction that is marked as deleted; the status item stays.

        So do the items of callers that wait for the end: they hold task tokens and no data, and the table's stream
        may not have been read up to the end yet. They expire with the prediction.

        Twice does no harm. A function that read the item while it was open may write a payload or a file afterwards:
        so it stays on the sweep's list until none of those can be alive, and is gone through once more.

        Raises:
            ClientError: Not all of it could be deleted; it is still on the sweep's list.
        """
        self._outputs.delete_all(prediction.id, prediction.owner, prediction.output_prefix)
        pk = prediction_key(prediction.id).pk
        for item in self._table.query(Condition("pk = :pk", pk=pk), only="sk"):
            if item["sk"] != "status" and not item["sk"].startswith(CALLER):
                self._table.delete_item(prediction_key(prediction.id, item["sk"]))
        last_look = (prediction.deleted or 0) + _LATE_WRITER_SECONDS
        if now < last_look:
            self.check_again_at(prediction, last_look)
        elif not prediction.orphans:
            self.close(prediction)

    # -- outputs ----------------------------------------------------------------------------------------------

    def lease_copy(self, prediction: Prediction, execution_n: int, needed_seconds: int, now: float) -> bool:
        """Acquire, or already hold, the lease to copy this prediction's files for `needed_seconds`."""
        until = prediction.copy_until or 0
        if prediction.copy_by == execution_n and until >= now + needed_seconds:
            return True
        free = Condition("attribute_not_exists(copy_until) OR copy_until < :now", now=int(now))
        changed = self._change(
            prediction.id,
            set={
                "copy_by": execution_n,
                "copy_until": int(now) + COPY_LEASE_SECONDS,
                "next_check_at": int(now) + COPY_LEASE_SECONDS,
            },
            condition=_COPYING & (free | Condition("copy_by = :me", me=execution_n)),
        )
        return changed is not None

    def end_copy(self, prediction: Prediction, files: Sequence[StoredFile], now: float) -> Prediction | None:
        """Make a prediction's end visible, with its files' places; return None if that was done already."""
        values: dict[str, Any] = {
            "visible": visible(prediction.status),
            "ended": int(now),
            "files_json": self._payloads.put_files(prediction, files),
        }
        closed = [] if prediction.orphans else ["open", "next_check_at"]
        ended = self._change(
            prediction.id,
            set=values,
            remove=["copy_until", "copy_by", *closed],
            condition=_COPYING & _NO_ORPHANS if closed else _COPYING,
        )
        if ended is None and closed and (there := self.get(prediction.id)) and there.orphans:
            # Only an orphan came in between: it stays on the sweep's list, and the end is the same.
            return self.end_copy(there, files, now)
        return ended

    def price_later(self, prediction: Prediction, cost: Cost) -> bool:
        """Write the cost of a prediction that ended at an unknown one; return False if it has one by now, or is gone.

        The second of two finds a cost and changes nothing: a cost that was written once stays.
        """
        changed = self._change(
            prediction.id,
            set=cost_attributes(cost),
            remove=["cost_reason", "cost_price"],
            condition=_FINISHED
            & Condition("attribute_not_exists(cost_micro_dollars)")
            & _as_read(prediction, "upstream_id", "created"),
        )
        return changed is not None

    def replace_files(self, prediction: Prediction, files: Sequence[StoredFile]) -> bool:
        """Write where the files of a visibly finished prediction are; return False if it is deleted."""
        changed = self._change(
            prediction.id,
            set={"files_json": self._payloads.put_files(prediction, files)},
            condition=_FINISHED & _as_read(prediction, "visible") & _NOT_DELETED,
        )
        return changed is not None

    # -- inside -----------------------------------------------------------------------------------------------

    def _change(self, prediction_id: str, *, condition: Condition, **changes: Any) -> Prediction | None:
        """Update a status item (see `Table.update_item`); return it, or None if the condition does not hold."""
        try:
            item = self._table.update_item(prediction_key(prediction_id), condition=condition, **changes)
        except ConditionFailed:
            return None
        return prediction_of(item)


def _lease(now: float, wait_seconds: int) -> dict[str, int]:
    """Return the attributes of a claim: since when, until when its holder may act, and when the sweep looks."""
    submit_until = int(now) + wait_seconds + SUBMIT_SECONDS
    next_check_at = submit_until + _AFTER_SUBMIT_SECONDS
    return {"claimed": int(now), "submit_until": submit_until, "next_check_at": next_check_at}


def _reopened(prediction_id: str) -> dict[str, Any]:
    """Return what puts an item on the sweep's list, if it is not there: an item stays in the shard that it is in."""
    return {"open": IfNotExists(shard_of(prediction_id))}


def _check_after(moment: int) -> dict[str, int]:
    return {"next_check_at": moment + _START_CHECK_SECONDS}


def _short(value: Any) -> str | None:
    return value if isinstance(value, str) and len(value) <= 2048 else None
