"""A reading of Replicate's list is complete, or says why not."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from predictions.upstream.client import Replicate
from predictions.upstream.list_reader import ListReader, Reading, digest_of

from tests.support.fakes import Clock

URL = "https://api.replicate.com/v1"
Answer = Callable[[httpx.Request], httpx.Response]


class _Token:
    def value(self) -> str:
        return "r8_token"

    def forget(self) -> None:
        """Nothing is cached here."""


def entry(name: str, created: float, **fields: Any) -> dict[str, Any]:
    moment = datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")
    return {"id": name, "created_at": moment, "status": "starting", "input": {"prompt": name}, **fields}


def reader(clock: Clock, answer: Answer) -> ListReader:
    http = httpx.Client(transport=httpx.MockTransport(answer))
    token: Any = _Token()
    return ListReader(Replicate(URL, token, http), now=clock.now)


def dated(clock: Clock, offset: float = 0) -> dict[str, str]:
    moment = datetime.fromtimestamp(clock.now() + offset, UTC)
    return {"date": format_datetime(moment, usegmt=True)}


def page(clock: Clock, *entries: Any, following: Any = None) -> httpx.Response:
    return httpx.Response(200, json={"next": following, "results": list(entries)}, headers=dated(clock))


def read(clock: Clock, answer: Answer, *, back: float = 100, seconds: float = 25, calls: int = 99) -> Reading:
    left = iter(range(calls))
    return reader(clock, answer).read(
        "predictions",
        clock.now() - back,
        may_ask=lambda: next(left, None) is not None,
        over_at=clock.now() + seconds,
    )


class TestComplete:
    def test_list_that_ends_is_complete_for_any_time(self, clock: Clock) -> None:
        found = read(clock, lambda _: page(clock, entry("a", clock.now() - 5)))
        assert found.why_not is None
        assert found.covers(0)
        assert list(found.entries) == ["a"]
        assert found.entries["a"].input_digest == digest_of('{"prompt":"a"}')

    def test_pages_are_followed_until_an_entry_is_older(self, clock: Clock) -> None:
        pages = [
            page(clock, entry("a", clock.now() - 5), following=f"{URL}/predictions?cursor=1"),
            page(clock, entry("b", clock.now() - 101), following=f"{URL}/predictions?cursor=2"),
        ]
        found = read(clock, lambda _: pages.pop(0))
        assert found.pages == 2
        assert found.covers(clock.now() - 100)
        assert not found.covers(clock.now() - 102)

    def test_times_are_replicates_by_its_own_clock(self, clock: Clock) -> None:
        ahead = {"next": None, "results": [entry("a", clock.now() + 120)]}
        found = read(clock, lambda _: httpx.Response(200, json=ahead, headers=dated(clock, 120)))
        assert found.why_not is None
        assert found.entries["a"].created == clock.now()

    def test_fewer_calls_than_it_takes_cover_less_and_are_no_fault(self, clock: Clock) -> None:
        url = f"{URL}/predictions?cursor=1"
        found = read(clock, lambda _: page(clock, entry("a", clock.now() - 5), following=url), calls=1)
        assert (found.why_not, found.pages) == (None, 1)
        assert found.covers(clock.now() - 5)
        assert not found.covers(clock.now() - 6)

    def test_webhook_that_is_unreadable_is_one_all_the_same(self, clock: Clock) -> None:
        found = read(clock, lambda _: page(clock, entry("a", clock.now(), webhook="w" * 9000)))
        assert found.entries["a"].webhook == "unreadable"


def no_date(clock: Clock) -> httpx.Response:
    return httpx.Response(200, json={"next": None, "results": []})


def odd(clock: Clock) -> dict[str, list[httpx.Response]]:
    now = clock.now()
    good: dict[str, Any] = {"next": None, "results": []}
    second = f"{URL}/predictions?cursor=1"
    return {
        "an error": [httpx.Response(500, json={}, headers=dated(clock))],
        "a redirect": [httpx.Response(302, headers=dated(clock))],
        "no content": [httpx.Response(204, headers=dated(clock))],
        "no JSON": [httpx.Response(200, content=b"<html>", headers=dated(clock))],
        "no results": [httpx.Response(200, json={"next": None}, headers=dated(clock))],
        "results that are no list": [httpx.Response(200, json={"results": {}}, headers=dated(clock))],
        "cut short": [httpx.Response(200, content=json.dumps(good).encode()[:-1], headers=dated(clock))],
        "no next": [httpx.Response(200, json={"results": []}, headers=dated(clock))],
        "next of another host": [page(clock, following="https://evil.example/v1/predictions")],
        "next that is a number": [page(clock, following=7)],
        "next in a circle": [page(clock, entry("a", now), following=second), page(clock, following=second)],
        "an entry without id": [page(clock, {"created_at": "2026-01-01T00:00:00Z"})],
        "an id that is none": [page(clock, entry("../a", now))],
        "an entry without a time": [page(clock, {"id": "a"})],
        "a time without zone": [page(clock, {"id": "a", "created_at": "2026-01-01T00:00:00"})],
        "a time that is none": [page(clock, {"id": "a", "created_at": "yesterday"})],
        "an entry of the future": [page(clock, entry("a", now + 120))],
        "another order": [page(clock, entry("b", now - 90), entry("a", now - 1))],
        "no clock": [no_date(clock)],
        "a clock that is wrong": [httpx.Response(200, json=good, headers=dated(clock, 400))],
        "a clock that jumps": [
            page(clock, entry("a", now), following=second),
            httpx.Response(200, json=good, headers=dated(clock, 100)),
        ],
        "a page of before": [httpx.Response(200, json=good, headers=dated(clock, -40))],
        "a cached page": [httpx.Response(200, json=good, headers={**dated(clock), "age": "30"})],
        "an error on a later page": [page(clock, entry("a", now), following=second), httpx.Response(503)],
    }


class TestIncomplete:
    @pytest.mark.parametrize("kind", odd(Clock()))
    def test_odd_list_is_no_reading(self, clock: Clock, kind: str) -> None:
        answers = odd(clock)[kind]
        found = read(clock, lambda _: answers.pop(0))
        assert found.why_not
        assert not found.covers(clock.now())

    def test_connection_that_fails_is_no_reading(self, clock: Clock) -> None:
        def fail(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("nothing")

        assert "could not be read" in (read(clock, fail).why_not or "")

    def test_page_that_takes_too_long_is_no_reading(self, clock: Clock) -> None:
        class Slow(httpx.SyncByteStream):
            def __iter__(self) -> Any:
                while True:
                    clock.advance(5)
                    yield b" " * 65536

        found = read(clock, lambda _: httpx.Response(200, headers=dated(clock), stream=Slow()))
        assert "in time" in (found.why_not or "")

    def test_without_a_single_call_there_is_no_reading(self, clock: Clock) -> None:
        assert read(clock, lambda _: page(clock), calls=0).why_not

    def test_token_goes_to_no_other_host(self, clock: Clock) -> None:
        asked: list[str] = []

        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request.url.host)
            return page(clock, entry("a", clock.now()), following="https://evil.example/v1/predictions")

        read(clock, answer)
        assert asked == ["api.replicate.com"]
