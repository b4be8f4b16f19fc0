"""Step Functions: the real `track_prediction.asl.json`, interpreted for the few states that it uses.

Choice, Wait, Task (`lambda:invoke` and `aws-sdk:dynamodb:updateItem.waitForTaskToken`), Retry, Catch and Output, with
JSONata by the library `jsonata-python`. Anything else in the definition is an error here, not passed over.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jsonata.jsonata import Jsonata

from tests.simulation.dynamodb import NotModelled
from tests.simulation.scheduler import Scheduler, Waiter

_TASK_FIELDS = {
    "Comment", "Type", "Resource", "Arguments", "TimeoutSeconds", "Retry", "Catch", "Output", "Next", "End"
}  # fmt: skip


class TaskError(Exception):
    """How a task failed, by the name that Retry and Catch know."""

    def __init__(self, name: str, cause: str = "") -> None:
        super().__init__(name)
        self.name = name
        self.cause = cause


class Execution:
    """One execution; `status` as Step Functions tells it."""

    def __init__(self, name: str, given: str, began: float) -> None:
        self.name = name
        self.given = given
        self.began = began
        self.status = "RUNNING"
        self.states: list[str] = []
        self.why = ""
        self.waiter: Waiter | None = None


class Refused(Exception):
    """A call that Step Functions refuses, by its error's code."""


class StateMachine:
    """A state machine and its executions.

    Args:
        definition: The parsed definition.
        scheduler: Lets time pass.
        tasks: What does a task, by the resource behind `:::`; raises `TaskError`. `waitForTaskToken` is done here.
    """

    def __init__(
        self, definition: Mapping[str, Any], scheduler: Scheduler, tasks: Mapping[str, Callable[[Any, float], Any]]
    ) -> None:
        self.executions: dict[str, Execution] = {}
        self.changed = False
        self._states: dict[str, Any] = definition["States"]
        self._start_at: str = definition["StartAt"]
        self._scheduler = scheduler
        self._tasks = tasks
        self._tokens: dict[str, Waiter] = {}

    # -- the API ----------------------------------------------------------------------------------------------

    def start(self, name: str, given: str) -> None:
        """StartExecution."""
        there = self.executions.get(name)
        if there is not None:
            if there.status == "RUNNING" and there.given == given:
                return
            raise Refused("ExecutionAlreadyExists")
        execution = self.executions[name] = Execution(name, given, self._scheduler.now)
        self._scheduler.spawn(f"execution {name}", lambda: self._run(execution))

    def describe(self, name: str) -> str:
        """DescribeExecution's status."""
        if name not in self.executions:
            raise Refused("ExecutionDoesNotExist")
        return self.executions[name].status

    def stop(self, name: str) -> None:
        """StopExecution, as by hand: a function that it runs goes on."""
        execution = self.executions.get(name)
        if execution and execution.status == "RUNNING":
            execution.status = "ABORTED"
            if execution.waiter:
                self._scheduler.wake(execution.waiter, None)

    def send_success(self, token: str) -> None:
        """SendTaskSuccess."""
        waiter = self._tokens.get(token)
        if waiter is None:
            raise Refused("InvalidToken")
        if not self._scheduler.wake(waiter, "success"):
            raise Refused("TaskTimedOut")

    # -- running ----------------------------------------------------------------------------------------------

    def _run(self, execution: Execution) -> None:
        given = json.loads(execution.given)
        name: str | None = self._start_at
        while name is not None and execution.status == "RUNNING":
            execution.states.append(name)
            state = self._states[name]
            bound = {"input": given, "context": {"Execution": {"Name": execution.name}}}
            try:
                name, given = self._enter(execution, name, state, bound)
            except TaskError as error:
                if execution.status == "RUNNING":
                    execution.status, execution.why = "FAILED", f"{name}: {error.name} {error.cause[:200]}"
                return
        if execution.status == "RUNNING":
            execution.status = "SUCCEEDED"

    def _enter(self, execution: Execution, name: str, state: Mapping[str, Any], bound: dict[str, Any]) -> Any:
        if state["Type"] == "Choice":
            for choice in state["Choices"]:
                if self._evaluate(choice["Condition"], bound) is True:
                    return choice["Next"], self._output(choice, bound)
            return state["Default"], self._output(state, bound)
        if state["Type"] == "Wait":
            waiter = execution.waiter = Waiter()
            self._scheduler.wait(waiter, self._evaluate(state["Seconds"], bound))
            return state["Next"], self._output(state, bound)
        if state["Type"] != "Task" or not state.keys() <= _TASK_FIELDS:
            raise NotModelled(f"the state {name}")
        tries = [0] * len(state.get("Retry", []))
        while True:
            try:
                self._task(execution, name, state, bound)
            except TaskError as error:
                if execution.status != "RUNNING":
                    raise
                if self._waits_to_retry(state, tries, error):
                    continue
                for rule in state.get("Catch", []):
                    if error.name in rule["ErrorEquals"]:
                        caught = {**bound, "errorOutput": {"Error": error.name, "Cause": error.cause}}
                        return rule["Next"], self._output(rule, caught)
                raise
            return state.get("Next"), self._output(state, bound)

    def _waits_to_retry(self, state: Mapping[str, Any], tries: list[int], error: TaskError) -> bool:
        for n, rule in enumerate(state.get("Retry", [])):
            if error.name in rule["ErrorEquals"]:
                if tries[n] >= rule["MaxAttempts"]:
                    return False
                seconds = rule["IntervalSeconds"] * rule["BackoffRate"] ** tries[n]
                tries[n] += 1
                self._scheduler.sleep(min(seconds, rule.get("MaxDelaySeconds", seconds)))
                return True
        return False

    def _task(self, execution: Execution, name: str, state: Mapping[str, Any], bound: dict[str, Any]) -> None:
        resource = state["Resource"].partition(":states:::")[2]
        timeout = float(state["TimeoutSeconds"])
        if not resource.endswith(".waitForTaskToken"):
            self._tasks[resource](self._evaluate(state["Arguments"], bound), timeout)
            return
        token = f"{execution.name}#{len(execution.states)}#{self._scheduler.now}"
        waiter = self._tokens[token] = execution.waiter = Waiter()
        began = self._scheduler.now
        with_token = {**bound, "context": {**bound["context"], "Task": {"Token": token}}}
        try:
            self._tasks[resource.removesuffix(".waitForTaskToken")](
                self._evaluate(state["Arguments"], with_token), timeout
            )
        except TaskError:
            waiter.done = True
            raise
        if not self._scheduler.wait(waiter, max(0.0, began + timeout - self._scheduler.now)):
            raise TaskError("States.Timeout")

    # -- JSONata ----------------------------------------------------------------------------------------------

    def _output(self, of: Mapping[str, Any], bound: dict[str, Any]) -> Any:
        if "Output" not in of or "Assign" in of:
            raise NotModelled("a state without Output, or with Assign")
        return self._evaluate(of["Output"], bound)

    def _evaluate(self, value: Any, bound: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return {name: self._evaluate(each, bound) for name, each in value.items()}
        if isinstance(value, list):
            return [self._evaluate(each, bound) for each in value]
        if not (isinstance(value, str) and value.startswith("{%")):
            return value
        moment = self._scheduler.now
        expression = _expression(value)
        frame = expression.create_frame()
        frame.bind("states", bound)
        # What Step Functions adds to JSONata, and the clock of this world.
        frame.bind("parse", Jsonata.JLambda(json.loads))
        frame.bind("millis", Jsonata.JLambda(lambda: int(moment * 1000)))
        return expression.evaluate(None, frame)


@cache
def _expression(text: str) -> Any:
    return Jsonata(text.removeprefix("{%").removesuffix("%}").strip())
