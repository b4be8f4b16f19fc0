"""Reads of predictions: their payloads, pages of an owner's list, and what the sweep looks for."""

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from predictions.aws.clients import client
from predictions.aws.dynamodb import Condition, ConditionFailed, Item, Table
from predictions.clock import timestamp
from predictions.files.output_references import StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.money.stored import StackPrices
from predictions.status import Status
from predictions.store.keys import (
    FILES,
    LIVE,
    OPEN_SHARDS,
    PREDICTION,
    PROGRESS,
    input_sk,
    list_of,
    prediction_key,
    result_sk,
)
from predictions.store.payloads import Payloads
from predictions.store.records import (
    NO_FILTERS,
    Filters,
    Page,
    Prediction,
    PredictionDetail,
    Result,
    UnreadResult,
    prediction_of,
)

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from predictions.upstream.prediction import UpstreamPrediction


EXAMINED_PAGES = 10
"""How many times its size a page of a list with filters examines: a consistent read of each of 1,000 items for 100."""

# Entries of the index `due` that one call reads from a shard: about 10 KB.
_OPEN_PAGE_ITEMS = 100


class PredictionReads:
    """The predictions of the table, for readers.

    Args:
        name: The name of the table.
        outputs: The bucket that holds large payloads, and knows which strings in an output are files.
        dynamodb: The client to use.
    """

    def __init__(self, name: str, outputs: OutputsBucket, dynamodb: "DynamoDBClient") -> None:
        self._table = Table(name, dynamodb)
        self._outputs = outputs
        self._payloads = Payloads(self._table, outputs)
        self._prices = StackPrices(self._table)

    @classmethod
    def from_env(cls) -> Self:
        """Make them from `TABLE_NAME` and what `OutputsBucket.from_env` reads."""
        return cls(os.environ["TABLE_NAME"], OutputsBucket.from_env(), client("dynamodb"))

    # -- one prediction ---------------------------------------------------------------------------------------

    def get(self, prediction_id: str) -> Prediction | None:
        """Read a status item consistently, or return None if it is not there."""
        item = self._table.get_item(prediction_key(prediction_id))
        return prediction_of(item) if item else None

    def read(self, prediction_id: str) -> PredictionDetail | None:
        """Read a prediction with its payloads consistently, or return None if it is not there."""
        items = self._table.query(Condition("pk = :pk", pk=prediction_key(prediction_id).pk))
        by_sk = {item["sk"]: item for item in items}
        return self._detail(prediction_of(by_sk["status"]), by_sk) if "status" in by_sk else None

    def input_json(self, prediction: Prediction) -> str | None:
        """Read a prediction's input as JSON text, or return None if it has expired."""
        if prediction.input_json is not None:
            return prediction.input_json
        return self._payloads.get_text(prediction.id, input_sk(prediction.fingerprint))

    def result_output(self, prediction: Prediction, longest: int | None = None) -> Any:
        """Read the output with which a prediction finished, as Replicate returned it.

        Args:
            prediction: The prediction.
            longest: The most characters of output and logs together that may be read; None for any number.

        Raises:
            PayloadTooLong: The text is longer. Nothing was read but its length.
        """
        text = prediction.result_json
        if text is None:
            text = self._payloads.get_text(prediction.id, result_sk(prediction.upstream_id), longest)
        return json.loads(text)["output"] if text else None

    def is_progress(self, detail: PredictionDetail, report: "UpstreamPrediction") -> bool:
        """Return whether the output or logs of a report would be shown and are not stored yet."""
        output = None if self._outputs.holds_files(report.output) else report.output
        return output != detail.output or (report.logs or "") != (detail.logs or "")

    def begin_live_read(self, prediction: Prediction, latest: int, now: float) -> bool:
        """Record that a live read of a prediction begins; return False if one has begun after `latest`.

        In an item of its own: a write of the status item is billed by its size, and reaches the table's stream.
        """
        try:
            self._table.update_item(
                prediction_key(prediction.id, LIVE),
                set={"read_at": int(now), "expires_at": prediction.expires_at},
                condition=Condition("attribute_not_exists(read_at) OR read_at <= :latest", latest=latest),
            )
        except ConditionFailed:
            return False
        return True

    def stored_files(self, prediction: Prediction) -> Sequence[StoredFile]:
        """Read where the files of a prediction are; none before its visible end, and after its deletion."""
        files_json = prediction.files_json
        if files_json == "":
            files_json = self._payloads.get_text(prediction.id, FILES)
        return _files(files_json)

    def bound_to(self, upstream_id: str) -> str | None:
        """Find the prediction that is bound to an upstream id, as far as the index knows; None without one."""
        bound = Condition("upstream_id = :upstream_id", upstream_id=upstream_id)
        found = self._table.query_page(bound, index="by_upstream_id", limit=1)
        return str(found[0]["pk"]).removeprefix(PREDICTION) if found else None

    # -- many predictions -------------------------------------------------------------------------------------

    def get_many(self, prediction_ids: Iterable[str]) -> dict[str, Prediction]:
        """Read status items consistently, by id; those that are not there are left out."""
        found = self._table.read_items(map(prediction_key, prediction_ids))
        return {prediction.id: prediction for prediction in map(prediction_of, found.values())}

    def list(
        self, owner: str, start: str | None, *, older: bool, size: int, object: str = "prediction",  # noqa: A002  # the API's word
        created_after: datetime | None = None, created_before: datetime | None = None, filters: Filters = NO_FILTERS,
    ) -> Page:  # fmt: skip
        """Read a page of an owner's predictions, or trainings.

        The times are bounds of the index's range key: what they leave out is not read. The index has keys only, so
        `filters` need the status items: those of at most `EXAMINED_PAGES` times `size` entries are read, until the page
        is full. So a page with filters may be empty although more follow.

        Args:
            owner: Whose.
            start: The place (`Prediction.listed_at`) beside which the page starts, or None for the newest.
            older: Whether the page lies on the older side of `start`.
            size: The most predictions of a page.
            object: `prediction` or `training`: each has a list of its own.
            created_after: Only those created then or later.
            created_before: Only those created earlier.
            filters: Only those that match.
        """
        key = list_of(owner, "trainings" if object == "training" else "predictions")
        after, before = (timestamp(moment) if moment else None for moment in (created_after, created_before))
        examined = size * EXAMINED_PAGES if filters else size
        listed, more = self._table.list_page(key, start, older=older, size=examined, between=(after, before))
        found: list[Prediction] = []
        seen = 0
        while seen < len(listed) and len(found) < size:
            part = listed[seen : seen + size]
            statuses = self._table.read_items((pk, "status") for pk, _ in part)
            for pk, _ in part:
                seen += 1
                item = statuses.get((pk, "status"))
                if item and filters.match(prediction := prediction_of(item)):
                    found.append(prediction)
                if len(found) == size:
                    break
        places = [place for _, place in listed[:seen]]
        first, last = (places[0], places[-1]) if places else (None, None)
        return Page(self._details(found), more=more or seen < len(listed), first=first, last=last)

    def created_since(self, owner: str, object: str, since: datetime) -> Iterator[Prediction]:  # noqa: A002  # the API's word
        """Read the status items of an owner's predictions or trainings, newest first, without their payloads."""
        key = list_of(owner, "trainings" if object == "training" else "predictions")
        start: str | None = None
        while True:
            listed, more = self._table.list_page(key, start, older=True, size=100, between=(timestamp(since), None))
            statuses = self._table.read_items((pk, "status") for pk, _ in listed)
            yield from (prediction_of(statuses[pk, "status"]) for pk, _ in listed if (pk, "status") in statuses)
            if not more:
                return
            start = listed[-1][1]

    def results(self, prediction_ids: Sequence[str], owner: str) -> dict[str, Result]:
        """Read the results of an owner's predictions, by their ids; those that are not there are left out.

        Inputs and payloads that are objects are not read: so many may be asked for at once.
        """
        predictions = [p for p in self.get_many(prediction_ids).values() if p.owner == owner]
        wanted = [
            prediction_key(p.id, sk)
            for p in predictions
            if p.ended_visibly and p.status == Status.SUCCEEDED and not p.deleted and not p.files_json
            for sk in _result_sks(p)
        ]
        payloads = {key: item.get("json") for key, item in self._table.read_items(wanted).items()}
        results = {}
        for prediction in predictions:
            files_key = prediction_key(prediction.id, FILES)
            files = _files(prediction.files_json or payloads.get(files_key))
            # An output with files names upstream's URLs.
            has_files = files or files_key in payloads
            result_key = prediction_key(prediction.id, result_sk(prediction.upstream_id))
            text = None if has_files else prediction.result_json or payloads.get(result_key)
            output_json = json.dumps(json.loads(text)["output"], separators=(",", ":")) if text else None
            results[prediction.id] = Result(prediction, output_json, files)
        return results

    def unread_results(self, prediction_ids: Sequence[str]) -> Sequence[UnreadResult]:
        """Read how long the results of predictions are, in this order; `result_text` reads one of them.

        Those that are not there are left out.
        """
        predictions = self.get_many(prediction_ids)
        wanted = [
            prediction_key(p.id, sk)
            for p in predictions.values()
            if p.ended_visibly and not p.deleted
            for sk in _result_sks(p)
        ]
        items = self._table.read_items(wanted)
        results = []
        for prediction in (predictions[id_] for id_ in prediction_ids if id_ in predictions):
            item = _in_status(prediction) or items.get(prediction_key(prediction.id, result_sk(prediction.upstream_id)))
            files = items.get(prediction_key(prediction.id, FILES))
            files_json = None if prediction.deleted else prediction.files_json
            if files:
                files_json = self._payloads.text_of(files)
            length = int(item.get("length") or len(item.get("json", ""))) if item else 0
            results.append(UnreadResult(prediction, length, _files(files_json), item))
        return results

    def result_text(self, result: UnreadResult) -> str | None:
        """Read the JSON text `{"output", "logs"}` of a result, or return None without one, or if it has expired."""
        return self._payloads.text_of(result.item) if result.item else None

    # -- what is open -----------------------------------------------------------------------------------------

    def due(self, now: float, limit: int, shards: Iterable[str] = OPEN_SHARDS) -> Iterator[str]:
        """Find the keys (`pk`) of open items whose `next_check_at` has passed, the longest overdue first.

        Args:
            now: The time.
            limit: The most keys.
            shards: Where to look. Each is read as far as the keys that are taken reach, a page at a time.
        """
        return islice(self._open_items("next_check_at <= :moment", now, shards), limit)

    def open_from(self, earliest: float) -> Iterator[str]:
        """Find the keys (`pk`) of open items that are checked at a time or later, the earliest first."""
        return self._open_items("next_check_at >= :moment", earliest, OPEN_SHARDS)

    def _open_items(self, when: str, moment: float, shards: Iterable[str]) -> Iterator[str]:
        found = (
            self._table.query(
                Condition(f"open = :open AND {when}", open=shard, moment=int(moment)),
                index="due",
                page_items=_OPEN_PAGE_ITEMS,
            )
            for shard in shards
        )
        return (str(item["pk"]) for item in heapq.merge(*found, key=lambda item: int(item["next_check_at"])))

    def count_open(self) -> dict[str, int]:
        """Count what is open by shard: predictions, trainings, pipelines, batches. Empty shards are left out.

        At most a page of the index (1 MB, about 10,000 items) of each.
        """
        return self._count(OPEN_SHARDS, "")

    def count_due(self, now: float, shards: Iterable[str]) -> dict[str, int]:
        """Count the open items whose `next_check_at` has passed, as `count_open`."""
        return self._count(shards, " AND next_check_at <= :now", now=int(now))

    def _count(self, shards: Iterable[str], when: str, **values: int) -> dict[str, int]:
        counts = {}
        for shard in shards:
            keys = Condition(f"open = :open{when}", open=shard, **values)
            counts[shard] = next(self._table.count_items(keys, index="due"))
        return {shard: count for shard, count in counts.items() if count}

    # -- inside -----------------------------------------------------------------------------------------------

    def _details(self, predictions: Sequence[Prediction]) -> Iterator[PredictionDetail]:
        """Read the payloads of predictions, in this order, in as few calls as the payloads' sizes allow."""
        wanted = []
        for prediction in predictions:
            if prediction.deleted:
                continue
            sks = [] if prediction.input_json is not None else [input_sk(prediction.fingerprint)]
            if prediction.upstream_id and not prediction.terminal:
                sks.append(PROGRESS)
            elif prediction.ended_visibly:
                sks += _result_sks(prediction)
            elif prediction.upstream_id:
                sks.append(result_sk(prediction.upstream_id))
            wanted += [prediction_key(prediction.id, sk) for sk in sks]
        payloads = self._table.read_items(wanted)
        for prediction in predictions:
            pk = prediction_key(prediction.id).pk
            yield self._detail(prediction, {sk: item for (of, sk), item in payloads.items() if of == pk})

    def _detail(self, prediction: Prediction, items: Mapping[str, Item]) -> PredictionDetail:
        if prediction.deleted:
            # Payloads may still be there, or be written late.
            return PredictionDetail(prediction, input={}, output=None, logs=None, files=[])
        asked = items.get(input_sk(prediction.fingerprint))
        # What expires earlier is of an earlier prediction, whose key was used again once it had expired.
        items = {
            sk: i for sk, i in items.items() if i.get("expires_at", prediction.expires_at) >= prediction.expires_at
        }
        result = _in_status(prediction) or items.get(
            result_sk(prediction.upstream_id) if prediction.terminal else PROGRESS
        )
        result_json = self._payloads.text_of(result) if result else None
        said = json.loads(result_json) if result_json else {"output": None, "logs": None}
        files_json = prediction.files_json or (self._payloads.text_of(items[FILES]) if FILES in items else None)
        input_json = prediction.input_json or (self._payloads.text_of(asked) if asked else None)
        if (result and result_json is None) or input_json is None:
            prediction = replace(prediction, data_removed=True)
        return PredictionDetail(
            prediction=prediction,
            input=json.loads(input_json) if input_json else {},
            output=said["output"],
            logs=said["logs"],
            files=_files(files_json),
            input_key=asked.get("s3_key") if asked else None,
            result_key=result.get("s3_key") if result else None,
            live_read_at=items.get(LIVE, {}).get("read_at"),
        )


def _result_sks(prediction: Prediction) -> list[str]:
    """Return the sort keys of the payloads with which a visibly finished prediction ended, besides its status item."""
    if prediction.result_json is not None:
        return []  # it has no files
    return [
        *([result_sk(prediction.upstream_id)] if prediction.upstream_id else []),
        *([] if prediction.files_json else [FILES]),
    ]


def _in_status(prediction: Prediction) -> Item | None:
    """Return the result that is in the status item as an item of its own would hold it; None if it is not there."""
    return {"json": prediction.result_json} if prediction.result_json is not None else None


def _files(files_json: str | None) -> list[StoredFile]:
    return [StoredFile.from_item(item) for item in json.loads(files_json or "[]")]
