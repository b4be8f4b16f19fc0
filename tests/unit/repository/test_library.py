"""The library's modules: each is found, imported and checked."""

import ast
import pkgutil
import tomllib

import grimp
import predictions

from tests.support import library
from tests.support.code_reach import imported
from tests.support.template import ROOT, folder_name, resources


def test_python_finds_exactly_the_modules_that_tests_read() -> None:
    found = {each.name for each in pkgutil.walk_packages(predictions.__path__, "predictions.")}
    assert found | {"predictions"} == set(library.modules())


def test_import_linter_sees_every_module() -> None:
    graph = grimp.build_graph("predictions", cache_dir=None)
    assert graph.modules == set(library.modules())
    assert graph.count_imports() > 3 * len(graph.modules)


def test_layers_name_every_module_below_the_package() -> None:
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = {each.strip() for layer in contract["layers"] for part in layer.split("|") for each in part.split(":")}
    there = {name.split(".")[1] for name in library.modules() if name != "predictions"}
    optional = {name.strip("()") for name in named if name.startswith("(")}
    assert named - {f"({name})" for name in optional} <= there <= {name.strip("()") for name in named}
    assert contract["exhaustive"] is True
    assert "ignore_imports" not in contract


def test_packages_import_nothing_so_that_functions_pay_only_for_what_they_use() -> None:
    packages = [path for path in library.modules().values() if path.name == "__init__.py"]
    assert packages
    for path in packages:
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path


def test_every_module_is_imported_by_some_function() -> None:
    functions = resources("AWS::Serverless::Function")
    assert len(functions) > 20
    found = {path for name in functions for path in imported(folder_name(name))}
    assert {name for name, path in library.of_functions().items() if path not in found} == set()


def test_module_has_at_most_700_lines_and_a_class_600() -> None:
    seen = 0
    paths = [*library.modules().values(), *(ROOT / "functions").rglob("*.py")]
    for path in paths:
        text = path.read_text()
        assert text.count("\n") <= 700, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                seen += 1
                assert (node.end_lineno or 0) - node.lineno < 600, f"{path}: {node.name}"
    assert len(paths) > 150
    assert seen > 200
