"""Commands for prices: what the stack computes costs by, which are missing, and costs of what has ended without one."""

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from predictions.aws.dynamodb import Table
from predictions.cli.stack import JsonList, NotDone, Stack, command, group, line, print_table, second
from predictions.ids import OWNER_RULE, is_owner
from predictions.money.book import Book, BookInvalid, PriceEntry, parse_book
from predictions.money.cost import Cost, cost_of
from predictions.money.stored import StackPrices, shipped
from predictions.money.unknown import UnknownCosts
from predictions.status import rank_of
from predictions.store.endings import cost_without_report
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

app = group("Set the prices that costs are computed by, and find those that are missing.")

_FILE_LIMIT_BYTES = 1024 * 1024

_Key = Annotated[
    str | None,
    typer.Argument(
        metavar="KEY",
        help="owner/name, owner/name:version, deployment:owner/name, training:owner/name or hardware:sku.",
    ),
]


@command(
    app,
    "set",
    example="prices set google/veo-3 video_output_duration_seconds=0.40 --when model_variant=with_audio --stack NAME",
)
def set_price(
    stack: Stack,
    key: _Key = None,
    prices: Annotated[
        list[str] | None,
        typer.Argument(metavar="METRIC=DOLLARS", help="Dollars for one unit; for hardware second=DOLLARS."),
    ] = None,
    when: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=VALUE", help="Only for predictions with this metric; also several times."),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="SKU", help="Bill predict_time by the price of this hardware.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Link to where the price was read (default: its page).")] = None,
    read_at: Annotated[
        str | None, typer.Option("--date", metavar="YYYY-MM-DD", help="When it was read (default: today).")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON file with entries by key, to set them all.")
    ] = None,
) -> None:
    """Set an entry of the stack's prices.

    Without --when, the prices apply to all predictions of the key, and replace those that it had. With --when, only
    the tier of these values is replaced or added.
    """
    book = StackPrices(_table(stack))
    which = key
    if file is not None:
        if key is not None:
            raise NotDone("Name either KEY, or --file with the entries of several.")
        entries = _read_file(file)
        book.write_entries(lambda there: {**there, **entries})
        which = f"{len(entries)} entries"
    elif key is None:
        raise NotDone("Name the KEY to set, for example google/veo-3, or --file with entries.")
    else:
        named, criteria = _pairs(prices or [], "METRIC=DOLLARS"), _pairs(when or [], "METRIC=VALUE")
        head = {"date": read_at or datetime.now(UTC).date().isoformat(), "source": source or _page(key)}

        def change(there: dict[str, Any]) -> dict[str, Any]:
            known = {**shipped(), **there}.get(key, {})
            return {**there, key: {**head, **_prices(key, named, criteria, hardware, known)}}

        book.write_entries(change)
    print(f"Set {which}: in use everywhere within 5 minutes.", file=sys.stderr)


@command(app, "remove", example="prices remove google/veo-3 --stack NAME")
def remove_price(stack: Stack, key: Annotated[str, typer.Argument(metavar="KEY", help="As for `set`.")]) -> None:
    """Remove an entry of the stack's own prices; a price that the stack was delivered with applies again."""
    book = StackPrices(_table(stack))
    if key not in book.own_entries()[0]:
        delivered = " The price that the stack is delivered with cannot be removed: set another one." * (
            key in shipped()
        )
        raise NotDone(f"The stack has no own price of {line(key, 100)!r}.{delivered}")
    book.write_entries(lambda there: {name: entry for name, entry in there.items() if name != key})
    print(f"Removed {key}: everywhere within 5 minutes.", file=sys.stderr)


@command(app, "list", example="prices list --stack NAME")
def list_prices(stack: Stack, as_json: JsonList = False) -> None:
    """List all prices, the stack's own and those that it was delivered with."""
    book = StackPrices(_table(stack))
    own, _ = book.own_entries()
    raw = {**shipped(), **own}
    if as_json:
        listed = [{"key": key, "own": key in own, **raw[key]} for key in sorted(raw)]
        print(json.dumps(listed, indent=2))
        return
    rows = []
    for entry in Book(raw).entries():
        of = "stack" if entry.key in own else "delivered"
        rows += [(entry.key, when, prices, entry.date, of) for when, prices in _tiers(entry)]
    print_table(("KEY", "WHEN", "DOLLARS", "DATE", "OF"), rows)


@command(app, "check", example="prices check --stack NAME")
def check_prices(stack: Stack, as_json: JsonList = False) -> None:
    """List the models that ran at an unknown cost within the last 35 days, with the reason."""
    table = _table(stack)
    found = sorted(UnknownCosts(table).entries(time.time()), key=lambda each: each.last_at, reverse=True)
    book = StackPrices(table).book()
    priced = {each.key for each in found if _has_price(book, each.key)}
    if as_json:
        listed = [
            {
                "key": each.key,
                "reason": each.reason,
                "first_at": second(each.first_at),
                "last_at": second(each.last_at),
                "example": each.example,
                "owners": sorted(each.owners),
                "has_price": each.key in priced,
            }
            for each in found
        ]
        print(json.dumps(listed, indent=2))
        return
    rows = [
        (line(each.key, 100), second(each.last_at), each.example, "yes" if each.key in priced else "no", each.reason)
        for each in found
    ]
    print_table(("KEY", "LAST", "EXAMPLE", "HAS A PRICE", "REASON"), rows)


@command(app, "apply", example="prices apply --since 2026-11-01 --stack NAME")
def apply_prices(
    stack: Stack,
    since: Annotated[
        datetime, typer.Option(formats=["%Y-%m-%d"], help="The day (UTC) since which the predictions were created.")
    ],
    owner: Annotated[
        list[str] | None,
        typer.Option(help="Only predictions of this owner; also several times (default: those of `prices check`)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
) -> None:
    """Compute the costs of predictions that have ended at an unknown one.

    A cost that is known stays. A command that was interrupted is repeated: it finds what is left.
    """
    if wrong := [each for each in owner or [] if not is_owner(each)]:
        raise NotDone(f"The owner {wrong[0][:64]!r} must be {OWNER_RULE}.")
    owners = owner or sorted(
        {name for each in UnknownCosts(_table(stack)).entries(time.time()) for name in each.owners}
    )
    if not owners:
        print(
            "No unknown cost is recorded. Name an --owner to look at predictions of earlier releases.", file=sys.stderr
        )
        return
    table = stack.table
    book = StackPrices(_table(stack)).book()
    priced, micro_dollars, unknown = 0, 0, 0
    for prediction in _without_cost(table, owners, since.replace(tzinfo=UTC), time.time()):
        cost = _cost(prediction, book)
        if cost.micro_dollars is None:
            unknown += 1
        elif dry_run or table.price_later(prediction, cost):
            priced += 1
            micro_dollars += cost.micro_dollars
    did = "Would write" if dry_run else "Wrote"
    print(f"{did} the cost of {priced} predictions, ${micro_dollars / 1e6:.6f} in all; {unknown} stay unknown.")


def _without_cost(table: PredictionsTable, owners: list[str], since: datetime, now: float) -> Iterator[Prediction]:
    for owner in owners:
        for kind in ("prediction", "training"):
            for prediction in table.created_since(owner, kind, since):
                # An expired item is about to be removed, and may be replaced by one of the same key.
                if prediction.terminal and prediction.cost_micro_dollars is None and not prediction.expired(now):
                    yield prediction


def _cost(prediction: Prediction, book: Book) -> Cost:
    if prediction.upstream_id and rank_of(prediction.run.status) == rank_of(prediction.status):
        return cost_of(prediction.run, book)
    return cost_without_report(prediction, not_accepted=prediction.refusal_json is not None)


def _prices(
    key: str, named: dict[str, str], criteria: dict[str, str], hardware: str | None, known: dict[str, Any]
) -> dict[str, Any]:
    """Return the prices of an entry in the words of the command; they are checked when they are written.

    Args:
        key: The key.
        named: Dollars by metric.
        criteria: Values by metric.
        hardware: The sku.
        known: The entry that applies now.
    """
    if key.startswith("hardware:"):
        if criteria or hardware or named.keys() != {"second"}:
            raise NotDone("The price of hardware is that of a second alone: prices set hardware:SKU second=DOLLARS.")
        return dict(named)
    when = {name: _value(value) for name, value in criteria.items()}
    tier: dict[str, Any] = {
        **({"when": when} if when else {}),
        **({"prices": named} if named else {}),
        **({"hardware": hardware} if hardware else {}),
    }
    if not when:
        return {"tiers": [tier]}
    others = [each for each in known.get("tiers", []) if each.get("when", {}) != when]
    # The tier that always applies stays last.
    return {"tiers": [*(t for t in others if t.get("when")), tier, *(t for t in others if not t.get("when"))]}


def _read_file(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _FILE_LIMIT_BYTES:
        raise NotDone(f"{file} has more than {_FILE_LIMIT_BYTES} bytes.")
    try:
        return parse_book(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise NotDone(f"{file} is not UTF-8.") from None


def _pairs(texts: list[str], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise NotDone(f"{line(text, 100)!r} must have the form {form}.")
        pairs[name] = value
    return pairs


def _value(text: str) -> str | bool | int:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else text


def _page(key: str) -> str:
    kind, _, name = key.partition(":")
    if kind == "hardware":
        return "https://replicate.com/pricing"
    if kind in ("deployment", "training"):
        return f"https://replicate.com/{'deployments/' if kind == 'deployment' else ''}{name.partition(':')[0]}"
    return f"https://replicate.com/{kind}"


def _has_price(book: Book, key: str) -> bool:
    try:
        return book.find(key) is not None
    except BookInvalid:
        return False


def _tiers(entry: PriceEntry) -> Iterator[tuple[str, str]]:
    if entry.second is not None:
        yield "", f"second={entry.second:f}"
    for tier in entry.tiers:
        when = " ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in tier.when.items())
        prices = [f"{name}={price:f}" for name, price in tier.prices.items()]
        yield when, " ".join([*prices, *([f"predict_time by {tier.hardware}"] if tier.hardware else [])])


def _table(stack: Stack) -> Table:
    return Table(stack.output("TableName"), stack.client("dynamodb"))
