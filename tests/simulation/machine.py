"""Step Functions: the real definitions, interpreted for the few kinds of state that they use.

Choice, Wait, Pass, Succeed, and Task (`lambda:invoke`, and two services with `.waitForTaskToken`), with Retry, Catch
and Output, in JSONata by the library `jsonata-python`; what a machine in JSONPath does otherwise is in
`distributed_map`. Anything else in a definition is an error here, not passed over.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from jsonata.jsonata import Jsonata

from tests.support.dynamodb import NotModelled
from tests.support.scheduler import Scheduler, Waiter

TASK_FIELDS = {
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
        self.ended: float | None = None
        self.status = "RUNNING"
        self.states: list[str] = []
        self.why = ""
        self.waiter: Waiter | None = None
        self.children: list[Execution] = []


class Refused(Exception):
    """A call that Step Functions refuses, by its error's code."""


class Tokens:
    """The task tokens of an account: who waits with which, and what he was told."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiters: dict[str, Waiter] = {}

    def new(self, token: str) -> Waiter:
        """Somebody waits with this token."""
        waiter = self._waiters[token] = Waiter()
        return waiter

    def tell(self, token: str, told: "Told") -> None:
        """SendTaskSuccess and SendTaskFailure.

        Raises:
            Refused: Nobody waits with it, or nobody any more.
        """
        waiter = self._waiters.get(token)
        if waiter is None:
            raise Refused("InvalidToken")
        if not self._scheduler.wake(waiter, told):
            raise Refused("TaskTimedOut")


class Told:
    """What a state that waits was told: an output, or an error with its cause."""

    def __init__(self, output: str | None = None, error: str | None = None, cause: str = "") -> None:
        self.output = output
        self.error = error
        self.cause = cause

    def result(self) -> Any:
        """The output, parsed.

        Raises:
            TaskError: It was an error.
        """
        if self.error is not None:
            raise TaskError(self.error, self.cause)
        return json.loads(self.output or "{}")


class StateMachine:
    """A state machine and its executions.

    Args:
        definition: The parsed definition.
        scheduler: Lets time pass.
        tasks: What does a task, by the resource behind `:::`; raises `TaskError`. `waitForTaskToken` is done here.
        tokens: The account's task tokens.
        arn: That of its executions, without their names.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        scheduler: Scheduler,
        tasks: Mapping[str, Callable[[Any, float], Any]],
        tokens: Tokens | None = None,
        arn: str = "",
    ) -> None:
        self._arn = arn
        self.executions: dict[str, Execution] = {}
        self.scheduler = scheduler
        self.definition = definition
        """That of the executions that begin from now on."""
        self._tasks = tasks
        self._tokens = tokens or Tokens(scheduler)

    # -- the API ----------------------------------------------------------------------------------------------

    def start(self, name: str, given: str) -> None:
        """StartExecution."""
        there = self.executions.get(name)
        if there is not None:
            if there.status == "RUNNING" and there.given == given:
                return
            raise Refused("ExecutionAlreadyExists")
        execution = self.executions[name] = Execution(name, given, self.scheduler.now)
        self.scheduler.spawn(f"execution {name}", lambda: self.run(execution, self.definition, json.loads(given)))

    def describe(self, name: str) -> str:
        """DescribeExecution's status."""
        if name not in self.executions:
            raise Refused("ExecutionDoesNotExist")
        return self.executions[name].status

    def stop(self, name: str) -> None:
        """StopExecution, as by hand: a function that it runs goes on."""
        if (execution := self.executions.get(name)) is not None:
            self.abort(execution)

    def abort(self, execution: Execution) -> None:
        """Ends an execution and its children where they are; nobody waits with their tokens any more."""
        for child in execution.children:
            self.abort(child)
        if execution.status == "RUNNING":
            execution.status, execution.ended = "ABORTED", self.scheduler.now
            if execution.waiter:
                self.scheduler.wake(execution.waiter, None)

    def send_success(self, token: str, output: str = "{}") -> None:
        """SendTaskSuccess."""
        self._tokens.tell(token, Told(output))

    # -- running ----------------------------------------------------------------------------------------------

    def run(self, execution: Execution, graph: Mapping[str, Any], given: Any) -> None:
        """Runs an execution through the states of a machine, or of a Map's item."""
        name: str | None = graph["StartAt"]
        while name is not None and execution.status == "RUNNING":
            execution.states.append(name)
            try:
                name, given = self.enter(execution, name, graph["States"][name], given)
            except TaskError as error:
                if execution.status == "RUNNING":
                    execution.status, execution.ended = "FAILED", self.scheduler.now
                    execution.why = f"{name}: {error.name} {error.cause[:200]}"
                return
        if execution.status == "RUNNING":
            execution.status, execution.ended = "SUCCEEDED", self.scheduler.now

    def enter(self, execution: Execution, name: str, state: Mapping[str, Any], given: Any) -> tuple[str | None, Any]:
        """Does one state; the next one's name, None at the end, and its input.

        Raises:
            TaskError: It failed, and nothing of it catches that.
        """
        bound = {
            "input": given,
            "context": {"Execution": {"Id": f"{self._arn}:{execution.name}", "Name": execution.name}},
        }
        match state["Type"]:
            case "Choice":
                for choice in state["Choices"]:
                    if self._evaluate(choice["Condition"], bound) is True:
                        return choice["Next"], self._output(choice, bound, given)
                return state["Default"], self._output(state, bound, given)
            case "Wait":
                self.pause(execution, self._evaluate(state["Seconds"], bound))
                return state["Next"], self._output(state, bound, given)
            case "Succeed":
                return None, self._output(state, bound, given)
            case "Task" if state.keys() <= TASK_FIELDS:
                return self._do_task(execution, state, bound)
        raise NotModelled(f"the state {name}")

    def _do_task(self, execution: Execution, state: Mapping[str, Any], bound: dict[str, Any]) -> tuple[str | None, Any]:
        def make(token: str | None) -> Any:
            context = {**bound["context"], **({"Task": {"Token": token}} if token else {})}
            return self._evaluate(state["Arguments"], {**bound, "context": context})

        try:
            result = self.attempt(execution, state, make)
        except TaskError as error:
            if (rule := caught(state, error)) is None or execution.status != "RUNNING":
                raise
            told = {**bound, "errorOutput": {"Error": error.name, "Cause": error.cause}}
            return rule["Next"], self._output(rule, told, told["errorOutput"])
        return state.get("Next"), self._output(state, {**bound, "result": result}, result)

    def pause(self, execution: Execution, seconds: float) -> None:
        """A Wait, which ends early where the execution is stopped."""
        waiter = execution.waiter = Waiter()
        self.scheduler.wait(waiter, seconds)

    def attempt(self, execution: Execution, state: Mapping[str, Any], make: Callable[[str | None], Any]) -> Any:
        """Does a task, again where its Retry says so; its result.

        Args:
            execution: Of which execution.
            state: The state.
            make: Gives the task's arguments, with its token if it has one.

        Raises:
            TaskError: It failed for good, or its execution was stopped.
        """
        tries = [0] * len(state.get("Retry", []))
        while True:
            try:
                return self._task(execution, state, make)
            except TaskError as error:
                if execution.status != "RUNNING" or not self._waits_to_retry(state, tries, error):
                    raise

    def _waits_to_retry(self, state: Mapping[str, Any], tries: list[int], error: TaskError) -> bool:
        for n, rule in enumerate(state.get("Retry", [])):
            if error.name in rule["ErrorEquals"]:
                if tries[n] >= rule["MaxAttempts"]:
                    return False
                seconds = rule["IntervalSeconds"] * rule["BackoffRate"] ** tries[n]
                tries[n] += 1
                self.scheduler.sleep(min(seconds, rule.get("MaxDelaySeconds", seconds)))
                return True
        return False

    def _task(self, execution: Execution, state: Mapping[str, Any], make: Callable[[str | None], Any]) -> Any:
        resource = state["Resource"].partition(":states:::")[2]
        timeout = float(state["TimeoutSeconds"])
        if not resource.endswith(".waitForTaskToken"):
            return self._tasks[resource](make(None), timeout)
        token = f"{execution.name}#{len(execution.states)}#{self.scheduler.now}"
        waiter = execution.waiter = self._tokens.new(token)
        began = self.scheduler.now
        try:
            self._tasks[resource.removesuffix(".waitForTaskToken")](make(token), timeout)
        except TaskError:
            waiter.done = True
            raise
        if not self.scheduler.wait(waiter, max(0.0, began + timeout - self.scheduler.now)):
            raise TaskError("States.Timeout")
        return waiter.value.result() if isinstance(waiter.value, Told) else {}

    # -- JSONata ----------------------------------------------------------------------------------------------

    def _output(self, of: Mapping[str, Any], bound: dict[str, Any], default: Any) -> Any:
        if "Assign" in of:
            raise NotModelled("a state with Assign")
        return self._evaluate(of["Output"], bound) if "Output" in of else default

    def _evaluate(self, value: Any, bound: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return {name: self._evaluate(each, bound) for name, each in value.items()}
        if isinstance(value, list):
            return [self._evaluate(each, bound) for each in value]
        if not (isinstance(value, str) and value.startswith("{%")):
            return value
        moment = self.scheduler.now
        expression = _expression(value)
        frame = expression.create_frame()
        frame.bind("states", bound)
        # What Step Functions adds to JSONata, and the clock of this world.
        frame.bind("parse", Jsonata.JLambda(json.loads))
        frame.bind("millis", Jsonata.JLambda(lambda: int(moment * 1000)))
        return expression.evaluate(None, frame)


def caught(state: Mapping[str, Any], error: TaskError) -> Mapping[str, Any] | None:
    """The rule of a state's Catch that takes an error."""
    return next((rule for rule in state.get("Catch", []) if error.name in rule["ErrorEquals"]), None)


@cache
def _expression(text: str) -> Any:
    return Jsonata(text.removeprefix("{%").removesuffix("%}").strip())
