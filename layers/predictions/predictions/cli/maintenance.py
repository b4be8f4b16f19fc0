"""Commands for maintenance: files, secrets, and what a deleted stack leaves."""

import json
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from secrets import choice
from typing import Annotated, Any

import typer

from predictions.cli.stack import (
    JsonList,
    NotDone,
    Stack,
    StackUnusable,
    command,
    found,
    group,
    line,
    print_table,
)
from predictions.ids import is_id
from predictions.upstream.signing_secret import SigningSecrets

app = group()
outputs = group("Archive output files that could not be copied.")
secrets = group("Rotate and refresh the stack's secrets.")


class Secret(StrEnum):
    """The secrets that `secrets rotate` can change."""

    REPLICATE_TOKEN = "replicate-token"  # noqa: S105  # its name
    WEBHOOK_MASTER = "webhook-master"
    LINKS = "links"


_NEW_MASTER = (
    "every owner's secret changes at once and webhooks are no longer signed with the old one: receivers must fetch"
    " their secret again (GET /webhooks/default/secret)"
)
_NEW_LINKS = (
    "all links to files expire within five minutes, including links in the inputs of predictions that still wait:"
    " those predictions fail"
)
_GENERATED: Mapping[Secret, tuple[str, str]] = {
    Secret.WEBHOOK_MASTER: ("WebhookMasterSecret", _NEW_MASTER),
    Secret.LINKS: ("LinkSecret", _NEW_LINKS),
}
"""Secrets with a random value: their resource, and the effect of a new value."""

_LARGEST_CHARACTERS = 512
_KEPT_TYPES = ("AWS::DynamoDB::Table", "AWS::S3::Bucket")
_LOG_GROUP, _RULE = "AWS::Logs::LogGroup", "AWS::Events::Rule"


@command(outputs, "archive", example="outputs archive yyys72zxolexwjthl2aalbmehp --stack NAME")
def archive(
    stack: Stack,
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="Ids of finished predictions.")],
) -> None:
    """Copy files that could not be copied when predictions finished.

    Possible as long as Replicate still has them, for about an hour.
    """
    table, function = stack.table, stack.resource("CopyOutputsFunction")
    missing = False
    for prediction_id in ids:
        found(table, prediction_id)
        result: dict[str, Any] = stack.invoke(function, {"id": prediction_id, "again": True})
        if why := result.get("refused"):
            missing = True
            print(f"{prediction_id}: {why}", file=sys.stderr)
            continue
        print(f"{prediction_id}: {len(result['stored'])} copied, {len(result['failed'])} failed.", file=sys.stderr)
        for file in result["failed"]:
            missing = True
            print(f"{prediction_id}: {line(file['path'] or '/', 60)}: {line(file['error'], 300)}", file=sys.stderr)
    if missing:
        raise NotDone("Some files were not copied. Replicate removes them about an hour after completion, for good.")


@command(secrets, "rotate", example="secrets rotate replicate-token --stack NAME < new-token.txt")
def rotate(
    stack: Stack,
    secret: Annotated[Secret, typer.Argument(metavar="SECRET", help="The secret.")],
    yes: Annotated[bool, typer.Option("--yes", help="Rotate even if that invalidates what is in use.")] = False,
) -> None:
    """Replace a secret.

    Replicate's token is read from stdin; the other secrets get a random value.
    """
    if secret not in _GENERATED:
        token = sys.stdin.readline().strip()
        if not 8 <= len(token) <= _LARGEST_CHARACTERS or not all("!" <= each <= "~" for each in token):
            raise NotDone("The new token is read from stdin: one line of 8 to 512 visible ASCII characters.")
        arn = stack.output("ReplicateTokenSecretArn")
        stack.client("secretsmanager").put_secret_value(SecretId=arn, SecretString=token)
        print(
            "Stored. Functions use it within a minute, and immediately after a 401; running predictions continue."
            " Now revoke the old token at Replicate. `resume` ends a pause that it caused.",
            file=sys.stderr,
        )
        return
    resource, effect = _GENERATED[secret]
    if not yes:
        raise NotDone(f"With a new value, {effect}. Confirm with --yes.")
    # Like the first value, which CloudFormation made: 64 letters and digits.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    value = "".join(choice(alphabet) for _ in range(64))
    stack.client("secretsmanager").put_secret_value(SecretId=stack.resource(resource), SecretString=value)
    print(f"Stored. Functions use it within five minutes; from then on, {effect}.", file=sys.stderr)


@command(secrets, "refresh", example="secrets refresh --stack NAME")
def refresh(stack: Stack) -> None:
    """Fetch the secret with which Replicate signs webhooks.

    The sweep does the same every ten minutes.
    """
    import httpx  # only this command needs it

    from predictions.upstream.credentials import token_of
    from predictions.upstream.errors import UpstreamError

    secretsmanager = stack.client("secretsmanager")
    stored = secretsmanager.get_secret_value(SecretId=stack.output("ReplicateTokenSecretArn"))["SecretString"]
    token = token_of(stored)
    url = f"{stack.parameter('ReplicateApiUrl')}/webhooks/default/secret"
    try:
        response = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        response.raise_for_status()
        secret = str(response.json()["key"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise UpstreamError(f"Replicate did not return its signing secret ({type(error).__name__}).") from None
    changed = SigningSecrets(stack.output("SigningSecretArn"), secretsmanager).store(secret, time.time())
    print(
        "Replicate's signing secret has changed; the old one stays valid for 24 hours."
        if changed
        else "Replicate's signing secret is the one that is stored.",
        file=sys.stderr,
    )


@command(app, "kept", example="kept --stack NAME")
def kept(stack: Stack, as_json: JsonList = False) -> None:
    """List what remains after the stack is deleted.

    These are the table and the buckets, and log groups that an upgrade replaced. Before the deletion it also lists
    rules of others on the stack's bus, with which the bus cannot be deleted. Works before and after the deletion.
    """
    cloudformation = stack.client("cloudformation")
    stacks = [
        each
        for page in cloudformation.get_paginator("list_stacks").paginate()
        for each in page["StackSummaries"]
        if each["StackName"] == stack.name
    ]
    if not stacks:
        raise StackUnusable(f"Found no stack {stack.name!r}, nor one of that name deleted within 90 days.")
    rows = []
    for each in stacks:
        # A deleted stack can only be read by its id, and the resources it left by its events.
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
            if (
                resource["ResourceType"] in _KEPT_TYPES
                or (resource["ResourceType"] == _LOG_GROUP and resource["ResourceStatus"] == "DELETE_SKIPPED")
            )
            and resource.get("PhysicalResourceId")
            and resource["ResourceStatus"] != "DELETE_COMPLETE"
        }
        if each["StackStatus"] != "DELETE_COMPLETE":
            found_here |= {(_RULE, name, each["StackStatus"]) for name in _rules_of_others(stack)}
        rows += sorted(found_here)
    if as_json:
        print(json.dumps([{"type": kind, "name": name, "stack": status} for kind, name, status in rows], indent=2))
        return
    print_table(("TYPE", "NAME", "STACK"), rows)


def _rules_of_others(stack: Stack) -> list[str]:
    """Find the rules on the stack's bus, which has its name, that are not those of its recipes."""
    events, prefix = stack.client("events"), f"{stack.name}-recipe-"
    try:
        pages = [*events.get_paginator("list_rules").paginate(EventBusName=stack.name)]
    except events.exceptions.ResourceNotFoundException:
        return []
    names = [str(rule["Name"]) for page in pages for rule in page["Rules"]]
    return [
        f"{stack.name}/{name}" for name in names if not (name.startswith(prefix) and is_id(name.removeprefix(prefix)))
    ]
