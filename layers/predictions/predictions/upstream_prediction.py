"""A prediction in Replicate's words, as answers and webhooks carry it.

Apart from `upstream`, so that the webhook's function reads one without importing an HTTP client.
"""

import json
import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from predictions.errors import PredictionsError

DEPTH_LIMIT = 300
"""The deepest answer: what Python reads beyond that depends on its version, and on who calls."""

_DIGITS_LIMIT = 4300
"""https://docs.python.org/3/library/stdtypes.html#integer-string-conversion-length-limitation"""


class UnreadablePrediction(PredictionsError):
    """What should be a prediction has no id or status, or is not JSON at all."""


class UpstreamPrediction(BaseModel):
    """A prediction as Replicate tells it, in an answer or a webhook; read leniently, since fields come and go."""

    model_config = ConfigDict(extra="ignore", strict=False, protected_namespaces=())

    id: str = Field(pattern=r"^[a-z0-9]{1,64}$")
    status: str = Field(max_length=64)
    model: str | None = None
    version: str | None = None
    deployment: str | None = None
    input: Any = None
    output: Any = None
    logs: str | None = None
    error: str | None = None
    metrics: dict[str, Any] | None = None
    created_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    webhook: str | None = None
    data_removed: bool = False
    urls: dict[str, Any] = Field(default_factory=dict)

    @field_validator("logs", "error", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        # Models have been seen to put objects here; a shape we did not expect must not lose a paid result.
        text = value if value is None or isinstance(value, str) else json.dumps(value)
        # Half a surrogate pair cannot be stored.
        return text and text.encode("utf-8", "replace").decode()

    @field_validator("metrics", "urls", "data_removed", mode="before")
    @classmethod
    def _tolerant(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "data_removed":
            return value is True
        return value if isinstance(value, dict) else {}

    @field_validator(
        "model", "version", "deployment", "webhook", "created_at", "started_at", "completed_at", mode="before"
    )
    @classmethod
    def _name(cls, value: Any) -> Any:
        return cls._text(value) if isinstance(value, str) and len(value) <= 4096 else None

    @classmethod
    def read(cls, body: bytes) -> "UpstreamPrediction":
        """Reads the JSON of a prediction.

        Raises:
            UnreadablePrediction: It is none.
        """
        return cls.parse(read_json(body, replace=True))

    @classmethod
    def parse(cls, value: Any) -> "UpstreamPrediction":
        """Reads a prediction from parsed JSON.

        Raises:
            UnreadablePrediction: It is none.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fields = ", ".join(str(e["loc"][0]) if e["loc"] else "body" for e in error.errors()[:5])
            raise UnreadablePrediction(f"not a prediction: {fields}") from None


def read_json(body: bytes, *, replace: bool = False) -> Any:
    """Parses JSON as models write it; None for what is none, or is nested deeper than `DEPTH_LIMIT`.

    Models return NaN and Infinity, which JSON does not have and clients cannot parse: they become null, as does a whole
    number of more digits than Python reads. Half a surrogate pair, which is no character and can be neither sent nor
    stored, becomes a question mark. Control characters are taken as they are: none of this is worth a paid result.

    Args:
        body: The text.
        replace: Whether bytes that are no UTF-8 become U+FFFD; else a text with such bytes is none.
    """
    try:
        value = _parse(body, replace)
        return _whole_characters(value) if _SURROGATE.search(body) else value
    except (ValueError, RecursionError):
        return None


def _parse(body: bytes, replace: bool) -> Any:
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
    except UnicodeDecodeError:
        if not replace:
            raise
        text = body.decode("utf-8", "replace")
    value = json.loads(text, strict=False, parse_constant=lambda _: None, parse_float=_finite, parse_int=_readable)
    if text.count("[") + text.count("{") > DEPTH_LIMIT and _is_deep(value):
        return None
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH_LIMIT):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""As an escape, also as half of a good pair; and as what `json.loads` takes for UTF-8."""


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_whole_characters(each) for each in value]
    if isinstance(value, dict):
        return {_whole_characters(name): _whole_characters(each) for name, each in value.items()}
    return value


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _readable(digits: str) -> int | None:
    return int(digits) if len(digits) <= _DIGITS_LIMIT else None
