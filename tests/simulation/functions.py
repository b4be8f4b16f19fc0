"""The functions: the real handlers, each in instances that are cold, warm, busy, or gone with their process."""

import time
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.support import template
from tests.support.scheduler import Died, Process, Scheduler
from tests.support.template import ROOT, logical_name

if TYPE_CHECKING:
    from tests.simulation.world import World

_code: dict[str, CodeType] = {}


def timeout_of(function: str) -> float:
    """A function's timeout in seconds, by the template."""
    return float(template.timeout_of(logical_name(function)))


class Context:
    """What Lambda tells a function of its invocation."""

    function_version = "$LATEST"
    memory_limit_in_mb = 512
    invoked_function_arn = "arn:aws:lambda:us-east-1:123456789012:function:function"
    aws_request_id = "c6af9ac6-7b61-11e6-9a41-93e8deadbeef"

    def __init__(self, function: str, scheduler: Scheduler, until: float) -> None:
        self.function_name = function
        self._scheduler = scheduler
        self._until = until

    def get_remaining_time_in_millis(self) -> int:
        return max(0, int((self._until - self._scheduler.now) * 1000))


class FunctionFailed(Exception):
    """An invocation that gave no answer.

    Attributes:
        kind: `timeout`, `died`, or the class of the error that the function raised.
        message: The error's text.
    """

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.message = message


class Functions:
    """Invokes functions; each instance runs one invocation at a time, and remembers what its module remembers."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._warm: dict[str, list[dict[str, Any]]] = {}
        self.invocations: dict[str, int] = {}

    def invoke(self, function: str, event: Any, patience: float = 1e9) -> Any:
        """Invokes a function and waits for its answer, at most `patience` seconds.

        Raises:
            FunctionFailed: It failed, or gave no answer in time; in the second case it may go on.
        """
        world, timeout = self._world, timeout_of_cached(function)
        until = world.scheduler.now + timeout
        process = world.scheduler.spawn(function, lambda: self._run(function, event, until), may_fail=True)
        process.event = event
        if not world.scheduler.join(process, min(timeout, patience)):
            if timeout <= patience:
                process.killed = True
                world.faults.struck["timed out"] = world.faults.struck.get("timed out", 0) + 1
            raise FunctionFailed("timeout")
        return _result(process)

    def instances(self, function: str) -> list[dict[str, Any]]:
        """The instances of a function that are warm and idle."""
        return self._warm.get(function, [])

    def _run(self, function: str, event: Any, until: float) -> Any:
        self.invocations[function] = self.invocations.get(function, 0) + 1
        instances = self._warm.setdefault(function, [])
        instance = instances.pop() if instances else self._cold(function)
        try:
            answer = instance["handler"](event, Context(function, self._world.scheduler, until))
        except Exception:
            instances.append(instance)
            raise
        instances.append(instance)
        return answer

    def _cold(self, function: str) -> dict[str, Any]:
        path = ROOT / "functions" / function / "app.py"
        if function not in _code:
            _code[function] = compile(path.read_text(), str(path), "exec")
        module: dict[str, Any] = {"__name__": f"functions.{function}.app", "__file__": str(path)}
        exec(_code[function], module)  # noqa: S102  # the handler's own module, as its import does
        if module.get("time") is time:
            module["time"] = SimpleNamespace(time=lambda: self._world.scheduler.now)
        return module


_timeouts: dict[str, float] = {}


def timeout_of_cached(function: str) -> float:
    """As `timeout_of`."""
    if function not in _timeouts:
        _timeouts[function] = timeout_of(function)
    return _timeouts[function]


def _result(process: Process) -> Any:
    if isinstance(process.error, Died):
        raise FunctionFailed("died")
    if process.error is not None:
        raise FunctionFailed(type(process.error).__name__, str(process.error)) from process.error
    return process.result
