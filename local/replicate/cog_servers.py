"""Real Cog servers, one process for each model, started when the first prediction needs it."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

log = logging.getLogger(__name__)

JsonObject = dict[str, Any]

SETUP_SECONDS = 30
# Replicate ends a run after 30 minutes.
RUN_SECONDS = 30 * 60
# The variables that a model may see: enough to run and to fetch its inputs, no credentials.
PASSED_ON = ("HOME", "LANG", "LC_ALL", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
             "http_proxy", "https_proxy", "no_proxy")  # fmt: skip


class CogFailed(Exception):
    """The Cog server did not start, rejected the prediction, or died while it ran."""


class CogServer:
    """One Cog server: a process that is started on demand, and again after a crash.

    Args:
        folder: Holds `predict.py` and `.cog/openapi_schema.json`; the server's working directory.
        slots: The number of concurrent predictions.
        upload_url: The URL for output files: `PUT {upload_url}/{name}` with the header `x-prediction-id`.
        temporary: Folder for its temporary files.
        trains: Whether it trains the model (`train` in `train.py`) instead of running it.
    """

    def __init__(self, folder: Path, *, slots: int, upload_url: str, temporary: Path, trains: bool = False) -> None:
        self.slots = asyncio.Semaphore(slots)
        self._folder = folder
        self._concurrency = slots
        self._upload_url = upload_url
        self._temporary = temporary
        self._trains = trains
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._url = ""
        # No proxy: the server is on this machine.
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(30, read=RUN_SECONDS), trust_env=False)

    async def ready(self) -> None:
        """Wait until the server accepts predictions.

        Raises:
            CogFailed: The server failed to start twice; the message names its log file.
        """
        async with self._starting:
            # A busy machine may respond too slowly: running predictions must not be killed for that.
            if await self._health() in ("READY", "BUSY", "SILENT"):
                return
            for _ in range(2):  # twice, because another process may have taken the port in between
                await self._end_process()
                await self._start_process()
                for _ in range(SETUP_SECONDS * 20):
                    health = await self._health()
                    if health == "READY":
                        return
                    if health in ("ENDED", "SETUP_FAILED"):
                        break
                    await asyncio.sleep(0.05)
            await self._end_process()
        raise CogFailed(f"The Cog server of {self._folder.name} did not start. See {self._folder}/cog.log")

    async def run(self, prediction_id: str, input_: JsonObject) -> AsyncIterator[tuple[str, JsonObject]]:
        """Run one prediction and yield Cog's events until its completion.

        Yields:
            `("start", …)`, `("log", {"source", "data"})`, `("output", {"chunk", "index"})`, and last
            `("completed", {"status", "output"?, "logs", "error"?, "metrics"})`.

        Raises:
            CogFailed: The server rejected it or died.
        """
        try:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(200):
                    response = await stack.enter_async_context(
                        self._client.stream(
                            "PUT",
                            f"{self._url}/predictions/{prediction_id}",
                            json={"input": input_},
                            headers={"accept": "text/event-stream"},
                        )
                    )
                    if response.status_code != 409:
                        break
                    # The previous run's slot is released a moment after its last event.
                    await asyncio.sleep(0.02)
                if response.status_code != 200:
                    body = (await response.aread()).decode(errors="replace")
                    raise CogFailed(f"Cog refused the prediction ({response.status_code}): {body[:500]}")
                event = ""
                async for line in response.aiter_lines():
                    if line.startswith("event:"):
                        event = line[6:].strip()
                    elif line.startswith("data:"):
                        yield event, json.loads(line[5:])
                        if event == "completed":
                            return
        except httpx.HTTPError as error:
            raise CogFailed(f"The model's process went away ({type(error).__name__})") from error
        raise CogFailed("The model's process went away before the prediction had ended")

    async def train(self, training_id: str, input_: JsonObject) -> JsonObject:
        """Run one training to completion, before which Cog reports no progress.

        Returns:
            `{"status", "output"?, "logs", "error"?, "metrics"}`.

        Raises:
            CogFailed: The server rejected it or died.
        """
        try:
            for _ in range(200):
                answer = await self._client.put(f"{self._url}/trainings/{training_id}", json={"input": input_})
                if answer.status_code != 409:
                    break
                await asyncio.sleep(0.02)
            ended: JsonObject = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise CogFailed(f"The training's process went away ({type(error).__name__})") from error
        if answer.status_code != 200:
            raise CogFailed(f"Cog refused the training ({answer.status_code}): {answer.text[:500]}")
        return ended

    async def cancel(self, prediction_id: str) -> None:
        """Request cancellation; the last event is then `completed` with status `canceled`."""
        collection = "trainings" if self._trains else "predictions"
        with contextlib.suppress(httpx.HTTPError):
            await self._client.post(f"{self._url}/{collection}/{prediction_id}/cancel", timeout=5)

    async def stop(self) -> None:
        """Stop the process and its worker."""
        await self._end_process()
        await self._client.aclose()

    async def _start_process(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._temporary.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        # Cog spawns its worker as `python` from PATH: that must be the Python that has cog installed.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment["TMPDIR"] = str(self._temporary)
        environment["COG_MAX_CONCURRENCY"] = str(self._concurrency)
        with (self._folder / "cog.log").open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", str(Path(__file__).with_name("run_cog.py"))),
                *(str(port), self._upload_url, str(self._temporary), *(["train"] if self._trains else [])),
                cwd=self._folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a group of its own, so that its worker can be ended with it
            )
        log.info("started the Cog server of %s on %s", self._folder.name, self._url)

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 2)

    async def _health(self) -> str:
        """Return Cog's health (`STARTING`, `READY`, `BUSY`, …), or `ENDED`, or `SILENT`."""
        if self._process is None or self._process.returncode is not None:
            return "ENDED"
        try:
            answer = await self._client.get(f"{self._url}/health-check", timeout=5)
            return str(answer.json()["status"])
        except (httpx.HTTPError, ValueError, KeyError):
            return "SILENT"
