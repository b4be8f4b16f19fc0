"""Dropped manifests: an object `batches/{owner}/{recipe}/….jsonl` or `….csv` in the inputs bucket becomes a batch.

The key names the owner; the AWS account's policies decide who may write there. The recipe of that owner must accept
manifests (`batches`), a setting that needs a token with the scope `manage`.

Only the object's location is taken from a message, since any sender to the queue could have written it. The batch is
identified by the stored object's key, ETag and time: the object is started once, however often and by whomever it is
reported, and an object that replaces it is another batch.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from predictions.admission.quotas import LimitReached
from predictions.batches.manage import BatchControl
from predictions.batches.manifest import MANIFEST_LIMIT_BYTES
from predictions.batches.store import Batch
from predictions.files.output_references import ORIGIN_DEPTH
from predictions.ids import random_id
from predictions.intents.sources import RequestRefused
from predictions.observability import MetricUnit, logger, metrics
from predictions.recipes.schema import BatchLimits
from predictions.recipes.store import head_of, next_depth, object_of

PREFIX = "batches/"
"""Key prefix in the inputs bucket; the template's rule has it too."""


class DroppedManifests:
    """Starts the batches of dropped manifests.

    Args:
        control: Starts batches.
        inputs_bucket_name: The bucket into which manifests are dropped.
        max_origin_depth: The limit of results of this stack that a request may descend from.
    """

    def __init__(self, control: BatchControl, *, inputs_bucket_name: str, max_origin_depth: int) -> None:
        self._control = control
        self._inputs_bucket_name = inputs_bucket_name
        self._max_origin_depth = max_origin_depth

    @classmethod
    def from_env(cls) -> "DroppedManifests":
        """Build from the environment of start_from_queue."""
        return cls(
            BatchControl.from_env(),
            inputs_bucket_name=os.environ["INPUTS_BUCKET_NAME"],
            max_origin_depth=int(os.environ["MAX_ORIGIN_DEPTH"]),
        )

    def take(self, event: Any) -> Batch | None:
        """Start the batch of a manifest; one that was started already is left as it is.

        Args:
            event: S3's `Object Created`.

        Returns:
            The batch, or None if the object is gone, or its key is one that only API calls may name.

        Raises:
            RequestRefused: The object can never start a batch.
        """
        bucket, found = object_of(event if isinstance(event, dict) else {})
        key = found["key"]
        if bucket != self._inputs_bucket_name or not key.startswith(PREFIX) or not key.endswith((".jsonl", ".csv")):
            raise RequestRefused(f"batch_manifest: must be a .jsonl or .csv below {PREFIX} in the inputs bucket.")
        owner, _, below = key.removeprefix(PREFIX).partition("/")
        recipe_name, inside, _ = below.partition("/")
        if not inside:
            return _drop("key has no recipe")  # `POST /batches` may name it
        head = head_of(bucket, found)
        if head is None:
            # Its owner deleted it, or replaced it by another one, which has an event of its own.
            return _drop("manifest not found")
        if head["ContentLength"] > MANIFEST_LIMIT_BYTES:
            raise RequestRefused(
                f"The manifest exceeds the limit of {MANIFEST_LIMIT_BYTES} bytes"
                f" (got {head['ContentLength']}). Split it into several."
            )
        depth = next_depth(head.get("Metadata", {}).get(ORIGIN_DEPTH), f"the object's metadata {ORIGIN_DEPTH}")
        if depth > self._max_origin_depth:
            raise RequestRefused(
                f"The manifest descends from {depth} results of this stack in a row, which exceeds MaxOriginDepth "
                f"({self._max_origin_depth})."
            )
        return self._start(owner, recipe_name, key, head, depth)

    def _start(self, owner: str, recipe_name: str, key: str, head: Mapping[str, Any], depth: int) -> Batch:
        control = self._control
        # An Idempotency-Key cannot contain these characters.
        identity = json.dumps(["dropped", key, head["ETag"], head["LastModified"].timestamp()])
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        keys = control.batches.idempotency_keys
        batch_id, _ = keys.take_key(owner, identity, random_id(), fingerprint, control.expires)
        logger.set_correlation_id(batch_id)
        if there := control.batches.find(batch_id):
            return there
        recipe = control.recipes.named(owner, recipe_name)
        if recipe is None or recipe.state == "deleting" or "batches" not in recipe.definition:
            raise RequestRefused(
                f"{owner} has no recipe {recipe_name} that accepts manifests. Create one with the field `batches`."
            )
        try:
            control.check_limits(owner, batch_id)
        except LimitReached as reached:
            raise RequestRefused(f"batch_manifest: {reached.detail}") from None
        keys.extend_key(owner, identity, batch_id, control.expires)
        limits = BatchLimits.of(recipe.definition["batches"])
        return control.launch(
            batch_id,
            owner,
            recipe,
            fingerprint=fingerprint,
            manifest={
                "bucket": self._inputs_bucket_name,
                "key": key,
                "etag": head["ETag"],
                "format": "csv" if key.endswith(".csv") else "jsonl",
            },
            max_concurrency=limits.max_concurrency,
            tolerated_failure_percentage=limits.tolerated_failure_percentage,
            depth=depth,
        )


def _drop(reason: str) -> Batch | None:
    logger.info("event dropped", reason=reason)
    metrics.add_metric(name="EventsDropped", unit=MetricUnit.Count, value=1)
    return None
