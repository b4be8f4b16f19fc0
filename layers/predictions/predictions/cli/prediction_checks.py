"""Checks with one prediction, from its request to a file that was fetched.

They also measure what "no second POST without evidence" rests on, with the reader that the protocol itself uses: how
soon Replicate's list shows a new prediction, and by what a prediction in it can be recognized. The table is read, not
the API: a GET of a running prediction would ask Replicate, and hide that no webhook arrives.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from predictions.cli.checks import Check, CheckFailed, CheckUnclear, Deployed
from predictions.cli.endpoint_checks import EndpointChecks, GivenToken
from predictions.cli.stack import line
from predictions.clock import parse_rfc3339
from predictions.store.records import Prediction
from predictions.upstream.client import Replicate
from predictions.upstream.credentials import Token
from predictions.upstream.errors import Unavailable
from predictions.upstream.list_reader import MARGIN_SECONDS, Listed, ListReader

COMPLETION_SECONDS = 900
"""How long the prediction may take: a cold model may need minutes to boot."""

LIST_SECONDS = 300
"""How long Replicate's list is read for it."""

GRACE_DEFAULT_SECONDS = 45
_GRACE_MOST_SECONDS = 3600
# One prediction was measured, at one moment: the list may be slower at another.
_GRACE_FACTOR = 3
# The `Date` of a response, with which the clocks are compared, has whole seconds.
_DATE_SECONDS = 1

_LOOK_SECONDS = 0.5
_READING_SECONDS = 20
# A completion that Replicate had before the poll began, by more than a webhook takes, should have come by webhook.
_WEBHOOK_SECONDS = 10
_RUNBOOK = "docs/runbook.md#symptoms"


@dataclass(frozen=True)
class Wanted:
    """The prediction to run.

    Attributes:
        model: `owner/name`, `owner/name:version`, or a version.
        input: Its input.
    """

    model: str
    input: Any


@dataclass
class _Seen:
    """What the checks have seen of the prediction so far."""

    id: str = ""
    posted: float = 0.0
    upstream_id: str = ""
    listed: Listed | None = None
    got: Listed | None = None
    prediction: Prediction | None = None
    files: dict[str, int] = field(default_factory=dict)


class _KnownToken(Token):
    """The Replicate token that was read already."""

    def __init__(self, value: str) -> None:
        self._value = value

    def value(self) -> str:
        return self._value

    def forget(self) -> None:
        """Do nothing: it was accepted a moment ago."""


def grace_for(lag_seconds: float) -> int:
    """Return the SubmitGraceSeconds that follows from how long Replicate needed to list a prediction.

    The second reading of the list begins that long after the holder of the claim was done. Until then everything that
    Replicate has accepted must be in the list.
    """
    with_margin = math.ceil(_GRACE_FACTOR * lag_seconds / 5) * 5
    return min(max(GRACE_DEFAULT_SECONDS, with_margin), _GRACE_MOST_SECONDS)


class PredictionChecks:
    """The checks of one prediction.

    Args:
        deployed: The stack.
        endpoints: Gives the API's URL, and Replicate's with its token.
        wanted: What to run.
        token: An access token of the API.
        http: The client to use; it must not follow redirects.
        say: Called with each step, while it runs.
        now: The time.
        sleep: Waits some seconds.
    """

    def __init__(
        self, deployed: Deployed, endpoints: EndpointChecks, wanted: Wanted, token: GivenToken, http: httpx.Client,
        *, say: Callable[[str], None], now: Callable[[], float], sleep: Callable[[float], None],
    ) -> None:  # fmt: skip
        self._deployed = deployed
        self._endpoints = endpoints
        self._wanted = wanted
        self._token = token
        self._http = http
        self._say = say
        self._now = now
        self._sleep = sleep
        self._seen = _Seen()

    def checks(self) -> Iterator[Check]:
        """List the checks, each of which needs those before it; none follows a request that was not accepted."""
        yield Check("prediction.accepted", self._accepted)
        if not self._seen.id:
            return
        yield Check("prediction.listed", self._listed)
        if self._seen.listed is not None:
            yield Check("prediction.recognizable", self._recognizable)
        yield Check("prediction.completed", self._completed)
        if self._seen.prediction is None:
            return
        yield Check("prediction.webhook", self._webhook)
        yield Check("prediction.stored", self._stored)
        if self._seen.files:
            yield Check("prediction.link", self._link)

    @property
    def _show(self) -> str:
        return self._deployed.command(f"show {self._seen.id}")

    def _since(self) -> float:
        return self._now() - self._seen.posted

    def _progress(self, text: str) -> None:
        self._say(f"{self._since():6.1f} s  {text}")

    def _accepted(self) -> str:
        if self._token.value is None:
            raise CheckUnclear(
                self._token.source, "Set REPLICATE_SERVERLESS_TOKEN to a token with the scopes predict and read."
            )
        # A key, so that a repetition of this request by a proxy starts nothing twice.
        headers = {
            "Authorization": f"Bearer {self._token.value}",
            "Idempotency-Key": f"doctor-{secrets.token_hex(8)}",
        }
        body = {"version": self._wanted.model, "input": self._wanted.input}
        self._seen.posted = self._now()
        try:
            response = self._http.post(f"{self._endpoints.api_url}/predictions", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise CheckFailed(
                f"no response to the create ({type(error).__name__}); it may have been accepted",
                f"{self._deployed.command('stuck')}: the stack completes what it has accepted.",
            ) from error
        if response.status_code != 201:
            raise CheckFailed(
                f"{response.status_code}: {line(response.text, 300)}",
                "422: give the model's own fields with --input; 404: check its name; 502 and 503: see replicate.token"
                " and `replicate-serverless status`.",
            )
        self._seen.id = str(response.json()["id"])
        return f"{self._since():.1f} s: {self._seen.id} of {line(self._wanted.model, 80)}"

    def _prediction(self) -> Prediction | None:
        return self._deployed.stack.table.get(self._seen.id)

    def _reader(self) -> ListReader:
        token = _KnownToken(self._endpoints.replicate_token)
        return ListReader(Replicate(self._endpoints.replicate_url, token, self._http), now=self._now)

    def _listed(self) -> str:
        reader, over_at = self._reader(), self._seen.posted + LIST_SECONDS
        self._progress("looking for it in Replicate's list")
        why_not: str | None = None
        while (began := self._now()) < over_at:
            prediction = self._prediction()
            if prediction is not None and prediction.upstream_id:
                self._seen.upstream_id = prediction.upstream_id
            elif prediction is not None and prediction.ended_visibly:
                raise CheckFailed(f"it ended without Replicate: {line(prediction.error or '', 300)}", self._show)
            reading = reader.read(
                "predictions",
                self._seen.posted - MARGIN_SECONDS,
                may_ask=lambda: True,
                over_at=began + _READING_SECONDS,
            )
            why_not = reading.why_not
            if self._seen.upstream_id and (entry := reading.entries.get(self._seen.upstream_id)):
                self._seen.listed = entry
                return self._grace(self._now(), entry, reading.why_not)
            # So the measurement is at most a twentieth too long, and a list that shows nothing is not read for nothing.
            self._sleep(max(_LOOK_SECONDS, self._since() / 20))
        if not self._seen.upstream_id:
            raise CheckFailed(f"Replicate has accepted nothing within {LIST_SECONDS} s", self._show)
        raise CheckFailed(
            f"Replicate's list does not show it within {LIST_SECONDS} s" + (f": {why_not}" if why_not else ""),
            "Deploy with UnknownSubmission=fail: the list proves nothing.",
        )

    def _grace(self, seen_at: float, entry: Listed, why_not: str | None) -> str:
        # The readings before this one did not show it, so this is the most that it can have been.
        lag = max(0.0, seen_at - entry.created) + _DATE_SECONDS
        grace = int(float(self._deployed.parameter("SubmitGraceSeconds") or GRACE_DEFAULT_SECONDS))
        seen = (
            f"in Replicate's list at most {lag:.1f} s after its creation: SubmitGraceSeconds={grace_for(lag)} follows,"
            f" {_GRACE_FACTOR} times that and at least {GRACE_DEFAULT_SECONDS}; the stack has {grace}"
        )
        if why_not is not None:
            raise CheckFailed(
                f"{seen}; but the reading of the list is no evidence: {why_not}",
                "Until readings are complete, creates with an unknown outcome wait for their webhook or deadline:"
                " docs/protocol.md#unknown-outcomes. If it is this machine's clock, see clock.caller.",
            )
        if grace < _GRACE_FACTOR * lag:
            raise CheckFailed(seen, f"Deploy with SubmitGraceSeconds={grace_for(lag)}.")
        return seen

    def _recognizable(self) -> str:
        webhook = f"{self._endpoints.api_url}/webhooks/replicate/{self._seen.id}"
        try:
            self._seen.got = self._reader().entry(self._seen.upstream_id, "predictions")
        except Unavailable as error:
            raise CheckUnclear(f"Replicate's GET failed: {error}", "Try again later.") from error
        shown = {"the list": self._seen.listed, "a GET": self._seen.got}
        seen = "; ".join(f"{where} shows {_parts(entry) if entry else 'nothing'}" for where, entry in shown.items())
        webhooks = [entry.webhook for entry in shown.values() if entry and entry.webhook]
        if any(each != webhook for each in webhooks):
            raise CheckFailed(
                f"{seen}; the webhook is not the one that was sent",
                "Deploy with UnknownSubmission=fail: predictions of this stack look like another's.",
            )
        if webhooks:
            return seen
        if not all(entry and entry.input_digest for entry in shown.values()):
            raise CheckFailed(
                f"{seen}: nothing identifies a prediction of this stack",
                "Creates with an unknown outcome wait for their webhook or deadline: keep a Replicate account for this"
                " stack alone.",
            )
        raise CheckUnclear(
            f"{seen}: predictions of this stack are recognized by target and input",
            "Other users of the same Replicate account and model can leave a create with an unknown outcome undecided"
            " until its deadline: keep an account for this stack alone.",
        )

    def _completed(self) -> str:
        over_at, shown = self._seen.posted + COMPLETION_SECONDS, ""
        while (prediction := self._prediction()) is None or not prediction.ended_visibly:
            if prediction is not None and prediction.visible != shown:
                shown = prediction.visible
                self._progress(shown)
            if self._now() > over_at:
                raise CheckUnclear(
                    f"{shown or 'not stored'} after {COMPLETION_SECONDS} s",
                    f"{self._show}: its last line names the awaited step. The prediction goes on.",
                )
            self._sleep(_LOOK_SECONDS)
        self._seen.prediction = prediction
        if prediction.visible != "succeeded":
            raise CheckFailed(f"{prediction.visible}: {line(prediction.error or '', 300)}", f"{self._show}; {_RUNBOOK}")
        return f"{self._since():.1f} s: {prediction.visible}"

    def _webhook(self) -> str:
        prediction = self._seen.prediction
        assert prediction is not None
        pages = (
            self._deployed.client("stepfunctions")
            .get_paginator("get_execution_history")
            .paginate(executionArn=prediction.execution_arn, includeExecutionData=False)
        )
        polled = [
            event["timestamp"].timestamp()
            for page in pages
            for event in page["events"]
            if event.get("stateEnteredEventDetails", {}).get("name") == "PollPrediction"
        ]
        if not polled:
            return "the completion came by webhook: no poll ran"
        completed = parse_rfc3339(prediction.completed_at)
        if completed is not None and any(completed.timestamp() < poll - _WEBHOOK_SECONDS for poll in polled):
            raise CheckFailed(
                f"a poll found the completion, {polled[-1] - completed.timestamp():.0f} s after Replicate had it",
                "No webhook arrived: see webhooks.route, from another network, and docs/runbook.md#pollsharealarm.",
            )
        raise CheckUnclear(
            f"{len(polled)} polls ran, because the model took longer than FirstPollSeconds", "Choose a faster model."
        )

    def _stored(self) -> str:
        prediction = self._seen.prediction
        assert prediction is not None
        files = self._deployed.stack.table.stored_files(prediction)
        missing = [file for file in files if not file.key]
        if missing:
            raise CheckFailed(
                f"{len(missing)} of {len(files)} files were not copied: {line(missing[0].error or '', 200)}",
                f"{self._deployed.command(f'outputs archive {prediction.id}')}, within an hour",
            )
        if not files:
            raise CheckUnclear("the output has no files", "Choose a model whose output is a file, such as an image.")
        bucket = self._deployed.id("OutputsBucket")
        for file in files:
            size = self._deployed.client("s3").head_object(Bucket=bucket, Key=file.key)["ContentLength"]
            if size != file.bytes:
                raise CheckFailed(f"{file.key} has {size} bytes instead of {file.bytes}", f"{self._show}; {_RUNBOOK}")
        self._seen.files = {str(file.sha256): int(file.bytes or 0) for file in files}
        return f"{len(files)} files, {sum(self._seen.files.values()):,} bytes, in {bucket}"

    def _link(self) -> str:
        headers = {"Authorization": f"Bearer {self._token.value}"}
        action = "See OutputUrls and CORS in docs/files.md, and the log of read_prediction."
        try:
            shown = self._http.get(f"{self._endpoints.api_url}/predictions/{self._seen.id}", headers=headers)
            urls = list(_urls(shown.json().get("output")))
            if not urls:
                raise CheckFailed(f"{shown.status_code}: the response shows no URL of a file", action)
            digest, size, began = hashlib.sha256(), 0, self._now()
            with self._http.stream("GET", urls[0]) as response:
                for piece in response.iter_bytes():
                    digest.update(piece)
                    size += len(piece)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
            raise CheckFailed(f"a file could not be fetched ({type(error).__name__})", action) from error
        if response.status_code != 200:
            raise CheckFailed(f"the URL of a file gets {response.status_code}", action)
        if digest.hexdigest() not in self._seen.files:
            raise CheckFailed(f"the {size:,} bytes of a fetched file are not those that were stored", action)
        return f"{self._now() - began:.1f} s: {size:,} bytes, with the SHA-256 that was stored"


def _parts(entry: Listed) -> str:
    shown = [name for name, there in (("webhook", entry.webhook), ("input", entry.input_digest)) if there]
    return " and ".join(shown) or "neither webhook nor input"


def _urls(output: Any) -> Iterator[str]:
    """Find the URLs in an output, depth first."""
    if isinstance(output, str) and output.startswith(("https://", "http://")):
        yield output
    elif isinstance(output, dict | list):
        for each in output.values() if isinstance(output, dict) else output:
            yield from _urls(each)


def wanted_of(model: str, input_json: str | None) -> Wanted:
    """Return what the options of a command ask for.

    Raises:
        ValueError: The input is not a JSON object.
    """
    given = json.loads(input_json) if input_json is not None else {"prompt": "a red fox in the snow"}
    if not isinstance(given, dict):
        raise ValueError("must be a JSON object")
    return Wanted(model, given)
