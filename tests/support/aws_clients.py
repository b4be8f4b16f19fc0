"""Clients of botocore that one object answers."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import botocore.session

from tests.support.strict_parameters import check_call

SERVICES = ("dynamodb", "s3", "stepfunctions", "sqs", "ssm", "secretsmanager", "events", "lambda")


class Answering(Protocol):
    """Who answers what the clients are asked."""

    def call(self, service: str, operation: str, asked: dict[str, Any], client: Any) -> Any:
        """One call, as `_make_api_call` of a client gets it."""


class Clients:
    """The clients that the library gets, or those of other services; `world` is who answers them."""

    def __init__(self, services: Sequence[str] = SERVICES) -> None:
        self.world: Answering | None = None
        session = botocore.session.Session()
        self._clients: dict[str, Any] = {}
        for name in services:
            client: Any = session.create_client(
                name, region_name="us-east-1", aws_access_key_id="testing", aws_secret_access_key="testing"
            )
            client._make_api_call = self._answer(name, client)
            self._clients[name] = client

    def __call__(self, name: str) -> Any:
        return self._clients[name]

    def cache_clear(self) -> None:
        """As of the function that this stands for."""

    def _answer(self, service: str, client: Any) -> Callable[[str, dict[str, Any]], Any]:
        def make_api_call(operation: str, asked: dict[str, Any]) -> Any:
            assert self.world is not None
            check_call(client, operation, asked)
            return self.world.call(service, operation, asked, client)

        return make_api_call


class AwsError(Exception):
    """What AWS answers instead, by code; `item` goes with a condition that failed, `reasons` with a transaction's."""

    def __init__(self, code: str, item: Any = None, reasons: Any = None) -> None:
        super().__init__(code)
        self.code = code
        self.item = item
        self.reasons = reasons


def raise_client_error(client: Any, operation: str, error: AwsError) -> None:
    """Raises what botocore's client raises for it."""
    response: dict[str, Any] = {"Error": {"Code": error.code, "Message": ""}, "ResponseMetadata": {}}
    if error.item is not None:
        response["Item"] = error.item
    if error.reasons is not None:
        response["CancellationReasons"] = error.reasons
    raise client.exceptions.from_code(error.code)(response, operation)
