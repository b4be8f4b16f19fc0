"""Receive a verified webhook of Replicate: merge it, and wake the execution that waits for it."""

from enum import StrEnum

from predictions.lifecycle.merging import merge
from predictions.lifecycle.orphan_polls import OrphanPolls
from predictions.observability import MetricUnit, logger, metrics
from predictions.status import Status
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Change
from predictions.upstream.prediction import UnreadablePrediction, UpstreamPrediction


class Receipt(StrEnum):
    """Effects of a webhook. The response to each is 200: sending it again would change nothing."""

    MERGED = "merged"
    NOTHING_NEW = "nothing new"
    UNKNOWN = "unknown prediction"
    ORPHAN = "orphan"


def receive(
    table: PredictionsTable, prediction_id: str, body: bytes, now: float, polls: OrphanPolls | None = None
) -> Receipt:
    """Receive one webhook whose signature is verified.

    The table's merge rule ignores duplicate, late and reordered webhooks.

    Args:
        table: The predictions.
        prediction_id: Our id, from the webhook's path.
        body: The raw body.
        now: The time.
        polls: Has an orphan canceled at once, or None to leave it to the sweep.
    """
    logger.set_correlation_id(prediction_id)
    try:
        told = UpstreamPrediction.read(body)
    except UnreadablePrediction as error:
        logger.warning("signed, but not a prediction", reason=str(error))
        return _unknown()
    prediction = table.get(prediction_id)
    if prediction is None:
        return _unknown()
    if prediction.upstream_id != told.id and not _is_for(table, prediction_id, told):
        # Signed for another prediction and sent to this address: it must not bind this one, nor be its orphan.
        logger.warning("a webhook of another prediction", upstream_id=told.id)
        return _unknown()
    outcome = merge(table, prediction_id, told, now, known=prediction)
    if outcome.change is Change.UNKNOWN or outcome.prediction is None:
        return _unknown()
    if outcome.change is Change.ORPHAN:
        if told.id in outcome.prediction.orphans:
            if polls is not None:
                polls.ask(prediction_id)
        elif told.status in (Status.SUCCEEDED, Status.FAILED):
            # The orphan completed before its cancel.
            metrics.add_metric(name="PaidTwice", unit=MetricUnit.Count, value=1)
        return Receipt.ORPHAN
    logger.info("webhook verified", upstream_id=told.id, status=told.status, change=outcome.change.name)
    return Receipt.MERGED if outcome.change in (Change.ENDED, Change.PROGRESS) else Receipt.NOTHING_NEW


def _is_for(table: PredictionsTable, prediction_id: str, told: UpstreamPrediction) -> bool:
    """Return whether a webhook can be of this unbound prediction: the signature does not cover the path."""
    if told.webhook is not None and not told.webhook.endswith(f"/webhooks/replicate/{prediction_id}"):
        return False
    return table.bound_to(told.id) in (None, prediction_id)


def _unknown() -> Receipt:
    metrics.add_metric(name="WebhooksUnknown", unit=MetricUnit.Count, value=1)
    return Receipt.UNKNOWN
