"""State CopyOutputs: copy the files of a completed prediction to S3, then show its completion."""

import time
from typing import Any

from predictions.files.outputs_bucket import OutputsBucket
from predictions.lifecycle.archive_outputs import copy, copy_again
from predictions.observability import handler_of, logger, remaining_seconds
from predictions.store.predictions import PredictionsTable

outputs = OutputsBucket.from_env()
table = PredictionsTable.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Copy the files that are not copied yet.

    Args:
        event: `{"id": …, "execution": "{id}-{n}"}`; or `{"id": …, "again": true}` of an operator, for files that
            failed then.
        context: Says how much time is left to the function.

    Returns:
        `{}`, or for an operator the result of `copy_again`.

    Raises:
        CopyInterrupted: Some files failed for now; the state machine retries.
    """
    logger.set_correlation_id(event["id"])
    left = remaining_seconds(context)
    if event.get("again"):
        return copy_again(table, outputs, event["id"], remaining_seconds=left)
    copy(
        table,
        outputs,
        event["id"],
        int(event["execution"].rpartition("-")[2]),
        remaining_seconds=left,
        now=time.time,
    )
    return {}
