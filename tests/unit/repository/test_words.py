"""The check of words in `make lint` sees every file, and finds a refused word wherever it stands."""

import re

import pytest

from local import words
from tests.support.template import ROOT

PLANTED = [
    ("A comment on how to mend it.", 1, "'mend'"),
    ("def _mend() -> None:", 1, "'mend'"),
    ("Fine.\n\nWhoever asks is answered.", 3, "'Whoever'"),
    ("# The caller is\n# told of it.", 1, "'is # told of'"),
    ("It begins anew.", 1, "'anew'"),
    ("None where there is none.", 1, "'there is none'"),
    ("> who is\n> told", 1, "'is > told'"),
]
HONEST = ["if there is None:", "recommend", "amendments", "is toldable", "a new one", "manewer", "there is no route"]


@pytest.mark.parametrize(("text", "line", "word"), PLANTED)
def test_planted_word_is_found_with_its_line(text: str, line: int, word: str) -> None:
    found = list(words.complaints("docs/x.md", text))
    assert len(found) == 1
    assert found[0].startswith(f"docs/x.md:{line}: write instead of {word}: ")


@pytest.mark.parametrize("text", HONEST)
def test_word_within_another_one_is_not_refused(text: str) -> None:
    assert not list(words.complaints("docs/x.md", text))


@pytest.mark.parametrize("pattern", words.REFUSED)
def test_every_refused_word_is_found_in_a_text(pattern: str) -> None:
    one = re.sub(r"\(([^|()]+)(\|[^()]+)*\)\??", r"\1", pattern).replace("s?", "s")
    assert list(words.complaints("x.py", f"# before {one} after")), one


def test_every_kind_of_file_is_seen_and_only_the_list_of_words_is_left_out() -> None:
    seen = {name for name, _ in words.texts(ROOT)}
    assert len(seen) > 350
    for name in (
        ".ci/run", "AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "llms.txt", "mkdocs.yml",
        "pyproject.toml", "docs/runbook.md", "docs/decisions/README.md", "events/run_prediction/prompt.json",
        "functions/start_prediction/app.py", "layers/predictions/Makefile", "statemachine/track_prediction.asl.json",
        "layers/predictions/predictions/api/openapi.yaml", "layers/predictions/predictions/errors.py",
        "local/demo.py", "local/replicate/front.py", "template.yaml", "samconfig.toml", ".github/workflows/test.yml",
    ):  # fmt: skip
        assert name in seen, name
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "layers/predictions/predictions").rglob("*.py")}
    assert library <= seen
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "local").rglob("*.py")} - seen == {words.ITSELF}


def test_command_fails_on_a_word_and_counts_the_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(words, "texts", lambda _: iter([("a.md", "fine"), ("b.md", "to mend")]))
    assert words.main() == 1
    written = capsys.readouterr()
    assert written.err == "b.md:1: write instead of 'mend': fix\n"
    assert written.out == "words: 2 files, 1 refused words\n"
    monkeypatch.setattr(words, "texts", lambda _: iter([("a.md", "fine")]))
    assert words.main() == 0
