"""State CopyOutputs: the files of a prediction that has ended go to S3, then callers see the end."""

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
    """Copies what is not copied yet.

    Args:
        event: `{"id": …, "execution": "{id}-{n}"}`; or `{"id": …, "again": true}` of an operator, for what could not
            be copied then.
        context: Tells how long the function may still run.

    Returns:
        `{}`; for an operator what became of it: see `copy_again`.

    Raises:
        CopyInterrupted: Some files could not be had now; the machine tries again.
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
