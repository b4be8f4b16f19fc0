"""Fan-out of the sweep: if more is due than one run checks in time, further runs of its function share it.

A run of the schedule counts what is due and hands groups of shards to runs of its own function, which it invokes
asynchronously with `{"shards": [...]}`. Such a run invokes none, so a minute starts at most `RUNS_AT_ONCE` of them, and
it ends before the next sweep counts again. Each item is checked under the condition that its `next_check_at` is as it
was read, and the check begins by deferring it: two runs over one shard check an item once. So

- a run that is invoked twice, or late, checks what is still due;
- a run that never starts, or dies, leaves its items due: the next sweep counts and shares them;
- groups for which the invocation fails are checked by the run of the schedule itself, after its own group.

No concurrency is reserved: accounts that may run ten functions at once have none to reserve.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.aws.clients import client
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.keys import OPEN_SHARDS
from predictions.store.reads import PredictionReads

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

ITEMS_OF_A_RUN = 300
"""Items that one run checks in `RUN_SECONDS`: a check makes about eight calls of 20 ms each."""

RUN_SECONDS = 50
"""How long a run checks shards that were handed to it: the next sweep counts again 60 s after the one before."""

RUNS_AT_ONCE = 8
"""Runs that share the shards of one sweep, with the one of the schedule."""


class FanOut:
    """Share what is due among runs of the sweep's function.

    Args:
        table: Counts what is open and due.
        lambda_: Invokes the function; made with the first one by default, because few sweeps need it.
    """

    def __init__(
        self,
        table: PredictionReads,
        lambda_: "LambdaClient | None" = None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = table
        self._given = lambda_
        self._now = now
        self._clock = clock

    @property
    def _lambda(self) -> "LambdaClient":
        return self._given or client("lambda")

    def share(self, function_name: str) -> tuple[Sequence[str], bool]:
        """Count what is open, and hand over what this run does not check itself.

        Args:
            function_name: The function of this run.

        Returns:
            The shards for this run to check, none if nothing is open, and whether others were handed over.

        Raises:
            ClientError, BotoCoreError: The table could not be read; nothing was handed over.
        """
        counts = self._table.count_open()
        total = sum(counts.values())
        if total:
            metrics.add_metric(name="OpenItems", unit=MetricUnit.Count, value=total)
        # Whatever is open is counted for an alarm anyway; what is due of it costs further calls.
        if total <= ITEMS_OF_A_RUN:
            return list(counts), False
        own, *others = groups_of(self._table.count_due(self._now(), counts))
        handed = [group for group in others if self._hand(function_name, group)]
        left = [shard for group in others if group not in handed for shard in group]
        return [*own, *left], bool(handed)

    def for_a_run(self, remaining_seconds: Callable[[], float]) -> Callable[[], float]:
        """Return what says how much time is left to a run of shared shards: none after `RUN_SECONDS` from now."""
        until = self._clock() + RUN_SECONDS
        return lambda: remaining_seconds() if self._clock() < until else 0

    def _hand(self, function_name: str, shards: Sequence[str]) -> bool:
        payload = json.dumps({"shards": shards}).encode()
        try:
            self._lambda.invoke(FunctionName=function_name, InvocationType="Event", Payload=payload)
        except (ClientError, BotoCoreError):
            # Also if the invocation was accepted and its response lost: then both check these shards, each item once.
            logger.exception("shards not handed over", shards=shards)
            return False
        return True


def groups_of(due: Mapping[str, int]) -> list[list[str]]:
    """Divide shards into as few groups as check them in time, with about as many items each; the first may be empty."""
    number = max(1, min(RUNS_AT_ONCE, len(due), math.ceil(sum(due.values()) / ITEMS_OF_A_RUN)))
    groups: list[tuple[int, list[str]]] = [(0, []) for _ in range(number)]
    for shard, count in sorted(due.items(), key=lambda each: -each[1]):
        least = min(range(number), key=lambda n: groups[n][0])
        groups[least] = groups[least][0] + count, [*groups[least][1], shard]
    return [shards for _, shards in groups]


def handed_over(event: Mapping[str, Any]) -> list[str]:
    """Return the shards that another run handed over to this one; none for a run of the schedule."""
    asked = event.get("shards") or ()
    return [shard for shard in OPEN_SHARDS if shard in asked]
