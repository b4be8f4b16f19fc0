"""A prediction as Replicate's responses and webhooks carry it.

Apart from `upstream.client`, so that the webhook's function reads one without importing an HTTP client; and without
pydantic, whose import takes a quarter as long as a botocore client: two members have a rule, all others are lenient.
"""

import copy
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final

from predictions.errors import PredictionsError
from predictions.status import TERMINAL_RANK, Status, rank_of
from predictions.upstream.bounded_json import LIGHT_BYTES, read_members, weigh

DEPTH_LIMIT = 300
"""The deepest response: what Python reads beyond that depends on its version, and on who calls."""

PARSED_LIMIT_BYTES = 256 * 1024 * 1024
"""The memory that a response may take when it is parsed, kept and written out again (`bounded_json.weigh`): what the
smallest function that does so has left of its 512 MB. Each function that reads a kept output bears as much."""

TEXT_LIMIT_BYTES = 64 * 1024 * 1024
"""The longest response that is received; of a longer one its beginning is looked at."""

_DIGITS_LIMIT = 4300
"""https://docs.python.org/3/library/stdtypes.html#integer-string-conversion-length-limitation"""


class UnreadablePrediction(PredictionsError):
    """A prediction without id or status, or not JSON at all."""


# The members that are read of a response that is too large: all but `input` and `output`.
_SMALL_MEMBERS = (
    "id", "status", "model", "version", "deployment", "logs", "error", "metrics", "created_at", "started_at",
    "completed_at", "webhook", "data_removed", "urls",
)  # fmt: skip


_ID = re.compile(r"[a-z0-9]{1,64}")
_STATUS_LIMIT = 64
_NAME_LIMIT = 4096
_TEXTS: Final = ("logs", "error")
_NAMES: Final = ("model", "version", "deployment", "webhook", "created_at", "started_at", "completed_at")


@dataclass
class UpstreamPrediction:
    """A prediction of a response or webhook; lenient, since fields come and go."""

    id: str
    status: str
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
    urls: dict[str, Any] = field(default_factory=dict)
    # Not of `parse`, so that no response can say it.
    _too_large: str | None = field(default=None, init=False)
    _reported_status: str | None = field(default=None, init=False)

    @property
    def too_large(self) -> str | None:
        """Return why its output was not read, or None if it was."""
        return self._too_large

    @property
    def reported_status(self) -> str:
        """Return the status that Replicate reported: `status` may be this stack's instead."""
        return self.status if self._reported_status is None else self._reported_status

    @classmethod
    def read(cls, body: bytes, *, truncated: bool = False, upstream_id: str | None = None) -> "UpstreamPrediction":
        """Read the JSON of a prediction.

        Of one that is beyond the bound, only the small members are read, `too_large` says why, and one that has
        succeeded has failed for it: its output can be neither kept nor shown.

        Args:
            body: The text.
            truncated: Whether it is only the beginning of one that is longer than `TEXT_LIMIT_BYTES`.
            upstream_id: Its id, where that is known: it may not be found in one that is too large.

        Raises:
            UnreadablePrediction: It is none.
        """
        reason = too_large(body, truncated=truncated)
        if reason is None:
            try:
                return cls.parse(_read(body, replace=True))
            except _TooDeep:
                reason = f"The output is too large: it is nested deeper than {DEPTH_LIMIT} levels. {_ADVICE}"
        return cls._without_output(body, reason, upstream_id)

    @classmethod
    def _without_output(cls, body: bytes, reason: str, upstream_id: str | None) -> "UpstreamPrediction":
        """Read a prediction whose output is too large, without that output.

        A status that cannot be found is empty, and ranks lowest.
        """
        texts = read_members(utf8(body), _SMALL_MEMBERS)
        if not texts:
            raise UnreadablePrediction("not a prediction: body")
        known = {
            "id": upstream_id,
            "status": "",
            **{name: read_json(text, replace=True) for name, text in texts.items()},
        }
        if not isinstance(known["status"], str):
            known["status"] = ""
        found = cls.parse(known)
        found._too_large = reason
        return found.failed_for_its_size() if rank_of(found.status) >= TERMINAL_RANK else found

    @classmethod
    def read_as_open(cls, body: bytes) -> "UpstreamPrediction":
        """Read a prediction without its output: one that has finished counts as running, until others read it whole.

        Raises:
            UnreadablePrediction: It is none.
        """
        texts = read_members(utf8(body), _SMALL_MEMBERS)
        found = cls.parse({name: read_json(text, replace=True) for name, text in texts.items()})
        if rank_of(found.status) < TERMINAL_RANK:
            return found
        return found.changed(status=Status.PROCESSING.value, error=None)

    def failed_for_its_size(self) -> "UpstreamPrediction":
        """Return this as finished: `failed`, unless Replicate reports another end."""
        status = self.status if self.status in _OTHER_ENDS else Status.FAILED.value
        failed = self.changed(status=status, output=None, error=self.error or self.too_large)
        failed._reported_status = self.reported_status
        return failed

    def changed(self, **members: Any) -> "UpstreamPrediction":
        """Return a copy with other members."""
        copied = copy.copy(self)
        for name, value in members.items():
            setattr(copied, name, value)
        return copied

    @classmethod
    def parse(cls, value: Any) -> "UpstreamPrediction":
        """Read a prediction from parsed JSON.

        Raises:
            UnreadablePrediction: It is none.
        """
        if not isinstance(value, dict):
            raise UnreadablePrediction("not a prediction: body")
        prediction_id: Any = value.get("id")
        status: Any = value.get("status")
        wrong = [
            *([] if isinstance(prediction_id, str) and _ID.fullmatch(prediction_id) else ["id"]),
            *([] if isinstance(status, str) and len(status) <= _STATUS_LIMIT and _is_whole(status) else ["status"]),
        ]
        if wrong:
            raise UnreadablePrediction(f"not a prediction: {', '.join(wrong)}")
        metrics, urls = value.get("metrics"), value.get("urls")
        return cls(
            id=prediction_id,
            status=status,
            input=value.get("input"),
            output=value.get("output"),
            metrics=metrics if isinstance(metrics, dict) else {} if "metrics" in value else None,
            data_removed=value.get("data_removed") is True,
            urls=urls if isinstance(urls, dict) else {},
            **{name: _text(value.get(name)) for name in _TEXTS},
            **{name: _name(value.get(name)) for name in _NAMES},
        )


def _text(value: Any) -> str | None:
    # Models have been seen to put objects here; a shape we did not expect must not lose a paid result.
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    # Half a surrogate pair cannot be stored.
    return text and text.encode("utf-8", "replace").decode()


def _name(value: Any) -> str | None:
    return _text(value) if isinstance(value, str) and len(value) <= _NAME_LIMIT else None


def _is_whole(text: str) -> bool:
    return not _HALF_PAIR.search(text)


_ADVICE = "Have the model return it as a file."
_OTHER_ENDS = (Status.FAILED.value, Status.CANCELED.value, Status.ABORTED.value)


def too_large(body: bytes, *, truncated: bool = False) -> str | None:
    """Return why a prediction's JSON is too large to read, or None if it is not.

    Args:
        body: The text.
        truncated: Whether it is only the beginning.
    """
    if truncated:
        size = f"more than {TEXT_LIMIT_BYTES // 1024**2} MiB"
        return f"The output is too large: Replicate's response with it has {size}, which is the limit. {_ADVICE}"
    if len(body) <= LIGHT_BYTES:
        return None
    text = utf8(body)
    weight = weigh(text, PARSED_LIMIT_BYTES)
    if weight.bytes > PARSED_LIMIT_BYTES:
        return (
            f"The output is too large: Replicate's response with it has {len(body)} bytes and about {weight.values} "
            f"values, which take about {weight.bytes // 1024**2} MiB of memory to read; the limit is "
            f"{PARSED_LIMIT_BYTES // 1024**2} MiB. {_ADVICE}"
        )
    return None


def utf8(body: bytes) -> bytes:
    """Return a JSON text in UTF-8 without a byte order mark."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    return body.decode(encoding, "replace").encode("utf-8", "surrogatepass")


def read_json(body: bytes, *, replace: bool = False) -> Any:
    """Parse JSON as models write it; return None if invalid, too deep or too large.

    Models return NaN and Infinity, which JSON does not have and clients cannot parse: they become null, as does a whole
    number of more digits than Python reads. Half a surrogate pair, which is no character and can be neither sent nor
    stored, becomes a question mark. Control characters are taken as they are: none of this is worth a paid result.

    Args:
        body: The text.
        replace: Whether bytes that are no UTF-8 become U+FFFD; else a text with such bytes is none.
    """
    if len(body) > LIGHT_BYTES and weigh(utf8(body), PARSED_LIMIT_BYTES).bytes > PARSED_LIMIT_BYTES:
        return None
    try:
        return _read(body, replace)
    except _TooDeep:
        return None


class _TooDeep(Exception):
    """JSON that is nested deeper than `DEPTH_LIMIT`."""


def _read(body: bytes, replace: bool) -> Any:
    """Parse JSON that is not too large; return None if it is invalid.

    Raises:
        _TooDeep: It is nested deeper than `DEPTH_LIMIT`.
    """
    try:
        value = _parse(body, replace)
        return _whole_characters(value) if _SURROGATE.search(body) else value
    except RecursionError:
        raise _TooDeep from None
    except ValueError:
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
        raise _TooDeep
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


_HALF_PAIR = re.compile("[\ud800-\udfff]")


def _whole_characters(value: Any) -> Any:
    # Lists and objects are changed in place: a copy of a large output would take its memory once more.
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() if _HALF_PAIR.search(value) else value
    if isinstance(value, list):
        for n, each in enumerate(value):
            if isinstance(each, str | list | dict):
                value[n] = _whole_characters(each)
    elif isinstance(value, dict):
        if any(_HALF_PAIR.search(name) for name in value):
            return {_whole_characters(name): _whole_characters(each) for name, each in value.items()}
        for name, each in value.items():
            if isinstance(each, str | list | dict):
                value[name] = _whole_characters(each)
    return value


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _readable(digits: str) -> int | None:
    return int(digits) if len(digits) <= _DIGITS_LIMIT else None
