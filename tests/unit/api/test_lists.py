"""Lists of predictions that are narrowed: what their pages hold together, what they read, and for whom."""

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictions.aws import clients
from predictions.aws.dynamodb import Table
from predictions.status import rank_of, visible
from predictions.store.keys import list_of, prediction_key
from predictions.store.predictions import PredictionsTable

from tests.support.apps import AwsCalls, Context, load_app, sample
from tests.support.described import check_answer
from tests.support.fakes import API_URL, VERSION
from tests.support.protocol import Submissions

SEEN = {
    "queued": "starting",
    "starting": "starting",
    "processing": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "canceled": "canceled",
    "aborted": "canceled",
    "copying": "processing",
}
"""What callers see of a status; `copying` stands for one that has succeeded, and whose files are being copied."""
STARTED_BY = {
    "http": "api",
    "run_job": "invocation",
    "queue": "queue",
    "recipe": "recipe",
    "batch": "batch",
    "pipeline": "pipeline",
}
"""By `source` of the item, which is what items of all releases have."""
MODELS = ("acme/fox", "acme/harbour", None)
ITEM = st.tuples(
    st.sampled_from(["alice"] * 6 + ["bob", "trainings#alice"]),
    st.sampled_from(list(SEEN)),
    st.sampled_from(MODELS),
    st.sampled_from(list(STARTED_BY)),
    st.booleans(),
)
FILTER = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(sorted(set(SEEN.values()))),
        "model": st.sampled_from(["acme/fox", "acme/harbour", "acme/unknown"]),
        "origin": st.sampled_from(list(STARTED_BY.values())),
    },
)

Get = Callable[..., dict[str, Any]]


def put(n: int, listed: str, status: str, model: str | None, source: str, *, bound: bool = True) -> str:
    """A status item in the list `listed`, the `n`-th in time; its id."""
    upstream = "succeeded" if status == "copying" else status
    id_, created_at = f"{n:026}", f"2025-06-15T15:{n // 60:02}:{n % 60:02}.000000Z"
    named = {"model" if bound else "name": model} if model else {}
    item = {
        "id": id_, "owner": listed, "listed_at": f"{created_at}#{id_}", "created_at": created_at, "created": n,
        "fingerprint": "f", "source": source, "keyed": False, "kind": "version", "version": VERSION,
        "rank": rank_of(upstream), "status": upstream, "deadline": 1, "execution_n": 1, "expires_at": 4_000_000_000,
        "visible": "processing" if status == "copying" else visible(upstream),
        **({"object": "training", "destination": "acme/fox"} if "#" in listed else {}), **named,
    }  # fmt: skip
    Table.from_env().put_item(prediction_key(id_), item)
    return id_


@pytest.fixture
def app(submissions: Submissions, monkeypatch: pytest.MonkeyPatch) -> Any:
    with pytest.MonkeyPatch.context() as template_only:
        app = load_app("read_predictions", template_only)
    submissions.put_into(app, monkeypatch)
    return app


@pytest.fixture
def get(app: Any) -> Get:
    """GETs a URL of a list, as an owner."""

    def get(url: str, owner: str = "alice") -> dict[str, Any]:
        parts = urlsplit(url)
        event = sample("read_predictions", "list" if parts.path.endswith("/predictions") else "trainings")
        event["queryStringParameters"] = dict(parse_qsl(parts.query, keep_blank_values=True)) or None
        event["requestContext"]["authorizer"]["owner"] = owner
        answer = app.handler(event, Context())
        check_answer(event, answer)
        return {"status": answer["statusCode"], **json.loads(answer["body"])}

    return get


def walk(get: Get, url: str | None, link: str = "next") -> Iterator[dict[str, Any]]:
    while url:
        page = get(url)
        assert page["status"] == 200
        yield page
        url = page[link]


def ids(*pages: dict[str, Any]) -> list[str]:
    return [each["id"] for page in pages for each in page["results"]]


def query(filters: dict[str, str], path: str = "/predictions") -> str:
    return f"{API_URL}{path}?" + "&".join(f"{name}={text}" for name, text in filters.items())


@pytest.fixture
def examined(cloud: None) -> list[int]:
    """Of how many predictions each call read the status."""
    counts: list[int] = []

    def count(params: dict[str, Any], **_: Any) -> None:
        ((_, asked),) = params["RequestItems"].items()
        if status := [key for key in asked["Keys"] if key["sk"]["S"] == "status"]:
            counts.append(len(status))

    events: Any = clients.client("dynamodb").meta.events
    events.register("before-parameter-build.dynamodb.BatchGetItem", count)
    return counts


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(ITEM, max_size=70), filters=FILTER, path=st.sampled_from(["/predictions"] * 3 + ["/trainings"]))
def test_pages_of_a_narrowed_list_are_together_exactly_that_list_in_both_directions(
    app: Any, get: Get, examined: list[int], items: list[Any], filters: dict[str, str], path: str
) -> None:
    app.PAGE_SIZE = 3
    for item in clients.client("dynamodb").scan(TableName="predictions")["Items"]:
        clients.client("dynamodb").delete_item(TableName="predictions", Key={"pk": item["pk"], "sk": item["sk"]})
    expected = []
    for n, (listed, status, model, source, bound) in enumerate(items):
        id_ = put(n, listed, status, model, source, bound=bound)
        seen = {"status": SEEN[status], "model": model, "origin": STARTED_BY[source]}
        if listed == list_of("alice", "trainings" if path == "/trainings" else "predictions") and filters.items() <= (
            seen.items()
        ):
            expected.append(id_)
    forward = []
    for page in walk(get, query(filters, path)):
        assert sum(examined) <= 30
        examined.clear()
        forward.append(page)
    assert ids(*forward) == expected[::-1]
    assert forward[0]["previous"] is None
    for page in forward:
        assert len(page["results"]) <= 3
        for url in filter(None, (page["previous"], page["next"])):
            assert {name: text for name, text in parse_qsl(urlsplit(url).query) if name != "cursor"} == filters
    back = list(walk(get, forward[-1]["previous"], "previous"))
    assert ids(*back[::-1], forward[-1]) == expected[::-1]


def test_page_examines_a_thousand_and_may_be_empty_with_a_next(
    get: Get, table: PredictionsTable, examined: list[int]
) -> None:
    oldest = put(0, "alice", "aborted", None, "recipe")
    for n in range(1, 1051):
        put(n, "alice", "canceled" if n % 2 else "processing", None, "http" if n % 2 else "recipe")
    filters = {"status": "canceled", "origin": "recipe"}
    first = get(query(filters))
    assert (first["results"], sum(examined), max(examined)) == ([], 1000, 100)
    assert first["previous"] is None
    second = get(first["next"])
    assert ([each["id"] for each in second["results"]], second["next"]) == ([oldest], None)
    assert sum(examined) == 1051
    # It tells the other way, too: nothing between is missed, and the newest page has nothing before it.
    *_, newest = walk(get, second["previous"], "previous")
    assert (newest["results"], newest["previous"]) == ([], None)


def test_full_page_reads_no_further_than_it_has_to(get: Get, table: PredictionsTable, examined: list[int]) -> None:
    for n in range(300):
        put(n, "alice", "failed", None, "batch")
    page = get(query({"status": "failed"}))
    assert (len(page["results"]), examined) == (100, [100])
    examined.clear()
    assert len(get(query({}))["results"]) == 100
    assert examined == [100]


def test_page_that_is_cut_by_its_size_goes_on_where_it_was_cut(
    get: Get, table: PredictionsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("predictions.views.prediction.ANSWER_LIMIT_BYTES", 3000)
    made = [put(n, "alice", "failed" if n % 3 else "succeeded", None, "http") for n in range(30)]
    pages = list(walk(get, query({"status": "failed"})))
    assert ids(*pages) == [id_ for n, id_ in reversed(list(enumerate(made))) if n % 3]
    assert len(pages) > 3


def test_cursor_of_another_owners_narrowed_list_shows_only_ones_own(get: Get, table: PredictionsTable) -> None:
    for n in range(150):
        put(n, "alice", "failed", None, "http")
    theirs = [put(n, "bob", status, None, "http") for n, status in ((1000, "failed"), (1001, "succeeded"))]
    following = get(query({"status": "failed"}))["next"]
    assert following
    assert get(following, owner="bob")["results"] == []
    assert ids(get(query({"status": "failed"}), owner="bob")) == theirs[:1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("status", value) for value in ("", "aborted", "queued", "FAILED", "failed,canceled", "\u00e9" * 100)],
        *[("origin", value) for value in ("", "http", "run_job", "web", "recipe,batch")],
        *[
            ("model", value)
            for value in ("", "fox", "acme/", "acme/fox/x", "acme/fox:" + "0" * 64, "a b/c", "*" * 9999)
        ],
    ],
    ids=ascii,
)
@pytest.mark.parametrize("case", ["list", "trainings"])
def test_filter_that_no_prediction_can_match_is_a_problem_that_names_it(
    app: Any, case: str, name: str, value: str
) -> None:
    event = sample("read_predictions", case)
    event["queryStringParameters"] = {name: value, "source": "web"}
    calls = AwsCalls()
    answer = app.handler(event, Context())
    check_answer(event, answer)
    problem = json.loads(answer["body"])
    assert (answer["statusCode"], [each["field"] for each in problem["invalid_fields"]]) == (422, [name])
    assert len(answer["body"]) < 1000
    assert calls.made == []


def test_every_prediction_shows_what_started_it(get: Get, table: PredictionsTable) -> None:
    made = {put(n, "alice", "queued", None, source): STARTED_BY[source] for n, source in enumerate(STARTED_BY)}
    assert {each["id"]: each["origin"] for each in get(query({}))["results"]} == made
