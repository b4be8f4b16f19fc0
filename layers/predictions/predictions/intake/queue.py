"""The requests queue: turns every event except an HTTP call into a tracked intent.

A message's body is JSON in one of these forms, distinguished by their keys:

    {"recipe_id": …, "event": {…}}                             an event that a recipe's rule or schedule sent
    {"batch_manifest": {…}}                                    S3's event of a manifest dropped into the inputs bucket
    {"batch_id": …, "n": …, "task_token": …, …}                a line of a batch
    {"pipeline_id": …, "step": …, "index": …}                  a step of a pipeline
    {"input": {…}, "model" | "version" | "deployment": …, …}   a request of its own: a `RequestBody`, and `task_token`

No form names the owner of the request. A recipe, a batch and a pipeline are identified by ids that cannot be guessed;
the predictions that they start, and the owner, were stored when an owner created them. The owner of a manifest is
given by its key in the bucket, which is checked again. A message without such an id belongs to the owner that the
queue's configuration assigns to its sender.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from predictions.aws.executions import Executions
from predictions.errors import Problem
from predictions.ids import OWNER_RULE, is_owner
from predictions.intents.model import Intent, create_requested_intent
from predictions.intents.sources import Message, RequestRefused, Source
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.callers import CALLERS_LIMIT, WaitingCallers
from predictions.store.predictions import PredictionsTable
from predictions.store.records import AlreadyExists, Prediction
from predictions.validation import parse_json

if TYPE_CHECKING:
    from predictions.batches.dropped import DroppedManifests
    from predictions.pipelines.steps import Pipelines

_TASK_TOKEN_LIMIT = 2048
"""https://docs.aws.amazon.com/step-functions/latest/apireference/API_SendTaskSuccess.html"""


class Requests:
    """Turns messages of the requests queue into tracked intents.

    Args:
        callers: The states that wait for their ends.
        lifetime_seconds: The deadline of a request that names none.
        retention_seconds: How long the table stores a prediction.
        queue_owner: The owner of requests from a sender that is not in `sender_owners`.
        sender_owners: Owners by the principal (`SenderId`) that sends for them.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
    """

    def __init__(
        self,
        table: PredictionsTable,
        callers: WaitingCallers,
        executions: Executions,
        *,
        lifetime_seconds: int,
        retention_seconds: int,
        queue_owner: str,
        sender_owners: Mapping[str, str],
        allow_loopback_webhooks: bool,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._callers = callers
        self._executions = executions
        self._lifetime_seconds = lifetime_seconds
        self._retention_seconds = retention_seconds
        self._queue_owner = queue_owner
        self._sender_owners = sender_owners
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._now = now

    @classmethod
    def from_env(cls) -> "Requests":
        """Build from the environment of start_from_queue.

        Raises:
            ValueError: QUEUE_OWNER or QUEUE_SENDERS has an invalid owner; the template rejects it too.
        """
        senders = [pair.partition("=") for pair in os.environ["QUEUE_SENDERS"].split(",") if pair]
        named = [("QUEUE_OWNER", os.environ["QUEUE_OWNER"]), *(("QUEUE_SENDERS", owner) for *_, owner in senders)]
        for variable, owner in named:
            if not is_owner(owner):
                raise ValueError(f"The owner {owner!r} in {variable} must be {OWNER_RULE}.")
        return cls(
            PredictionsTable.from_env(),
            WaitingCallers.from_env(),
            Executions.from_env(),
            lifetime_seconds=int(os.environ["DEFAULT_LIFETIME_SECONDS"]),
            retention_seconds=int(os.environ["RETENTION_DAYS"]) * 86400,
            queue_owner=os.environ["QUEUE_OWNER"],
            sender_owners={sender: owner for sender, _, owner in senders},
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def take(self, message: Message) -> Prediction | None:
        """Start the request in a message, only once if the message is repeated.

        Returns:
            The prediction, or None if its recipe, batch or pipeline is no longer active, or if it is a batch manifest.

        Raises:
            RequestRefused: The message can never start anything; nothing was written.
            NoLongerWanted: The request is no longer active; nothing was written.
        """
        try:
            body = parse_json(message.body.encode("utf-8", "surrogatepass"), None)
            if not isinstance(body, dict):
                raise RequestRefused("The message must be a JSON object.")
            task_token = _task_token(body)
            if "batch_manifest" in body:
                if task_token is not None:
                    raise RequestRefused("task_token: not supported for a dropped manifest.")
                _dropped_manifests().take(body["batch_manifest"])
                return None
            intent = self._intent(body, message)
        except Problem as problem:
            raise RequestRefused(problem.detail) from None
        if intent is None:
            return None
        return self.start(intent, task_token)

    def give_up(self, message: Message, reason: str) -> None:
        """Report a given-up message to its pipeline, which would otherwise resend it.

        Args:
            message: The message, which is not tried again.
            reason: Why it is given up.
        """
        try:
            body = json.loads(message.body)
        except (ValueError, RecursionError):
            return
        if isinstance(body, dict) and "pipeline_id" in body:
            _pipelines().give_up(body, reason)

    def start(self, intent: Intent, task_token: str | None = None) -> Prediction:
        """Store an intent and start its execution; an intent that exists is left as it is.

        Args:
            intent: The request.
            task_token: The token of a state that waits for its completion.

        Raises:
            RequestRefused: Its idempotency key belongs to another request, or too many states already wait for it.
        """
        now = self._now()
        logger.set_correlation_id(intent.id)
        try:
            # Checked first: a repeated message writes nothing, and so restores no input that its owner has deleted.
            there = self._table.get(intent.id)
            # A key that outlives its prediction starts a new one; DynamoDB may remove an expired item days later.
            if there and not there.expired(now):
                raise AlreadyExists(there)
            prediction = self._table.put_intent(
                intent,
                version=intent.reference.version,
                deadline=int(now) + (intent.lifetime_seconds or self._lifetime_seconds),
                expires=int(now) + self._retention_seconds,
                claim=False,
                execution_arn=self._executions.arn(intent.id, 1),
                now=now,
            )
            metrics.add_metric(name="PredictionsStarted", unit=MetricUnit.Count, value=1)
        except AlreadyExists as error:
            prediction = error.prediction
            if prediction.owner != intent.owner or (
                prediction.fingerprint != intent.fingerprint and intent.source == "queue"
            ):
                reason = "The idempotency key belongs to another request. Use a new key for a new request."
                raise RequestRefused(reason) from None
            # Only after it is known to be the same request. A new prediction has no callers yet, so nothing is counted.
            if task_token is not None and not self._callers.takes_caller(prediction.id, task_token):
                raise RequestRefused(
                    f"task_token: {CALLERS_LIMIT} states already wait for prediction {prediction.id}, which is the "
                    "limit. Send a request with an idempotency key of its own, or poll the prediction."
                ) from None
        if task_token is not None:
            # Only after it is known to be the same request. If the prediction has completed, publish_changes sees both
            # records, this one and the completion, and notifies the state at the later one.
            expires, brief = int(now) + self._retention_seconds, intent.source == "batch"
            self._callers.add_caller(prediction.id, task_token, expires, brief=brief)
        if prediction.execution_arn == self._executions.arn(prediction.id, 1) and not prediction.terminal:
            # The function that stored it may have crashed right after. The sweep handles a taken execution name, and a
            # prediction that the API stored for the other state machine.
            self._executions.start(prediction.id, 1, prediction.traceparent)
        return prediction

    def _intent(self, body: dict[str, Any], message: Message) -> Intent | None:
        if source := _source_of(body):
            return source.intent(body, message)
        # For an assumed role, SQS adds the session's name: `AROA…:name`.
        owners: Mapping[str, str] = self._sender_owners
        owner = owners.get(message.sender.partition(":")[0], self._queue_owner)
        return create_requested_intent(
            body,
            owner=owner,
            source="queue",
            source_key=message.id,
            traceparent=message.traceparent,
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )


def _source_of(body: Mapping[str, Any]) -> Source | None:
    """Return the parser for the recipe, batch or pipeline in a message, if any."""
    named = next((name for name in ("recipe_id", "pipeline_id", "batch_id") if name in body), None)
    return _source(named) if named else None


@cache
def _source(named: str) -> Source:
    """Return the parser for a kind of message, imported with the first of its kind.

    The parser is cached, so that the secret of links is not read for each message.
    """
    match named:
        case "recipe_id":
            from predictions.recipes.store import Recipes

            return Recipes.from_env()
        case "pipeline_id":
            return _pipelines()
    from predictions.batches.store import Batches

    return Batches.from_env()


@cache
def _pipelines() -> "Pipelines":
    from predictions.pipelines.steps import Pipelines

    return Pipelines.from_env()


@cache
def _dropped_manifests() -> "DroppedManifests":
    from predictions.batches.dropped import DroppedManifests

    return DroppedManifests.from_env()


def task_token_of(text: str) -> str | None:
    """Return the task token in a rejected message, however invalid it is, or None."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    token = body["task_token"] if isinstance(body, dict) and "task_token" in body else None
    return token if isinstance(token, str) and 1 <= len(token) <= _TASK_TOKEN_LIMIT else None


def _task_token(body: dict[str, Any]) -> str | None:
    """Remove and return the task token in a message, or None.

    Raises:
        RequestRefused: The value is not a valid token.
    """
    token = body.pop("task_token", None)
    if token is None:
        return None
    if not isinstance(token, str) or not 1 <= len(token) <= _TASK_TOKEN_LIMIT:
        raise RequestRefused("task_token: must be the token of a waiting state, of 1 to 2048 characters.")
    return token
