"""Usage over HTTP: the query of `GET /usage`, and its response as JSON or CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from predictions.money.usage import ENDS
from predictions.validation import fields_refused

GROUPS = ("owner", "model", "day", "label")
PARAMETERS = ("from", "to", "by", "format")
MONTHS_LIMIT = 13

# What a spreadsheet takes for a formula if it comes first.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class UsageQuery:
    """What usage is asked for: the days from `first` to `last` in UTC, grouped `by`."""

    first: date
    last: date
    by: tuple[str, ...]
    csv: bool

    @classmethod
    def read(cls, query: Mapping[str, str], today: date, accept: str = "") -> "UsageQuery":
        """Parse the parameters `from`, `to`, `by` and `format`.

        Args:
            query: The parameters that are given. By default, the days of this month until today, by day, as JSON.
            today: The day in UTC.
            accept: The header Accept: `text/csv` is as `format=csv`.

        Raises:
            Problem: 422 that names each invalid field.
        """
        invalid: list[dict[str, str]] = []

        def refuse(field: str, detail: str) -> None:
            invalid.append({"field": field, "detail": detail})

        def day(name: str, default: date) -> date:
            text = query.get(name)
            try:
                if text is None or re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
                    return default if text is None else date.fromisoformat(text)
            except ValueError:
                pass  # no day of the calendar
            refuse(name, f"Must be a day in UTC, such as 2026-12-01 (got {(text or '')[:50]!a}).")
            return default

        last = day("to", today)
        first = day("from", last.replace(day=1))
        if not invalid and first > last:
            refuse("from", f"Must not be after `to` (got {first} and {last}).")
        elif not invalid and _months(first, last) > MONTHS_LIMIT:
            refuse("from", f"Must be at most {MONTHS_LIMIT} months before `to` (got {first} and {last}).")
        by = tuple(dict.fromkeys(query.get("by", "day").split(",")))
        if unknown := [name for name in by if name not in GROUPS]:
            refuse("by", f"Must be some of `owner`, `model`, `day` and `label`, with commas (got {unknown[0][:50]!a}).")
        elif {"model", "label"} <= set(by):
            refuse("by", "Must have `model` or `label`, not both: they are counted apart.")
        form = query.get("format", "csv" if _wants_csv(accept) else "json")
        if form not in ("json", "csv"):
            refuse("format", f"Must be `json` or `csv` (got {form[:50]!a}).")
        if invalid:
            raise fields_refused(invalid)
        return cls(first, last, by, form == "csv")

    def body(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the response's body for rows of `money.usage.read_usage`."""
        return {"from": f"{self.first}", "to": f"{self.last}", "by": list(self.by), "results": list(rows)}


def usage_csv(by: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV (RFC 4180); an unknown cost is an empty field."""
    text = io.StringIO()
    numbers = ("predict_seconds", "cost_micro_dollars", "cost_unknown")
    writer = csv.writer(text)
    writer.writerow([*by, *ENDS, "cached", *numbers])
    for row in rows:
        ends = row["predictions"]
        # Labels are the caller's text: none is a formula for who opens the file.
        groups = [f"'{row[name]}" if row[name].startswith(_FORMULA) else row[name] for name in by]
        writer.writerow([*groups, *(ends[end] for end in (*ENDS, "cached")), *(row[name] for name in numbers)])
    return text.getvalue()


def _months(first: date, last: date) -> int:
    """Return how many months the days reach into from the day of `first` on, the last one begun counted whole."""
    return (last.year - first.year) * 12 + last.month - first.month + (1 if last.day >= first.day else 0)


def _wants_csv(accept: str) -> bool:
    return any(part.split(";")[0].strip().lower() == "text/csv" for part in accept.split(","))
