"""The stack and the pages that the tests of the console use."""

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / ".local" / "console"
"""Where each run keeps a screenshot of each page."""

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 375, "height": 760}}


@dataclass(frozen=True)
class Stack:
    """A running stack, by its `stack.json`."""

    api_url: str
    token: str
    bucket: str
    endpoint_url: str

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Call the API as its owner does."""
        request = urllib.request.Request(  # noqa: S310  # our own
            self.api_url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # our own
            return json.loads(response.read())


@dataclass
class Watched:
    """A page, and what went wrong in it."""

    page: Page
    stack: Stack
    wrong: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Begin to listen."""
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.on("response", lambda response: self._look(response.status, response.url))
        self.page.on("dialog", self._dismiss)

    def _dismiss(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _look(self, status: int, url: str) -> None:
        if status >= 500:
            self.wrong.append(f"{status} of {url}")

    def open(self, route: str = "") -> None:
        """Open a route of the console."""
        self.page.goto(f"{self.stack.api_url}/console{route}")

    def sign_in(self) -> None:
        """Open the console and sign in."""
        self.open()
        self.page.get_by_label("Access token").fill(self.stack.token)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("heading", name="Gallery")).to_be_visible()

    def keep(self, name: str) -> None:
        """Keep a screenshot."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        width = (self.page.viewport_size or {"width": 0})["width"]
        self.page.screenshot(path=PICTURES / f"{name}-{width}.png", full_page=True)

    def forgive(self, of: str) -> None:
        """Forget the messages that a refusal leaves in the browser's console: it logs each 4xx itself."""
        self.wrong = [each for each in self.wrong if of not in each]
