"""State CopyOutputs: the files of a prediction that has ended go to S3, then callers see the end."""

import time
from typing import Any

from predictions.copies import copy
from predictions.observability import handler_of, logger
from predictions.outputs import OutputsBucket
from predictions.table import PredictionsTable

outputs = OutputsBucket.from_env()
table = PredictionsTable.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Copies what is not copied yet.

    Args:
        event: `{"id": …, "execution": "{id}-{n}"}`.
        context: Tells how long the function may still run.

    Returns:
        `{}`.

    Raises:
        CopyInterrupted: Some files could not be had now; the machine tries again.
    """
    logger.set_correlation_id(event["id"])
    copy(
        table,
        outputs,
        event["id"],
        int(event["execution"].rpartition("-")[2]),
        remaining_seconds=lambda: context.get_remaining_time_in_millis() / 1000,
        now=time.time,
    )
    return {}
