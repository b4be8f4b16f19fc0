"""Logs that the emulator does not keep: files in `logs` of the directory in which it was started."""

from pathlib import Path

FOLDER = Path("logs").absolute()


def append(name: str, text: str) -> None:
    """Append lines to a log in one write, so that lines of several threads do not mix."""
    with (FOLDER / name).open("a") as file:
        file.write(f"{text.rstrip()}\n")
