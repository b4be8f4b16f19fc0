"""The command `replicate-serverless`: what an operator does to a deployed stack.

    replicate-serverless tokens create --stack NAME --owner alice
    replicate-serverless show ID --stack NAME
    replicate-serverless dead-letters list requests --stack NAME
    replicate-serverless pause --stack NAME --reason "The model is being changed."

What a command makes goes to stdout, and nothing else does: `TOKEN=$(replicate-serverless tokens create …)`
works.
Exit codes: 0 done; 2 not done, and stderr says why and what to do.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, NoRegionError

from predictions.access import Scope
from predictions.cli import admission, dead_letters, inspect, maintenance, tokens, url_keys, webhooks
from predictions.cli.stack import Stack
from predictions.deliveries import EVENTS
from predictions.errors import PredictionsError
from predictions.limits import (
    IN_FLIGHT_MAX,
    OPEN_BATCHES_DEFAULT,
    OPEN_MAX,
    OPEN_PIPELINES_DEFAULT,
    PER_DAY_MAX,
)

_PROGRAM = "replicate-serverless"


@dataclass(frozen=True)
class _Argument:
    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Command:
    """One command: what it runs with the stack and the parsed arguments, what it is for, and an example of its use."""

    run: Callable[[Stack, argparse.Namespace], None]
    help: str
    example: str
    arguments: tuple[_Argument, ...] = ()


@dataclass(frozen=True)
class _Group:
    help: str
    commands: Mapping[str, _Command]


def _argument(*names: str, **options: Any) -> _Argument:
    return _Argument(names, options)


def _flag(name: str, what: str) -> _Argument:
    return _argument(name, action="store_true", help=what)


_LIST_AS_JSON = _flag("--json", "as a JSON list of objects")
_AS_JSON = _flag("--json", "as a JSON object")
_OWNER = _argument("owner", metavar="OWNER", help="whose")
_ID = _argument("id", metavar="ID", help="the prediction's id")
_QUEUE = _argument(
    "queue", metavar="QUEUE", choices=dead_letters.QUEUES, help=f"one of {', '.join(dead_letters.QUEUES)}"
)
_ONE_LETTER = _argument("--id", help="only this one, by the id that `dead-letters list` shows")

_COMMANDS: Mapping[str, _Command | _Group] = {
    "show": _Command(
        inspect.show,
        "tell a prediction's story: what happened when, its files, and what it waits for",
        "show yyys72zxolexwjthl2aalbmehp --stack NAME",
        (
            _ID,
            _flag("--input", "its input, too"),
            _flag("--output", "its output and the model's logs, too"),
            _flag("--no-log", "do not search the functions' log, which may take a while"),
            _AS_JSON,
        ),
    ),
    "stuck": _Command(
        inspect.stuck,
        "list what is open and should have moved on, and what it waits for",
        "stuck --stack NAME --older-than 1h",
        (
            _argument("--older-than", default="10m", help="how long ago, such as 90s, 10m, 2h or 1d (default: 10m)"),
            _LIST_AS_JSON,
        ),
    ),
    "dead-letters": _Group(
        "count, list, try again and forget what was given up",
        {
            "count": _Command(
                dead_letters.count_letters,
                "how many there are of each queue",
                "dead-letters count --stack NAME",
                (_AS_JSON,),
            ),
            "list": _Command(
                dead_letters.list_letters,
                f"list those of a queue, and why; each is then hidden for {dead_letters.LOOK_SECONDS} seconds",
                "dead-letters list requests --stack NAME",
                (_QUEUE, _LIST_AS_JSON),
            ),
            "redrive": _Command(
                dead_letters.redrive_letters,
                "try them once more, as what they were: nothing is started or told twice",
                "dead-letters redrive webhooks --stack NAME",
                (_QUEUE, _ONE_LETTER),
            ),
            "forget": _Command(
                dead_letters.forget_letters,
                "delete one, or all of a queue",
                "dead-letters forget invocations --all --stack NAME",
                (_QUEUE, _ONE_LETTER, _flag("--all", "all that there are now")),
            ),
        },
    ),
    "outputs": _Group(
        "copy files again",
        {
            "archive": _Command(
                maintenance.archive,
                "copy what could not be copied when predictions ended, while Replicate has it",
                "outputs archive yyys72zxolexwjthl2aalbmehp --stack NAME",
                (_argument("ids", metavar="ID", nargs="+", help="ids of predictions that have ended"),),
            )
        },
    ),
    "webhooks": _Group(
        "send webhooks again, and rotate the secrets of owners",
        {
            "redeliver": _Command(
                webhooks.redeliver,
                "send one prediction's webhook again",
                "webhooks redeliver yyys72zxolexwjthl2aalbmehp --stack NAME",
                (
                    _ID,
                    _argument("--event", choices=EVENTS, default="completed", help="which one (default: %(default)s)"),
                ),
            ),
            "rotate": _Command(
                webhooks.rotate_secret,
                "give an owner a new secret; the old one signs too for 24 h",
                "webhooks rotate --owner alice --stack NAME",
                (
                    _argument("--owner", required=True, help="whose secret"),
                    _flag("--force", "also within 24 hours of the last rotation"),
                ),
            ),
        },
    ),
    "secrets": _Group(
        "change the stack's secrets",
        {
            "rotate": _Command(
                maintenance.rotate,
                "give a secret another value: Replicate's token from stdin, others a random one",
                "secrets rotate replicate-token --stack NAME < new-token.txt",
                (
                    _argument(
                        "secret",
                        metavar="SECRET",
                        choices=("replicate-token", *maintenance.MADE),
                        help=f"one of {', '.join(('replicate-token', *maintenance.MADE))}",
                    ),
                    _flag("--yes", "also where that ends what is in use"),
                ),
            ),
            "refresh": _Command(
                maintenance.refresh,
                "ask Replicate for the secret with which it signs webhooks; the sweep does every ten minutes",
                "secrets refresh --stack NAME",
            ),
        },
    ),
    "tokens": _Group(
        "create, list and revoke access tokens of the API",
        {
            "create": _Command(
                tokens.create_token,
                "create a token; it goes to stdout, this once",
                "tokens create --owner alice --name laptop --stack NAME",
                (
                    _argument("--owner", required=True, help="whose predictions it sees: a-z, 0-9 and '-', at most 32"),
                    _argument(
                        "--scopes",
                        default=f"{Scope.PREDICT},{Scope.READ}",
                        help=f"comma separated, of {', '.join(Scope)} (default: %(default)s)",
                    ),
                    _argument("--name", default="", help="a label, such as the machine it is used on"),
                ),
            ),
            "list": _Command(
                tokens.list_tokens, "list tokens, oldest first", "tokens list --stack NAME", (_LIST_AS_JSON,)
            ),
            "revoke": _Command(
                tokens.revoke_token,
                "revoke a token",
                "tokens revoke abcdef123456 --stack NAME",
                (_argument("id", metavar="ID", help="the token's id as `tokens list` shows it"),),
            ),
        },
    ),
    "limits": _Group(
        "limit owners: predictions in flight and per day, open batches and pipelines",
        {
            "set": _Command(
                admission.set_limits,
                "give an owner these limits, and no others",
                "limits set alice --in-flight 20 --per-day 5000 --stack NAME",
                (
                    _OWNER,
                    _argument("--in-flight", type=int, help=f"started and not ended at once, 0 to {IN_FLIGHT_MAX}"),
                    _argument("--per-day", type=int, help=f"started in a day (UTC), 0 to {PER_DAY_MAX}"),
                    _argument(
                        "--open-batches",
                        type=int,
                        help=f"batches not completed at once, 0 to {OPEN_MAX} (default: {OPEN_BATCHES_DEFAULT})",
                    ),
                    _argument(
                        "--open-pipelines",
                        type=int,
                        help=f"pipelines not completed at once, 0 to {OPEN_MAX} (default: {OPEN_PIPELINES_DEFAULT})",
                    ),
                ),
            ),
            "list": _Command(
                admission.list_limits, "list the owners with limits", "limits list --stack NAME", (_LIST_AS_JSON,)
            ),
            "remove": _Command(
                admission.remove_limits, "take an owner's limits away", "limits remove alice --stack NAME", (_OWNER,)
            ),
        },
    ),
    "pause": _Command(
        admission.pause,
        "hold all new submissions until `resume`",
        'pause --reason "We move to another account until noon." --stack NAME',
        (
            _argument(
                "--reason",
                default="Its operator has paused it.",
                help="a sentence that callers are shown, at most 200 characters (default: %(default)s)",
            ),
        ),
    ),
    "resume": _Command(admission.resume, "end a pause, by command or automatic", "resume --stack NAME"),
    "status": _Command(
        admission.show_status, "show whether submissions are paused, and what waits", "status --stack NAME", (_AS_JSON,)
    ),
    "urls": _Group(
        "make the key pair of signed URLs of output files",
        {
            "keys": _Command(
                url_keys.make_url_keys,
                "store a new private key in Secrets Manager; the parameters for `sam deploy` go to stdout",
                "urls keys --stack NAME > keys.yaml",
            )
        },
    ),
    "kept": _Command(
        maintenance.kept,
        "list the table and the buckets, which a deletion of the stack leaves; before and after it",
        "kept --stack NAME",
        (_LIST_AS_JSON,),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(Stack(arguments.stack, arguments.region, arguments.profile), arguments)
    except NoCredentialsError:
        return _refuse("There are no AWS credentials. Log in, or name a profile with --profile.")
    except NoRegionError:
        return _refuse("There is no AWS region. Give --region, or set AWS_REGION.")
    except (PredictionsError, BotoCoreError, ClientError) as error:
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    print(f"{_PROGRAM}: {message}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has `run`, called with the stack and the parsed arguments."""
    made = argparse.ArgumentParser(
        prog=_PROGRAM, description="Operate a deployed replicate-serverless stack.", allow_abbrev=False
    )
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, each in _COMMANDS.items():
        if isinstance(each, _Command):
            _add(commands, name, each)
            continue
        group = commands.add_parser(name, help=each.help, description=f"{_sentence(each.help)}")
        inner = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
        for own_name, command in each.commands.items():
            _add(inner, own_name, command)
    return made


def _add(commands: Any, name: str, command: _Command) -> None:
    added = commands.add_parser(
        name,
        help=command.help,
        description=_sentence(command.help),
        epilog=f"example: {_PROGRAM} {command.example}",
        allow_abbrev=False,
    )
    for argument in command.arguments:
        added.add_argument(*argument.names, **argument.options)
    added.add_argument("--stack", required=True, help="name of the deployed CloudFormation stack")
    added.add_argument("--region", help="AWS region of the stack (default: AWS_REGION, else the profile's)")
    added.add_argument("--profile", help="profile of the AWS configuration to use")
    added.set_defaults(run=command.run)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    sys.exit(main())
