"""Intents: requests for predictions, validated before anything is written or spent.

`create_intent` turns a request of `POST /predictions` (or of a model's or deployment's route) into an `Intent`, or
raises a `Problem` that names every invalid field. An intent's `id` is the basis of exactly-once starts: the same
owner and `Idempotency-Key` always give the same id.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeVar, get_args

from predictions.bodies import (
    ANYTHING,
    BOOLEAN,
    OBJECT,
    TEXT,
    Body,
    Checks,
    ValidationError,
    choice,
    either,
    errors_of,
    listed,
    optional,
    text,
    whole,
)
from predictions.errors import Problem
from predictions.ids import NAME, derived_id, is_model_name, random_id
from predictions.validation import field_problem, fields_refused, input_json_canonical, parse_json

LIFETIME_LIMIT_SECONDS = 3 * 24 * 3600
"""The longest deadline: with one resubmission still shorter than the shortest retention, 15 days."""

WebhookEvent = Literal["start", "output", "logs", "completed"]

Source = Literal["http", "queue", "recipe", "batch", "pipeline", "run_job"]
"""The entry point of a request: the API, a queue message of its own, a recipe's event, a batch's line, a
pipeline's step, or a direct invocation of `run_prediction`."""


_REFERENCE = re.compile(
    rf"(?P<name>{NAME}/{NAME})(?::(?P<version>[0-9a-f]{{64}}))?|(?P<bare_version>[0-9a-f]{{64}})", re.ASCII
)
_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,8})m)?(?:(\d{1,8})s?)?", re.ASCII)
_DURATION_DETAIL = "Must be a duration from 5 seconds to 3 days, such as `30`, `30s`, `5m` or `1h30m45s`."
_PREFER_WAIT = re.compile(r"wait(?:\s*=\s*\"?(?P<seconds>[^\";,\s]*)\"?)?\s*(?:;.*)?", re.IGNORECASE)


REFERENCE_FIELDS = ("model", "version", "deployment")
"""The fields of a request that name what to run."""


@dataclass(frozen=True)
class Reference:
    """The model, version or deployment that a caller wants to run, not yet looked up.

    Attributes:
        kind: `model` may still turn out to need a version (community models do); `deployment`, `version`; `training`
            for a version that is trained.
        name: `owner/name`, or None for a bare version id.
        version: 64 hexadecimal digits, for the kinds `version` and `training`.
    """

    kind: Literal["version", "model", "deployment", "training"]
    name: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Intent:
    """A complete, validated request for one prediction or training.

    Attributes:
        id: 26 characters `[a-z0-9]`.
        owner: The owner of the prediction.
        keyed: Whether the id is derived from the caller's idempotency key.
        fingerprint: A digest that differs between different requests.
        reference: The model, version or deployment to run.
        input_json: The model's input, as JSON text.
        lifetime_seconds: The caller's deadline, or None for the stack's.
        webhook: The URL for the caller's webhooks, or None.
        webhook_events_filter: The webhook events to send, or None for Replicate's default.
        stream: The deprecated field, passed to Replicate if given.
        source: The entry point; see `Source`.
        object: `prediction` or `training`.
        destination: The model, `owner/name`, to which a training adds a version.
        origin: The ids and names of its origin: `recipe`; `batch` and `line`; `pipeline`, `step` and `index`.
        depth: The number of results of this stack it descends from: 0 if no result of ours started it.
        output_prefix: The prefix for its files in its owner's part of the outputs bucket; None for the usual one.
        labels: Its labels (see `intents.labels`).
        traceparent: The trace that it belongs to (see `intents.trace`), or None.
    """

    id: str
    owner: str
    keyed: bool
    fingerprint: str
    reference: Reference
    input_json: str
    lifetime_seconds: int | None
    webhook: str | None
    webhook_events_filter: tuple[WebhookEvent, ...] | None
    stream: bool | None
    source: "Source" = "http"
    object: Literal["prediction", "training"] = "prediction"
    destination: str | None = None
    origin: Mapping[str, str | int] = field(default_factory=dict)
    depth: int = 0
    output_prefix: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    traceparent: str | None = None


TARGET_NAME: Final = optional(text(most=256))
EVENTS: Final = optional(listed(choice(get_args(WebhookEvent)), most=4))
LIFETIME: Final = optional(either(TEXT, whole()))


@dataclass(kw_only=True)
class PredictionBody(Body):
    """The fields of `POST /predictions`; Replicate rejects any other, so unknown fields are errors."""

    input: dict[str, Any]
    version: str | None = None
    webhook: str | None = None
    webhook_completed: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None
    stream: bool | None = None
    lifetime: str | int | None = None

    checks: ClassVar[Checks] = {
        "input": OBJECT, "version": TARGET_NAME, "webhook": optional(TEXT), "webhook_completed": optional(TEXT),
        "webhook_events_filter": EVENTS, "stream": optional(BOOLEAN), "lifetime": LIFETIME,
    }  # fmt: skip


@dataclass(kw_only=True)
class RequestBody(PredictionBody):
    """The fields of `POST /predictions`, plus those that the API takes from route and headers."""

    model: str | None = None
    deployment: str | None = None
    idempotency_key: str | None = None
    labels: Any = None
    traceparent: Any = None

    checks: ClassVar[Checks] = {
        **PredictionBody.checks, "model": TARGET_NAME, "deployment": TARGET_NAME, "idempotency_key": optional(TEXT),
        "labels": ANYTHING, "traceparent": ANYTHING,
    }  # fmt: skip


@dataclass(kw_only=True)
class TrainingBody(Body):
    """The fields of `POST /models/{owner}/{name}/versions/{id}/trainings`."""

    destination: str
    input: dict[str, Any]
    webhook: str | None = None
    webhook_events_filter: list[WebhookEvent] | None = None

    checks: ClassVar[Checks] = {
        "destination": TEXT, "input": OBJECT, "webhook": optional(TEXT), "webhook_events_filter": EVENTS,
    }  # fmt: skip


_AnyBody = TypeVar("_AnyBody", PredictionBody, RequestBody, TrainingBody)


def create_intent(
    body: bytes,
    headers: Mapping[str, str],
    *,
    owner: str,
    reference: Reference | None,
    allow_loopback_webhooks: bool,
) -> Intent:
    """Validate a create request and return its intent.

    Args:
        body: The raw body.
        headers: The request's headers, their names in lower case.
        owner: The owner of the request.
        reference: The reference in the route; None if the body's `version` names it.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).

    Raises:
        Problem: 400 (not JSON), 413, 415 or 422 (with `invalid_fields`).
    """
    asked = _read(PredictionBody, body, headers)
    invalid: list[dict[str, str]] = []
    if reference is not None and asked.version is not None:
        invalid.append({"field": "version", "detail": "Remove `version`: the route already names the model."})
    if reference is None:
        reference = _reference(asked.version, invalid)
    lifetime_seconds = _lifetime_seconds(headers.get("cancel-after"), "Cancel-After", invalid)
    key = _idempotency_key(headers.get("idempotency-key"), "Idempotency-Key", invalid)
    prediction_id = derived_id(owner, key) if key else random_id()
    return _intent(
        asked, reference, invalid, prediction_id, owner=owner, keyed=key is not None,
        lifetime_seconds=lifetime_seconds, allow_loopback_webhooks=allow_loopback_webhooks,
        **_context_of(headers, invalid),
    )  # fmt: skip


def create_requested_intent(
    value: Any,
    *,
    owner: str,
    source: Source,
    source_key: str,
    allow_loopback_webhooks: bool,
    origin: Mapping[str, str | int] | None = None,
    depth: int = 0,
    output_prefix: str | None = None,
    traceparent: Any = None,
) -> Intent:
    """Validate a request of a message, line or recipe and return its intent.

    Args:
        value: A `RequestBody` as parsed JSON, from `parse_json` if it is untrusted.
        owner: The owner of the request; never from `value`.
        source: The entry point.
        source_key: Identifies repetitions of the same request, unique for `source` and `owner`. An
            `idempotency_key` in the request replaces it, and is equivalent to that header of the API.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
        origin: The ids and names of its origin.
        depth: The number of results of this stack it descends from.
        output_prefix: The prefix for its files.
        traceparent: The trace of what started it, unless the request names one itself; ignored if invalid.

    Raises:
        Problem: 422 (with `invalid_fields`).
    """
    asked = _validated(RequestBody, value)
    invalid: list[dict[str, str]] = []
    reference = _named_reference(asked, invalid)
    key = _idempotency_key(asked.idempotency_key, "idempotency_key", invalid)
    # No owner's name contains a `#`.
    prediction_id = derived_id(owner, key) if key else derived_id(f"{source}#{owner}", source_key)
    return _intent(
        asked, reference, invalid, prediction_id, owner=owner, keyed=True, source=source, origin=origin or {},
        depth=depth, output_prefix=output_prefix, allow_loopback_webhooks=allow_loopback_webhooks,
        **_context(asked.labels, asked.traceparent or traceparent, invalid),
    )  # fmt: skip


def _intent(
    asked: PredictionBody,
    reference: Reference | None,
    invalid: list[dict[str, str]],
    prediction_id: str,
    *,
    allow_loopback_webhooks: bool,
    lifetime_seconds: int | None = None,
    **known: Any,
) -> Intent:
    webhook_field, webhook, events = "webhook", asked.webhook, asked.webhook_events_filter
    if webhook is None and asked.webhook_completed is not None:
        webhook_field, webhook, events = "webhook_completed", asked.webhook_completed, ["completed"]
    if webhook is not None:
        check_webhook(webhook, webhook_field, allow_loopback_webhooks, invalid)
    if lifetime_seconds is None and asked.lifetime is not None:
        lifetime_seconds = _lifetime_seconds(str(asked.lifetime), "lifetime", invalid)
    if invalid or reference is None:
        raise fields_refused(invalid)
    described = [
        reference.kind, reference.name, reference.version, input_json_canonical(asked.input),
        webhook, sorted(set(events)) if events is not None else None, asked.stream, lifetime_seconds,
    ]  # fmt: skip
    return Intent(
        id=prediction_id,
        fingerprint=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        reference=reference,
        input_json=json.dumps(asked.input, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
        lifetime_seconds=lifetime_seconds,
        webhook=webhook,
        webhook_events_filter=tuple(dict.fromkeys(events)) if events is not None else None,
        stream=asked.stream,
        **known,
    )


def _context_of(headers: Mapping[str, str], invalid: list[dict[str, str]]) -> dict[str, Any]:
    """Return `labels` and `traceparent` in a request's headers."""
    found = _context(None, headers.get("traceparent"), invalid)
    if text := headers.get("x-labels"):
        from predictions.intents.labels import header_labels  # as below

        found["labels"] = header_labels(text, invalid)
    return found


def _context(labels: Any, traceparent: Any, invalid: list[dict[str, str]]) -> dict[str, Any]:
    """Return `labels` and `traceparent` of a request, each only if it has them."""
    found: dict[str, Any] = {}
    if labels is not None:
        from predictions.intents.labels import read_labels  # only requests with labels need it

        found["labels"] = read_labels(labels, invalid)
    if traceparent is not None:
        from predictions.intents.trace import read_traceparent  # only requests with a trace need it

        found["traceparent"] = read_traceparent(traceparent)
    return found


def check_webhook(url: str, field: str, allow_loopback: bool, invalid: list[dict[str, str]]) -> None:
    """Add to `invalid` why a URL may not be that of a webhook, if so."""
    from predictions.net.addresses import AddressRefused, check_webhook_url  # only requests with a webhook need it

    try:
        check_webhook_url(url, allow_loopback=allow_loopback)
    except AddressRefused as error:
        invalid.append({"field": field, "detail": str(error)})


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """Return the caller's idempotency key, or None without the header.

    Args:
        headers: The request's headers, their names in lower case.

    Raises:
        Problem: 422 if it is not a valid key.
    """
    invalid: list[dict[str, str]] = []
    key = _idempotency_key(headers.get("idempotency-key"), "Idempotency-Key", invalid)
    if invalid:
        raise fields_refused(invalid)
    return key


def create_training(
    body: bytes,
    headers: Mapping[str, str],
    *,
    owner: str,
    reference: Reference,
    allow_loopback_webhooks: bool,
) -> Intent:
    """Validate a request for a training and return its intent.

    Args:
        body: The raw body.
        headers: The request's headers, their names in lower case.
        owner: The owner of the request.
        reference: The version that is trained; see `training_reference`.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).

    Raises:
        Problem: 400 (not JSON), 413, 415 or 422 (with `invalid_fields`).
    """
    asked = _read(TrainingBody, body, headers)
    invalid: list[dict[str, str]] = []
    if not is_model_name(asked.destination):
        detail = "Must be an existing model of yours, as `owner/name`. The training adds a version to it."
        invalid.append({"field": "destination", "detail": detail})
    if asked.webhook is not None:
        check_webhook(asked.webhook, "webhook", allow_loopback_webhooks, invalid)
    if "cancel-after" in headers:
        # If the header were ignored, a training would run on, and be paid for, past its caller's deadline.
        detail = "Not supported for trainings. Remove this header and cancel the training instead."
        invalid.append({"field": "Cancel-After", "detail": detail})
    key = _idempotency_key(headers.get("idempotency-key"), "Idempotency-Key", invalid)
    context = _context_of(headers, invalid)
    if invalid:
        raise fields_refused(invalid)
    events = asked.webhook_events_filter
    described = [
        "training", reference.name, reference.version, asked.destination, input_json_canonical(asked.input),
        asked.webhook, sorted(set(events)) if events is not None else None,
    ]  # fmt: skip
    return Intent(
        # The same key may also be used for a prediction, which is a different request to a different route.
        id=derived_id(f"trainings#{owner}", key) if key else random_id(),
        owner=owner,
        keyed=key is not None,
        fingerprint=hashlib.sha256(json.dumps(described).encode()).hexdigest(),
        reference=reference,
        input_json=json.dumps(asked.input, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
        lifetime_seconds=None,
        webhook=asked.webhook,
        webhook_events_filter=tuple(dict.fromkeys(events)) if events is not None else None,
        stream=None,
        object="training",
        destination=asked.destination,
        **context,
    )


def training_reference(owner: str, name: str, version: str) -> Reference:
    """Return the reference of the route `/models/…/versions/{version}/trainings`.

    Raises:
        Problem: 404 if this is not a valid name of a version.
    """
    model = model_reference("model", owner, name)
    if not re.fullmatch(r"[0-9a-f]{64}", version, re.ASCII):
        raise Problem(404, f"Version of {model.name} not found: a version id must be 64 hexadecimal digits.")
    return Reference("training", model.name, version)


def model_reference(kind: Literal["model", "deployment"], owner: str, name: str) -> Reference:
    """Return the reference of a route such as `/models/{owner}/{name}/predictions`.

    Raises:
        Problem: 404 if this is not a valid name of a model or deployment.
    """
    full_name = f"{owner}/{name}"
    if not is_model_name(full_name):
        raise Problem(404, f"Not found: the {kind}'s owner and name must be letters, digits, '-', '_' and '.'.")
    return Reference(kind, full_name)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a client that retries a request without a response, and numbers its attempts.

    Attributes:
        number: The number of attempts before it.
        asked_at: When it reached the API, in milliseconds: one clock for all attempts, read before anything that can
            delay the function.
    """

    number: int
    asked_at: int

    @classmethod
    def of(cls, headers: Mapping[str, str], asked_at: int) -> "Attempt | None":
        """Return the attempt in Stainless's `x-stainless-retry-count` header, or None."""
        number = headers.get("x-stainless-retry-count", "")
        return cls(int(number), asked_at) if number.isdecimal() and len(number) < 4 else None


def wait_seconds(prefer: str | None, limit: int) -> int | None:
    """Return the wait of a `Prefer` header in seconds, at most `limit`, or None.

    Preferences other than `wait` are ignored, as RFC 7240 requires.

    Raises:
        Problem: 422 if the number is not from 1 to 60.
    """
    for preference in (prefer or "").split(","):
        if not (asked := _PREFER_WAIT.fullmatch(preference.strip())):
            continue
        seconds = asked["seconds"]
        if seconds is None:
            return limit
        if not re.fullmatch(r"[1-9]|[1-5][0-9]|60", seconds, re.ASCII):
            detail = "`wait` must be a whole number of seconds from 1 to 60, as in `wait=10`."
            raise fields_refused([{"field": "Prefer", "detail": detail}])
        return min(limit, int(seconds))
    return None


def _read(kind: type[_AnyBody], body: bytes, headers: Mapping[str, str]) -> _AnyBody:
    value = parse_json(body, headers.get("content-type"))
    return _validated(kind, value)


def _validated(kind: type[_AnyBody], value: Any) -> _AnyBody:
    if not isinstance(value, dict):
        raise Problem(422, "The body must be a JSON object with the key `input`.")
    try:
        return kind.of(value)
    except ValidationError as error:
        problems = [_field_problem(each, kind) for each in errors_of(error)]
        raise fields_refused(list({problem["field"]: problem for problem in problems}.values())) from None


def _field_problem(error: Any, kind: type[Body]) -> dict[str, str]:
    # Except for a list's index, the parts after the field's name are names of types.
    parts = [part for i, part in enumerate(error["loc"]) if i == 0 or isinstance(part, int)]
    field = ".".join(str(part) for part in parts)[:200] or "body"
    if field == "lifetime" and error["type"] not in ("extra_forbidden", "missing"):
        return {"field": field, "detail": _DURATION_DETAIL}
    return field_problem(field, error, (name for name in kind.names() if name != "webhook_completed"))


def _named_reference(asked: RequestBody, invalid: list[dict[str, str]]) -> Reference | None:
    """Return the reference in the one given of `version`, `model` and `deployment`."""
    named = [name for name in ("version", "model", "deployment") if getattr(asked, name) is not None]
    if len(named) != 1:
        found = " and ".join(f"`{name}`" for name in named) or "none of them"
        detail = f"Give exactly one of `version`, `model` and `deployment` (got {found})."
        invalid.append({"field": named[-1] if named else "model", "detail": detail})
        return None
    if asked.deployment is None:
        # `model` may name a version as well: people copy `owner/name:version`.
        return _reference(asked.version if asked.model is None else asked.model, invalid, named[0])
    if not is_model_name(asked.deployment):
        invalid.append({"field": "deployment", "detail": "Must be a deployment's name, `owner/name`."})
        return None
    return Reference("deployment", asked.deployment)


def _reference(version: str | None, invalid: list[dict[str, str]], field: str = "version") -> Reference | None:
    if version is None:
        invalid.append({
            "field": field,
            "detail": "Required: `owner/name`, `owner/name:version` or a version's 64 hexadecimal digits.",
        })  # fmt: skip
        return None
    found = _REFERENCE.fullmatch(version)
    if not found:
        invalid.append({
            "field": field,
            "detail": "Must be `owner/name`, `owner/name:version` or a version's 64 hexadecimal digits.",
        })  # fmt: skip
        return None
    if version_id := found["version"] or found["bare_version"]:
        return Reference("version", found["name"], version_id)
    return Reference("model", found["name"])


def _lifetime_seconds(text: str | None, field: str, invalid: list[dict[str, str]]) -> int | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match and any(match.groups()):
        hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = hours * 3600 + minutes * 60 + seconds
        if 5 <= total <= LIFETIME_LIMIT_SECONDS:
            return total
    invalid.append({
        "field": field,
        "detail": _DURATION_DETAIL,
    })  # fmt: skip
    return None


def _idempotency_key(header: str | None, field: str, invalid: list[dict[str, str]]) -> str | None:
    """Return the key in an `Idempotency-Key` header, quoted or bare.

    The IETF draft has it quoted, many clients send it bare:
    https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
    """
    if header is None:
        return None
    key = header.strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not re.fullmatch(r"[\x21\x23-\x7e]{1,255}", key, re.ASCII):
        invalid.append({
            "field": field,
            "detail": "Must be 1 to 255 printable ASCII characters without spaces or quotes, such as a UUID.",
        })  # fmt: skip
        return None
    return key
