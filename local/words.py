"""Check the words of code, template and docs: ``python -m local.words``, part of ``make lint``.

The refused words have no honest use here: each replaces a plain term. CONTRIBUTING.md has the rules that no
program can check.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
# Tests are left out: their names and docstrings are checked by readers.
ROOTS = (
    ".ci",
    ".github",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "docs",
    "events",
    "functions",
    "layers",
    "llms.txt",
    "local",
    "mkdocs.yml",
    "prices",
    "pyproject.toml",
    "recipes",
    "samconfig.toml",
    "statemachine",
    "template.yaml",
)
SUFFIXES = frozenset({"", ".json", ".md", ".py", ".tf", ".toml", ".ts", ".tsx", ".txt", ".yaml", ".yml"})
# This file lists the words.
ITSELF = "local/words.py"
# By pattern: the plain words instead. A space matches any white space, also in a wrapped comment.
REFUSED = {
    "mend(s|ed|ing)?": "fix",
    "anew": "again",
    "whoever": "name the caller, function or principal",
    "(is|are|was|were|be|been) told( of)?": "receives, is notified",
    "there (is|are|was|were) none": "not found, if any, or None if …",
    "(stands?|stood|standing) still": "stalled",
    "(moved|moves) on": "changed, recovered, continues",
    "(die|dies|died|dying) over": "crash",
    "(write|writes|wrote|written|writing) (it |them |this |that )?down": "store, record",
    "whose (it|they) (is|are)": "its owner",
    "nobody (learns|is told)": "say who cannot see it",
    "none of ours": "not of this stack",
    "(become|becomes|became) of": "result, status",
    "what is (noted|known|kept) of": "record",
    "of a stranger's making": "untrusted",
}
_SPACE = r"[\s#>*]+"
PATTERNS = {
    re.compile(f"(?<![a-z])(?:{pattern.replace(' ', _SPACE)})(?![a-z])", re.IGNORECASE): instead
    for pattern, instead in REFUSED.items()
}


def main() -> int:
    """Print every refused word with its place; return the exit status."""
    files = list(texts(CHECKOUT))
    found = [line for name, text in files for line in complaints(name, text)]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    print(f"words: {len(files)} files, {len(found)} refused words")
    return 1 if found else 0


def texts(checkout: Path) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every file to check, without the pending ones."""
    for root in ROOTS:
        for path in sorted([checkout / root, *(checkout / root).rglob("*")]):
            name = path.relative_to(checkout).as_posix()
            if path.is_file() and path.suffix in SUFFIXES and name != ITSELF:
                yield name, path.read_text()


def complaints(name: str, text: str) -> Iterator[str]:
    """Yield one line for each refused word in a text."""
    for pattern, instead in PATTERNS.items():
        for match in pattern.finditer(text):
            if match[0].endswith("None"):  # Python's: `there is None`
                continue
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: write instead of {' '.join(match[0].split())!r}: {instead}"


if __name__ == "__main__":
    sys.exit(main())
