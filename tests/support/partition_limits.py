"""What DynamoDB counts for a read or a write, and refuses beyond its limits of one partition key and of the table.

Of the table and of each index, one partition key takes 1,000 write units and 3,000 read units a second. DynamoDB lends
unused capacity of up to five minutes; nothing is lent here, and a key has the units of one second at once.

https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/bp-partition-key-design.html
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.support.dynamodb import Item

WRITE_UNITS_PER_SECOND = 1000
READ_UNITS_PER_SECOND = 3000
TABLE_UNITS_PER_SECOND = 40_000
"""Of the table and of each index: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

INDEXES = {"by_owner": ("owner", "listed_at"), "due": ("open", "next_check_at"), "by_upstream_id": ("upstream_id",)}
OWN = ("prediction#", "upstream#", "listed#", "webhooks#", "message#", "recent#")
"""Partitions of one prediction or request each."""

PartitionKey = tuple[str, str]
"""`table` or the name of an index, and the value of its partition key."""


def size_of(item: Item | None) -> int:
    """What DynamoDB counts of an item: the bytes of names and values, a number as half its digits."""
    return sum(len(name) + _value_size(value) for name, value in (item or {}).items())


def _value_size(value: dict[str, Any]) -> int:
    kind: str
    held: Any
    ((kind, held),) = value.items()
    match kind, held:
        case "S", str():
            return len(held) if held.isascii() else len(held.encode())
        case "N", str():
            return len(held) // 2 + 2
        case "M", dict():
            return 3 + sum(1 + len(name) + _value_size(each) for name, each in held.items())
        case "L", list():
            return 3 + sum(1 + _value_size(each) for each in held)
        case ("SS", list()) | ("NS", list()):
            return sum(len(each) if kind == "SS" else len(each) // 2 + 2 for each in held)
        case "B", bytes():
            return len(held)
    return 1


def write_units(before: Item | None, after: Item | None, size: int | None = None) -> Iterator[tuple[PartitionKey, int]]:
    """The write units of one write, by partition key; `size` is that of the larger item, if it is known."""
    pk = (after or before or {})["pk"]["S"]
    if size is None:
        size = max(size_of(before), size_of(after))
    yield ("table", pk), max(1, -(-size // 1024))
    for index, names in INDEXES.items():
        # Keys only: an entry is below 1 KB. One whose key changes is deleted and put.
        entries = [
            [item[name] for name in names] if item and all(n in item for n in names) else None
            for item in (before, after)
        ]
        if entries[0] != entries[1]:
            for entry in filter(None, entries):
                yield (index, next(iter(entry[0].values()))), 1


def read_units(size: int, *, consistent: bool) -> float:
    """The read units of so many bytes that are read at once."""
    units = max(1, -(-size // 4096))
    return units if consistent else units / 2


class Throttled(Exception):
    """DynamoDB refuses a request, as ProvisionedThroughputExceededException: nothing was read or written."""


class Bucket:
    """A token bucket.

    Args:
        rate: Tokens that it gets a second.
        burst: The most that it holds; it begins full.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst, self._tokens, self._at = rate, burst, burst, now

    def holds(self, number: float, now: float) -> bool:
        """Whether so many can be taken."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return self._tokens >= number

    def take(self, number: float, now: float) -> bool:
        """Takes so many; whether they were there."""
        held = self.holds(number, now)
        self._tokens -= number if held else 0
        return held

    def is_full(self, now: float) -> bool:
        """Whether nothing was taken that has not come back."""
        return self.holds(self._burst, now)


class PartitionLimits:
    """Counts units by partition key, and refuses what is beyond the limits.

    Args:
        now: The time.

    Attributes:
        throttled: How many requests were refused, by the name of what had no units left.
        peaks: The most units in one second, by name, reads and writes apart.
        total: All write units of the table and its indexes.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.throttled: Counter[str] = Counter()
        self.peaks: dict[str, float] = {}
        self.total = 0
        self._now = now
        self._second = 0
        self._in_second: defaultdict[tuple[str, PartitionKey], float] = defaultdict(float)
        self._buckets: dict[tuple[str, PartitionKey], Bucket] = {}

    def write(self, units: Iterable[tuple[PartitionKey, int]]) -> None:
        """Counts the units of a write.

        Raises:
            Throttled: One of its keys has too few left; an index that is throttled throttles the table's write.
        """
        spent = list(units)
        self._spend("write", spent, WRITE_UNITS_PER_SECOND)
        self.total += sum(number for _, number in spent)

    def read(self, key: PartitionKey, units: float) -> None:
        """Counts the units of a read.

        Raises:
            Throttled: Its key has too few left.
        """
        self._spend("read", [(key, units)], READ_UNITS_PER_SECOND)

    def _spend(self, kind: str, units: Iterable[tuple[PartitionKey, float]], limit: int) -> None:
        now = self._now()
        if int(now) != self._second:
            self._end_second(int(now))
        wanted: dict[tuple[str, PartitionKey], float] = {}
        for (index, key), number in units:
            for each in ((kind, (index, key)), (kind, (index, ""))):
                wanted[each] = wanted.get(each, 0) + number
        for each, number in wanted.items():
            bucket = self._buckets.get(each)
            if bucket is None:
                rate = limit if each[1][1] else TABLE_UNITS_PER_SECOND
                bucket = self._buckets[each] = Bucket(rate, rate, now)
            if not bucket.holds(number, now):
                self.throttled[_name(*each)] += 1
                raise Throttled(_name(*each))
        for each, number in wanted.items():
            self._buckets[each].take(number, now)
            self._in_second[each] += number

    def _end_second(self, second: int) -> None:
        for each, number in self._in_second.items():
            name = _name(*each)
            self.peaks[name] = max(self.peaks.get(name, 0), number)
        self._in_second.clear()
        self._second = second
        if len(self._buckets) > 20_000:
            # One that is full is as one that was never there.
            now = float(second)
            self._buckets = {each: bucket for each, bucket in self._buckets.items() if not bucket.is_full(now)}


def _name(kind: str, key: PartitionKey) -> str:
    """The name of a key for figures: those of one prediction each, and of all owners, have one together."""
    index, value = key
    if not value:
        return f"{kind}: all of {index}"
    if index == "table":
        value = "one prediction" if value.startswith(OWN) else value.partition("#")[0]
        return f"{kind}: {value}"
    return f"{kind}: a key of {index}"
