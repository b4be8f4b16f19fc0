import json
import tomllib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from predictions.api.proxy import ROUTES as FORWARDED_ROUTES
from predictions.batches.schema import BatchBody
from predictions.bodies import Body
from predictions.files.upload_requests import UploadBody
from predictions.intents.model import PredictionBody, TrainingBody
from predictions.notifications.webhook_queue import EVENTS
from predictions.pipelines.definition import PipelineBody
from predictions.recipes.schema import RecipeBody
from pydantic.json_schema import GenerateJsonSchema

from local.openapi import SOURCE, TARGET, as_json
from tests.support.apps import Context, load_app, sample
from tests.support.code_reach import reach
from tests.support.described import FORWARDED, Operation, check_answer, complaints, document, operation_of, operations
from tests.support.fakes import API_URL
from tests.support.template import ROOT, folder_name, resources

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
    "logs": "",
    "error": None,
    "status": "starting",
    "created_at": "2025-06-15T15:06:40.000000Z",
    "data_removed": False,
    "source": "api",
    "origin": "batch",
    "deadline": "2025-06-16T15:06:40Z",
    "urls": {"get": API_URL, "cancel": API_URL, "web": API_URL},
    "output_files": [],
}


@pytest.mark.parametrize(
    "other",
    [
        {"status": "done"},
        {"upstream_status": None},
        {"origin": "http"},
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


@pytest.mark.parametrize("missing", ["id", "status", "origin", "output_files", "urls"])
def test_prediction_without_a_field_that_is_always_there_is_found(missing: str) -> None:
    value = {name: part for name, part in PREDICTION.items() if name != missing}
    assert complaints({"$ref": "#/components/schemas/Prediction"}, value)


def test_status_that_is_not_described_is_found() -> None:
    with pytest.raises(AssertionError, match="answers 418"):
        check_answer(sample("read_prediction", "one"), {"statusCode": 418})


def test_document_is_valid() -> None:
    OpenAPIV31SpecValidator(document()).validate()
    assert json.loads(json.dumps(document(), allow_nan=False)) == document()


def test_json_that_the_layer_ships_is_made_from_the_yaml() -> None:
    assert TARGET.read_text(encoding="ascii") == as_json(SOURCE.read_text(encoding="utf-8")), "run make openapi"


def test_document_names_the_stacks_url_in_one_place() -> None:
    assert TARGET.read_text(encoding="ascii").count('"https://api.example.com/v1"') == 1
    assert "api.example.com" not in json.dumps({**json.loads(TARGET.read_text(encoding="ascii")), "servers": []})


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
        assert set(operation.described["responses"]) == {str(each) for each in operation.successes + operation.problems}
        assert operation.successes == ([200, 201] if operation.id == "recipes.put" else [operation.status])
        assert all(200 <= status < 400 for status in operation.successes)


def test_operations_that_are_forwarded_say_so() -> None:
    assert {(each.method, each.path) for each in operations() if each.forwarded} == set(FORWARDED_ROUTES)
    assert [each.forwarded for each in operations()] == [
        FORWARDED in each.described["summary"] for each in operations()
    ]


REFUSALS = {
    "predictions.create": {404},  # a model that is not there, wherever it is named
    "predictions.delete": {409},
    "batches.retry": {409},
    "recipes.create": {409},
    "recipes.put": {409},
    "recipes.delete": {409},
    "webhooks.replicate": {401},
    "usage.get": {422},  # days and groups in its query
}
"""Statuses that nothing else in the document calls for."""


def called_for(operation: Operation) -> set[int]:
    """The problems that an operation's token, path, parameters and body call for.

    A 500 is none of them: it would be a defect, and a check of the answers has to find it.
    """
    with_token = bool(operation.scopes)
    # Of a webhook only the signature is checked: what it says is for the protocol to judge.
    checks_body = operation.has_body and with_token
    # An order at Replicate, or a cursor here.
    checks_query = "Cursor" in operation.parameters or (operation.forwarded and bool(operation.parameters))
    families = [
        ({400, 429, 502, 503, 504}, True),  # API Gateway's own, and 503 of a handler that AWS fails
        ({401, 403}, with_token),
        ({404}, bool(operation.names)),
        ({413, 415}, operation.has_body),
        ({422}, checks_body or checks_query),
        ({404, 414}, operation.forwarded),
        ({409}, operation.forwarded and operation.method != "GET"),
        (REFUSALS.get(operation.id, set()), True),
    ]
    return {status for family, given in families if given for status in family}


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.id)
def test_operation_describes_the_problems_that_it_calls_for_and_no_others(operation: Operation) -> None:
    assert set(operation.problems) == called_for(operation)
    for status in operation.problems:
        reference = operation.described["responses"][str(status)]
        assert reference == {"$ref": f"#/components/responses/Problem{status}"}


@pytest.mark.parametrize("operation", operations(), ids=lambda each: each.id)
def test_operation_describes_each_name_in_its_path(operation: Operation) -> None:
    described = [each for each in operation.described["parameters"] if each.get("in") == "path"]
    assert [each["name"] for each in described] == operation.names
    assert all(each["required"] is True for each in described)


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
    others = without_route | (set() if operation.scopes else with_token) | (set() if operation.has_body else with_body)
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
        ("GET", "/usage"),
        ("POST", "/uploads"),
        ("POST", "/pipelines"),
        ("GET", "/pipelines"),
        ("GET", "/pipelines/{id}"),
        ("POST", "/pipelines/{id}/cancel"),
        ("DELETE", "/predictions/{id}"),
        ("POST", "/webhooks/replicate/{id}"),
        ("GET", "/objects/{bucket}/{name}"),
        ("HEAD", "/objects/{bucket}/{name}"),
        ("HEAD", "/files/{id}/download"),
        ("GET", "/console"),
        ("GET", "/console/{name}"),
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
    assert {name for name, each in parameters.items() if each.get("x-added")} == {
        "IdempotencyKey", "RetryCount", "Status", "Model", "Origin", "Label", "Labels", "Traceparent",
        }  # fmt: skip
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


MODELS: Mapping[str, type[Body]] = {
    "VersionBody": PredictionBody,
    "InputBody": PredictionBody,
    "TrainingBody": TrainingBody,
    "UploadBody": UploadBody,
    "PipelineBody": PipelineBody,
    "BatchBody": BatchBody,
    "RecipeBody": RecipeBody,
    "NamedRecipeBody": RecipeBody,
}
"""What checks each body. A multipart form and what only Replicate checks have no model."""


def of_model(name: str) -> dict[str, Any]:
    """A body as the model that checks it says."""
    schema = GenerateJsonSchema().generate(MODELS[name].schema())
    if name == "VersionBody":  # the one route that has no model in its path
        schema["required"] = ["version", "input"]
        (schema["properties"]["version"],) = (
            each for each in schema["properties"]["version"]["anyOf"] if each != {"type": "null"}
        )
    if name == "InputBody":
        del schema["properties"]["version"]
    if name == "NamedRecipeBody":  # whose route has no name in its path
        schema["required"] = ["name", *schema["required"]]
    found = bare(schema, {f"#/$defs/{each}": part for each, part in schema.pop("$defs", {}).items()})
    return {"required": [], **found}


def bare(schema: Any, within: Mapping[str, Any] = {}) -> Any:
    """A schema without its words, with the schemas that it refers to in their places; no model refers to itself."""
    if isinstance(schema, list):
        return [bare(part, within) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("$ref", "") in within:
        return bare(within[schema["$ref"]], within)
    words = {each for each in ("title", "description") if isinstance(schema.get(each), str)}
    words |= {"additionalProperties"} if schema.get("additionalProperties") is True else set()  # which it is without
    return {key: bare(part, within) for key, part in schema.items() if key not in {*words, "x-added"}}


@pytest.mark.parametrize("name", MODELS)
def test_body_is_that_of_the_model_that_checks_it(name: str) -> None:
    assert bare(document()["components"]["schemas"][name]) == of_model(name)


def test_every_body_of_our_own_has_a_model() -> None:
    own = [each for each in operations() if each.has_body and not each.forwarded]
    contents = [content for each in own for content in each.described["requestBody"]["content"].values()]
    bodies = {content["schema"]["$ref"] for content in contents}
    assert {each.rpartition("/")[2] for each in bodies} == {*MODELS, "FileForm", "ReplicateWebhook"}


def test_fields_of_bodies_are_described() -> None:
    fields = {f"{name}.{each}": field for name in MODELS for each, field in properties_of(name).items()}
    assert [name for name, field in fields.items() if not field.get("description")] == ["PipelineBody.steps"]


def properties_of(name: str) -> dict[str, Any]:
    properties: dict[str, Any] = document()["components"]["schemas"][name]["properties"]
    return properties


def changes(schema: Any) -> Iterator[tuple[str, Any]]:
    """Each way in which one bound, choice, type, name or requirement of a schema can be another."""

    def walk(part: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
        for key, value in list(part.items()) if isinstance(part, dict) else list(enumerate(part)):
            if isinstance(value, dict | list):
                yield from walk(value, f"{path}/{key}")
                if isinstance(value, list) and value:
                    yield f"{path}/{key}", (part, key), value[1:]
            elif isinstance(value, bool):
                yield f"{path}/{key}", (part, key), not value
            elif isinstance(value, int):
                yield f"{path}/{key}", (part, key), value + 1
            elif isinstance(value, str) and key not in ("title", "description"):
                yield f"{path}/{key}", (part, key), f"{value}x"
        if isinstance(part, dict) and isinstance(part.get("properties"), dict):
            for name in list(part["properties"]):
                fewer = {key: value for key, value in part["properties"].items() if key != name}
                yield f"{path}/properties/{name}", (part, "properties"), fewer

    copy = deepcopy(schema)
    for path, (parent, key), other in walk(copy, ""):
        before = parent[key]
        parent[key] = other
        yield path, copy
        parent[key] = before


@pytest.mark.parametrize("name", MODELS)
def test_any_change_of_a_body_that_its_model_does_not_make_is_found(name: str) -> None:
    described = document()["components"]["schemas"][name]
    tried = 0
    for path, changed in changes(described):
        if "/x-added" in path:  # not the model's to say
            continue
        assert bare(changed) != of_model(name), path
        tried += 1
    assert tried > 10


def test_webhook_events_are_those_that_are_sent() -> None:
    for name in ("Prediction", "Training"):
        field = document()["components"]["schemas"][name]["properties"]["webhook_events_filter"]
        assert set(field["items"]["enum"]) == set(EVENTS)


def test_version_is_that_of_the_project() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == document()["info"]["version"]


def test_route_answers_the_document_with_the_stacks_url(cloud: None, monkeypatch: pytest.MonkeyPatch) -> None:
    app = load_app("read_predictions", monkeypatch)
    answer = app.handler(sample("read_predictions", "openapi"), Context())
    assert (answer["statusCode"], json.loads(answer["body"])) == (200, document())
    assert answer["multiValueHeaders"]["Content-Type"] == ["application/json"]
    assert document()["servers"] == [{"url": API_URL}]
    assert operation_of(sample("read_predictions", "openapi"))["operationId"] == "openapi.get"
