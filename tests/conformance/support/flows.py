"""What the flows of every client in Python share: how they are told, and what they look at.

A client's program has a function for each flow, marked with `flow`, and ends with `run()`. Its environment:
``API_URL`` (with ``/v1``), ``ACCESS_TOKEN`` (every scope), ``WEAK_TOKEN`` (`read` only), ``RECORD_URL`` (what the
stand-in for Replicate was asked), and ``LIVE``, if a read shows a running prediction as it is.
"""

import itertools
import json
import os
import sys
import time
import traceback
import urllib.request
import uuid

API_URL, ACCESS_TOKEN, WEAK_TOKEN = (os.environ[name] for name in ("API_URL", "ACCESS_TOKEN", "WEAK_TOKEN"))
NOT_OFFERED = "–"  # noqa: RUF001 - what the table shows
# Words at a pace: what grows must be seen to grow within so many seconds.
NARRATION = {"prompt": "a fox", "words_total": 10, "seconds": 5}
FLOWS = {}


def flow(function):
    """Mark a flow, which is named as the function; what it returns is in what the client differs."""
    function.is_flow = True
    FLOWS[function.__name__] = function
    return function


def run(flows=FLOWS):
    """Run the flows that are named on the command line, or all that are possible here."""
    for name in sys.argv[1:] or flows:
        if name.startswith("live_") and not os.environ.get("LIVE"):
            continue
        ok = True
        try:
            detail = flows[name]() or ""
        except Exception:  # noqa: BLE001 - it is told as the flow's failure
            ok, detail = False, traceback.format_exc()
        sys.stdout.write(json.dumps({"flow": name, "ok": ok, "detail": detail}) + "\n")
        sys.stdout.flush()


def raised(kind, function, *arguments, **named):
    """Return the error that a call ends with."""
    try:
        function(*arguments, **named)
    except kind as error:
        return error
    raise AssertionError("it did not fail")


def unique():
    """Return a prompt that no other request has; as a key, too."""
    return f"fox-{uuid.uuid4().hex}"


def fetched(url, **headers):
    """Return what an address gives; `HTTPError` unless it is a success."""
    request = urllib.request.Request(str(url), headers=headers)  # noqa: S310 - of the stack, or of the stand-in
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
        return answer.read()


def picture(url):
    """Return the bytes of a picture."""
    # On AWS a FileOutput; the local cloud's URLs are http, which clients leave as text.
    data = fetched(getattr(url, "url", url))
    assert data[1:4] == b"PNG", f"{url} is no PNG"
    return data


def record():
    """Return the requests that the stand-in for Replicate got, oldest first."""
    return json.loads(fetched(os.environ["RECORD_URL"]))["requests"]


def creates(prompt):
    """Return the creates at Replicate whose input has a prompt."""
    creates = [each for each in record() if each["method"] == "POST" and each["path"].endswith("/predictions")]
    return [each for each in creates if (each["body"] or {}).get("input", {}).get("prompt") == prompt]


def stream_reader(streamed):
    """Return how a client identified itself to the host of streams, while `streamed` ran.

    Returns:
        `missing` if it sent no token, `wrong` if it sent one that is not Replicate's, or None if it did not connect.
    """
    before = len(record())
    streamed()
    readers = [each["authorization"] for each in record()[before:] if each["path"].startswith("/stream/")]
    return readers[-1] if readers else None


def opened(url):
    """Return the words of a stream that is opened without a token."""
    assert not url.startswith(API_URL), f"{url} is of the stack"
    text = fetched(url, Accept="text/event-stream").decode()
    events = [part for part in text.split("\n\n") if "\nevent: output\n" in f"\n{part}\n"]
    return "".join(line.removeprefix("data: ") for part in events for line in part.split("\n") if "data: " in line)


def grew(pieces):
    """Return the text of an iterator whose pieces come while the model runs, not all at the end."""
    times, texts = [], []
    for piece in pieces:
        times.append(time.monotonic())
        texts.append(str(piece))
    distinct = [a for a, b in itertools.pairwise(times) if b - a > 0.2]
    assert len(distinct) >= 2, f"{len(texts)} pieces came at {len(distinct) + 1} times, not while the model ran"
    return "".join(texts)


def growing(values):
    """Assert that what was seen while `processing` grew."""
    lengths = [len(value or "") for value in values]
    assert lengths == sorted(lengths), lengths
    assert len(set(lengths)) >= 3, f"seen while processing: {lengths}"
