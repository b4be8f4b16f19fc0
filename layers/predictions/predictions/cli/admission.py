"""Commands for admission: pauses of submissions, and the limits of owners."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from predictions.admission.limiter_item import LANES
from predictions.admission.quotas import (
    IN_FLIGHT_MAX,
    LIMIT_NAMES,
    OPEN_BATCHES_DEFAULT,
    OPEN_MAX,
    OPEN_PIPELINES_DEFAULT,
    PER_DAY_MAX,
    LimitInvalid,
    ModelLimits,
    OwnerLimits,
    OwnersLimits,
)
from predictions.admission.rate_limiter import MAX_START_DELAY_SECONDS, Limiter
from predictions.cli.stack import JsonList, JsonObject, NotDone, Stack, command, group, print_table, second
from predictions.ids import is_owner
from predictions.upstream.client import is_model_path

app = group()
limits = group("Limit the predictions, batches and pipelines of owners.")

_Model = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="A model: the limits of its predictions alone, in flight and per day."),
]
_Owner = Annotated[str, typer.Argument(metavar="OWNER", help="The owner.")]


@command(app, "pause", example='pause --reason "We move to another account until noon." --stack NAME')
def pause(
    stack: Stack,
    reason: Annotated[
        str, typer.Option(help="A sentence that callers are shown, at most 200 characters.")
    ] = "The operator has paused it.",
) -> None:
    """Hold all new submissions until `resume`."""
    reason = reason.strip()
    if not 1 <= len(reason) <= 200 or not reason.isprintable():
        raise NotDone("The reason must be 1 to 200 printable characters: it is shown to callers.")
    _limiter(stack).pause_by_command(reason)
    print("Submissions are paused within a second or two, until `resume`.", file=sys.stderr)


@command(app, "resume", example="resume --stack NAME")
def resume(stack: Stack) -> None:
    """End a pause, started by a command or automatically."""
    _limiter(stack).resume()
    print("Submissions continue; predictions that waited are submitted within 5 minutes.", file=sys.stderr)


@command(app, "status", example="status --stack NAME")
def show_status(stack: Stack, as_json: JsonObject = False) -> None:
    """Show whether submissions are paused, and what is waiting."""
    now = time.time()
    limiter = _limiter(stack)
    state = limiter.limiter_state()
    pause = state.pause(now)
    ends = limiter.lines()
    lines = {lane: {owner: round(at - now) for (of, owner), at in ends.items() if of == lane} for lane in LANES}
    shown = {
        "paused": pause is not None,
        "paused_by": pause.by if pause else None,
        "pause_reason": pause.reason if pause else None,
        "paused_since": second(int(pause.since)) if pause else None,
        "paused_until": second(int(pause.until)) if pause and pause.until else None,
        "throttled_seconds": max(0, round(state.blocked_until / 1000 - now)),
        "queue_reserved_seconds": max(0, round(float(state.queue_at) / 1000 - now)),
        "http_reserved_seconds": max(0, round(float(state.http_at) / 1000 - now)),
        **{f"{lane}_waiting_seconds": waiting for lane, waiting in lines.items()},
    }
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    until = f"until {shown['paused_until']}" if shown["paused_until"] else "until `resume`"
    rows = [
        ("submissions", f"paused by {pause.by} since {shown['paused_since']}, {until}" if pause else "active"),
        *([("reason", pause.reason)] if pause else []),
        ("Replicate's rate limit", f"holds creates for {shown['throttled_seconds']} s"),
        ("reserved, other sources", f"for {shown['queue_reserved_seconds']} s"),
        ("reserved, HTTP", f"for {shown['http_reserved_seconds']} s"),
        *(
            ("waiting, HTTP" if lane == "http" else "waiting, other sources", f"{owner}, for {seconds} s")
            for lane, waiting in lines.items()
            for owner, seconds in waiting.items()
        ),
    ]
    print_table(("FIELD", "VALUE"), rows)


@command(limits, "set", example="limits set alice --in-flight 20 --per-day 5000 --stack NAME")
def set_limits(
    stack: Stack,
    owner: _Owner,
    in_flight: Annotated[
        int | None, typer.Option(help=f"Maximum number of predictions in flight, 0 to {IN_FLIGHT_MAX}.")
    ] = None,
    per_day: Annotated[
        int | None, typer.Option(help=f"Maximum number of predictions started per day (UTC), 0 to {PER_DAY_MAX}.")
    ] = None,
    open_batches: Annotated[
        int | None,
        typer.Option(help=f"Maximum number of open batches, 0 to {OPEN_MAX} (default: {OPEN_BATCHES_DEFAULT})."),
    ] = None,
    open_pipelines: Annotated[
        int | None,
        typer.Option(help=f"Maximum number of open pipelines, 0 to {OPEN_MAX} (default: {OPEN_PIPELINES_DEFAULT})."),
    ] = None,
    model: _Model = None,
) -> None:
    """Set limits of an owner, or with --model of its predictions of one model.

    Limits that are not named stay as they are.
    """
    limits_of = _owners_limits(stack)
    if model is None:
        given = OwnerLimits(in_flight, per_day, open_batches, open_pipelines)
        whole = limits_of.set_limits(_checked(owner), given)
    else:
        named = _checked_model(model, open_batches is not None or open_pipelines is not None)
        whole = limits_of.set_model_limits(_checked(owner), named, ModelLimits(in_flight, per_day))
    print(f"The limits of {owner} are {_limits_text(whole)}, within a minute.", file=sys.stderr)


@command(limits, "list", example="limits list --stack NAME")
def list_limits(stack: Stack, as_json: JsonList = False) -> None:
    """List the owners that have limits."""
    found = list(_owners_limits(stack).list_limits())
    if as_json:
        names = (*LIMIT_NAMES, "models")
        listed = [{"owner": owner, **{name: asdict(each)[name] for name in names}} for owner, each in found]
        # An owner without limits of models is listed as by earlier releases.
        print(json.dumps([{k: v for k, v in each.items() if k != "models" or v} for each in listed], indent=2))
        return
    texts = []
    for owner, each in found:
        texts.append((owner, *map(_cell, (each.in_flight, each.per_day, *_open(each)))))
        texts += [
            (f"{owner} {model}", _cell(of_model.in_flight), _cell(of_model.per_day), "", "")
            for model, of_model in sorted(each.models.items())
        ]
    print_table(("OWNER", "IN FLIGHT", "PER DAY", "OPEN BATCHES", "OPEN PIPELINES"), texts)


@command(limits, "remove", example="limits remove alice --stack NAME")
def remove_limits(
    stack: Stack,
    owner: _Owner,
    in_flight: Annotated[bool, typer.Option("--in-flight", help="Remove only this limit.")] = False,
    per_day: Annotated[bool, typer.Option("--per-day", help="Remove only this limit.")] = False,
    open_batches: Annotated[bool, typer.Option("--open-batches", help="Remove only this limit.")] = False,
    open_pipelines: Annotated[bool, typer.Option("--open-pipelines", help="Remove only this limit.")] = False,
    model: _Model = None,
) -> None:
    """Remove limits of an owner, or with --model of one model: the named ones, or all of them."""
    chosen = zip(LIMIT_NAMES, (in_flight, per_day, open_batches, open_pipelines), strict=True)
    names = [name for name, is_chosen in chosen if is_chosen]
    limits_of = _owners_limits(stack)
    if model is None:
        left = limits_of.remove_limits(_checked(owner), names)
    else:
        left = limits_of.remove_model_limits(
            _checked(owner), _checked_model(model, open_batches or open_pipelines), names
        )
    now = f"are {_limits_text(left)}" if left else "are removed"
    print(f"The limits of {owner} {now}, within a minute.", file=sys.stderr)


def _limits_text(given: OwnerLimits) -> str:
    batches, pipelines = _open(given)
    named = (
        (given.in_flight, "in flight"),
        (given.per_day, "per day"),
        (batches, "open batches"),
        (pipelines, "open pipelines"),
    )
    *first, last = (
        *(f"{limit} {name}" for limit, name in named if limit is not None),
        *(
            f"{limit} {name} of {model}"
            for model, each in sorted(given.models.items())
            for limit, name in ((each.in_flight, "in flight"), (each.per_day, "per day"))
            if limit is not None
        ),
    )
    return f"{', '.join(first)} and {last}" if first else last


def _open(given: OwnerLimits) -> tuple[int | None, int | None]:
    return given.open_allowed("batch"), given.open_allowed("pipeline")


def _cell(limit: int | None) -> str:
    return "-" if limit is None else str(limit)


def _checked_model(model: str, has_other_limits: bool) -> str:
    if has_other_limits:
        raise LimitInvalid("A model has limits of --in-flight and --per-day only: set the others without --model.")
    if not is_model_path(model):
        raise LimitInvalid(f"The model {model[:64]!r} must be `owner/name`, without a version.")
    return model


def _checked(owner: str) -> str:
    if not is_owner(owner):
        raise LimitInvalid(f"The owner {owner[:64]!r} must be 1 to 32 of a-z, 0-9 and '-'.")
    return owner


def _owners_limits(stack: Stack) -> OwnersLimits:
    return OwnersLimits(stack.output("TableName"), stack.client("dynamodb"))


def _limiter(stack: Stack) -> Limiter:
    return Limiter(stack.output("TableName"), stack.client("dynamodb"), max_start_delay_seconds=MAX_START_DELAY_SECONDS)
