"""Use cases of batches: create, read, cancel and retry them, and recover them in the sweep."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from predictions.admission.quotas import LimitReached, OwnerLimits, OwnersUsage, refusal_of
from predictions.aws.clients import api_url, client
from predictions.batches.checks import check_template, schema_of_lines
from predictions.batches.files import (
    etag_of,
    lines_key,
    manifest_key,
    new_object,
    put_text,
    read_jsonl,
    recipe_key,
    schema_key,
    template_key,
)
from predictions.batches.manifest import MANIFEST_LIMIT_BYTES
from predictions.batches.schema import BatchBody, read_body
from predictions.batches.store import COUNTED, Batch, Batches
from predictions.clock import timestamp
from predictions.errors import Problem
from predictions.ids import random_id
from predictions.intents.groups import identity_of, read_group
from predictions.intents.model import LIFETIME_LIMIT_SECONDS, Attempt, idempotency_key
from predictions.observability import logger
from predictions.recipes.store import Recipe, RecipeItems
from predictions.store.recent_requests import RecentRequests
from predictions.store.records import labels_and_trace
from predictions.validation import fields_refused, input_json_canonical, parse_json

if TYPE_CHECKING:
    from mypy_boto3_stepfunctions import SFNClient

    from predictions.lifecycle.cancel import CancelPrediction
    from predictions.lifecycle.model_lookup import ModelLookup

_CHUNK = 100
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_KEY_LIMIT_BYTES = 1024
_START_CHECK_SECONDS = 60
ATTEMPTS_LIMIT = 10
"""The limit of attempts of a batch, including the first."""


class BatchControl:
    """Creates batches and advances them.

    Args:
        batches: The batches.
        recipes: The recipes that batches name.
        state_machine_arn: `run_batch`.
        inputs_bucket_name: The bucket from which manifests are read.
        retention_seconds: How long a batch is stored.
        stepfunctions: The client to use.
        usage: The owners' usage; None: limits are not applied.
        recent: Recent requests without a key; None: retries of those are not detected.
        lookup: Looks up the schemas of models' inputs; None: inputs are checked only when their predictions start.
    """

    def __init__(
        self,
        batches: Batches,
        recipes: RecipeItems,
        state_machine_arn: str,
        inputs_bucket_name: str,
        retention_seconds: int,
        stepfunctions: "SFNClient",
        *,
        usage: OwnersUsage | None = None,
        recent: RecentRequests | None = None,
        lookup: "ModelLookup | None" = None,
    ) -> None:
        self.batches = batches
        self.recipes = recipes
        self._machine_arn = state_machine_arn
        self._inputs_bucket_name = inputs_bucket_name
        self._retention_seconds = retention_seconds
        self._stepfunctions = stepfunctions
        self._usage = usage
        self._recent = recent
        self._lookup = lookup

    @classmethod
    def from_env(cls, lookup: "ModelLookup | None" = None) -> "BatchControl":
        """Build from the environment.

        Reads `BATCH_STATE_MACHINE_ARN`, `INPUTS_BUCKET_NAME`, `RETENTION_DAYS` and the environment of `Batches`.
        """
        return cls(
            Batches.from_env(),
            RecipeItems.from_env(),
            os.environ["BATCH_STATE_MACHINE_ARN"],
            os.environ["INPUTS_BUCKET_NAME"],
            int(os.environ["RETENTION_DAYS"]) * 86400,
            client("stepfunctions"),
            usage=OwnersUsage.from_env(),
            recent=RecentRequests.from_env(),
            lookup=lookup,
        )

    # -- create -------------------------------------------------------------------------------------------------------

    def make(
        self,
        body: bytes,
        headers: Mapping[str, str],
        owner: str,
        *,
        attempt: Attempt | None = None,
        limits: OwnerLimits | None = None,
    ) -> Batch:
        """Create a batch and start it, or return the one with the same `Idempotency-Key`.

        After it is written, an error of AWS is not reported to the caller: the sweep starts the batch.

        Args:
            body: The raw body.
            headers: The request's headers, their names in lower case.
            owner: The owner of the batch.
            attempt: The number of the client's attempt, if it counts them; a retry without a key finds the batch of the
                last two minutes.
            limits: The owner's limits; None: no limits.

        Raises:
            Problem: 400, 413, 415; 422, with every violation in `invalid_fields`; 429 if one of the owner's limits is
                reached.
        """
        asked = read_body(parse_json(body, headers.get("content-type")))
        key = idempotency_key(headers)
        fingerprint = hashlib.sha256(input_json_canonical(identity_of(vars(asked))).encode()).hexdigest()
        if there := self._sent_before(owner, key, fingerprint, attempt):
            return there
        invalid: list[dict[str, str]] = []
        place = self._place(asked, owner, invalid)
        recipe = self._recipe(asked, owner, invalid)
        context, wrong = read_group(
            asked.labels, asked.webhook, headers, allow_loopback=self.batches.allow_loopback_webhooks
        )
        invalid += wrong
        if invalid:
            raise fields_refused(invalid)
        schema = None
        if self._lookup is not None:
            schema = schema_of_lines(self._lookup, template=asked.template, recipe=recipe, requests=asked.requests)
        batch_id = random_id()
        if key:
            # Only now: a body that was refused can be corrected and sent with its key again.
            keys = self.batches.idempotency_keys
            batch_id, known = keys.take_key(owner, key, batch_id, fingerprint, self.expires)
            if known != fingerprint:
                raise _of_another()
            if there := self.batches.find(batch_id):
                return there
            # The batch may be written now, long after its key.
            keys.extend_key(owner, key, batch_id, self.expires)
        elif attempt and self._recent:
            # A prediction's fingerprint never begins with this.
            batch_id = self._recent.note(batch_id, owner, f"batch#{fingerprint}", attempt)
            if attempt.number and (there := self.batches.find(batch_id)):
                return there
        # The response needs it: a batch without a response is not started.
        api_url()
        began = self._acquire_slot(owner, batch_id, limits)
        try:
            manifest = self._manifest(asked, batch_id, place)
        except Problem:
            if self._usage:
                self._usage.release_open_slot("batch", owner, batch_id, began)
            raise
        if asked.template is not None:
            put_text(self.batches.bucket_name, template_key(batch_id), json.dumps(asked.template))
        if schema is not None:
            put_text(self.batches.bucket_name, schema_key(batch_id), schema.to_json())
        return self.launch(
            batch_id,
            owner,
            recipe,
            fingerprint=fingerprint,
            manifest=manifest,
            templated=asked.template is not None,
            checked=schema is not None,
            max_concurrency=asked.max_concurrency,
            tolerated_failure_percentage=asked.tolerated_failure_percentage,
            **context,
        )

    def _sent_before(self, owner: str, key: str | None, fingerprint: str, attempt: Attempt | None) -> Batch | None:
        """Return the batch of an earlier call with this request, which is not validated again, or None.

        Raises:
            Problem: 422 if the key belongs to another batch.
        """
        if key:
            holder = self.batches.idempotency_keys.key_holder(owner, key)
            if holder and holder.fingerprint != fingerprint:
                raise _of_another()
            return self.batches.find(holder.id) if holder else None
        if attempt is None or not attempt.number or self._recent is None:
            return None
        noted = self._recent.find(owner, f"batch#{fingerprint}", attempt)
        return self.batches.find(noted) if noted else None

    def _acquire_slot(self, owner: str, batch_id: str, limits: OwnerLimits | None) -> int | None:
        """Check the owner's daily limit, and acquire a slot among the open batches.

        Raises:
            Problem: 429.
        """
        if self._usage is None or not limits:
            return None
        try:
            self._usage.check_day(owner, limits)
            return self._usage.acquire_open_slot("batch", owner, batch_id, limits)
        except LimitReached as reached:
            raise refusal_of(reached) from None

    def check_limits(self, owner: str, batch_id: str) -> None:
        """Acquire a slot for a batch without a waiting caller, within its owner's limits.

        The daily limit is not checked: the lines wait for the next day.

        Raises:
            LimitReached: The owner has no free slot.
        """
        if self._usage and (limits := self._usage.known_limits(owner)):
            self._usage.acquire_open_slot("batch", owner, batch_id, limits)

    @property
    def expires(self) -> int:
        """Return when a batch created now expires, in Unix seconds."""
        return int(self.batches.now()) + self._retention_seconds

    def launch(self, batch_id: str, owner: str, recipe: Recipe | None, **asked: Any) -> Batch:
        """Store a batch, with its recipe as it is now, and start it.

        Args:
            batch_id: Its id.
            owner: Its owner.
            recipe: The recipe that builds its requests.
            asked: Further fields of `Batch`: `fingerprint`, `manifest`, `max_concurrency`, …
        """
        now = self.batches.now()
        if recipe is not None:
            put_text(self.batches.bucket_name, recipe_key(batch_id), json.dumps(asdict(recipe)))
        created_at = timestamp(now)
        batch = self.batches.write_down(
            Batch(
                id=batch_id,
                owner=owner,
                listed_at=f"{created_at}#{batch_id}",
                created_at=created_at,
                created=int(now),
                status="preparing",
                recipe=recipe.name if recipe else None,
                attempt=1,
                execution_n=1,
                expires_at=self.expires,
                next_check_at=int(now) + _START_CHECK_SECONDS,
                **asked,
            )
        )
        self._run_or_leave(batch)
        return batch

    def _place(self, asked: BatchBody, owner: str, invalid: list[dict[str, str]]) -> str:
        """Return the key of the manifest, or an empty one if the body has the requests."""
        if (asked.requests is None) == (asked.manifest is None):
            invalid.append({"field": "manifest", "detail": "Give either `requests` or `manifest`."})
        if asked.requests is not None and (not asked.requests or asked.format is not None):
            detail = (
                "Must have at least one request." if not asked.requests else "Only for a manifest. Remove `format`."
            )
            invalid.append({"field": "requests", "detail": detail})
        if asked.template is not None:
            invalid += check_template(asked.template, allow_loopback_webhooks=self.batches.allow_loopback_webhooks)
        if asked.manifest is None:
            return ""
        if re.fullmatch(r"[a-z0-9]{26}", asked.manifest, re.ASCII):
            key = f"files/{owner}/{asked.manifest}"
        else:
            bucket, _, key = asked.manifest.removeprefix("s3://").partition("/")
            own = key.startswith((f"files/{owner}/", f"batches/{owner}/"))
            if not asked.manifest.startswith("s3://") or bucket != self._inputs_bucket_name or not own:
                detail = (
                    f"Must be the id of one of your files, or s3://{self._inputs_bucket_name}/batches/{owner}/…; other "
                    "locations are not read."
                )
                invalid.append({"field": "manifest", "detail": detail})
                return ""
        if len(key.encode()) > _KEY_LIMIT_BYTES:
            invalid.append({"field": "manifest", "detail": f"The key exceeds the limit of {_KEY_LIMIT_BYTES} bytes."})
        if _format(asked, key) == "csv" and asked.template is None and asked.recipe is None:
            detail = "A CSV needs a template or a recipe that turns its rows into requests."
            invalid.append({"field": "template", "detail": detail})
        return key

    def _recipe(self, asked: BatchBody, owner: str, invalid: list[dict[str, str]]) -> Recipe | None:
        """Return the owner's recipe that builds the requests, or None."""
        if asked.recipe is None:
            return None
        if asked.template is not None:
            invalid.append({"field": "recipe", "detail": "Give either `template` or `recipe`."})
            return None
        found = self.recipes.named(owner, asked.recipe)
        if found is None or found.state == "deleting":
            invalid.append({"field": "recipe", "detail": "Recipe not found."})
            return None
        return found

    def _manifest(self, asked: BatchBody, batch_id: str, key: str) -> dict[str, str]:
        if asked.requests is not None:
            bucket, key = self.batches.bucket_name, manifest_key(batch_id)
            with new_object(bucket, key) as writer:
                for request in asked.requests:
                    writer.write_json(request)
            # No ETag: if two calls have the same key, each writes the object, and either may write the batch. Their
            # requests are equal by the fingerprint, but not their ETags, which with KMS differ even for equal bytes.
            return {"bucket": bucket, "key": key, "etag": "", "format": "jsonl"}
        bucket, format_ = self._inputs_bucket_name, _format(asked, key)
        found = etag_of(bucket, key)
        if found is None:
            detail = "Object not found."
            raise fields_refused([{"field": "manifest", "detail": detail}])
        etag, size = found
        if size > MANIFEST_LIMIT_BYTES:
            detail = (
                f"The manifest exceeds the limit of {MANIFEST_LIMIT_BYTES} bytes (got {size}). Create several batches."
            )
            raise fields_refused([{"field": "manifest", "detail": detail}])
        return {"bucket": bucket, "key": key, "etag": etag, "format": format_}

    # -- read ---------------------------------------------------------------------------------------------------------

    def own(self, batch_id: str, owner: str) -> Batch:
        """Return one of an owner's batches.

        Raises:
            Problem: 404 if it does not exist or belongs to another owner; the response is the same.
        """
        known = re.fullmatch(r"[a-z0-9]{26}", batch_id, re.ASCII)
        batch = self.batches.find(batch_id) if known else None
        if batch is None or batch.owner != owner:
            raise Problem(404, f"Batch {batch_id[:64]!r} not found.")
        return batch

    def page(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[Sequence[Batch], bool]:
        """Return a page of an owner's batches, as `Batches.page` does."""
        return self.batches.page(owner, start, older=older, size=size)

    def counts(self, batch: Batch, *, ask: bool = True) -> dict[str, int]:
        """Return the number of lines by status: waiting, running, terminal ones.

        While a batch runs they are Step Functions' own counts: nothing is written for them. Then `failed` also includes
        lines that were canceled individually.

        Args:
            batch: The batch.
            ask: Whether to ask Step Functions; else lines whose status is not in the item are `waiting`.
        """
        counts = dict.fromkeys(COUNTED, 0)
        if batch.counts is not None:
            return counts | dict(batch.counts)
        refused = batch.refused or 0
        lines = batch.lines or 0
        counts |= {"refused": refused, "waiting": lines}
        if batch.total is not None and batch.attempt > 1:
            # Results of earlier attempts stay.
            counts["succeeded"] = batch.total - refused - lines if batch.lines is not None else 0
        run = self._map_run(batch) if lines and ask else None
        if run is not None:
            found = run["itemCounts"]
            counts["running"] = found["running"]
            counts["succeeded"] += found["succeeded"]
            counts["failed"] = found["failed"] + found["timedOut"] + found["aborted"]
            counts["waiting"] = max(0, lines - found["running"] - found["succeeded"] - counts["failed"])
        return counts

    def _map_run(self, batch: Batch) -> Any:
        stepfunctions = self._stepfunctions
        # The execution that finishes a canceled batch has no map run: then the previous execution's is used.
        for n in (batch.execution_n, batch.execution_n - 1):
            try:
                arn = self._execution_arn(replace(batch, execution_n=n))
                runs = stepfunctions.list_map_runs(executionArn=arn)["mapRuns"]
            except stepfunctions.exceptions.ExecutionDoesNotExist:
                return None
            if runs or batch.stop is None or n == 1:
                return stepfunctions.describe_map_run(mapRunArn=runs[0]["mapRunArn"]) if runs else None
        return None

    # -- cancel, retry ------------------------------------------------------------------------------------------------

    def halt(self, batch: Batch, canceling: "CancelPrediction", remaining_seconds: Callable[[], float]) -> Batch:
        """Cancel a batch for its owner: no further line starts, running ones are canceled.

        Lines that do not fit into the time, or fail after the cancellation is stored, are canceled at Replicate by the
        sweep within a minute. Calling it twice changes nothing.
        """
        stopped = self.batches.stop(batch, "canceled") or self.batches.find(batch.id) or batch
        try:
            if stopped.stop is not None and not stopped.ended:
                self.cancel_lines(stopped, canceling, remaining_seconds)
                self._run(self.batches.find(batch.id) or stopped)
            return self.batches.find(batch.id) or stopped
        except (ClientError, BotoCoreError):
            logger.exception("canceled, some lines left to the sweep", batch_id=batch.id)
            return stopped

    def cancel_lines(self, batch: Batch, canceling: "CancelPrediction", remaining_seconds: Callable[[], float]) -> None:
        """Cancel the running lines of a stopped batch, from the stored position on."""
        if batch.stopped_before is None or batch.lines is None:
            return None
        before = 0
        chunk: list[int] = []
        for line in read_jsonl(self.batches.bucket_name, lines_key(batch.id, batch.attempt)):
            if before + len(chunk) < batch.stopped_before:
                before += 1
                continue
            chunk.append(line["n"])
            if len(chunk) == _CHUNK:
                if not self._cancel_chunk(batch, chunk, canceling, remaining_seconds):
                    return self.batches.stopped(batch, before)
                before, chunk = before + len(chunk), []
        done = self._cancel_chunk(batch, chunk, canceling, remaining_seconds)
        if done and batch.stop == "canceled":
            # Before the position is stored: if the function crashes here, the next check does it again.
            self._stop_execution(batch)
        return self.batches.stopped(batch, None if done else before)

    def _stop_execution(self, batch: Batch) -> None:
        """Stop the Map of a batch with no line to start; the next execution ends it.

        The Map would hand over each remaining line, one after the other, and wait for days for one whose message was
        lost.
        """
        stepfunctions = self._stepfunctions
        try:
            stepfunctions.stop_execution(executionArn=self._execution_arn(batch))
        except (stepfunctions.exceptions.ExecutionDoesNotExist, stepfunctions.exceptions.ValidationException):
            logger.info("no execution to stop", batch_id=batch.id)

    def _cancel_chunk(
        self, batch: Batch, lines: list[int], canceling: "CancelPrediction", remaining_seconds: Callable[[], float]
    ) -> bool:
        ids = [batch.prediction_id(n, batch.attempt) for n in lines]
        return canceling.cancel_open(ids, batch.owner, remaining_seconds)

    def again(self, batch: Batch, *, limits: OwnerLimits | None = None, repeated: bool = False) -> Batch:
        """Run the failed and canceled lines of a completed batch again.

        Args:
            batch: The batch.
            limits: The owner's limits; None: no limits.
            repeated: Whether the client declares a retry of a call without a response: then a batch that was already
                started again is the response.

        Raises:
            Problem: 409 if it has not completed, could not be read, has no failed line, expires too soon, or was run
                `ATTEMPTS_LIMIT` times; 429 if one of the owner's limits is reached.
        """
        if not batch.ended:
            if repeated and batch.attempt > 1:
                return batch
            raise Problem(409, f"Batch {batch.id} has not completed. Wait for its completion, or cancel it.")
        counts = batch.counts or {}
        if batch.error or not counts.get("failed", 0) + counts.get("canceled", 0):
            raise Problem(409, f"Batch {batch.id} has no line to run again.")
        if batch.attempt >= ATTEMPTS_LIMIT:
            detail = (
                f"Batch {batch.id} has reached the limit of {ATTEMPTS_LIMIT} attempts (got {batch.attempt}). Create a"
                " new batch of the failed lines."
            )
            raise Problem(409, detail)
        if batch.expires_at - self.batches.now() < LIFETIME_LIMIT_SECONDS:
            # Its stored data expires with its item: its lines could not be read, nor its completion be reported.
            raise Problem(409, f"Batch {batch.id} is about to expire. Create a new batch of the failed lines.")
        api_url()
        self._acquire_slot(batch.owner, batch.id, limits)
        begun = self.batches.begin_again(batch) or self.batches.find(batch.id) or batch
        self._run_or_leave(begun)
        return begun

    # -- sweep --------------------------------------------------------------------------------------------------------

    def sweep_one(self, batch_id: str, canceling: "CancelPrediction", remaining_seconds: Callable[[], float]) -> None:
        """Recover a due batch: cancel remaining lines, restart an execution that is gone."""
        batch = self.batches.find(batch_id)
        # The index may lag behind the item.
        if batch is None or batch.next_check_at is None or batch.next_check_at > self.batches.now():
            return
        taken = self.batches.take_check(batch)
        if taken is None:
            return
        logger.set_correlation_id(batch_id)
        over = taken.abandoned_at is not None and self.batches.now() >= taken.abandoned_at
        if over and not self._is_running(taken):
            logger.error(
                "batch abandoned after repeated crashes, completed without results", executions=taken.execution_n
            )
            self.batches.abandon(taken)
            return
        if taken.stop:
            self.cancel_lines(taken, canceling, remaining_seconds)
        self._run(taken)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _run_or_leave(self, batch: Batch) -> None:
        """Start a stored batch; on an error the sweep does, within two minutes."""
        try:
            self._run(batch)
        except (ClientError, BotoCoreError):
            # Accepted nevertheless: a caller that gets an error would create another one.
            logger.exception("accepted, but not started yet", batch_id=batch.id)

    def _run(self, batch: Batch) -> None:
        """Ensure that an execution runs this attempt."""
        following: Batch | None = batch
        while following is not None and not following.ended and not self._start(following):
            # The name belongs to an execution that has ended.
            following = self.batches.next_execution(following)

    def _start(self, batch: Batch) -> bool:
        stepfunctions = self._stepfunctions
        try:
            stepfunctions.start_execution(
                stateMachineArn=self._machine_arn,
                name=batch.execution_name,
                input=json.dumps({"id": batch.id, "attempt": batch.attempt, **labels_and_trace({}, batch.traceparent)}),
            )
        except stepfunctions.exceptions.ExecutionAlreadyExists:
            return self._is_running(batch)
        return True

    def _is_running(self, batch: Batch) -> bool:
        stepfunctions = self._stepfunctions
        try:
            arn = self._execution_arn(batch)
            return stepfunctions.describe_execution(executionArn=arn)["status"] == "RUNNING"
        except stepfunctions.exceptions.ExecutionDoesNotExist:
            return False

    def _execution_arn(self, batch: Batch) -> str:
        return f"{self._machine_arn.replace(':stateMachine:', ':execution:')}:{batch.execution_name}"


def _of_another() -> Problem:
    detail = "This key belongs to another batch. Use a new key for a new batch."
    return fields_refused([{"field": "Idempotency-Key", "detail": detail}])


def _format(asked: BatchBody, key: str) -> str:
    return asked.format or ("csv" if key.lower().endswith(".csv") else "jsonl")
