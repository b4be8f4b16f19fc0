"""Webhooks are fair: a receiver that hangs delays its own owner's, and no other's."""

from collections import deque
from functools import partial
from typing import Any

import httpx
import pytest
from predictions.aws import clients
from predictions.aws.dynamodb import Table as ItemTable
from predictions.aws.dynamodb import serialize
from predictions.files.outputs_bucket import OutputsBucket
from predictions.notifications.signing_secrets import OwnerSecrets, SecretVersions
from predictions.notifications.webhook_order import WebhookOrder
from predictions.notifications.webhook_queue import DeadLetters, DeliveriesQueue, Delivery
from predictions.notifications.webhook_sender import Receivers
from predictions.notifications.webhook_slots import (
    LEASE_SECONDS,
    MARK_SECONDS,
    SHARE,
    SLOW_SECONDS,
    NoSlotFree,
    Slot,
    WebhookSlots,
)
from predictions.store.predictions import PredictionsTable
from predictions.views.prediction import Presenter

from tests.reliability import Recorded
from tests.support.apps import AwsCalls
from tests.support.aws_clients import AwsError, Clients, raise_client_error
from tests.support.dynamodb import ConditionFailed, Table
from tests.support.fakes import API_URL, Clock, refusing
from tests.support.scheduler import Scheduler
from tests.support.template import resources, variables

ORIGIN = "https://hooks.example.com"
CONSUMERS = 20
SLOTS = CONSUMERS // SHARE
EXPRESSION_LIMIT_BYTES = 4096
"""https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html, which moto does not know."""


@pytest.fixture
def slots(cloud: None) -> WebhookSlots:
    return WebhookSlots("predictions", clients.client("dynamodb"), SLOTS, choose=min)


def slow(slots: WebhookSlots, clock: Clock, *, owner: str = "mallory", origin: str = ORIGIN) -> None:
    slot = slots.acquire(owner, origin, clock.now())
    clock.advance(SLOW_SECONDS)
    slots.release(slot, clock.now())


def taken(slots: WebhookSlots, clock: Clock, *, owner: str = "mallory", origin: str = ORIGIN) -> list[Slot]:
    """All slots that there are, up to twice as many."""
    found = []
    for _ in range(2 * SLOTS):
        try:
            found.append(slots.acquire(owner, origin, clock.now()))
        except NoSlotFree:
            break
    return found


class TestSlots:
    def test_owner_whose_receivers_are_fast_has_no_limit_and_writes_nothing(
        self, slots: WebhookSlots, clock: Clock
    ) -> None:
        calls = AwsCalls()
        found = taken(slots, clock)
        assert len(found) == 2 * SLOTS
        clock.advance(SLOW_SECONDS - 0.1)
        for slot in found:
            slots.release(slot, clock.now())
        assert set(calls.made) == {"dynamodb.GetItem"}

    def test_origin_that_was_slow_is_limited_for_two_minutes_and_no_other_is(
        self, slots: WebhookSlots, clock: Clock
    ) -> None:
        slow(slots, clock)
        clock.advance(MARK_SECONDS - 1)
        assert len(taken(slots, clock)) == SLOTS
        assert len(taken(slots, clock, origin="https://other.example.com")) == 2 * SLOTS
        assert len(taken(slots, clock, owner="alice")) == 2 * SLOTS
        clock.advance(1)
        assert len(taken(slots, clock)) == 2 * SLOTS

    def test_owner_with_three_slow_origins_is_limited_at_every_origin(self, slots: WebhookSlots, clock: Clock) -> None:
        for n in range(3):
            assert len(taken(slots, clock, origin="https://new.example.com")) == 2 * SLOTS
            slow(slots, clock, origin=f"https://{n}.example.com")
        assert len(taken(slots, clock, origin="https://new.example.com")) == SLOTS

    def test_slot_that_is_released_is_free_again(self, slots: WebhookSlots, clock: Clock) -> None:
        slow(slots, clock)
        held = taken(slots, clock)
        slots.release(held[2], clock.now())
        assert [slot.name for slot in taken(slots, clock)] == ["slot_2"]

    def test_slot_of_a_function_that_died_is_free_when_its_lease_ends_and_not_freed_by_a_late_one(
        self, slots: WebhookSlots, clock: Clock
    ) -> None:
        slow(slots, clock)
        first = taken(slots, clock)
        clock.advance(LEASE_SECONDS)
        assert len(taken(slots, clock)) == SLOTS
        slots.release(first[0], clock.now())  # late: the slot is another one's by now
        assert taken(slots, clock) == []

    def test_slot_that_another_one_takes_meanwhile_is_not_taken_twice(self, slots: WebhookSlots, clock: Clock) -> None:
        slow(slots, clock)
        with refusing("UpdateItem", "ConditionalCheckFailedException", service="dynamodb"), pytest.raises(NoSlotFree):
            slots.acquire("mallory", ORIGIN, clock.now())

    def test_try_that_is_over_is_not_repeated_because_its_slot_cannot_be_released(
        self, slots: WebhookSlots, clock: Clock
    ) -> None:
        slow(slots, clock)
        slot = slots.acquire("mallory", ORIGIN, clock.now())
        with refusing("UpdateItem", "AccessDeniedException", service="dynamodb"):
            slots.release(slot, clock.now())

    def test_item_stays_small_however_many_origins_were_slow(self, slots: WebhookSlots, clock: Clock) -> None:
        for n in range(40):
            slow(slots, clock, origin=f"https://{n}.example.com")
            clock.advance(MARK_SECONDS / 4)
        (item,) = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert len([name for name in item if name.startswith("slow_")]) <= 5
        assert int(item["expires_at"]["N"]) > clock.now()

    def test_write_of_a_mark_is_one_that_dynamodb_takes_however_many_marks_have_ended(
        self, slots: WebhookSlots, clock: Clock
    ) -> None:
        # As many as all slots together can make while marks last.
        ended = int(SLOTS * MARK_SECONDS / SLOW_SECONDS)
        clients.client("dynamodb").put_item(
            TableName="predictions",
            Item=serialize({
                "pk": "owner#mallory", "sk": "webhook_slots",
                **{f"slow_{n:016x}": int(clock.now() * 1000) for n in range(ended)},
            }),
        )  # fmt: skip
        sizes: list[int] = []

        def measure(params: dict[str, Any], **_: Any) -> None:
            sizes.append(len(params["UpdateExpression"]))

        events = clients.client("dynamodb").meta.events
        events.register("before-parameter-build.dynamodb.UpdateItem", measure)
        for n in range(10):
            slow(slots, clock, origin=f"https://{n}.example.com")
            clock.advance(MARK_SECONDS)
        assert max(sizes) <= EXPRESSION_LIMIT_BYTES
        (item,) = clients.client("dynamodb").scan(TableName="predictions")["Items"]
        assert len([name for name in item if name.startswith("slow_")]) == 1

    @pytest.mark.parametrize(("consumers", "wanted"), [("2", 1), ("5", 1), ("20", 5), ("1000", 250)])
    def test_one_owner_has_a_quarter_of_the_consumers_that_are_deployed_and_at_least_one(
        self, cloud: None, clock: Clock, monkeypatch: pytest.MonkeyPatch, consumers: str, wanted: int
    ) -> None:
        monkeypatch.setenv("DELIVERIES_CONCURRENCY", consumers)
        slots = WebhookSlots.from_env()
        assert slots._slots == wanted
        slow(slots, clock)
        for _ in range(min(wanted, 5)):
            slots.acquire("mallory", ORIGIN, clock.now())
        if wanted <= 5:
            with pytest.raises(NoSlotFree):
                slots.acquire("mallory", ORIGIN, clock.now())

    def test_limit_leaves_most_consumers_to_others_and_a_lease_outlives_the_function(self) -> None:
        source = resources("AWS::Lambda::EventSourceMapping")["DeliveriesEventSource"]["Properties"]
        assert source["ScalingConfig"] == {"MaximumConcurrency": {"Ref": "DeliveriesConcurrency"}}
        assert variables("DeliverWebhookFunction")["DELIVERIES_CONCURRENCY"] == {"Ref": "DeliveriesConcurrency"}
        function = resources("AWS::Serverless::Function")["DeliverWebhookFunction"]["Properties"]
        assert function["Timeout"] <= LEASE_SECONDS


# -- the queue and its consumers in virtual time ---------------------------------------------------------------------


class Items(Table):
    """The table in memory, which finds an item's neighbours by their key."""

    def _candidates(self, index: str | None, values: dict[str, Any]) -> list[tuple[str, str]]:
        assert index is None
        pk = values[":pk"]["S"]
        return [key for sk in ("status", "result#upstream") if (key := (pk, sk)) in self.items]


class Town:
    """The deliveries queue, in the order of its messages, with its consumers, and two owners' receivers.

    Every call to AWS takes 5 ms, so that functions act between each other's calls.
    """

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.clients = Clients()
        self.clients.world = self
        self.items = Items(lambda: self.scheduler.now)
        self.late: dict[str, list[float]] = {"alice": [], "mallory": []}
        self.hangs = True
        self._waiting: deque[Delivery] = deque()
        self._busy = 0
        self._hidden: dict[str, int] = {}
        self._due: dict[str, float] = {}
        dynamodb = self.clients("dynamodb")
        outputs = OutputsBucket("outputs")
        self.receivers = Receivers(
            PredictionsTable("predictions", outputs, dynamodb),
            Presenter(outputs, 3600),
            OwnerSecrets(SecretVersions("predictions", dynamodb), "master", self.clients("secretsmanager")),
            DeliveriesQueue("deliveries", self.clients("sqs")),
            DeadLetters("dead", self.clients("sqs")),
            WebhookSlots("predictions", dynamodb, SLOTS),
            WebhookOrder(ItemTable("predictions", dynamodb)),
            allow_loopback=False,
            open_client=lambda **_: httpx.Client(transport=httpx.MockTransport(self._receive)),
            now=lambda: self.scheduler.now,
            jitter=lambda: 0.5,
        )

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """What botocore's clients ask of AWS."""
        self.scheduler.sleep(0.005)
        if service == "dynamodb":
            try:
                return self.items.call(operation, asked)
            except ConditionFailed:
                raise_client_error(client, operation, AwsError("ConditionalCheckFailedException"))
        if operation == "ChangeMessageVisibility":
            self._hidden[asked["ReceiptHandle"]] = asked["VisibilityTimeout"]
            return {}
        return {"SecretString": "m" * 64}

    def run(self, minutes: int, ends_a_minute: int, recovered_minutes: int = 0) -> None:
        """Mallory's predictions end so often, Alice's every ten seconds; then Mallory's receiver recovers."""
        begin = self.scheduler.now
        due = [("mallory", begin + n * 60 / ends_a_minute) for n in range(minutes * ends_a_minute)]
        due += [("alice", begin + n * 10) for n in range(minutes * 6)]
        for n, (owner, moment) in enumerate(due):
            self.scheduler.at(moment, partial(self._end, owner, n))
        self.scheduler.at(begin + minutes * 60, self._recover)
        self.scheduler.run(begin + (minutes + recovered_minutes) * 60)

    def _recover(self) -> None:
        self.hangs = False

    def _end(self, owner: str, n: int) -> None:
        """A prediction of an owner ends now; its webhook is due."""
        id_ = f"{owner}{n}".ljust(26, "x")
        base = {"id": id_, "owner": owner, "created_at": "2025-06-15T15:06:40Z", "created": 1, "fingerprint": "f"}
        state = {"source": "http", "keyed": False, "kind": "version", "rank": 9, "status": "succeeded"}
        more = {"visible": "succeeded", "deadline": 1, "execution_n": 1, "expires_at": 1, "upstream_id": "upstream"}
        webhook = {"webhook": f"https://{owner}.example.com/", "webhook_events_filter": ["completed"]}
        key = {"pk": f"prediction#{id_}", "sk": "status"}
        self.items.items[key["pk"], key["sk"]] = serialize({**key, **base, **state, **more, **webhook})
        delivery = Delivery(id_, "completed", 1, int(self.scheduler.now))
        self._due[delivery.webhook_id] = self.scheduler.now
        self._arrive(delivery)

    def _arrive(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._busy < CONSUMERS:
            delivery = self._waiting.popleft()
            self._busy += 1
            self.scheduler.spawn(delivery.id, partial(self._consume, delivery))

    def _consume(self, delivery: Delivery) -> None:
        done = self.receivers.deliver(delivery, delivery.id)
        self._busy -= 1
        if not done:
            hidden = self._hidden.pop(delivery.id)
            self.scheduler.at(self.scheduler.now + hidden, partial(self._arrive, delivery))
        self._hand_out()

    def _receive(self, request: httpx.Request) -> httpx.Response:
        owner = request.url.host.partition(".")[0]
        if owner == "mallory" and self.hangs:
            self.scheduler.sleep(10)
            raise httpx.ReadTimeout("hangs")
        self.scheduler.sleep(0.1)
        self.late[owner].append(self.scheduler.now - self._due[request.headers["webhook-id"]])
        return httpx.Response(200, stream=httpx.ByteStream(b""))


@pytest.fixture
def town(monkeypatch: pytest.MonkeyPatch) -> Town:
    monkeypatch.setattr(clients, "_api_url", (float("inf"), API_URL))
    return Town()


@pytest.mark.slow
@pytest.mark.parametrize("ends_a_minute", [60, 100, 200])
def test_receiver_that_hangs_delays_no_other_owners_webhook_by_half_a_minute(
    town: Town, record_property: Recorded, ends_a_minute: int
) -> None:
    town.run(20, ends_a_minute)
    assert len(town.late["alice"]) >= 118, "all but those that are on their way"
    assert max(town.late["alice"]) < 30
    record_property("webhooks of another owner in time", len(town.late["alice"]))
    assert town.late["mallory"] == []


def test_receiver_that_answers_again_gets_all_that_it_missed(town: Town) -> None:
    town.run(10, 100, recovered_minutes=60)
    assert len(town.late["mallory"]) == 1000
    assert max(town.late["alice"]) < 30
