"""What a prediction cost: prices times metrics, exactly, and None with the reason wherever that is not known."""

import json
import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from predictions.money.book import Book, check_book
from predictions.money.cost import COST_LIMIT_MICRO_DOLLARS, METRIC_LIMIT, Cost, Run, cost_of

READ = {"date": "2026-10-05", "source": "https://replicate.com/pricing"}
VERSION = "a" * 64
BOOK = Book(
    check_book(
        {
            "hardware:gpu-t4": {**READ, "second": "0.000225"},
            "o/images": {**READ, "tiers": [{"prices": {"image_output_count": "0.003"}}]},
            "o/mixed": {
                **READ,
                "tiers": [
                    {
                        "prices": {
                            "run": "0.015",
                            "image_input_megapixel_count": "0.015",
                            "image_output_megapixel_count": "0.015",
                        }
                    }
                ],
            },
            "o/tokens": {
                **READ,
                "tiers": [{"prices": {"token_input_count": "0.00000375", "token_output_count": "0.00001"}}],
            },
            "o/video": {
                **READ,
                "tiers": [
                    {
                        "when": {"with_audio": True, "resolution_target": "720p"},
                        "prices": {"video_output_duration_seconds": "0.12"},
                    },
                    {
                        "when": {"with_audio": False, "resolution_target": "720p"},
                        "prices": {"video_output_duration_seconds": "0.09"},
                    },
                ],
            },
            "o/timed": {**READ, "tiers": [{"hardware": "gpu-t4"}]},
            f"o/timed:{VERSION}": {**READ, "tiers": [{"prices": {"predict_time": "0.001"}}]},
            "o/lost": {**READ, "tiers": [{"hardware": "gpu-none"}]},
            "training:o/timed": {**READ, "tiers": [{"prices": {"training_step_count": "0.002"}}]},
            "deployment:o/mine": {**READ, "tiers": [{"hardware": "gpu-t4"}]},
        }
    )
)
SUCCEEDED = Run("prediction", "succeeded", "o/images", None, None, started=True, metrics={"image_output_count": 1})


def run(model: str, metrics: dict[str, Any], **facts: Any) -> Run:
    """A run that succeeded."""
    return replace(SUCCEEDED, model=model, metrics=metrics, **facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (run("o/unknown", {"predict_time": 1}), "No price of o/unknown is known."),
        (run("", {"predict_time": 1}), "The model is not known."),
        (run("o/images", {}), "Its metrics lack image_output_count, by which o/images is billed."),
        (run("o/images", {"image_output_count": "4"}), "is no number"),
        (run("o/images", {"image_output_count": True}), "is no number"),
        (run("o/images", {"image_output_count": None}), "is no number"),
        (run("o/images", {"image_output_count": [1]}), "is no number"),
        (run("o/images", {"image_output_count": -1}), "negative"),
        (run("o/images", {"image_output_count": -0.1}), "negative"),
        (run("o/images", {"image_output_count": math.nan}), "not finite"),
        (run("o/images", {"image_output_count": math.inf}), "not finite"),
        (run("o/images", {"image_output_count": -math.inf}), "not finite"),
        (run("o/images", {"image_output_count": METRIC_LIMIT + 1}), "above 10^9"),
        (run("o/images", {"image_output_count": 10**4000}), "above 10^9"),
        (run("o/images", {"image_output_count": METRIC_LIMIT}), "more than $100000"),
        (run("o/tokens", {"token_input_count": 5}), "lack token_output_count"),
        (run("o/video", {"video_output_duration_seconds": 5}), "No tier of the price of o/video matches"),
        (
            run("o/video", {"video_output_duration_seconds": 5, "with_audio": 1, "resolution_target": "720p"}),
            "No tier",
        ),
        (run("o/lost", {"predict_time": 1}), "No price of hardware:gpu-none is known, by which o/lost is billed."),
        (run("o/timed", {"predict_time": 1}, deployment="o/other"), "No price of deployment:o/other is known."),
        (run("o/images", {"image_output_count": 1}, object="training"), "No price of training:o/images is known."),
        (run("o/mixed", {"predict_time": 1}, status="failed"), "billed for each run, and this one has not succeeded"),
    ],
)
def test_what_cannot_be_known_is_none_with_the_reason_and_never_0(facts: Run, reason: str) -> None:
    cost = cost_of(facts, BOOK)
    assert cost.micro_dollars is None
    assert reason in (cost.reason or "")
    assert cost.price is None


def test_entry_that_was_edited_by_hand_is_unknown_with_its_field_and_spoils_no_other() -> None:
    book = Book({"o/bad": {**READ, "tiers": [{"prices": {"run": 0.5}}]}, "o/good": BOOK._raw["o/images"]})
    cost = cost_of(run("o/bad", {}), book)
    assert cost.micro_dollars is None
    assert "o/bad.tiers[0].prices.run" in (cost.reason or "")
    assert cost_of(run("o/good", {"image_output_count": 1}), book).micro_dollars == 3000


@pytest.mark.parametrize(
    ("facts", "micro_dollars", "price"),
    [
        (run("o/images", {"image_output_count": 4}), 12_000, "o/images#1@2026-10-05"),
        (run("o/images", {"image_output_count": 0}), 0, "o/images#1@2026-10-05"),
        (run("o/mixed", {"image_input_megapixel_count": 0, "image_output_megapixel_count": 2}), 45_000, "o/mixed#1@"),
        (run("o/tokens", {"token_input_count": 8, "token_output_count": 43}), 460, "o/tokens#1@"),
        (
            run("o/video", {"video_output_duration_seconds": 5.0, "with_audio": True, "resolution_target": "720p"}),
            600_000,
            "o/video#1@",
        ),
        (
            run("o/video", {"video_output_duration_seconds": 5, "with_audio": False, "resolution_target": "720p"}),
            450_000,
            "o/video#2@",
        ),
        # 2.9 s of 225 each are 652.5, half up; binary floats make 652.4999 of it.
        (run("o/timed", {"predict_time": 2.9}), 653, "o/timed#1@"),
        (run("o/timed", {"predict_time": 2}, version=VERSION), 2000, f"o/timed:{VERSION}#1@"),
        (run("o/timed", {"predict_time": 2}, version="b" * 64), 450, "o/timed#1@"),
        (run("o/timed", {"training_step_count": 10}, object="training"), 20_000, "training:o/timed#1@"),
        (run("o/images", {"predict_time": 10}, deployment="o/mine"), 2250, "deployment:o/mine#1@"),
        # What ran until it failed or was canceled is billed by its time.
        (run("o/timed", {"predict_time": 10}, status="canceled"), 2250, "o/timed#1@"),
        (run("o/timed", {"predict_time": 10}, status="failed", started=False), 2250, "o/timed#1@"),
    ],
)
def test_cost_is_the_sum_of_prices_times_metrics(facts: Run, micro_dollars: int, price: str) -> None:
    cost = cost_of(facts, BOOK)
    assert (cost.micro_dollars, cost.reason) == (micro_dollars, None)
    assert (cost.price or "").startswith(price)


@pytest.mark.parametrize(
    ("status", "started", "metrics"),
    [("aborted", False, {}), ("aborted", True, {"predict_time": 3}), ("failed", False, {}), ("canceled", False, {})],
)
def test_what_never_ran_costs_0_with_the_reason_whatever_its_price(
    status: str, started: bool, metrics: dict[str, Any]
) -> None:
    for model in ("o/images", "o/unknown"):
        cost = cost_of(run(model, metrics, status=status, started=started), BOOK)
        assert cost.micro_dollars == 0
        assert (cost.reason or "").startswith("Not billed: ")
        assert cost.price is None


def test_failure_after_the_start_without_metrics_is_unknown() -> None:
    assert cost_of(run("o/timed", {}, status="failed"), BOOK).micro_dollars is None


def test_cost_is_shown_as_one_object() -> None:
    assert Cost(5, None, "o/images#1@2026-10-05").shown == {
        "micro_dollars": 5, "reason": None, "price": "o/images#1@2026-10-05"
    }  # fmt: skip


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "1", "NaN"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("n"), inner),
    max_leaves=4,
)
quantities = st.integers(0, 10**6) | st.floats(0, 10**6)


@given(st.dictionaries(st.sampled_from(["image_output_count", "predict_time", "with_audio"]), any_json))
def test_any_metrics_give_a_cost_or_a_reason(metrics: dict[str, Any]) -> None:
    for model in ("o/images", "o/timed", "o/video", "o/mixed"):
        cost = cost_of(run(model, metrics), BOOK)
        if cost.micro_dollars is None:
            assert cost.reason
        else:
            assert 0 <= cost.micro_dollars <= COST_LIMIT_MICRO_DOLLARS
            assert cost.price


@given(quantities, quantities, st.decimals(0, 100, places=12), st.decimals(0, 1, places=6))
def test_sum_is_exact_and_rounded_once_half_up(
    inputs: float, outputs: float, input_price: Decimal, output_price: Decimal
) -> None:
    prices = {"token_input_count": f"{input_price:f}", "token_output_count": f"{output_price:f}"}
    book = Book({"o/m": {**READ, "tiers": [{"prices": prices}]}})
    # As Replicate sends them: a float is the decimal that it was written as.
    sent = json.loads(json.dumps({"token_input_count": inputs, "token_output_count": outputs}))
    exact = Fraction(repr(inputs)) * Fraction(input_price) + Fraction(repr(outputs)) * Fraction(output_price)
    cost = cost_of(run("o/m", sent), book)
    if cost.micro_dollars is None:
        assert exact * 10**6 > COST_LIMIT_MICRO_DOLLARS
        return
    assert cost.micro_dollars == math.floor(exact * 10**6 + Fraction(1, 2))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_more_never_costs_less(fewer: int, further: int) -> None:
    less = cost_of(run("o/images", {"image_output_count": fewer}), BOOK).micro_dollars
    more = cost_of(run("o/images", {"image_output_count": fewer + further}), BOOK).micro_dollars
    assert less is not None
    assert more is not None
    assert less <= more
