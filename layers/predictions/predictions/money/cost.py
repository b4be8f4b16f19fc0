"""Cost of a prediction, from Replicate's metrics and a price book: exact, rounded once, and never guessed.

An unknown cost is None with its reason, never 0. A prediction that is not billed costs 0, with the reason.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from predictions.money.book import PREDICT_TIME, RUN, Book, BookInvalid, Tier
from predictions.status import Status

METRIC_LIMIT = 1_000_000_000
"""A metric above this is not believed: models set their own. It is 31 years, or a billion tokens."""

COST_LIMIT_MICRO_DOLLARS = 10**11
"""Nor is a cost above this, $100,000."""

_MICRO = 10**6


@dataclass(frozen=True, slots=True)
class Cost:
    """What a prediction cost.

    Attributes:
        micro_dollars: Millionths of a dollar, or None if unknown.
        reason: Why it is unknown, or why it is not billed; else None.
        price: The price that was applied: the entry's key, the number of its tier from 1 on, and its date, as
            `google/veo-3#2@2026-10-05`; None if none was.
    """

    micro_dollars: int | None
    reason: str | None = None
    price: str | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """The cost as callers see it."""
        return {"micro_dollars": self.micro_dollars, "reason": self.reason, "price": self.price}


@dataclass(frozen=True, slots=True)
class Run:
    """The facts that decide what a prediction cost.

    Attributes:
        object: `prediction` or `training`.
        status: How it ended, as Replicate says.
        model: The model, `owner/name`.
        version: The version's id.
        deployment: The deployment that ran it.
        started: Whether it is known to have started to run.
        metrics: Replicate's metrics of it, as JSON: any value is possible.
    """

    object: str
    status: str
    model: str | None
    version: str | None
    deployment: str | None
    started: bool
    metrics: Mapping[str, Any]


class _Unknown(Exception):
    """The cost is unknown; the message says why."""


def not_billed(run: Run) -> Cost | None:
    """Return the cost of a prediction that is not billed whatever its price, or None."""
    if run.status == Status.ABORTED:
        return Cost(0, "Not billed: it was aborted before it started.")
    if run.status in (Status.FAILED, Status.CANCELED) and not run.started and not run.metrics:
        return Cost(0, "Not billed: it ended before it started to run, as after a failed setup.")
    return None


def cost_of(run: Run, book: Book) -> Cost:
    """Compute what a prediction cost.

    Args:
        run: The prediction.
        book: The prices.
    """
    if free := not_billed(run):
        return free
    keys = _keys(run)
    if not keys:
        return Cost(None, "The model is not known.")
    try:
        entry = book.find(*keys)
        if entry is None:
            return Cost(None, f"No price of {keys[-1]} is known.")
        applying = ((n, tier) for n, tier in enumerate(entry.tiers, 1) if tier.applies(run.metrics))
        n, tier = next(applying, (0, None))
        if tier is None:
            return Cost(None, f"No tier of the price of {entry.key} matches its metrics.")
        micro_dollars = _sum(run, tier, book, entry.key)
    except (_Unknown, BookInvalid) as error:
        return Cost(None, str(error))
    return Cost(micro_dollars, None, f"{entry.key}#{n}@{entry.date}")


def assumed_cost(run: Run, book: Book) -> int | None:
    """Estimate what a prediction costs before anything is known of it, or return None if no price applies.

    The dearest tier for an assumed run: 10 s (a training 10 min), 1,000 tokens each, one of everything else.
    """
    keys = _keys(run)
    try:
        entry = book.find(*keys) if keys else None
        if entry is None:
            return None
        return max(_sum(_assumed(run, tier), tier, book, entry.key) for tier in entry.tiers)
    except (_Unknown, BookInvalid):
        return None


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs; the sum is unknown if one of them is."""
    found = list(costs)
    known = [cost.micro_dollars for cost in found if cost.micro_dollars is not None]
    if len(known) < len(found):
        return Cost(None, f"The cost of {len(found) - len(known)} of {len(found)} predictions is unknown.")
    return Cost(sum(known))


def key_of(run: Run) -> str:
    """Return the key of an entry that would price a run; empty if its model is not known."""
    return (_keys(run) or [""])[-1]


def _assumed(run: Run, tier: Tier) -> Run:
    seconds = 600 if run.object == "training" else 10
    quantities = {
        metric: seconds if metric == PREDICT_TIME or metric.endswith("_seconds") else 1000 if "token" in metric else 1
        for metric in (*tier.prices, PREDICT_TIME)
    }
    return replace(run, status=Status.SUCCEEDED, metrics=quantities)


def _keys(run: Run) -> list[str]:
    # A deployment has hardware of its own: the model's price is not its price.
    if run.deployment:
        return [f"deployment:{run.deployment}"]
    if not run.model:
        return []
    key = f"training:{run.model}" if run.object == "training" else run.model
    return [f"{key}:{run.version}", key] if run.version else [key]


def _sum(run: Run, tier: Tier, book: Book, key: str) -> int:
    """Multiply and add exactly, as fractions of integers; round once, half up.

    Raises:
        _Unknown: A metric is missing or cannot be believed.
        BookInvalid: The entry of the hardware is invalid.
    """
    prices = dict(tier.prices)
    if tier.hardware is not None:
        hardware = book.find(f"hardware:{tier.hardware}")
        if hardware is None or hardware.second is None:
            raise _Unknown(f"No price of hardware:{tier.hardware} is known, by which {key} is billed.")
        prices[PREDICT_TIME] = hardware.second
    numerator, denominator = 0, 1
    for metric, price in prices.items():
        n, d = price.as_integer_ratio()
        m, e = _quantity(run, metric, key).as_integer_ratio()
        numerator, denominator = numerator * d * e + n * m * denominator, denominator * d * e
    micro_dollars = (2 * numerator * _MICRO + denominator) // (2 * denominator)
    if micro_dollars > COST_LIMIT_MICRO_DOLLARS:
        raise _Unknown(f"By the price of {key} it would be more than ${COST_LIMIT_MICRO_DOLLARS // _MICRO}.")
    return micro_dollars


def _quantity(run: Run, metric: str, key: str) -> Decimal:
    if metric == RUN:
        if run.status != Status.SUCCEEDED:
            raise _Unknown(f"{key} is billed for each run, and this one has not succeeded.")
        return Decimal(1)
    if metric not in run.metrics:
        raise _Unknown(f"Its metrics lack {metric}, by which {key} is billed.")
    value = run.metrics[metric]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Unknown(f"Its metric {metric}, by which {key} is billed, is no number.")
    # Also false for NaN.
    if not 0 <= value <= METRIC_LIMIT:
        raise _Unknown(f"Its metric {metric}, by which {key} is billed, is negative, not finite, or above 10^9.")
    # The shortest decimal that is read as this float: the digits that Replicate sent.
    return Decimal(repr(value))
