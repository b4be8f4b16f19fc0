"""Predictions as the API shows them."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from predictions.aws.clients import api_url
from predictions.clock import rfc3339
from predictions.files.output_references import FILES_LIMIT, StoredFile
from predictions.files.outputs_bucket import OutputsBucket
from predictions.files.signed_urls import Distribution
from predictions.observability import MetricUnit, logger, metrics
from predictions.store.records import Page, Prediction, PredictionDetail

# Lambda responds with at most 6 MB, in which the body is a string: JSON within JSON.
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
ANSWER_LIMIT_BYTES = 5_500_000
_LOGS_LIMIT_CHARACTERS = 256 * 1024
_LARGE_INPUT_BYTES = ANSWER_LIMIT_BYTES - 1024**2


@dataclass(frozen=True)
class ShownPage:
    """A page as the API shows it.

    Attributes:
        results: Its predictions, from its start on.
        first: The place in the list where it begins; None at an end of the list.
        beyond: The place beside which the next one begins, where there are further entries.
    """

    results: list[dict[str, Any]]
    first: str | None
    beyond: str | None


class Presenter:
    """Shows predictions as Replicate does.

    All keys are present, except those that an open prediction has no value for (see `without_unset`), or that only
    some predictions have.

    Args:
        outputs: Makes the URLs of stored files, where no distribution does.
        url_seconds: How long those URLs work.
        distribution: Makes URLs that any client can fetch.
    """

    def __init__(self, outputs: OutputsBucket, url_seconds: int, distribution: Distribution | None = None) -> None:
        self._outputs = outputs
        self._url_seconds = url_seconds
        self._distribution = distribution

    @classmethod
    def from_env(cls) -> "Presenter":
        """Create from `OUTPUT_URL_SECONDS`, the outputs bucket and the distribution."""
        return cls(OutputsBucket.from_env(), int(os.environ["OUTPUT_URL_SECONDS"]), Distribution.from_env())

    def show(self, whole: PredictionDetail, *, as_starting: bool = False) -> dict[str, Any]:
        """Return a prediction in Replicate's JSON, with `output_files` and `cost` added.

        An output that makes the response too large for Lambda is shown as the URL of a JSON document
        `{"output": …, "logs": …}`, and such an input as `{"url": …}`.

        Args:
            whole: The prediction.
            as_starting: Whether to show one that has not ended as `starting`, without output: the official clients
                take the response to a wait that ended early for the end, unless it says so.
        """
        prediction = whole.prediction
        status = prediction.visible
        output = self._output(whole)
        if as_starting and status == "processing":
            status, output = "starting", None
        url = f"{api_url()}/{prediction.collection}/{prediction.id}"
        urls = {"get": url, "cancel": f"{url}/cancel", "web": url}
        if prediction.stream_url:
            urls["stream"] = prediction.stream_url
        ended = prediction.ended_visibly
        shown: dict[str, Any] = {
            "id": prediction.id,
            "model": prediction.shown_model,
            "version": prediction.upstream_version or prediction.version or "hidden",
            "input": whole.input,
            "output": output,
            "logs": (whole.logs or "")[-_LOGS_LIMIT_CHARACTERS:],
            "error": _error(prediction, whole.files) if ended else None,
            "status": status,
            "created_at": prediction.created_at,
            "started_at": prediction.started_at,
            "completed_at": prediction.completed_at if ended else None,
            "metrics": json.loads(prediction.metrics_json or "{}") if ended else None,
            "cost": prediction.cost.shown if prediction.cost else None,
            "data_removed": prediction.data_removed,
            "source": "api",
            "origin": prediction.origin_kind,
            "deadline": rfc3339(prediction.deadline),
            "urls": urls,
            "output_files": [self._file(file) for file in whole.files],
        }
        if prediction.reported_status:
            shown["upstream_status"] = prediction.reported_status
        if prediction.destination:
            shown["destination"] = prediction.destination
        if prediction.labels:
            shown["labels"] = dict(prediction.labels)
        if prediction.deployment:
            shown["deployment"] = prediction.deployment
        if prediction.webhook:
            shown["webhook"] = prediction.webhook
            if prediction.webhook_events_filter:
                shown["webhook_events_filter"] = list(prediction.webhook_events_filter)
        # A value too large for a response is linked: it is an object in the bucket then.
        if whole.input_key and _is_too_large(shown):
            shown["input"] = {"url": self.link(whole.input_key)}
        if whole.result_key and output is not None and _is_too_large(shown):
            # A result with files names upstream's URLs, which end within the hour: it is not linked.
            link = None if whole.files else self.link(whole.result_key)
            shown |= {"output": link, "output_files": []}
            if link is None:
                shown["error"] = f"The output with its {len(whole.files)} files is too large for a response."
        return shown if ended else without_unset(shown)

    def show_started(
        self, prediction: Prediction, input_json: str, read: Callable[[], PredictionDetail], *, as_starting: bool = True
    ) -> dict[str, Any]:
        """Show a prediction to the caller that started it, whatever fails meanwhile.

        The prediction is started, and may be paid for: a caller that got an error would start another one. So on any
        error (AWS fails, the secret that signs URLs is refused or damaged) it is shown as `starting`, without output:
        the caller reads it by its id.

        Args:
            prediction: What was started.
            input_json: Its input. It is parsed only if the prediction cannot be read, which holds it too.
            read: Reads it with its payloads.
            as_starting: As for `show`.
        """
        try:
            return self.show(read(), as_starting=as_starting)
        except Exception:  # noqa: BLE001  # whatever it is, the caller must not take it for "nothing was started"
            logger.exception("started, but not shown", prediction_id=prediction.id)
            metrics.add_metric(name="AnswersWithoutOutput", unit=MetricUnit.Count, value=1)
        # Nothing of this has to be signed or read. The input is left out where it leaves no room for the rest.
        # What Replicate said since the start is not known either.
        asked = json.loads(input_json)
        open_ = replace(prediction, status="queued", visible="starting", rank=0, upstream_status=None)
        return self.show(
            PredictionDetail(open_, {} if answer_bytes(asked) > _LARGE_INPUT_BYTES else asked, None, None, [])
        )

    def show_page(self, page: Page) -> "ShownPage":
        """Show as many predictions of a page as fit in one response, but at least one."""
        results: list[dict[str, Any]] = []
        room, shown_last = ANSWER_LIMIT_BYTES, None
        for whole in page.predictions:
            shown = self.show(whole)
            room -= answer_bytes(shown)
            if results and room < 0:
                return ShownPage(results, page.first, shown_last)
            results.append(shown)
            shown_last = whole.prediction.listed_at
        return ShownPage(results, page.first, page.last if page.more else None)

    def _output(self, whole: PredictionDetail) -> Any:
        if whole.output is None or whole.prediction.awaits_copy:
            return None
        if not whole.prediction.terminal:
            # Its files are still upstream's: callers are shown no URL that is not ours.
            return None if self._outputs.holds_files(whole.output) else whole.output
        # A file that was not copied, as after an end by this stack, is shown as missing: its URL is not ours.
        return self._outputs.place_files(whole.output, {f.path: self.link(f.key) for f in whole.files if f.key})

    def link(self, key: str) -> str:
        """Return a temporary URL of an object in the outputs bucket."""
        return (self._distribution or self._outputs).url(key, self._url_seconds)

    def _file(self, file: StoredFile) -> dict[str, Any]:
        if file.error:
            return {"path": file.path, "error": file.error}
        return {
            "path": file.path,
            "bucket": self._outputs.name,
            "key": file.key,
            "bytes": file.bytes,
            "sha256": file.sha256,
            "content_type": file.content_type,
        }


def without_unset(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what an open prediction does not have yet, as Replicate does: output, times, metrics and our cost.

    Replicate's document requires none of them; seen in about 70 recorded responses, replicate-python's cassettes:
    https://github.com/replicate/replicate-python/tree/main/tests/cassettes
    """
    unset = ("output", "started_at", "completed_at", "metrics", "cost")
    return {name: value for name, value in shown.items() if name not in unset or value is not None}


def answer_bytes(shown: Any) -> int:
    """Return how many bytes of Lambda's response a JSON value takes."""
    return len(json.dumps(json.dumps(shown)))


def _is_too_large(shown: Any) -> bool:
    text = json.dumps(shown)
    # Within Lambda's response it only gets longer, which would take its memory twice more.
    return len(text) > ANSWER_LIMIT_BYTES or len(json.dumps(text)) > ANSWER_LIMIT_BYTES


def _error(prediction: Prediction, files: Any) -> str | None:
    if prediction.error:
        return prediction.error
    said = [f"output{file.path}: {file.error}" for file in files if file.error]
    # The entry for all files beyond the limit is the last one, and says how many there are.
    beyond = said[-1:] if files and files[-1].index >= FILES_LIMIT else []
    lost, known = len(said) - len(beyond), len(files) - len(beyond)
    counted = f"{lost} of {known} output files could not be stored. " if lost else ""
    return counted + "; ".join([*said[:lost][:10], *beyond]) or None
