"""Output for a person at the terminal: short, aligned lines, coloured only if the terminal shows colours."""

import os
import textwrap
import time
from typing import TextIO

NARROW = 14
WIDTH = 100


class Terminal:
    """Writes lines, with the seconds since its creation next to each step."""

    def __init__(self, stream: TextIO, *, colours: bool | None = None) -> None:
        """Write to `stream`.

        By default a terminal gets colours unless NO_COLOR is set (https://no-color.org).
        """
        self._stream = stream
        self._began = time.monotonic()
        shown = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._colours = shown if colours is None else colours

    @property
    def seconds(self) -> float:
        """Return the seconds since the creation."""
        return time.monotonic() - self._began

    def write(self, text: str = "") -> None:
        """Write text as it is."""
        print(text, file=self._stream, flush=True)

    def title(self, text: str) -> None:
        """Begin a part."""
        self.write()
        self.write(self._paint("1", text))

    def step(self, text: str) -> None:
        """Write the current step and its time."""
        seconds = f"{self.seconds:6.1f} s"
        self.write(f"{self._paint('2', seconds)}  {text}")

    def event(self, name: str, text: str, seconds: float | None = None) -> None:
        """Write an event in one word, with its details and its second."""
        when = "" if seconds is None else f"{seconds:6.1f} s"
        lines = textwrap.wrap(text, WIDTH - NARROW - 12, break_on_hyphens=False) or [""]
        self.write(f"{self._paint('2', when.rjust(8))}  {self._paint('36', name.ljust(NARROW))}{lines[0]}")
        for line in lines[1:]:
            self.write(" " * (NARROW + 10) + line)

    def detail(self, name: str, value: str) -> None:
        """Write one property of the last event, unwrapped, so that it can be copied."""
        self.write(" " * (NARROW + 10) + f"{name.ljust(8)}{value}")

    def figure(self, name: str, value: str, of_what: str) -> None:
        """Write one measured figure and its parts."""
        lines = textwrap.wrap(of_what, WIDTH - NARROW - 20, break_on_hyphens=False) or [""]
        self.write(f"  {name.ljust(NARROW + 4)}{self._paint('1', value.rjust(7))}   {lines[0]}")
        for line in lines[1:]:
            self.write(" " * (NARROW + 16) + line)

    def succeed(self, text: str) -> None:
        """Write a success."""
        self.write(self._paint("32", f"✓ {text}"))

    def refuse(self, text: str) -> None:
        """Write a failure."""
        self.write(self._paint("31", f"✗ {text}"))

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colours and text.strip() else text
