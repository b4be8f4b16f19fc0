"""Unknown outcomes: whether Replicate accepted a create is read from its list, never guessed.

A create whose answer was lost may have started a prediction. Until that is known, nothing is submitted again:

    match       an entry of the list carries our webhook, or is the only one that can be this prediction: it is bound
    excluded    an entry is another prediction's: its webhook is another, it is bound to another item of ours or
                recorded as an orphan, or it ran another 64-digit version. Nothing else excludes: inputs are removed
                and redacted, models have aliases, a GET may be 404
    undecided   an entry is neither: evidence is impossible, and a person has to look
    absent      two complete readings show none of these, the second one begun a grace after the holder of the claim
                sent its last byte: the claim is released, and the prediction submitted again

Readings are shared. Unknown claims are registered (`pk` = `unknown`), and the holder of the lease (`pk` = `readings`,
`sk` = `lease`) reads the list once for all of them. The lease's item also holds the budget of list calls: at most 60 in
any minute, however many predictions wait. A lease only saves work: each write that follows from a reading is
conditional on the claim that was read.

A prediction that was submitted again stays registered: the list is read once more 1 and 5 minutes after it was bound,
or has ended without being bound, and after it has ended. A second one that turns up is an orphan: it is canceled, and
stops all resubmission for an hour (`sk` = `breaker`), since evidence of this kind was wrong.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from predictions.lifecycle.evidence import Evidence, Hidden, Verdict, is_conclusive, told_by
from predictions.lifecycle.readings import Readings, last_of
from predictions.lifecycle.targets import webhook_of
from predictions.lifecycle.unknown_registry import UnknownRegistry, append_to
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change, Prediction
from predictions.upstream.client import Collection, Replicate
from predictions.upstream.list_reader import MARGIN_SECONDS, Listed, ListReader, Reading
from predictions.upstream.prediction import UpstreamPrediction

_LONGEST_WAIT_SECONDS = 300
# A list that could not be read is read again soon, so that an outage of Replicate costs minutes after its end.
_FAILED_WAITS = (10, 120)
# The second reading may follow the first one at once, if the grace is over.
_SECOND_READING_SECONDS = 5
# Older evidence is not acted on without another reading.
_EVIDENCE_SECONDS = 300

_AGAIN_AFTER_SECONDS = (60, 300)
_NAMED = 10

Bind = Callable[[Prediction, UpstreamPrediction], Prediction]


class UnknownSubmissions:
    """Look for the predictions of creates without a clear response in Replicate's list.

    Args:
        table: The predictions.
        registry: Says what to look for.
        readings: Reads the list.
        evidence: Judges its entries.
        grace: Seconds after the end of a claim's holder before which the second reading may not begin.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self,
        table: PredictionsTable,
        registry: UnknownRegistry,
        readings: Readings,
        evidence: Evidence,
        *,
        grace: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._registry = registry
        self._readings = readings
        self._evidence = evidence
        self._grace = grace
        self._now = now

    @classmethod
    def from_env(cls, table: PredictionsTable, replicate: Replicate, registry: UnknownRegistry) -> "UnknownSubmissions":
        """Read `SUBMIT_GRACE_SECONDS`, and what its parts read."""
        reader = ListReader(replicate)
        readings, evidence = Readings.from_env(table, reader), Evidence.from_env(table, reader)
        return cls(table, registry, readings, evidence, grace=int(os.environ["SUBMIT_GRACE_SECONDS"]))

    # -- looks ------------------------------------------------------------------------------------------------

    def look(self, prediction: Prediction, bind: Bind) -> int:
        """Look for a claimed prediction in Replicate's list, if that is due and no other function reads.

        Args:
            prediction: A claimed, unbound prediction.
            bind: Binds a prediction to an upstream one.

        Returns:
            The seconds to the next look, if its item says nothing new.
        """
        now = self._now()
        lease = self._readings.lease()
        last = last_of(lease, prediction.collection)
        read_at, failed = self._last_reading_of(prediction, last)
        wait = self._next_look(prediction, read_at, failed=failed) - now
        if wait > 0:
            return max(1, math.ceil(wait))
        if not self._readings.acquire(lease, now):
            if prediction.submit_over is None:
                self._registry.register(prediction)  # after a crash: so that every reader looks for this one too
            # Waiting functions come one after the other.
            spread = 3 + min(60, int(last.get("claims", 0)) // 20)
            return 2 + int(prediction.id, 36) % spread
        self._read(prediction.collection, [prediction], bind)
        there = self._table.get(prediction.id)
        if there is None or there.holder_done_at is None or there.upstream_id:
            return 1
        wait = self._next_look(there, float(there.read_at or 0), failed=there.read_failed) - self._now()
        return max(1, math.ceil(wait))

    def has_evidence(self, prediction: Prediction) -> bool:
        """Return whether evidence shows that Replicate accepted nothing of this claim."""
        return (
            prediction.claimed is not None
            and prediction.evidence_at is not None
            and self._now() - prediction.evidence_at <= _EVIDENCE_SECONDS
        )

    def _last_reading_of(self, prediction: Prediction, last: Mapping[str, Any]) -> tuple[float, bool]:
        """Return when the list was last read for this claim, and whether that reading failed."""
        done_at = prediction.holder_done_at or 0
        began = float(last.get("began", 0))
        registered = float(last.get("registered", began))
        searched_from = prediction.searched_from - MARGIN_SECONDS
        covered = (
            prediction.submit_over is not None  # so its holder has registered it
            and registered >= done_at
            and (last.get("why_not") is not None or float(last.get("reached", began)) <= searched_from)
        )
        if covered and began > (prediction.read_at or 0):
            return began, last.get("why_not") is not None
        return float(prediction.read_at or 0), prediction.read_failed

    def _next_look(self, prediction: Prediction, read_at: float, *, failed: bool) -> float:
        """Return when the next look for a claim is due."""
        done_at = float(prediction.holder_done_at or 0)
        waits = self._registry.looks(prediction)
        if read_at < done_at:
            # No reading yet. After a crash, what happened before `submit_until` is unknown.
            return done_at + (waits[0] if prediction.submit_over else _SECOND_READING_SECONDS)
        elapsed = read_at - done_at
        if failed:
            least, most = _FAILED_WAITS
            return read_at + min(most, max(least, elapsed / 4))
        # An undecided entry sets `evidence_at` to 0. The second reading follows soon only if this one was the first.
        first = prediction.absent_at is not None and (
            prediction.evidence_at is None or (not prediction.evidence_at and int(read_at) <= prediction.absent_at)
        )
        if first and elapsed >= self._grace:
            return read_at + _SECOND_READING_SECONDS
        for wait in waits:
            if wait > elapsed:
                return done_at + wait
        return read_at + min(_LONGEST_WAIT_SECONDS, max(waits[-1], elapsed / 2))

    # -- readings ---------------------------------------------------------------------------------------------

    def _read(
        self, collection: Collection, own: Sequence[Prediction], bind: Bind, again: Sequence[Prediction] = ()
    ) -> Reading:
        """Read the list once, as the holder of the lease, and settle every registered claim."""
        lease = self._readings.lease()
        # This reading may miss claims that are registered from now on.
        registered_at = self._now()
        claims = self._registry.claims(collection)
        claims |= {prediction.id: prediction for prediction in own}
        watched = [*claims.values(), *again]
        back_to = min((p.searched_from for p in watched), default=int(self._now())) - MARGIN_SECONDS
        reading = self._readings.read(collection, back_to)
        logger.info(
            "list read", pages=reading.pages, entries=len(reading.entries), reason=reading.why_not, claims=len(claims)
        )
        self._settle(collection, reading, list(claims.values()), {p.id for p in own}, bind)
        last = json.loads(lease.get("last_json", "{}"))
        last[collection] = {
            "began": reading.began,
            "registered": registered_at,
            "reached": max(0, reading.reached) if reading.reached != float("inf") else reading.began,
            "why_not": reading.why_not,
            "claims": len(claims),
        }
        self._readings.release(last)
        return reading

    def _settle(
        self, collection: Collection, reading: Reading, claims: list[Prediction], own: set[str], bind: Bind
    ) -> None:
        hidden = self._evidence.hidden(collection, reading, claims)
        digests: dict[str, str | None] = {}
        verdicts = {p.id: self._evidence.judge(p, reading, hidden, digests) for p in claims}
        for prediction in claims:
            verdict = verdicts[prediction.id]
            if verdict.matches:
                self._bind_first(prediction, verdict.matches, bind)
                continue
            complete = reading.covers(prediction.searched_from - MARGIN_SECONDS)
            done_at = prediction.holder_done_at
            if complete and done_at is not None and reading.began >= done_at + self._grace:
                only = verdict.candidates
                if len(only) == 1 and self._table.reserve(only[0].id, prediction):
                    logger.info("found by its likeness", upstream_id=only[0].id)
                    bind(prediction, told_by(only[0]))
                    continue
            self._note_reading(prediction, reading, verdict, complete=complete, own=prediction.id in own)

    def _bind_first(self, prediction: Prediction, matches: Sequence[Listed], bind: Bind) -> None:
        """Bind the first of the entries with our webhook; each further one is an orphan."""
        for match in sorted(matches, key=lambda each: each.created):
            logger.info("found in the list", upstream_id=match.id)
            bind(prediction, told_by(match))

    def _note_reading(
        self, prediction: Prediction, reading: Reading, verdict: Verdict, *, complete: bool, own: bool
    ) -> None:
        done_at = prediction.holder_done_at
        if done_at is None or reading.began < done_at:
            return
        absent = complete and not verdict.undecided
        values: dict[str, Any] = {}
        began = int(reading.began)
        if absent and prediction.absent_at is None:
            values["absent_at"] = began
        elif absent and reading.began >= max(done_at + self._grace, (prediction.absent_at or 0) + 1):
            values["evidence_at"] = began
        if verdict.undecided:
            values["evidence_at"] = 0
            metrics.add_metric(name="UndecidableSubmissions", unit=MetricUnit.Count, value=1)
        if not values and not own and not verdict.undecided:
            return  # the item of the lease records the reading
        saw: dict[str, Any] = {"at": began, "pages": reading.pages, "entries": len(reading.entries)}
        if verdict.undecided:
            saw["undecided"] = [entry.id for entry in verdict.undecided[:_NAMED]]
            saw["number"] = len(verdict.undecided)
        if not complete:
            saw["why_not"] = (reading.why_not or "it did not reach back to the first claim")[:200]
        failed = reading.why_not is not None
        wait = self._next_look(replace(prediction, **values), reading.began, failed=failed) - self._now()
        values |= {
            "read_at": began,
            "read_failed": failed,
            "readings_json": append_to(prediction.readings_json, saw, keep=is_conclusive),
            "next_check_at": int(self._now() + max(0, wait)) + 120,
        }
        self._table.note_unknown(prediction, values)

    # -- after a resubmission ---------------------------------------------------------------------------------

    def look_again(self, orphaned: Callable[[Prediction], None], bind: Bind) -> int:
        """Read the list again for resubmitted predictions that are due.

        Args:
            orphaned: Called with each prediction that has an orphan.
            bind: Binds a prediction to an upstream one.

        Returns:
            The number of due predictions.
        """
        registered = self._registry.watched()
        if not registered:
            return 0
        now = self._now()
        there = self._table.get_many(str(item["id"]) for item in registered)
        due: dict[Collection, list[tuple[dict[str, Any], Prediction]]] = {}
        for item in registered:
            prediction = there.get(str(item["id"]))
            if prediction is None or _read_to_the_end(prediction, item.get("read_at", 0)):
                self._registry.remove(item["sk"])
            elif (prediction.upstream_id or prediction.terminal) and _due_again(
                prediction, item.get("read_at", 0), now
            ):
                due.setdefault(prediction.collection, []).append((item, prediction))
        for collection, items in due.items():
            if not self._readings.acquire(self._readings.lease(), now):
                break
            watched = [prediction for _, prediction in items]
            reading = self._read(collection, [], bind, again=watched)
            if reading.why_not is not None:
                continue
            for item, prediction in items:
                self.find_orphans(prediction, reading, orphaned)
                self._note_again(item, prediction, reading)
        return sum(len(items) for items in due.values())

    def find_orphans(self, prediction: Prediction, reading: Reading, orphaned: Callable[[Prediction], None]) -> None:
        """Record the further upstream predictions of a request that a reading shows."""
        ours = webhook_of(prediction.id)
        hidden = self._evidence.hidden(prediction.collection, reading, [prediction])
        for entry in reading.entries.values():
            webhook = entry.webhook or hidden.get(entry.id, Hidden(known=False)).webhook
            if webhook != ours or entry.id == prediction.upstream_id:
                continue
            merge = self._table.merge(prediction.id, told_by(entry), self._now())
            if merge.change is Change.ORPHAN and merge.prediction is not None and merge.prediction.orphans:
                logger.error("orphan: evidence of absence was wrong", upstream_id=entry.id)
                metrics.add_metric(name="Orphans", unit=MetricUnit.Count, value=1)
                orphaned(merge.prediction)

    def _note_again(self, item: Mapping[str, Any], prediction: Prediction, reading: Reading) -> None:
        began = int(reading.began)
        if _read_to_the_end(prediction, began):
            self._registry.remove(item["sk"])
            return
        self._registry.note_watched(item, began)


def _settled_at(prediction: Prediction) -> int:
    """Return since when a prediction that was submitted again is bound, or has ended unbound."""
    unbound = prediction.ended if prediction.terminal and not prediction.upstream_id else None
    return prediction.bound_at or unbound or prediction.created


def _due_again(prediction: Prediction, read_at: int, now: float) -> bool:
    moments = [_settled_at(prediction) + seconds for seconds in _AGAIN_AFTER_SECONDS]
    if prediction.ended_visibly and prediction.ended:
        # A reading that began in the same second may have begun before the end.
        moments.append(prediction.ended + 1)
    return any(read_at < moment <= now for moment in moments)


def _read_to_the_end(prediction: Prediction, read_at: int) -> bool:
    """Return whether no further reading is needed."""
    last = max(_settled_at(prediction) + _AGAIN_AFTER_SECONDS[-1], (prediction.ended or 0) + 1)
    return prediction.ended_visibly and read_at >= last
