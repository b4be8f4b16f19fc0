"""``make send``: send an event sample to the local stack as its source would, and follow the prediction it starts.

The folder and the shape of a sample determine how it is sent; `plan` is that rule. Events from inside the stack (a
stream's records, a state machine's payloads, …) are not sent: the command prints the reason.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image
from predictions.files.outputs_bucket import OutputsBucket
from predictions.store.predictions import PredictionsTable
from predictions.store.records import Prediction

from local.cloud import STACK_NAME, Stack, aws_client
from local.running import running_stack
from local.terminal import Terminal

MODEL = "local/painter"
SECONDS = 60.0
SECONDS_TO_START = 20.0  # through bus, queue and state machine
SHOWN_CHARACTERS = 2000
NOTHING_STARTED = (
    "An object or an event needs a recipe to start something; rejected messages are in the dead-letter queue, with "
    "the reason."
)

INVOKED = {"run_prediction", "sweep_predictions"}
FROM_INSIDE = {
    "authorize_request": "API Gateway calls this function to check a caller's token. Send a sample of a route.",
    "deploy_recipes": "CloudFormation calls it with each deployment. Put a file into recipes/, and run `make local`.",
    "deliver_webhook": "Its messages name webhooks of the stack's own predictions. Start one that has a webhook.",
    "publish_changes": "Its records are those of the table's stream. Start a prediction.",
}
# The last part of paths whose POST starts predictions.
STARTING = {"predictions", "trainings", "batches", "pipelines"}
# Headers of the sample's own connection and token; the others are part of the request.
LEFT_OUT = {"accept-encoding", "authorization", "content-length", "host"}


class SendFailed(Exception):
    """The sample could not be sent; the message gives the reason and the remedy."""


class NotSendable(SendFailed):
    """The sample is of an event that only the stack itself sends."""


@dataclass(frozen=True)
class Call:
    """A request to the API; `authorized` if the route needs an access token."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: bytes
    authorized: bool


@dataclass(frozen=True)
class Message:
    """A message to the requests queue."""

    body: str


@dataclass(frozen=True)
class Object:
    """An object in the inputs bucket."""

    key: str


@dataclass(frozen=True)
class BusEvent:
    """An event on the stack's bus."""

    source: str
    detail_type: str
    detail: str
    resources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Invocation:
    """A direct invocation of a function, named as its folder."""

    function: str
    payload: Any


Shipment = Call | Message | Object | BusEvent | Invocation


def plan(folder: str, event: Any) -> list[Shipment]:
    """Return how a sample is sent.

    Args:
        folder: The function's, below ``events/``.
        event: The sample.

    Raises:
        NotSendable: Only the stack itself sends such an event.
    """
    if folder in FROM_INSIDE:
        raise NotSendable(FROM_INSIDE[folder])
    if folder in INVOKED:
        return [Invocation(folder, event)]
    if isinstance(event, dict) and "httpMethod" in event:
        return [_call(event)]
    if isinstance(event, dict) and "detail-type" in event:
        return [_event(event)]
    records = event.get("Records") if isinstance(event, dict) else None
    if isinstance(records, list) and records:
        return [_record(record) for record in records]
    raise NotSendable(f"A state machine calls {folder} as one of its steps. Start what the state machine runs.")


def with_model(shipment: Shipment, model: str) -> tuple[Shipment, str | None]:
    """Replace the model that a shipment names.

    Returns:
        The shipment, and the model before; None if it names no model, or the same one.
    """
    match shipment:
        case Invocation(function="run_prediction", payload={"model": str(named)} as job):
            return (replace(shipment, payload={**job, "model": model}), named) if named != model else (shipment, None)
        case Message(body=text):
            body, before = _body_with_model(text, model)
            return replace(shipment, body=body), before
        case Call(method="POST", path="/predictions", body=content):
            text, before = _body_with_model(content.decode(errors="replace"), model, field="version")
            return (replace(shipment, body=text.encode()), before) if before else (shipment, None)
        case Call(method="POST" | "PUT", path=path, body=content) if path.split("/")[1] == "recipes":
            text, before = _body_with_model(content.decode(errors="replace"), model)
            return (replace(shipment, body=text.encode()), before) if before else (shipment, None)
        case Call(method="POST", path=path) if path.endswith("/predictions") and path.count("/") == 4:
            kind, owner, name = path.split("/")[1:4]
            named = f"{owner}/{name}"
            if kind in ("models", "deployments") and named != model:
                return replace(shipment, path=f"/models/{model}/predictions"), named
    return shipment, None


def send(terminal: Terminal, sample: Path, *, model: str | None = None, file: Path | None = None) -> None:
    """Send a sample to the running local cloud, and follow its predictions.

    Args:
        terminal: The terminal for the output.
        sample: A file below ``events/``.
        model: The model to run, as ``owner/name``; by default, a model that the stand-in lacks is replaced.
        file: The content of the object in a sample of S3.

    Raises:
        NotRunning: No local stack is running.
        SendFailed: This cannot be sent.
    """
    folder, event = read_sample(sample)
    shipments = plan(folder, event)
    stack = running_stack()
    sender = _Sender(stack, terminal, file)
    stand_in = urlsplit(stack.replicate_api_url).hostname == "127.0.0.1"
    # The error in a sample that must be rejected has to stay.
    replaces = model is not None or (stand_in and not sample.name.startswith("refused"))
    try:
        before = set(sender.predictions())
        expected: set[str] = set()
        starts = False
        for shipment in shipments:
            other, named = with_model(shipment, model or MODEL)
            if replaces and named and (model or not named.startswith("local/")):
                terminal.event("model", f"{model or MODEL} instead of {named} (MODEL=… names another)")
                shipment = other
            started = sender.send(shipment)
            starts = starts or started is not None
            expected |= started or set()
        if starts:
            sender.follow(before, expected)
    except (ClientError, BotoCoreError, httpx.HTTPError) as error:
        raise SendFailed(f"The local stack did not accept it: {error}") from error


def read_sample(sample: Path) -> tuple[str, Any]:
    """Read a sample; return its function's folder and the event.

    Raises:
        SendFailed: The file does not exist, or is not a sample.
    """
    if not sample.is_file():
        raise SendFailed(
            f"Sample {str(sample)!r} not found. Name one, as in EVENT=events/start_prediction/version.json."
        )
    try:
        return sample.resolve().parent.name, json.loads(sample.read_text())
    except ValueError as error:
        raise SendFailed(f"{sample} is not JSON: {error}") from None


def _call(event: Mapping[str, Any]) -> Call:
    query = event.get("multiValueQueryStringParameters") or {}
    headers = {name: value for name, value in (event.get("headers") or {}).items() if _is_sent(name)}
    body = (event.get("body") or "").encode()
    return Call(
        event["httpMethod"],
        event["path"],
        tuple((name, value) for name, values in query.items() for value in values),
        headers,
        base64.b64decode(body) if event.get("isBase64Encoded") else body,
        authorized="authorizer" in event.get("requestContext", {}),
    )


def _is_sent(header: str) -> bool:
    name = header.lower()
    return name not in LEFT_OUT and not name.startswith(("x-amzn-", "x-forwarded-"))


def _record(record: Mapping[str, Any]) -> Shipment:
    match record:
        case {"eventSource": "aws:s3", "s3": {"object": {"key": str(key)}}}:
            return Object(unquote_plus(key))
        case {"eventSource": "aws:sqs", "body": str(body)}:
            with contextlib.suppress(ValueError, NotSendable):
                asked = json.loads(body)
                # A message of a recipe's rule originates as an event; a schedule sends its message itself.
                event = asked.get("event", asked.get("batch_manifest")) if isinstance(asked, dict) else None
                if isinstance(event, dict):
                    return _event(event)
            return Message(body)
    raise NotSendable(
        f"Its records are those of {record.get('eventSource', 'no known source')}, which cannot be sent by hand."
    )


def _event(event: Mapping[str, Any]) -> Shipment:
    match event:
        case {"source": "aws.s3", "detail": {"object": {"key": str(key)}}}:
            return Object(key)
        case {"source": str(source)} if source.startswith("aws."):
            raise NotSendable(f"Only AWS itself sends events of {source}.")
        case {"source": str(source), "detail-type": str(detail_type)}:
            resources = tuple(str(each) for each in event.get("resources", ()))
            return BusEvent(source, detail_type, json.dumps(event.get("detail", {})), resources)
    raise NotSendable("The event has no source, so no bus accepts it.")


def _body_with_model(text: str, model: str, field: str = "model") -> tuple[str, str | None]:
    try:
        body = json.loads(text)
    except ValueError:
        return text, None
    named = (
        [body[name] for name in ("version", "model", "deployment") if name in body] if isinstance(body, dict) else []
    )
    if len(named) != 1 or not isinstance(named[0], str) or named[0] == model:
        return text, None
    others = {name: value for name, value in body.items() if name not in ("version", "model", "deployment")}
    return json.dumps({field: model, **others}), named[0]


class _Sender:
    """Sends to one stack, and follows the result."""

    def __init__(self, stack: Stack, terminal: Terminal, file: Path | None) -> None:
        self._stack = stack
        self._terminal = terminal
        self._file = file
        self._began = time.monotonic()
        self._clients: dict[str, Any] = {}
        self._table = PredictionsTable(
            stack.table_name, OutputsBucket(stack.outputs_bucket, []), self._client("dynamodb")
        )

    def send(self, shipment: Shipment) -> set[str] | None:
        """Send a shipment and print the response.

        Returns:
            The predictions in the response; None if no prediction is expected.
        """
        match shipment:
            case Call():
                return self._request(shipment)
            case Message():
                self._event("sent", "message to the requests queue")
                self._tell(shipment.body)
                sent = self._client("sqs").send_message(QueueUrl=self._stack.queue_url, MessageBody=shipment.body)
                self._event("answer", f"message {sent['MessageId']}")
            case Object():
                content = self._file.read_bytes() if self._file else _content(shipment.key)
                self._event("sent", f"s3://{self._stack.inputs_bucket}/{shipment.key} ({len(content):,} bytes)")
                sent = self._client("s3").put_object(Bucket=self._stack.inputs_bucket, Key=shipment.key, Body=content)
                self._event("answer", f"ETag {sent['ETag']}")
            case BusEvent():
                self._event(
                    "sent", f"{shipment.detail_type} of {shipment.source} on the bus {self._stack.event_bus_name}"
                )
                self._tell(shipment.detail)
                entry = {
                    "EventBusName": self._stack.event_bus_name,
                    "Source": shipment.source,
                    "DetailType": shipment.detail_type,
                    "Detail": shipment.detail,
                    "Resources": list(shipment.resources),
                }
                self._event("answer", f"event {self._client('events').put_events(Entries=[entry])['Entries'][0]}")
            case Invocation():
                return self._invoke(shipment)
        return set()

    def predictions(self) -> Iterator[str]:
        """Yield the id of every prediction in the table."""
        pages = self._client("dynamodb").get_paginator("scan")
        for page in pages.paginate(TableName=self._stack.table_name, ProjectionExpression="pk, sk"):
            for item in page["Items"]:
                pk = item["pk"]["S"]
                if item["sk"]["S"] == "status" and pk.startswith("prediction#"):
                    yield pk.removeprefix("prediction#")

    def follow(self, before: set[str], expected: set[str]) -> None:
        """Print the progress of every new or expected prediction until all have completed."""
        deadline = time.monotonic() + SECONDS
        start_until = time.monotonic() + SECONDS_TO_START
        seen: dict[str, Prediction] = {}
        followed = set(expected)
        while time.monotonic() < deadline:
            if not expected:
                followed |= set(self.predictions()) - before
            for prediction_id in sorted(followed):
                now = self._table.get(prediction_id)
                if now is None or (prediction_id in seen and seen[prediction_id].visible == now.visible):
                    continue
                self._event(now.visible, prediction_id)
                seen[prediction_id] = now
                if _has_ended(now):
                    self._end(now)
            if seen and all(map(_has_ended, seen.values())) and seen.keys() == followed:
                return
            if not followed and time.monotonic() > start_until:
                self._event("nothing", f"was started within {SECONDS_TO_START:.0f} s. {NOTHING_STARTED}")
                return
            time.sleep(0.3)
        self._event("continues", f"not completed within {SECONDS:.0f} s; GET /predictions/{{id}} shows its status")

    def _request(self, call: Call) -> set[str] | None:
        url = f"{self._stack.api_url}{call.path}"
        headers = dict(call.headers)
        note = ""
        if call.authorized:
            headers["Authorization"] = f"Bearer {self._stack.access_token}"
            note = ", with the stack's access token"
        self._event("sent", f"{call.method} {call.path}{note}")
        self._tell(call.body.decode(errors="replace"))
        with httpx.Client(trust_env=False, timeout=40) as http:
            answer = http.request(call.method, url, params=call.query, headers=headers, content=call.body)
        self._event("answer", f"{answer.status_code} {answer.reason_phrase}")
        if answer.is_redirect:
            self._terminal.detail("leads to", answer.headers["Location"])
        self._tell(answer.text)
        starts = call.method == "POST" and call.path.rpartition("/")[2] in STARTING
        if not starts or not answer.is_success:
            return None
        return self._named(answer.text, "id")

    def _invoke(self, invocation: Invocation) -> set[str] | None:
        logical_id = "".join(word.capitalize() for word in invocation.function.split("_")) + "Function"
        resource = self._client("cloudformation").describe_stack_resource(
            StackName=STACK_NAME, LogicalResourceId=logical_id
        )
        self._event("sent", f"invocation of {logical_id}")
        payload = json.dumps(invocation.payload)
        self._tell(payload)
        name = resource["StackResourceDetail"]["PhysicalResourceId"]
        answer = self._client("lambda").invoke(FunctionName=name, Payload=payload)
        told = answer["Payload"].read().decode()
        self._event("answer", answer.get("FunctionError", "of the function"))
        self._tell(told)
        return self._named(told, "prediction_id") or None

    def _named(self, text: str, name: str) -> set[str]:
        """Return the id in a response if it is a prediction's: batches have ids too."""
        with contextlib.suppress(ValueError):
            answer = json.loads(text)
            if isinstance(answer, dict) and isinstance(answer.get(name), str) and self._table.get(answer[name]):
                return {answer[name]}
        return set()

    def _end(self, prediction: Prediction) -> None:
        if prediction.error:
            self._event("error", prediction.error)
        whole = self._table.read(prediction.id)
        if whole is None:
            return
        for file in whole.files:
            if file.error:
                self._event("output", f"not stored: {file.error}")
                continue
            self._event("output", f"{file.bytes:,} bytes of {file.content_type}")
            self._terminal.detail("file", f"s3://{self._stack.outputs_bucket}/{file.key}")
        if not whole.files and whole.output is not None:
            self._event("output", json.dumps(whole.output)[:SHOWN_CHARACTERS])

    def _event(self, name: str, text: str) -> None:
        self._terminal.event(name, text, time.monotonic() - self._began)

    def _tell(self, text: str) -> None:
        if text:
            more = " …" if len(text) > SHOWN_CHARACTERS else ""
            self._terminal.detail("body", text[:SHOWN_CHARACTERS].strip() + more)

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = aws_client(self._stack.endpoint_url, service)
        return self._clients[service]


def _has_ended(prediction: Prediction) -> bool:
    return prediction.ended_visibly


def _content(key: str) -> bytes:
    """Return content for a key's suffix: requests, text or a picture."""
    lines = [{"model": MODEL, "input": {"prompt": prompt}} for prompt in ("a harbour in fog", "a lighthouse at dusk")]
    match Path(key).suffix.lower():
        case ".jsonl":
            return "".join(json.dumps(line) + "\n" for line in lines).encode()
        case ".json":
            return json.dumps(lines[0]).encode()
        case ".csv":
            return b"prompt\na harbour in fog\na lighthouse at dusk\n"
        case ".txt" | ".md":
            return b"a harbour in fog\n"
    return _picture()


def _picture() -> bytes:
    """Return a picture with visible content."""
    drawn = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(drawn, "PNG")
    return drawn.getvalue()
