"""The API's own document, as the deployed stack gives it."""

from collections.abc import Callable

import httpx
from openapi_spec_validator import OpenAPIV31SpecValidator
from predictions.description import describe

from local.cloud import LocalCloud

Api = Callable[..., httpx.Client]


def test_document_needs_a_token_and_describes_this_stack(cloud: LocalCloud, api: Api) -> None:
    refused = httpx.get(f"{cloud.stack.api_url}/openapi.json", trust_env=False)
    assert refused.status_code == 401
    answer = api("alice").get("/openapi.json")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document = answer.json()
    OpenAPIV31SpecValidator(document).validate()
    assert document == describe(cloud.stack.api_url)
