"""docs/security.md names what is there: paths, tests, functions, secrets; and the audit can read its exceptions."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from local import findings
from tests.support.library import LIBRARY, modules
from tests.support.pages import BLOCKS, code, rows
from tests.support.template import ROOT, folder_name, load_template, resources

PAGE = BLOCKS.sub("", (ROOT / "docs" / "security.md").read_text())
NAMED = sorted({name for name in code(PAGE) if re.fullmatch(r"[\w./-]+\.(py|yaml|json|md|txt)(::[\w:]+)?", name)})


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no section {title!r}"
    return found[1]


@cache
def in_file(path: Path) -> set[str]:
    """The tests of a file, those of classes as `Class::test`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


def is_module(path: str) -> bool:
    """Whether a path is a module's in the library: `table.py`, or `package/module.py`."""
    return LIBRARY / path in modules().values()


@pytest.mark.parametrize("name", NAMED)
def test_path_or_test_that_the_page_names_is_there(name: str) -> None:
    path, _, test = name.partition("::")
    file = LIBRARY / path if is_module(path) else ROOT / path
    assert file.is_file()
    assert not test or test in in_file(file)


def test_page_names_tests_and_modules() -> None:
    assert len([name for name in NAMED if "::test_" in name]) > 20
    assert len([name for name in NAMED if is_module(name)]) > 25


def test_every_promise_has_a_module_and_a_test() -> None:
    promises = rows(section("What is promised"))
    assert len(promises) > 20
    for _, tries, keeps, where, shown in promises:
        assert tries
        assert keeps
        assert set(code(where)) <= set(NAMED)
        assert code(where)
        assert any(name.startswith("tests/") for name in code(shown))


def test_table_of_functions_names_those_of_the_template_and_no_others() -> None:
    found = [name for row in rows(section("What each function may do")) for name in code(row[0])]
    assert sorted(found) == sorted(folder_name(name) for name in resources("AWS::Serverless::Function"))


def test_table_of_secrets_names_those_of_the_template() -> None:
    places = [name for row in rows(section("Secrets")) for name in code(row[1])]
    assert set(resources("AWS::SecretsManager::Secret")) <= set(places)


def test_readers_of_secrets_are_those_that_the_policies_let() -> None:
    functions = load_template()["Resources"]
    for secret in ("SigningSecret", "WebhookMasterSecret", "LinkSecret"):
        (row,) = [row for row in rows(section("Secrets")) if f"`{secret}`" in row[1]]
        readers = {
            folder_name(name)
            for name in resources("AWS::Serverless::Function")
            if secret in str(functions[name]["Properties"]["Policies"])
        }
        assert set(code(row[2])) == readers


def test_exceptions_of_the_page_are_those_that_the_audit_reads() -> None:
    exceptions = findings.explained(PAGE)
    assert len(exceptions) == len(rows(section("Exceptions")))
    assert len({each.check for each in exceptions}) == len(exceptions)
    assert all(each.resources and each.why.endswith(".") for each in exceptions)
