"""Order of the webhooks of one prediction: none after `completed`, and no content of an event twice.

The deliveries queue keeps no order, and a try that fails is repeated later: an `output` webhook can be due when
`completed` has been sent, or when a later one has already shown the same output, since each shows the prediction as it
is when it is sent. So right before each webhook, one small item records what is sent:

    completed           `completed` is on its way: no other webhook of the prediction is sent from then on
    {event}_n           the latest webhook of the event, by its place in the order
    {event}_digest      of its content
    {event}_open        its receiver did not accept it: a later webhook may tell the same

A webhook that is tried again, also after a crash of the function between this write and the request, is sent with the
same `webhook-id` as long as its content is the same; otherwise a later webhook has that content, and it is left out.
The write orders what begins: a request that has begun when `completed` follows is not recalled, and lasts 10 seconds at
most. Predictions whose callers want `completed` alone write nothing.
"""

import hashlib
import json
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import Condition, ConditionFailed, Table
from predictions.notifications.webhook_queue import Delivery
from predictions.observability import logger
from predictions.store.keys import webhook_order_key
from predictions.store.records import Prediction

# Longer than any webhook is retried.
_EXPIRES_SECONDS = 2 * 86400
# The place of the webhooks of the completion (n = 0), after all of the run, whose n is a length in characters.
_LAST = 10**15


class WebhookOrder:
    """What was sent of each prediction.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    @classmethod
    def from_env(cls) -> "WebhookOrder":
        """Use the table named by `TABLE_NAME`."""
        return cls(Table.from_env())

    def begin(self, prediction: Prediction, delivery: Delivery, content: Any, now: float) -> bool:
        """Record that a webhook is about to be sent; return False if it must not be.

        Args:
            prediction: The prediction.
            delivery: The webhook.
            content: What it tells: the output or the logs; None for the others.
            now: The time.

        Raises:
            ClientError, BotoCoreError: Nothing is known: the delivery must be tried again.
        """
        key, expires = webhook_order_key(prediction.id, prediction.created), int(now) + _EXPIRES_SECONDS
        if delivery.event == "completed":
            if set(prediction.wanted_events) - {"completed"}:
                self._table.update_item(key, set={"completed": int(now), "expires_at": expires})
            return True
        place, digest = f"{delivery.event}_n", f"{delivery.event}_digest"
        values = {"n": delivery.n or _LAST, "digest": _digest(prediction.id, content)}
        newer = f"{place} < :n AND ({digest} <> :digest OR attribute_exists({delivery.event}_open))"
        same = f"{place} = :n AND {digest} = :digest"
        not_sent = Condition(f"attribute_not_exists({place}) OR ({newer}) OR ({same})", **values)
        try:
            self._table.update_item(
                key,
                set={place: values["n"], digest: values["digest"], "expires_at": expires},
                remove=[f"{delivery.event}_open"],
                condition=Condition("attribute_not_exists(completed)") & not_sent,
            )
        except ConditionFailed:
            return False
        return True

    def failed(self, prediction: Prediction, delivery: Delivery) -> None:
        """Record that a receiver did not accept a webhook of the run. Never fails: its own retry does not need this.

        Without it, a webhook of the completion would be left out in favor of one whose last try is over.
        """
        if delivery.event == "completed":
            return
        try:
            self._table.update_item(
                webhook_order_key(prediction.id, prediction.created),
                set={f"{delivery.event}_open": True},
                condition=Condition(f"{delivery.event}_n = :n", n=delivery.n or _LAST),
            )
        except ConditionFailed:
            logger.info("a later webhook is sent already", webhook_id=delivery.webhook_id)
        except (ClientError, BotoCoreError):
            logger.exception("failure of a webhook not recorded", webhook_id=delivery.webhook_id)


def _digest(prediction_id: str, content: Any) -> str:
    # With the id: equal outputs of two predictions cannot be recognized after they were deleted.
    return hashlib.sha256(f"{prediction_id}\n{json.dumps(content)}".encode()).hexdigest()[:32]
