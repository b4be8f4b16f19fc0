"""The requests queue: each message starts a prediction, or is kept with the reason why it cannot."""

import re
from collections.abc import Mapping
from typing import Any

from predictions.aws.task_tokens import tell_failure
from predictions.errors import NoLongerWanted
from predictions.intake.queue import Requests, task_token_of
from predictions.intake.redelivery import GivenUp, ReceivedRequests
from predictions.intake.refused import DeadRequests
from predictions.intents.sources import Message, RequestRefused
from predictions.observability import MetricUnit, handler_of, logger, metrics, remaining_seconds

requests = Requests.from_env()
dead_requests = DeadRequests.from_env()
received_requests = ReceivedRequests.from_env()


@handler_of
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Deals with each message by itself.

    Args:
        event: `{"Records": [{"messageId", "receiptHandle", "body", "attributes", "messageAttributes", …}]}` of SQS.
        context: Tells how long the function may still run.

    Returns:
        `{"batchItemFailures": […]}`: the messages that stay in the queue, because AWS did not do what they need.
    """
    stay = received_requests.handle(event["Records"], _take, _give_up, remaining_seconds(context))
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in stay]}


def _take(record: Mapping[str, Any]) -> None:
    message = _message(record)
    logger.append_keys(request_id=message.id)
    logger.set_correlation_id(None)  # of the message before
    try:
        if requests.take(message) is None and (task_token := task_token_of(message.body)):
            # What would tell its end is never there.
            tell_failure(task_token, "RequestNoLongerWanted", "What the message names starts nothing for it.")
    except RequestRefused as refused:
        logger.warning("request refused")
        _keep(message, str(refused), "RequestRefused")
    except NoLongerWanted as gone:
        logger.info("request no longer wanted")
        if task_token := task_token_of(message.body):
            tell_failure(task_token, "RequestNoLongerWanted", str(gone))
    except Exception:
        # SQS has it come again.
        logger.exception("request not started")
        raise


def _give_up(record: Mapping[str, Any], given_up: GivenUp) -> None:
    message = _message(record)
    logger.append_keys(request_id=message.id)
    logger.set_correlation_id(None)
    logger.error("request given up", killed=given_up.killed)
    try:
        if given_up.killed:
            requests.give_up(message, given_up.reason)
            _keep(message, given_up.reason, "RequestNotStarted")
        else:
            # Nothing is wrong with the message: a redrive starts it, and then its state is told of the end.
            _keep(message, given_up.reason, None)
    except Exception:
        logger.exception("request not kept")
        raise


def _keep(message: Message, reason: str, error: str | None) -> None:
    """Keep a message as a dead letter, and fail the state that waits for it, if any, by the name of an error."""
    metrics.add_metric(name="RequestsRefused", unit=MetricUnit.Count, value=1)
    try:
        # First: a crash in between keeps it twice, and never loses it.
        dead_requests.send(message, reason)
    finally:
        # Also where it could not be kept, and so comes again: nothing else would ever tell.
        if error is not None and (task_token := task_token_of(message.body)):
            tell_failure(task_token, error, reason)


def _message(record: Mapping[str, Any]) -> Message:
    """A message as it was sent first; where it was put back into the queue, its attributes tell."""
    sent_at = int(record["attributes"]["SentTimestamp"]) // 1000
    attributes = record["messageAttributes"]
    said: dict[str, str] = {
        name: attributes[name]["stringValue"]
        for name in ("request_id", "sent_at")
        if name in attributes and "stringValue" in attributes[name]
    }
    said_at = said.get("sent_at", "")
    return Message(
        id=said.get("request_id") or record["messageId"],
        sender=record["attributes"]["SenderId"],
        body=record["body"],
        # Never later than it is: links to files are valid from then on.
        sent_at=min(sent_at, int(said_at)) if re.fullmatch("[0-9]{1,12}", said_at) else sent_at,
    )
