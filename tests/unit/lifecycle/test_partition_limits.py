"""DynamoDB takes 1,000 write units a second for one partition key, of the table and of each index.

The writes of predictions are counted as DynamoDB bills them, with the real code, and laid out for 280 predictions a
second (a million an hour):
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/bp-partition-key-design.html
"""

import bisect
import itertools
import json
from collections import Counter

import pytest
from predictions.admission.rate_limiter import Limiter
from predictions.admission.schedule import AskAgain, Start
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
from tests.support.partition_limits import OWN, WRITE_UNITS_PER_SECOND, write_units
from tests.support.predictions import put
from tests.support.protocol import Submissions
from tests.support.quick_aws import QUICK

PER_SECOND = 280
COUNTED = 64
Units = Counter[tuple[str, str]]


@pytest.fixture
def units(table: PredictionsTable, monkeypatch: pytest.MonkeyPatch) -> Units:
    counted: Units = Counter()
    assert QUICK.table is not None
    written = QUICK.table._written

    def count(before: Item | None, after: Item | None) -> None:
        for key, each in write_units(before, after):
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
    over = {key: rate for key, rate in a_second.items() if rate >= WRITE_UNITS_PER_SECOND}
    assert not over
    assert max(units[key] for key in units.keys() - shared.keys()) < 50
    # Together, the shards take what would be too much for one.
    assert sum(rate for (index, _), rate in a_second.items() if index == "due") > WRITE_UNITS_PER_SECOND


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


@pytest.mark.parametrize("owners", [1, 1000])
@pytest.mark.parametrize("lane", ["queue", "http"])
def test_limiter_stays_below_the_limit_of_a_partition_key_however_many_owners_wait(
    units: Units, clock: Clock, lane: str, owners: int
) -> None:
    """A saturated limiter: three times the rate is asked for, by forty functions."""
    limiters = [
        Limiter("predictions", clients.client("dynamodb"), creates_per_minute=60 * PER_SECOND, now=clock.now)
        for _ in range(40)
    ]
    for limiter in limiters:
        limiter.block(1)
    clock.advance(1)
    units.clear()
    asked, starts, seconds = itertools.count(), 0, 1
    turns: list[tuple[float, str]] = []
    for _ in range(seconds * 100):
        clock.advance(0.01)
        due = [turns.pop(0) for _ in list(turns) if turns[0][0] <= clock.now()][:8]
        for turn, owner in [*due, *((None, f"owner-{next(asked) % owners}") for _ in range(9 - len(due)))]:
            limiter = limiters[next(asked) % len(limiters)]
            reserve = limiter.reserve_for_queue if lane == "queue" else limiter.reserve_for_caller
            answer = reserve(owner, latest=clock.now() + 3600, turn_at=turn)
            if isinstance(answer, Start):
                starts += 1
            elif isinstance(answer, AskAgain) and answer.at <= clock.now() + seconds:
                bisect.insort(turns, (answer.at, owner))
    assert starts >= seconds * PER_SECOND * (0.9 if lane == "queue" else 1)
    found = {key: count / seconds for (_, key), count in units.items()}
    # One unit for each start, and for some that others were faster with; in this second, each owner's first one too.
    of_the_item = found.pop("limiter")
    assert of_the_item < WRITE_UNITS_PER_SECOND
    assert of_the_item <= 1.1 * starts / seconds
    assert found.keys() <= {f"limiter#{n:x}" for n in range(16)}
    assert max(found.values()) < WRITE_UNITS_PER_SECOND
