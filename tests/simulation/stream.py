"""The table's stream: each change at least once, an item's changes in their order, in batches, a while later.

Which changes are passed on says the template's own filter. A batch whose function fails is halved and read again, up to
the template's number of times; then it is noted, and the shard goes on.

https://docs.aws.amazon.com/lambda/latest/dg/services-ddb-batchfailurereporting.html
"""

import json
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.simulation.functions import FunctionFailed
from tests.support.dynamodb import Item, NotModelled
from tests.support.template import load_template, resources

if TYPE_CHECKING:
    from tests.simulation.world import World

FUNCTION = "publish_changes"
SHARDS = 2
_LONGEST_PAUSE_SECONDS = 60.0


@cache
def _source() -> dict[str, Any]:
    (source,) = (
        each["Properties"]
        for each in resources("AWS::Lambda::EventSourceMapping").values()
        if each["Properties"]["EventSourceArn"] == {"Fn::GetAtt": ["PredictionsTable", "StreamArn"]}
    )
    found: dict[str, Any] = source
    return found


@cache
def _patterns() -> list[Any]:
    """The template's patterns; not those under a condition, which is off."""
    filters = _source()["FilterCriteria"]["Filters"]
    return [json.loads(each["Pattern"]) for each in filters if "Pattern" in each]


def _number(name: str, default: int) -> int:
    value = _source().get(name, default)
    return int(load_template()["Parameters"][value["Ref"]]["Default"] if isinstance(value, dict) else value)


def matches(pattern: Any, value: Any) -> bool:
    """Whether a value is what a filter's pattern asks for."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(matches(each, value.get(name)) for name, each in pattern.items())
    return any(_is(each, value) for each in pattern)


def _is(wanted: Any, value: Any) -> bool:
    if not isinstance(wanted, dict):
        return bool(wanted == value)
    ((how, argument),) = wanted.items()
    match how:
        case "prefix":
            return isinstance(value, str) and value.startswith(argument)
        case "exists":
            return (value is not None) is bool(argument)
        case "anything-but":
            others = argument if isinstance(argument, list) else [argument]
            return value is not None and all(value != each for each in others)
    raise NotModelled(f"the filter {how}")


class Stream:
    """The stream of a world's table.

    Attributes:
        dead: Records that were given up.
        records: How many were passed on.
        worst_seconds: The longest time from a change to its being dealt with.
    """

    def __init__(self, world: "World", shards: int = SHARDS) -> None:
        self.dead: list[dict[str, Any]] = []
        self.records = 0
        self.worst_seconds = 0.0
        self._world = world
        self._number = 0
        self._shards: list[list[dict[str, Any]]] = [[] for _ in range(shards)]
        self._busy = [False] * shards

    def written(self, before: Item | None, after: Item | None) -> None:
        """A change of the table."""
        if before == after:
            return
        now = self._world.scheduler.now
        item: Item = after or before or {}
        self._number += 1
        change: dict[str, Any] = {
            "Keys": {"pk": item["pk"], "sk": item["sk"]},
            "SequenceNumber": f"{self._number:021d}",
            "ApproximateCreationDateTime": int(now),
            "StreamViewType": "NEW_AND_OLD_IMAGES",
        }
        if after is not None:
            change["NewImage"] = after
        if before is not None:
            change["OldImage"] = before
        name = "INSERT" if before is None else "REMOVE" if after is None else "MODIFY"
        record = {"eventID": str(self._number), "eventName": name, "eventSource": "aws:dynamodb", "dynamodb": change}
        if any(matches(pattern, record) for pattern in _patterns()):
            self.records += 1
            shard = zlib.crc32(item["pk"]["S"].encode()) % len(self._shards)
            self._shards[shard].append({"at": now, "record": record})
            self._world.scheduler.at(now + self._world.faults.stream_lag(), lambda: self._pump(shard))

    def _pump(self, shard: int) -> None:
        if self._busy[shard] or not self._shards[shard]:
            return
        self._busy[shard] = True
        self._world.scheduler.spawn(f"stream {shard}", lambda: self._read(shard))

    def _read(self, shard: int) -> None:
        size = _number("BatchSize", 100)
        while self._shards[shard]:
            batch, self._shards[shard] = self._shards[shard][:size], self._shards[shard][size:]
            self._hand_over(batch)
            if self._world.faults.of_source():
                self._hand_over(batch)  # at least once
        self._busy[shard] = False

    def _hand_over(self, batch: list[dict[str, Any]]) -> None:
        """Reads a batch until all of it is dealt with, or given up."""
        world, retries = self._world, _number("MaximumRetryAttempts", 10**6)
        waiting = [(batch, 0)]
        while waiting:
            part, tries = waiting.pop(0)
            if tries > retries:
                self.dead += [each["record"] for each in part]
                continue
            if tries:
                world.step("the stream is read again", min(_LONGEST_PAUSE_SECONDS, 2.0 ** (tries - 1)))
            try:
                answer = world.functions.invoke(FUNCTION, {"Records": [each["record"] for each in part]})
            except FunctionFailed as failure:
                world.note(f"{FUNCTION} failed: {failure.kind} {failure.message}")
                half = len(part) // 2
                if half and _source().get("BisectBatchOnFunctionError"):
                    waiting[:0] = [(part[:half], tries + 1), (part[half:], tries + 1)]
                else:
                    waiting.insert(0, (part, tries + 1))
                continue
            failed = {each["itemIdentifier"] for each in answer["batchItemFailures"]}
            first = next((n for n, each in enumerate(part) if _id(each) in failed), len(part))
            if failed and first == len(part):
                raise AssertionError(f"{failed} is none of the batch")
            for each in part[:first]:
                self.worst_seconds = max(self.worst_seconds, world.scheduler.now - each["at"])
            if first < len(part):
                waiting.insert(0, (part[first:], tries + 1))


def _id(each: dict[str, Any]) -> str:
    return str(each["record"]["dynamodb"]["SequenceNumber"])
