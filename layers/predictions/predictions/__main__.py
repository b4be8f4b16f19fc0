"""The command `replicate-serverless`: what an operator does to a deployed stack.

    replicate-serverless tokens create --stack NAME --owner alice
    replicate-serverless urls keys --stack NAME

What a command makes goes to stdout, and nothing else does: `TOKEN=$(replicate-serverless tokens create …)`
works.
Exit codes: 0 done; 2 not done, and stderr says why and what to do.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

from predictions.access import AccessTokens, Scope, is_owner
from predictions.dead_requests import DeadRequests
from predictions.deliveries import EVENTS, DeadLetters, DeliveriesQueue, Delivery
from predictions.errors import PredictionsError
from predictions.outputs import OutputsBucket
from predictions.owner_secrets import SecretVersions
from predictions.table import PredictionsTable, is_id


class StackUnusable(PredictionsError):
    """The named stack is not there, or is not one of this project's."""


class CannotDeliver(PredictionsError):
    """There is nothing to deliver, or nobody to deliver it to; the message says which."""


LOOK_SECONDS = 30
"""For how long `webhooks failed` and `requests list` hide what they have shown from the next look."""

_BODY_SHOWN_CHARACTERS = 60


class CannotRedrive(PredictionsError):
    """There is no such dead letter, or what tries it once more fails; the message says which."""


class KeysExist(PredictionsError):
    """There is a key pair for signed URLs already, and URLs may have been signed with it."""


class CryptographyMissing(PredictionsError):
    """A key pair cannot be made without the package `cryptography`."""


class Stack:
    """A deployed stack, found by its name, with the region and credentials of the command line.

    Region: `--region`, else AWS_REGION, else as botocore finds one. AWS_ENDPOINT_URL is honoured.
    """

    def __init__(self, name: str, region: str | None, profile: str | None) -> None:
        self._name = name
        self._region = region or os.environ.get("AWS_REGION") or None
        self._session = botocore.session.Session(profile=profile)

    def client(self, service_name: str) -> Any:
        """A client of an AWS service in the stack's region."""
        return self._session.create_client(service_name, region_name=self._region)

    def output(self, key: str) -> str:
        """The value of one of the stack's outputs, such as `TableName`.

        Raises:
            StackUnusable: There is no such stack, or it has no such output.
        """
        cloudformation = self.client("cloudformation")
        try:
            stack = cloudformation.describe_stacks(StackName=self._name)["Stacks"][0]
        except ClientError as error:
            if "does not exist" not in error.response["Error"].get("Message", ""):
                raise
            raise StackUnusable(
                f"There is no stack {self._name!r} in {cloudformation.meta.region_name}."
                " Check its name, --region and --profile."
            ) from error
        for output in stack.get("Outputs", []):
            if output["OutputKey"] == key:
                return str(output["OutputValue"])
        raise StackUnusable(
            f"The stack {self._name!r} ({stack['StackStatus']}) has no output {key}:"
            " either it is not one of replicate-serverless, or it is not deployed completely."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(Stack(arguments.stack, arguments.region, arguments.profile), arguments)
    except NoCredentialsError:
        return _refuse("There are no AWS credentials. Log in, or name a profile with --profile.")
    except NoRegionError:
        return _refuse("There is no AWS region. Give --region, or set AWS_REGION.")
    except (PredictionsError, BotoCoreError, ClientError) as error:
        return _refuse(str(error))
    return 0


def _create_token(stack: Stack, arguments: argparse.Namespace) -> None:
    scopes = [scope.strip() for scope in arguments.scopes.split(",")]
    token, access = _access_tokens(stack).create(arguments.owner, scopes, arguments.name)
    # Stored, the token cannot be shown again: nothing may come between the two.
    print(token, flush=True)
    print(
        f"Token {access.id} for {access.owner}: {', '.join(access.scopes)}. It is shown only this once.",
        file=sys.stderr,
    )


def _list_tokens(stack: Stack, arguments: argparse.Namespace) -> None:
    tokens = _access_tokens(stack).list()
    if arguments.json:
        print(json.dumps([asdict(token) for token in tokens], indent=2))
        return
    rows = [
        (
            token.id,
            token.owner,
            ",".join(token.scopes),
            token.token_hint,
            token.created_at[:19] + "Z",
            token.name,
        )
        for token in tokens
    ]
    _print_table(("ID", "OWNER", "SCOPES", "ENDS IN", "CREATED", "NAME"), rows)


def _revoke_token(stack: Stack, arguments: argparse.Namespace) -> None:
    access = _access_tokens(stack).revoke(arguments.id)
    print(
        f"Token {access.id} of {access.owner} is revoked; the API refuses it within 60 seconds.",
        file=sys.stderr,
    )


def _redeliver(stack: Stack, arguments: argparse.Namespace) -> None:
    outputs = OutputsBucket(stack.output("OutputsBucketName"))
    table = PredictionsTable(stack.output("TableName"), outputs, stack.client("dynamodb"))
    prediction = table.get(arguments.id) if is_id(arguments.id) else None
    if prediction is None:
        raise CannotDeliver(f"There is no prediction {arguments.id[:64]!r}.")
    if not prediction.webhook:
        raise CannotDeliver(f"The prediction {prediction.id} was asked for without a webhook.")
    if arguments.event == "completed" and (not prediction.terminal or prediction.awaits_copy):
        raise CannotDeliver(f"The prediction {prediction.id} has not ended: its webhook is sent when it has.")
    # Numbered as the first time, or for what may come often as the last one: a receiver that has it can tell.
    number = 1 if arguments.event in ("start", "completed") else 0
    delivery = Delivery(prediction.id, arguments.event, number, int(time.time()))
    _deliveries_queue(stack).send(delivery)
    print(f"Queued, with the webhook-id {delivery.webhook_id}.", file=sys.stderr)


def _list_failed(stack: Stack, arguments: argparse.Namespace) -> None:
    letters = list(_dead_letters(stack).look(LOOK_SECONDS))
    if arguments.json:
        found = [
            {**(asdict(letter.delivery) if letter.delivery else {"message": letter.body}), "reason": letter.reason}
            for letter in letters
        ]
        print(json.dumps(found, indent=2))
        return
    _print_table(
        ("ID", "EVENT", "DUE", "REASON"),
        [
            (each.delivery.id, each.delivery.event, _second(each.delivery.first_at), each.reason)
            if each.delivery
            else ("-", "-", "-", each.reason)
            for each in letters
        ],
    )


def _redrive(stack: Stack, arguments: argparse.Namespace) -> None:  # noqa: ARG001  # every command is called with both
    queue, dead_letters = _deliveries_queue(stack), _dead_letters(stack)
    count = left = 0
    for letter in dead_letters.look(LOOK_SECONDS):
        if letter.delivery is None:
            left += 1
            continue
        # In this order: a crash in between delivers it twice, under one id, and loses nothing.
        queue.send(replace(letter.delivery, first_at=int(time.time())))
        dead_letters.forget(letter)
        count += 1
    print(f"Queued again: {count}. Each is tried for another 24 hours.", file=sys.stderr)
    if left:
        print(f"Left where they are, since they are no deliveries: {left}.", file=sys.stderr)


def _list_requests(stack: Stack, arguments: argparse.Namespace) -> None:
    letters = sorted(_dead_requests(stack).look(LOOK_SECONDS), key=lambda letter: letter.sent_at)
    if arguments.json:
        shown = ("id", "sender", "sent_at", "reason", "body")
        print(json.dumps([{name: getattr(letter, name) for name in shown} for letter in letters], indent=2))
        return
    _print_table(
        ("ID", "SENT", "REASON", "BODY"),
        [(each.id, _second(each.sent_at), _line(each.reason, 100), _line(_hidden(each.body), _BODY_SHOWN_CHARACTERS))
         for each in letters],
    )  # fmt: skip


def _redrive_requests(stack: Stack, arguments: argparse.Namespace) -> None:
    dead_requests, function = _dead_requests(stack), stack.output("StartFromQueueFunctionName")
    lambda_ = stack.client("lambda")
    count = left = 0
    # Before any is tried: one that is refused again comes back as a new letter, which would be met once more.
    for letter in list(dead_requests.look(LOOK_SECONDS)):
        if arguments.id not in (None, letter.id):
            continue
        answer = lambda_.invoke(FunctionName=function, Payload=json.dumps(letter.event()).encode())
        said = answer["Payload"].read().decode()
        if answer.get("FunctionError"):
            raise CannotRedrive(f"start_from_queue fails over {letter.id}, which stays where it is: {said[:500]}")
        if json.loads(said)["batchItemFailures"]:
            left += 1
            continue
        # In this order: a crash in between tries it twice, which starts nothing twice, and loses nothing.
        dead_requests.forget(letter)
        count += 1
    if arguments.id is not None and not count + left:
        raise CannotRedrive(
            f"There is no dead letter {arguments.id[:100]!r}. One that was listed is hidden for {LOOK_SECONDS} seconds."
        )
    print(f"Tried once more: {count}. What is refused again is listed again.", file=sys.stderr)
    if left:
        print(f"Left where they are, since AWS did not let them start (see the log): {left}.", file=sys.stderr)


def _dead_requests(stack: Stack) -> DeadRequests:
    return DeadRequests(stack.output("RequestsDeadLetterQueueUrl"), stack.client("sqs"))


def _hidden(body: str) -> str:
    """A body without the token of a state that waits, which is somebody's to keep."""
    return re.sub(r'("task_token"\s*:\s*")[^"]*', r"\1…", body)


def _line(text: str, characters: int) -> str:
    """A text of strangers as a part of a line: nothing in it moves the terminal's cursor."""
    shown = "".join(each if each.isprintable() else " " for each in text[: characters + 1])
    return shown if len(shown) <= characters else shown[: characters - 1] + "…"


def _rotate_secret(stack: Stack, arguments: argparse.Namespace) -> None:
    if not is_owner(arguments.owner):
        raise CannotDeliver(f"The owner {arguments.owner[:64]!r} must be 1 to 32 of a-z, 0-9 and '-'.")
    versions = SecretVersions(stack.output("TableName"), stack.client("dynamodb"))
    rotated = versions.rotate(arguments.owner, time.time(), force=arguments.force)
    print(
        f"The webhook secret of {arguments.owner} is now version {rotated.version}."
        " GET /webhooks/default/secret gives it; webhooks carry a signature of the old one too for 24 hours.",
        file=sys.stderr,
    )


def _deliveries_queue(stack: Stack) -> DeliveriesQueue:
    return DeliveriesQueue(stack.output("DeliveriesQueueUrl"), stack.client("sqs"))


def _dead_letters(stack: Stack) -> DeadLetters:
    return DeadLetters(stack.output("DeliveriesDeadLetterQueueUrl"), stack.client("sqs"))


def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _print_table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _make_url_keys(stack: Stack, arguments: argparse.Namespace) -> None:
    """Puts a private key into Secrets Manager; stdout gets what `sam deploy` needs to know of it."""
    try:
        from cryptography.hazmat.primitives.asymmetric import rsa
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    except ImportError:
        raise CryptographyMissing("Install the package with its extra: replicate-serverless[cli].") from None
    from predictions.output_urls import PrivateKey

    # The one size that CloudFront takes.
    # https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/private-content-trusted-signers.html
    made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = made.private_numbers()
    name = f"{arguments.stack}/output-urls"
    secretsmanager = stack.client("secretsmanager")
    try:
        secret = secretsmanager.create_secret(
            Name=name,
            Description=f"Private key of the signed URLs of {arguments.stack}.",
            SecretString=PrivateKey(numbers.p, numbers.q, 65537).to_json(),
        )
    except secretsmanager.exceptions.ResourceExistsException:
        raise KeysExist(
            f"The secret {name} exists, and the stack may sign with it. For a new pair, deploy with"
            " OutputUrls=presigned, delete that secret without recovery, and call this again."
        ) from None
    public_key = made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    parameters = {"OutputUrls": "cloudfront", "OutputUrlPublicKey": public_key, "OutputUrlSecretArn": secret["ARN"]}
    print(json.dumps(parameters, indent=2))  # which is YAML too, as `sam deploy` wants it
    print(f"The private key is in the secret {name} and nowhere else. Deploy with these parameters.", file=sys.stderr)


def _access_tokens(stack: Stack) -> AccessTokens:
    return AccessTokens(stack.output("TableName"), stack.client("dynamodb"))


def _refuse(message: str) -> int:
    print(f"replicate-serverless: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    """Every command sets `run`, called with the stack and the parsed arguments."""
    stack = argparse.ArgumentParser(add_help=False)
    stack.add_argument("--stack", required=True, help="name of the deployed CloudFormation stack")
    stack.add_argument("--region", help="AWS region of the stack (default: AWS_REGION, else the profile's)")
    stack.add_argument("--profile", help="profile of the AWS configuration to use")

    parser = argparse.ArgumentParser(
        prog="replicate-serverless",
        description="Operate a deployed replicate-serverless stack.",
        allow_abbrev=False,
    )
    groups = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    tokens = groups.add_parser("tokens", help="create, list and revoke access tokens of the API")
    commands = tokens.add_subparsers(title="commands", required=True, metavar="COMMAND")

    create = commands.add_parser(
        "create", parents=[stack], help="create a token; it goes to stdout, this once", allow_abbrev=False
    )
    create.add_argument("--owner", required=True, help="whose predictions it sees: a-z, 0-9 and '-', at most 32")
    create.add_argument(
        "--scopes",
        default=f"{Scope.PREDICT},{Scope.READ}",
        help=f"comma separated, of {', '.join(Scope)} (default: %(default)s)",
    )
    create.add_argument("--name", default="", help="a label, such as the machine it is used on")
    create.set_defaults(run=_create_token)

    list_ = commands.add_parser("list", parents=[stack], help="list tokens, oldest first", allow_abbrev=False)
    list_.add_argument("--json", action="store_true", help="as a JSON list of objects")
    list_.set_defaults(run=_list_tokens)

    revoke = commands.add_parser("revoke", parents=[stack], help="revoke a token", allow_abbrev=False)
    revoke.add_argument("id", metavar="ID", help="the token's id as `tokens list` shows it")
    revoke.set_defaults(run=_revoke_token)

    webhooks = groups.add_parser("webhooks", help="send webhooks again, list what failed, rotate secrets")
    commands = webhooks.add_subparsers(title="commands", required=True, metavar="COMMAND")

    redeliver = commands.add_parser(
        "redeliver", parents=[stack], help="send one prediction's webhook again", allow_abbrev=False
    )
    redeliver.add_argument("id", metavar="ID", help="the prediction's id")
    redeliver.add_argument("--event", choices=EVENTS, default="completed", help="which one (default: %(default)s)")
    redeliver.set_defaults(run=_redeliver)

    failed = commands.add_parser(
        "failed",
        parents=[stack],
        help=f"list the webhooks that were given up; each is then hidden for {LOOK_SECONDS} seconds",
        allow_abbrev=False,
    )
    failed.add_argument("--json", action="store_true", help="as a JSON list of objects")
    failed.set_defaults(run=_list_failed)

    redrive = commands.add_parser(
        "redrive", parents=[stack], help="send all webhooks that were given up again", allow_abbrev=False
    )
    redrive.set_defaults(run=_redrive)

    rotate = commands.add_parser(
        "rotate", parents=[stack], help="give an owner a new secret; the old one signs too for 24 h", allow_abbrev=False
    )
    rotate.add_argument("--owner", required=True, help="whose secret")
    rotate.add_argument("--force", action="store_true", help="also within 24 hours of the last rotation")
    rotate.set_defaults(run=_rotate_secret)

    requests = groups.add_parser("requests", help="list and put back what the requests queue could not start")
    commands = requests.add_subparsers(title="commands", required=True, metavar="COMMAND")

    dead = commands.add_parser(
        "list",
        parents=[stack],
        help=f"list the messages that started nothing, and why; each is then hidden for {LOOK_SECONDS} seconds",
        allow_abbrev=False,
    )
    dead.add_argument("--json", action="store_true", help="as a JSON list of objects, with whole bodies")
    dead.set_defaults(run=_list_requests)

    back = commands.add_parser(
        "redrive",
        parents=[stack],
        help="try them once more, as the requests that they were: nothing is started twice",
        allow_abbrev=False,
    )
    back.add_argument("--id", help="only this one, by the id that `requests list` shows")
    back.set_defaults(run=_redrive_requests)

    urls = groups.add_parser("urls", help="make the key pair of signed URLs of output files")
    commands = urls.add_subparsers(title="commands", required=True, metavar="COMMAND")
    keys = commands.add_parser(
        "keys",
        parents=[stack],
        help="store a new private key in Secrets Manager; the parameters for `sam deploy` go to stdout",
        allow_abbrev=False,
    )
    keys.set_defaults(run=_make_url_keys)
    return parser


if __name__ == "__main__":
    sys.exit(main())
