"""docs/cost.md and its picture are what the stored counts, the prices and the template's memory make of them."""

import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from tests.benchmarks import cost_page, prices
from tests.benchmarks.cost_page import (
    AWS_MS,
    CREATE_MS,
    FILE_MS,
    LENGTHS,
    NO_FILE,
    ONE_FILE,
    PAGE,
    PICTURE,
    Counted,
    Used,
    billed_ms,
    lines,
    run_of,
)  # fmt: skip
from tests.support.pages import rows, section
from tests.support.template import load_template, logical_name

COUNTED = Counted.load()
TOTALS = {each.name: each.total for each in lines(COUNTED)}


def test_page_and_picture_are_those_of_the_stored_counts() -> None:
    text = PAGE.read_text()
    assert cost_page.page(text, COUNTED) == text, "run: python -m tests.benchmarks.cost_page"
    assert cost_page.draw(COUNTED) == PICTURE.read_text(), "run: python -m tests.benchmarks.cost_page"


def test_page_changes_with_a_price_a_count_and_a_memory_size(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    dearer = replace(prices.PRICES["State transitions"], dollars=0.05)
    with monkeypatch.context() as patches:
        patches.setitem(prices.PRICES, "State transitions", dearer)
        assert cost_page.page(text, COUNTED) != text
    with monkeypatch.context() as patches:
        patches.setattr(cost_page, "memory_mb", lambda function: 2048)
        assert cost_page.page(text, COUNTED) != text
    used = COUNTED.cases[ONE_FILE]
    more = replace(used, counts={**used.counts, "states": used.counts["states"] + 1})
    assert cost_page.page(text, replace(COUNTED, cases={**COUNTED.cases, ONE_FILE: more})) != text


def test_function_is_billed_for_waiting_and_for_computing_at_its_share_of_a_processor() -> None:
    used = {"runs": 1, "cpu_ms": 100, "requests": 3, "creates": 1, "gets": 0, "files": 1, "held_seconds": 10}
    waiting = CREATE_MS + FILE_MS + 3 * AWS_MS + 10_000
    assert billed_ms(used, 1769) == waiting + 100
    assert billed_ms(used, 512) == pytest.approx(waiting + 345.5, abs=0.1)
    # More than one processor does not make one thread faster.
    assert billed_ms(used, 3538) == waiting + 100


def test_every_function_that_was_counted_has_the_memory_of_the_template() -> None:
    chosen = {row[0]: row[-2] for row in rows(section("docs/cost.md", "Memory of functions")) if len(row) > 4}
    assert len(chosen) > 8
    resources = load_template()["Resources"]
    assert chosen == {name: str(resources[logical_name(name)]["Properties"]["MemorySize"]) for name in chosen}


def test_prediction_costs_less_than_what_one_would_write_instead() -> None:
    for length in LENGTHS:
        peers = [TOTALS[f"{peer}, {length} s"] for peer in ("Step Functions loop",)]
        assert max(TOTALS[NO_FILE], TOTALS[ONE_FILE]) < min(peers), length
    assert TOTALS[ONE_FILE] < TOTALS[f"Lambda that waits, {LENGTHS[1]} s"]


def test_peers_were_counted_as_they_are_written() -> None:
    for length in LENGTHS:
        loop, wait = COUNTED.cases[f"loop {length}"], COUNTED.cases[f"wait {length}"]
        runs = {name.rpartition(" ")[2]: used["runs"] for name, used in loop.functions.items()}
        # A create, then Wait, Get and Choice every five seconds, and the file.
        assert (runs["create"], runs["store"]) == (1, 1)
        assert runs["get"] == length // 5 + 1
        assert loop.counts["states"] == 2 + 3 * runs["get"]
        ((_, waiting),) = wait.functions.items()
        assert waiting["held_seconds"] == length
        assert (wait.counts["states"], wait.counts["s3_writes"], loop.counts["s3_writes"]) == (0, 1, 1)
        held = COUNTED.cases[run_of(length)].functions["start_prediction"]["held_seconds"]
        assert held == min(length, 25)


def test_picture_shows_every_case_and_peer_with_its_dollars() -> None:
    drawing = ET.fromstring(PICTURE.read_text())  # noqa: S314  # our own file
    shown = [text.text or "" for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {*TOTALS} <= {*shown}
    each_total = [f"${each:.3f}" for each in TOTALS.values()]
    assert [text for text in shown if re.fullmatch(r"\$\d+\.\d{3}", text)] == each_total


# What an issue asked for, for 1,000 predictions whose caller reads none of them. Task tokens have 1,024 characters;
# with the short ones of the emulator, a write with a token takes a unit less.
FILE_DOLLARS, NO_FILE_DOLLARS, WAITED_DOLLARS = 0.115, 0.055, 0.06
S3_DOLLARS = 0.0245
# What was counted with tokens of 1,024 characters.
STATES = {NO_FILE: 1, ONE_FILE: 2}
WRITE_UNITS = {NO_FILE: 14, ONE_FILE: 20}
SHORT_TOKENS = "write_units_short_tokens"


def total(used: Used) -> float:
    return sum(cost_page.dollars(cost_page.units(used)).values())


def goals_kept() -> tuple[bool, ...]:
    """Whether each goal is kept, with a file, without one, and with a `run()` that waits ten seconds."""
    file, none = (total(cost_page.without_read(COUNTED.cases[case])) for case in (ONE_FILE, NO_FILE))
    waits = total(COUNTED.cases[run_of(10)]) - total(COUNTED.cases[ONE_FILE])
    return file <= FILE_DOLLARS, none <= NO_FILE_DOLLARS, waits <= WAITED_DOLLARS


def test_goals_are_kept_by_the_counts_and_the_memory_of_the_template() -> None:
    assert goals_kept() == (True, True, True)
    costs = cost_page.dollars(cost_page.units(COUNTED.cases[ONE_FILE]))
    assert sum(costs[name] for name in cost_page.SHOWN["S3"]) <= S3_DOLLARS
    for case, states in STATES.items():
        counts = COUNTED.cases[case].counts
        assert (counts["states"], counts["write_units"] <= WRITE_UNITS[case]) == (states, True), case


@pytest.mark.parametrize(("case", "least"), [(NO_FILE, 2), (ONE_FILE, 3)])
def test_long_task_tokens_are_counted_with_each_write_that_carries_one(case: str, least: int) -> None:
    counts = COUNTED.cases[case].counts
    assert counts["write_units"] >= counts[SHORT_TOKENS] + least


def test_two_more_write_units_would_break_the_goal_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an input and a result that are items of their own."""
    used = COUNTED.cases[NO_FILE]
    more = replace(used, counts={**used.counts, "write_units": used.counts["write_units"] + 2})
    monkeypatch.setitem(COUNTED.cases, NO_FILE, more)
    assert goals_kept() == (True, False, True)


@pytest.mark.parametrize(
    ("function", "kept"),
    [("start_prediction", (False, False, False)), ("copy_outputs", (False, True, True))],
)
def test_gigabyte_for_what_waits_breaks_a_goal(
    monkeypatch: pytest.MonkeyPatch, function: str, kept: tuple[bool, ...]
) -> None:
    before = cost_page.memory_mb
    monkeypatch.setattr(cost_page, "memory_mb", lambda name: 1024 if name == function else before(name))
    assert goals_kept() == kept


def test_function_has_more_memory_than_its_largest_answer_took() -> None:
    measured = {name: each.largest_mb for name, each in COUNTED.functions.items() if each.largest_mb}
    assert {"start_prediction", "copy_outputs", "poll_prediction", "receive_webhook", "read_prediction"} <= {*measured}
    assert {name for name, peak in measured.items() if peak >= cost_page.memory_mb(name)} == set()


def test_file_of_500_mib_is_copied_within_a_tenth_of_the_time_of_its_function() -> None:
    assert COUNTED.copy_seconds > 0
    share = cost_page.memory_mb("copy_outputs") / cost_page.FULL_PROCESSOR_MB
    assert COUNTED.copy_seconds / share <= cost_page.COPY_LIMIT_SECONDS / 10
