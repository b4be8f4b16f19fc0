"""Hook of the docs site: turn links that leave docs/ into links into the repository.

mkdocs runs this file in the environment of the site, so only the standard library is imported. A link whose
target does not exist stays as it is, and mkdocs fails on it, since the build is strict.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001  # names from mkdocs
    """Return a page's text with its links into the code as repository URLs."""
    folder = (Path(config["docs_dir"]) / page.file.src_uri).parent
    return linked(markdown, folder, Path(config["docs_dir"]), config["repo_url"])


def linked(markdown: str, folder: Path, docs: Path, repository: str) -> str:
    """Return a text with links that leave `docs` as repository URLs, except in code.

    Args:
        markdown: The text.
        folder: The folder of its page.
        docs: The folder of all pages.
        repository: The address of the repository.
    """

    def replaced(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[1]))
        if target.is_relative_to(docs) or not target.is_relative_to(CHECKOUT) or not target.exists():
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{repository.rstrip('/')}/{kind}/main/{target.relative_to(CHECKOUT).as_posix()}{link[2] or ''}"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])
