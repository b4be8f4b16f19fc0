"""The OpenAPI schema of a Cog model, from its Python source.

`cog build` writes it into the image (`.cog/openapi_schema.json`) and needs Docker for that. Without the file
Cog's server validates no input and streams nothing. The shape is that of a version's `openapi_schema` at
Replicate (https://replicate.com/docs/reference/openapi).
"""

import importlib.util
import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import cog  # type: ignore[import-untyped]  # it ships no types

JsonObject = dict[str, Any]

_simple_types: dict[Any, JsonObject] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    cog.Path: {"type": "string", "format": "uri"},
    Any: {},
}
_limits = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "accept": "x-cog-accept",
}


def openapi_schema(predictor: Path, function: str = "") -> JsonObject:
    """Return the schema of the class `Predictor`, or of a function, in a file.

    Returns:
        An OpenAPI 3.0 document with `components.schemas.Input`, `.Output` and one for each input with choices.

    Raises:
        TypeError: An input or the output has a type that this module does not support; the message names it.
    """
    loaded = _load(predictor)
    run = getattr(loaded, function) if function else loaded.Predictor.run
    hints = typing.get_type_hints(run)
    schemas: JsonObject = {}
    properties: JsonObject = {}
    required = []
    parameters = [(name, each) for name, each in inspect.signature(run).parameters.items() if name != "self"]
    for order, (name, parameter) in enumerate(parameters):
        field = parameter.default
        if field is inspect.Parameter.empty:
            field = cog.Input()
        described: JsonObject = {"title": name.replace("_", " ").title(), "x-order": order}
        if field.description:
            described["description"] = field.description
        for attribute, keyword in _limits.items():
            if getattr(field, attribute) is not None:
                described[keyword] = getattr(field, attribute)
        kind = _type(hints[name])
        if field.choices:
            schemas[name] = {**kind, "title": name, "description": "An enumeration.", "enum": field.choices}
            described["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        else:
            described |= kind
        if field.default is None:
            required.append(name)
        else:
            described["default"] = field.default
        properties[name] = described
    schemas["Input"] = {"type": "object", "title": "Input", "properties": properties}
    if required:
        schemas["Input"]["required"] = required
    schemas["Output"] = {"title": "Output", **_type(hints["return"])}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {
            "/predictions": {
                "post": {
                    "summary": "Predict",
                    "operationId": "predict_predictions_post",
                    "responses": {"200": {"description": "Successful Response"}},
                }
            }
        },
        "components": {"schemas": schemas},
    }


def _load(predictor: Path) -> Any:
    specification = importlib.util.spec_from_file_location(
        f"local_model_{predictor.parent.name}_{predictor.stem}", predictor
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up here
    specification.loader.exec_module(module)
    return module


def _type(hint: Any) -> JsonObject:
    if hint in _simple_types:
        return dict(_simple_types[hint])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return {"type": "array", "items": _type(arguments[0])}
    if origin is dict:
        return {"type": "object"}
    if origin is Iterator:
        return {"type": "array", "items": _type(arguments[0]), "x-cog-array-type": "iterator"}
    if origin is cog.ConcatenateIterator:
        concatenated = {"x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"}
        return {"type": "array", "items": _type(arguments[0]), **concatenated}
    if isinstance(hint, type) and issubclass(hint, cog.BaseModel):
        hints = typing.get_type_hints(hint)
        return {"type": "object", "properties": {name: _type(each) for name, each in hints.items()}}
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = [field.name for field in fields(hint)]
        return {
            "type": "object",
            "required": names,
            "properties": {name: _type(hints[name]) for name in names},
        }
    raise TypeError(f"The schema of a model does not support the type {hint!r}. Add it to _type in {__file__}.")
