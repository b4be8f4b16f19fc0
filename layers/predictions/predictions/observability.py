"""Logs, metrics and traces of every function.

Logs are JSON lines with the prediction's id as `correlation_id`. They name ids, statuses, counts and times; never
bodies, inputs, outputs, URLs with a query, or secrets. Metrics are CloudWatch's embedded metric format: lines of
the log, no calls.
"""

import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.metrics import MetricUnit, single_metric

__all__ = ["MetricUnit", "count_ended", "handler_of", "logger", "metrics", "remaining_seconds"]

logger = Logger()
metrics = Metrics()

# httpx logs each request's whole URL at INFO: file URLs are capabilities.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)

Handler = TypeVar("Handler", bound=Callable[..., Any])


def handler_of(function: Handler) -> Handler:
    """Wrap a function as a Lambda handler with log context and metrics.

    Metrics are flushed when the function returns. The environment variable TRACING turns on traces; the tracer is
    imported only then, because it costs as much to import as a boto3 client.
    """

    @wraps(function)
    def handler_with_metrics(event: Any, context: Any) -> Any:
        # Powertools adds them to each line: the ARN only repeats the function's name, and Lambda reports the memory.
        logger.remove_keys(["function_arn", "function_memory_size"])
        try:
            return function(event, context)
        finally:
            # Powertools' own decorator warns at each invocation without metrics, as most reads are.
            if metrics.metric_set:
                metrics.flush_metrics()

    handler: Any = handler_with_metrics
    if os.environ.get("TRACING") == "Active":
        from aws_lambda_powertools import Tracer

        handler = Tracer(patch_modules=["botocore", "httpx"]).capture_lambda_handler(
            handler, capture_response=False, capture_error=False
        )
    wrapped: Handler = logger.inject_lambda_context(handler, clear_state=True)
    return wrapped


def remaining_seconds(context: Any) -> Callable[[], float]:
    """Return a callable with the function's remaining time, from Lambda's context."""
    return lambda: context.get_remaining_time_in_millis() / 1000


def count_ended(status: str, seconds: float) -> None:
    """Record a visible completion by status, and the seconds since the request."""
    with single_metric(name="PredictionsEnded", unit=MetricUnit.Count, value=1) as metric:
        metric.add_dimension("status", status)
    metrics.add_metric(name="SecondsToEnd", unit=MetricUnit.Seconds, value=seconds)
