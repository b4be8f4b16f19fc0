"""Webhooks of batches and pipelines: one at each completion, with the body that their routes show.

A batch completes once for each attempt. While a later attempt runs, nothing is sent for an earlier one: the later
completion shows the results of all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from predictions.notifications.webhook_queue import Delivery
from predictions.views.prediction import Presenter


class Completion(NamedTuple):
    """A completed batch or pipeline whose webhook is due.

    Attributes:
        owner: Its owner.
        url: The receiver.
        traceparent: The trace that it belongs to, or None.
        show: Returns the body of the webhook.
    """

    owner: str
    url: str
    traceparent: str | None
    show: Callable[[], Mapping[str, Any]]


class Groups:
    """Reads batches and pipelines.

    Args:
        presenter: Makes the URLs of results and outputs.
    """

    def __init__(self, presenter: Presenter) -> None:
        self._presenter = presenter

    def find(self, delivery: Delivery) -> Completion | None:
        """Return the completion that a delivery reports, or None if it is gone or outdated."""
        return self._batch(delivery) if delivery.kind == "batch" else self._pipeline(delivery)

    def _batch(self, delivery: Delivery) -> Completion | None:
        from predictions.batches.store import Batches  # with the first webhook of a batch
        from predictions.batches.view import show_completed_batch

        batches = Batches.from_env()
        batch = batches.find(delivery.id)
        if batch is None or not batch.webhook or not batch.ended or batch.attempt != delivery.n:
            return None
        found = batch
        return Completion(
            batch.owner,
            batch.webhook,
            batch.traceparent,
            lambda: show_completed_batch(found, batches.bucket_name, self._presenter),
        )

    def _pipeline(self, delivery: Delivery) -> Completion | None:
        from predictions.pipelines.store import PipelinesTable  # with the first webhook of a pipeline
        from predictions.pipelines.view import PipelineView
        from predictions.store.predictions import PredictionsTable

        table = PipelinesTable.from_env()
        pipeline = table.get_pipeline(delivery.id)
        if pipeline is None or not pipeline.webhook or not pipeline.ended:
            return None
        view = PipelineView(PredictionsTable.from_env(), self._presenter)

        def show() -> Mapping[str, Any]:
            stored = table.read_pipeline(delivery.id)
            if stored is None:
                raise LookupError(delivery.id)
            return view.show(stored)

        return Completion(pipeline.owner, pipeline.webhook, pipeline.traceparent, show)
