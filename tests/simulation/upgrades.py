"""A world in which the stack is updated: executions of the release before go on, and so do some of its functions."""

from typing import Any, ClassVar

from tests.simulation.scenario import Scenario
from tests.simulation.upstream import Run
from tests.support.old_machine import older
from tests.support.scheduler import BEGIN

_OLD_FUNCTIONS_SECONDS = 30.0
"""How long a function of the release before may still wake an execution."""


class Upgrade(Scenario):
    """Executions of the release before are woken by functions of this one; for seconds, it is the other way round."""

    name = "update of the stack"
    foci: ClassVar[tuple[str, ...]] = ("stepfunctions.SendTaskFailure", "stepfunctions.SendTaskSuccess")

    def begin(self) -> None:
        """The release before, until some time; in half of the schedules nothing else goes wrong."""
        world = self.world
        if self.rng.random() < 0.5:
            world.faults.calm()
        self._woken_wrongly = 0
        self._updated_at = BEGIN + self.rng.choice((0.0, 1.0, 5.0, 20.0, 60.0, 200.0))
        new = [machine.definition for machine in world.tracking]
        for machine in world.tracking:
            machine.definition = older(machine.definition)

        def update() -> None:
            for machine, definition in zip(world.tracking, new, strict=True):
                machine.definition = definition

        world.scheduler.at(self._updated_at, update)
        world.wakes_by_success = self._is_woken_by_an_old_function

    def _is_woken_by_an_old_function(self) -> bool:
        old = 0 <= self.world.scheduler.now - self._updated_at < _OLD_FUNCTIONS_SECONDS and self.rng.random() < 0.5
        if old:
            self._woken_wrongly += 1
            self.world.faults.struck["old function"] = self._woken_wrongly
        return old

    def plan(self, run: Run, plan: dict[str, Any]) -> None:
        """Most have files, and many of them end about the time of the update."""
        if self.rng.random() < 0.8:
            plan |= {"status": "succeeded", "files": self.rng.choice((1, 2))}
            until = self._updated_at - self.world.scheduler.now
            plan |= {"queued_seconds": 0.0, "run_seconds": max(1.0, until + self.rng.uniform(-10.0, 20.0))}

    def figures(self) -> dict[str, int]:
        """Executions that old functions woke as if there were nothing to copy."""
        return {"executions that old functions woke without their files": self._woken_wrongly}
