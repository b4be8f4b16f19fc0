"""The code of scale, taken out: what each load of `scale` has to notice."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from predictions.admission import schedule
from predictions.admission.schedule import Schedule
from predictions.lifecycle.fan_out import FanOut
from predictions.store import keys

from tests.simulation.world import definition


@contextmanager
def shards() -> Iterator[None]:
    """Everything that is open has one partition key of the index `due`."""
    with mock.patch.object(keys, "_SHARDS", ("open#0",)):
        yield


@contextmanager
def shared_sweep() -> Iterator[None]:
    """One run of the sweep looks at everything that is due."""
    with mock.patch.object(FanOut, "share", lambda self, _: (list(self._table.count_open()), False)):
        yield


@contextmanager
def near_starts_left_to_the_fastest() -> Iterator[None]:
    """Functions that others were faster than try for the same starts again."""

    def plan(self: Schedule, *given: Any, **named: Any) -> Any:
        return real(self, *given, **{**named, "contended": False})

    real = Schedule.plan
    with mock.patch.object(Schedule, "plan", plan), mock.patch.object(schedule, "CATCH_UP_MS", 0):
        yield


@contextmanager
def polls() -> Iterator[None]:
    """An execution whose webhook does not come fails, and does not poll."""

    def changed(name: str, start_at: str = "") -> object:
        found = copy.deepcopy(definition(name, start_at))
        for state in found["States"].values():
            if state.get("Resource", "").endswith("updateItem.waitForTaskToken"):
                state["Catch"] = [each for each in state["Catch"] if "States.Timeout" not in each["ErrorEquals"]]
        return found

    with (
        mock.patch("tests.simulation.loaded.definition", changed),
        mock.patch("tests.simulation.world.definition", changed),
    ):
        yield


@contextmanager
def message_groups() -> Iterator[None]:
    """Lines of batches are sent without `MessageGroupId`."""

    def changed(name: str, start_at: str = "") -> object:
        found = copy.deepcopy(definition(name, start_at))
        if name == "run_batch":
            line = found["States"]["RunLines"]["ItemProcessor"]["States"]["RunLine"]
            del line["Parameters"]["MessageGroupId.$"]
        return found

    with (
        mock.patch("tests.simulation.loaded.definition", changed),
        mock.patch("tests.simulation.world.definition", changed),
    ):
        yield
