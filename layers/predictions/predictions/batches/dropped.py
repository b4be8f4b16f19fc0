"""Manifests that are dropped: an object `batches/{owner}/{recipe}/….jsonl` or `….csv` in the inputs bucket is a batch.

Whose it is, its place says: who may write there, the AWS account's policies decide. The recipe of that owner has to say
that it takes manifests (`batches`), which only a token with the scope `manage` can write.

A message is believed nothing but where to look, since whoever may send to the queue could have written it. The batch is
known by the object that is there, its key, ETag and time: it is started once, however often and by whomever it is told
of, and what has taken its place is another one.
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
"""Of the inputs bucket; the template's rule has it, too."""


class DroppedManifests:
    """Starts the batches of manifests that are dropped.

    Args:
        control: Starts batches.
        inputs_bucket_name: Where manifests are dropped.
        max_origin_depth: The most results of this stack that a request may descend from.
    """

    def __init__(self, control: BatchControl, *, inputs_bucket_name: str, max_origin_depth: int) -> None:
        self._control = control
        self._inputs_bucket_name = inputs_bucket_name
        self._max_origin_depth = max_origin_depth

    @classmethod
    def from_env(cls) -> "DroppedManifests":
        """From the environment of start_from_queue."""
        return cls(
            BatchControl.from_env(),
            inputs_bucket_name=os.environ["INPUTS_BUCKET_NAME"],
            max_origin_depth=int(os.environ["MAX_ORIGIN_DEPTH"]),
        )

    def take(self, event: Any) -> Batch | None:
        """Starts the batch of a manifest; one that was started already is left as it is.

        Args:
            event: S3's `Object Created`.

        Returns:
            The batch; None where there is none to start: the object is gone, or lies where only calls look for it.

        Raises:
            RequestRefused: It can start none.
        """
        bucket, found = object_of(event if isinstance(event, dict) else {})
        key = found["key"]
        if bucket != self._inputs_bucket_name or not key.startswith(PREFIX) or not key.endswith((".jsonl", ".csv")):
            raise RequestRefused(f"batch_manifest: not a .jsonl or .csv below {PREFIX} in the inputs bucket.")
        owner, _, below = key.removeprefix(PREFIX).partition("/")
        recipe_name, inside, _ = below.partition("/")
        if not inside:
            return _drop("it names no recipe")  # `POST /batches` may name it
        head = head_of(bucket, found)
        if head is None:
            # Its owner took it back, or another one took its place, of which another event tells.
            return _drop("the manifest is gone")
        if head["ContentLength"] > MANIFEST_LIMIT_BYTES:
            raise RequestRefused(
                f"The manifest has {head['ContentLength']} bytes, and {MANIFEST_LIMIT_BYTES} are taken: make several."
            )
        depth = next_depth(head.get("Metadata", {}).get(ORIGIN_DEPTH), f"the object's metadata {ORIGIN_DEPTH}")
        if depth > self._max_origin_depth:
            raise RequestRefused(
                f"It descends from {depth} results of this stack, one after the other, and MaxOriginDepth allows "
                f"{self._max_origin_depth}."
            )
        return self._start(owner, recipe_name, key, head, depth)

    def _start(self, owner: str, recipe_name: str, key: str, head: Mapping[str, Any], depth: int) -> Batch:
        control = self._control
        # No Idempotency-Key has these characters.
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
                f"{owner} has no recipe {recipe_name} that takes manifests: one that does says so with `batches`."
            )
        try:
            control.check_limits(owner, batch_id)
        except LimitReached as reached:
            raise RequestRefused(f"batch_manifest: {reached.detail}") from None
        keys.extend_key(owner, identity, batch_id, control.expires)
        limits = BatchLimits.model_validate(recipe.definition["batches"])
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
