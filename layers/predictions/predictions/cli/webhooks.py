"""Commands for webhooks to callers: redelivery, and the secrets that sign them."""

import sys
import time
from enum import StrEnum
from typing import Annotated

import typer

from predictions.aws.dynamodb import Table
from predictions.cli.stack import NotDone, PredictionId, Stack, command, found, group
from predictions.ids import is_owner
from predictions.notifications.signing_secrets import SecretVersions
from predictions.notifications.webhook_queue import DeliveriesQueue, Delivery
from predictions.store.keys import batch_key, pipeline_key

app = group("Redeliver webhooks and rotate the secrets of owners.")


class Event(StrEnum):
    """Events of a webhook: those of `notifications.webhook_queue.EVENTS`."""

    START = "start"
    OUTPUT = "output"
    LOGS = "logs"
    COMPLETED = "completed"


@command(app, "redeliver", example="webhooks redeliver yyys72zxolexwjthl2aalbmehp --stack NAME")
def redeliver(
    stack: Stack,
    prediction_id: PredictionId,
    event: Annotated[Event, typer.Option(help="The event of the webhook.")] = Event.COMPLETED,
) -> None:
    """Send the webhook of one prediction, batch or pipeline again."""
    if event == Event.COMPLETED and (completed := _completed_group(stack, prediction_id)):
        _send(stack, completed)
        return
    prediction = found(stack.table, prediction_id)
    if not prediction.webhook:
        raise NotDone(f"The prediction {prediction.id} was created without a webhook.")
    if event == Event.COMPLETED and not prediction.ended_visibly:
        raise NotDone(f"The prediction {prediction.id} has not completed: its webhook is sent when it does.")
    # Numbered like the first delivery, or for repeatable events like the last: the receiver can recognize a duplicate.
    number = 1 if event in (Event.START, Event.COMPLETED) else 0
    delivery = Delivery(prediction.id, event.value, number, int(time.time()), again=True)
    _send(stack, delivery)


def _send(stack: Stack, delivery: Delivery) -> None:
    DeliveriesQueue(stack.output("DeliveriesQueueUrl"), stack.client("sqs")).send(delivery)
    print(f"Queued with the webhook-id {delivery.webhook_id}.", file=sys.stderr)


def _completed_group(stack: Stack, id_: str) -> Delivery | None:
    """Return the webhook of a batch's or pipeline's last completion, or None if the id is of neither."""
    items = Table(stack.output("TableName"), stack.client("dynamodb"))
    for kind, key in (("batch", batch_key(id_)), ("pipeline", pipeline_key(id_))):
        item = items.get_item(key)
        if item is None:
            continue
        if "webhook" not in item:
            raise NotDone(f"The {kind} {id_} was created without a webhook.")
        if "visible" not in item:
            raise NotDone(f"The {kind} {id_} has not completed: its webhook is sent when it does.")
        return Delivery(id_, f"{kind}.completed", int(item.get("attempt", 1)), int(time.time()), again=True)
    return None


@command(app, "rotate", example="webhooks rotate --owner alice --stack NAME")
def rotate_secret(
    stack: Stack,
    owner: Annotated[str, typer.Option(help="The owner whose secret is rotated.")],
    force: Annotated[bool, typer.Option("--force", help="Rotate again within 24 hours of the last rotation.")] = False,
) -> None:
    """Give an owner a new webhook secret.

    Webhooks are signed with the old one too for 24 hours.
    """
    if not is_owner(owner):
        raise NotDone(f"The owner {owner[:64]!r} must be 1 to 32 of a-z, 0-9 and '-'.")
    versions = SecretVersions(stack.output("TableName"), stack.client("dynamodb"))
    rotated = versions.rotate(owner, time.time(), force=force)
    print(
        f"The webhook secret of {owner} is now version {rotated.version}."
        " GET /webhooks/default/secret returns it; webhooks are signed with the old one too for 24 hours.",
        file=sys.stderr,
    )
