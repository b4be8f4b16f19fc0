"""Labels and traces of requests: which are accepted, where they go, and where never."""

import json
from typing import Any

import pytest
from predictions.errors import Problem
from predictions.intents.groups import identity_of, read_group
from predictions.intents.labels import filled_labels, read_label, with_common_labels
from predictions.intents.model import (
    Intent,
    create_intent,
    create_requested_intent,
    create_training,
    training_reference,
)
from predictions.intents.trace import read_traceparent
from predictions.pipelines.definition import fingerprint
from predictions.store.records import Filters, prediction_of

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
VERSION = "5" * 64


def asked(headers: dict[str, str] | None = None, **body: Any) -> Intent:
    sent = json.dumps({"version": VERSION, "input": {}, **body}).encode()
    return create_intent(sent, headers or {}, owner="alice", reference=None, allow_loopback_webhooks=False)


def message(**body: Any) -> Intent:
    request = {"version": VERSION, "input": {}, **body}
    return create_requested_intent(
        request, owner="alice", source="queue", source_key="1", allow_loopback_webhooks=False
    )


def refused_fields(problem: Problem) -> list[str]:
    return [str(each["field"]) for each in problem.invalid_fields]


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        ("team", "key=value"),
        ("=vision", "key=value"),
        ("team=", "key=value"),
        ("team=a,,b=c", "key=value"),
        ("te am=vision", "key=value"),
        ("team=a b", "key=value"),
        ("team=%zz", "key=value"),
        ("team=%4", "key=value"),
        ("team=ü", "key=value"),
        ("tëam=a", "key=value"),
        ("team=\x01", "key=value"),
        ("team=a,team=b", "twice"),
        ("team=%ff", "UTF-8"),
        ("team=%00", "control"),
        ("k" * 65 + "=a", "key=value"),
        ("team=" + "a" * 257, "256"),
        ("team=" + "a" * 1020, "1024"),
        (",".join(f"k{n}=v" for n in range(11)), "10"),
    ],
)
def test_header_with_bad_labels_is_refused_by_its_name(header: str, detail: str) -> None:
    with pytest.raises(Problem, match=detail) as refused:
        asked({"x-labels": header})
    assert (refused.value.status, refused_fields(refused.value)[0][:8]) == (422, "X-Labels")


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ([], "labels"),
        ("team=vision", "labels"),
        ({"team": 1}, "labels.team"),
        ({"team": None}, "labels.team"),
        ({"team": ""}, "labels.team"),
        ({"team": "a" * 257}, "labels.team"),
        ({"team": "a\n"}, "labels.team"),
        ({"": "a"}, "labels"),
        ({"te am": "a"}, "labels"),
        ({"k" * 65: "a"}, "labels"),
        ({f"k{n}": "é" * 256 for n in range(3)}, "labels"),
        ({f"k{n}": "v" for n in range(11)}, "labels"),
        ({str(n): "v" for n in range(1_000_000)}, "labels"),
    ],
)
def test_message_with_bad_labels_is_refused_by_its_field(labels: Any, field: str) -> None:
    with pytest.raises(Problem) as refused:
        message(labels=labels)
    assert (refused.value.status, refused_fields(refused.value)) == (422, [field])
    assert len(json.dumps(refused.value.body())) < 2000


@pytest.mark.parametrize(
    ("header", "labels"),
    [
        ("team=vision", {"team": "vision"}),
        (" team=vision ,\tproject=spring%20catalog", {"team": "vision", "project": "spring catalog"}),
        ("a.b-c_D1=x=y", {"a.b-c_D1": "x=y"}),
        ("town=K%C3%B6ln%2C%25", {"town": "Köln,%"}),
        ("", {}),
        (",".join(f"k{n}=v" for n in range(10)), {f"k{n}": "v" for n in range(10)}),
    ],
)
def test_header_gives_the_labels_of_predictions_and_trainings(header: str, labels: dict[str, str]) -> None:
    assert asked({"x-labels": header}).labels == labels
    training = create_training(
        json.dumps({"destination": "a/b", "input": {}}).encode(), {"x-labels": header, "traceparent": TRACE},
        owner="alice", reference=training_reference("a", "b", "5" * 64), allow_loopback_webhooks=False,
    )  # fmt: skip
    assert (training.labels, training.traceparent) == (labels, TRACE)


def test_request_with_other_labels_is_the_same_request() -> None:
    plain, labeled = asked(), asked({"x-labels": "team=vision", "traceparent": TRACE})
    assert plain.fingerprint == labeled.fingerprint
    assert message().fingerprint == message(labels={"team": "a"}, traceparent=TRACE).fingerprint
    assert message(labels={"team": "a"}).labels == {"team": "a"}


def test_batch_or_pipeline_with_other_labels_is_the_same_one_as_before_there_were_labels() -> None:
    before = {"requests": [1], "manifest": None}
    added = {"labels": {"team": "a"}, "webhook": None, "webhook_events_filter": None}
    assert identity_of({**before, **added}) == before
    assert identity_of({**before, "webhook": "https://a.example"}) != before
    assert fingerprint({"steps": [], "labels": {"a": "b"}}) == fingerprint({"steps": []})


def test_labels_are_no_fields_of_replicates_body() -> None:
    with pytest.raises(Problem) as refused:
        asked(labels={"team": "vision"})
    assert refused_fields(refused.value) == ["labels"]


def test_label_of_its_own_has_precedence_over_a_common_one() -> None:
    request = {"input": {}, "labels": {"team": "own"}}
    assert with_common_labels(request, {"team": "common", "a": "b"})["labels"] == {"team": "own", "a": "b"}
    assert with_common_labels({"labels": 7}, {"a": "b"}) == {"labels": 7}
    found, invalid = read_group({"team": "own"}, None, {"x-labels": "team=x,a=b"}, allow_loopback=False)
    assert (found, invalid) == ({"labels": {"team": "own", "a": "b"}}, [])


def test_labels_of_body_and_header_together_have_the_same_limit() -> None:
    body = {f"k{n}": "v" for n in range(10)}
    _, invalid = read_group(body, None, {"x-labels": "one=more"}, allow_loopback=False)
    assert [each["field"] for each in invalid] == ["X-Labels"]


def test_number_that_a_placeholder_gives_is_a_text() -> None:
    assert filled_labels({"n": 7, "on": True, "t": "x", "none": None}) == {
        "n": "7",
        "on": "true",
        "t": "x",
        "none": None,
    }
    assert filled_labels("x") == "x"


@pytest.mark.parametrize("text", ["", "team", "=a", "te am=a", "team=", "team=" + "a" * 257, "team=\x07"])
def test_filter_that_is_no_label_is_refused(text: str) -> None:
    with pytest.raises(Problem) as refused:
        read_label(text)
    assert refused_fields(refused.value) == ["label"]


def test_filter_matches_key_and_value() -> None:
    item = {
        "id": "p", "owner": "alice", "created_at": "", "created": 0, "fingerprint": "", "source": "http",
        "keyed": False, "kind": "version", "rank": 0, "status": "queued", "visible": "starting", "deadline": 0,
        "execution_n": 1, "expires_at": 0,
    }  # fmt: skip
    labeled, plain = prediction_of({**item, "labels": {"team": "a=b"}}), prediction_of(item)
    assert Filters(label=read_label("team=a=b")).match(labeled)
    assert not Filters(label=("team", "a")).match(labeled)
    assert not Filters(label=("team", "a=b")).match(plain)
    assert Filters(label=("a", "b"))


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (TRACE, TRACE),
        (TRACE.replace("00-", "01-", 1) + "-more", TRACE),
        (TRACE.replace("00-", "cc-", 1)[:-2] + "ff", TRACE),
        (TRACE + "-more", None),
        (TRACE.replace("00-", "ff-", 1), None),
        (TRACE.upper(), None),
        (TRACE[:-1], None),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", None),
        (TRACE.replace("b7ad6b7169203331", "0" * 16), None),
        (f" {TRACE}", None),
        (TRACE + "\n", None),
        ("01" + TRACE[2:] + "-" + "x" * 1000, None),
        ("", None),
        (7, None),
        (None, None),
    ],
)
def test_invalid_trace_is_ignored(value: Any, kept: str | None) -> None:
    assert read_traceparent(value) == kept
    assert message(traceparent=value).traceparent == kept
    if isinstance(value, str):
        assert asked({"traceparent": value}).traceparent == kept
