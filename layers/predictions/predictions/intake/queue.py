"""The requests queue's door: every event but an HTTP call becomes an intent here, and is tracked from then on.

A message's body is JSON, and one of these; which one it is, its keys tell:

    {"recipe_id": …, "event": {…}}                             an event that a recipe's rule or schedule put here
    {"batch_manifest": {…}}                                    a manifest dropped into the inputs bucket, as S3 tells
    {"batch_id": …, "n": …, "task_token": …, …}                a line of a batch
    {"pipeline_id": …, "step": …, "index": …}                  a step of a pipeline
    {"input": {…}, "model" | "version" | "deployment": …, …}   a request of its own: a `RequestBody`, and `task_token`

None of them says whose request it is. A recipe, a batch and a pipeline are known by ids that nobody can guess, and
what they start, and for whom, was written down when an owner asked for them. Of a manifest its place says it, which is
looked at anew. What has no such id belongs to the owner that the queue's configuration gives its sender.
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
    """Turns messages into tracked intents.

    Args:
        table: The predictions.
        callers: The states that wait for their ends.
        executions: The state machine.
        lifetime_seconds: The deadline of a request that names none.
        retention_seconds: How long the table keeps a prediction.
        queue_owner: Whose requests are those of a sender that `sender_owners` does not know.
        sender_owners: Owners by the principal (`SenderId`) that sends for them.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
        now: The time, in seconds since 1970.
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
        """From the environment of start_from_queue.

        Raises:
            ValueError: QUEUE_OWNER or QUEUE_SENDERS names an owner that cannot be one; the template refuses it, too.
        """
        senders = [pair.partition("=") for pair in os.environ["QUEUE_SENDERS"].split(",") if pair]
        named = [("QUEUE_OWNER", os.environ["QUEUE_OWNER"]), *(("QUEUE_SENDERS", owner) for *_, owner in senders)]
        for variable, owner in named:
            if not is_owner(owner):
                raise ValueError(f"{variable} names the owner {owner!r}; an owner has {OWNER_RULE}.")
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
        """Starts what a message asks for. Twice, or redriven: the same prediction, and nothing is started again.

        Returns:
            The prediction; None where what the message names is no longer wanted, or is a batch.

        Raises:
            RequestRefused: It never can be started; nothing was written.
            NoLongerWanted: It is not to be started any more; nothing was written.
        """
        try:
            body = parse_json(message.body.encode("utf-8", "surrogatepass"), None)
            if not isinstance(body, dict):
                raise RequestRefused("The message has to be a JSON object.")
            task_token = _task_token(body)
            if "batch_manifest" in body:
                if task_token is not None:
                    raise RequestRefused("task_token: nobody can wait for a manifest that is dropped.")
                _dropped_manifests().take(body["batch_manifest"])
                return None
            intent = self._intent(body, message)
        except Problem as problem:
            raise RequestRefused(problem.detail) from None
        if intent is None:
            return None
        return self.start(intent, task_token)

    def give_up(self, message: Message, reason: str) -> None:
        """Tell what a message belongs to that it will not start, where that would send it again: a pipeline.

        Args:
            message: One that is not tried any more.
            reason: Why.
        """
        try:
            body = json.loads(message.body)
        except (ValueError, RecursionError):
            return
        if isinstance(body, dict) and "pipeline_id" in body:
            _pipelines().give_up(body, reason)

    def start(self, intent: Intent, task_token: str | None = None) -> Prediction:
        """Writes an intent down and has it tracked; one that is there already is left as it is.

        Args:
            intent: What is wanted.
            task_token: Of a state that waits for its end.

        Raises:
            RequestRefused: Its idempotency key belongs to another request, or too many states wait for it already.
        """
        now = self._now()
        logger.set_correlation_id(intent.id)
        try:
            # First: a message that comes again writes nothing, and so brings back no input that its owner has deleted.
            there = self._table.get(intent.id)
            # A key that outlives its prediction starts another one: what has expired may be there for days.
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
                reason = "Its idempotency key belongs to another request: use a new key for a new request."
                raise RequestRefused(reason) from None
            # Not before it is known to be the same request. A new prediction has no callers yet, so nothing is counted.
            if task_token is not None and not self._callers.takes_caller(prediction.id, task_token):
                raise RequestRefused(
                    f"task_token: {CALLERS_LIMIT} states wait for prediction {prediction.id} already, which is the "
                    "limit. Send a request with an idempotency key of its own, or poll the prediction."
                ) from None
        if task_token is not None:
            # Not before it is known to be the same request. It may have ended: publish_changes sees both, this and the
            # end, and tells the state with the later one.
            self._callers.add_caller(prediction.id, task_token, int(now) + self._retention_seconds)
        if prediction.execution_n == 1 and not prediction.terminal:
            # Whoever wrote it down may have died right after. A name that is used up is the sweep's to deal with.
            self._executions.start(prediction.id, 1, submit=True)
        return prediction

    def _intent(self, body: dict[str, Any], message: Message) -> Intent | None:
        if source := _source_of(body):
            return source.intent(body, message)
        # Of a role that is assumed, SQS gives the session's name too: `AROA…:name`.
        owners: Mapping[str, str] = self._sender_owners
        owner = owners.get(message.sender.partition(":")[0], self._queue_owner)
        return create_requested_intent(
            body,
            owner=owner,
            source="queue",
            source_key=message.id,
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )


def _source_of(body: Mapping[str, Any]) -> Source | None:
    """What the message names, if anything."""
    named = next((name for name in ("recipe_id", "pipeline_id", "batch_id") if name in body), None)
    return _source(named) if named else None


@cache
def _source(named: str) -> Source:
    """Imported with the first message that needs it, and kept: the secret of links is not read for each message."""
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
    """The task token in a message that was refused, whatever else is wrong with it; None where there is none."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    token = body["task_token"] if isinstance(body, dict) and "task_token" in body else None
    return token if isinstance(token, str) and 1 <= len(token) <= _TASK_TOKEN_LIMIT else None


def _task_token(body: dict[str, Any]) -> str | None:
    """Takes the task token of another state machine out of a message.

    Raises:
        RequestRefused: It cannot be one.
    """
    token = body.pop("task_token", None)
    if token is None:
        return None
    if not isinstance(token, str) or not 1 <= len(token) <= _TASK_TOKEN_LIMIT:
        raise RequestRefused("task_token: the token of a state that waits, of 1 to 2048 characters.")
    return token
