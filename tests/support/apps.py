"""Functions as Lambda has them: imported with exactly the template's variables, called with events and a context."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from predictions.aws import clients

from tests.support.fixtures import ENVIRONMENT
from tests.support.template import logical_name, variables

EVENTS = Path(__file__).parents[2] / "events"
SAMPLE_ID = "phbiy2aqvath546nlxzgyq5c3q"
"""The prediction of the event samples: alice's, of the key in start_prediction/version.json."""
SAMPLE_UPSTREAM_ID = "ufawqhfynnddngldkgtslldrkq"
SAMPLE_SIGNING_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def load_app(function: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function's module, imported anew; a variable that the template does not give it is not there."""
    given = variables(logical_name(function))
    for name in ENVIRONMENT:
        if not name.startswith("AWS_") and name not in given:
            monkeypatch.delenv(name, raising=False)
    return importlib.reload(importlib.import_module(f"functions.{function}.app"))


def sample(function: str, case: str) -> dict[str, Any]:
    """An event sample."""
    event: dict[str, Any] = json.loads((EVENTS / function / f"{case}.json").read_text())
    return event


class Context:
    """What Lambda tells a function of its invocation."""

    function_name = "function"
    function_version = "$LATEST"
    memory_limit_in_mb = 512
    invoked_function_arn = "arn:aws:lambda:eu-central-1:123456789012:function:function"
    aws_request_id = "c6af9ac6-7b61-11e6-9a41-93e8deadbeef"

    def __init__(self, remaining_seconds: float = 25) -> None:
        self._remaining_seconds = remaining_seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(self._remaining_seconds * 1000)


class AwsCalls:
    """Every call that any client makes from now on, as `dynamodb.PutItem`; `fail` makes the next ones fail."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self._error: Exception | None = None
        for name in ("dynamodb", "events", "s3", "sqs", "ssm", "secretsmanager", "stepfunctions"):
            client: Any = clients.client(name)
            client.meta.events.register_first("before-call", self._record)

    def fail(self, error: Exception | None) -> None:
        """From now on every call ends like this."""
        self._error = error

    def _record(self, model: Any, **_: Any) -> None:
        self.made.append(f"{model.service_model.service_name}.{model.name}")
        if self._error:
            raise self._error


def clock_module(now: Any) -> Any:
    """Stands for the module `time` in a handler that asks it."""
    return SimpleNamespace(time=now)
