"""Batches as callers see them."""

from typing import Any

from predictions.aws.clients import api_url
from predictions.batches.manage import BatchControl
from predictions.batches.store import Batch
from predictions.observability import MetricUnit, logger, metrics
from predictions.views.prediction import Presenter


def show_changed_batch(batch: Batch, control: BatchControl, presenter: Presenter) -> dict[str, Any]:
    """Return a batch that a call has just made or changed, whatever fails while it is shown."""
    try:
        return show_batch(batch, control, presenter)
    except Exception:  # noqa: BLE001  # whatever it is, the caller must not take it for "nothing was done"
        logger.exception("done, but not shown", batch_id=batch.id)
        metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        return show_batch(batch, control, presenter, ask=False)


def show_batch(batch: Batch, control: BatchControl, presenter: Presenter, *, ask: bool = True) -> dict[str, Any]:
    """Return a batch as a response shows it.

    Args:
        batch: The batch.
        control: Counts its lines.
        presenter: Makes the URL of its results.
        ask: Whether to ask Step Functions for counts, and to make that URL, both of which can fail.
    """
    url = f"{api_url()}/batches/{batch.id}"
    results = None
    if batch.results_key and ask:
        results = {"uri": control.uri(batch.results_key), "url": presenter.link(batch.results_key)}
    return {
        "id": batch.id,
        "status": batch.status,
        "recipe": batch.recipe,
        "manifest": control.manifest_uri(batch),
        "total": batch.total,
        "counts": control.counts(batch, ask=ask),
        "attempt": batch.attempt,
        "max_concurrency": batch.max_concurrency,
        "tolerated_failure_percentage": batch.tolerated_failure_percentage,
        "cancel_requested": batch.stop == "canceled",
        "error": batch.reason,
        "results": results,
        "created_at": batch.created_at,
        "completed_at": batch.completed_at,
        "urls": {"get": url, "cancel": f"{url}/cancel", "retry": f"{url}/retry"},
    }
