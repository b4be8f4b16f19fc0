"""What a batch or a pipeline is created with, beside its predictions: labels, a trace, and a webhook."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from predictions.bodies import OBJECT, choice, listed, optional, text
from predictions.intents.labels import HEADER, header_labels, read_labels, with_common_labels
from predictions.intents.model import check_webhook
from predictions.intents.trace import read_traceparent

GROUP_CHECKS: Final = {
    "labels": optional(OBJECT),
    "webhook": optional(text(most=2048)),
    "webhook_events_filter": optional(listed(choice(("completed",)), 1, 1)),
}
"""The checks of the fields in a body."""

_FIELDS = tuple(GROUP_CHECKS)


def read_group(
    labels: Any, webhook: str | None, headers: Mapping[str, str], *, allow_loopback: bool
) -> tuple[dict[str, Any], Sequence[dict[str, str]]]:
    """Return the attributes `labels`, `traceparent` and `webhook`, without those that are not given, and violations.

    Args:
        labels: The field of the body; its labels have precedence over those of the header `X-Labels`.
        webhook: The URL to which the completion is sent.
        headers: The request's headers, their names in lower case.
        allow_loopback: Whether a webhook may go to this machine (the local cloud's setting).
    """
    invalid: list[dict[str, str]] = []
    own = read_labels(labels, invalid)
    common = header_labels(headers.get("x-labels", ""), invalid)
    merged = with_common_labels({"labels": own}, common)["labels"]
    if common and not invalid:
        read_labels(merged, invalid, HEADER)
    if webhook is not None:
        check_webhook(webhook, "webhook", allow_loopback, invalid)
    found = {"labels": merged, "traceparent": read_traceparent(headers.get("traceparent")), "webhook": webhook}
    return {name: value for name, value in found.items() if value}, invalid


def identity_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a body identifies the request: no labels, and a webhook only if it has one.

    So a body without these fields is the same request as before there were any.
    """
    left_out = {name for name in _FIELDS if name == "labels" or body.get(name) is None}
    return {name: value for name, value in body.items() if name not in left_out}
