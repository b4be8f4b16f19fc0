"""Archive outputs: copy a prediction's files into the outputs bucket, then show its completion."""

from collections.abc import Callable
from typing import Any

from predictions.errors import CopyInterrupted
from predictions.files.output_references import FILES_LIMIT
from predictions.files.outputs_bucket import OutputsBucket, folder
from predictions.observability import MetricUnit, count_ended, logger, metrics
from predictions.store.predictions import PredictionsTable

# Replicate removes files about an hour after completion; later than this, a failing host is not retried.
_GIVE_UP_SECONDS = 2 * 3600


def copy(
    table: PredictionsTable,
    outputs: OutputsBucket,
    prediction_id: str,
    execution_n: int,
    *,
    remaining_seconds: Callable[[], float],
    now: Callable[[], float],
) -> None:
    """Copy what Replicate will remove, then show the completion to callers.

    A second run has nothing left to copy. After a crash the stored files stay, and the next attempt continues. A file
    that fails for good is recorded with its reason, and raises an alarm through the metric `CopiesFailed`.

    Args:
        table: The predictions.
        outputs: The bucket of the files.
        prediction_id: Our id.
        execution_n: The number of the execution: the lease to copy belongs to one.
        remaining_seconds: The time left to the function.
        now: The time.

    Raises:
        CopyInterrupted: Some files failed for now, or another execution copies.
    """
    prediction = table.get(prediction_id)
    if prediction is None or not prediction.awaits_copy:
        return
    if not table.lease_copy(prediction, execution_n, int(remaining_seconds()), now()):
        raise CopyInterrupted(f"another execution of prediction {prediction_id} copies its files")
    files, beyond = outputs.files_to_store(table.result_output(prediction))
    stored = outputs.store(
        files,
        prefix=f"{folder(prediction.owner, prediction.id, prediction.output_prefix)}/{prediction.upstream_id}",
        remaining_seconds=remaining_seconds,
        depth=prediction.depth,
        final=now() >= (prediction.ended or 0) + _GIVE_UP_SECONDS,
    )
    stored += beyond
    failed = [file for file in stored if file.error]
    for file in failed:
        logger.error("output could not be stored", path=file.path, reason=file.error)
    # Before the completion is written: a crash there does not lose the alarm.
    metrics.add_metric(name="CopiesFailed", unit=MetricUnit.Count, value=len(failed))
    ended = table.end_copy(prediction, stored, now())
    if ended is None:
        return
    metrics.add_metric(name="BytesCopied", unit=MetricUnit.Bytes, value=sum(file.bytes or 0 for file in stored))
    logger.info("outputs stored", files=len(stored) - len(failed), failed=len(failed))
    count_ended(ended.visible, now() - ended.created)


def copy_again(
    table: PredictionsTable,
    outputs: OutputsBucket,
    prediction_id: str,
    *,
    remaining_seconds: Callable[[], float],
) -> dict[str, Any]:
    """Copy the files that failed when a prediction completed, for an operator who has removed the cause.

    The completion stays as it was sent: only the places of the files that are stored now are written. A second run, or
    one at the same time, writes each object once, and recognizes it afterwards.

    Returns:
        `{"refused": why}`, or `{"stored": [path, …], "failed": [{"path", "error"}, …]}`.
    """
    prediction = table.get(prediction_id)
    if prediction is None:
        return {"refused": "There is no such prediction."}
    if not prediction.ended_visibly:
        return {"refused": "It has not ended yet; its files are copied then."}
    if prediction.deleted:
        return {"refused": "Its owner has deleted it."}
    before = table.stored_files(prediction)
    missing = {file.path for file in before if file.error and file.index < FILES_LIMIT}
    if not missing:
        beyond = f" Of an output, the first {FILES_LIMIT} files are stored." if len(before) > FILES_LIMIT else ""
        return {"refused": f"No file of it is missing.{beyond}"}
    found, _ = outputs.files_to_store(table.result_output(prediction))
    now_there = outputs.store(
        [file for file in found if file.path in missing],
        prefix=f"{folder(prediction.owner, prediction.id, prediction.output_prefix)}/{prediction.upstream_id}",
        remaining_seconds=remaining_seconds,
        depth=prediction.depth,
        final=True,
    )
    stored = {file.path: file for file in now_there if not file.error}
    if stored and not table.replace_files(prediction, [stored.get(file.path, file) for file in before]):
        return {"refused": "It was deleted meanwhile."}
    logger.info("outputs stored again", files=len(stored), failed=len(missing) - len(stored))
    failed = [{"path": file.path, "error": file.error} for file in now_there if file.error]
    return {"stored": sorted(stored), "failed": failed}
