"""The end of a prediction: the attributes that the write of its terminal status sets, with its cost."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from predictions.clock import timestamp
from predictions.money.cost import Cost
from predictions.money.stored import StackPrices
from predictions.status import TERMINAL_RANK, Status, rank_of, visible
from predictions.store.records import Prediction

if TYPE_CHECKING:
    from predictions.upstream.prediction import UpstreamPrediction

_ERROR_LIMIT_CHARACTERS = 4000
_METRICS_LIMIT_BYTES = 4000
_REASON_LIMIT_CHARACTERS = 300


def ended_upstream(
    prediction: Prediction, report: "UpstreamPrediction", status: str, prices: StackPrices, now: float
) -> dict[str, Any]:
    """Return what a terminal report of Replicate sets; None for what it does not have.

    Args:
        prediction: The prediction before.
        report: The report.
        status: The status that is stored.
        prices: The prices of the stack.
        now: The time.
    """
    metrics_json = json.dumps(report.metrics) if report.metrics else None
    # One that failed for the size of its output may be reported by a status that is unknown here, or none.
    reported = report.reported_status if rank_of(report.reported_status) > 0 else prediction.reported_status
    known = prediction.run
    run = replace(
        known,
        status=reported or status,
        model=report.model or known.model,
        version=report.version or known.version,
        deployment=report.deployment or known.deployment,
        started=known.started or report.started_at is not None or prediction.status == Status.PROCESSING,
        metrics=report.metrics or {},
    )
    return {
        "upstream_status": reported if reported != status else None,
        "completed_at": report.completed_at or timestamp(now),
        "error": report.error[:_ERROR_LIMIT_CHARACTERS] if report.error else None,
        "metrics_json": metrics_json if metrics_json and len(metrics_json) <= _METRICS_LIMIT_BYTES else None,
        **cost_attributes(prices.cost_of(run, now)),
        "data_removed": report.data_removed or None,
        "ended": int(now),
    }


def ended_here(
    prediction: Prediction,
    status: Status,
    error: str | None,
    refusal: Mapping[str, Any] | None,
    now: float,
    *,
    not_accepted: bool,
) -> dict[str, Any]:
    """Return what an end without Replicate sets.

    Args:
        prediction: The prediction before.
        status: Its terminal status.
        error: Why.
        refusal: Replicate's refusal of the create.
        now: The time.
        not_accepted: Whether Replicate is known to have accepted nothing although it is claimed.
    """
    cost = cost_without_report(prediction, not_accepted=not_accepted or refusal is not None)
    values: dict[str, Any] = {
        "rank": TERMINAL_RANK,
        "status": status.value,
        "visible": visible(status),
        "completed_at": timestamp(now),
        "ended": int(now),
        **cost_attributes(cost),
    }
    if prediction.reported_status:
        values["upstream_status"] = prediction.reported_status
    if error:
        values["error"] = error[:_ERROR_LIMIT_CHARACTERS]
    if refusal:
        # UTF-8, not ASCII: escaped, a character takes up to 12 bytes.
        values["refusal_json"] = json.dumps(refusal, separators=(",", ":"), ensure_ascii=False)
    return values


def cost_without_report(prediction: Prediction, *, not_accepted: bool) -> Cost:
    """Return the cost of a prediction whose end Replicate did not report.

    Args:
        prediction: The prediction.
        not_accepted: Whether Replicate is known to have accepted nothing although it is claimed.
    """
    if prediction.upstream_id:
        return Cost(None, "Replicate did not report how it ended, so what it billed is unknown.")
    if prediction.claimed and not not_accepted:
        return Cost(None, "Whether Replicate accepted it is unknown, and so is what it billed.")
    return Cost(0, "Not billed: Replicate did not accept it, or it was never submitted.")


def cost_attributes(cost: Cost) -> dict[str, Any]:
    """Return the attributes of a cost that have a value."""
    found = {
        "cost_micro_dollars": cost.micro_dollars,
        "cost_reason": cost.reason[:_REASON_LIMIT_CHARACTERS] if cost.reason else None,
        "cost_price": cost.price,
    }
    return {name: value for name, value in found.items() if value is not None}
