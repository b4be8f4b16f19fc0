"""docs/reliability.md names tests that are there, and says of them what they recorded."""

import ast
import re
from pathlib import Path

import pytest

from tests.reliability import OUT_OF_DATE, PAGE, PROMISES, NotShown, Promise, Ran, Shown, of, page, read
from tests.support.template import ROOT

NAMED = sorted({test for promise in PROMISES for shown in promise.shown for test in shown.tests})


@pytest.mark.parametrize("test", NAMED)
def test_test_that_shows_something_is_there(test: str) -> None:
    path, *names = test.split("::")
    scope: ast.AST = ast.parse((ROOT / path).read_text())
    for name in names:
        found = [each for each in ast.iter_child_nodes(scope) if getattr(each, "name", None) == name]
        assert found, f"{name} is not in {path}"
        scope = found[0]


def test_page_has_every_promise_with_what_shows_it() -> None:
    text = PAGE.read_text()
    assert re.findall(r"^## \d+\. (.*)$", text, re.MULTILINE) == [promise.text for promise in PROMISES], (
        "run make reliability"
    )
    rows = re.findall(r"^\| (.*?) \| \[", text, re.MULTILINE)
    assert rows == [shown.what for promise in PROMISES for shown in promise.shown], "run make reliability"


def report(path: Path, *cases: str) -> Path:
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def case(name: str, seconds: float = 1.0, inside: str = "") -> str:
    return (
        f'<testcase classname="tests.unit.repository.test_reliability" name="{name}" time="{seconds}">'
        f"{inside}</testcase>"
    )


def recorded(name: str, value: int) -> str:
    return f'<properties><property name="{name}" value="{value}"/></properties>'


def test_parameters_of_a_test_are_added_up(tmp_path: Path) -> None:
    told = report(
        tmp_path / "r.xml",
        case("test_one[a]", 1.5, recorded("calls", 3)),
        case("test_one[b::c.d]", 2.0, recorded("calls", 4)),
        case("test_other", 4.0),
        case("test_skipped", 0, "<skipped/>"),
    )
    ran = read(told)
    assert sorted(ran) == [
        "tests/unit/repository/test_reliability.py::test_one",
        "tests/unit/repository/test_reliability.py::test_other",
    ]
    one = of(Shown("it holds", ["tests/unit/repository/test_reliability.py::test_one"]), ran)
    assert (one.tests, one.seconds, one.figures) == (2, 3.5, {"calls": 7})
    whole = of(Shown("it holds", ["tests/unit/repository/test_reliability.py"]), ran)
    assert (whole.tests, whole.seconds) == (3, 7.5)


@pytest.mark.parametrize("how", ["failure", "error"])
def test_nothing_is_shown_by_a_test_that_fails(tmp_path: Path, how: str) -> None:
    with pytest.raises(NotShown, match="test_one failed"):
        read(report(tmp_path / "r.xml", case("test_one", 1, f"<{how}/>")))


def test_nothing_is_shown_by_a_test_that_did_not_run() -> None:
    ran = {"tests/unit/repository/test_reliability.py::test_one_more": Ran(1)}
    with pytest.raises(NotShown, match=r"test_one did not run"):
        of(Shown("it holds", ["tests/unit/repository/test_reliability.py::test_one"]), ran)


def test_row_has_the_figures_and_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    test = "tests/unit/repository/test_reliability.py::test_one"
    monkeypatch.setattr("tests.reliability.PROMISES", [Promise("It ends", [Shown("It holds", [test])])])
    ran = {test: Ran(2, 3.25)}
    ran[test].figures["schedules"] = 5000
    written = page(ran, {"unit": 60.4})
    row = f"| It holds | [`{test}`](../tests/unit/repository/test_reliability.py) | 2 tests, 5,000 schedules | 3.2 |"
    assert row in written.splitlines()
    assert "| `make unit` | 2 | 60 |" in written.splitlines()


@pytest.mark.parametrize("test", OUT_OF_DATE)
def test_page_can_be_written_though_it_is_out_of_date(test: str) -> None:
    path, _, name = test.partition("::")
    function, _, case = name.partition("[")
    assert f"def {function}(" in (ROOT / path).read_text()
    assert not case or (ROOT / case.removesuffix("]")).exists()
