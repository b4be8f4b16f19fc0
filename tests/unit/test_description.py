import json
import tomllib
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from predictions.description import VERSION, Operation, operations

from tests.unit.apps import Context, load_app, sample
from tests.unit.code_reach import reach
from tests.unit.described import check_answer, complaints, document, operation_of
from tests.unit.fakes import API_URL
from tests.unit.template import ROOT, folder_name, resources

ROUTES = {
    (event["Properties"]["Method"], event["Properties"]["Path"]): {**event["Properties"], "folder": folder_name(name)}
    for name, function in resources("AWS::Serverless::Function").items()
    for event in function["Properties"].get("Events", {}).values()
    if event["Type"] == "Api"
}
GATEWAYS = {
    name: answer["StatusCode"]
    for name, answer in resources("AWS::Serverless::Api")["Api"]["Properties"]["GatewayResponses"].items()
    if "StatusCode" in answer
}
"""The statuses of API Gateway's own answers, by what it answers them to."""
PREDICTION: dict[str, Any] = {
    "id": "phbiy2aqvath546nlxzgyq5c3q",
    "model": "local/painter",
    "version": "hidden",
    "input": {},
    "output": None,
    "logs": "",
    "error": None,
    "status": "starting",
    "created_at": "2025-06-15T15:06:40.000000Z",
    "started_at": None,
    "completed_at": None,
    "metrics": {},
    "data_removed": False,
    "source": "api",
    "deadline": "2025-06-16T15:06:40Z",
    "urls": {"get": API_URL, "cancel": API_URL, "web": API_URL},
    "output_files": [],
}


@pytest.mark.parametrize(
    "other",
    [
        {"status": "done"},
        {"id": "PHBIY"},
        {"error": 3},
        {"started_at": 1750000000},
        {"urls": {"get": API_URL}},
        {"output_files": [{"path": ""}]},
        {"token": "r8_secret"},
    ],
    ids=str,
)
def test_prediction_that_differs_from_its_schema_is_found(other: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Prediction"}
    assert complaints(schema, PREDICTION) == []
    assert complaints(schema, {**PREDICTION, **other})


@pytest.mark.parametrize("missing", ["id", "status", "output", "output_files", "urls"])
def test_prediction_without_a_field_that_is_always_there_is_found(missing: str) -> None:
    value = {name: part for name, part in PREDICTION.items() if name != missing}
    assert complaints({"$ref": "#/components/schemas/Prediction"}, value)


def test_status_that_is_not_described_is_found() -> None:
    with pytest.raises(AssertionError, match="answers 418"):
        check_answer(sample("read_predictions", "one"), {"statusCode": 418})


def test_document_is_valid() -> None:
    OpenAPIV31SpecValidator(document()).validate()
    assert json.loads(json.dumps(document(), allow_nan=False)) == document()


def test_document_has_every_route_of_the_template_and_no_other() -> None:
    described = {(method.upper(), path) for path, methods in document()["paths"].items() for method in methods}
    assert described == ROUTES.keys()
    assert len(operations()) == len(ROUTES)


def test_every_operation_has_an_id_of_its_own() -> None:
    ids = [each.id for each in operations()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.id)
def test_operation_is_public_where_the_template_says_so(operation: Operation) -> None:
    public = ROUTES[operation.method, operation.path].get("Auth") == {"Authorizer": "NONE"}
    described = document()["paths"][operation.path][operation.method.lower()]
    assert (described["security"] == []) == public
    assert {"401", "403"}.issubset(described["responses"]) or public


def test_no_operation_describes_whatever_may_come() -> None:
    for operation in operations():
        described = document()["paths"][operation.path][operation.method.lower()]["responses"]
        also = [operation.also] if operation.also else []
        assert described.keys() == {str(status) for status in (operation.status, *also, *operation.problems)}


STATUSES = {
    "openapi.get": {401, 403},
    "predictions.create": {401, 403, 404, 413, 415, 422},
    "predictions.list": {401, 403, 422},
    "predictions.get": {401, 403, 404},
    "predictions.delete": {401, 403, 404, 409},
    "trainings.create": {401, 403, 404, 413, 415, 422},
    "files.create": {401, 403, 413, 415, 422},
    "files.download": {404},
    "webhooks.replicate": {401, 404, 413, 415},
    "account.get": {401, 403, 404, 414},
    "models.list": {401, 403, 404, 414, 422},
    "deployments.create": {401, 403, 404, 409, 413, 414, 415, 422},
    "deployments.delete": {401, 403, 404, 409, 414},
}


@pytest.mark.parametrize(("name", "statuses"), STATUSES.items(), ids=STATUSES)
def test_operation_describes_the_problems_that_it_can_answer(name: str, statuses: set[int]) -> None:
    (operation,) = (each for each in operations() if each.id == name)
    assert set(operation.problems) == statuses | {400, 429, 502, 503, 504}


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.id)
def test_operation_describes_what_api_gateway_answers_in_its_place(operation: Operation) -> None:
    without_route = {"MISSING_AUTHENTICATION_TOKEN", "RESOURCE_NOT_FOUND"}
    with_token = {"UNAUTHORIZED", "ACCESS_DENIED", "INVALID_SIGNATURE"}
    with_token |= {"AUTHORIZER_FAILURE", "AUTHORIZER_CONFIGURATION_ERROR"}
    with_body = {"BAD_REQUEST_BODY", "REQUEST_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE"}
    assert without_route | with_token | with_body < GATEWAYS.keys()
    others = without_route | (set() if operation.scope else with_token) | (set() if operation.body else with_body)
    assert {status for name, status in GATEWAYS.items() if name not in others} <= set(operation.problems)


@pytest.mark.parametrize("folder", sorted({route["folder"] for route in ROUTES.values()}))
def test_problems_that_the_code_raises_are_described_and_others_are_not(folder: str) -> None:
    raised = reach(folder).statuses
    own = [each for each in operations() if ROUTES[each.method, each.path]["folder"] == folder]
    described = {status for each in own for status in each.problems}
    # A 500 is a defect. The 404 of any function is for paths that no route of the document has.
    assert raised - {404, 500} <= described
    by_replicate = {409} if any(each.forwarded for each in own) else set()
    by_gateway = set(GATEWAYS.values()) - {404}
    assert described - by_replicate <= raised | by_gateway


def test_components_are_all_used_and_all_there() -> None:
    text = json.dumps(document())
    for kind in ("schemas", "parameters", "headers", "responses"):
        for name in document()["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, name


def test_what_replicate_does_not_have_is_marked() -> None:
    paths = document()["paths"]
    added = {(m.upper(), path) for path, methods in paths.items() for m, each in methods.items() if each.get("x-added")}
    assert added == {
        ("GET", "/openapi.json"),
        ("POST", "/uploads"),
        ("POST", "/pipelines"),
        ("GET", "/pipelines"),
        ("GET", "/pipelines/{id}"),
        ("POST", "/pipelines/{id}/cancel"),
        ("DELETE", "/predictions/{id}"),
        ("POST", "/webhooks/replicate/{id}"),
        ("GET", "/objects/{bucket}/{name}"),
        ("POST", "/recipes"),
        ("GET", "/recipes"),
        ("GET", "/recipes/{name}"),
        ("PUT", "/recipes/{name}"),
        ("DELETE", "/recipes/{name}"),
        ("POST", "/batches"),
        ("GET", "/batches"),
        ("GET", "/batches/{id}"),
        ("POST", "/batches/{id}/cancel"),
        ("POST", "/batches/{id}/retry"),
    }
    parameters = document()["components"]["parameters"]
    assert {name for name, each in parameters.items() if each.get("x-added")} == {"IdempotencyKey", "RetryCount"}
    fields = {
        f"{schema}.{name}"
        for schema, each in document()["components"]["schemas"].items()
        for name, field in each.get("properties", {}).items()
        if field.get("x-added")
    }
    assert {"Prediction.output_files", "Training.output_files", "File.uploaded", "Upload.upload"} <= fields
    assert {"VersionBody.lifetime", "InputBody.lifetime"} <= fields


def test_bodies_refuse_and_require_what_the_routes_do() -> None:
    schemas = document()["components"]["schemas"]
    assert complaints(schemas["VersionBody"], {"version": "local/painter", "input": {}}) == []
    assert complaints(schemas["VersionBody"], {"input": {}})
    assert complaints(schemas["InputBody"], {"version": "local/painter", "input": {}})
    assert complaints(schemas["InputBody"], {"input": {}, "num_outputs": 1})
    assert complaints(schemas["TrainingBody"], {"input": {}})
    assert complaints(schemas["UploadBody"], {"filename": "fox.png", "size": 0})


def test_version_is_that_of_the_project() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_route_answers_the_document_with_the_stacks_url(cloud: None, monkeypatch: pytest.MonkeyPatch) -> None:
    app = load_app("describe_api", monkeypatch)
    answer = app.handler(sample("describe_api", "document"), Context())
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, document())
    assert document()["servers"] == [{"url": API_URL}]
    assert operation_of(sample("describe_api", "document"))["operationId"] == "openapi.get"
