"""Aligned tables and bars of text."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

BAR_WIDTH = 32
NOTE_WIDTH = 110


class BenchmarkFailed(Exception):
    """Something did not work, so that what was measured means nothing; the message says what."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table: its first column is aligned to the left, the others to the right."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    shown = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return _indented([shown[0], "  ".join("─" * width for width in widths), *shown[1:]])


def bars(values: Mapping[str, float], number: str = "{:,.0f}") -> str:
    """One bar for each value; the largest takes the whole width."""
    largest = max(values.values())
    names = max(map(len, values))
    numbers = [number.format(value) for value in values.values()]
    digits = max(map(len, numbers))
    return _indented(
        f"{name.ljust(names)}  {shown.rjust(digits)}  {'█' * round(BAR_WIDTH * value / largest) or '▏'}"
        for (name, value), shown in zip(values.items(), numbers, strict=True)
    )


def note(text: str) -> str:
    """An explanation below a table."""
    return "\n" + textwrap.fill(text, NOTE_WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}".rstrip() for line in lines)
