"""The requests queue: each message starts a prediction, or is kept with the reason why it cannot."""

import re
from typing import Any

from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from predictions.callers import tell_failure
from predictions.dead_requests import DeadRequests
from predictions.errors import NoLongerWanted, PredictionsError
from predictions.observability import MetricUnit, handler_of, logger, metrics
from predictions.requests import Message, RequestRefused, Requests, task_token_of

NEEDED_SECONDS = 10
"""What one message may take when AWS is slow: with less time left it stays in the queue, untouched."""

requests = Requests.from_env()
dead_requests = DeadRequests.from_env()


class OutOfTime(PredictionsError):
    """The function ends before this message could be dealt with."""


@handler_of
def handler(event: dict[str, Any], context: Any) -> Any:
    """Deals with each message by itself.

    Args:
        event: `{"Records": [{"messageId", "body", "attributes", "messageAttributes", …}]}` of SQS.
        context: Tells how long the function may still run.

    Returns:
        `{"batchItemFailures": […]}`: the messages that stay in the queue, because AWS did not do what they need.
    """

    def take(record: SQSRecord) -> None:
        if context.get_remaining_time_in_millis() < NEEDED_SECONDS * 1000:
            raise OutOfTime(f"less than {NEEDED_SECONDS} s were left")
        _take(_message(record))

    # One of its own for each call: it remembers the messages of the last one.
    processor = BatchProcessor(event_type=EventType.SQS, raise_on_entire_batch_failure=False)
    return process_partial_response(event=event, record_handler=take, processor=processor, context=context)


def _take(message: Message) -> None:
    logger.append_keys(request_id=message.id)
    logger.set_correlation_id(None)  # of the message before
    try:
        if requests.take(message) is None and (task_token := task_token_of(message.body)):
            # What would tell its end is never there.
            tell_failure(task_token, "RequestNoLongerWanted", "What the message names starts nothing for it.")
    except RequestRefused as refused:
        reason = str(refused)
        logger.warning("request refused")
        metrics.add_metric(name="RequestsRefused", unit=MetricUnit.Count, value=1)
        # In this order: a crash in between keeps it twice, and never loses it.
        dead_requests.bury(message, reason)
        if task_token := task_token_of(message.body):
            tell_failure(task_token, "RequestRefused", reason)
    except NoLongerWanted as gone:
        logger.info("request no longer wanted")
        if task_token := task_token_of(message.body):
            tell_failure(task_token, "RequestNoLongerWanted", str(gone))
    except Exception:
        # SQS has it come again; the processor keeps the error to itself.
        logger.exception("request not started")
        raise


def _message(record: SQSRecord) -> Message:
    """A message as it was sent first; where it was put back into the queue, its attributes tell."""
    sent_at = int(record.attributes.sent_timestamp) // 1000
    attributes = record.raw_event["messageAttributes"]
    said: dict[str, str] = {
        name: attributes[name]["stringValue"]
        for name in ("request_id", "sent_at")
        if name in attributes and "stringValue" in attributes[name]
    }
    said_at = said.get("sent_at", "")
    return Message(
        id=said.get("request_id") or record.message_id,
        sender=record.attributes.sender_id,
        body=record.body,
        # Never later than it is: links to files are valid from then on.
        sent_at=min(sent_at, int(said_at)) if re.fullmatch("[0-9]{1,12}", said_at) else sent_at,
    )
