"""The prices of this stack: the book that the layer ships, and over it the stack's own entries, one item of the table.

    prices    book    the stack's own entries as JSON text, at most 64 KiB, with the number of its changes

Written by the command line alone. Each process reads it when it first needs a price, and again when its copy is five
minutes old: the end of a prediction mostly costs no read. While the table does not answer, the copy stays in use; a
process without one leaves costs unknown, since the shipped price may not be the stack's.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.dynamodb import Condition, ConditionFailed, Key, Table
from predictions.errors import PredictionsError
from predictions.money.book import Book, BookInvalid, check_book, parse_book
from predictions.money.cost import Cost, Run, cost_of, not_billed
from predictions.observability import logger

AGE_SECONDS = 300
"""How old the copy of a process may be: until then a change of prices is not seen everywhere."""

_AGAIN_SECONDS = 30
_BOOK = Key("prices", "book")
_SHIPPED = Path(__file__).with_name("prices.json")


class PricesChanged(PredictionsError):
    """Another command has changed the prices at the same time; nothing was written."""


@cache
def shipped() -> Mapping[str, Any]:
    """Return the entries that the layer ships; they are checked when it is built."""
    entries: dict[str, Any] = json.loads(_SHIPPED.read_text(encoding="ascii"))
    return entries


class StackPrices:
    """The prices of a stack, and what predictions cost by them.

    Args:
        table: The table with the stack's own entries.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._book: Book | None = None
        self._until = float("-inf")

    def cost_of(self, run: Run, now: float) -> Cost:
        """Compute what a prediction cost; never raises, since no end of a prediction may depend on it."""
        if free := not_billed(run):
            return free
        book = self.current(now)
        if book is None:
            return Cost(None, "The prices of this stack could not be read.")
        return cost_of(run, book)

    def current(self, now: float) -> Book | None:
        """Return all prices of the stack, at most five minutes old; None if they could never be read."""
        if not self._until - AGE_SECONDS <= now < self._until:
            self._read(now)
        return self._book

    def book(self, *, consistent: bool = True) -> Book:
        """Read all prices of the stack, shipped ones and its own.

        Args:
            consistent: Whether to see all changes before; False costs half.

        Raises:
            BookInvalid: The stack's own entries are no JSON object, as after a manual edit.
        """
        return Book({**shipped(), **self.own_entries(consistent=consistent)[0]})

    def own_entries(self, *, consistent: bool = True) -> tuple[dict[str, Any], int]:
        """Read the stack's own entries, and the number of their changes; `consistent` and errors as for `book`."""
        item = self._table.get_item(_BOOK, consistent=consistent) or {"json": "{}", "changes": 0}
        try:
            entries = json.loads(item["json"])
        except (KeyError, TypeError, ValueError) as error:
            raise BookInvalid("book", f"is not JSON: {error}") from None
        if not isinstance(entries, dict):
            raise BookInvalid("book", "must be an object of entries by key.")
        return entries, int(item.get("changes", 0))

    def write_entries(self, change: Callable[[dict[str, Any]], Mapping[str, Any]], now: float | None = None) -> None:
        """Change the stack's own entries.

        Twice: the second finds what the first wrote, and writes the same. Two commands at the same time: one of them
        is refused.

        Args:
            change: Returns the entries that shall be there, of those that are there.
            now: The time, by default this moment.

        Raises:
            BookInvalid: The result is no book: nothing was written.
            PricesChanged: Another command came in between.
        """
        there, changes = self.own_entries()
        text = json.dumps(check_book(dict(change(there))), separators=(",", ":"), sort_keys=True)
        parse_book(text)  # its size
        item = {"json": text, "changes": changes + 1, "changed_at": int(time.time() if now is None else now)}
        unchanged = Condition("attribute_not_exists(pk) OR changes = :changes", changes=changes)
        try:
            self._table.put_item(_BOOK, item, unchanged)
        except ConditionFailed:
            raise PricesChanged("Another command has changed the prices at the same time. Repeat this one.") from None

    def _read(self, now: float) -> None:
        try:
            self._book = self.book(consistent=False)
            self._until = now + AGE_SECONDS
        except (BookInvalid, ClientError, BotoCoreError) as error:
            logger.warning("prices not read", reason=str(error), stale=self._book is not None)
            self._until = now + _AGAIN_SECONDS
