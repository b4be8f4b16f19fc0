"""The pages of the documentation: sections, tables, commands."""

import re

from tests.support.template import ROOT

BLOCKS = re.compile(r"^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
# All that people read: the README, what stands beside it, and every page of docs/.
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md", "llms.txt")),
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def section(page: str, title: str) -> str:
    """The text below a heading of a page, up to the next one of its rank or a higher one."""
    text = BLOCKS.sub("", (ROOT / page).read_text())
    heading = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    assert heading, f"{page} has no section {title!r}"
    following = re.compile(rf"^#{{1,{len(heading[1])}}} ", re.MULTILINE).search(text, heading.end())
    return text[heading.end() : following.start() if following else len(text)]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without their headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    ruled = [number for number, line in enumerate(lines) if re.fullmatch(r"[|: -]+", line)]
    skipped = {number for rule in ruled for number in (rule - 1, rule)}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for number, line in enumerate(lines)
        if number not in skipped
    ]


def code(text: str) -> list[str]:
    """What a text shows as code: `like this`."""
    return re.findall(r"`([^`]+)`", text)
