"""How much is submitted: pauses, and the limits of owners."""

import argparse
import json
import sys
import time
from dataclasses import asdict

from predictions.access import is_owner
from predictions.cli.stack import NotDone, Stack, print_table, second
from predictions.limiter import LANES, MAX_START_DELAY_SECONDS, Limiter
from predictions.limits import LimitInvalid, OwnerLimits, OwnersLimits


def pause(stack: Stack, arguments: argparse.Namespace) -> None:
    """Holds all new submissions."""
    reason = arguments.reason.strip()
    if not 1 <= len(reason) <= 200 or not reason.isprintable():
        raise NotDone("The reason must be 1 to 200 printable characters: callers are shown it.")
    _limiter(stack).pause_by_command(reason)
    print("Nothing is submitted from now on (within a second or two). `resume` ends that.", file=sys.stderr)


def resume(stack: Stack, arguments: argparse.Namespace) -> None:  # noqa: ARG001  # every command is called with both
    """Ends a pause."""
    _limiter(stack).resume()
    print("Submissions go on; what waited follows within 5 minutes.", file=sys.stderr)


def show_status(stack: Stack, arguments: argparse.Namespace) -> None:
    """Whether submissions are paused, and how much is reserved."""
    now = time.time()
    state = _limiter(stack).limiter_state()
    pause = state.pause(now)
    # As attributes of the limiter's item name owners; those that share a line are `other`.
    lines = {
        lane: {
            owner.replace("_", "-").removeprefix("-"): round(at / 1000 - now)
            for (of, owner), at in sorted(state.turns.items())
            if of == lane and at / 1000 > now
        }
        for lane in LANES
    }
    shown = {
        "paused": pause is not None,
        "paused_by": pause.by if pause else None,
        "pause_reason": pause.reason if pause else None,
        "paused_since": second(int(pause.since)) if pause else None,
        "paused_until": second(int(pause.until)) if pause and pause.until else None,
        "throttled_seconds": max(0, round(state.blocked_until / 1000 - now)),
        "queue_reserved_seconds": max(0, round(state.queue_at / 1000 - now)),
        "http_reserved_seconds": max(0, round(state.http_at / 1000 - now)),
        **{f"{lane}_waiting_seconds": waiting for lane, waiting in lines.items()},
    }
    if arguments.json:
        print(json.dumps(shown, indent=2))
        return
    until = f"until {shown['paused_until']}" if shown["paused_until"] else "until `resume`"
    rows = [
        ("submissions", f"paused by {pause.by} since {shown['paused_since']}, {until}" if pause else "go on"),
        *([("reason", pause.reason)] if pause else []),
        ("Replicate's own limit", f"holds creates for {shown['throttled_seconds']} s"),
        ("reserved by others", f"for {shown['queue_reserved_seconds']} s"),
        ("reserved over HTTP", f"for {shown['http_reserved_seconds']} s"),
        *(
            ("waiting over HTTP" if lane == "http" else "waiting others", f"{owner}, for {seconds} s")
            for lane, waiting in lines.items()
            for owner, seconds in waiting.items()
        ),
    ]
    print_table(("WHAT", "IS"), rows)


def set_limits(stack: Stack, arguments: argparse.Namespace) -> None:
    """Gives an owner limits."""
    limits = OwnerLimits(arguments.in_flight, arguments.per_day, arguments.open_batches, arguments.open_pipelines)
    _owners_limits(stack).set_limits(_owner_of_limits(arguments), limits)
    print(f"The limits of {arguments.owner} are {_limits_text(limits)}, within a minute.", file=sys.stderr)


def list_limits(stack: Stack, arguments: argparse.Namespace) -> None:
    """The owners with limits."""
    found = list(_owners_limits(stack).list_limits())
    if arguments.json:
        print(json.dumps([{"owner": owner, **asdict(limits)} for owner, limits in found], indent=2))
        return
    texts = [
        (owner, *("-" if limit is None else str(limit) for limit in (limits.in_flight, limits.per_day, *_open(limits))))
        for owner, limits in found
    ]
    print_table(("OWNER", "IN FLIGHT", "PER DAY", "OPEN BATCHES", "OPEN PIPELINES"), texts)


def remove_limits(stack: Stack, arguments: argparse.Namespace) -> None:
    """Takes an owner's limits away."""
    _owners_limits(stack).remove_limits(_owner_of_limits(arguments))
    print(f"{arguments.owner} has no limits any more, within a minute.", file=sys.stderr)


def _limits_text(limits: OwnerLimits) -> str:
    batches, pipelines = _open(limits)
    given = (
        (limits.in_flight, "in flight"),
        (limits.per_day, "a day"),
        (batches, "open batches"),
        (pipelines, "open pipelines"),
    )
    *first, last = (f"{limit} {name}" for limit, name in given if limit is not None)
    return f"{', '.join(first)} and {last}" if first else last


def _open(limits: OwnerLimits) -> tuple[int | None, int | None]:
    return limits.open_allowed("batch"), limits.open_allowed("pipeline")


def _owner_of_limits(arguments: argparse.Namespace) -> str:
    owner: str = arguments.owner
    if not is_owner(owner):
        raise LimitInvalid(f"The owner {owner[:64]!r} must be 1 to 32 of a-z, 0-9 and '-'.")
    return owner


def _owners_limits(stack: Stack) -> OwnersLimits:
    return OwnersLimits(stack.output("TableName"), stack.client("dynamodb"))


def _limiter(stack: Stack) -> Limiter:
    return Limiter(stack.output("TableName"), stack.client("dynamodb"), max_start_delay_seconds=MAX_START_DELAY_SECONDS)
