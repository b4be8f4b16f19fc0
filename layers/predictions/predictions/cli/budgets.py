"""Commands for budgets: dollars of a day and a month, for owners and for the whole stack."""

import json
import re
import sys
import time
from decimal import Decimal
from typing import Annotated, Any

import typer

from predictions.admission.quotas import BUDGET_NAMES, OwnersLimits
from predictions.admission.rate_limiter import MAX_START_DELAY_SECONDS, Limiter
from predictions.aws.dynamodb import Table
from predictions.cli.stack import JsonList, NotDone, Stack, command, group, print_table
from predictions.clock import rfc3339
from predictions.ids import OWNER_RULE, is_owner
from predictions.money.budgets import (
    BUDGET_LIMIT,
    STACK,
    UNKNOWN_PRICE_DEFAULT,
    MoneyBudget,
    dollars,
    used_in,
    used_key,
)

app = group("Bound what owners, or the whole stack, spend at Replicate in a day and a month.")

_DOLLARS = re.compile(r"(?:0|[1-9][0-9]{0,6})(?:\.[0-9]{1,6})?", re.ASCII)

_Owner = Annotated[str | None, typer.Argument(metavar="OWNER", help="The owner; none with --whole-stack.")]
_Whole = Annotated[bool, typer.Option("--whole-stack", help="The budget of all owners together.")]


@command(app, "set", example="budgets set alice --day 20 --month 300 --stack NAME")
def set_budget(
    stack: Stack,
    owner: _Owner = None,
    whole_stack: _Whole = False,
    day: Annotated[str | None, typer.Option(metavar="DOLLARS", help="For a day (UTC).")] = None,
    month: Annotated[str | None, typer.Option(metavar="DOLLARS", help="For a month (UTC).")] = None,
    unknown_price: Annotated[
        str | None,
        typer.Option(metavar="DOLLARS", help="What a run at an unknown price counts (default: 0.10, or as it was)."),
    ] = None,
) -> None:
    """Set a budget. Amounts that are not named stay as they are.

    A start whose estimate does not fit into each budget is refused; runs that were started before it was set do not
    count.
    """
    given = {"budget_day": day, "budget_month": month, "budget_unknown": unknown_price}
    values = {name: _amount(name, text) for name, text in given.items() if text is not None}
    if not values:
        raise NotDone("Give at least one of --day, --month and --unknown-price; `budgets remove` takes a budget away.")
    of = _whose(owner, whole=whole_stack)
    if of == STACK:
        limiter = _limiter(stack)
        limiter.change_stack_budget(set_=values, unless_set={"budget_unknown": UNKNOWN_PRICE_DEFAULT})
        state = limiter.limiter_state()
        found = _budget(STACK, state.budget_day or None, state.budget_month or None, state.budget_unknown)
    else:
        limits = _owners(stack).set_budget(of, values)
        found = _budget(of, limits.budget_day, limits.budget_month, limits.budget_unknown)
    if not found:
        raise NotDone(f"{_name(of)} has no budget yet: give --day or --month.")
    amounts = [f"{dollars(limit)} a {period}" for period, limit in _periods(found)]
    print(f"The budget of {_name(of)} is {' and '.join(amounts)}, within a minute.", file=sys.stderr)


@command(app, "list", example="budgets list --stack NAME")
def list_budgets(stack: Stack, as_json: JsonList = False) -> None:
    """List the budgets, with what is used of them: spent, and reserved for what runs."""
    table, today = Table(stack.output("TableName"), stack.client("dynamodb")), rfc3339(time.time())[:10]
    state = _limiter(stack).limiter_state()
    budgets = [_budget(STACK, state.budget_day or None, state.budget_month or None, state.budget_unknown)]
    for owner, limits in _owners(stack).list_budgets():
        budgets.append(_budget(owner, limits.budget_day, limits.budget_month, limits.budget_unknown))
    listed: list[dict[str, Any]] = []
    for budget in filter(None, budgets):
        item = table.get_item(used_key(budget.owner, today)) or {}
        used = dict(used_in(item, today))
        listed.append(
            {
                "budget": "owner" if budget.owner else "stack",
                "owner": budget.owner or None,
                **{f"{period}_micro_dollars": limit for period, limit in _periods(budget)},
                **{f"{period}_used_micro_dollars": used[period] for period, _ in _periods(budget)},
                "month_unknown_micro_dollars": int(item.get("unknown", 0)),
                "unknown_price_micro_dollars": budget.unknown_price,
            }
        )
    if as_json:
        print(json.dumps(listed, indent=2))
        return
    rows = [
        (
            each["owner"] or "(whole stack)",
            *(
                f"{dollars(each[f'{period}_used_micro_dollars'])} of {dollars(each[f'{period}_micro_dollars'])}"
                if f"{period}_micro_dollars" in each
                else "-"
                for period in ("day", "month")
            ),
            dollars(each["month_unknown_micro_dollars"]),
            dollars(each["unknown_price_micro_dollars"]),
        )
        for each in listed
    ]
    print_table(("OWNER", "DAY", "MONTH", "AT UNKNOWN PRICES", "UNKNOWN PRICE"), rows)


@command(app, "remove", example="budgets remove alice --stack NAME")
def remove_budget(stack: Stack, owner: _Owner = None, whole_stack: _Whole = False) -> None:
    """Remove a budget. What runs is settled all the same."""
    of = _whose(owner, whole=whole_stack)
    if of == STACK:
        _limiter(stack).change_stack_budget(remove=BUDGET_NAMES)
    else:
        _owners(stack).remove_limits(of, BUDGET_NAMES)
    print(f"The budget of {_name(of)} is removed, within a minute.", file=sys.stderr)


def _amount(name: str, text: str) -> int:
    """Return micro-dollars of a text in dollars."""
    option = {"budget_day": "--day", "budget_month": "--month", "budget_unknown": "--unknown-price"}[name]
    micro_dollars = int(Decimal(text) * 10**6) if _DOLLARS.fullmatch(text) else -1
    least = 0 if name == "budget_unknown" else 1
    if not least <= micro_dollars <= BUDGET_LIMIT:
        raise NotDone(
            f"{option} must be dollars {'of at least 0' if least == 0 else 'above 0'}, at most {BUDGET_LIMIT // 10**6},"
            f" with at most 6 decimals, such as 12.50 (got {text[:40]!r})."
        )
    return micro_dollars


def _whose(owner: str | None, *, whole: bool) -> str:
    if whole == (owner is not None):
        raise NotDone("Name either OWNER, or --whole-stack.")
    if owner is not None and not is_owner(owner):
        raise NotDone(f"The owner {owner[:64]!r} must be {OWNER_RULE}.")
    return owner or STACK


def _name(owner: str) -> str:
    return owner or "the whole stack"


def _budget(owner: str, day: int | None, month: int | None, unknown: int | None) -> MoneyBudget:
    return MoneyBudget(owner, day, month, UNKNOWN_PRICE_DEFAULT if unknown is None else unknown)


def _periods(budget: MoneyBudget) -> list[tuple[str, int]]:
    return [(name, limit) for name, limit in (("day", budget.day), ("month", budget.month)) if limit is not None]


def _owners(stack: Stack) -> OwnersLimits:
    return OwnersLimits(stack.output("TableName"), stack.client("dynamodb"))


def _limiter(stack: Stack) -> Limiter:
    return Limiter(stack.output("TableName"), stack.client("dynamodb"), max_start_delay_seconds=MAX_START_DELAY_SECONDS)
