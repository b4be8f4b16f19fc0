"""What an operator allows an owner: so many predictions in flight, and so many in a day.

Limits are kept at `pk` = `owner#{owner}`, `sk` = `limits`; the authorizer reads them with the token, so that a create
over HTTP reads nothing more. An owner without limits costs nothing. What an owner uses of them is two items at `pk` =
`usage#{owner}`:

    in_flight           `ids`: a map of the predictions in flight, and when each began, in milliseconds since 1970
    day#YYYY-MM-DD      `n`: how many began on that day (UTC)

A start takes its place in both by conditional writes, before anything else is written: two starts at once never take
one place. An end does not give its place back: when the map is full, those that have ended are looked up and taken
out, so that an end costs no write. What goes wrong in between counts too much for two minutes, or a day, never too
little.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from predictions.aws import client
from predictions.errors import PredictionsError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

IN_FLIGHT_MAX = 1000
"""The highest limit of predictions in flight: the map of them is one item, and each start is billed by its size."""

PER_DAY_MAX = 10_000_000

# A place without a prediction is given back after this time: between the two writes a function may have died.
_MISSING_MS = 120_000
# What is full is not looked through again by the same process before this time.
_FULL_SECONDS = 2
_CACHE_SECONDS = 60
_RETRY_SECONDS = 10
_CHUNK = 50

# Under this name the index `by_owner` lists the owners that have limits; no owner's name holds a `#`.
_LIST = "#limits"


class LimitInvalid(PredictionsError):
    """A limit that cannot be set; the message says why."""


class LimitReached(PredictionsError):
    """An owner's limit is used up; nothing was written or started.

    Attributes:
        seconds: When to ask again; with the limit of a day, when the day is over.
    """

    def __init__(self, detail: str, seconds: int) -> None:
        super().__init__(detail)
        self.detail = detail
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Place:
    """What `take_place` has taken, for `give_back`.

    Attributes:
        began: When it was added to those in flight, in milliseconds since 1970; None where it was not, or was before.
        day: The day it was counted in, as in the item's key; None where it was not counted.
        n: How many that day had then.
    """

    began: int | None = None
    day: str | None = None
    n: int = 0


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """The limits of one owner; None: there is none of that kind.

    Attributes:
        in_flight: How many predictions and trainings, started and not ended, there may be at once.
        per_day: How many may be started in a day (UTC).
    """

    in_flight: int | None = None
    per_day: int | None = None

    def __bool__(self) -> bool:
        return self.in_flight is not None or self.per_day is not None

    def context(self) -> dict[str, str]:
        """As the authorizer passes them on; API Gateway takes texts."""
        found = {"in_flight_limit": self.in_flight, "per_day_limit": self.per_day}
        return {name: str(limit) for name, limit in found.items() if limit is not None}

    @classmethod
    def of_context(cls, context: Mapping[str, Any]) -> "OwnerLimits":
        """What `context` made."""
        in_flight, per_day = context.get("in_flight_limit"), context.get("per_day_limit")
        return cls(int(in_flight) if in_flight else None, int(per_day) if per_day else None)


class OwnersLimits:
    """The limits that owners have."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "OwnersLimits":
        """Those in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def limits_of(self, owner: str) -> OwnerLimits:
        """An owner's limits, read consistently."""
        found = self._dynamodb.get_item(TableName=self._table_name, Key=_limits_key(owner), ConsistentRead=True)
        item = found.get("Item", {})
        values = [int(item[name]["N"]) if name in item else None for name in ("in_flight", "per_day")]
        return OwnerLimits(*values)

    def set_limits(self, owner: str, limits: OwnerLimits) -> None:
        """Gives an owner these limits, and no others.

        Raises:
            LimitInvalid: Nothing was written.
        """
        if not limits:
            raise LimitInvalid("Give --in-flight, --per-day or both; `limits remove` takes limits away.")
        item: dict[str, Any] = {**_limits_key(owner), "owner": {"S": _LIST}, "listed_at": {"S": owner}}
        given = {"in_flight": (limits.in_flight, IN_FLIGHT_MAX), "per_day": (limits.per_day, PER_DAY_MAX)}
        for name, (limit, most) in given.items():
            if limit is None:
                continue
            if not 0 <= limit <= most:
                raise LimitInvalid(f"--{name.replace('_', '-')} takes 0 to {most}, not {limit}.")
            item[name] = {"N": str(limit)}
        self._dynamodb.put_item(TableName=self._table_name, Item=item)

    def remove_limits(self, owner: str) -> None:
        """Takes an owner's limits away; twice changes nothing."""
        self._dynamodb.delete_item(TableName=self._table_name, Key=_limits_key(owner))

    def list_limits(self) -> Iterator[tuple[str, OwnerLimits]]:
        """The owners that have limits, by name, as far as the index knows."""
        pages = self._dynamodb.get_paginator("query").paginate(
            TableName=self._table_name,
            IndexName="by_owner",
            KeyConditionExpression="#owner = :list",
            ExpressionAttributeNames={"#owner": "owner"},
            ExpressionAttributeValues={":list": {"S": _LIST}},
        )
        for page in pages:
            for item in page["Items"]:
                owner = item["listed_at"]["S"]
                if limits := self.limits_of(owner):
                    yield owner, limits


class OwnersUsage:
    """What owners use of their limits.

    Args:
        table_name: The table.
        dynamodb: The client to use.
        now: The time, in seconds since 1970.
    """

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient", *, now: Callable[[], float] = time.time) -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb
        self._now = now
        self._limits = OwnersLimits(table_name, dynamodb)
        self._known: dict[str, tuple[float, OwnerLimits]] = {}
        self._full: dict[str, float] = {}

    @classmethod
    def from_env(cls) -> "OwnersUsage":
        """That in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def known_limits(self, owner: str) -> OwnerLimits:
        """An owner's limits, for a source that no authorizer stands before; as they were a minute ago at most."""
        known = self._known.get(owner)
        if known is None or known[0] <= self._now():
            if len(self._known) >= 1000:
                self._known.clear()
            known = self._known[owner] = (self._now() + _CACHE_SECONDS, self._limits.limits_of(owner))
        return known[1]

    def take_place(self, owner: str, prediction_id: str, limits: OwnerLimits) -> Place:
        """Takes a place in flight, and one of the day, for a prediction that is about to be started.

        Twice, it has one place in flight, and two of the day.

        Returns:
            What was taken.

        Raises:
            LimitReached: One of the limits is used up.
        """
        began = round(self._now() * 1000)
        added = limits.in_flight is not None and self._add_in_flight(owner, prediction_id, limits.in_flight, began)
        now = self._now()  # the day that is full must be the one whose end is told
        day = datetime.fromtimestamp(now, UTC).date().isoformat()
        n = 0
        if limits.per_day is not None and not (n := self._count_in_day(owner, limits.per_day, day, now)):
            if added:
                self._take_out(owner, {prediction_id: began})
            midnight = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            midnight += timedelta(days=1)
            raise LimitReached(
                f"The owner {owner} may start {limits.per_day} predictions a day, and has: the next ones from"
                f" {midnight.isoformat().replace('+00:00', 'Z')} on.",
                int(midnight.timestamp() - now) + 1,
            )
        return Place(began if added else None, day if n else None, n)

    def give_back(self, owner: str, prediction_id: str, place: Place) -> None:
        """Give back what `take_place` took, for a prediction that is not started after all.

        A count of the day is given back only while it is the latest one: where another was counted meanwhile, or this
        write was made before and its answer lost, the day stays as it is. So it may count too much, never too little.
        """
        if place.began is not None:
            self._take_out(owner, {prediction_id: place.began})
        if place.day is None:
            return
        with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=_usage_key(owner, f"day#{place.day}"),
                UpdateExpression="SET n = :less, given_back = :id",
                ConditionExpression="n = :n AND (attribute_not_exists(given_back) OR given_back <> :id)",
                ExpressionAttributeValues={
                    ":less": {"N": str(place.n - 1)},
                    ":n": {"N": str(place.n)},
                    ":id": {"S": prediction_id},
                },
            )

    def _add_in_flight(self, owner: str, prediction_id: str, limit: int, began: int) -> bool:
        """Whether it had no place before."""
        for attempt in ("as it is", "looked through"):
            if limit > 0 and (before := self._try_in_flight(owner, prediction_id, limit, began)) is not None:
                return before == 0
            if attempt == "looked through" or self._full.get(owner, 0) > self._now():
                break
            if limit == 0 or self._take_out_ended(owner) >= limit:
                self._full[owner] = self._now() + _FULL_SECONDS
                break
        raise LimitReached(
            f"The owner {owner} may have {limit} predictions in flight, and has: the next one when one of them ends.",
            _RETRY_SECONDS,
        )

    def _try_in_flight(self, owner: str, prediction_id: str, limit: int, began: int) -> int | None:
        """When it was added before, 0 if never; None where there is no place."""
        key = _usage_key(owner, "in_flight")
        place = {"N": str(began)}
        try:
            before = self._dynamodb.update_item(
                TableName=self._table_name,
                Key=key,
                UpdateExpression="SET ids.#id = :began",
                ConditionExpression="attribute_exists(ids) AND (size(ids) < :limit OR attribute_exists(ids.#id))",
                ExpressionAttributeNames={"#id": prediction_id},
                ExpressionAttributeValues={":began": place, ":limit": {"N": str(limit)}},
                ReturnValues="UPDATED_OLD",
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
            ).get("Attributes", {})
        except self._dynamodb.exceptions.ConditionalCheckFailedException as error:
            refusal: Any = error.response
            if refusal.get("Item"):
                return None
        else:
            there = before.get("ids", {}).get("M", {})
            return int(there[prediction_id]["N"]) if prediction_id in there else 0
        try:
            self._dynamodb.put_item(
                TableName=self._table_name,
                Item={**key, "ids": {"M": {prediction_id: place}}},
                ConditionExpression="attribute_not_exists(pk)",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            # Somebody else made it just now, or this very write did and its answer was lost.
            return self._try_in_flight(owner, prediction_id, limit, began)
        return 0

    def _take_out_ended(self, owner: str) -> int:
        """Gives back the places of predictions that have ended, or never came to be.

        Returns:
            How many are left, as far as is known: somebody else may be giving some back, or taking some.
        """
        from predictions.items import read_items  # the authorizer, which needs the limits only, goes without
        from predictions.statuses import TERMINAL_RANK

        found = self._dynamodb.get_item(
            TableName=self._table_name, Key=_usage_key(owner, "in_flight"), ConsistentRead=True
        )
        places: Mapping[str, Any] = found.get("Item", {}).get("ids", {}).get("M", {})
        statuses = read_items(
            self._dynamodb, self._table_name, [(f"prediction#{prediction_id}", "status") for prediction_id in places]
        )
        long_ago = self._now() * 1000 - _MISSING_MS
        gone: dict[str, int] = {}
        for prediction_id, place in places.items():
            status, began = statuses.get((f"prediction#{prediction_id}", "status")), int(place["N"])
            if status["rank"] >= TERMINAL_RANK if status else began < long_ago:
                gone[prediction_id] = began
        ids = list(gone)
        chunks = [{each: gone[each] for each in ids[n : n + _CHUNK]} for n in range(0, len(ids), _CHUNK)]
        for chunk in chunks:
            self._take_out(owner, chunk)
        return len(places) - len(gone)

    def _take_out(self, owner: str, places: Mapping[str, int]) -> None:
        """Gives places back, unless one of them was taken anew meanwhile."""
        named = dict(enumerate(places.items()))
        with contextlib.suppress(self._dynamodb.exceptions.ConditionalCheckFailedException):
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=_usage_key(owner, "in_flight"),
                UpdateExpression="REMOVE " + ", ".join(f"ids.#p{n}" for n in named),
                ConditionExpression=" AND ".join(f"ids.#p{n} = :p{n}" for n in named),
                ExpressionAttributeNames={f"#p{n}": prediction_id for n, (prediction_id, _) in named.items()},
                ExpressionAttributeValues={f":p{n}": {"N": str(began)} for n, (_, began) in named.items()},
            )

    def _count_in_day(self, owner: str, limit: int, day: str, now: float) -> int:
        """Takes a place of the day, where it has one; how many are taken then, or 0."""
        if limit == 0:
            return 0
        try:
            counted = self._dynamodb.update_item(
                TableName=self._table_name,
                Key=_usage_key(owner, f"day#{day}"),
                UpdateExpression="ADD n :one SET expires_at = :expires",
                ConditionExpression="attribute_not_exists(n) OR n < :limit",
                ExpressionAttributeValues={
                    ":one": {"N": "1"},
                    ":limit": {"N": str(limit)},
                    ":expires": {"N": str(int(now) + 2 * 86400)},
                },
                ReturnValues="ALL_NEW",
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return 0
        return int(counted["Attributes"]["n"]["N"])


def _limits_key(owner: str) -> dict[str, Any]:
    return {"pk": {"S": f"owner#{owner}"}, "sk": {"S": "limits"}}


def _usage_key(owner: str, sk: str) -> dict[str, Any]:
    return {"pk": {"S": f"usage#{owner}"}, "sk": {"S": sk}}
