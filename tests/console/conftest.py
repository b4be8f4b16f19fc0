"""The console in a real browser, on a local stack: ``make console-test``.

Only Playwright and pytest are here; the stack is a process of its own, as a user starts it. A test fails on a message
in the browser's console, on an error of the page, on a response of 500 and above, and on a request to another host.
"""

import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / ".local" / "console"
"""Where each run keeps a screenshot of each page."""

START_SECONDS = 300
expect.set_options(timeout=30_000)


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


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603  # of this checkout
                [ROOT / ".venv" / "bin" / "python", "-m", "local", "run"],
                cwd=ROOT,
                env={**os.environ, "LOCAL_DIR": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            # `env` waits for nothing: the file appears when the stack is ready.
            described = wait_for(Path(folder) / "stack.json", process, log)
            yield Stack(
                described["api_url"],
                described["access_token"],
                described["outputs_bucket"],
                described["endpoint_url"],
            )
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """Return what `stack.json` says once the stack is ready."""
    for _ in range(START_SECONDS):
        if path.exists() and (text := path.read_text()):
            found: dict[str, Any] = json.loads(text)
            return found
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the stack did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # In a container every user is root, for whom Chromium has no sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=options)
        yield browser
        browser.close()


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


SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 375, "height": 760}}


@pytest.fixture(params=SIZES)
def sized(request: pytest.FixtureRequest, open_page: Callable[..., Watched]) -> Watched:
    """A page that is signed in, on a desktop and on a phone."""
    return open_page(viewport=SIZES[request.param])


@pytest.fixture
def open_page(browser: Browser, stack: Stack) -> Iterator[Callable[..., Watched]]:
    contexts: list[BrowserContext] = []
    pages: list[Watched] = []

    def make(*, signed_in: bool = True, **options: Any) -> Watched:
        context = browser.new_context(**options)
        contexts.append(context)
        watched = Watched(context.new_page(), stack)
        pages.append(watched)
        watched.watch()
        if signed_in:
            watched.sign_in()
        return watched

    yield make
    for each in contexts:
        each.close()
    for page in pages:
        assert page.wrong == []
        others = {url for url in page.addresses if not url.startswith((stack.endpoint_url, "blob:"))}
        assert others == set(), "nothing is loaded from other hosts"
        assert not any(stack.token in url for url in page.addresses), "no token in a URL"
