"""Files copied again, secrets changed, and what a deleted stack leaves."""

import argparse
import json
import secrets
import sys
import time
from typing import Any

from predictions.cli.stack import NotDone, Stack, StackUnusable, found, line, print_table
from predictions.webhooks import SigningSecrets

_NEW_MASTER = (
    "every owner's secret is another one at once, and webhooks carry no signature of the old one: receivers have to"
    " fetch theirs again (GET /webhooks/default/secret)"
)
_NEW_LINKS = (
    "all links to files end within five minutes, also those in the inputs of predictions that still wait, which fail"
)
MADE = {"webhook-master": ("WebhookMasterSecret", _NEW_MASTER), "links": ("LinkSecret", _NEW_LINKS)}
"""Secrets that are made here: their resource, and what another value does."""

_LARGEST_CHARACTERS = 512
_KEPT_TYPES = ("AWS::DynamoDB::Table", "AWS::S3::Bucket")


def archive(stack: Stack, arguments: argparse.Namespace) -> None:
    """Copies what could not be copied of predictions that have ended, by copy_outputs itself."""
    table, function = stack.table, stack.resource("CopyOutputsFunction")
    missing = False
    for prediction_id in arguments.ids:
        found(table, prediction_id)
        answer: dict[str, Any] = stack.invoke(function, {"id": prediction_id, "again": True})
        if why := answer.get("refused"):
            missing = True
            print(f"{prediction_id}: {why}", file=sys.stderr)
            continue
        print(f"{prediction_id}: {len(answer['stored'])} copied, {len(answer['failed'])} not.", file=sys.stderr)
        for file in answer["failed"]:
            missing = True
            print(f"{prediction_id}: {line(file['path'] or '/', 60)}: {line(file['error'], 300)}", file=sys.stderr)
    if missing:
        raise NotDone("Not everything was copied. What Replicate has removed, about an hour after the end, is gone.")


def rotate(stack: Stack, arguments: argparse.Namespace) -> None:
    """Gives a secret another value."""
    if arguments.secret == "replicate-token":  # noqa: S105  # its name
        token = sys.stdin.readline().strip()
        if not 8 <= len(token) <= _LARGEST_CHARACTERS or not all("!" <= each <= "~" for each in token):
            raise NotDone("The new token is read from stdin: one line of 8 to 512 visible ASCII characters.")
        arn = stack.output("ReplicateTokenSecretArn")
        stack.client("secretsmanager").put_secret_value(SecretId=arn, SecretString=token)
        print(
            "Stored. Functions use it within a minute, and at once after a 401. What runs goes on. Then revoke the"
            " old one at Replicate; `resume` ends a pause that it caused.",
            file=sys.stderr,
        )
        return
    resource, effect = MADE[arguments.secret]
    if not arguments.yes:
        raise NotDone(f"With another value {effect}. Say --yes if that is what you want.")
    # As CloudFormation made the first one: 64 letters and digits.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    value = "".join(secrets.choice(alphabet) for _ in range(64))
    stack.client("secretsmanager").put_secret_value(SecretId=stack.resource(resource), SecretString=value)
    print(f"Stored; functions use it within five minutes. From then on {effect}.", file=sys.stderr)


def refresh(stack: Stack, arguments: argparse.Namespace) -> None:  # noqa: ARG001  # every command is called with both
    """Asks Replicate for the secret with which it signs, as the sweep does every ten minutes."""
    import httpx  # no other command needs it

    from predictions.upstream import UpstreamError, token_of

    secretsmanager = stack.client("secretsmanager")
    stored = secretsmanager.get_secret_value(SecretId=stack.output("ReplicateTokenSecretArn"))["SecretString"]
    token = token_of(stored)
    url = f"{stack.parameter('ReplicateApiUrl')}/webhooks/default/secret"
    try:
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        answer.raise_for_status()
        secret = str(answer.json()["key"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise UpstreamError(f"Replicate did not tell its signing secret ({type(error).__name__}).") from None
    changed = SigningSecrets(stack.output("SigningSecretArn"), secretsmanager).store(secret, time.time())
    print(
        "Replicate's signing secret has changed; the one before is believed for 24 hours more."
        if changed
        else "Replicate's signing secret is the one that is stored.",
        file=sys.stderr,
    )


def kept(stack: Stack, arguments: argparse.Namespace) -> None:
    """What a deletion of the stack leaves, or has left: the table and the buckets."""
    cloudformation = stack.client("cloudformation")
    stacks = [
        each
        for page in cloudformation.get_paginator("list_stacks").paginate()
        for each in page["StackSummaries"]
        if each["StackName"] == stack.name
    ]
    if not stacks:
        raise StackUnusable(f"There is no stack {stack.name!r}, and there was none for 90 days.")
    rows = []
    for each in stacks:
        # One that is deleted is known by its id alone, and what it left by its events.
        resources = [
            resource
            for operation, listed in (
                ("list_stack_resources", "StackResourceSummaries"),
                ("describe_stack_events", "StackEvents"),
            )
            for page in cloudformation.get_paginator(operation).paginate(StackName=each["StackId"])
            for resource in page[listed]
            if listed == "StackResourceSummaries" or resource["ResourceStatus"] == "DELETE_SKIPPED"
        ]
        found_here = {
            (resource["ResourceType"], str(resource["PhysicalResourceId"]), each["StackStatus"])
            for resource in resources
            if resource["ResourceType"] in _KEPT_TYPES
            and resource.get("PhysicalResourceId")
            and resource["ResourceStatus"] != "DELETE_COMPLETE"
        }
        rows += sorted(found_here)
    if arguments.json:
        print(json.dumps([{"type": kind, "name": name, "stack": status} for kind, name, status in rows], indent=2))
        return
    print_table(("TYPE", "NAME", "STACK"), rows)
