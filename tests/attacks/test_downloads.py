"""Output files from a host that means no good: over real connections, through the function that copies them."""

import gzip
import hashlib
import json
import os
import posixpath
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from predictions.aws import clients
from predictions.files.copier import STOP_BEFORE_SECONDS
from predictions.files.outputs_bucket import OutputsBucket, folder, safe_prefix
from predictions.store.predictions import PredictionsTable

from tests.reliability import Recorded
from tests.support.apps import Context, clock_module, load_app
from tests.support.fakes import PNG, Clock
from tests.support.hosts import Answer, HostileHost, endless, head, hostile_host, sends, silent, sink, whole
from tests.support.predictions import put, told

SEED = 20250615
MIB = 1024**2
MEMORY_BYTES = 32 * MIB
LATE_SECONDS = 0.5
UPSTREAM_ID = "u" * 26

Copy = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def host() -> Iterator[HostileHost]:
    with hostile_host({path: answer for path, (answer, _) in HOSTILE.items()} | NAMED) as host:
        yield host


@pytest.fixture
def copy(cloud: None, clock: Clock, host: HostileHost, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """Lets a prediction end with some files, and copies them as its execution does: the last time, with a verdict."""
    monkeypatch.setenv("FILE_ORIGINS", host.origin)
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("copy_outputs", template_only)
        # Between the attempts of a file are seconds.
        bucket = OutputsBucket("outputs", [host.origin], sleep=lambda seconds: None)
        table = PredictionsTable("predictions", bucket, clients.client("dynamodb"))
    monkeypatch.setattr(app, "outputs", bucket)
    monkeypatch.setattr(app, "time", clock_module(clock.now))

    def copy(output: Any, *, seconds: float = 800) -> list[dict[str, Any]]:
        prediction = put(table, clock)
        table.merge(prediction.id, told("succeeded", output=output), clock.now())
        clock.advance(2 * 3600)
        end = time.monotonic() + seconds + STOP_BEFORE_SECONDS

        class Running(Context):
            def get_remaining_time_in_millis(self) -> int:
                return int((end - time.monotonic()) * 1000)

        assert app.handler({"id": prediction.id, "execution": f"{prediction.id}-1"}, Running()) == {}
        found = table.read(prediction.id)
        assert found is not None
        assert found.prediction.visible == "succeeded"
        assert stored_objects() == {file.key for file in found.files if file.key}
        for file in found.files:
            assert file.key in (None, f"alice/{prediction.id}/{UPSTREAM_ID}/{file.index}")
        return [file.to_item() for file in found.files]

    return copy


def stored_objects() -> set[str]:
    """What is there of predictions; also that no upload was left behind."""
    s3 = clients.client("s3")
    assert s3.list_multipart_uploads(Bucket="outputs").get("Uploads", []) == []
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="outputs")
    keys = {found["Key"] for page in pages for found in page.get("Contents", [])}
    return {key for key in keys if not re.fullmatch(r"payloads/[a-z0-9]{26}/[0-9a-f]{64}\.json", key)}


# -- answers ------------------------------------------------------------------------------------------------------

BOMB = bytes(8 * MIB)


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


GZIP = gzip.compress(BOMB, mtime=0)
NESTED = gzip.compress(gzip.compress(GZIP, mtime=0), mtime=0)
# 16 MiB of zeros as RFC 7932 has them in a few bytes is for a browser to unpack: here nobody does.
BROTLI = bytes.fromhex("5bffffff0f00") + b"\x00" * 16

COMPRESSED = "the file host compressed the file, although it was asked not to"
CLOSE = "Connection: close"
NOT_HTTP = "the connection to the file host failed (RemoteProtocolError), 3 times"
NO_LENGTH = "the file host's response has no valid Content-Length, 3 times"
CHUNKED = "Transfer-Encoding: chunked"


def ended_after(got: int, announced: int) -> str:
    return f"the file ended after {got} of {announced} bytes, 3 times"


def chunks(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies) + b"0\r\n\r\n"


def packed(coding: str, body: bytes = GZIP) -> Answer:
    return sends(whole(body, "image/png", f"Content-Encoding: {coding}"))


# Each path: what the host does, and the error of the file, or the bytes that are stored.
HOSTILE: dict[str, tuple[Answer, str | bytes]] = {
    # Bombs: nothing is ever unpacked.
    "/gzip": (packed("gzip"), COMPRESSED),
    "/gzip-in-capitals": (packed("GZIP"), COMPRESSED),
    "/x-gzip": (packed("x-gzip"), COMPRESSED),
    "/gzip-twice": (packed("gzip, gzip", NESTED), COMPRESSED),
    "/gzip-in-two-headers": (packed("gzip\r\nContent-Encoding: gzip", NESTED), COMPRESSED),
    "/identity-and-gzip": (packed("identity, gzip"), COMPRESSED),
    "/deflate": (packed("deflate", zlib.compress(BOMB)), COMPRESSED),
    "/raw-deflate": (packed("deflate", raw_deflate(BOMB)), COMPRESSED),
    "/br": (packed("br", BROTLI), COMPRESSED),
    "/zstd": (packed("zstd"), COMPRESSED),
    "/compress": (packed("compress"), COMPRESSED),
    "/unknown-coding": (packed("aes128gcm"), COMPRESSED),
    "/many-codings": (packed(", ".join(["gzip"] * 1000)), COMPRESSED),
    "/coding-of-nothing": (packed(""), COMPRESSED),
    "/identity": (packed("Identity"), GZIP),
    "/bomb-as-it-is": (sends(whole(GZIP, "application/gzip")), GZIP),
    "/bomb-in-a-bomb": (sends(whole(NESTED, "image/png")), NESTED),
    "/brotli-as-it-is": (sends(whole(BROTLI, "image/png")), BROTLI),
    "/gzip-as-transfer": (sends(head("Transfer-Encoding: gzip, chunked") + chunks(GZIP)), NOT_HTTP),
    "/gzip-as-transfer-only": (sends(head("Transfer-Encoding: gzip") + GZIP), NOT_HTTP),
    # Lengths.
    "/short": (sends(head("Content-Length: 10") + b"x" * 9), NOT_HTTP),
    "/nothing-of-ten": (sends(head("Content-Length: 10")), NOT_HTTP),
    "/short-in-parts": (sends(head(f"Content-Length: {7 * MIB}"), bytes(6 * MIB)), NOT_HTTP),
    "/more-than-announced": (sends(head("Content-Length: 10") + b"x" * 10 + b"y" * 10), b"x" * 10),
    "/more-than-nothing": (sends(head("Content-Length: 0") + b"y" * 10), b""),
    "/length-negative": (sends(head("Content-Length: -1") + b"x"), NOT_HTTP),
    "/length-with-plus": (sends(head("Content-Length: +1") + b"x"), NOT_HTTP),
    "/length-in-e-notation": (sends(head("Content-Length: 1e0") + b"x"), NOT_HTTP),
    "/length-in-hexadecimal": (sends(head("Content-Length: 0x1") + b"x"), NOT_HTTP),
    "/length-of-a-fraction": (sends(head("Content-Length: 1.0") + b"x"), NOT_HTTP),
    "/length-not-ascii": (sends(head("Content-Length: \xb9") + b"x"), NOT_HTTP),
    "/length-empty": (sends(head("Content-Length:") + b"x"), NOT_HTTP),
    "/length-of-nan": (sends(head("Content-Length: NaN") + b"x"), NOT_HTTP),
    "/length-beyond-measure": (sends(head(f"Content-Length: {10**19}") + b"x"), NO_LENGTH),
    "/length-of-digits-without-end": (sends(head("Content-Length: " + "9" * 5000) + b"x"), NOT_HTTP),
    "/length-over-the-limit": (
        sends(head(f"Content-Length: {5 * 1024**3 + 1}") + b"x"),
        "the file is larger than 5 GiB",
    ),
    "/two-lengths-alike": (sends(head("Content-Length: 2", "Content-Length: 2") + b"xy"), b"xy"),
    "/two-lengths-alike-in-one": (sends(head("Content-Length: 2, 2") + b"xy"), b"xy"),
    "/two-lengths": (sends(head("Content-Length: 1", "Content-Length: 2") + b"xy"), NOT_HTTP),
    "/two-lengths-in-one": (sends(head("Content-Length: 1, 2") + b"xy"), NOT_HTTP),
    # These are whole, so that the connection would be used again by the next attempt, while the host hangs up.
    "/length-and-fewer-chunks": (
        sends(head("Content-Length: 9", CHUNKED, CLOSE) + chunks(b"x" * 8)),
        ended_after(8, 9),
    ),
    "/length-and-more-chunks": (sends(head("Content-Length: 2", CHUNKED, CLOSE) + chunks(b"x" * 8)), ended_after(8, 2)),
    "/length-and-as-many-chunks": (sends(head("Content-Length: 8", CHUNKED) + chunks(b"x" * 8)), b"x" * 8),
    "/no-length": (sends(head("Content-Type: image/png") + b"until the end"), b"until the end"),
    # Chunks.
    "/chunks": (sends(head(CHUNKED) + chunks(b"ab", b"cd")), b"abcd"),
    "/chunks-without-end": (sends(head(CHUNKED) + b"2\r\nab\r\n"), NOT_HTTP),
    "/chunk-cut-off": (sends(head(CHUNKED) + b"9\r\nab"), NOT_HTTP),
    "/chunk-of-no-size": (sends(head(CHUNKED) + b"zz\r\nab\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-of-negative-size": (sends(head(CHUNKED) + b"-2\r\nab\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-of-hexadecimal-size": (sends(head(CHUNKED) + b"0x2\r\nab\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-beyond-measure": (sends(head(CHUNKED) + b"f" * 40 + b"\r\nab\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-longer-than-it-says": (sends(head(CHUNKED) + b"2\r\nabc\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-with-long-extension": (sends(head(CHUNKED) + b"2;" + b"x" * 200_000 + b"\r\nab\r\n0\r\n\r\n"), NOT_HTTP),
    "/chunk-trailers-without-end": (sends(head(CHUNKED) + b"2\r\nab\r\n0\r\n" + b"A: b\r\n" * 50_000), NOT_HTTP),
    "/chunks-twice": (sends(head(CHUNKED, CHUNKED) + chunks(b"ab")), NOT_HTTP),
    "/chunks-of-another-kind": (sends(head("Transfer-Encoding: xchunked") + chunks(b"ab")), NOT_HTTP),
    # Heads.
    "/hangs-up": (sends(), NOT_HTTP),
    "/no-http": (sends(b"SSH-2.0-OpenSSH_9.7\r\n"), NOT_HTTP),
    "/http-0.9": (sends(b"<html>"), NOT_HTTP),
    "/http-2": (sends(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + bytes(18)), NOT_HTTP),
    "/tls": (sends(b"\x15\x03\x01\x00\x02\x02\x28"), NOT_HTTP),
    "/zeros": (sends(bytes(300_000)), NOT_HTTP),
    "/one-long-line": (sends(b"H" * 300_000), NOT_HTTP),
    "/status-of-five-digits": (sends(b"HTTP/1.1 20000 OK\r\n\r\n"), NOT_HTTP),
    "/status-of-letters": (sends(b"HTTP/1.1 abc OK\r\n\r\n"), NOT_HTTP),
    "/status-below-any": (sends(b"HTTP/1.1 000 OK\r\n\r\n"), NOT_HTTP),
    "/status-beyond-any": (
        sends(head("Content-Length: 0", status="999 ?")),
        "the file host answered 999, 3 times",
    ),
    "/huge-header": (sends(head("X: " + "x" * 300_000) + b"x"), NOT_HTTP),
    "/many-headers": (sends(head(*[f"X-{n}: {n}" for n in range(20_000)]) + b"x"), NOT_HTTP),
    "/header-without-name": (sends(head(": x") + b"x"), NOT_HTTP),
    "/header-without-colon": (sends(head("nonsense") + b"x"), NOT_HTTP),
    "/header-with-a-null": (sends(head("X: \0") + b"x"), NOT_HTTP),
    "/header-with-a-line-end": (sends(head("X: a\nSet-Cookie: b") + b"x"), b"x"),
    "/header-not-ascii": (sends(whole(b"x", "image/png", "X: \xff\xfe")), b"x"),
    "/informed-often": (sends(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 500 + whole(b"x")), b"x"),
    "/switches": (
        sends(head("Upgrade: websocket", "Connection: Upgrade", status="101 Switching Protocols")),
        NOT_HTTP,
    ),
    "/part-of-it": (
        sends(head("Content-Length: 1", "Content-Range: bytes 0-0/9", status="206 Partial Content") + b"x"),
        "the file host answered 206",
    ),
    "/redirects-to-itself": (
        sends(head("Location: /redirects-to-itself", "Content-Length: 0", status="302 Found")),
        "the file host redirected more than 5 times",
    ),
    "/redirects-without-place": (
        sends(head("Content-Length: 0", status="302 Found")),
        "the file host redirected more than 5 times",
    ),
}

NAMED: dict[str, Answer] = {"": sends(whole(b"named"))}


def test_each_hostile_answer_has_its_reason_or_exactly_its_bytes(
    copy: Copy, host: HostileHost, record_property: Recorded
) -> None:
    record_property("answers", len(HOSTILE))
    stored = copy([host.origin + path for path in HOSTILE])
    found = [file.get("error") or content(file["key"]) for file in stored]
    expected = [verdict for _, verdict in HOSTILE.values()]
    wrong = {
        path: (str(got)[:100], str(wanted)[:100])
        for path, got, wanted in zip(HOSTILE, found, expected, strict=True)
        if got != wanted
    }
    assert wrong == {}
    for file in stored:
        if "key" in file:
            body = content(file["key"])
            assert (file["bytes"], file["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def content(key: str) -> bytes:
    body: bytes = clients.client("s3").get_object(Bucket="outputs", Key=key)["Body"].read()
    return body


# -- time ---------------------------------------------------------------------------------------------------------

DRIP_SECONDS = 0.05
IMAGE = head("Content-Type: image/png")

# What never ends; each byte comes well before any timeout of a connection.
SLOW: dict[str, Answer] = {
    "/slow/nothing": silent(),
    "/slow/head-and-nothing": silent(head("Content-Length: 10")),
    "/slow/some-and-nothing": silent(head("Content-Length: 10") + b"12345"),
    "/slow/body": endless(b"x", start=IMAGE, every=DRIP_SECONDS),
    "/slow/announced-body": endless(b"x", start=head(f"Content-Length: {MIB}"), every=DRIP_SECONDS),
    "/slow/chunks": endless(b"1\r\nx\r\n", start=head(CHUNKED), every=DRIP_SECONDS),
    "/slow/chunk-extension": endless(b"x", start=head(CHUNKED) + b"1;", every=DRIP_SECONDS),
    "/slow/trailers": endless(b"A: b\r\n", start=head(CHUNKED) + b"0\r\n", every=DRIP_SECONDS),
    "/slow/status-line": endless(b" ", start=b"HTTP/1.1 200 ", every=DRIP_SECONDS),
    "/slow/header": endless(b"x", start=b"HTTP/1.1 200 OK\r\nX: ", every=DRIP_SECONDS),
    "/slow/headers": endless(b"X: y\r\n", start=b"HTTP/1.1 200 OK\r\n", every=DRIP_SECONDS),
    "/slow/hints": endless(b"HTTP/1.1 103 Early Hints\r\n\r\n", start=b"", every=DRIP_SECONDS),
    "/fast/body": endless(bytes(65536), start=IMAGE),
    "/fast/chunks": endless(b"10000\r\n" + bytes(65536) + b"\r\n", start=head(CHUNKED)),
    "/fast/hints": endless(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, start=b""),
    "/fast/redirects": sends(head("Location: /slow/header", "Content-Length: 0", status="302 Found")),
}


@pytest.mark.parametrize("paths", [list(SLOW)[n : n + 4] for n in range(0, len(SLOW), 4)], ids=lambda paths: paths[0])
def test_answer_without_end_is_over_within_half_a_second_of_the_deadline(
    copy: Copy, host: HostileHost, paths: list[str]
) -> None:
    host.answers = {**host.answers, **SLOW}

    def took() -> float:
        host.asked.clear()
        started = time.monotonic()
        stored = copy([host.origin + path for path in paths], seconds=0.7)
        assert [file.get("error", "stored") for file in stored] == ["the time for copying was over"] * 4
        assert len(host.asked) == 4 + ("/fast/redirects" in paths), "none was asked for again"
        return time.monotonic() - started

    assert in_time(took, 0.7 + LATE_SECONDS) > 0.6


def in_time(took: Callable[[], float], limit: float) -> float:
    """Measures up to three times: on a machine with more to do than it has cores, everything may be late once."""
    measured = [took()]
    while measured[-1] >= limit and len(measured) < 3:
        measured.append(took())
    assert measured[-1] < limit, measured
    return measured[-1]


def test_the_ten_minutes_of_one_file_hold_for_each_step_of_its_connection(cloud: None, host: HostileHost) -> None:
    """The clock is ahead by almost ten minutes as soon as the host has been asked."""
    host.answers = SLOW

    def took() -> float:
        host.asked.clear()
        bucket = OutputsBucket(
            "outputs",
            [host.origin],
            clock=lambda: time.monotonic() + (599.5 if host.asked else 0.0),
            sleep=lambda seconds: None,
        )
        started = time.monotonic()
        [stored] = bucket.store(
            bucket.find_files(f"{host.origin}/slow/header"), prefix="a/b", remaining_seconds=lambda: 900.0, final=True
        )
        assert stored.error == "the file host took more than 600 seconds"
        return time.monotonic() - started

    assert in_time(took, 0.5 + LATE_SECONDS) > 0.4


# -- memory -------------------------------------------------------------------------------------------------------


def test_memory_stays_within_32_mib_whatever_comes_at_once(host: HostileHost) -> None:
    """Measured in a process of its own, which sends to S3 what it gets."""
    large = 24 * MIB
    in_pieces = [bytes(MIB)] * (large // MIB)
    one_chunk = head(CHUNKED) + b"%x\r\n" % large
    host.answers = {
        "/small": sends(whole(PNG)),
        "/large": sends(head(f"Content-Length: {large}"), *in_pieces),
        "/in-one-chunk": sends(one_chunk, *in_pieces, b"\r\n0\r\n\r\n"),
        "/bomb": packed("gzip", NESTED),
        "/bomb-as-it-is": sends(whole(NESTED)),
        "/endless": endless(bytes(65536), start=IMAGE),
        "/endless-chunks": endless(b"1\r\nx\r\n" * 10_000, start=head(CHUNKED)),
        "/endless-head": endless(b"X: " + b"y" * 1000 + b"\r\n", start=b"HTTP/1.1 200 OK\r\n"),
        "/endless-line": endless(b"y" * 65536, start=b"HTTP/1.1 200 OK\r\nX: "),
    }
    finite = ["/large", "/large", "/in-one-chunk", "/in-one-chunk", "/bomb", "/bomb-as-it-is", "/endless-head",
              "/endless-line"]  # fmt: skip
    without_end = ["/endless", "/endless", "/endless-chunks", "/endless"]
    question = {
        "warm_up": f"{host.origin}/small",
        "predictions": [
            {"files": [host.origin + path for path in finite], "seconds": 100},
            {"files": [host.origin + path for path in without_end], "seconds": 1.5},
        ],
    }
    program = Path(__file__).with_name("copier.py")
    with sink() as s3_url:
        environment = {**os.environ, "FILE_ORIGINS": host.origin, "AWS_ENDPOINT_URL_S3": s3_url}
        ran = subprocess.run(  # noqa: S603  # our own program
            [sys.executable, program, json.dumps(question)], env=environment, capture_output=True, text=True,
            timeout=100, check=False,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    print(f"{answer['bytes_above_start'] / MIB:.1f} MiB above the start")  # noqa: T201  # a figure, with pytest -s
    verdicts = [[file.get("error", file.get("bytes")) for file in stored] for stored in answer["stored"]]
    assert verdicts == [
        [large] * 4 + [COMPRESSED, len(NESTED)] + [NOT_HTTP] * 2,
        ["the time for copying was over"] * 4,
    ]
    assert answer["bytes_above_start"] < MEMORY_BYTES


# -- what browsers would make of it -------------------------------------------------------------------------------

HTML = b"<!doctype html><script>alert(document.domain)</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
POLYGLOTS = {
    "html": HTML,
    "svg": SVG,
    "javascript": b"/*\x89PNG*/alert(1)",
    "gif and javascript": b"GIF89a=1;alert(1)//" + bytes(30),
    "png and html": PNG + HTML,
    "jpeg and html": b"\xff\xd8\xff\xfe\x00\x40" + HTML + b"\xff\xd9",
    "pdf and html": b"%PDF-1.7\n" + HTML,
    "zip and html": HTML + b"PK\x05\x06" + bytes(18),
    "utf-7 html": b"+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "html behind a byte order mark": b"\xef\xbb\xbf" + HTML,
    "html behind a kilobyte of spaces": b" " * 1024 + HTML,
    "xslt": b'<?xml version="1.0"?><?xml-stylesheet href="data:text/xsl,x" type="text/xsl"?><a/>',
    "multipart html": b"--x\r\nContent-Type: text/html\r\n\r\n" + HTML,
}
DOWNLOAD = ("application/octet-stream", "attachment")

# What the host says it is, and what the bucket serves it as, always with the name that the file has no say in.
TYPES: dict[str, tuple[str, str | None]] = {
    "image/png": ("image/png", None),
    "IMAGE/JPEG; q=1": ("image/jpeg", None),
    "image/png;": ("image/png", None),
    "image/png ; charset=utf-8": ("image/png", None),
    "image/png; boundary=text/html": ("image/png", None),
    "text/plain": ("text/plain", None),
    "text/plain; charset=utf-8": ("text/plain; charset=utf-8", None),
    'text/csv; charset="UTF-8"': ("text/csv; charset=utf-8", None),
    "text/plain; charset=utf-7": ("text/plain", None),
    "text/plain; charset=iso-2022-jp": ("text/plain", None),
    "application/json; charset=utf-8": ("application/json", None),
    "application/pdf": ("application/pdf", None),
    "audio/mpeg": ("audio/mpeg", None),
    "video/mp4": ("video/mp4", None),
    "model/gltf-binary": ("model/gltf-binary", None),
    **dict.fromkeys(
        [
            "text/html", "text/html; charset=utf-8", "TEXT/HTML", "text/html;image/png", "image/png, text/html",
            "text/html, image/png", "image/svg+xml", "IMAGE/SVG+XML", "image/svg", "application/xhtml+xml",
            "application/xml", "text/xml", "text/xsl", "application/xslt+xml", "application/rss+xml",
            "application/atom+xml", "application/mathml+xml", "application/rdf+xml", "model/x3d+xml",
            "text/javascript", "application/javascript", "application/x-javascript", "text/ecmascript",
            "text/jscript", "application/wasm", "text/css", "text/x-component", "text/x-html", "text/vbscript",
            "application/x-shockwave-flash", "application/java-archive", "application/x-java-applet",
            "application/hta", "application/x-msdownload", "application/x-xpinstall", "application/pdf+xml",
            "multipart/x-mixed-replace", "multipart/related", "multipart/form-data; boundary=x", "message/rfc822",
            "text/cache-manifest", "text/event-stream", "application/octet-stream", "application/unknown",
            "unknown/unknown", "*/*", "image/*", "image/pngx", "ximage/png", "image/png/html", "image/p\xf1g",
            "image png", "image", "png", "", " ", ";", "; charset=utf-8", "/", "\xff\xfe",
            "image/png%0d%0aX: y", "image/" + "png" * 10_000, '"image/png"', "image/png#text/html",
        ],
        DOWNLOAD,
    ),
}  # fmt: skip


def test_what_can_run_in_a_browser_is_only_ever_a_download(copy: Copy, host: HostileHost) -> None:
    bodies = list(POLYGLOTS.values())
    answers = {
        f"/typed/{n}": sends(whole(bodies[n % len(bodies)], named, "Content-Disposition: inline; filename=x.html"))
        for n, named in enumerate(TYPES)
    }
    host.answers = {**host.answers, **answers}
    stored = copy([host.origin + path for path in answers])
    wrong = {}
    for n, (file, (named, expected)) in enumerate(zip(stored, TYPES.items(), strict=True)):
        found = clients.client("s3").get_object(Bucket="outputs", Key=file["key"])
        served = found["ContentType"], found.get("ContentDisposition")
        if served != expected or file["content_type"] != expected[0] or found["Body"].read() != bodies[n % len(bodies)]:
            wrong[named[:60]] = served
        assert set(found["Metadata"]) == {"origin-depth"}
    assert wrong == {}


def test_polyglot_is_served_as_what_it_was_called_or_not_at_all(copy: Copy, host: HostileHost) -> None:
    """No type that a browser sniffs for HTML: https://mimesniff.spec.whatwg.org/#determining-the-computed-mime-type"""
    sources = [f"data:{kind},{quote(body)}" for body in POLYGLOTS.values() for kind in ("image/png", "text/html")]
    stored = copy(sources)
    for file, body, expected in zip(
        stored,
        [body for body in POLYGLOTS.values() for _ in range(2)],
        [("image/png", None), DOWNLOAD] * len(POLYGLOTS),
        strict=True,
    ):
        found = clients.client("s3").get_object(Bucket="outputs", Key=file["key"])
        assert (found["ContentType"], found.get("ContentDisposition")) == expected
        assert found["Body"].read() == body


# -- names --------------------------------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "...", "/", "//", "../", "../..", "../../etc/passwd", "..\\..\\windows\\win.ini",
    "a/../../b", "/etc/passwd", "//169.254.169.254/x", "\\\\host\\share", "C:\\x", "file:///etc/passwd",
    "~/x", "~root", "%2e%2e%2f", "%252e%252e%252f", "%25252e", "%c0%ae%c0%ae/", "%00", "..%00/", "..;/",
    "..%5c", "%ff%fe", "payloads/x", "payloads", "alice", "bob/x", "../bob/x", "files/bob/x", "x" * 1024,
    "x" * 5000, "/".join("a" * 600), "\0", "a\0b", "a\nb", "a\r\nX: y", "\x1b[2J", "\x7f", "\x85", "\u2028",
    "\u202egnp.exe", "\u2066x\u2069", "\u200b", "\ufeff", "\u00ad", "\ufffd", "\uffff", "\U000e0041",
    "\U0010ffff", "\ud800", "a\udfffb", "\ud83d\ude00", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301" * 300, "\u0301" * 600, "\u00e9", "\ufdfa" * 512,
    "\uff0e\uff0e\uff0f", "\u2024\u2024/", "\u2215", "\u29f8", "\u3002", "CON", "NUL", "aux.png", "COM1",
    "LPT9.txt", "a.", "a ", " a", "-rf", "--help", "$(id)", "`id`", "${HOME}", "{{7*7}}", "%s%n",
    "'; DROP TABLE x;--", "<script>", "&amp;", '"', "'", "|", "*", "?", "[x]", "!", "#", ":", ";", ",", "=",
    "@", "+", "^", ".htaccess", ".git/config", "._x", ".DS_Store", "x.png/", "x.png?versionId=null",
    "x.png#a", "soap/", "a//b", "a/./b", "./a", "a/.", "a/..", "..a", "a..", "_", "__proto__", "z" * 26,
    f"{'z' * 26}/{'u' * 26}/0", "phbiy2aqvath546nlxzgyq5c3q/x",
]  # fmt: skip


def names(count: int) -> list[str]:
    """The names of the table, and mixtures of what is in them."""
    rng = random.Random(SEED)  # noqa: S311  # not for secrets
    atoms = [*NAMES, "/", ".", "..", "%", "\\", "a", "payloads", "alice", chr(0)]

    def character() -> str:
        return chr(rng.choice((rng.randrange(32), rng.randrange(256), rng.randrange(0x3000), rng.randrange(0x110000))))

    made = [
        "".join(rng.choice(atoms)[:600] if rng.random() < 0.6 else character() for _ in range(rng.randrange(1, 12)))
        for _ in range(count - len(NAMES))
    ]
    return NAMES + made


def test_place_made_of_any_name_is_in_the_owners_part_and_short(record_property: Recorded) -> None:
    record_property("names", 20_000)
    bucket = OutputsBucket("outputs")
    for name in names(20_000):
        place = folder("alice", "p" * 26, safe_prefix(name) or None)
        key = f"{place}/{UPSTREAM_ID}/99999"
        assert bucket.store([], prefix=f"{place}/{UPSTREAM_ID}", remaining_seconds=lambda: 900) == [], name
        assert key.startswith("alice/")
        assert posixpath.normpath(key) == key, name
        assert re.fullmatch(r"[A-Za-z0-9._@+=/-]+", key), name
        assert len(key.encode()) <= 1024
        assert key.split("/").count("p" * 26) == 1
        # The folder of another prediction of this owner is one of 26 such characters, right below the owner.
        second = key.split("/")[1]
        assert second == "p" * 26 or not re.fullmatch(r"[a-z0-9]{26}", second), name


def test_file_of_any_name_is_stored_under_its_number(copy: Copy, host: HostileHost) -> None:
    """By its URL and by `Content-Disposition`: as it is where a URL may hold it, and percent-encoded."""
    named = names(400)
    urls = [f"{host.origin}/{name}" for name in named if OutputsBucket("o", [host.origin]).find_files(
        f"{host.origin}/{name}"
    )]  # fmt: skip
    urls += [f"{host.origin}/{quote(name.encode('utf-8', 'replace'), safe='')}" for name in named[: 2 * len(NAMES)]]
    headers = [re.sub(r"[^ -~\x80-\xff]", "_", name.encode("utf-8", "replace").decode("latin-1")) for name in NAMES]
    host.answers = {
        "": lambda connection: sends(
            whole(b"named", "image/png", f'Content-Disposition: attachment; filename="{rng.choice(headers)}"')
        )(connection)
    }
    rng = random.Random(SEED)  # noqa: S311  # not for secrets
    stored = copy(urls)
    assert len(urls) > 400
    assert [(file["index"], file["bytes"]) for file in stored] == [(n, 5) for n in range(len(urls))]
