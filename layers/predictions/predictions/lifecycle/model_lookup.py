"""Lookup of models: the version to run, and the schema of its input, cached in the table and in each warm function.

A missing schema never prevents a prediction: on any failure in here the schema is None, and Replicate checks the input
itself. Lookups, and their cost:

    owner/name                  nothing: the model's description, which is read anyway, has its schema
    owner/name:version          a cold function reads the table once; the first one asks Replicate, and stores it
    deployments/owner/name      its release is read every few minutes, then as above
    version                     as `owner/name:version` once its model is known; until then nothing

Replicate shows a version only by the name of its model. The model of a version is learned from the response to its
first create, and from a version that a caller reads through `api.proxy`, which stores the schema at once.
"""

import json
import os
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from predictions.errors import PredictionsError, Problem
from predictions.observability import MetricUnit, logger, metrics
from predictions.upstream.client import is_model_path
from predictions.upstream.errors import NotFound, Unavailable, UpstreamError
from predictions.validation import certain_violations

if TYPE_CHECKING:
    from predictions.intents.model import Reference
    from predictions.store.schemas import StoredSchemas
    from predictions.upstream.client import Replicate
    from predictions.upstream.input_schema import InputSchema
    from predictions.upstream.prediction import UpstreamPrediction

# A version never changes. The table still expires it, like all of its items.
KEEP_SECONDS = 30 * 86400
# An unusable schema is read again after a day: its version does not change, but this code may.
_KEEP_UNUSABLE_SECONDS = 86400
_REMEMBER_SECONDS = 3600
_REMEMBER_RELEASE_SECONDS = 300
# Without a cache of failures, each prediction would wait for another one.
_REMEMBER_FAILURE_SECONDS = 60
_REMEMBERED_LIMIT = 64
_MODEL_CACHE_SECONDS = 300
_MODELS_CACHED = 64

# Stored in place of a schema that cannot be used.
_UNUSABLE = "null"


class ModelSchemas:
    """Find the schema by which to check an input.

    Args:
        stored: The schemas by version.
    """

    def __init__(
        self, stored: "StoredSchemas", replicate: "Replicate", *, now: Callable[[], float] = time.time
    ) -> None:
        self._stored = stored
        self._replicate = replicate
        self._now = now
        self._schemas: dict[str, tuple[float, InputSchema | None]] = {}
        self._releases: dict[str, tuple[float, tuple[str, str] | None]] = {}
        # Models by version, as far as they were found.
        self._names: dict[str, str] = {}
        # Versions of an unknown model, and the time until which that is believed.
        self._nameless: dict[str, float] = {}

    def of_model(self, name: str, openapi_schema: Any) -> "InputSchema | None":
        """Return the schema in a model's description, or None if it has no usable one."""
        return usable_schema(openapi_schema, name)

    def of_version(self, name: str | None, version: str) -> "InputSchema | None":
        """Return the schema of a version, or None. Without `name`, the version's model has to be known already."""
        remembered = self._schemas.get(version)
        if remembered and remembered[0] > self._now():
            return remembered[1]
        if name is None and self._nameless.get(version, 0) > self._now():
            return None
        seconds = _REMEMBER_SECONDS
        try:
            schema = self._find(name, version)
        except _Nameless:
            _remember(self._nameless, version, self._now() + _REMEMBER_FAILURE_SECONDS)
            return None
        except (UpstreamError, ClientError, BotoCoreError) as error:
            logger.warning("no schema to check the input by", version=version, reason=_reason(error))
            schema, seconds = None, _REMEMBER_FAILURE_SECONDS
        _remember(self._schemas, version, (self._now() + seconds, schema))
        return schema

    def learn(self, version: str, told: "UpstreamPrediction") -> None:
        """Record the model of a version, from Replicate's response to a create by its id alone.

        Writes only if `of_version` knew nothing of it: once for a version, not for each prediction.
        """
        if version not in self._nameless or told.version != version or not is_model_path(told.model):
            return
        del self._nameless[version]
        now = self._now()
        try:
            self._stored.put_model(version, told.model, int(now) + KEEP_SECONDS, now)
        except (ClientError, BotoCoreError) as error:
            logger.warning("model of a version not noted", version=version, reason=_reason(error))

    def model_of_version(self, version: str) -> str | None:
        """Return the model of a version that `of_version` has found, or None if it is unknown."""
        return self._names.get(version)

    def model_of_deployment(self, name: str) -> str | None:
        """Return the model that a deployment runs, if `of_deployment` has found it."""
        release = self._releases.get(name, (0, None))[1]
        return release[0] if release else None

    def of_deployment(self, name: str) -> "InputSchema | None":
        """Return the schema of the version that the deployment `owner/name` runs, or None."""
        remembered = self._releases.get(name)
        if not remembered or remembered[0] <= self._now():
            seconds = _REMEMBER_RELEASE_SECONDS
            release = None
            try:
                release = self._replicate.release(name)
            except UpstreamError as error:
                logger.warning("no release to check the input by", deployment=name, reason=_reason(error))
                seconds = _REMEMBER_FAILURE_SECONDS
            remembered = (self._now() + seconds, release)
            _remember(self._releases, name, remembered)
        return self.of_version(*remembered[1]) if remembered[1] else None

    def _find(self, name: str | None, version: str) -> "InputSchema | None":
        kept = self._stored.get_schema(version, self._now())
        if known := name or (kept.model if kept else None):
            _remember(self._names, version, known)
        if kept and kept.text == _UNUSABLE:
            return None
        if kept and kept.text is not None:
            from predictions.upstream.input_schema import InputSchema, UnusableSchema

            try:
                return InputSchema.from_json(kept.text)
            except UnusableSchema as error:  # stored by code with other limits
                logger.warning("kept schema is of no use", version=version, reason=str(error))
        name = name or (kept.model if kept else None)
        if name is None:
            raise _Nameless(version)
        schema = usable_schema(self._replicate.version_schema(name, version), version)
        text, seconds = to_keep(schema)
        try:
            self._stored.put_schema(version, text, int(self._now()) + seconds, name)
        except (ClientError, BotoCoreError) as error:
            logger.warning("schema not kept", version=version, reason=_reason(error))
        return schema


class _Nameless(PredictionsError):
    """The model of a version is unknown."""


def to_keep(schema: "InputSchema | None") -> tuple[str, int]:
    """Return what the table stores of a version's schema, also of an unusable one, and for how many seconds."""
    return (schema.to_json(), KEEP_SECONDS) if schema else (_UNUSABLE, _KEEP_UNUSABLE_SECONDS)


def usable_schema(openapi_schema: Any, of: str) -> "InputSchema | None":
    """Return the schema of a model's input as its author wrote it, or None if it is unusable."""
    if openapi_schema is None:  # as Replicate shows it for some models
        return None
    from predictions.upstream.input_schema import InputSchema, UnusableSchema

    try:
        return InputSchema.from_openapi(openapi_schema)
    except UnusableSchema as error:
        logger.warning("schema is of no use", of=of, reason=str(error))
        metrics.add_metric(name="SchemasUnusable", unit=MetricUnit.Count, value=1)
        return None


def _remember(memory: dict[str, Any], key: str, value: Any) -> None:
    """Cache a value by a name that callers choose; the oldest value gives way."""
    memory.pop(key, None)
    while len(memory) >= _REMEMBERED_LIMIT:
        del memory[next(iter(memory))]
    memory[key] = value


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response["Error"]["Code"])
    return str(error) if isinstance(error, UpstreamError) else type(error).__name__


class FoundModel(NamedTuple):
    """Hold a model's version (None: Replicate runs it without one) and its input's schema, if any."""

    version: str | None
    schema: "InputSchema | None"


class ModelLookup:
    """Look up which version runs, and by which schema its input is checked.

    Args:
        schemas: Finds the schemas by which to check inputs, or None to check none.
    """

    def __init__(
        self, replicate: "Replicate", schemas: ModelSchemas | None, *, now: Callable[[], float] = time.time
    ) -> None:
        self._replicate = replicate
        self._schemas = schemas
        self._now = now
        self._models: dict[str, tuple[float, FoundModel]] = {}

    @classmethod
    def from_env(cls, stored: "StoredSchemas", replicate: "Replicate") -> "ModelLookup":
        """Read `VALIDATE_INPUT`."""
        return cls(
            replicate,
            ModelSchemas(stored, replicate) if os.environ["VALIDATE_INPUT"] == "true" else None,
        )

    def violations(self, reference: "Reference", asked: Any) -> list[dict[str, str]]:
        """Return the fields of an input that violate its model's schema, for a later start; nothing is written.

        Raises:
            Problem: 404 (model not found), 422 (it has no version), 503 (Replicate is unavailable).
        """
        return self.violations_of(self.find(reference).schema, json.dumps(asked))

    def template_violations(
        self, reference: "Reference", template: Any, open_fields: Collection[str]
    ) -> tuple["InputSchema | None", list[dict[str, str]]]:
        """Return what is wrong in an input with placeholders, whatever they find, by its model's schema.

        Nothing is wrong if the schema cannot be read, since Replicate is unavailable or shows none: a template is
        accepted then, and each input that it makes is checked when its prediction starts.

        Args:
            reference: The model, version or deployment.
            template: The input.
            open_fields: The places of its placeholders, as `input.images.0`.

        Returns:
            The schema, if it can be read, and the violations.

        Raises:
            Problem: 404 (model not found), 422 (it has no version).
        """
        if self._schemas is None:
            return None, []
        try:
            schema = self.find(reference).schema
        except Problem as problem:
            if problem.status < 500:
                raise
            logger.warning("template not checked: no schema", model=reference.name, reason=problem.detail)
            return None, []
        return schema, certain_violations(self.violations_of(schema, json.dumps(template)), open_fields)

    def find(self, reference: "Reference", *, check: bool = True) -> "FoundModel":
        """Return the version that runs a reference, and the schema of its input.

        Args:
            reference: The model, version or deployment.
            check: Whether the schema is needed.

        Raises:
            Problem: 404 (model not found), 422 (it has no version), 503 (Replicate is unavailable).
        """
        name, version = reference.name or "", reference.version
        if reference.kind == "model" and version is None:
            return self._model(name)
        if self._schemas is None or not check:
            return FoundModel(version, None)
        if reference.kind == "deployment":
            return FoundModel(version, self._schemas.of_deployment(name))
        return FoundModel(version, self._schemas.of_version(reference.name, version or ""))

    def model_of(self, reference: "Reference") -> str | None:
        """Return the model `owner/name` that a reference runs, or None if it is unknown.

        A version without a name, or a deployment, is looked up as for the check of its input; `find` then uses the same
        result. Its model is unknown if inputs are not checked, or Replicate has not shown it yet.
        """
        if reference.kind != "deployment" and reference.name:
            return reference.name
        if self._schemas is None:
            return None
        self.find(reference)
        if reference.kind == "deployment":
            return self._schemas.model_of_deployment(reference.name or "")
        return self._schemas.model_of_version(reference.version or "")

    def _model(self, name: str) -> "FoundModel":
        cached = self._models.get(name)
        if cached and cached[0] > self._now():
            return cached[1]
        try:
            model = self._replicate.model(name)
        except NotFound:
            detail = f"There is no model {name}, or this stack's Replicate token may not use it."
            raise Problem(404, detail, upstream_status=404) from None
        except Unavailable as error:
            detail = f"Replicate could not be asked for the version of {name}: {error}. Nothing was started: try again."
            raise Problem(503, detail, headers={"Retry-After": "5"}, upstream_status=error.status) from None
        version = None if model.is_official else model.latest_version
        if version is None and not model.is_official:
            raise Problem(422, f"The model {name} has no version that could be run.")
        schema = self._schemas.of_model(name, model.openapi_schema) if self._schemas else None
        self._models.pop(name, None)
        while len(self._models) >= _MODELS_CACHED:
            del self._models[next(iter(self._models))]  # the oldest: schemas are large
        found = FoundModel(version, schema)
        self._models[name] = (self._now() + _MODEL_CACHE_SECONDS, found)
        return found

    def violations_of(self, schema: "InputSchema | None", input_json: str) -> list[dict[str, str]]:
        """Return the fields of an input that violate a schema, as far as it is checked; Replicate checks it again."""
        if schema is None:
            return []
        from predictions.upstream.input_schema import NotChecked  # loaded with the first schema

        try:
            return schema.violations(json.loads(input_json))
        except NotChecked as error:
            logger.info("input not checked", reason=str(error))
            return []

    def learn(self, version: str, told: "UpstreamPrediction") -> None:
        """Record the model of a version, if inputs are checked; see `ModelSchemas.learn`."""
        if self._schemas:
            self._schemas.learn(version, told)
