"""Every key of the table: the `pk` and `sk` of its items, and the lists of the index `by_owner`.

Packages below this one cannot import from here, and have the keys of their items themselves: `admission.rate_limiter`
(`limiter`; `limiter#{0-f}`), `admission.live_budget` (`live_reads`),
`admission.quotas` (`owner#{owner}`, `limits`; `usage#{owner}`), `money.budgets` (`usage#{owner}`, `budget#…`),
and `files.uploads` (`file#{id}`, `file`).
"""

import hashlib
from typing import Literal

from predictions.aws.dynamodb import Key

# -- predictions and trainings ------------------------------------------------------------------------------------

PREDICTION = "prediction#"
PROGRESS = "progress"
FILES = "files"
LIVE = "live"
CALLER = "caller#"


def prediction_key(prediction_id: str, sk: str = "status") -> Key:
    """Name the status of a prediction, or another one of its items."""
    return Key(f"{PREDICTION}{prediction_id}", sk)


def input_sk(fingerprint: str) -> str:
    """Name the input of a prediction."""
    return f"input#{fingerprint}"


def result_sk(upstream_id: str | None) -> str:
    """Name the output and logs with which a prediction ended upstream."""
    return f"result#{upstream_id}"


def caller_key(prediction_id: str, task_token: str) -> Key:
    """Name the task token of a state that waits for a prediction."""
    return prediction_key(prediction_id, f"{CALLER}{hashlib.sha256(task_token.encode()).hexdigest()}")


def upstream_key(upstream_id: str) -> Key:
    """Name the reservation of an upstream id for a prediction that is found by its likeness."""
    return Key(f"upstream#{upstream_id}", "upstream")


def listed_key(upstream_id: str) -> Key:
    """Name what is remembered of an entry of Replicate's list; see `lifecycle.reconcile`."""
    return Key(f"listed#{upstream_id}", "listed")


def unknown_key(sk: str) -> Key:
    """Name an entry of the outbox of creates with an unknown outcome; see `lifecycle.reconcile`."""
    return Key("unknown", sk)


READING_LEASE = Key("readings", "lease")
BREAKER = Key("readings", "breaker")


def schema_key(version: str) -> Key:
    """Name the record of a model's version; see `store.schemas`."""
    return Key(f"schema#{version}", "input")


# -- requests -----------------------------------------------------------------------------------------------------


def recent_key(owner: str, fingerprint: str) -> Key:
    """Name the latest request of a client that may send it again; see `store.recent_requests`."""
    return Key(f"recent#{owner}#{fingerprint}", "recent")


def idempotency_key(kind: Literal["batch", "pipeline"], owner: str, key: str) -> Key:
    """Name what an owner's idempotency key is bound to; see `store.idempotency_keys`."""
    hashed = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
    return Key(f"{kind}#{hashed}", "key")


def message_key(message_id: str) -> Key:
    """Name the tries of a message of the requests queue; see `intake.redelivery`."""
    return Key(f"message#{message_id}", "tries")


# -- batches, pipelines and recipes -------------------------------------------------------------------------------


def batch_key(batch_id: str) -> Key:
    """Name a batch; see `batches.store`."""
    return Key(f"batch#{batch_id}", "status")


def pipeline_key(pipeline_id: str, sk: str = "status") -> Key:
    """Name the status of a pipeline, or another one of its items; see `pipelines.store`."""
    return Key(f"pipeline#{pipeline_id}", sk)


def recipe_key(recipe_id: str) -> Key:
    """Name a recipe; see `recipes.store`."""
    return Key(f"recipe#{recipe_id}", "recipe")


def recipe_name_key(owner: str, name: str) -> Key:
    """Name the id that the name of a recipe has."""
    return Key(f"recipe#{owner}#{name}", "name")


DEPLOYED_RECIPES = Key("recipe#deployed", "names")

# -- owners and callers -------------------------------------------------------------------------------------------

TOKENS_PK = "tokens"


def token_key(hashed: str) -> Key:
    """Name an access token by its hash; see `api.access_tokens`."""
    return Key(TOKENS_PK, hashed)


def webhook_secret_key(owner: str) -> Key:
    """Name the version of an owner's signing secret; see `notifications.signing_secrets`."""
    return Key(f"owner#{owner}", "webhook_secret")


def webhook_slots_key(owner: str) -> Key:
    """Name the slots of an owner's webhooks; see `notifications.webhook_slots`."""
    return Key(f"owner#{owner}", "webhook_slots")


def webhook_order_key(prediction_id: str, created: int) -> Key:
    """Name what was sent of a prediction; see `notifications.webhook_order`.

    With the time of its creation: a key that is used again after the retention names another prediction.
    """
    return Key(f"webhooks#{prediction_id}", str(created))


def response_key(path: str) -> Key:
    """Name a response of Replicate that does not change; see `api.proxy`."""
    return Key(f"forwarded#{path}", "answer")


# -- what is open: the attribute `open`, by which the index `due` is read -------------------------------------------

# DynamoDB writes 1,000 units a second to one key of an index. A shard takes a sixteenth of the writes.
# https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/bp-partition-key-design.html
_SHARDS = tuple(f"open#{digit:x}" for digit in range(16))
OPEN_SHARDS = ("open", *_SHARDS)
"""Every value of `open`. Items of releases before the shards have the first one, which writes keep (`IfNotExists`).

`open` can be left out once the longest `RetentionDays` of any stack has passed since its upgrade to the shards.
"""


def shard_of(id_: str) -> str:
    """Name the shard of a prediction, pipeline or batch that is open: the same one each time."""
    return _SHARDS[hashlib.sha256(id_.encode()).digest()[-1] % len(_SHARDS)]


# -- lists: the attribute `owner`, by which the index `by_owner` is read. No owner's name holds a `#`. --------------

List = Literal["predictions", "trainings", "batches", "pipelines", "recipes"]


def list_of(owner: str, kind: List) -> str:
    """Name an owner's list of a kind of items: each kind has a list of its own."""
    return owner if kind == "predictions" else f"{kind}#{owner}"


def owner_of(listed: str) -> str:
    """Read the owner from the name of a list."""
    return listed.rpartition("#")[2]
