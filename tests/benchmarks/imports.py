"""How long a cold start imports: each function in new processes, beside an empty handler.

What a process can import is what a function on Lambda can: the layer's packages at their locked versions with the
bytecode that the layer ships, and boto3 behind them. The rest of this environment (test tools, linters) is out of
reach, because libraries that look around for plugins would pay for it. Milliseconds are CPU time, which other programs
on the machine disturb least; importing does nothing but compute.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.report import BenchmarkFailed
from tests.support.template import ROOT, load_template, logical_name, variables

ROUNDS = 4
PROFILED_ROUNDS = 1

EMPTY = "(empty handler)"
ONE_CLIENT = "(one botocore client)"
REFERENCES = {
    EMPTY: "def handler(event, context):\n    return {}\n",
    ONE_CLIENT: (
        "import botocore.session\n"
        "client = botocore.session.get_session().create_client('dynamodb')\n"
        "def handler(event, context):\n    return {}\n"
    ),
}

# What the Lambda runtime has beside Python.
RUNTIME = ("boto3", "botocore", "jmespath", "python-dateutil", "s3transfer", "six", "urllib3")

# The parts that a cold start is made of, by the modules they consist of; the first that fits counts. A module that is
# in none of them (the standard library) counts for the part that imported it first.
OURS = "ours+clients"
OURS_LEAST = 3
PARTS = {
    "boto3": ("boto3", "s3transfer"),
    "botocore": ("botocore", "jmespath", "dateutil", "urllib3", "six"),
    "httpx": ("httpx", "httpcore", "anyio", "h11", "certifi", "idna"),
    "pydantic": ("pydantic", "pydantic_core", "annotated_types", "typing_inspection"),
    "pt-rest": ("aws_lambda_powertools.event_handler",),
    "pt-params": ("aws_lambda_powertools.utilities.parameters",),
    "pt-tracer": ("aws_lambda_powertools.tracing", "aws_xray_sdk", "wrapt"),
    "pt-logs": ("aws_lambda_powertools",),
    OURS: ("app", "predictions"),
}

# As by the template's defaults.
_CONDITIONS = {
    "AllowCors": False,
    "CloudFrontUrls": False,
    "CreateReplicateTokenSecret": True,
    "CustomDomain": False,
    "TracingActive": False,
}


@dataclass(frozen=True)
class Loaded:
    """What it takes until a handler can be called, the median of several processes.

    Attributes:
        process_ms: CPU milliseconds from the start of Python on.
        import_ms: Those of the import alone.
        slowest_ms: `process_ms` of the slowest process: how noisy the machine was.
        modules: How many modules were imported.
        parts: How `import_ms` divides among `PARTS`, by the shares that a profile gives them.
    """

    process_ms: float
    import_ms: float
    slowest_ms: float
    modules: int
    parts: Mapping[str, float]


def measure(say: Callable[[str], None]) -> dict[str, Loaded]:
    """Import every handler in new processes, all in turn and several times over.

    Returns:
        What was measured, of the references (`EMPTY`, …) and of every function by its folder's name.

    Raises:
        BenchmarkFailed: A handler cannot be imported, or the environment is not the locked one.
    """
    with _shipped() as shipped:
        handlers = {**{name: {} for name in REFERENCES}, **{name: _environment(name) for name in _functions()}}
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        parts: dict[str, list[dict[str, float]]] = defaultdict(list)
        say(f"importing {len(handlers)} handlers, {ROUNDS + PROFILED_ROUNDS} times each, in new processes")
        for _ in range(PROFILED_ROUNDS):  # first: every file is in the page cache afterwards
            for name, environment in handlers.items():
                profile = _load(shipped, name, environment, "-X", "importtime").stderr
                _check(name, profile)
                parts[name].append(_parts(profile))
        for _ in range(ROUNDS):
            for name, environment in handlers.items():
                runs[name].append(json.loads(_load(shipped, name, environment).stdout))
    return {name: _summary(runs[name], parts[name]) for name in handlers}


def _check(name: str, profile: str) -> None:
    """Refuse a profile that does not show our modules: what was measured would be something else.

    Raises:
        BenchmarkFailed: Fewer are in it than any handler imports.
    """
    ours = [module for _, module, _ in _lines(profile) if module.startswith("predictions.")]
    if name not in REFERENCES and len(ours) < OURS_LEAST:
        raise BenchmarkFailed(f"{name} imported {len(ours)} modules of the library")


def _summary(runs: list[dict[str, float]], parts: list[dict[str, float]]) -> Loaded:
    import_ms = median(run["import_ms"] for run in runs)
    shares = {part: sum(each.get(part, 0.0) for each in parts) for part in PARTS}
    whole = sum(shares.values())
    return Loaded(
        process_ms=median(run["process_ms"] for run in runs),
        import_ms=import_ms,
        slowest_ms=max(run["process_ms"] for run in runs),
        modules=int(runs[0]["modules"]),
        parts={part: import_ms * share / whole for part, share in shares.items()},
    )


def _functions() -> list[str]:
    return sorted(app.parent.name for app in (ROOT / "functions").glob("*/app.py"))


@contextmanager
def _shipped() -> Iterator[Path]:
    """A folder with `layer`, `runtime` and each handler's own folder, as they are on Lambda."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        directory = Path(temporary)
        locked = re.findall(
            r"^([\w.-]+)==(\S+)", (ROOT / "layers/predictions/requirements.txt").read_text(), re.MULTILINE
        )
        _copy(directory / "layer", dict(locked))
        _copy(directory / "runtime", dict.fromkeys(RUNTIME))
        without = shutil.ignore_patterns("__pycache__")
        unshipped = shutil.ignore_patterns(
            "__pycache__", "cli", "__main__.py", "openapi.yaml"
        )  # as the layer's Makefile
        shutil.copytree(ROOT / "layers/predictions/predictions", directory / "layer/predictions", ignore=unshipped)
        compiled = subprocess.run(  # noqa: S603  # this Python; as the layer's Makefile does
            [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", temporary],
            capture_output=True,
            text=True,
        )
        if compiled.returncode:
            raise BenchmarkFailed(
                f"the layer could not be compiled:\n{compiled.stdout[-2000:]}{compiled.stderr[-1000:]}"
            )
        for name in _functions():  # SAM ships these without bytecode
            shutil.copytree(ROOT / "functions" / name, directory / name, ignore=without)
        for name, source in REFERENCES.items():
            (directory / name).mkdir()
            (directory / name / "app.py").write_text(source)
        yield directory


def _copy(target: Path, distributions: Mapping[str, str | None]) -> None:
    """Copy installed distributions; a version that is given must be the installed one."""
    for name, version in distributions.items():
        found = metadata.distribution(name)
        if version not in (None, found.version):
            raise BenchmarkFailed(f"{name} {found.version} is installed, the layer has {version}: run make setup")
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                copy = target / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), copy)


def _environment(function: str) -> dict[str, str]:
    """A function's variables, by the template's defaults."""
    return {name: _value(value) for name, value in variables(logical_name(function)).items()}


def _value(value: Any) -> str:
    match value:
        case str():
            return value
        case {"Fn::If": [condition, then, otherwise]}:
            return _value(then if _CONDITIONS[condition] else otherwise)
        case {"Ref": name} if name in load_template()["Parameters"]:
            return str(load_template()["Parameters"][name]["Default"])
        case _:  # a name or an ARN of the stack, which is only kept while a handler is imported
            return "arn:aws:benchmark:us-east-1:123456789012:benchmark"


def _load(
    shipped: Path, name: str, environment: Mapping[str, str], *options: str
) -> "subprocess.CompletedProcess[str]":
    loaded = subprocess.run(  # noqa: S603  # this Python, our own script
        # -S, -P: nothing of this environment, nothing of the script's folder.
        [sys.executable, "-S", "-P", *options, str(Path(__file__).with_name("load_handler.py"))],
        env={
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_SESSION_TOKEN": "benchmark",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_LAMBDA_FUNCTION_NAME": name,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",  # /var/task cannot be written
            "PYTHONPATH": os.pathsep.join(str(shipped / folder) for folder in (name, "layer", "runtime")),
            **environment,
        },
        cwd=shipped,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if loaded.returncode:
        raise BenchmarkFailed(f"{name} cannot be imported with the layer alone:\n{loaded.stderr[-3000:]}")
    return loaded


def _parts(profile: str) -> dict[str, float]:
    """Add up a `-X importtime` profile: https://docs.python.org/3/using/cmdline.html#cmdoption-X."""
    found: dict[str, float] = defaultdict(float)
    importers: list[str] = []
    for indent, name, microseconds in reversed(list(_lines(profile))):  # an importer is below what it imported
        depth = len(indent) // 2
        del importers[depth:]
        importers.append(_part(name) or (importers[-1] if importers else ""))
        found[importers[-1]] += microseconds / 1000
    return found


def _lines(profile: str) -> Iterable[tuple[str, str, int]]:
    for line in profile.splitlines():
        if parsed := re.fullmatch(r"import time: +(\d+) \| +\d+ \| ( *)(\S+)", line):
            yield parsed[2], parsed[3], int(parsed[1])


def _part(module: str) -> str:
    for part, prefixes in PARTS.items():
        if any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes):
            return part
    return ""
