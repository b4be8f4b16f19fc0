"""What a schedule may have beside predictions and their callers: the interface of the named worlds."""

from typing import TYPE_CHECKING, Any, ClassVar

import httpx

if TYPE_CHECKING:
    from tests.simulation.callers import Wanted
    from tests.simulation.upstream import Run
    from tests.simulation.world import World
    from tests.support.dynamodb import Item


class Scenario:
    """A named world: it adds actors to a schedule, and knows what was promised to them.

    Attributes:
        name: For figures, and for sabotages that only it can notice.
        environment: Variables of the functions that are others in it.
        foci: Where faults are aimed at, in some of its schedules; see `Faults.aim_at`.
        alone: Whether a schedule that has it has no other one.
        end_seconds: By when all of it has to be over, where that is later than for predictions.
    """

    name: ClassVar[str] = ""
    environment: ClassVar[dict[str, str]] = {}
    foci: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False
    end_seconds: ClassVar[float] = 0.0

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.rng

    def begin(self) -> None:
        """Adds its actors, before the schedule begins."""

    def dress(self, wanted: "Wanted") -> None:
        """Adds to an ordinary request, before it is made."""

    def plan(self, run: "Run", plan: dict[str, Any]) -> None:
        """Changes how a prediction goes at Replicate, before it begins."""

    def reads(self, run: "Run") -> bool:  # for others to say
        """Whether the function that reads Replicate's answer of a prediction is killed over it."""
        return False

    def creates(self, request: httpx.Request, body: dict[str, Any], path: str) -> httpx.Response | None:
        """What becomes of a create; None where it goes as ever. Raises httpx's errors, and `Died`."""
        return None

    def answers(self, request: httpx.Request, path: str) -> httpx.Response | None:
        """What Replicate answers to anything else; None where it goes as ever."""
        return None

    def writes(self, text: str) -> bool:
        """Whether the function that writes an input down is killed over it."""
        return False

    def tells(self, token: str) -> float:
        """How many seconds longer it takes to tell a state."""
        return 0.0

    def ended(self, prediction_id: str) -> None:
        """A prediction has visibly ended: called in the midst of that write."""

    def used(self, before: "Item | None", after: "Item | None") -> None:
        """What an owner or the stack uses of limits and budgets has changed: called in the midst of that write."""

    def count_prompts(self) -> None:
        """Counts, in the world's `prompts`, how often what it asked for may have been started."""

    def check(self) -> None:
        """Looks at what is left, and adds what is broken to the world's violations."""

    def figures(self) -> dict[str, int]:
        """What happened in it, counted."""
        return {}

    def longest(self, what: str, seconds: float) -> None:
        """Notes a delay, of which figures show the longest."""
        self.world.longest(what, seconds)

    def bad(self, what: str) -> None:
        """Something is broken."""
        self.world.violations.append(f"{self.name}: {what}")
