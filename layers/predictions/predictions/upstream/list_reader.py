"""Readings of Replicate's list: the account's predictions, and completeness.

A reading is evidence only where it is complete. It is not if anything is odd: a page that is not 200, no list
`results`, an entry without a readable id or time, a `next` that leads in a circle or to another host, another order
than newest first, a response from a cache, or a clock that cannot be believed. Replicate's times are compared with
Replicate's own clock, which is the `Date` of its responses.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import httpx

from predictions.clock import parse_rfc3339
from predictions.upstream.client import Collection, Replicate
from predictions.upstream.entry_scanner import Entry, EntryScanner, MalformedListError
from predictions.upstream.errors import NotFound, Unavailable
from predictions.validation import input_json_canonical

MARGIN_SECONDS = 60
"""How much earlier than a claim an entry may seem to be created, by clocks that differ."""

# Lambda's clocks are kept by AWS: one that differs by more is Replicate's, or a proxy's.
_CLOCK_LIMIT_SECONDS = 300
# A page that was made so long before it was asked for may be a stored one, which shows nothing of meanwhile.
_CLOCK_BEHIND_SECONDS = 30
# Between two pages the difference of the clocks stays the same, but for whole seconds and the time on the way.
_CLOCK_STEP_SECONDS = 30
# So much later than the entry before it an entry may be.
_ORDER_SECONDS = 5

_PIECE_TIMEOUT_SECONDS = 7
_PIECE_BYTES = 64 * 1024
_ENTRY_SECONDS = 10


@dataclass(frozen=True)
class Listed:
    """A prediction or training as a list, or a GET, shows it.

    Attributes:
        created: By our clock, in seconds since 1970.
        webhook: Its webhook; None where none is shown.
        input_digest: Of its input; None where it is removed, not shown or too large to be compared.
    """

    id: str
    created: float
    status: str
    webhook: str | None
    version: str | None
    model: str | None
    deployment: str | None
    input_digest: str | None


@dataclass
class Reading:
    """The result of one reading.

    Attributes:
        began: When it began, in seconds since 1970.
        reached: Everything created since this moment, by our clock, was read.
        why_not: Why it is not complete; None where nothing was odd.
        clock_offset: By how much Replicate's clock is ahead of ours.
    """

    began: float
    entries: dict[str, Listed] = field(default_factory=dict)
    reached: float = float("inf")
    why_not: str | None = None
    pages: int = 0
    clock_offset: float | None = None

    def covers(self, start: float) -> bool:
        """Return whether it is complete for everything created since `start`."""
        return self.why_not is None and self.reached <= start


class _OddError(Exception):
    """The list shows something that a complete reading cannot have."""


class ListReader:
    """Reads Replicate's lists."""

    def __init__(self, replicate: Replicate, *, now: Callable[[], float] = time.time) -> None:
        self._replicate = replicate
        self._now = now

    def read(self, collection: Collection, back_to: float, *, may_ask: Callable[[], bool], over_at: float) -> Reading:
        """Read a list from its newest entry back to a moment.

        Args:
            collection: Which list.
            back_to: How far, by our clock. Where asking has to end earlier, the reading covers less.
            may_ask: Waits for the turn of one more call; False if none comes in time.
            over_at: When to stop.
        """
        reading = Reading(began=self._now())
        url: str | None = f"/{collection}"
        asked: set[str] = set()
        newest: float | None = None
        try:
            while url is not None and reading.reached > back_to and self._now() < over_at and may_ask():
                asked.add(url)
                following, entries = self._page(url, reading, over_at)
                for entry in entries:
                    if newest is not None and entry.created > newest + _ORDER_SECONDS:
                        raise _OddError("the entries are not in order, newest first")
                    newest = entry.created if newest is None else min(newest, entry.created)
                    reading.entries.setdefault(entry.id, entry)
                reading.pages += 1
                url = self._next(following, asked)
                if url is None:
                    reading.reached = float("-inf")
                elif newest is not None:
                    reading.reached = newest
        except (_OddError, MalformedListError) as error:
            reading.why_not = str(error)
        except Unavailable as error:
            reading.why_not = f"Replicate could not be read: {error}"
        if reading.pages == 0 and reading.why_not is None:
            reading.why_not = "there was no time to ask"
        return reading

    def _page(self, url: str, reading: Reading, over_at: float) -> tuple[object, list[Listed]]:
        scanner = EntryScanner()
        found: list[Entry] = []
        with self._replicate.opened(url, timeout_seconds=_PIECE_TIMEOUT_SECONDS) as response:
            if response.status_code != 200:
                raise _OddError(f"a page was answered {response.status_code}")
            offset = self._clock_offset(response, reading)
            for piece in response.iter_bytes(_PIECE_BYTES):
                found += scanner.feed(piece)
                if self._now() >= over_at:
                    raise _OddError("a page was not over in time")
        scanner.finish()
        if not scanner.has_results:
            raise _OddError("a page has no list `results`")
        now = self._now()
        entries = []
        for entry in found:
            listed = _listed(entry, offset)
            if listed is None:
                raise _OddError("an entry has no readable id or created_at")
            if listed.created > now + MARGIN_SECONDS:
                raise _OddError("an entry was created in the future")
            entries.append(listed)
        return scanner.following, entries

    def _clock_offset(self, response: httpx.Response, reading: Reading) -> float:
        if response.headers.get("age", "0").strip() != "0":
            raise _OddError("a page came from a cache")
        try:
            date = parsedate_to_datetime(response.headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            raise _OddError("a page has no valid Date header") from None
        offset = date - self._now()
        first = reading.clock_offset
        if abs(offset) > _CLOCK_LIMIT_SECONDS or (first is not None and abs(offset - first) > _CLOCK_STEP_SECONDS):
            raise _OddError("Replicate's clock cannot be believed")
        if offset < -_CLOCK_BEHIND_SECONDS:
            raise _OddError(f"a page was made {-offset:.0f} s before it was asked for")
        if first is None:
            reading.clock_offset = first = offset
        return first

    def _next(self, following: object, asked: set[str]) -> str | None:
        if following is None:
            return None
        if not isinstance(following, str) or not self._replicate.owns(following):
            # The token goes along, so a page on another host is not asked for.
            raise _OddError("`next` does not lead on")
        if following in asked:
            raise _OddError("`next` leads back to a page that was read")
        return following

    def entry(self, upstream_id: str, collection: Collection) -> Listed | None:
        """Read one prediction or training of any size; return None if not found.

        Raises:
            Unavailable: Replicate could not be asked, or its response is not a prediction.
        """
        scanner = EntryScanner(single=True)
        found: list[Entry] = []
        until = self._now() + _ENTRY_SECONDS
        try:
            with self._replicate.opened(
                f"/{collection}/{upstream_id}", timeout_seconds=_PIECE_TIMEOUT_SECONDS
            ) as response:
                if response.status_code in (404, 410):
                    raise NotFound(f"Replicate answered {response.status_code}")
                if response.status_code != 200:
                    raise Unavailable(f"Replicate answered {response.status_code}", response.status_code)
                for piece in response.iter_bytes(_PIECE_BYTES):
                    found += scanner.feed(piece)
                    if self._now() >= until:
                        raise Unavailable("the response was not over in time")
            scanner.finish()
        except MalformedListError as error:
            raise Unavailable(str(error)) from error
        except NotFound:
            return None
        listed = _listed(found[0], 0) if found else None
        if listed is None or listed.id != upstream_id:
            raise Unavailable("Replicate's response is not this prediction")
        return listed


def digest_of(input_json: str | bytes) -> str | None:
    """Return the digest that is equal for equal inputs, or None for invalid JSON."""
    try:
        return hashlib.sha256(input_json_canonical(json.loads(input_json)).encode()).hexdigest()
    except (ValueError, RecursionError):
        return None


def _listed(entry: Entry, clock_offset: float) -> Listed | None:
    id_, created, status = (entry.fields.get(name) for name in ("id", "created_at", "status"))
    if not isinstance(id_, str) or re.fullmatch(r"[a-z0-9]{1,64}", id_) is None:
        return None
    moment = parse_rfc3339(created)
    if moment is None:
        return None

    def text(name: str) -> str | None:
        value = entry.fields.get(name)
        return value if isinstance(value, str) and value else None

    # A webhook that cannot be kept is still one, and not of this stack.
    webhook = "unreadable" if "webhook" in entry.unreadable else text("webhook")
    removed = entry.fields.get("data_removed") is True or entry.input_json is None
    return Listed(
        id=id_,
        created=moment.timestamp() - clock_offset,
        status=status if isinstance(status, str) else "",
        webhook=webhook,
        version=text("version"),
        model=text("model"),
        deployment=text("deployment"),
        input_digest=None if removed else digest_of(entry.input_json or b""),
    )
