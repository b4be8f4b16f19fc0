"""DynamoDB takes 1,000 write units a second for one partition key, of the table and of each index.

The writes of predictions are counted as DynamoDB bills them, with the real code, and laid out for 280 predictions a
second (a million an hour):
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/bp-partition-key-design.html
"""

import json
from collections import Counter
from collections.abc import Iterator

import pytest
from predictions.admission.rate_limiter import Limiter
from predictions.aws import clients
from predictions.files.output_references import StoredFile
from predictions.intents.model import create_intent
from predictions.store.keys import prediction_key
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction
from predictions.upstream.prediction import UpstreamPrediction

from tests.support.dynamodb import Item
from tests.support.fakes import VERSION, Clock, Executed, ReplicateInMemory, Wakes
from tests.support.fixtures import make_submissions
from tests.support.predictions import put
from tests.support.protocol import Submissions
from tests.support.quick_aws import QUICK

PER_SECOND = 280
UNITS_PER_SECOND = 1000
COUNTED = 64
INDEXES = {"by_owner": ("owner", "listed_at"), "due": ("open", "next_check_at"), "by_upstream_id": ("upstream_id",)}
OWN = ("prediction#", "upstream#", "listed#", "webhooks#")
"""Partitions of one prediction each."""

Units = Counter[tuple[str, str]]


def size_of(item: Item | None) -> int:
    """About what DynamoDB counts: the names and values, a number as half its digits."""
    return len(json.dumps(item or {}, separators=(",", ":"))) - 8 * len(item or {})


def units_of(before: Item | None, after: Item | None) -> Iterator[tuple[tuple[str, str], int]]:
    """The write units of one write, by index and partition key."""
    pk = (after or before or {})["pk"]["S"]
    yield ("table", pk), max(1, -(-max(size_of(before), size_of(after)) // 1024))
    for index, names in INDEXES.items():
        # Keys only: an entry is below 1 KB. One whose key changes is deleted and put.
        entries = [[item[name] for name in names] if item and all(n in item for n in names) else None
                   for item in (before, after)]  # fmt: skip
        if entries[0] != entries[1]:
            for entry in filter(None, entries):
                yield (index, next(iter(entry[0].values()))), 1


@pytest.fixture
def units(table: PredictionsTable, monkeypatch: pytest.MonkeyPatch) -> Units:
    counted: Units = Counter()
    assert QUICK.table is not None
    written = QUICK.table._written

    def count(before: Item | None, after: Item | None) -> None:
        for key, each in units_of(before, after):
            counted[key] += each
        written(before, after)

    monkeypatch.setattr(QUICK.table, "_written", count)
    return counted


@pytest.fixture
def submissions(
    table: PredictionsTable, replicate: ReplicateInMemory, executed: Executed, wakes: Wakes, clock: Clock
) -> Submissions:
    limiter = Limiter("predictions", clients.client("dynamodb"), creates_per_minute=60 * PER_SECOND, now=clock.now)
    return make_submissions(table, replicate, executed, clock, limiter=limiter)


def wait_and_finish(table: PredictionsTable, prediction: Prediction, clock: Clock) -> None:
    """The state waits with its token; the webhook comes; the files are copied; all of it by three writers."""
    clients.client("dynamodb").update_item(
        TableName="predictions",
        Key={"pk": {"S": prediction_key(prediction.id).pk}, "sk": {"S": "status"}},
        UpdateExpression="SET task_token = :t, next_check_at = :n",
        ExpressionAttributeValues={":t": {"S": "t" * 700}, ":n": {"N": str(int(clock.now()) + 180)}},
    )
    there = table.get(prediction.id)
    assert there is not None
    report = {"id": there.upstream_id, "status": "succeeded", "output": "https://replicate.delivery/x/out.png"}
    ended = table.merge(prediction.id, UpstreamPrediction.parse(report), clock.now()).prediction
    assert ended is not None
    assert table.lease_copy(ended, 1, 100, clock.now())
    assert table.end_copy(ended, [StoredFile("", 0, "alice/x/0.png", 5, "s" * 64, "image/png")], clock.now())


def assert_below_the_limit(units: Units) -> None:
    """Each shared key stays below the limit at 280 a second; those of one prediction take no more than it writes."""
    shared = {key: count for key, count in units.items() if not key[1].startswith(OWN) and key[0] != "by_upstream_id"}
    a_second = {key: PER_SECOND * count / COUNTED for key, count in shared.items()}
    assert {key[0] for key in a_second} == {"table", "by_owner", "due"}
    over = {key: rate for key, rate in a_second.items() if rate >= UNITS_PER_SECOND}
    assert not over
    assert max(units[key] for key in units.keys() - shared.keys()) < 50
    # Together, the shards take what would be too much for one.
    assert sum(rate for (index, _), rate in a_second.items() if index == "due") > UNITS_PER_SECOND


def test_creates_over_http_stay_below_the_limit_of_every_partition_key(
    submissions: Submissions, table: PredictionsTable, units: Units, clock: Clock
) -> None:
    body = json.dumps({"version": VERSION, "input": {"prompt": "fox"}}).encode()
    for _ in range(COUNTED):
        clock.advance(1 / PER_SECOND)
        intent = create_intent(
            body, {"content-type": "application/json"}, owner="alice", reference=None, allow_loopback_webhooks=False
        )
        wait_and_finish(table, submissions.start(intent), clock)
    assert_below_the_limit(units)


def test_requests_by_the_queue_stay_below_the_limit_of_every_partition_key(
    submissions: Submissions, table: PredictionsTable, units: Units, clock: Clock
) -> None:
    for _ in range(COUNTED):
        clock.advance(1 / PER_SECOND)
        prediction = put(table, clock, claim=False)
        submissions.submit(prediction.id)
        wait_and_finish(table, prediction, clock)
    assert_below_the_limit(units)


@pytest.mark.parametrize(("owners", "most"), [(1, 1), (1000, 4)])
def test_item_of_the_limiter_is_bounded_however_many_owners_wait(
    units: Units, clock: Clock, owners: int, most: int
) -> None:
    """By its units a write, docs/scale.md says at which rate a saturated limiter reaches the limit."""
    limiter = Limiter("predictions", clients.client("dynamodb"), creates_per_minute=60 * PER_SECOND, now=clock.now)
    for n in range(400):
        limiter.reserve_for_queue(f"owner-{n % owners}", latest=clock.now() + 3600)
    last = units["table", "limiter"]
    limiter.reserve_for_queue("owner-1", latest=clock.now() + 3600)
    assert units["table", "limiter"] - last <= most
