"""The local Replicate as a child process, for tests and for the local cloud."""

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

JsonObject = dict[str, Any]

START_SECONDS = 30
STOP_SECONDS = 10


class LocalReplicate:
    """Runs `python -m local.replicate` and talks to its control routes.

        with LocalReplicate() as replicate:
            replicate.fault("webhook_lost", events=["completed"])
            httpx.post(f"{replicate.url}/predictions", headers=replicate.headers, json={…})

    Args:
        state_dir: Folder for files and logs (`front.log`); by default a temporary one, removed at the end.
        token: The access token that it accepts; random without it.
        port: 0 picks a free one.
        options: Further arguments, such as `--removal-seconds=5`.

    Attributes:
        url: Base URL that ends in `/v1`.
        origin: The same without `/v1`; output files are under `{origin}/files/`.
        token: The access token.
    """

    def __init__(
        self,
        state_dir: Path | None = None,
        *,
        token: str | None = None,
        port: int = 0,
        options: tuple[str, ...] = (),
    ) -> None:
        self.token = token or f"r8_{secrets.token_hex(18)}"
        self.url = ""
        self.origin = ""
        self._temporary = None if state_dir else tempfile.TemporaryDirectory(prefix="local-replicate-")
        self.state_dir = state_dir or Path(self._temporary.name if self._temporary else "")
        self._arguments = [
            f"--port={port}",
            f"--state-dir={self.state_dir}",
            f"--token={self.token}",
            *options,
        ]
        self._process: subprocess.Popen[str] | None = None
        self._client = httpx.Client(timeout=30, trust_env=False)

    def start(self) -> Self:
        """Start the process and wait until it accepts requests.

        Raises:
            RuntimeError: The process ended or was silent for 30 s; the message has the end of its log.
        """
        self.state_dir.mkdir(parents=True, exist_ok=True)
        log = self.state_dir / "front.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "local.replicate", *self._arguments],
                cwd=Path(__file__).parents[2],
                env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                # A group of its own: Ctrl-C in a terminal is for the parent, which then stops this one.
                start_new_session=True,
            )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self.stop()
            raise RuntimeError(f"The local Replicate did not start:\n{log.read_text()[-2000:] if log.exists() else ''}")
        self.url = json.loads(line)["url"]
        parts = urlsplit(self.url)
        self.origin = f"{parts.scheme}://{parts.netloc}"
        return self

    def stop(self) -> None:
        """Stop the process and its Cog servers; may be called twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
        self._client.close()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def __enter__(self) -> Self:
        """Start the process."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the process."""
        self.stop()

    @property
    def pid(self) -> int | None:
        """Return the process id while it runs, else None."""
        return self._process.pid if self._process else None

    @property
    def headers(self) -> dict[str, str]:
        """Return the `Authorization` header that it accepts."""
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def signing_secret(self) -> str:
        """Return the key of its webhook signatures, `whsec_…`."""
        answer = self._client.get(f"{self.url}/webhooks/default/secret", headers=self.headers)
        return str(answer.raise_for_status().json()["key"])

    def fault(self, name: str, **options: Any) -> None:
        """Activate a fault; see `local.replicate.faults.FaultName` and `Fault`."""
        self._control("POST", "faults", {"fault": name, **options})

    def settings(self, **options: Any) -> JsonObject:
        """Change settings and return all of them; see `local.replicate.faults.Settings`."""
        return self._control("POST", "settings", options)

    def release(self) -> None:
        """Remove the faults, and end what they hold up: late answers, starts and webhooks."""
        self._control("POST", "release")

    def reset(self) -> None:
        """Clear record and faults and restore the settings; predictions stay."""
        self._control("POST", "reset")

    def record(self) -> JsonObject:
        """Return its `requests`, `webhooks` and `predictions`, each oldest first."""
        return self._control("GET", "record")

    def creates(self, webhook: str = "") -> list[JsonObject]:
        """Return the recorded creates whose webhook URL contains `webhook`."""
        creates = (
            request
            for request in self.record()["requests"]
            if request["method"] == "POST" and request["path"].endswith(("/predictions", "/trainings"))
        )
        if not webhook:
            return list(creates)
        return [
            request
            for request in creates
            if isinstance(request["body"], dict) and webhook in str(request["body"].get("webhook"))
        ]

    def wait_for_webhook(self, prediction_id: str, event: str = "completed", *, seconds: float = 20) -> JsonObject:
        """Return the record of the first attempt to send a webhook, as soon as it is made.

        Raises:
            TimeoutError: No attempt was made within `seconds`.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for entry in self.record()["webhooks"]:
                if entry["prediction"] == prediction_id and entry["event"] == event:
                    return dict(entry)
            time.sleep(0.05)
        raise TimeoutError(f"no webhook {event} of {prediction_id} within {seconds} s")

    def _control(self, method: str, name: str, body: JsonObject | None = None) -> JsonObject:
        answer = self._client.request(method, f"{self.origin}/_control/{name}", json=body)
        if answer.is_error:
            raise ValueError(f"{method} /_control/{name}: {answer.text}")
        return dict(answer.json())
