"""A world with budgets: of one owner, of the stack, or of both, and too tight for all that is asked for at once."""

from functools import partial
from typing import Any, ClassVar

from predictions.aws.dynamodb import deserialize, serialize

from tests.simulation.callers import Wanted
from tests.simulation.scenario import Scenario
from tests.simulation.upstream import TERMINAL
from tests.simulation.verdict import MICRO_DOLLARS
from tests.simulation.world import World
from tests.support.dynamodb import Item

_ESTIMATE = 10_001
"""What a run of the priced model is taken for before the first one has ended: 10 s."""


class Budgets(Scenario):
    """Several callers start at once what a budget has no room for together."""

    name = "budgets"
    foci: ClassVar[tuple[str, ...]] = ("dynamodb.TransactWriteItems", "dynamodb.TransactWriteItems", "publish_changes")
    alone: ClassVar[bool] = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._limits: dict[str, int] = {}

    def begin(self) -> None:
        """Some requests, by each way in; a later one that finds what the first ones have cost."""
        of = self.rng.choice(("alice", "stack", "both", "both"))
        for owner in ("alice", ""):
            if of == "both" or of == (owner or "stack"):
                self._limits[owner] = round(_ESTIMATE * self.rng.choice((1.2, 2.5, 2.5, 3.1, 20)))
        period = self.rng.choice(("budget_day", "budget_month"))
        for owner, limit in self._limits.items():
            values = {period: limit, "budget_unknown": MICRO_DOLLARS}
            key = ("owner#alice", "limits") if owner else ("limiter", "creates")
            there = self.world.table.items.get(key, serialize({"pk": key[0], "sk": key[1]}))
            self.world.table.items[key] = {**there, **serialize(values)}
            if owner:
                self.world.owner_limits[owner] = {f"{name}_limit": str(value) for name, value in values.items()}
        callers = self.world.callers
        for n in range(self.rng.choice((3, 4, 5))):
            door = self.rng.choice(("key", "key", "sdk", "plain", "queue", "queue"))
            wanted = Wanted(500 + n, door, f"budget {n}", f"budget-{n}", None, None)
            callers.requests.append(wanted)
            delay = self.rng.choice((0.0, 0.0, 0.0, 0.05, 400.0))
            self.world.scheduler.spawn(f"spender {n}", partial(callers.ask_for, wanted), delay)
            if self.rng.random() < 0.3:
                self.world.scheduler.spawn(f"cancel spender {n}", partial(callers.cancel_some_time, wanted))

    def used(self, before: Item | None, after: Item | None) -> None:
        """No reservation passes a budget. No run here costs more than was reserved for it: what grows is one."""
        if after is None or not after["sk"]["S"].startswith("budget#"):
            return
        owner = after["pk"]["S"].partition("#")[2]
        was, now = (int(item["month"]["N"]) if item else 0 for item in (before, after))
        if now > was and now > self._limits.get(owner, 0):
            self.bad(f"the budget of {owner or 'the stack'} was passed: {now} of {self._limits.get(owner, 0)}")

    def _items(self) -> list[dict[str, Any]]:
        return [
            deserialize(item)
            for (pk, sk), item in self.world.table.items.items()
            if pk.startswith("prediction#") and sk == "status"
        ]

    def count_prompts(self) -> None:
        """What waited for a budget until its deadline is not lost: it never was to be started."""
        self.world.special |= {
            item["id"]
            for item in self._items()
            if "reserved_on" not in item and item["status"] == "failed" and "deadline passed" in item.get("error", "")
        }

    def check(self) -> None:
        """Budgets have what was settled, each once; nothing ran that had not reserved."""
        settled = {"alice": 0, "": 0}
        for item in self._items():
            if "reserved_on" not in item:
                if "upstream_id" in item and item["owner"] == "alice":
                    self.bad(f"{item['id']} ran, and had reserved nothing")
                continue
            cost = item.get("cost_micro_dollars")
            amount = item["reserved_unknown"] if cost is None else cost
            if item["visible"] in TERMINAL and item.get("settled_micro_dollars") != amount:
                self.bad(f"{item['id']} cost {cost}, and was settled by {item.get('settled_micro_dollars')}")
            for owner in ("alice", ""):
                if item["reserved_in"] in ("both", "owner" if owner else "stack"):
                    settled[owner] += amount
        for owner, amount in settled.items():
            items = self.world.table.items.items()
            used = sum(
                int(item["month"]["N"])
                for (pk, sk), item in items
                if pk == f"usage#{owner}" and sk.startswith("budget#")
            )
            if used != amount:
                self.bad(f"the budget of {owner or 'the stack'} has {used} as used, and {amount} were spent")

    def figures(self) -> dict[str, int]:
        """What had room, what was refused or waited, and what reached a threshold."""
        reserved = sum("reserved_on" in item for item in self._items())
        refused = sum(wanted.answers[429] for wanted in self.world.callers.requests)
        thresholds = sum(sk.startswith("threshold#") for _, sk in self.world.table.items)
        return {"reserved": reserved, "refused": refused, "waited in vain": len(self.world.special),
                "thresholds": thresholds}  # fmt: skip
