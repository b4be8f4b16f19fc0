"""Items of recipes, which are named templates of requests, and the intents that they build from events.

A recipe is an item, `pk` = `recipe#{id}`, `sk` = `recipe`, with its definition as JSON text, as its owner wrote it and
`recipes.manage` validated it. Its id is 26 random characters: the messages that its rule or schedule puts into the
requests queue name it, and a principal that knows it may start the recipe for its owner. `pk` =
`recipe#{owner}#{name}`, `sk` = `name` holds the id of a name, so that an owner has one recipe of a name. `pk` =
`recipe#deployed` lists those that are deployed with the stack (see `recipes.deployment`).

An expression in a template can use:

    event       the whole event, if the recipe was started by one
    object      of S3's `Object Created`: `bucket`, `key`, `name` (the key's end), `size`, `etag`, `version_id`,
                `sequencer`, `content_type`, `metadata`, and `url`, a link that a model can open
    schedule    of a schedule: `time`, when it was due
    recipe      `id` and `name`
    row         of a batch that names the recipe: a line of its manifest, without an `event`
    defaults    the recipe's own

A field of `input` whose placeholder gives nothing gets the value of that name in `defaults`.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from botocore.exceptions import ClientError

from predictions.aws.clients import client
from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Table
from predictions.clock import rfc3339
from predictions.files.links import Links
from predictions.files.output_references import ORIGIN_DEPTH
from predictions.files.outputs_bucket import safe_prefix
from predictions.ids import is_id
from predictions.intents.labels import filled_labels
from predictions.intents.model import Intent, create_requested_intent
from predictions.intents.sources import Message, RequestRefused
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.keys import DEPLOYED_RECIPES, list_of, owner_of, recipe_key, recipe_name_key
from predictions.templating import Allowance, Filler, NothingFound, PlaceholderError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

EVENT_SOURCE = "replicate-serverless"
"""The source of this stack's own events."""

KEPT_APART = ("files/", "batches/")
"""Prefixes of the inputs bucket that recipes may not use: owners' uploads, and manifests."""

Kind = Literal["s3", "pattern", "schedule"]

SOURCE_ROOTS: Mapping[Kind, tuple[str, ...]] = {
    "s3": ("event", "object"),
    "pattern": ("event", "object"),
    "schedule": ("event", "schedule"),
}
"""The names that an expression finds at an event of each source. An S3 event may match a pattern as well."""

ANY_ROOTS = ("row", "recipe", "defaults")
"""The names that an expression may use in any recipe: each can be named by a batch."""

OBJECT_FIELDS = (
    "bucket", "key", "name", "size", "etag", "version_id", "sequencer", "content_type", "metadata", "url",
)  # fmt: skip
"""The names in `object`."""

State = Literal["pending", "active", "deleting"]

# Longer than a prediction's lifetime plus the days that its message may wait.
_LINK_SECONDS = 7 * 86400
_LINK_LEFT_SECONDS = 3 * 86400
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z", re.ASCII)
_REQUEST_FIELDS = ("model", "version", "deployment", "webhook_events_filter", "lifetime")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        id: 26 characters `[a-z0-9]`.
        owner: The owner of the recipe, and of the predictions that it starts.
        name: Unique among its owner's recipes.
        definition: The definition as its owner wrote it, without the name.
        state: `active` if its rule or schedule exists; `pending` if it may not; `deleting` if it may no longer start
            anything.
        revision: Changes with each update.
        created_at: RFC 3339, UTC.
        updated_at: RFC 3339, UTC.
        deployed: Whether it comes from a file of the stack's deployment.
    """

    id: str
    owner: str
    name: str
    definition: Mapping[str, Any]
    state: State
    revision: str
    created_at: str
    updated_at: str
    deployed: bool = False

    @property
    def kind(self) -> Kind | None:
        """Return the kind of its source, or None if only batches name it."""
        kinds: tuple[Kind, ...] = ("s3", "pattern", "schedule")
        return next((kind for kind in kinds if kind in self.definition), None)

    @property
    def listed_at(self) -> str:
        """Return its position in its owner's list."""
        return f"{self.created_at}#{self.id}"

    def request(self, context: Mapping[str, Any], allowance: Allowance | None = None) -> dict[str, Any]:
        """Build the request for a context: a `RequestBody`, not yet validated.

        Args:
            context: See the module's docstring; `recipe` and `defaults` are added.
            allowance: The budget of filling, shared with `output_prefix`; by default a new one.

        Raises:
            PlaceholderError: A placeholder gives nothing and has no default, or cannot be filled.
            TooSlow: The time of the allowance is used up.
        """
        filler = self._filler(context, allowance)
        values = dict(self.definition.get("defaults", {}))
        for name, template in self.definition["input"].items():
            try:
                values[name] = filler.fill(template, f"input.{name}")
            except NothingFound:
                if name not in values:
                    raise
        made = {name: self.definition[name] for name in _REQUEST_FIELDS if name in self.definition}
        if "labels" in self.definition:
            made["labels"] = filled_labels(filler.fill(self.definition["labels"], "labels"))
        if "webhook" in self.definition:
            # Values are untrusted names and fields: encoded, none of them adds a parameter or ends the URL.
            made["webhook"] = filler.fill(self.definition["webhook"], "webhook", encode=_url_encoded)
        return {**made, "input": values}

    def output_prefix(self, context: Mapping[str, Any], allowance: Allowance | None = None) -> str | None:
        """Return the prefix for results in the owner's part of the bucket, or None.

        Without a prefix, files go to the usual place.

        Args:
            context: As for `request`.
            allowance: As for `request`.

        Raises:
            TooSlow: The time of the allowance is used up.
            PlaceholderError: A placeholder gives nothing or cannot be filled.
        """
        usual = "{{ object.key }}" if self.kind == "s3" and "object" in context else ""
        template = self.definition.get("output_prefix", usual)
        filled = self._filler(context, allowance).fill(template, "output_prefix")
        return safe_prefix(filled if isinstance(filled, str) else json.dumps(filled)) or None

    def _filler(self, context: Mapping[str, Any], allowance: Allowance | None) -> Filler:
        recipe = {"id": self.id, "name": self.name}
        return Filler({**context, "recipe": recipe, "defaults": self.definition.get("defaults", {})}, allowance)


class RecipeItems:
    """The recipes in the table."""

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(table_name, dynamodb)

    @classmethod
    def from_env(cls) -> "RecipeItems":
        """Use the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def find(self, recipe_id: str) -> Recipe | None:
        """Return a recipe by its id, read consistently, or None."""
        item = self._table.get_item(recipe_key(recipe_id))
        return _recipe_of(item) if item else None

    def named(self, owner: str, name: str) -> Recipe | None:
        """Return an owner's recipe of that name, read consistently, or None."""
        recipe_id = self.id_of(owner, name)
        return self.find(recipe_id) if recipe_id else None

    def id_of(self, owner: str, name: str) -> str | None:
        """Return the id of a recipe name, or None.

        The recipe may not exist: the name is written first.
        """
        item = self._table.get_item(recipe_name_key(owner, name))
        return str(item["id"]) if item else None

    def deployed(self) -> set[tuple[str, str]]:
        """Return owner and name of the recipes that a deployment created, or was about to."""
        item = self._table.get_item(DEPLOYED_RECIPES)
        return {(owner, name) for owner, name in item["recipes"]} if item else set()

    def note_deployed(self, recipes: Iterable[tuple[str, str]]) -> None:
        """Store the list of deployed recipes, by owner and name. Idempotent."""
        self._table.put_item(DEPLOYED_RECIPES, {"recipes": sorted(recipes)})

    def page(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[list[Recipe], bool]:
        """Return a page of an owner's recipes, and whether more follow.

        The recipes are ordered from the start of the page on, away from it.
        """
        items, more = self._table.list_items(list_of(owner, "recipes"), start, older=older, size=size, sk="recipe")
        return [_recipe_of(item) for item in items], more

    def claim_name(self, owner: str, name: str, new_id: str) -> str:
        """Give a name an id if it has none; return its id."""
        try:
            self._table.put_item(recipe_name_key(owner, name), {"id": new_id}, NEW)
        except ConditionFailed:
            # Claimed by a concurrent call, or by this very write, whose response was lost.
            return self.id_of(owner, name) or new_id
        return new_id

    def put(self, recipe: Recipe, *, replaces: Recipe | None) -> bool:
        """Store a recipe if the stored one is `replaces` (None: no item); return whether."""
        item = {
            "id": recipe.id,
            "owner": list_of(recipe.owner, "recipes"),
            "listed_at": recipe.listed_at,
            "name": recipe.name,
            "definition_json": json.dumps(recipe.definition, separators=(",", ":"), ensure_ascii=False),
            "state": recipe.state,
            "revision": recipe.revision,
            "created_at": recipe.created_at,
            "updated_at": recipe.updated_at,
            "deployed": recipe.deployed,
        }
        replaced = NEW if replaces is None else Condition("revision = :replaced", replaced=replaces.revision)
        # The second half: this very write, whose response botocore did not receive.
        try:
            self._table.put_item(recipe_key(recipe.id), item, replaced | _unchanged(recipe))
        except ConditionFailed:
            return False
        return True

    def set_state(self, recipe: Recipe, state: State) -> bool:
        """Set the state of a recipe unless it was changed concurrently; return whether."""
        try:
            self._table.update_item(recipe_key(recipe.id), set={"state": state}, condition=_unchanged(recipe))
        except ConditionFailed:
            return False
        return True

    def erase(self, recipe: Recipe) -> bool:
        """Remove a recipe and its name unless it was changed; return whether it is gone."""
        try:
            self._table.delete_item(recipe_key(recipe.id), NEW | _unchanged(recipe))
        except ConditionFailed:
            return False
        # If the function crashes here, the name keeps its id, which the next recipe of that name takes over.
        try:
            self._table.delete_item(recipe_name_key(recipe.owner, recipe.name), Condition("id = :id", id=recipe.id))
        except ConditionFailed:
            logger.info("recipe name already taken by another recipe", recipe_id=recipe.id)
        return True


def _unchanged(recipe: Recipe) -> Condition:
    return Condition("revision = :revision", revision=recipe.revision)


@dataclass(frozen=True)
class _Occurrence:
    """An event, as a recipe sees it.

    Attributes:
        context: The values for its expressions.
        key: The same for the same event, however often it is reported.
        depth: The number of results of this stack it descends from.
    """

    context: dict[str, Any]
    key: str
    depth: int


class _NotWanted(Exception):
    """The message starts nothing and needs no attention."""


class Recipes:
    """Turns messages of recipes' rules and schedules into intents.

    Args:
        links: Builds links to objects.
        inputs_bucket_name: The stack's inputs bucket.
        source_bucket_name: The team's own bucket; empty if the stack has none.
        outputs_bucket_name: The outputs bucket, whose objects a recipe never passes to a model.
        max_origin_depth: The limit of results of this stack that a request may descend from.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
    """

    def __init__(
        self,
        items: RecipeItems,
        links: Links,
        *,
        inputs_bucket_name: str,
        source_bucket_name: str,
        outputs_bucket_name: str,
        max_origin_depth: int,
        allow_loopback_webhooks: bool,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._items = items
        self._links = links
        self._inputs_bucket_name = inputs_bucket_name
        self._source_bucket_name = source_bucket_name
        self._outputs_bucket_name = outputs_bucket_name
        self._max_origin_depth = max_origin_depth
        self._allow_loopback_webhooks = allow_loopback_webhooks
        self._now = now

    @classmethod
    def from_env(cls) -> "Recipes":
        """Build from the environment of start_from_queue."""
        return cls(
            RecipeItems.from_env(),
            Links.from_env(),
            inputs_bucket_name=os.environ["INPUTS_BUCKET_NAME"],
            source_bucket_name=os.environ["SOURCE_BUCKET_NAME"],
            outputs_bucket_name=os.environ["OUTPUTS_BUCKET_NAME"],
            max_origin_depth=int(os.environ["MAX_ORIGIN_DEPTH"]),
            allow_loopback_webhooks=os.environ["ALLOW_LOOPBACK_WEBHOOKS"] == "true",
        )

    def intent(self, body: Mapping[str, Any], message: Message) -> Intent | None:
        """Return the intent of `{"recipe_id", "event"}`; see `intents.sources.Source`.

        Returns:
            The intent, or None if the recipe or the object is gone, or the event no longer matches this recipe.

        Raises:
            RequestRefused: The event cannot be read or descends from too many results, or a placeholder gives nothing.
            Problem: 422 if the filled template is not a valid request.
        """
        recipe_id, event = body["recipe_id"], body.get("event")
        if not isinstance(recipe_id, str) or not is_id(recipe_id):
            raise RequestRefused("recipe_id: must be the id of a recipe.")
        if not isinstance(event, dict):
            raise RequestRefused("event: must be an object.")
        recipe = self._items.find(recipe_id)
        try:
            if recipe is None or recipe.state == "deleting":
                raise _NotWanted("recipe not found")
            occurrence = self._occurrence(recipe, event, message)
        except _NotWanted as reason:
            logger.info("event dropped", reason=str(reason), recipe_id=recipe_id)
            metrics.add_metric(name="EventsDropped", unit=MetricUnit.Count, value=1)
            return None
        if occurrence.depth > self._max_origin_depth:
            raise RequestRefused(
                f"The event descends from {occurrence.depth} results of this stack in a row, which exceeds "
                f"MaxOriginDepth ({self._max_origin_depth}). Recipe {recipe.name} probably starts itself."
            )
        try:
            allowance = Allowance()
            value = recipe.request(occurrence.context, allowance)
            output_prefix = recipe.output_prefix(occurrence.context, allowance)
        except PlaceholderError as error:
            raise RequestRefused(f"Recipe {recipe.name}, {error}") from None
        return create_requested_intent(
            value,
            owner=recipe.owner,
            source="recipe",
            source_key=f"{recipe.id}\n{occurrence.key}",
            origin={"recipe": recipe.name},
            depth=occurrence.depth,
            output_prefix=output_prefix,
            traceparent=_traceparent_in(event) or message.traceparent,
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )

    def _occurrence(self, recipe: Recipe, event: dict[str, Any], message: Message) -> _Occurrence:
        if recipe.kind == "schedule":
            due = event.get("time")
            if isinstance(due, str) and _TIME.fullmatch(due):
                return _Occurrence({"event": event, "schedule": {"time": due}}, f"schedule {due}", 0)
            # If the event has no time (the local cloud's scheduler adds none), the message's time is used.
            sent = rfc3339(message.sent_at)
            return _Occurrence({"event": event, "schedule": {"time": sent}}, f"message {message.id}", 0)
        if event.get("source") == "aws.s3" and event.get("detail-type") == "Object Created":
            return self._object_created(recipe, event, message)
        if recipe.kind != "pattern":
            raise _NotWanted("event does not match the recipe")
        event_id, detail = event.get("id"), event.get("detail")
        if not isinstance(event_id, str) or not 1 <= len(event_id) <= 256:
            raise RequestRefused("event.id: must be 1 to 256 characters.")
        detail = detail if isinstance(detail, dict) else {}
        if event.get("source") != EVENT_SOURCE:
            # An application that reports our results in events of its own can pass the depth on.
            depth = next_depth(detail.get(ORIGIN_DEPTH), f"event.detail.{ORIGIN_DEPTH}")
        elif detail.get("owner") != recipe.owner:
            raise _NotWanted("event belongs to another owner")
        else:
            depth = next_depth(detail.get("depth", 0), "event.detail.depth")
            # The stream may report one change twice, and EventBridge gives each event its own id.
            told = detail.get("event_id")
            event_id = told if isinstance(told, str) and 1 <= len(told) <= 256 else event_id
        return _Occurrence({"event": event}, f"event {event_id}", depth)

    def _object_created(self, recipe: Recipe, event: dict[str, Any], message: Message) -> _Occurrence:
        bucket, found = object_of(event)
        if bucket == self._outputs_bucket_name:
            raise RequestRefused("event: objects of the outputs bucket never start a recipe.")
        if recipe.kind == "s3" and not self._is_of(recipe, bucket, found["key"]):
            raise _NotWanted("event does not match the recipe")
        depth = 0
        if self._is_readable(bucket, found["key"]):
            head = head_of(bucket, found)
            if head is None:
                # Its owner deleted it, or replaced it by another one, which has an event of its own.
                raise _NotWanted("object not found")
            expires = message.sent_at + _LINK_SECONDS
            while expires < self._now() + _LINK_LEFT_SECONDS:  # one that was redriven after days
                expires += _LINK_SECONDS
            found["url"] = self._links.url(bucket, found["key"], version_id=found["version_id"], expires=expires)
            found["metadata"] = dict(head.get("Metadata", {}))
            found["content_type"] = head.get("ContentType")
            depth = next_depth(found["metadata"].get(ORIGIN_DEPTH), f"the object's metadata {ORIGIN_DEPTH}")
        key = json.dumps(["object", bucket, found["key"], found["version_id"], found["sequencer"]])
        return _Occurrence({"event": event, "object": found}, key, depth)

    def _is_of(self, recipe: Recipe, bucket: str, key: str) -> bool:
        """Return whether an object is below a recipe's prefix, which may have changed."""
        asked: Mapping[str, Any] = recipe.definition["s3"]
        named = self._source_bucket_name if asked.get("bucket") == "source" else self._inputs_bucket_name
        return bucket == named and key.startswith(asked["prefix"]) and key.endswith(asked.get("suffix", ""))

    def _is_readable(self, bucket: str, key: str) -> bool:
        """Return whether an object may be passed to a model: not an owner's own upload."""
        if bucket == self._inputs_bucket_name:
            return not key.startswith(KEPT_APART)
        return bool(bucket) and bucket == self._source_bucket_name


def head_of(bucket: str, found: Mapping[str, Any]) -> Any | None:
    """Return S3's description of this very object, or None if it is gone or replaced.

    Args:
        bucket: The object's bucket.
        found: From `object_of`.
    """
    s3 = client("s3")
    at: dict[str, Any] = {"Bucket": bucket, "Key": found["key"]}
    if found["version_id"] is not None:
        at["VersionId"] = found["version_id"]
    try:
        head = s3.head_object(**at)
    except ClientError as error:
        # S3 responds with 403 for a missing object to callers that may not list the bucket; 405 for a delete marker.
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404, 405):
            raise
        return None
    return head if found["etag"] in (None, head["ETag"].strip('"')) else None


def object_of(event: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the bucket and the object of an event `Object Created`.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html

    Raises:
        RequestRefused: The event names no object.
    """
    try:
        bucket, found = event["detail"]["bucket"]["name"], event["detail"]["object"]
        key, size = found["key"], found.get("size")
        others = {name: found.get(name) for name in ("etag", "version-id", "sequencer")}
    except (KeyError, TypeError, AttributeError):
        raise RequestRefused("event: must be S3's Object Created.") from None
    texts = [bucket, key, *(value for value in others.values() if value is not None)]
    if not all(isinstance(text, str) and 1 <= len(text) <= 1024 for text in texts) or not isinstance(size, int | None):
        raise RequestRefused("event: must be S3's Object Created.")
    return bucket, {
        "bucket": bucket,
        "key": key,
        "name": key.rstrip("/").rpartition("/")[2],
        "size": size,
        "etag": others["etag"].strip('"') if others["etag"] else None,
        "version_id": others["version-id"],
        "sequencer": others["sequencer"],
    }


def _traceparent_in(event: Mapping[str, Any]) -> Any:
    """Return the trace that an event names, as this stack's own events do, or None."""
    detail = event.get("detail")
    return detail.get("traceparent") if isinstance(detail, dict) else None


def next_depth(told: Any, where: str) -> int:
    """Return one more than the given depth, or 0 without one.

    Raises:
        RequestRefused: The value is not a depth, so the number of rounds is unknown.
    """
    if told is None:
        return 0
    if isinstance(told, bool) or not re.fullmatch(r"[0-9]{1,6}", str(told), re.ASCII):
        raise RequestRefused(f"{where}: must be a whole number.")
    return int(told) + 1


def _recipe_of(item: Mapping[str, Any]) -> Recipe:
    return Recipe(
        id=item["id"],
        owner=owner_of(item["owner"]),
        name=item["name"],
        definition=json.loads(item["definition_json"]),
        state=item["state"],
        revision=item["revision"],
        created_at=item["created_at"],
        updated_at=item["updated_at"],
        deployed=item.get("deployed", False),
    )


def _url_encoded(text: str) -> str:
    """Encode a value for any part of a URL."""
    return quote(text, safe="")
