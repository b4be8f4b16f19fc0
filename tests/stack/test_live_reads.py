"""Live reads on the deployed stack: a GET shows what Replicate shows, whatever Replicate does."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from local.cloud import LocalCloud
from local.replicate.process import LocalReplicate
from tests.reliability import Recorded

Api = Callable[..., httpx.Client]
WaitUntil = Callable[..., Any]
TERMINAL = ("succeeded", "failed", "canceled")


def start(client: httpx.Client, model: str, **input_: Any) -> str:
    body = {"version": f"local/{model}", "input": input_, "webhook_events_filter": ["completed"]}
    return str(client.post("/predictions", json=body).raise_for_status().json()["id"])


def watch(client: httpx.Client, prediction_id: str, seconds: float = 120) -> list[dict[str, Any]]:
    """What a caller sees until it has ended, about five times a second."""
    seen, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        seen.append(client.get(f"/predictions/{prediction_id}").raise_for_status().json())
        if seen[-1]["status"] in TERMINAL:
            return seen
        time.sleep(0.2)
    raise AssertionError(f"not ended within {seconds} s: {seen[-1]}")


def get_seconds(client: httpx.Client, prediction_id: str) -> float:
    """How long a GET of a running prediction takes."""
    began = time.monotonic()
    assert client.get(f"/predictions/{prediction_id}").json()["status"] == "processing"
    return time.monotonic() - began


def upstream_reads(replicate: LocalReplicate) -> int:
    asked = replicate.record()["requests"]
    return sum(
        each["method"] == "GET" and each["path"].startswith("/v1/predictions/") and "stream" not in each["path"]
        for each in asked
    )


def test_words_and_logs_come_while_the_model_runs(api: Api, replicate: LocalReplicate) -> None:
    replicate.fault("webhook_lost", times=None, events=["output", "logs"])
    prediction_id = start(api("alice"), "storyteller", prompt="a lamp", max_tokens=12, delay_seconds=0.5)
    seen = watch(api("alice"), prediction_id)
    lengths = [len(each.get("output") or []) for each in seen if each["status"] == "processing"]
    # Where the machine is too busy for four looks a second apart, each look shows more.
    assert len(set(lengths)) >= min(4, len(lengths)) >= 2, lengths
    assert lengths == sorted(lengths)
    assert max(lengths) < len(seen[-1]["output"]) == 12


def test_no_url_of_replicate_is_shown_while_pictures_come(api: Api, replicate: LocalReplicate) -> None:
    prediction_id = start(api("alice"), "series", count=4, delay_seconds=0.7)
    seen = watch(api("alice"), prediction_id)
    running = [each for each in seen if each["status"] == "processing"]
    assert any("Picture 2 of 4" in each["logs"] for each in running)
    assert not any(replicate.origin in json.dumps(each) for each in seen)
    assert all(each.get("output") is None for each in running)
    assert len(seen[-1]["output"]) == 4


def test_many_readers_of_one_prediction_ask_once_a_second_and_nobody_asks_where_none_looks(
    api: Api, replicate: LocalReplicate, record_property: Recorded
) -> None:
    began = time.monotonic()
    watched = start(api("alice"), "sleeper", seconds=4)
    start(api("alice"), "sleeper", seconds=4)  # nobody looks
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: watch(api("alice"), watched), range(4)))
    reads = upstream_reads(replicate)
    record_property("reads of Replicate", reads)
    # One a second, and the polls of both, after 5 s and every 3 s, had the end been late.
    seconds = time.monotonic() - began
    assert 2 <= reads <= seconds + 1 + 2 * max(0, 1 + (seconds - 5) // 3)
    assert sum(map(len, answers)) > reads


def test_reader_waits_less_than_two_seconds_while_replicate_hangs(
    api: Api, cloud: LocalCloud, replicate: LocalReplicate, wait_until: WaitUntil, record_property: Recorded
) -> None:
    prediction_id = start(api("alice"), "sleeper", seconds=3600)
    wait_until(lambda: api("alice").get(f"/predictions/{prediction_id}").json()["status"] == "processing")
    usual = max(get_seconds(api("alice"), prediction_id) for _ in range(5))
    replicate.fault("get_silence", times=None, seconds=20)
    took = []
    for _ in range(12):
        took.append(get_seconds(api("alice"), prediction_id))
        time.sleep(0.3)
    record_property("milliseconds of the longest answer", round(1000 * max(took)))
    # After three failures in a row no GET asks for 30 s; the execution polls.
    hung = [each for each in replicate.record()["requests"] if each.get("fault") == "get_silence"]
    assert 3 <= len(hung) <= 5, took
    # The bound of a read is 1.5 s, beside what an answer takes on this machine.
    assert sorted(took)[len(took) // 2] < 1.5 + usual
    assert max(took) < 5 + usual
    cloud.client("dynamodb").delete_item(
        TableName=cloud.stack.table_name, Key={"pk": {"S": "live_reads"}, "sk": {"S": "budget"}}
    )
    assert api("alice").post(f"/predictions/{prediction_id}/cancel").status_code == 200
