"""A state machine in JSONPath with a Distributed Map, as `run_batch` is: its items are lines of an object in S3.

https://docs.aws.amazon.com/step-functions/latest/dg/state-map-distributed.html
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.simulation.machine import TASK_FIELDS, Execution, StateMachine, TaskError, caught
from tests.support.dynamodb import NotModelled
from tests.support.scheduler import Scheduler, Waiter

_PATH_TASK_FIELDS = (TASK_FIELDS - {"Arguments", "Output"}) | {"Parameters", "OutputPath"}
_MAP_FIELDS = {
    "Comment", "Type", "Label", "ItemReader", "ItemSelector", "MaxConcurrencyPath", "ToleratedFailurePercentagePath",
    "ItemProcessor", "ResultWriter", "ResultPath", "Catch", "Next",
}  # fmt: skip


class MapRun:
    """One run of a Map: how many of its items stand where."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.running = 0
        self.succeeded = 0
        self.failed = 0
        self.aborted = 0
        self.waiter = Waiter()

    def counts(self) -> dict[str, int]:
        """`itemCounts` of DescribeMapRun."""
        return {
            "total": self.items,
            "running": self.running,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "timedOut": 0,
            "aborted": self.aborted,
            "pending": self.items - self.running - self.succeeded - self.failed - self.aborted,
        }


class BatchMachine(StateMachine):
    """A machine in JSONPath.

    Args:
        definition: As of `StateMachine`.
        scheduler: As of `StateMachine`.
        tasks: As of `StateMachine`.
        tokens: As of `StateMachine`.
        read: Gives the bytes of an object by its key.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        scheduler: Scheduler,
        tasks: Mapping[str, Callable[[Any, float], Any]],
        tokens: Any,
        read: Callable[[str], bytes],
    ) -> None:
        super().__init__(definition, scheduler, tasks, tokens)
        self._read = read
        self.map_runs: dict[str, MapRun] = {}

    def enter(self, execution: Execution, name: str, state: Mapping[str, Any], given: Any) -> tuple[str | None, Any]:
        """As of `StateMachine`, in JSONPath."""
        context: dict[str, Any] = {"Execution": {"Name": execution.name}}
        match state["Type"]:
            case "Choice":
                for choice in state["Choices"]:
                    if choice.keys() != {"Variable", "NumericGreaterThan", "Next"}:
                        raise NotModelled(f"a choice of {name}")
                    if _at(choice["Variable"], given, context) > choice["NumericGreaterThan"]:
                        return choice["Next"], given
                return state["Default"], given
            case "Wait":
                self.pause(execution, _at(state["SecondsPath"], given, context))
                return state["Next"], given
            case "Pass":
                return state["Next"], _filled(state["Parameters"], given, context)
            case "Succeed":
                return None, given
            case "Task" if state.keys() <= _PATH_TASK_FIELDS:

                def make(token: str | None) -> Any:
                    return _filled(state["Parameters"], given, {**context, "Task": {"Token": token}})

                result = self.attempt(execution, state, make)
                path = state.get("OutputPath", "$")
                return state.get("Next"), {} if path is None else _at(path, result, context)
            case "Map" if state.keys() <= _MAP_FIELDS and state["ResultPath"] is None:
                try:
                    self._run_map(execution, state, given)
                except TaskError as error:
                    rule = caught(state, error)
                    if rule is None or execution.status != "RUNNING":
                        raise
                    return rule["Next"], given
                return state["Next"], given
        raise NotModelled(f"the state {name}")

    def _run_map(self, execution: Execution, state: Mapping[str, Any], given: Any) -> None:
        reader = _filled(state["ItemReader"]["Parameters"], given, {})
        items = [json.loads(line) for line in self._read(reader["Key"]).splitlines()]
        tolerated = _at(state["ToleratedFailurePercentagePath"], given, {})
        at_once = _at(state["MaxConcurrencyPath"], given, {})
        run = self.map_runs[execution.name] = MapRun(len(items))
        waiting = list(enumerate(items))
        while waiting or run.running:
            while waiting and run.running < at_once and execution.status == "RUNNING":
                index, item = waiting.pop(0)
                chosen = _filled(state["ItemSelector"], given, {"Map": {"Item": {"Value": item, "Index": index}}})
                self._start_child(execution, run, f"{execution.name}/{index}", state["ItemProcessor"], chosen)
            waiter = run.waiter = execution.waiter = Waiter()
            self.scheduler.wait(waiter, 1e9)
            if execution.status != "RUNNING":
                return
            if 100 * run.failed > tolerated * len(items):
                for child in execution.children:
                    self.abort(child)
                raise TaskError("States.ExceedToleratedFailureThreshold")

    def _start_child(self, parent: Execution, run: MapRun, name: str, graph: Mapping[str, Any], given: Any) -> None:
        child = Execution(name, json.dumps(given), self.scheduler.now)
        parent.children.append(child)
        run.running += 1

        def go() -> None:
            self.run(child, graph, given)
            run.running -= 1
            run.succeeded += child.status == "SUCCEEDED"
            run.failed += child.status == "FAILED"
            run.aborted += child.status == "ABORTED"
            self.scheduler.wake(run.waiter, None)

        self.scheduler.spawn(f"line {name}", go)


def _at(path: str, given: Any, context: Mapping[str, Any]) -> Any:
    """What a path leads to, in the input or (`$$`) in the context."""
    value: Any = context if path.startswith("$$") else given
    for part in path.lstrip("$").split("."):
        value = value[part] if part else value
    return value


def _filled(template: Any, given: Any, context: Mapping[str, Any]) -> Any:
    if not isinstance(template, dict):
        return template
    return {
        name.removesuffix(".$"): _at(value, given, context) if name.endswith(".$") else _filled(value, given, context)
        for name, value in template.items()
    }
