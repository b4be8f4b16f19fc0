"""The console in a real browser, on a local stack: ``make console-test``.

Only Playwright and pytest are here; the stack is a process of its own, as a user starts it. A test fails on a message
in the browser's console, on an error of the page, on a response of 500 and above, and on a request to another host.
"""

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.console.browser import ROOT, SIZES, Stack, Watched

START_SECONDS = 300
expect.set_options(timeout=30_000)


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
