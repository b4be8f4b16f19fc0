"""What a function's code can reach, read from the source: the variables it needs and the AWS calls it makes.

A call is followed into the method of its object's class where that is written down (`self`, an annotation,
`Class.from_env()`), else into every method of that name in the modules that the handler imports. So nothing that runs
is missed, and a name that two classes share may add what does not run.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.unit.template import ROOT

PACKAGE = ROOT / "layers/predictions/predictions"

_S3_ACTIONS = {
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "complete_multipart_upload": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "generate_presigned_url": "s3:GetObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_objects_v2": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "upload_part": "s3:PutObject",
}
_PREFIXES = {
    "dynamodb": "dynamodb",
    "events": "events",
    "stepfunctions": "states",
    "secretsmanager": "secretsmanager",
    "s3": "s3",
    "sqs": "sqs",
    "ssm": "ssm",
}
# `seen.add(…)` is a set's, not an upload's.
_OF_SETS = frozenset(dir(set))
_OF_THE_STANDARD_LIBRARY = {"os.environ.get"}
_POWERTOOLS = {"SecretsProvider": "secretsmanager:GetSecretValue"}


@dataclass
class Reach:
    """What some code needs."""

    variables: set[str] = field(default_factory=set)
    actions: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Code:
    """Some code, and what the names in it are known to be: instances of one of our classes."""

    node: ast.AST
    types: Mapping[str, str]


def reach(folder: str) -> Reach:
    """What the handler in `functions/{folder}` needs."""
    app = ROOT / "functions" / folder / "app.py"
    functions: dict[str, list[_Code]] = {}
    methods: dict[str, dict[str, _Code]] = {}
    waiting: list[_Code] = []
    for tree in map(_tree, _imported(app)):
        known = _made(tree)
        for scope in tree.body:
            if isinstance(scope, ast.FunctionDef):
                functions.setdefault(scope.name, []).append(_Code(scope, known | _annotated(scope)))
                if tree is _tree(app):  # the framework calls what is registered there
                    waiting.append(functions[scope.name][-1])
            elif isinstance(scope, ast.ClassDef):
                for member in scope.body:
                    if isinstance(member, ast.FunctionDef):
                        code = _Code(member, known | _annotated(member) | {"self": scope.name, "cls": scope.name})
                        methods.setdefault(member.name, {})[scope.name] = code
                    else:
                        waiting.append(_Code(member, known))
            else:
                waiting.append(_Code(scope, known))
    found = Reach()
    seen: set[int] = set()
    while waiting:
        code = waiting.pop()
        if id(code.node) in seen:
            continue
        seen.add(id(code.node))
        called = {id(part.func) for part in ast.walk(code.node) if isinstance(part, ast.Call)}
        for part in ast.walk(code.node):
            _note(part, found)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
                waiting += functions.get(part.id, [])
                waiting += [method for owner, method in methods.get("__init__", {}).items() if owner == part.id]
            elif isinstance(part, ast.Attribute):
                candidates = methods.get(part.attr, {})
                owner = part.value.id if isinstance(part.value, ast.Name) else ""
                owner = owner if owner in candidates else code.types.get(owner, "")
                if owner:
                    waiting += [candidates[owner]] if owner in candidates else []
                elif (
                    part.attr != "from_env"
                    and part.attr not in _OF_SETS
                    and not isinstance(part.value, ast.Dict)  # `{…}.get(…)`
                    and ast.unparse(part) not in _OF_THE_STANDARD_LIBRARY
                ):
                    # A method of nobody knows which class; what is not called can only be a property.
                    waiting += [
                        method
                        for method in candidates.values()
                        if id(part) in called or getattr(method.node, "decorator_list", [])
                    ]
    return found


def _made(tree: ast.Module) -> dict[str, str]:
    """`table = PredictionsTable.from_env()`, or `Class(…)`, at a module's top: `{"table": "PredictionsTable"}`."""
    found = _annotated_names(tree.body)
    for node in tree.body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=maker), attr="from_env") | ast.Name(id=maker)),
            ):
                found[name] = maker
    return found


def _annotated(function: ast.FunctionDef) -> dict[str, str]:
    """`def f(table: PredictionsTable)`: `{"table": "PredictionsTable"}`; an annotation of another form says nothing."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    found = {each.arg: each.annotation.id for each in arguments if isinstance(each.annotation, ast.Name)}
    return found | _annotated_names(function.body)


def _annotated_names(body: list[ast.stmt]) -> dict[str, str]:
    """`names: Mapping[str, str] = …`: `{"names": "Mapping"}`, whose `get` is no method of ours."""
    found: dict[str, str] = {}
    for node in body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name), annotation=ast.Subscript(value=ast.Name(id="Mapping" | "dict" as kind))
            ):
                found[name] = kind
    return found


def _note(node: ast.AST, found: Reach) -> None:
    match node:
        case ast.Subscript(
            value=ast.Attribute(value=ast.Name(id="os"), attr="environ"), slice=ast.Constant(value=str() as name)
        ):
            found.variables.add(name)
        case ast.Call(func=ast.Attribute(value=client, attr="get_paginator"), args=[ast.Constant(value=str() as call)]):
            _note_call(client, call, found)
        case ast.Call(func=ast.Attribute(value=client, attr=call)):
            _note_call(client, call, found)
        case ast.Call(func=ast.Name(id=name)) if name in _POWERTOOLS:
            found.actions.add(_POWERTOOLS[name])


def _note_call(client: ast.expr, call: str, found: Reach) -> None:
    name = client.attr if isinstance(client, ast.Attribute) else client.id if isinstance(client, ast.Name) else ""
    service = _PREFIXES.get(name.lstrip("_"))
    if service is None or call in ("get_paginator", "exceptions"):
        return
    if service == "s3":
        found.actions.add(_S3_ACTIONS[call])
    else:
        found.actions.add(f"{service}:{''.join(word.capitalize() for word in call.split('_'))}")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imported(app: Path) -> list[Path]:
    """The handler's file and every module of our package that it imports, through others too."""
    modules: list[Path] = []
    waiting = [app]
    while waiting:
        path = waiting.pop()
        if path in modules:
            continue
        modules.append(path)
        waiting += [
            PACKAGE / f"{node.module.removeprefix('predictions.')}.py"
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("predictions.")
        ]
    return modules
