"""The schemas of models' inputs: told by Replicate, kept in the table, remembered by each warm function.

A schema that cannot be had never keeps a prediction from being started: whatever goes wrong in here, the answer is
None, and Replicate checks the input itself. What has to be looked up, and at what cost:

    owner/name                  nothing: the model's description, which is asked for anyway, has its schema
    owner/name:version          a cold function reads the table once; the first one of all asks Replicate, and keeps it
    deployments/owner/name      its release is asked for every few minutes, then as above
    version                     as `owner/name:version` once its model is known; until then nothing

Replicate gives a version only by the name of its model. Whose a version is, is learned from its answer to the first
create of it, and from a version that a caller reads by way of `api.proxy`, which keeps the schema at once.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.errors import PredictionsError
from predictions.observability import MetricUnit, logger, metrics
from predictions.upstream.client import is_model_name
from predictions.upstream.errors import UpstreamError

if TYPE_CHECKING:
    from predictions.store.predictions import PredictionsTable
    from predictions.upstream.client import Replicate
    from predictions.upstream.input_schema import InputSchema
    from predictions.upstream.prediction import UpstreamPrediction

# A version never changes. The table forgets it all the same, like everything in it.
KEEP_SECONDS = 30 * 86400
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
        # Versions that nobody knows the model of, and until when that is believed.
        self._nameless: dict[str, float] = {}

    def of_model(self, name: str, openapi_schema: Any) -> "InputSchema | None":
        """The schema in a model's description, where there is a usable one."""
        return usable_schema(openapi_schema, name)

    def of_version(self, name: str | None, version: str) -> "InputSchema | None":
        """The schema of a version of the model `owner/name`, or of a model still to be found, where it can be had."""
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
        """Notes whose version it is, from Replicate's answer to a create by its id alone.

        Writes only where `of_version` has found nothing known of it: once for a version, not for each prediction.
        """
        if version not in self._nameless or told.version != version or not is_model_name(told.model):
            return
        del self._nameless[version]
        now = self._now()
        try:
            self._table.note_model(version, told.model, int(now) + KEEP_SECONDS, now)
        except (ClientError, BotoCoreError) as error:
            logger.warning("model of a version not noted", version=version, reason=_reason(error))

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

    def _find(self, name: str | None, version: str) -> "InputSchema | None":
        kept = self._table.kept_schema(version, self._now())
        if kept and kept.text == _UNUSABLE:
            return None
        if kept and kept.text is not None:
            from predictions.upstream.input_schema import InputSchema, UnusableSchema

            try:
                return InputSchema.from_json(kept.text)
            except UnusableSchema as error:  # kept by code with other limits
                logger.warning("kept schema is of no use", version=version, reason=str(error))
        name = name or (kept.model if kept else None)
        if name is None:
            raise _Nameless(version)
        schema = usable_schema(self._replicate.version_schema(name, version), version)
        text, seconds = to_keep(schema)
        try:
            self._table.keep_schema(version, text, int(self._now()) + seconds, name)
        except (ClientError, BotoCoreError) as error:
            logger.warning("schema not kept", version=version, reason=_reason(error))
        return schema


class _Nameless(PredictionsError):
    """Nobody knows whose version it is."""


def to_keep(schema: "InputSchema | None") -> tuple[str, int]:
    """What the table keeps of a version's schema, also of one that is of no use, and for how many seconds."""
    return (schema.to_json(), KEEP_SECONDS) if schema else (_UNUSABLE, _KEEP_UNUSABLE_SECONDS)


def usable_schema(openapi_schema: Any, of: str) -> "InputSchema | None":
    """The schema of a model's input, from what its author made of it; None where that is of no use."""
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
    """Remembers a value that a caller's choice of names led to: the oldest gives way."""
    memory.pop(key, None)
    while len(memory) >= _REMEMBERED_LIMIT:
        del memory[next(iter(memory))]
    memory[key] = value


def _reason(error: Exception) -> str:
    if isinstance(error, ClientError):
        return str(error.response["Error"]["Code"])
    return str(error) if isinstance(error, UpstreamError) else type(error).__name__
