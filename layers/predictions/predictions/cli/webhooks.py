"""Webhooks to callers: sent once more, and the secrets that sign them."""

import argparse
import sys
import time

from predictions.access import is_owner
from predictions.cli.stack import NotDone, Stack, found
from predictions.deliveries import DeliveriesQueue, Delivery
from predictions.owner_secrets import SecretVersions


def redeliver(stack: Stack, arguments: argparse.Namespace) -> None:
    """Sends one prediction's webhook again."""
    prediction = found(stack.table, arguments.id)
    if not prediction.webhook:
        raise NotDone(f"The prediction {prediction.id} was asked for without a webhook.")
    if arguments.event == "completed" and (not prediction.terminal or prediction.awaits_copy):
        raise NotDone(f"The prediction {prediction.id} has not ended: its webhook is sent when it has.")
    # Numbered as the first time, or for what may come often as the last one: a receiver that has it can tell.
    number = 1 if arguments.event in ("start", "completed") else 0
    delivery = Delivery(prediction.id, arguments.event, number, int(time.time()))
    DeliveriesQueue(stack.output("DeliveriesQueueUrl"), stack.client("sqs")).send(delivery)
    print(f"Queued, with the webhook-id {delivery.webhook_id}.", file=sys.stderr)


def rotate_secret(stack: Stack, arguments: argparse.Namespace) -> None:
    """Gives an owner's webhooks another secret."""
    if not is_owner(arguments.owner):
        raise NotDone(f"The owner {arguments.owner[:64]!r} must be 1 to 32 of a-z, 0-9 and '-'.")
    versions = SecretVersions(stack.output("TableName"), stack.client("dynamodb"))
    rotated = versions.rotate(arguments.owner, time.time(), force=arguments.force)
    print(
        f"The webhook secret of {arguments.owner} is now version {rotated.version}."
        " GET /webhooks/default/secret gives it; webhooks carry a signature of the old one too for 24 hours.",
        file=sys.stderr,
    )
