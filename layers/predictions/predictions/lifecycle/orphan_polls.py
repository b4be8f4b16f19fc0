"""Immediate polls: a running orphan can be canceled only by functions that hold Replicate's token."""

import json
import os
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.observability import logger

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient


class OrphanPolls:
    """Invoke `poll_prediction` without waiting for it.

    Args:
        function_name: Its name.
        lambda_: The client; made with the first orphan by default, because hardly any webhook shows one.
    """

    def __init__(self, function_name: str, lambda_: "LambdaClient | None" = None) -> None:
        self._function_name = function_name
        self._given = lambda_

    @classmethod
    def from_env(cls) -> "OrphanPolls":
        """Read `POLL_PREDICTION_FUNCTION_NAME`."""
        return cls(os.environ["POLL_PREDICTION_FUNCTION_NAME"])

    def ask(self, prediction_id: str) -> None:
        """Request a poll of a prediction, which cancels its orphans.

        If that fails, the sweep cancels them within a minute: the item lists them already.
        """
        try:
            self._lambda.invoke(
                FunctionName=self._function_name,
                InvocationType="Event",
                Payload=json.dumps({"id": prediction_id}).encode(),
            )
        except (ClientError, BotoCoreError):
            logger.exception("the poll that cancels an orphan was not asked for")

    @property
    def _lambda(self) -> "LambdaClient":
        return self._given or client("lambda")
