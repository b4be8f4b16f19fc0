"""Recipes: named templates of requests, filled from events.

A recipe is an item, `pk` = `recipe#{id}`, `sk` = `recipe`, with its definition as JSON text, the way its owner wrote it
and `recipes.manage` checked it. Its id is 26 random characters: the messages that its rule or schedule puts
into the requests queue name it, and who knows it may start the recipe for its owner. `pk` = `recipe#{owner}#{name}`,
`sk` = `name` holds the id that a name has, so that an owner has one recipe of a name. `pk` = `recipe#deployed` lists
those that came with a deployment (see `recipes.deployment`).

An expression in a template sees:

    event       the whole event, where there is one
    object      of S3's `Object Created`: `bucket`, `key`, `name` (the key's end), `size`, `etag`, `version_id`,
                `sequencer`, `content_type`, `metadata`, and `url`, a link that a model can open
    schedule    of a schedule: `time`, when it was due
    recipe      `id` and `name`
    row         of a batch by the recipe's name: a line of its manifest; then there is no `event`
    defaults    the recipe's own

A field of `input` whose placeholder finds nothing takes the value of that name in `defaults`.
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
from predictions.aws.dynamodb import deserialize, list_page, read_items, serialize
from predictions.clock import rfc3339
from predictions.files.links import Links
from predictions.files.output_references import ORIGIN_DEPTH
from predictions.files.outputs_bucket import safe_prefix
from predictions.ids import is_id
from predictions.intents.model import Intent, create_requested_intent
from predictions.intents.sources import Message, RequestRefused
from predictions.observability import MetricUnit, logger, metrics
from predictions.templating import Allowance, Filler, NothingFound, PlaceholderError

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

EVENT_SOURCE = "replicate-serverless"
"""The source of this stack's own events."""

KEPT_APART = ("files/", "batches/")
"""Prefixes of the inputs bucket that are no recipe's: owners' uploads, and manifests."""

Kind = Literal["s3", "pattern", "schedule"]
State = Literal["pending", "active", "deleting"]

# Longer than a prediction may live, with the days that its message may wait.
_LINK_SECONDS = 7 * 86400
_LINK_LEFT_SECONDS = 3 * 86400
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z", re.ASCII)
_DEPLOYED_KEY = serialize({"pk": "recipe#deployed", "sk": "names"})
_REQUEST_FIELDS = ("model", "version", "deployment", "webhook_events_filter", "lifetime")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        id: 26 characters `[a-z0-9]`.
        owner: Whose it is, and whose predictions are those that it starts.
        name: Unique among its owner's.
        definition: What its owner wrote, without the name.
        state: `active` when its rule or schedule is there; `pending` when it may not be; `deleting` when nothing may
            be started by it any more.
        revision: Another one with each change.
        created_at: RFC 3339, UTC.
        updated_at: RFC 3339, UTC.
        deployed: Whether it came from a file with the stack's deployment.
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
        """What starts it; None for one that is only named by others."""
        kinds: tuple[Kind, ...] = ("s3", "pattern", "schedule")
        return next((kind for kind in kinds if kind in self.definition), None)

    @property
    def listed_at(self) -> str:
        """Its place in its owner's list."""
        return f"{self.created_at}#{self.id}"

    def request(self, context: Mapping[str, Any], allowance: Allowance | None = None) -> dict[str, Any]:
        """The request that it makes of a context: a `RequestBody`, yet to be checked.

        Args:
            context: As the module says; `recipe` and `defaults` are added.
            allowance: What filling may use, shared with `output_prefix`; by default one of its own.

        Raises:
            PlaceholderError: A placeholder finds nothing and has no default, or cannot be filled.
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
        if "webhook" in self.definition:
            # Values are names and fields of strangers: encoded, none of them adds a parameter or ends the URL.
            made["webhook"] = filler.fill(self.definition["webhook"], "webhook", encode=_url_encoded)
        return {**made, "input": values}

    def output_prefix(self, context: Mapping[str, Any], allowance: Allowance | None = None) -> str | None:
        """Where in its owner's part of the outputs bucket results go; None for the usual place.

        Args:
            context: As for `request`.
            allowance: Likewise.

        Raises:
            TooSlow: The time of the allowance is used up.
            PlaceholderError: A placeholder finds nothing or cannot be filled.
        """
        usual = "{{ object.key }}" if self.kind == "s3" and "object" in context else ""
        template = self.definition.get("output_prefix", usual)
        filled = self._filler(context, allowance).fill(template, "output_prefix")
        return safe_prefix(filled if isinstance(filled, str) else json.dumps(filled)) or None

    def _filler(self, context: Mapping[str, Any], allowance: Allowance | None) -> Filler:
        recipe = {"id": self.id, "name": self.name}
        return Filler({**context, "recipe": recipe, "defaults": self.definition.get("defaults", {})}, allowance)


class RecipeItems:
    """The recipes in the table.

    Args:
        table_name: The table.
        dynamodb: The client to use.
    """

    def __init__(self, table_name: str, dynamodb: "DynamoDBClient") -> None:
        self._table_name = table_name
        self._dynamodb = dynamodb

    @classmethod
    def from_env(cls) -> "RecipeItems":
        """Those in the table named by `TABLE_NAME`."""
        return cls(os.environ["TABLE_NAME"], client("dynamodb"))

    def find(self, recipe_id: str) -> Recipe | None:
        """A recipe by its id, read consistently."""
        found = self._dynamodb.get_item(
            TableName=self._table_name, Key=_key(recipe_id), ConsistentRead=True
        ).get("Item")  # fmt: skip
        return _recipe_of(deserialize(found)) if found else None

    def named(self, owner: str, name: str) -> Recipe | None:
        """An owner's recipe of that name, read consistently."""
        recipe_id = self.id_of(owner, name)
        return self.find(recipe_id) if recipe_id else None

    def id_of(self, owner: str, name: str) -> str | None:
        """The id that a name has; there may be no recipe with it, of which only the name was written yet."""
        found = self._dynamodb.get_item(
            TableName=self._table_name, Key=_name_key(owner, name), ConsistentRead=True
        ).get("Item")  # fmt: skip
        return str(deserialize(found)["id"]) if found else None

    def deployed(self) -> set[tuple[str, str]]:
        """Owners and names of the recipes that a deployment has made, or was about to make."""
        found = self._dynamodb.get_item(
            TableName=self._table_name, Key=_DEPLOYED_KEY, ConsistentRead=True
        ).get("Item")  # fmt: skip
        return {(owner, name) for owner, name in deserialize(found)["recipes"]} if found else set()

    def note_deployed(self, recipes: Iterable[tuple[str, str]]) -> None:
        """Writes down which recipes are a deployment's, by owner and name. Twice does no harm."""
        noted = {**deserialize(_DEPLOYED_KEY), "recipes": [list(each) for each in sorted(recipes)]}
        self._dynamodb.put_item(TableName=self._table_name, Item=serialize(noted))

    def page(self, owner: str, start: str | None, *, older: bool, size: int) -> tuple[list[Recipe], bool]:
        """A page of an owner's recipes, from its start on, away from it; and whether there are further ones beyond."""
        key = _listed_owner(owner)
        pks, more = list_page(self._dynamodb, self._table_name, key, start, older=older, size=size)
        found = read_items(self._dynamodb, self._table_name, [(pk, "recipe") for pk in pks])
        return [_recipe_of(found[pk, "recipe"]) for pk in pks if (pk, "recipe") in found], more

    def claim_name(self, owner: str, name: str, new_id: str) -> str:
        """Gives a name an id, where it has none; the id that it has."""
        values = serialize({"pk": f"recipe#{owner}#{name}", "sk": "name", "id": new_id})
        try:
            self._dynamodb.put_item(
                TableName=self._table_name, Item=values, ConditionExpression="attribute_not_exists(pk)"
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            # Somebody else's, or this very write, whose answer botocore missed.
            return self.id_of(owner, name) or new_id
        return new_id

    def put(self, recipe: Recipe, *, replaces: Recipe | None) -> bool:
        """Writes a recipe; whether what is there was what it replaces (None: nothing)."""
        item = {
            "pk": f"recipe#{recipe.id}",
            "sk": "recipe",
            "id": recipe.id,
            # Another owner than that of predictions, so that their lists stay apart.
            "owner": _listed_owner(recipe.owner),
            "listed_at": recipe.listed_at,
            "name": recipe.name,
            "definition_json": json.dumps(recipe.definition, separators=(",", ":"), ensure_ascii=False),
            "state": recipe.state,
            "revision": recipe.revision,
            "created_at": recipe.created_at,
            "updated_at": recipe.updated_at,
            "deployed": recipe.deployed,
        }
        condition, values = "attribute_not_exists(pk)", {":revision": recipe.revision}
        if replaces is not None:
            condition, values = "#revision = :replaced", {**values, ":replaced": replaces.revision}
        try:
            self._dynamodb.put_item(
                TableName=self._table_name,
                Item=serialize(item),
                # The second half: this very write, whose answer botocore missed.
                ConditionExpression=f"{condition} OR #revision = :revision",
                ExpressionAttributeNames={"#revision": "revision"},
                ExpressionAttributeValues=serialize(values),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def set_state(self, recipe: Recipe, state: State) -> bool:
        """Changes the state of a recipe that nobody has changed meanwhile; whether that was so."""
        try:
            self._dynamodb.update_item(
                TableName=self._table_name,
                Key=_key(recipe.id),
                UpdateExpression="SET #state = :state",
                ConditionExpression="#revision = :revision",
                ExpressionAttributeNames={"#state": "state", "#revision": "revision"},
                ExpressionAttributeValues=serialize({":state": state, ":revision": recipe.revision}),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True

    def erase(self, recipe: Recipe) -> bool:
        """Removes a recipe that nobody has changed meanwhile, then its name; whether it is gone."""
        try:
            self._dynamodb.delete_item(
                TableName=self._table_name,
                Key=_key(recipe.id),
                ConditionExpression="attribute_not_exists(pk) OR #revision = :revision",
                ExpressionAttributeNames={"#revision": "revision"},
                ExpressionAttributeValues=serialize({":revision": recipe.revision}),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        # A crash before this leaves a name with an id of its own, which the next recipe of that name takes over.
        try:
            self._dynamodb.delete_item(
                TableName=self._table_name,
                Key=_name_key(recipe.owner, recipe.name),
                ConditionExpression="id = :id",
                ExpressionAttributeValues=serialize({":id": recipe.id}),
            )
        except self._dynamodb.exceptions.ConditionalCheckFailedException:
            logger.info("its name is another recipe's already", recipe_id=recipe.id)
        return True


@dataclass(frozen=True)
class _Occurrence:
    """Something that happened, as a recipe sees it.

    Attributes:
        context: What its expressions look into.
        key: The same for the same occurrence, however often it is told of.
        depth: How many results of this stack it descends from.
    """

    context: dict[str, Any]
    key: str
    depth: int


class _NotWanted(Exception):
    """A message that starts nothing, and that nobody has to look at."""


class Recipes:
    """Turns messages of recipes' rules and schedules into intents.

    Args:
        items: The recipes.
        links: Makes links to objects.
        inputs_bucket_name: The stack's inputs bucket.
        source_bucket_name: The team's own bucket; empty where there is none.
        outputs_bucket_name: Whose objects are never handed to a model by a recipe.
        max_origin_depth: The most results of this stack that a request may descend from.
        allow_loopback_webhooks: Whether a webhook may go to this machine (the local cloud's setting).
        now: The time, in seconds since 1970.
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
        """From the environment of start_from_queue."""
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
        """The intent of a message `{"recipe_id", "event"}`; see `intake.queue.Source`.

        Returns:
            The intent; None where the recipe or the object is gone, or the event is no longer this recipe's.

        Raises:
            RequestRefused: The event cannot be read or descends from too many results, or a placeholder finds nothing.
            Problem: 422, where what was filled in is no request.
        """
        recipe_id, event = body["recipe_id"], body.get("event")
        if not isinstance(recipe_id, str) or not is_id(recipe_id):
            raise RequestRefused("recipe_id: not the id of a recipe.")
        if not isinstance(event, dict):
            raise RequestRefused("event: has to be an object.")
        recipe = self._items.find(recipe_id)
        try:
            if recipe is None or recipe.state == "deleting":
                raise _NotWanted("the recipe is gone")
            occurrence = self._occurrence(recipe, event, message)
        except _NotWanted as reason:
            logger.info("event dropped", reason=str(reason), recipe_id=recipe_id)
            metrics.add_metric(name="EventsDropped", unit=MetricUnit.Count, value=1)
            return None
        if occurrence.depth > self._max_origin_depth:
            raise RequestRefused(
                f"It descends from {occurrence.depth} results of this stack, one after the other, and MaxOriginDepth "
                f"allows {self._max_origin_depth}: recipe {recipe.name} probably starts itself."
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
            allow_loopback_webhooks=self._allow_loopback_webhooks,
        )

    def _occurrence(self, recipe: Recipe, event: dict[str, Any], message: Message) -> _Occurrence:
        if recipe.kind == "schedule":
            due = event.get("time")
            if isinstance(due, str) and _TIME.fullmatch(due):
                return _Occurrence({"event": event, "schedule": {"time": due}}, f"schedule {due}", 0)
            # Where nobody put the time in (the local cloud's scheduler does not): the message stands for it.
            sent = rfc3339(message.sent_at)
            return _Occurrence({"event": event, "schedule": {"time": sent}}, f"message {message.id}", 0)
        if event.get("source") == "aws.s3" and event.get("detail-type") == "Object Created":
            return self._object_created(recipe, event, message)
        if recipe.kind != "pattern":
            raise _NotWanted("the event is not one of this recipe")
        event_id, detail = event.get("id"), event.get("detail")
        if not isinstance(event_id, str) or not 1 <= len(event_id) <= 256:
            raise RequestRefused("event.id: has to be 1 to 256 characters.")
        detail = detail if isinstance(detail, dict) else {}
        if event.get("source") != EVENT_SOURCE:
            # An application that tells of our results in events of its own can hand the depth on.
            depth = next_depth(detail.get(ORIGIN_DEPTH), f"event.detail.{ORIGIN_DEPTH}")
        elif detail.get("owner") != recipe.owner:
            raise _NotWanted("the event is another owner's")
        else:
            depth = next_depth(detail.get("depth", 0), "event.detail.depth")
            # The stream may tell of one change twice, and EventBridge gives each its own id.
            told = detail.get("event_id")
            event_id = told if isinstance(told, str) and 1 <= len(told) <= 256 else event_id
        return _Occurrence({"event": event}, f"event {event_id}", depth)

    def _object_created(self, recipe: Recipe, event: dict[str, Any], message: Message) -> _Occurrence:
        bucket, found = object_of(event)
        if bucket == self._outputs_bucket_name:
            raise RequestRefused("event: objects of the outputs bucket start nothing.")
        if recipe.kind == "s3" and not self._is_of(recipe, bucket, found["key"]):
            raise _NotWanted("the event is not one of this recipe")
        depth = 0
        if self._is_readable(bucket, found["key"]):
            head = head_of(bucket, found)
            if head is None:
                # Its owner took it back, or another one took its place, of which another event tells.
                raise _NotWanted("the object is gone")
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
        """Whether an object is below a recipe's prefix, which its owner may have changed since the event."""
        asked: Mapping[str, Any] = recipe.definition["s3"]
        named = self._source_bucket_name if asked.get("bucket") == "source" else self._inputs_bucket_name
        return bucket == named and key.startswith(asked["prefix"]) and key.endswith(asked.get("suffix", ""))

    def _is_readable(self, bucket: str, key: str) -> bool:
        """Whether an object may be handed to a model: not what owners have uploaded for themselves."""
        if bucket == self._inputs_bucket_name:
            return not key.startswith(KEPT_APART)
        return bool(bucket) and bucket == self._source_bucket_name


def head_of(bucket: str, found: Mapping[str, Any]) -> Any | None:
    """What S3 says of this very object; None where it is gone, or another one has its key.

    Args:
        bucket: Where it is.
        found: Of `object_of`.
    """
    s3 = client("s3")
    at: dict[str, Any] = {"Bucket": bucket, "Key": found["key"]}
    if found["version_id"] is not None:
        at["VersionId"] = found["version_id"]
    try:
        head = s3.head_object(**at)
    except ClientError as error:
        # 403 is S3's answer for a missing object to those who may not list the bucket; 405 for a delete marker.
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404, 405):
            raise
        return None
    return head if found["etag"] in (None, head["ETag"].strip('"')) else None


def object_of(event: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The bucket and the object that an event `Object Created` tells of.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-events.html

    Raises:
        RequestRefused: It tells of none.
    """
    try:
        bucket, found = event["detail"]["bucket"]["name"], event["detail"]["object"]
        key, size = found["key"], found.get("size")
        others = {name: found.get(name) for name in ("etag", "version-id", "sequencer")}
    except (KeyError, TypeError, AttributeError):
        raise RequestRefused("event: not S3's Object Created.") from None
    texts = [bucket, key, *(value for value in others.values() if value is not None)]
    if not all(isinstance(text, str) and 1 <= len(text) <= 1024 for text in texts) or not isinstance(size, int | None):
        raise RequestRefused("event: not S3's Object Created.")
    return bucket, {
        "bucket": bucket,
        "key": key,
        "name": key.rstrip("/").rpartition("/")[2],
        "size": size,
        "etag": others["etag"].strip('"') if others["etag"] else None,
        "version_id": others["version-id"],
        "sequencer": others["sequencer"],
    }


def next_depth(told: Any, where: str) -> int:
    """One more than the depth that something carries; 0 where it carries none.

    Raises:
        RequestRefused: What it carries is no depth: it cannot be told how often it went round.
    """
    if told is None:
        return 0
    if isinstance(told, bool) or not re.fullmatch(r"[0-9]{1,6}", str(told), re.ASCII):
        raise RequestRefused(f"{where}: has to be a whole number.")
    return int(told) + 1


def _recipe_of(item: Mapping[str, Any]) -> Recipe:
    return Recipe(
        id=item["id"],
        owner=item["owner"].removeprefix("recipes#"),
        name=item["name"],
        definition=json.loads(item["definition_json"]),
        state=item["state"],
        revision=item["revision"],
        created_at=item["created_at"],
        updated_at=item["updated_at"],
        deployed=item.get("deployed", False),
    )


def _url_encoded(text: str) -> str:
    """A value as a part of a URL, whichever part that is."""
    return quote(text, safe="")


def _listed_owner(owner: str) -> str:
    return f"recipes#{owner}"


def _key(recipe_id: str) -> dict[str, Any]:
    return serialize({"pk": f"recipe#{recipe_id}", "sk": "recipe"})


def _name_key(owner: str, name: str) -> dict[str, Any]:
    return serialize({"pk": f"recipe#{owner}#{name}", "sk": "name"})
