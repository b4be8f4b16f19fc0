"""The schemas of models' inputs: told by Replicate, kept in the table, remembered by each warm function.

A schema that cannot be had never keeps a prediction from being started: whatever goes wrong in here, the answer is
None, and Replicate checks the input itself. What has to be looked up, and at what cost:

    owner/name                  nothing: the model's description, which is asked for anyway, has its schema
    owner/name:version          a cold function reads the table once; the first one of all asks Replicate, and keeps it
    deployments/owner/name      its release is asked for every few minutes, then as above
    version                     cannot be looked up: Replicate gives a version only by the name of its model
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.observability import MetricUnit, logger, metrics
from predictions.upstream import UpstreamError

if TYPE_CHECKING:
    from predictions.input_schema import InputSchema
    from predictions.table import PredictionsTable
    from predictions.upstream import Replicate

# A version never changes. The table forgets it all the same, like everything in it.
_KEEP_SECONDS = 30 * 86400
# One that is of no use is asked for again after a day: its model is not mended, but this code may be.
_KEEP_UNUSABLE_SECONDS = 86400
_REMEMBER_SECONDS = 3600
_REMEMBER_RELEASE_SECONDS = 300
# After a failure each prediction would wait for the next one.
_REMEMBER_FAILURE_SECONDS = 60
_REMEMBERED_LIMIT = 64

# What is kept of a schema that cannot be used.
_UNUSABLE = "null"


class ModelSchemas:
    """Finds the schema by which to check an input.

    Args:
        table: Keeps schemas by version.
        replicate: Tells them.
        now: The time, in seconds since 1970.
    """

    def __init__(
        self, table: "PredictionsTable", replicate: "Replicate", *, now: Callable[[], float] = time.time
    ) -> None:
        self._table = table
        self._replicate = replicate
        self._now = now
        self._schemas: dict[str, tuple[float, InputSchema | None]] = {}
        self._releases: dict[str, tuple[float, tuple[str, str] | None]] = {}

    def of_model(self, name: str, openapi_schema: Any) -> "InputSchema | None":
        """The schema in a model's description, where there is a usable one."""
        return _usable(openapi_schema, name)

    def of_version(self, name: str, version: str) -> "InputSchema | None":
        """The schema of a version of the model `owner/name`, where it can be had."""
        remembered = self._schemas.get(version)
        if remembered and remembered[0] > self._now():
            return remembered[1]
        seconds = _REMEMBER_SECONDS
        try:
            schema = self._find(name, version)
        except (UpstreamError, ClientError, BotoCoreError) as error:
            logger.warning("no schema to check the input by", version=version, reason=_reason(error))
            schema, seconds = None, _REMEMBER_FAILURE_SECONDS
        _remember(self._schemas, version, (self._now() + seconds, schema))
        return schema

    def of_deployment(self, name: str) -> "InputSchema | None":
        """The schema of the version that the deployment `owner/name` runs, where it can be had."""
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

    def _find(self, name: str, version: str) -> "InputSchema | None":
        from predictions.input_schema import InputSchema, UnusableSchema

        kept = self._table.kept_schema(version, self._now())
        if kept == _UNUSABLE:
            return None
        if kept is not None:
            try:
                return InputSchema.from_json(kept)
            except UnusableSchema as error:  # kept by code with other limits
                logger.warning("kept schema is of no use", version=version, reason=str(error))
        schema = _usable(self._replicate.version_schema(name, version), version)
        text, seconds = (schema.to_json(), _KEEP_SECONDS) if schema else (_UNUSABLE, _KEEP_UNUSABLE_SECONDS)
        try:
            self._table.keep_schema(version, text, int(self._now()) + seconds)
        except (ClientError, BotoCoreError) as error:
            logger.warning("schema not kept", version=version, reason=_reason(error))
        return schema


def _usable(openapi_schema: Any, of: str) -> "InputSchema | None":
    if openapi_schema is None:  # as Replicate shows it for some models
        return None
    from predictions.input_schema import InputSchema, UnusableSchema

    try:
        return InputSchema.from_openapi(openapi_schema)
    except UnusableSchema as error:
        logger.warning("schema is of no use", of=of, reason=str(error))
        metrics.add_metric(name="SchemasUnusable", unit=MetricUnit.Count, value=1)
        return None


def _remember(memory: dict[str, Any], key: str, value: Any) -> None:
    """Remembers a value that a caller's choice of names led to: the oldest gives way."""
    memory.pop(key, None)
    while len(memory) >= _REMEMBERED_LIMIT:
        del memory[next(iter(memory))]
    memory[key] = value


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response["Error"]["Code"])
    return str(error) if isinstance(error, UpstreamError) else type(error).__name__
