"""The catalog of the local Replicate: models with one version each, and deployments."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from local.replicate.schema import openapi_schema

JsonObject = dict[str, Any]

OWNER = "local"
CREATED_AT = "2026-01-05T09:00:00.000000Z"
FOLDER = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        official: Addressed by name, version `hidden`; a community model is addressed by version only.
        slots: The number of predictions it runs concurrently; further ones wait in status `starting`.
    """

    name: str
    description: str
    official: bool = False
    slots: int = 1

    @property
    def path(self) -> str:
        """`owner/name`."""
        return f"{OWNER}/{self.name}"

    @cached_property
    def schema(self) -> JsonObject:
        """Return the OpenAPI schema of the version, with that of its training, if any."""
        schema = openapi_schema(FOLDER / self.name / "predict.py")
        if self.trainable:
            training = openapi_schema(FOLDER / self.name / "train.py", "train")["components"]["schemas"]
            schema["components"]["schemas"] |= {f"Training{name}": training[name] for name in ("Input", "Output")}
        return schema

    @property
    def trainable(self) -> bool:
        """Return whether its versions can be trained."""
        return (FOLDER / self.name / "train.py").exists()

    @cached_property
    def version(self) -> str:
        """Return 64 hex digits, the same until the model's code or schema changes."""
        source = b"".join(path.read_bytes() for path in sorted((FOLDER / self.name).glob("*.py")))
        return hashlib.sha256(source + json.dumps(self.schema, sort_keys=True).encode()).hexdigest()

    @property
    def grows(self) -> bool:
        """Return whether the output is a list that grows while the model runs."""
        return "x-cog-array-type" in self.schema["components"]["schemas"]["Output"]

    @property
    def streams(self) -> bool:
        """Return whether the output is text that can be read as server-sent events."""
        return "x-cog-array-display" in self.schema["components"]["schemas"]["Output"]

    def invalid_fields(self, input_: JsonObject, *, training: bool = False) -> list[JsonObject]:
        """Return the violations in an input, as `{"type", "field", "description"}`."""
        schemas, kind = self.schema["components"]["schemas"], "TrainingInput" if training else "Input"
        validator = Draft202012Validator({"$ref": f"#/components/schemas/{kind}", "components": {"schemas": schemas}})
        found = [_invalid_field(error) for error in validator.iter_errors(input_)]
        for name, described in schemas[kind]["properties"].items():
            value = input_.get(name)
            is_url = isinstance(value, str) and value.startswith(("https://", "http://", "data:"))
            # Cog would open any other value as a path on this machine.
            if described.get("format") == "uri" and isinstance(value, str) and not is_url:
                description = "Does not match format 'uri'"
                found.append({"type": "format", "field": f"input.{name}", "description": description})
        return found

    def version_json(self) -> JsonObject:
        """Return the version as `GET …/versions/{id}` does."""
        return {
            "id": self.version,
            "created_at": CREATED_AT,
            "cog_version": "0.23.1",
            "openapi_schema": self.schema,
        }

    def write_to(self, folder: Path) -> None:
        """Write the model's code and `.cog/openapi_schema.json` for a Cog server."""
        shutil.copytree(FOLDER / self.name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        schema = json.loads(json.dumps(self.schema))
        # Cog sends server-sent events only for a model with this mark; the front reads no other format.
        schema["paths"]["/predictions"]["post"]["x-cog-streaming"] = True
        (folder / ".cog").mkdir()
        (folder / ".cog" / "openapi_schema.json").write_text(json.dumps(schema))


def _invalid_field(error: ValidationError) -> JsonObject:
    field = ".".join(["input", *(str(part) for part in error.absolute_path)])
    return {"type": str(error.validator), "field": field, "description": error.message[:300]}


models = {
    model.path: model
    for model in (
        Model("painter", "Paints a landscape from a prompt: text to image.", official=True),
        Model("storyteller", "Tells a small story, word by word: streaming text.", official=True),
        Model("narrator", "Words at a pace, with its progress in the logs: streaming text.", official=True),
        Model("etcher", "Redraws a picture that it is given by URL: image to image."),
        Model("series", "Several pictures, one after the other: a list of files that grows."),
        Model("album", "An object with files at several depths."),
        Model("blob", "A file of any size, name and type, or a data: URL."),
        Model("sleeper", "Runs for a given time; sixteen at once.", slots=16),
        Model("tuner", "Says sentences in the manner of the text that it was trained on: can be trained."),
        Model("crasher", "Fails: with an error, or by the end of its process."),
    )
}
models_by_version = {model.version: model for model in models.values()}
deployments = {f"{OWNER}/painter-deployment": models[f"{OWNER}/painter"]}
