"""What a function's code can reach, read from the source: variables, AWS calls, statuses, methods, texts.

A call is followed into the method of its object's class where that is written down (`self`, an annotation, `Class(…)`,
`Class.from_env()`), else into every method of that name in the modules that the handler imports. So a name that two
classes share may add what does not run. What may be missed, because following it would add too much that does not:

- a method that is handed on, not called, where nothing says whose it is: `prediction.status` is no `Executions.status`;
- a method that a set has too (`_OF_OTHERS`), likewise: most `add`, `pop` and `update` are sets' and dicts';
- what only a library calls because it overrides a method of the library's class: transports, streams and networks of
  ours, which are given all they need and call no AWS.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeGuard

from tests.support import library
from tests.support.template import ROOT

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
    "cloudformation": "cloudformation",
    "dynamodb": "dynamodb",
    "events": "events",
    "lambda": "lambda",
    "scheduler": "scheduler",
    "stepfunctions": "states",
    "secretsmanager": "secretsmanager",
    "s3": "s3",
    "sqs": "sqs",
    "ssm": "ssm",
}
# `seen.add(…)` is a set's, not an upload's.
_OF_OTHERS = frozenset(dir(set)) | {"from_env"}
# The handler, the package, and a few modules of it: fewer would be a reader of imports that sees none.
IMPORTED_LEAST = 5


@dataclass
class Reach:
    """What some code needs."""

    variables: set[str] = field(default_factory=set)
    actions: set[str] = field(default_factory=set)
    statuses: set[int] = field(default_factory=set)
    methods: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Code:
    """Some code, the names that it may mean, and what classes the objects in it are known to be of."""

    node: ast.AST
    names: Mapping[str, tuple[Path, str]]
    types: Mapping[str, str]


@cache
def reach(folder: str) -> Reach:
    """What the handler in `functions/{folder}` needs; not to be changed by who gets it."""
    app = ROOT / "functions" / folder / "app.py"
    modules = imported(folder)
    functions: dict[tuple[Path, str], _Code] = {}
    classes: dict[str, tuple[ast.ClassDef, dict[str, _Code]]] = {}
    protocols: set[str] = set()
    waiting: list[_Code] = []
    for module in modules:
        tree = _tree(module)
        names = _names(module)
        known = _types(tree.body)
        for scope in tree.body:
            if isinstance(scope, ast.FunctionDef):
                functions[module, scope.name] = _Code(scope, names, known | _annotated(scope))
                if module == app:  # the framework calls what is registered there
                    waiting.append(functions[module, scope.name])
            elif isinstance(scope, ast.ClassDef):
                assert scope.name not in classes, f"two classes are named {scope.name}: annotations are read by name"
                methods: dict[str, _Code] = {}
                classes[scope.name] = scope, methods
                if any(ast.unparse(base) == "Protocol" for base in scope.bases):
                    protocols.add(scope.name)
                own = _attributes(scope) | {"self": scope.name, "cls": scope.name}
                for member in scope.body:
                    if isinstance(member, ast.FunctionDef):
                        methods[member.name] = _Code(member, names, known | _annotated(member) | own)
                    else:
                        waiting.append(_Code(member, names, known))
            else:
                waiting.append(_Code(scope, names, known))

    def named(path: Path, name: str) -> list[_Code]:
        """What runs when this is called, or made."""
        if name not in classes:
            return [functions[path, name]] if (path, name) in functions else []
        return [code for each, code in classes[name][1].items() if each.startswith("__")]

    def method(owner: str, name: str) -> list[_Code]:
        if owner not in classes:
            return []
        scope, methods = classes[owner]
        inherited = [code for base in scope.bases for code in method(ast.unparse(base), name)]
        return [methods[name]] if name in methods else inherited

    found = Reach()
    seen: set[int] = set()
    while waiting:
        code = waiting.pop()
        if id(code.node) in seen:
            continue
        seen.add(id(code.node))
        if isinstance(code.node, ast.FunctionDef):
            found.methods.add(f"{code.types.get('self', '')}.{code.node.name}".lstrip("."))
        called = {id(part.func) for part in ast.walk(code.node) if isinstance(part, ast.Call)}
        for part in ast.walk(code.node):
            _note(part, found)
            # A name that is only assigned to is a variable of that name, and means nothing of the module's.
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in code.names:
                waiting += named(*code.names[part.id])
            elif isinstance(part, ast.Attribute):
                name = ast.unparse(part.value)
                owner = code.types.get(name) or (name if name in classes else "")
                if owner and owner not in protocols:  # behind which any class may be
                    waiting += method(owner, part.attr)
                elif part.attr not in _OF_OTHERS and name != "os.environ" and not isinstance(part.value, ast.Dict):
                    # A method of nobody knows which class. Where it is not called, only properties are followed: else
                    # each `prediction.status` would be `Executions.status`.
                    waiting += [
                        methods[part.attr]
                        for _, methods in classes.values()
                        if part.attr in methods
                        and (id(part) in called or getattr(methods[part.attr].node, "decorator_list", []))
                    ]
    return found


def _names(module: Path) -> dict[str, tuple[Path, str]]:
    """What a module's names mean: its own functions and classes, and those that it imports from our package."""
    found = {
        each.asname or each.name: (_path(node.module), each.name)
        for node in _running(_tree(module))
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module)
        for each in node.names
    }
    own = (node for node in _tree(module).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return found | {node.name: (module, node.name) for node in own}


def _types(body: list[ast.stmt]) -> dict[str, str]:
    """`files = Files.from_env()`, `files = Files(…)` or `files: Files = …`: `{"files": "Files"}`."""
    found: dict[str, str] = {}
    for node in body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=maker), attr="from_env") | ast.Name(id=maker)),
            ):
                found[name] = maker
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                found[name] = _class_of(annotation)
    return found


def _annotated(function: ast.FunctionDef) -> dict[str, str]:
    """`def f(table: PredictionsTable)`: `{"table": "PredictionsTable"}`, and what is annotated within."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    found = {each.arg: _class_of(each.annotation) for each in arguments}
    within = (node for node in ast.walk(function) if isinstance(node, ast.AnnAssign))
    return found | _types(list(within))


def _attributes(scope: ast.ClassDef) -> dict[str, str]:
    """`self._table = table` in a class's `__init__`, or `table: PredictionsTable` in it: `{"self._table": …}`."""
    found = {f"self.{name}": kind for name, kind in _types(scope.body).items()}
    for member in scope.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            given = _annotated(member)
            for node in ast.walk(member):
                match node:
                    case ast.Assign(
                        targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=ast.Name(id=argument)
                    ):
                        found[f"self.{name}"] = given.get(argument, "")
    return found


def _class_of(annotation: ast.expr | None) -> str:
    """The class that an annotation names, ours or not: the `get` of a `Mapping[str, str]` is no method of ours.

    Returns:
        Its name; empty where any class may be meant.
    """
    match annotation:
        case ast.Constant(value=str() as text):
            return _class_of(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _class_of(left)
        case ast.Subscript(value=value):
            return _class_of(value)
        case ast.Name(id=name) if name not in ("Any", "object"):
            return name
        case ast.Attribute():  # of a module of others
            return ast.unparse(annotation)
    return ""


def _note(node: ast.AST, found: Reach) -> None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.texts.add(node.value)  # also the parts of an f-string
    match node:
        case ast.Subscript(
            value=ast.Attribute(value=ast.Name(id="os"), attr="environ"), slice=ast.Constant(value=str() as name)
        ):
            found.variables.add(name)
        case ast.Call(
            func=ast.Attribute(value=environment, attr="get"), args=[ast.Constant(value=str() as name), *_]
        ) if ast.unparse(environment) == "os.environ":
            found.variables.add(name)
        case ast.Call(func=ast.Name(id="Problem"), args=[ast.Constant(value=int() as status), *_]):
            found.statuses.add(status)
        case ast.Call(func=ast.Attribute(value=client, attr="get_paginator"), args=[ast.Constant(value=str() as call)]):
            _note_call(client, call, found)
        case ast.Call(func=ast.Attribute(value=client, attr=call)):
            _note_call(client, call, found)
        case ast.Constant(value="VersionId"):
            found.actions.add("s3:GetObjectVersion")


def _note_call(client: ast.expr, call: str, found: Reach) -> None:
    name = client.attr if isinstance(client, ast.Attribute) else client.id if isinstance(client, ast.Name) else ""
    service = _PREFIXES.get(name.lstrip("_"))
    if service is None or call in ("get_paginator", "exceptions"):
        return
    if service == "lambda":
        assert call == "invoke"
        found.actions.add("lambda:InvokeFunction")
    elif call == "transact_write_items":  # allowed by the actions in it, which are updates alone
        found.actions.add("dynamodb:UpdateItem")
    elif service == "s3":
        found.actions.add(_S3_ACTIONS[call])
    else:
        if call == "create_schedule":
            found.actions.add("iam:PassRole")
        found.actions.add(f"{service}:{''.join(word.capitalize() for word in call.split('_'))}")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(folder: str) -> list[Path]:
    """The file of the handler in `functions/{folder}` and all of our modules that it imports when it runs.

    Those that it imports through others count too, and the packages that they are in.
    """
    modules: list[Path] = []
    waiting = [ROOT / "functions" / folder / "app.py"]
    while waiting:
        path = waiting.pop()
        if path in modules:
            continue
        modules.append(path)
        for node in _running(_tree(path)):
            _refuse_modules(node)
            if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
                waiting += [_path(node.module), *_packages(node.module)]
    assert len(modules) >= IMPORTED_LEAST, f"{folder} imports {len(modules)} modules: what it needs cannot be read"
    return modules


def _refuse_modules(node: ast.AST) -> None:
    # `clients.client` of a module `clients` would not be followed.
    if isinstance(node, ast.Import):
        modules = {each.name for each in node.names} & library.modules().keys()
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "import by the whole name: relative imports are not followed"
        modules = {f"{node.module}.{each.name}" for each in node.names} & library.modules().keys()
    else:
        return
    assert not modules, f"import what is used, not its module: {ast.unparse(node)}"


def _is_ours(module: str | None) -> TypeGuard[str]:
    return module is not None and module.startswith("predictions.")


def _path(module: str) -> Path:
    return library.modules()[module]


def _packages(module: str) -> list[Path]:
    """The packages that a module is in, which are imported before it."""
    parts = module.split(".")
    return [library.modules()[".".join(parts[:length])] for length in range(1, len(parts))]


def _running(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes, without what only type checkers import."""
    for scope in tree.body:
        if not (isinstance(scope, ast.If) and ast.unparse(scope.test) == "TYPE_CHECKING"):
            yield from ast.walk(scope)
