"""State PrepareBatch: find the lines that an attempt of a batch runs, and store them.

Data is streamed, so that memory use does not grow with the batch; running twice writes the same.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from botocore.exceptions import ClientError

from predictions.batches.checks import LineSchema
from predictions.batches.files import (
    get_text,
    lines_key,
    new_object,
    read_jsonl,
    read_pieces,
    recipe_key,
    refused_key,
    requests_key,
    schema_key,
    template_key,
)
from predictions.batches.manifest import (
    LINES_LIMIT,
    REASON_LIMIT,
    LineRefused,
    ManifestUnreadable,
    check_request,
    lines_of,
    request_by,
    request_of,
)
from predictions.batches.store import Batch, Batches
from predictions.intents.labels import with_common_labels
from predictions.observability import logger

# The function's time that is reserved for the last writes, if a manifest takes too long.
_LEFT_SECONDS = 60
# After this many crashed executions for the same manifest, another one would crash too.
_EXECUTIONS_LIMIT = 6


def prepare(
    batches: Batches, batch_id: str, attempt: int, remaining_seconds: Callable[[], float] = lambda: 900.0
) -> dict[str, Any]:
    """Find the lines that an attempt runs, and store them.

    Args:
        batches: The batches.
        batch_id: The id of the batch.
        attempt: The number of the attempt.
        remaining_seconds: Returns how long the function may still run.

    Returns:
        The state machine's data: `owner`, `lines` (their number), `key` (their object), `max_concurrency`,
        `tolerated_failure_percentage`.
    """
    batch = batches.find(batch_id)
    if batch is None or batch.attempt != attempt or batch.ended:
        return _plan(batch_id, attempt, "", 0, 1, 100)
    if batch.status == "preparing":
        try:
            if attempt == 1:
                lines, refused = _first_lines(batches, batch, remaining_seconds)
                batches.running(batch, lines=lines, total=lines + refused, refused=refused)
            else:
                lines = _lines_again(batches, batch)
                batches.running(batch, lines=lines, total=batch.total or 0, refused=batch.refused or 0)
        except ManifestUnreadable as unreadable:
            logger.warning("manifest unreadable")
            batches.unreadable(batch, str(unreadable))
        batch = batches.find(batch_id) or batch
    # In a stopped batch no line would start.
    lines = 0 if batch.stop else batch.lines or 0
    return _plan(batch_id, attempt, batch.owner, lines, batch.max_concurrency, batch.tolerated_failure_percentage)


def _plan(batch_id: str, attempt: int, owner: str, lines: int, concurrency: int, percentage: int) -> dict[str, Any]:
    return {
        "id": batch_id,
        "attempt": attempt,
        # The group of its lines in the requests queue.
        "owner": owner,
        "lines": lines,
        "key": lines_key(batch_id, attempt),
        "max_concurrency": concurrency,
        "tolerated_failure_percentage": percentage,
    }


def _in_time(parts: Iterable[Any], remaining_seconds: Callable[[], float]) -> Iterator[Any]:
    """Yield these parts while time remains.

    Raises:
        ManifestUnreadable: The time is over. Another execution would have no more time.
    """
    for part in parts:
        if remaining_seconds() < _LEFT_SECONDS:
            raise ManifestUnreadable(
                "Reading the manifest or filling the template takes too long. Create several batches."
            )
        yield part


def _first_lines(batches: Batches, batch: Batch, remaining_seconds: Callable[[], float]) -> tuple[int, int]:
    """Read the manifest; return the numbers of valid and invalid lines.

    Raises:
        ManifestUnreadable: The manifest is gone, replaced, too long, not a manifest, or too slow to read.
    """
    if batch.execution_n > _EXECUTIONS_LIMIT:
        raise ManifestUnreadable(
            "The manifest could not be read: each try ran out of memory or time. Create several batches."
        )
    bucket = batches.bucket_name
    request = _requests(bucket, batch)
    schema = LineSchema(get_text(bucket, schema_key(batch.id))) if batch.checked else None
    manifest = batch.manifest
    read = read_pieces(manifest["bucket"], manifest["key"], etag=manifest["etag"])
    # Checked at two places: a piece may have thousands of lines, and empty ones are not yielded.
    pieces = _in_time(read, remaining_seconds)
    count = refused_count = 0
    try:
        with (
            new_object(bucket, requests_key(batch.id)) as requests,
            new_object(bucket, refused_key(batch.id)) as refused,
            new_object(bucket, lines_key(batch.id, 1)) as lines,
        ):
            found = lines_of(pieces, "csv" if manifest["format"] == "csv" else "jsonl")
            for line in _in_time(found, remaining_seconds):
                if count + refused_count >= LINES_LIMIT:
                    raise ManifestUnreadable(
                        f"The manifest exceeds the limit of {LINES_LIMIT} lines. Create several batches."
                    )
                try:
                    if line.error:
                        raise LineRefused(line.error)
                    made, output_prefix = request(line.value)
                    made = with_common_labels(made, batch.labels or {})
                    check_request(made, allow_loopback_webhooks=batches.allow_loopback_webhooks)
                    if schema and (wrong := schema.reason(made["input"])):
                        raise LineRefused(wrong[:REASON_LIMIT])
                except LineRefused as reason:
                    refused.write_json({"n": line.n, "error": str(reason)})
                    refused_count += 1
                    continue
                offset = requests.written
                place = {"output_prefix": output_prefix} if output_prefix else {}
                length = requests.write_json({"n": line.n, "request": made, **place})
                lines.write_json({"n": line.n, "offset": offset, "length": length})
                count += 1
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("NoSuchKey", "AccessDenied", "PreconditionFailed", "412"):
            raise
        raise ManifestUnreadable("The manifest was changed or deleted after the batch was created.") from None
    return count, refused_count


def _requests(bucket: str, batch: Batch) -> Callable[[Any], tuple[dict[str, Any], str | None]]:
    """Return the function that turns a line into a request and its output prefix."""
    if batch.recipe:
        from predictions.recipes.store import Recipe  # only batches with a recipe need it

        recipe = Recipe(**json.loads(get_text(bucket, recipe_key(batch.id))))
        return lambda value: request_by(recipe, value)
    template = json.loads(get_text(bucket, template_key(batch.id))) if batch.templated else None
    return lambda value: (request_of(value, template), None)


def _lines_again(batches: Batches, batch: Batch) -> int:
    """Find the lines that have not succeeded in any attempt; return their number."""
    bucket, count = batches.bucket_name, 0
    undone = {"failed", "canceled"}
    every = read_jsonl(bucket, lines_key(batch.id, 1))
    with new_object(bucket, lines_key(batch.id, batch.attempt)) as lines:
        for result in read_jsonl(bucket, batch.results_key or ""):
            if result["status"] in undone:
                line = next(line for line in every if line["n"] == result["n"])
                lines.write_json(line)
                count += 1
    return count
