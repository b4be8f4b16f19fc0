"""Payloads of predictions: JSON text in items of their own, or in objects of the outputs bucket above a limit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from predictions.aws.dynamodb import NEW, Condition, ConditionFailed, Item, Table
from predictions.errors import PredictionsError
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.status import Status
from predictions.store.keys import FILES, PROGRESS, prediction_key, result_sk
from predictions.store.records import Prediction

if TYPE_CHECKING:
    from predictions.upstream.prediction import UpstreamPrediction

PAYLOAD_LIMIT_BYTES = 100 * 1024
"""Above this a payload goes to S3: an item holds 400 KB, and a page of a list has to hold many.
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ServiceQuotas.html"""

_FILES_LIMIT_BYTES = 16 * 1024


class PayloadTooLong(PredictionsError):
    """A payload is longer than its reader can parse."""


class Payloads:
    """The payloads of predictions.

    Args:
        outputs: The bucket that takes large payloads, and knows which strings in an output are files.
    """

    def __init__(self, table: Table, outputs: OutputsBucket) -> None:
        self._table = table
        self._outputs = outputs

    def put_text(
        self, prediction_id: str, sk: str, text: str, expires: int, *, condition: Condition | None = None,
        grows: bool = False, notice: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Store a payload, unless the condition says that the one that is there stays.

        Args:
            prediction_id: Our id of the prediction.
            sk: The sort key of the payload.
            text: The payload.
            expires: When it expires, in Unix seconds.
            condition: Of the item that is there.
            grows: Whether it replaces shorter ones only, under one name in the bucket.
            notice: More attributes of the item.
        """
        item: Item = {"expires_at": expires, "length": len(text), **(notice or {})}
        body = text.encode()
        object_key = _object_key(prediction_id, body)
        if object_key is None:
            item["json"] = text
        elif grows:
            # One object, however often it grows. It is only ever replaced by longer text, so it holds at least what the
            # item says, even if the item is written late or never.
            item["s3_key"] = f"payloads/{prediction_id}/{sk}.json"
            if not self._outputs.put_longer_payload(item["s3_key"], text):
                return
        else:
            item["s3_key"] = object_key
            self._outputs.put_payload(object_key, body)
        try:
            self._table.put_item(prediction_key(prediction_id, sk), item, condition)
        except ConditionFailed:
            return  # an earlier or longer one is there, and stays

    def put_result(self, prediction: Prediction, report: "UpstreamPrediction") -> "UpstreamPrediction":
        """Store the output and logs with which a prediction ended.

        The first ones that were reported stay, so that none is replaced by an output that Replicate has removed since.

        Returns:
            The report, with the stored output and logs if Replicate has removed them.
        """
        sk = result_sk(report.id)
        if report.data_removed:
            stored = self.get_text(prediction.id, sk)
            if stored is not None:
                return report.changed(**json.loads(stored), data_removed=False)
            if report.status == Status.SUCCEEDED:
                removed = "Replicate had removed the output before this stack could read it."
                report = report.changed(error=removed)
        self.put_text(prediction.id, sk, result_text(report.output, report.logs), prediction.expires_at, condition=NEW)
        return report

    def put_progress(self, prediction: Prediction, report: "UpstreamPrediction") -> None:
        """Store the output and logs of a running prediction; longer ones replace shorter ones."""
        # Files are shown when they are ours: until then they are not stored, and the response to a wait holds their
        # bytes.
        output = None if self._outputs.holds_files(report.output) else report.output
        if output is None and not report.logs:
            return
        text = result_text(output, report.logs)
        notice: dict[str, str] = {}
        if notify := [event for event in ("output", "logs") if event in prediction.wanted_events]:
            # For the consumer of the stream, which sees no payload that is an object: which webhooks are due, and
            # whether output or logs have changed. Not `owner`, which is a key of an index.
            digests = {"output_digest": _digest(output), "logs_digest": _digest(report.logs)}
            notice = {
                "notify": ",".join(notify),
                "notify_owner": prediction.owner,
                **{name: digest for name, digest in digests.items() if digest},
            }
        # What expires earlier is of an earlier prediction, whose key was used again.
        longer = Condition("length < :length OR expires_at < :expires", length=len(text), expires=prediction.expires_at)
        self.put_text(
            prediction.id, PROGRESS, text, prediction.expires_at, condition=NEW | longer, grows=True, notice=notice
        )

    def put_files(self, prediction: Prediction, files: Sequence[StoredFile]) -> str:
        """Write where the files of a prediction are.

        Returns:
            The attribute `files_json` of the status item: empty if they are too many for it, and an item of their own.
        """
        files_json = json.dumps([stored.to_item() for stored in files], separators=(",", ":"))
        if len(files_json) <= _FILES_LIMIT_BYTES:
            return files_json
        self.put_text(prediction.id, FILES, files_json, prediction.expires_at)
        return ""

    def empty_object(self, prediction_id: str, text: str) -> None:
        """Replace the object that `put_text` made of a text, if it made one, by an empty one."""
        if object_key := _object_key(prediction_id, text.encode()):
            self._outputs.put_payload(object_key, "{}")

    def get_text(self, prediction_id: str, sk: str, longest: int | None = None) -> str | None:
        """Read a payload, or return None if it is not there or has expired.

        Args:
            prediction_id: Our id of the prediction.
            sk: The sort key of the payload.
            longest: The most characters that may be read; None for any number.

        Raises:
            PayloadTooLong: The text is longer. Nothing was read but its length.
        """
        item = self._table.get_item(prediction_key(prediction_id, sk))
        if item is None:
            return None
        if longest is not None and item["length"] > longest:
            raise PayloadTooLong(f"{sk} has {item['length']} characters; at most {longest} can be read")
        return self.text_of(item)

    def text_of(self, item: Mapping[str, Any]) -> str | None:
        """Read the text of a payload's item, or return None if its object has expired, some days before the item."""
        if "json" in item:
            return str(item["json"])
        try:
            return self._outputs.get_payload(item["s3_key"])
        except ClientError as error:
            # S3 answers 403 for a missing object to those who may not list the bucket.
            if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied"):
                raise
            return None


def store_text(outputs: OutputsBucket, text: str, object_key: str) -> Item:
    """Store a text that is too large for an item in the bucket; return the attributes that hold it or its key."""
    if len(text.encode()) <= PAYLOAD_LIMIT_BYTES:
        return {"json": text}
    outputs.put_payload(object_key, text)
    return {"s3_key": object_key}


def _object_key(prediction_id: str, body: bytes) -> str | None:
    """Name the object that holds a payload, or return None if it fits into an item.

    The name is made of the content, so that a late writer can never replace what the item points to.
    """
    if len(body) <= PAYLOAD_LIMIT_BYTES:
        return None
    return f"payloads/{prediction_id}/{hashlib.sha256(body).hexdigest()}.json"


def result_text(output: Any, logs: str | None) -> str:
    """Write output and logs as JSON text."""
    return json.dumps({"output": output, "logs": logs}, separators=(",", ":"))


def _digest(value: Any) -> str | None:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] if value not in (None, "") else None
