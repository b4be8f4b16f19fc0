"""Resources of templates.

A template with an alarm of metric math is rejected: here such an alarm exists, and watches the first of its metrics.
"""

import functools
from collections.abc import Callable
from typing import Any

from ministack.services.cloudformation import provisioners


def of_one_metric(record: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Treat an alarm of metric math as one of the first metric that it reads."""

    @functools.wraps(record)
    def make(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        read = [each["MetricStat"] for each in properties.get("Metrics", []) if "MetricStat" in each]
        if not read:
            return record(name, properties)
        others = {key: value for key, value in properties.items() if key != "Metrics"}
        return record(name, others | read[0]["Metric"] | {"Period": read[0]["Period"], "Statistic": read[0]["Stat"]})

    return make


def patch() -> None:
    """Change the emulator."""
    provisioners._cw_metric_alarm_record = of_one_metric(provisioners._cw_metric_alarm_record)
