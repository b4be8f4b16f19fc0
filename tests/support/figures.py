"""Counts of calls."""

from collections import Counter
from typing import Any

from predictions.aws import clients

WRITES = {"PutItem", "UpdateItem", "DeleteItem", "BatchWriteItem", "TransactWriteItems"}


class Calls:
    """Counts the calls to one AWS service by operation."""

    def __init__(self, service: Any) -> None:
        self.counted: Counter[str] = Counter()
        clients.client(service).meta.events.register(f"before-call.{service}", self._count)

    def _count(self, model: Any, **_: Any) -> None:
        self.counted[model.name] += 1

    @property
    def writes(self) -> int:
        return sum(self.counted[name] for name in WRITES)
