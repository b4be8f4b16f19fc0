"""Batches as callers see them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from predictions.aws.clients import api_url
from predictions.batches.store import COUNTED, Batch
from predictions.observability import MetricUnit, logger, metrics
from predictions.views.prediction import Presenter

if TYPE_CHECKING:
    from predictions.batches.manage import BatchControl


def show_changed_batch(batch: Batch, control: "BatchControl", presenter: Presenter) -> dict[str, Any]:
    """Return a batch that a call has just made or changed, whatever fails while it is shown."""
    try:
        return show_batch(batch, control, presenter)
    except Exception:  # noqa: BLE001  # whatever it is, the caller must not take it for "nothing was done"
        logger.exception("done, but not shown", batch_id=batch.id)
        metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        return show_batch(batch, control, presenter, ask=False)


def show_batch(batch: Batch, control: "BatchControl", presenter: Presenter, *, ask: bool = True) -> dict[str, Any]:
    """Return a batch as a response shows it.

    Args:
        batch: The batch.
        control: Counts its lines.
        presenter: Makes the URL of its results.
        ask: Whether to ask Step Functions for counts, and to make that URL, both of which can fail.
    """
    counts = control.counts(batch, ask=ask)
    return _shown(batch, counts, control.batches.bucket_name, presenter if ask else None)


def show_completed_batch(batch: Batch, bucket_name: str, presenter: Presenter) -> dict[str, Any]:
    """Return a completed batch as a response shows it."""
    return _shown(batch, dict.fromkeys(COUNTED, 0) | dict(batch.counts or {}), bucket_name, presenter)


def _shown(batch: Batch, counts: Mapping[str, int], bucket_name: str, presenter: Presenter | None) -> dict[str, Any]:
    url = f"{api_url()}/batches/{batch.id}"
    results = None
    if batch.results_key and presenter:
        results = {"uri": f"s3://{bucket_name}/{batch.results_key}", "url": presenter.link(batch.results_key)}
    return {
        "id": batch.id,
        "status": batch.status,
        "recipe": batch.recipe,
        "manifest": batch.manifest_uri(bucket_name),
        "total": batch.total,
        "counts": dict(counts),
        "attempt": batch.attempt,
        "max_concurrency": batch.max_concurrency,
        "tolerated_failure_percentage": batch.tolerated_failure_percentage,
        "cancel_requested": batch.stop == "canceled",
        "error": batch.reason,
        "results": results,
        "created_at": batch.created_at,
        "completed_at": batch.completed_at,
        **({"labels": dict(batch.labels)} if batch.labels else {}),
        **({"webhook": batch.webhook} if batch.webhook else {}),
        "urls": {"get": url, "cancel": f"{url}/cancel", "retry": f"{url}/retry"},
    }
