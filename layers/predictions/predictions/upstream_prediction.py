"""A prediction in Replicate's words, as answers and webhooks carry it.

Apart from `upstream`, so that the webhook's function reads one without importing an HTTP client.
"""

import json
import math
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from predictions.errors import PredictionsError


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
        return cls.parse(read_json(body))

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


def read_json(body: bytes) -> Any:
    """Parses JSON as models write it; None for what is none.

    Models return NaN and Infinity, which JSON does not have and clients cannot parse: they become null. Half a
    surrogate pair, which is no character and can be neither sent nor stored, becomes a question mark.
    """
    try:
        value = json.loads(body, parse_constant=lambda _: None, parse_float=_finite)
        return _whole_characters(value) if _SURROGATE.search(body) else value
    except (ValueError, RecursionError):
        return None


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
