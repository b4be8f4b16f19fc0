"""The predictions of the local Replicate: their life cycle from `starting` to the removal of their data.

They are stored in memory; their files are in the state folder. Both start empty.
"""

import asyncio
import base64
import hashlib
import json
import logging
import mimetypes
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from local.replicate.catalog import Model, models
from local.replicate.cog_servers import CogFailed, CogServer
from local.replicate.faults import Control, FaultName, timestamp
from local.replicate.webhooks import Webhooks

log = logging.getLogger(__name__)

JsonObject = dict[str, Any]

EVENTS = ("start", "output", "logs", "completed")
TERMINAL = ("succeeded", "failed", "canceled", "aborted")
# Webhooks for output and logs are sent at most this often (https://replicate.com/docs/topics/webhooks/setup-webhook).
THROTTLE_SECONDS = 0.5
HEARTBEAT_SECONDS = 15
ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def new_id() -> str:
    """Return 26 random characters of `[a-z0-9]`."""
    return "".join(secrets.choice(ID_LETTERS) for _ in range(26))


@dataclass
class Prediction:
    """One prediction, or training if it has a `destination`, with the state that the front needs."""

    model: Model
    version: str
    input: JsonObject
    webhook: str | None = None
    events: frozenset[str] = frozenset(EVENTS)
    deployment: str | None = None
    destination: str | None = None
    deadline: datetime | None = None
    id: str = field(default_factory=new_id)
    status: str = "starting"
    output: Any = None
    logs: str = ""
    error: str | None = None
    metrics: JsonObject = field(default_factory=dict)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    started_at: datetime | None = None
    completed_at: datetime | None = None
    data_removed: bool = False
    files: list[str] = field(default_factory=list)
    stream_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    stream: list[tuple[str, str]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    webhook_done: asyncio.Event = field(default_factory=asyncio.Event)
    emitted: dict[str, float] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None
    cancel_requested: bool = False

    @property
    def collection(self) -> str:
        """Return the path of its collection in the API."""
        return "trainings" if self.destination else "predictions"

    @property
    def terminal(self) -> bool:
        """Return whether the status is final."""
        return self.status in TERMINAL

    def to_json(self, origin: str) -> JsonObject:
        """Return the prediction as Replicate shows it, without keys without value."""
        urls = {
            "cancel": f"{origin}/v1/{self.collection}/{self.id}/cancel",
            "get": f"{origin}/v1/{self.collection}/{self.id}",
            "web": f"{origin}/p/{self.id}",
        }
        if self.model.streams and not self.destination:
            urls["stream"] = f"{origin}/stream/{self.stream_key}"
        shown: JsonObject = {
            "id": self.id,
            "model": self.model.path,
            "version": self.version,
            "input": self.input,
            "logs": self.logs,
            "output": self.output,
            "data_removed": self.data_removed,
            "error": self.error,
            "source": "api",
            "status": self.status,
            "created_at": timestamp(self.created_at),
            "urls": urls,
        }
        if self.destination:
            del shown["data_removed"]
        if self.deployment:
            shown["deployment"] = self.deployment
        for name in ("deadline", "started_at", "completed_at"):
            if moment := getattr(self, name):
                shown[name] = timestamp(moment)
        if self.metrics:
            shown["metrics"] = self.metrics
        return shown


@dataclass(frozen=True)
class StoredFile:
    """A file under `/files/{key}/{name}`."""

    path: Path
    name: str
    content_type: str
    model: str


class Predictions:
    """Runs predictions on Cog servers and keeps them until the process ends.

    Args:
        origin: The base URL of the front, without a slash at the end.
        state_dir: Folder for models, files and logs; files of an earlier run are removed.
    """

    def __init__(self, origin: str, state_dir: Path, control: Control) -> None:
        self.origin = origin
        self.upload_key = secrets.token_urlsafe(24)
        self._control = control
        self._files_folder = state_dir / "files"
        self._by_id: dict[str, Prediction] = {}
        self._stored: dict[str, StoredFile] = {}
        self._webhooks = Webhooks(control)
        self._tasks: set[asyncio.Task[None]] = set()
        for left_over in ("files", "models", "temporary"):
            shutil.rmtree(state_dir / left_over, ignore_errors=True)
        self._files_folder.mkdir(parents=True)
        self._servers = {}
        self._trainers = {}
        for path, model in models.items():
            model.write_to(state_dir / "models" / model.name)
            self._servers[path] = CogServer(
                state_dir / "models" / model.name,
                slots=model.slots,
                upload_url=f"{origin}/_cog/{self.upload_key}",
                temporary=state_dir / "temporary" / model.name,
            )
            if model.trainable:
                self._trainers[path] = CogServer(
                    state_dir / "models" / model.name,
                    slots=model.slots,
                    upload_url=f"{origin}/_cog/{self.upload_key}",
                    temporary=state_dir / "temporary" / f"{model.name}-training",
                    trains=True,
                )

    # Life

    def create(
        self,
        model: Model,
        version: str,
        input_: JsonObject,
        *,
        webhook: str | None,
        events: list[str] | None,
        deployment: str | None,
        lifetime_seconds: int | None,
        destination: str | None = None,
    ) -> Prediction:
        """Create and start a prediction, or a training if it has a destination."""
        # No filter means all events; an empty one is treated the same.
        prediction = Prediction(
            model, version, input_, webhook=webhook, events=frozenset(events or EVENTS), deployment=deployment,
            destination=destination,
        )  # fmt: skip
        if lifetime_seconds is not None:
            prediction.deadline = prediction.created_at + timedelta(seconds=lifetime_seconds)
            self._spawn(self._enforce_deadline(prediction, lifetime_seconds))
        self._by_id[prediction.id] = prediction
        prediction.task = self._spawn(self._run(prediction))
        return prediction

    def find(self, prediction_id: str) -> Prediction | None:
        """Return a prediction, or None, after removing its data if due."""
        prediction = self._by_id.get(prediction_id)
        if prediction is not None:
            self._remove_if_due(prediction)
        return prediction

    def find_stream(self, key: str) -> Prediction | None:
        """Return the prediction whose `urls.stream` ends with `key`, or None."""
        return next((found for found in self._by_id.values() if found.stream_key == key), None)

    def all(self) -> list[Prediction]:
        """Return every prediction, newest first."""
        for prediction in self._by_id.values():
            self._remove_if_due(prediction)
        return list(reversed(self._by_id.values()))

    async def cancel(self, prediction: Prediction) -> None:
        """Cancel a prediction; a running one is stopped by its model."""
        if prediction.status == "starting":
            self._stop_before_start(prediction, "canceled")
        elif not prediction.terminal:
            prediction.cancel_requested = True
            await self._server(prediction).cancel(prediction.id)

    async def wait(self, prediction: Prediction, seconds: float) -> None:
        """Wait until the prediction has completed, at most `seconds`."""
        try:
            await asyncio.wait_for(prediction.ended.wait(), seconds)
        except TimeoutError:
            return

    async def close(self) -> None:
        """Stop all tasks and servers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(
            self._webhooks.close(), *(server.stop() for server in (*self._servers.values(), *self._trainers.values()))
        )

    async def remove_when_due(self) -> None:
        """Remove the data of due predictions, in an endless loop."""
        while True:
            await asyncio.sleep(1)
            self.all()

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _server(self, prediction: Prediction) -> CogServer:
        return (self._trainers if prediction.destination else self._servers)[prediction.model.path]

    async def _run(self, prediction: Prediction) -> None:
        server = self._server(prediction)
        try:
            if late := self._control.take(
                FaultName.START_LATE, model=prediction.model.path, webhook=prediction.webhook
            ):
                await self._control.pause(late.seconds)
            async with server.slots:
                # Shielded, because others wait for the same start when this prediction is canceled.
                await asyncio.shield(self._spawn(server.ready()))
                prediction.status = "processing"
                prediction.started_at = datetime.now(UTC)
                self._emit(prediction, "start")
                if prediction.destination:
                    await self._train(prediction, server)
                else:
                    await self._follow(prediction, server)
        except CogFailed as error:
            self._end(prediction, "failed", error=str(error))
        except Exception:
            log.exception("internal error with prediction %s", prediction.id)
            self._end(prediction, "failed", error="Internal error of the local Replicate. See its log.")

    async def _follow(self, prediction: Prediction, server: CogServer) -> None:
        async for event, data in server.run(prediction.id, prediction.input):
            if event == "start" and prediction.cancel_requested:
                # Requested before Cog had the prediction.
                await server.cancel(prediction.id)
            elif event == "log":
                prediction.logs += data["data"]
                self._to_stream(prediction, "logs", data["data"])
                self._emit(prediction, "logs")
            elif event == "output":
                chunk = self._with_urls(prediction, data["chunk"], nested=prediction.model.grows)
                if prediction.model.grows:
                    prediction.output = [*(prediction.output or []), chunk]
                    self._to_stream(prediction, "output", str(chunk))
                else:
                    prediction.output = chunk
                self._emit(prediction, "output")
            elif event == "completed":
                if prediction.model.grows and data["status"] == "succeeded":
                    prediction.output = prediction.output or []
                prediction.logs = data.get("logs", prediction.logs)
                prediction.metrics = data.get("metrics", {})
                error = data.get("error")
                while error and error.startswith("Prediction failed: "):
                    error = error.removeprefix("Prediction failed: ")
                self._end(prediction, data["status"], error=error)

    async def _train(self, training: Prediction, server: CogServer) -> None:
        ended = await server.train(training.id, training.input)
        training.logs = ended.get("logs", "")
        training.metrics = ended.get("metrics", {})
        if ended["status"] == "succeeded":
            # A file in the output is a data: URL; the new version is derived from its bytes.
            version = hashlib.sha256(json.dumps([training.version, ended["output"]]).encode()).hexdigest()
            output = self._with_urls(training, ended["output"], nested=True)
            training.output = {"version": f"{training.destination}:{version}", **output}
        self._end(training, ended["status"], error=ended.get("error"))

    def _end(self, prediction: Prediction, status: str, *, error: str | None = None) -> None:
        if prediction.terminal:
            return
        prediction.status = status
        prediction.error = error
        prediction.completed_at = datetime.now(UTC)
        if status in ("failed", "aborted"):
            prediction.output = None
        if prediction.started_at:
            total = (prediction.completed_at - prediction.created_at).total_seconds()
            ran = (prediction.completed_at - prediction.started_at).total_seconds()
            prediction.metrics = {"predict_time": ran, **prediction.metrics, "total_time": total}
        if status != "succeeded" and error:
            self._to_stream(prediction, "error", '{"detail": "Prediction failed"}')
        reasons = {"failed": '{"reason": "error"}', "canceled": '{"reason": "canceled"}'}
        self._to_stream(prediction, "done", reasons.get(status, "{}"))
        self._emit(prediction, "completed")
        prediction.ended.set()

    async def _enforce_deadline(self, prediction: Prediction, seconds: float) -> None:
        await self.wait(prediction, seconds)
        if prediction.status == "starting":
            self._stop_before_start(prediction, "aborted")
        elif not prediction.terminal:
            await self.cancel(prediction)

    def _stop_before_start(self, prediction: Prediction, status: str) -> None:
        if prediction.task is not None:
            prediction.task.cancel()
        self._end(prediction, status)

    # Notifications

    def _emit(self, prediction: Prediction, event: str) -> None:
        """Send a webhook for `event`, if requested and not too soon after the last."""
        now = time.monotonic()
        throttled = event in ("output", "logs") and now - prediction.emitted.get(event, 0) < THROTTLE_SECONDS
        if prediction.webhook and event in prediction.events and not throttled:
            prediction.emitted[event] = now
            self._webhooks.send(
                prediction_id=prediction.id,
                model=prediction.model.path,
                event=event,
                url=prediction.webhook,
                body=prediction.to_json(self.origin),
                done=prediction.webhook_done.set if event == "completed" else lambda: None,
            )
        elif event == "completed":
            prediction.webhook_done.set()

    def _to_stream(self, prediction: Prediction, event: str, data: str) -> None:
        if prediction.model.streams:
            prediction.stream.append((event, data))
            prediction.changed.set()
            prediction.changed = asyncio.Event()

    async def stream_events(self, prediction: Prediction, last_event_id: str) -> AsyncIterator[str]:
        """Yield the output as server-sent events, from `last_event_id` on, until `done`."""
        start, _, last = last_event_id.partition(":")
        created = int(prediction.created_at.timestamp() * 1000)
        sent = int(last) + 1 if start == str(created) and last.isdecimal() else 0
        while True:
            changed = prediction.changed
            for event, data in prediction.stream[sent:]:
                lines = "".join(f"data: {line}\n" for line in data.split("\n"))
                yield f"id: {created}:{sent}\nevent: {event}\n{lines}\n"
                sent += 1
                if event == "done":
                    return
            if prediction.terminal and not prediction.stream[sent:]:
                return
            try:
                await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                yield ": heartbeat\n\n"

    # Files

    async def store(
        self, prediction_id: str, name: str, content_type: str, content: AsyncIterable[bytes]
    ) -> str | None:
        """Store an output file of a running prediction.

        Returns:
            Its public URL, or None if the prediction does not exist.
        """
        prediction = self._by_id.get(prediction_id)
        if prediction is None or prediction.terminal:
            return None
        url, path = self._place(prediction, name, content_type)
        with path.open("wb") as file:
            async for part in content:
                file.write(part)
        return url

    def file(self, key: str, name: str) -> StoredFile | None:
        """Return the file under `/files/{key}/{name}`, or None if not found."""
        stored = self._stored.get(key)
        return stored if stored is not None and stored.name == name else None

    def with_data_urls(self, value: Any) -> Any:
        """Return `value` with our own file URLs replaced by `data:` URLs."""
        if isinstance(value, str) and value.startswith(f"{self.origin}/files/"):
            stored = self._stored.get(value.split("/")[-2])
            if stored is not None:
                content = base64.b64encode(stored.path.read_bytes()).decode()
                return f"data:{stored.content_type};base64,{content}"
        if isinstance(value, list):
            return [self.with_data_urls(item) for item in value]
        if isinstance(value, dict):
            return {key: self.with_data_urls(item) for key, item in value.items()}
        return value

    def _place(self, prediction: Prediction, name: str, content_type: str) -> tuple[str, Path]:
        name = re.sub(r"[^A-Za-z0-9._ ()-]", "_", name)[-100:].strip(". ") or "output"
        key = secrets.token_urlsafe(24)
        path = self._files_folder / key
        self._stored[key] = StoredFile(path, name, content_type, prediction.model.path)
        prediction.files.append(key)
        return f"{self.origin}/files/{key}/{quote(name)}", path

    def _with_urls(self, prediction: Prediction, value: Any, *, nested: bool) -> Any:
        """Return `value` with `data:` URLs below its top level stored as files.

        Cog uploads a file that is the output or an item of it, but returns files inside an object as `data:`
        URLs; Replicate returns URLs for both. A `data:` URL at the top is the model's own output.
        """
        if isinstance(value, dict):
            return {key: self._with_urls(prediction, item, nested=True) for key, item in value.items()}
        if isinstance(value, list):
            return [self._with_urls(prediction, item, nested=True) for item in value]
        if nested and isinstance(value, str) and (match := re.match(r"data:([\w.+-]+/[\w.+-]+)(;base64)?,", value)):
            content = value[match.end() :]
            decoded = base64.b64decode(content) if match[2] else unquote_to_bytes(content)
            extension = mimetypes.guess_extension(match[1]) or ".bin"
            url, path = self._place(prediction, f"out-{len(prediction.files)}{extension}", match[1])
            path.write_bytes(decoded)
            return url
        return value

    def _remove_if_due(self, prediction: Prediction) -> None:
        if prediction.data_removed or prediction.completed_at is None:
            return
        age = (datetime.now(UTC) - prediction.completed_at).total_seconds()
        if age < self._control.settings.removal_seconds:
            return
        prediction.data_removed = True
        prediction.input, prediction.output, prediction.logs = {}, None, ""
        prediction.stream.clear()
        for key in prediction.files:
            if stored := self._stored.pop(key, None):
                stored.path.unlink(missing_ok=True)
        prediction.files.clear()
