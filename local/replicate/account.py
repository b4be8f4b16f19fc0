"""The account of the local Replicate: models without code, deployments and readmes, which it may change.

All data is in memory, and reset to the initial state by `reset`. Models that can run are those of
`local.replicate.catalog`; a model created here has no version, as at Replicate before the first push.
"""

import copy
import hashlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from local.replicate.catalog import CREATED_AT, OWNER, Model, deployments, models, models_by_version
from local.replicate.faults import timestamp

JsonObject = dict[str, Any]

HARDWARE = [
    {"name": "CPU", "sku": "cpu"},
    {"name": "Nvidia T4 GPU", "sku": "gpu-t4"},
    {"name": "Nvidia L40S GPU", "sku": "gpu-l40s"},
    {"name": "Nvidia A100 (80GB) GPU", "sku": "gpu-a100-large"},
]
USER = {"type": "user", "username": OWNER, "name": "Local Replicate", "github_url": None}
COLLECTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "text-to-image": ("Text to image", "Models that paint pictures from text.", ("painter", "series")),
    "image-to-image": ("Image to image", "Models that redraw a picture.", ("etcher",)),
    "language-models": ("Language models", "Models that write.", ("storyteller",)),
}
"""By slug: name, description, models."""

_EXAMPLES: dict[str, tuple[JsonObject, Any]] = {
    "painter": ({"prompt": "a lighthouse by the sea"}, "https://replicate.delivery/local/example/painting.png"),
    "storyteller": ({"prompt": "an owl"}, ["Once", " upon", " a", " time", "."]),
}
_HEX = r"^[0-9a-f]{64}$"
_NAME = r"^[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?$"
_SKU = Literal["cpu", "gpu-t4", "gpu-l40s", "gpu-a100-large"]
_DESCRIPTIONS = ("description", "github_url", "paper_url", "license_url")


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class CreateModel(_Asked):
    """The body of `POST /v1/models`."""

    owner: str
    name: Annotated[str, Field(pattern=_NAME, max_length=64)]
    visibility: Literal["public", "private"]
    hardware: _SKU
    description: str | None = None
    github_url: str | None = None
    paper_url: str | None = None
    license_url: str | None = None
    cover_image_url: str | None = None


class UpdateModel(_Asked):
    """The body of `PATCH /v1/models/{owner}/{name}`."""

    description: str | None = None
    readme: str | None = None
    github_url: str | None = None
    paper_url: str | None = None
    weights_url: str | None = None
    license_url: str | None = None


class UpdateDeployment(_Asked):
    """The body of `PATCH /v1/deployments/{owner}/{name}`."""

    version: Annotated[str, Field(pattern=_HEX)] | None = None
    hardware: _SKU | None = None
    min_instances: Annotated[int, Field(ge=0, le=5)] | None = None
    max_instances: Annotated[int, Field(ge=0, le=20)] | None = None


class CreateDeployment(_Asked):
    """The body of `POST /v1/deployments`."""

    name: Annotated[str, Field(pattern=_NAME, max_length=64)]
    model: str
    version: Annotated[str, Field(pattern=_HEX)]
    hardware: _SKU
    min_instances: Annotated[int, Field(ge=0, le=5)]
    max_instances: Annotated[int, Field(ge=0, le=20)]


class Account:
    """The account.

    Attributes:
        models: Every model by `owner/name`, as Replicate's API shows it, but for `run_count`.
        versions: The ids of each model's existing versions.
        readmes: By `owner/name`.
        deployments: By `owner/name`, as the API shows them.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self.reset()

    def reset(self) -> None:
        """Restore the initial state: the catalog, and one private model with a version."""
        self.models: dict[str, JsonObject] = {}
        self.versions: dict[str, dict[str, JsonObject]] = {}
        self.readmes: dict[str, str] = {}
        self.deployments: dict[str, JsonObject] = {}
        for path, model in models.items():
            self.models[path] = self._shown(path, model.description, official=model.official, example=_example(model))
            self.versions[path] = {model.version: model.version_json()}
            self.readmes[path] = f"# {model.name}\n\n{model.description}\n"
        relic = f"{OWNER}/relic"
        self.models[relic] = self._shown(relic, "Pushed long ago, and never run.", visibility="private")
        version = hashlib.sha256(b"relic").hexdigest()
        self.versions[relic] = {version: {**models[f"{OWNER}/painter"].version_json(), "id": version}}
        for path, model in deployments.items():
            asked = {"version": model.version, "hardware": "cpu", "min_instances": 0, "max_instances": 1}
            self._release(path, model.path, asked, CREATED_AT)

    def model(self, path: str) -> JsonObject | None:
        """Return a model, or None."""
        found = self.models.get(path)
        return found and {**found, "latest_version": next(reversed(self.versions[path].values()), None)}

    def examples(self, path: str) -> list[JsonObject]:
        """Return the example predictions of a model."""
        example = self.models[path]["default_example"]
        return [example] if example else []

    def create_model(self, asked: CreateModel) -> JsonObject:
        """Create a model without a version."""
        path = f"{asked.owner}/{asked.name}"
        described = asked.model_dump(include={*_DESCRIPTIONS, "cover_image_url"})
        self.models[path] = self._shown(path, "", visibility=asked.visibility) | described
        self.versions[path] = {}
        return self.models[path]

    def update_model(self, path: str, asked: UpdateModel) -> JsonObject:
        """Update the given fields."""
        given = asked.model_dump(exclude_unset=True)
        self.models[path] |= {name: given[name] for name in _DESCRIPTIONS if name in given}
        if "readme" in given:
            self.readmes[path] = given["readme"]
        return self.model(path) or {}

    def delete_model(self, path: str) -> None:
        """Delete a model."""
        for kept in (self.models, self.versions, self.readmes):
            kept.pop(path, None)

    def create_deployment(self, asked: CreateDeployment) -> JsonObject:
        """Create a deployment of a model, with its first release."""
        return self._release(f"{OWNER}/{asked.name}", asked.model, asked.model_dump(), timestamp())

    def update_deployment(self, path: str, asked: UpdateDeployment) -> JsonObject:
        """Create another release with the given changes."""
        release = self.deployments[path]["current_release"]
        before = {"version": release["version"], **release["configuration"]}
        return self._release(path, release["model"], before | asked.model_dump(exclude_none=True), timestamp())

    def deployed(self, path: str) -> Model | None:
        """Return the model that runs the predictions of a deployment, or None."""
        found = self.deployments.get(path)
        return models_by_version.get(found["current_release"]["version"]) if found else None

    def collection(self, slug: str) -> JsonObject:
        """Return a collection, without its models."""
        name, description, _ = COLLECTIONS[slug]
        return {"name": name, "slug": slug, "description": description}

    def search(self, query: str, limit: int) -> JsonObject:
        """Return public models and collections that match every word of the query."""
        words = query.lower().split()

        def fits(*texts: str) -> bool:
            return all(word in " ".join(texts).lower() for word in words)

        found = [
            {
                "model": self.model(path),
                "metadata": {"generated_description": shown["description"], "tags": ["local"], "score": 0.5},
            }
            for path, shown in self.models.items()
            if shown["visibility"] == "public" and fits(path, shown["description"] or "")
        ]
        collections = [self.collection(slug) for slug, (name, text, _) in COLLECTIONS.items() if fits(name, text)]
        return {
            "query": query,
            "models": found[:limit],
            "collections": collections,
            "pages": [{"name": "HTTP API", "href": "/docs/reference/http"}] if fits("http api") else [],
        }

    def _release(self, path: str, model: str, asked: JsonObject, at: str) -> JsonObject:
        owner, name = path.split("/")
        before = self.deployments.get(path)
        self.deployments[path] = {
            "owner": owner,
            "name": name,
            "current_release": {
                "number": before["current_release"]["number"] + 1 if before else 1,
                "model": model,
                "version": asked["version"],
                "created_at": at,
                "created_by": copy.copy(USER),
                "configuration": {name: asked[name] for name in ("hardware", "min_instances", "max_instances")},
            },
        }
        return self.deployments[path]

    def _shown(
        self,
        path: str,
        description: str,
        *,
        visibility: str = "public",
        official: bool = False,
        example: JsonObject | None = None,
    ) -> JsonObject:
        owner, name = path.split("/")
        if example:
            url = f"{self._origin}/v1/predictions/{example['id']}"
            urls = {"get": url, "cancel": f"{url}/cancel", "web": f"{self._origin}/p/{example['id']}"}
            example = {**example, "urls": urls}
        return {
            "url": f"{self._origin}/{path}",
            "owner": owner,
            "name": name,
            "description": description,
            "visibility": visibility,
            "is_official": official,
            "github_url": None,
            "paper_url": None,
            "license_url": None,
            "run_count": 0,
            "cover_image_url": None,
            "default_example": example,
            "latest_version": None,
        }


def _example(model: Model) -> JsonObject | None:
    if model.name not in _EXAMPLES:
        return None
    asked, output = _EXAMPLES[model.name]
    return {
        "id": hashlib.sha256(model.name.encode()).hexdigest()[:26],
        "model": model.path,
        "version": model.version,
        "input": asked,
        "output": output,
        "logs": "",
        "error": None,
        "status": "succeeded",
        "created_at": CREATED_AT,
        "started_at": CREATED_AT,
        "completed_at": CREATED_AT,
        "data_removed": False,
        "metrics": {"predict_time": 1.5, "total_time": 1.5},
    }
