"""The consumer of the requests queue: each message starts a prediction, or is stored with the reason why it cannot."""

from collections.abc import Mapping
from typing import Any

from predictions.aws.task_tokens import tell_failure
from predictions.errors import NoLongerWanted
from predictions.intake.messages import read_message
from predictions.intake.queue import Requests, task_token_of
from predictions.intake.redelivery import GivenUp
from predictions.intake.refused import DeadRequests
from predictions.intents.sources import Message, RequestRefused
from predictions.observability import MetricUnit, logger, metrics


class RequestConsumer:
    """Handles one message at a time.

    Args:
        requests: Starts what messages ask for.
        dead_requests: Stores what cannot be started.
    """

    def __init__(self, requests: Requests, dead_requests: DeadRequests) -> None:
        self._requests = requests
        self._dead_requests = dead_requests

    def take(self, record: Mapping[str, Any]) -> None:
        """Start what a message asks for, or store it with the reason why it cannot be started.

        Raises:
            Exception: AWS failed; SQS delivers the message again.
        """
        message = read_message(record)
        logger.append_keys(request_id=message.id)
        logger.set_correlation_id(None)  # of the message before
        try:
            if self._requests.take(message) is None and (task_token := task_token_of(message.body)):
                # What would tell its end is never there.
                tell_failure(task_token, "RequestNoLongerWanted", "What the message names starts nothing for it.")
        except RequestRefused as refused:
            logger.warning("request refused")
            self._store(message, str(refused), "RequestRefused")
        except NoLongerWanted as gone:
            logger.info("request no longer wanted")
            if task_token := task_token_of(message.body):
                tell_failure(task_token, "RequestNoLongerWanted", str(gone))
        except Exception:
            # SQS has it come again.
            logger.exception("request not started")
            raise

    def give_up(self, record: Mapping[str, Any], given_up: GivenUp) -> None:
        """Store a message that is not tried again.

        Raises:
            Exception: AWS failed; SQS delivers the message again.
        """
        message = read_message(record)
        logger.append_keys(request_id=message.id)
        logger.set_correlation_id(None)
        logger.error("request given up", killed=given_up.killed)
        try:
            if given_up.killed:
                self._requests.give_up(message, given_up.reason)
                self._store(message, given_up.reason, "RequestNotStarted")
            else:
                # Nothing is wrong with the message: a redrive starts it, and its state then gets the completion.
                self._store(message, given_up.reason, None)
        except Exception:
            logger.exception("request not stored")
            raise

    def _store(self, message: Message, reason: str, error: str | None) -> None:
        """Send a message to the DLQ, and fail the state that waits for it, if any, by the name of an error."""
        metrics.add_metric(name="RequestsRefused", unit=MetricUnit.Count, value=1)
        try:
            # First: a crash in between keeps it twice, and never loses it.
            self._dead_requests.send(message, reason)
        finally:
            # Also where it could not be kept, and so comes again: nothing else would ever tell.
            if error is not None and (task_token := task_token_of(message.body)):
                tell_failure(task_token, error, reason)
