"""File hosts in this process: what `httpx.MockTransport` answers, as the copier's own client gives it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import httpx
from predictions.net.downloads import Download, DownloadClient, DownloadFailed, UrlInvalid


class HttpxDownloads(DownloadClient):
    """Downloads through a client of httpx, which some tests answer."""

    def __init__(self, client: httpx.Client) -> None:
        super().__init__()
        self._client = client

    def open(self, url: str, headers: Mapping[str, str]) -> Download:
        return _Answer(self._client, url, headers)


class _Answer(Download):
    def __init__(self, client: httpx.Client, url: str, headers: Mapping[str, str]) -> None:
        self._stack = ExitStack()
        try:
            self._response = self._stack.enter_context(client.stream("GET", url, headers=dict(headers)))
        except httpx.InvalidURL:
            raise UrlInvalid from None
        except httpx.HTTPError as error:
            raise DownloadFailed(type(error).__name__) from None
        self._url = self._response.url
        self.status = self._response.status_code
        self.headers = self._response.headers
        announced = self.headers.get("Content-Length", "")
        self.length = int(announced) if announced.isdecimal() else None
        self._chunks: Iterator[bytes] = filter(None, self._response.iter_raw())
        self._ahead = memoryview(b"")

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def read(self, size: int) -> memoryview:
        try:
            piece = self._ahead or memoryview(next(self._chunks, b""))
        except httpx.HTTPError as error:
            raise DownloadFailed(type(error).__name__) from None
        piece, self._ahead = piece[:size], piece[size:]
        return piece


def downloads_of(open_client: Callable[[], httpx.Client]) -> Callable[[], HttpxDownloads]:
    """What an `OutputsBucket` opens, made of what opens a client of httpx."""
    return lambda: HttpxDownloads(open_client())
