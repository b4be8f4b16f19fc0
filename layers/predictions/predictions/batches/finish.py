"""State FinishBatch: write the result of each line of a batch, in the manifest's order, and complete the batch.

Counts and results are read from the predictions themselves, not from their notifications. Data is streamed, so that
memory use does not grow with the batch; running twice writes the same.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice
from typing import Any

from predictions.batches.files import lines_key, new_object, read_jsonl, refused_key, results_key
from predictions.batches.store import Batch, Batches, all_lines_failed
from predictions.clock import backoff_seconds
from predictions.money.cost import Cost
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction, Result

# One BatchGetItem: https://docs.aws.amazon.com/amazondynamodb/latest/APIReference/API_BatchGetItem.html
_CHUNK = 100

OUTPUT_LIMIT_BYTES = 32 * 1024
"""The longest output in a line of the results; that of a longer one is at `GET /predictions/{id}`."""

_LONGEST_WAIT_SECONDS = 300
# The number of running lines that are canceled in one lap; the others follow in the next.
_CANCELED_AT_ONCE = 1000


def finish(
    batches: Batches, table: PredictionsTable, batch_id: str, attempt: int, lap: int, *, exceeded: bool
) -> dict[str, Any]:
    """Write the results of an attempt and complete it, once no line is running.

    Args:
        batches: The batches.
        table: The predictions.
        batch_id: The id of the batch.
        attempt: The number of the attempt.
        lap: How often this was called before: the more often, the longer the wait.
        exceeded: Whether more lines failed than the batch tolerates: then the running ones are canceled.

    Returns:
        `{"open": …}`, the number of lines still running, and the seconds until the next call.
    """
    batch = batches.find(batch_id)
    if batch is None or batch.attempt != attempt or batch.ended:
        return {"open": 0, "lap": lap, "wait_seconds": 1}
    if exceeded and batch.stop is None:
        batch = batches.stop(batch, "exceeded") or batches.find(batch_id) or batch
    counts = dict.fromkeys(("succeeded", "failed", "canceled", "refused"), 0)
    key = results_key(batch.owner, batch.id, attempt)
    try:
        with new_object(batches.bucket_name, key) as writer:
            for result in _results(batches, table, batch):
                counts[result["status"]] += 1
                writer.write_json(result)
    except _LinesOpen as found:
        if batch.stop:
            _cancel(table, found.predictions, batches.now())
        return {"open": found.count, "lap": lap + 1, "wait_seconds": backoff_seconds(5, lap, _LONGEST_WAIT_SECONDS)}
    # With an `error` it has no lines, and `stop` tells what its owner or the tolerance decided, whatever the counts.
    unstopped = "failed" if all_lines_failed(counts) else "succeeded"
    status = {"canceled": "canceled", "exceeded": "failed"}.get(batch.stop or "", unstopped)
    ended = batches.end(batch, status="failed" if batch.error else status, counts=counts, results_key=key)
    # A cancel that is stored while the results are written shows in the status: the next call completes it.
    stopped = ended is None and (there := batches.find(batch_id)) and there.stop != batch.stop
    return {"open": int(bool(stopped)), "lap": lap, "wait_seconds": 1}


class _LinesOpen(Exception):  # not an error: the results must wait
    """Some lines are still running."""

    def __init__(self, predictions: Sequence[Prediction], count: int) -> None:
        super().__init__(str(count))
        self.predictions = predictions
        self.count = count


def _results(batches: Batches, table: PredictionsTable, batch: Batch) -> Iterator[dict[str, Any]]:
    """Return the results of all lines, in the manifest's order.

    Raises:
        _LinesOpen: Some are still running.
    """
    waiting: list[Prediction] = []
    open_count = 0
    found = _found(batches, batch)
    while chunk := list(islice(found, _CHUNK)):
        ids = {entry["n"]: batch.prediction_id(entry["n"], batch.attempt) for entry in chunk if "status" not in entry}
        results = table.results(list(ids.values()), batch.owner)
        still = [result.prediction for result in results.values() if not result.prediction.ended_visibly]
        open_count += len(still)
        # Enough of them to cancel at once; the others follow with the next lap.
        waiting = (waiting + still)[:_CANCELED_AT_ONCE]
        if open_count:
            continue  # only counted from here on
        for entry in chunk:
            n = entry["n"]
            yield entry if n not in ids else _result(batches, batch, n, results.get(ids[n]))
    if open_count:
        raise _LinesOpen(waiting, open_count)


def _found(batches: Batches, batch: Batch) -> Iterator[dict[str, Any]]:
    """Yield all lines in order: known results, and `{"n"}` for lines of this attempt."""
    bucket = batches.bucket_name
    if batch.error:
        return
    lines = ({"n": line["n"]} for line in read_jsonl(bucket, lines_key(batch.id, batch.attempt)))
    if batch.attempt == 1:
        refused = (
            _not_started(line["n"], "refused", line["error"]) for line in read_jsonl(bucket, refused_key(batch.id))
        )
        yield from merge(lines, refused, key=lambda line: line["n"])
        return
    ran = next(lines, None)
    for result in read_jsonl(bucket, batch.results_key or ""):
        if ran is not None and ran["n"] == result["n"]:
            yield ran
            ran = next(lines, None)
        else:
            yield result


def _result(batches: Batches, batch: Batch, n: int, result: Result | None) -> dict[str, Any]:
    if result is None:
        error = {
            "canceled": "Not started: the batch was canceled.",
            "exceeded": "Not started: more lines of the batch had failed than it tolerates.",
        }.get(batch.stop or "", "Not started: see the dead-letter queue of requests.")
        return _not_started(n, "canceled" if batch.stop else "failed", error)
    prediction = result.prediction
    told: dict[str, Any] = {
        "n": n,
        "id": prediction.id,
        "status": prediction.visible,
        "error": prediction.error,
        "seconds": max(0, (prediction.ended or prediction.created) - prediction.created),
        "cost": prediction.cost.shown if prediction.cost else None,
        **({"labels": dict(prediction.labels)} if prediction.labels else {}),
    }
    if result.files:
        told["output_files"] = [_file(batches.bucket_name, file.to_item()) for file in result.files]
    elif prediction.visible == "succeeded":
        output = result.output_json
        if output is None or len(output.encode()) > OUTPUT_LIMIT_BYTES:
            told["output_truncated"] = True
        else:
            told["output"] = json.loads(output)
    return told


def _not_started(n: int, status: str, error: str) -> dict[str, Any]:
    free = Cost(0, "Not billed: it was not started.").shown
    return {"n": n, "id": None, "status": status, "error": error, "seconds": None, "cost": free}


def _file(bucket: str, file: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in file:
        return {"path": file["path"], "error": file["error"]}
    return {
        "path": file["path"],
        "uri": f"s3://{bucket}/{file['key']}",
        "bytes": file["bytes"],
        "content_type": file["content_type"],
    }


def _cancel(table: PredictionsTable, predictions: Sequence[Prediction], now: float) -> None:
    """Flag running lines for cancellation.

    The sweep, which may call Replicate, cancels them there within two minutes.
    """
    for prediction in predictions:
        if not prediction.cancel_requested:
            table.request_cancel(prediction.id, now)
