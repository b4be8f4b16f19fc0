"""The prices of a stack: its own entries over the shipped ones, read seldom, and never a reason why an end is lost."""

import json
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError
from predictions.aws import clients
from predictions.aws.dynamodb import Key, Table
from predictions.money.book import Book, BookInvalid
from predictions.money.cost import Run
from predictions.money.stored import AGE_SECONDS, PricesChanged, StackPrices, shipped
from predictions.money.unknown import HOUR_SECONDS, KEPT_SECONDS, UnknownCosts

from local.prices import SOURCES, TARGET, as_json

READ = {"date": "2026-11-30", "source": "https://replicate.com/o/m"}
ENTRY = {**READ, "tiers": [{"prices": {"image_output_count": "0.5"}}]}
SCHNELL = "black-forest-labs/flux-schnell"
BOOK = Key("prices", "book")


def run(model: str, **facts: Any) -> Run:
    """One image of a model."""
    metrics = {"image_output_count": 1, "predict_time": 0.5}
    return Run("prediction", "succeeded", model, None, None, started=True, **{"metrics": metrics, **facts})


class CountedTable(Table):
    """The table, with its reads counted, which can fail."""

    reads = 0
    writes = 0
    fails = False

    def get_item(self, key: Key, *, consistent: bool = True, exact: bool = False) -> dict[str, Any] | None:
        self.reads += 1
        if self.fails:
            raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "GetItem")
        return super().get_item(key, consistent=consistent, exact=exact)

    def update_item(self, key: Key, **changes: Any) -> dict[str, Any]:
        self.writes += 1
        if self.fails:
            raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "no"}}, "UpdateItem")
        return super().update_item(key, **changes)


@pytest.fixture
def table(cloud: None) -> CountedTable:
    """The stack's table."""
    return CountedTable("predictions", clients.client("dynamodb"))


@pytest.fixture
def prices(table: CountedTable) -> StackPrices:
    """The stack's prices as one process sees them."""
    return StackPrices(table)


def test_shipped_book_is_that_of_the_repository_with_a_date_and_a_link_for_each_price() -> None:
    assert TARGET.read_text() == as_json([path.read_text() for path in sorted(SOURCES.glob("*.yaml"))])
    entries = Book(shipped()).entries()
    models = [entry for entry in entries if entry.tiers]
    assert len(models) >= 12
    assert {entry.key for entry in entries if entry.second} >= {"hardware:gpu-t4", "hardware:gpu-l40s"}
    assert all(entry.source.startswith("https://replicate.com/") for entry in entries)
    used = {tier.hardware for entry in models for tier in entry.tiers if tier.hardware}
    assert {f"hardware:{sku}" for sku in used} <= shipped().keys()


def test_model_in_two_files_of_the_repository_is_refused() -> None:
    text = yaml.safe_dump({"o/m": {**ENTRY, "date": "2026-11-30"}})
    with pytest.raises(BookInvalid, match="o/m: is in two files"):
        as_json([text, text])


def test_shipped_price_applies_until_the_stack_has_its_own(prices: StackPrices) -> None:
    assert prices.cost_of(run(SCHNELL), 0).micro_dollars == 3000
    prices.write_entries(lambda entries: {**entries, SCHNELL: ENTRY})
    assert prices.cost_of(run(SCHNELL), AGE_SECONDS - 1).micro_dollars == 3000
    cost = prices.cost_of(run(SCHNELL), AGE_SECONDS)
    assert (cost.micro_dollars, cost.price) == (500_000, f"{SCHNELL}#1@2026-11-30")


def test_process_reads_the_prices_once_in_five_minutes(prices: StackPrices, table: CountedTable) -> None:
    for second in range(AGE_SECONDS):
        prices.cost_of(run("o/m"), 1000 + second)
    assert table.reads == 1
    prices.cost_of(run("o/m"), 1000 + AGE_SECONDS)
    assert table.reads == 2


def test_what_is_not_billed_needs_no_price(prices: StackPrices, table: CountedTable) -> None:
    aborted = Run("prediction", "aborted", "o/m", None, None, started=False, metrics={})
    assert prices.cost_of(aborted, 0).micro_dollars == 0
    assert table.reads == 0


def test_prices_that_cannot_be_read_leave_the_cost_unknown_and_raise_nothing(
    prices: StackPrices, table: CountedTable
) -> None:
    table.fails = True
    cost = prices.cost_of(run(SCHNELL), 0)
    assert (cost.micro_dollars, cost.reason) == (None, "The prices of this stack could not be read.")
    prices.cost_of(run(SCHNELL), 29)
    assert table.reads == 1, "not at each end"
    table.fails = False
    assert prices.cost_of(run(SCHNELL), 30).micro_dollars == 3000


def test_prices_that_were_read_before_stay_in_use_while_the_table_fails(
    prices: StackPrices, table: CountedTable
) -> None:
    prices.write_entries(lambda entries: {**entries, "o/m": ENTRY})
    assert prices.cost_of(run("o/m"), 0).micro_dollars == 500_000
    table.fails = True
    assert prices.cost_of(run("o/m"), 10 * AGE_SECONDS).micro_dollars == 500_000


@pytest.mark.parametrize("text", ["", "[]", "null", "{"])
def test_damaged_item_leaves_costs_unknown(prices: StackPrices, table: CountedTable, text: str) -> None:
    table.put_item(BOOK, {"json": text, "changes": 1})
    assert prices.cost_of(run(SCHNELL), 0).micro_dollars is None


def test_invalid_change_writes_nothing_and_names_the_field(prices: StackPrices, table: CountedTable) -> None:
    bad = {**ENTRY, "tiers": [{"prices": {"image_output_count": "-1"}}]}
    with pytest.raises(BookInvalid, match=r"^o/m\.tiers\[0\]\.prices\.image_output_count: "):
        prices.write_entries(lambda entries: {**entries, "o/m": bad})
    many = {f"o/m{n}": {**ENTRY, "source": "https://replicate.com/" + "x" * 200} for n in range(300)}
    with pytest.raises(BookInvalid, match="exceeds the limit of 65536"):
        prices.write_entries(lambda entries: many)
    assert table.get_item(BOOK) is None


def test_second_of_two_changes_at_the_same_time_is_refused(prices: StackPrices, table: CountedTable) -> None:
    def change(entries: dict[str, Any]) -> dict[str, Any]:
        StackPrices(table).write_entries(lambda there: {**there, "o/first": ENTRY})
        return {**entries, "o/second": ENTRY}

    with pytest.raises(PricesChanged, match="Repeat this one"):
        prices.write_entries(change)
    entries, changes = prices.own_entries()
    assert (set(entries), changes) == ({"o/first"}, 1)
    prices.write_entries(lambda there: {**there, "o/second": ENTRY})
    assert prices.own_entries()[0].keys() == {"o/first", "o/second"}


def test_change_that_is_made_twice_changes_nothing_more(prices: StackPrices, table: CountedTable) -> None:
    for _ in range(2):
        prices.write_entries(lambda entries: {**entries, "o/m": ENTRY}, 5)
    item = table.get_item(BOOK)
    assert item is not None
    assert (json.loads(item["json"]), item["changed_at"]) == ({"o/m": ENTRY}, 5)


# -- unknown costs ------------------------------------------------------------------------------------------------


def test_unknown_costs_are_recorded_once_an_hour_for_each_reason_and_owner(table: CountedTable) -> None:
    register = UnknownCosts(table)
    for n in range(100):
        register.note("o/m", "No price.", "alice", f"id{n}", 1000 + n)
    assert table.writes == 1
    register.note("o/m", "No price.", "bob", "of-bob", 1100)
    register.note("o/m", "Another reason.", "alice", "other", 1101)
    register.note("o/m", "No price.", "alice", "later", 1000 + HOUR_SECONDS)
    assert table.writes == 4
    other, mine = sorted(register.entries(1100), key=lambda each: each.reason)
    assert (mine.key, mine.first_at, mine.last_at, mine.example) == ("o/m", 1000, 1000 + HOUR_SECONDS, "later")
    assert mine.owners == {"alice", "bob"}
    assert (other.reason, other.owners) == ("Another reason.", frozenset({"alice"}))


def test_a_process_records_one_unknown_cost_a_second_and_the_others_with_their_next_prediction(
    table: CountedTable,
) -> None:
    register = UnknownCosts(table)
    for n in range(1000):
        register.note("o/m", "No price.", f"owner{n}", "id", 1000)
    assert table.writes == 1
    for n in range(1000):
        register.note("o/m", "No price.", "owner7", "id", 1000 + n / 1000)
    assert table.writes == 1
    register.note("o/m", "No price.", "owner7", "id", 1001)
    (entry,) = register.entries(1001)
    assert entry.owners == {"owner0", "owner7"}


def test_record_that_fails_raises_nothing_and_is_made_with_the_next_one(table: CountedTable) -> None:
    register = UnknownCosts(table)
    table.fails = True
    register.note("o/m", "No price.", "alice", "id1", 1000)
    table.fails = False
    register.note("o/m", "No price.", "alice", "id2", 1001)
    assert [each.example for each in register.entries(1001)] == ["id2"]


def test_record_expires_a_month_after_the_last_one(table: CountedTable) -> None:
    register = UnknownCosts(table)
    register.note("o/m", "No price.", "alice", "id1", 1000)
    assert list(register.entries(1000 + KEPT_SECONDS - 1))
    assert not list(register.entries(1000 + KEPT_SECONDS))


class DeafTable(Table):
    """A table that takes every write."""

    def __init__(self) -> None: ...

    def update_item(self, key: Key, **changes: Any) -> dict[str, Any]:
        return {}


def test_memory_of_what_was_recorded_is_bounded() -> None:
    register = UnknownCosts(DeafTable())
    for n in range(2500):
        register.note(f"o/m{n}", "No price.", "alice", "id", 1000 + n)
    assert len(register._noted) <= 1000
