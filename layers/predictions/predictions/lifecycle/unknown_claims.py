"""Claims whose create has an unknown outcome: looked for, submitted again on evidence, or given up."""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

from predictions.errors import PredictionThrottled
from predictions.lifecycle.binding import Binding
from predictions.lifecycle.connections import Connections
from predictions.lifecycle.evidence import undecided_ids
from predictions.lifecycle.orphans import Breaker
from predictions.lifecycle.reconcile import UnknownSubmissions
from predictions.lifecycle.targets import target_of
from predictions.lifecycle.timing import ABANDON_SECONDS, PAUSE_STEP_SECONDS
from predictions.lifecycle.transitions import Transitions
from predictions.lifecycle.unknown_registry import UnknownRegistry
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.client import Replicate
from predictions.upstream.errors import NotFound, Unavailable
from predictions.upstream.prediction import UpstreamPrediction
from predictions.validation import input_json_canonical

# A prediction whose submission stays unknown is given up this long after Replicate must have ended it.
GIVE_UP_SECONDS = 300

# Largest difference between Replicate's clock and that of the functions.
_CLOCK_SKEW_SECONDS = 30
# Claims without `submit_until` are of an older release, whose functions acted on a claim for at most this long.
_PREVIOUS_RELEASE_SECONDS = 60

RESUBMIT_WAITS = (5, 20, 80, 300)
"""Waits before the next submission, in seconds, by the number of creates with an unknown outcome."""


class UnknownClaims:
    """Resolve claims whose holders got no clear response to their creates.

    Args:
        unknown: Looks for predictions in Replicate's list.
        registry: Registers resubmitted predictions.
        breaker: Stops resubmission after wrong evidence.
        binding: Binds predictions that were found.
        transitions: Ends predictions.
        grace: Seconds after the claim in which a submission may still show up by its webhook or in the list.
        resubmit: Whether to submit a prediction again on evidence that Replicate accepted nothing.
        max_unknown_creates: Number of creates with an unknown outcome after which a prediction fails.
    """

    def __init__(
        self,
        table: PredictionsTable,
        replicate: Replicate,
        unknown: UnknownSubmissions,
        registry: UnknownRegistry,
        breaker: Breaker,
        binding: Binding,
        transitions: Transitions,
        *,
        grace: int,
        resubmit: bool,
        max_unknown_creates: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._unknown = unknown
        self._registry = registry
        self._breaker = breaker
        self._binding = binding
        self._transitions = transitions
        self._grace = grace
        self._resubmit = resubmit
        self._max_unknown_creates = max_unknown_creates
        self._now = now

    @classmethod
    def from_env(cls, connections: Connections) -> "UnknownClaims":
        """Read `SUBMIT_GRACE_SECONDS`, `UNKNOWN_SUBMISSION` and `MAX_UNKNOWN_CREATES`."""
        return cls(
            connections.table,
            connections.replicate,
            UnknownSubmissions.from_env(connections.table, connections.replicate, connections.registry),
            connections.registry,
            connections.breaker,
            connections.binding,
            connections.transitions,
            grace=int(os.environ["SUBMIT_GRACE_SECONDS"]),
            resubmit=os.environ["UNKNOWN_SUBMISSION"] == "resubmit",
            max_unknown_creates=int(os.environ["MAX_UNKNOWN_CREATES"]),
        )

    def look_for(self, prediction: Prediction) -> None:
        """Look for the prediction of a create with an unknown outcome; act on evidence that it has none.

        Raises:
            PredictionThrottled: The outcome is still unknown, or the prediction is submitted again later.
        """
        wait_seconds = 1
        # Otherwise the deadline decides, whatever the readings say.
        acts = self._resubmit or prediction.cancel_requested is not None
        if not (acts and self._unknown.has_evidence(prediction)):
            wait_seconds = self._unknown.look(prediction, self._binding.bind)
            there = self._table.get(prediction.id)
            if there is None or there.terminal or there.upstream_id:
                return
            if there.written_by != prediction.written_by or there.claimed is None:
                raise PredictionThrottled(1)  # another function has acted on the same evidence
            prediction = there
        if acts and self._unknown.has_evidence(prediction):
            self._act_on_absence(prediction)
        now = self._now()
        over_at = prediction.deadline + (ABANDON_SECONDS if prediction.read_failed else GIVE_UP_SECONDS)
        if now >= over_at:
            self._give_up(prediction)
            return
        raise PredictionThrottled(max(1, min(wait_seconds, int(over_at - now) + 1)))

    def _act_on_absence(self, prediction: Prediction) -> NoReturn:
        """Release the claim of a prediction that Replicate has not accepted, or end it.

        Raises:
            PredictionThrottled: The prediction is submitted again later, or has ended: the next look tells.
        """
        now = self._now()
        creates = prediction.unknown_creates + 1
        wait_seconds = 1
        if prediction.cancel_requested:
            self._transitions.end(prediction, Status.CANCELED, None, not_accepted=True)
        elif why := self.why_not_again(prediction, creates):
            self._transitions.end(prediction, Status.FAILED, why, not_accepted=True)
        elif stopped := self._breaker.stopped_seconds():
            wait_seconds = min(PAUSE_STEP_SECONDS, stopped)
        else:
            self._registry.watch(prediction)  # first: orphans must be looked for even if this function crashes
            wait_seconds = RESUBMIT_WAITS[min(creates, len(RESUBMIT_WAITS)) - 1]
            if self._table.release_absent(prediction, now, wait_seconds, creates):
                logger.warning("Replicate accepted nothing: submitted again", wait_seconds=wait_seconds)
                metrics.add_metric(name="Resubmissions", unit=MetricUnit.Count, value=1)
            else:
                wait_seconds = 1
        raise PredictionThrottled(wait_seconds)

    def why_not_again(self, prediction: Prediction, creates: int) -> str | None:
        """Return why a prediction that was not accepted is not submitted again, or None if it is."""
        if self._now() >= prediction.deadline:
            return "Its deadline passed before Replicate accepted it."
        if prediction.object == "training":
            return "Replicate's answer to the submission was lost, and Replicate's list shows that nothing was started."
        if prediction.unanswered:
            return "It was not submitted: its caller received an error."
        if creates >= self._max_unknown_creates:
            return (
                f"Replicate gave no clear answer to {creates} submissions, and its list shows that none of them "
                "started anything. Request it again later."
            )
        return None

    def reconcile(self, prediction: Prediction) -> None:
        """Find the prediction of a create with an unknown outcome, for claims of older code."""
        now = self._now()
        if now < (prediction.claimed or 0) + self._grace:
            return
        matches = None
        try:
            matches = self._candidates(prediction)
        except Unavailable as error:
            logger.warning("reconciling without answer", reason=str(error))
        if matches and len(matches) == 1 and self._table.reserve(matches[0].id, prediction):
            logger.info("reconciled", upstream_id=matches[0].id)
            self._binding.bind(prediction, matches[0])
            return
        if matches:
            logger.warning("several predictions may be this one: none is taken", candidates=[m.id for m in matches])
        patience_seconds = GIVE_UP_SECONDS if matches is not None else ABANDON_SECONDS
        if now >= prediction.deadline + patience_seconds:
            self._give_up(prediction)

    def _candidates(self, prediction: Prediction) -> list[UpstreamPrediction]:
        """Return the upstream predictions that can be this one: same target, input and time, not bound to another."""
        input_json = self._table.input_json(prediction)
        if input_json is None:
            return []
        target, wanted = target_of(prediction), input_json_canonical(json.loads(input_json))
        claimed = prediction.claimed or 0
        start = datetime.fromtimestamp(claimed - _CLOCK_SKEW_SECONDS, UTC)
        end = datetime.fromtimestamp(claimed + _PREVIOUS_RELEASE_SECONDS + _CLOCK_SKEW_SECONDS, UTC)
        matches = []
        for listed in self._replicate.created_between(start, end, prediction.collection):
            if not target.ran(listed) or listed.id in prediction.orphans | prediction.orphans_canceled:
                continue
            if listed.input is not None and not _same_input(listed.input, wanted):
                continue
            if self._table.bound_to(listed.id) not in (None, prediction.id):
                continue
            try:
                told = self._replicate.get(listed.id, prediction.collection)
            except NotFound:
                continue
            names_us = told.webhook is not None and told.webhook.endswith(f"/webhooks/replicate/{prediction.id}")
            if names_us:
                return [told]
            if told.webhook is None and _same_input(told.input, wanted):
                matches.append(told)
        return matches

    def _give_up(self, prediction: Prediction) -> None:
        if prediction.cancel_requested:
            self._transitions.end(prediction, Status.CANCELED, None)
            return
        why = (
            "Replicate's answer to the submission was lost, and no prediction of it was found until the deadline. "
            "It was not submitted again, since that could have been paid for twice."
        )
        if undecided := undecided_ids(prediction):
            why += (
                f" These predictions at Replicate may be it, and nothing that Replicate shows of them tells: "
                f"{', '.join(undecided)}."
            )
        self._transitions.end(prediction, Status.FAILED, why)


def _same_input(told: Any, wanted: str) -> bool:
    try:
        return input_json_canonical(told) == wanted
    except RecursionError:
        return False  # deeper than any input that this stack has sent
