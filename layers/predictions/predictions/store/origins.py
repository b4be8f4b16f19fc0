"""Origins of predictions: whether what a prediction belongs to is still active."""

from collections.abc import Mapping

from predictions.aws.dynamodb import Table
from predictions.store.keys import batch_key, pipeline_key


def is_active(origin: Mapping[str, str | int]) -> bool:
    """Check whether the pipeline, or the attempt of a batch, that a prediction was started for is still active.

    A pipeline or batch that was canceled, has finished or has expired is not. What has no such origin is active.

    Args:
        origin: The prediction's `origin`.
    """
    if "pipeline" in origin:
        pipeline = Table.from_env().get_item(pipeline_key(str(origin["pipeline"]))) or {}
        return pipeline.get("status") == "running" and "cancel_requested" not in pipeline
    if "batch" in origin:
        batch = Table.from_env().get_item(batch_key(str(origin["batch"]))) or {}
        return "open" in batch and "stop" not in batch and batch["attempt"] == origin["attempt"]
    return True
