"""Schemas of models' inputs by version: JSON text in the table, or in the outputs bucket above a limit."""

import contextlib
import hashlib

from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Table
from predictions.files.outputs_bucket import OutputsBucket
from predictions.store.keys import schema_key
from predictions.store.payloads import Payloads, store_text
from predictions.store.records import StoredSchema


class StoredSchemas:
    """The schemas in the table.

    Args:
        outputs: The bucket that takes large schemas.
    """

    def __init__(self, table: Table, outputs: OutputsBucket) -> None:
        self._table = table
        self._outputs = outputs
        self._payloads = Payloads(table, outputs)

    @classmethod
    def from_env(cls) -> "StoredSchemas":
        """Make them from `TABLE_NAME` and what `OutputsBucket.from_env` reads."""
        return cls(Table.from_env(), OutputsBucket.from_env())

    def get_schema(self, version: str, now: float) -> StoredSchema | None:
        """Read what is stored of a version, or return None if that is nothing, or has expired."""
        item = self._table.get_item(schema_key(version), consistent=False)
        # TTL deletes late, by some days.
        if not item or item["expires_at"] <= now:
            return None
        text = self._payloads.text_of(item) if {"json", "s3_key"} & item.keys() else None
        return StoredSchema(item.get("model"), text)

    def put_schema(self, version: str, text: str, expires: int, model: str) -> None:
        """Store the schema of a version's input; the last writer wins, since a version never changes."""
        object_key = f"payloads/schemas/{version}/{hashlib.sha256(text.encode()).hexdigest()}.json"
        stored = store_text(self._outputs, text, object_key)
        self._table.put_item(schema_key(version), {"expires_at": expires, "model": model, **stored})

    def put_model(self, version: str, model: str, expires: int, now: float) -> None:
        """Store the model of a version, unless something is stored of the version already."""
        unknown = NEW | Condition("expires_at <= :now", now=int(now))
        # Another writer's is as good.
        with contextlib.suppress(ConditionFailed):
            self._table.put_item(schema_key(version), {"expires_at": expires, "model": model}, unknown)
