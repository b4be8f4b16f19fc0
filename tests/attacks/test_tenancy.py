"""Tenancy: 10,000 calls of two owners, and of strangers: nothing of the one is ever seen or changed by the other.

All data of an owner holds a word of his own, his canary. The calls name whatever there is, the other's as often as
one's own: ids, cursors, keys, links, upstream ids. The routes are the template's, so that a new one is called too.
"""

import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.attacks.stack import ROUTES, Stack
from tests.reliability import Recorded
from tests.support.described import operations
from tests.support.fakes import VERSION

CALLS = 10_000
PARTS = 4
ALL_SCOPES = ("predict", "read", "train", "manage")
CANARIES = {"alice": "kanari7alice", "bob": "zeisig3bob"}
OTHER = {"alice": "bob", "bob": "alice"}
FORM = "multipart/form-data; boundary=b0undary"


@dataclass
class Owner:
    """An owner, and what of his can be named.

    Attributes:
        ids: By kind, as the routes name it.
        links: Paths with their query, which his answers held.
        cursors: Of his lists.
        keys: His idempotency keys.
    """

    name: str
    token: str
    ids: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    cursors: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def canary(self) -> str:
        return CANARIES[self.name]

    def note(self, kind: str, value: str) -> None:
        """Something of his has this id."""
        self.ids.setdefault(kind, []).append(value)


KINDS = {
    "/predictions": "prediction", "/trainings": "training", "/files": "file", "/uploads": "file",
    "/batches": "batch", "/pipelines": "pipeline", "/recipes": "recipe",
}  # fmt: skip
"""What a collection's paths name."""


class Town:
    """Two owners with their things, and who calls."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack = stack
        self.rng = random.Random(seed)  # noqa: S311  # not for secrets
        self.owners = {name: Owner(name, stack.tokens.create(name, ALL_SCOPES)[0]) for name in CANARIES}
        self.n = 0
        self.statuses: Counter[int] = Counter()
        self.own: Counter[str] = Counter()
        self.foreign: Counter[str] = Counter()
        for owner in self.owners.values():
            for _ in range(3):
                self.furnish(owner)
        token, revoked = stack.tokens.create("alice", ALL_SCOPES)
        stack.tokens.revoke(revoked.id)
        self.strangers: dict[str, tuple[str | None, set[int]]] = {
            "none": (None, {401}),
            "revoked": (token, {401}),
            "made up": ("rs_" + "A" * 43, {401}),
        }
        self.poor = {
            scope: {name: stack.tokens.create(name, [scope])[0] for name in CANARIES} for scope in ("predict", "read")
        }

    # -- what there is --------------------------------------------------------------------------------------------

    def furnish(self, owner: Owner) -> None:
        """One more of each thing."""
        for _ in range(2):
            prediction = self.create(owner, "/predictions")
            upstream_id = next(
                p["id"] for p in self.stack.replicate.predictions.values()
                if str(p.get("webhook", "")).endswith(prediction) or owner.canary in json.dumps(p["input"])
            )  # fmt: skip
            owner.note("upstream", upstream_id)
        done = owner.ids["prediction"][-1]
        bound = self.stack.table.items[f"prediction#{done}", "status"]["upstream_id"]["S"]
        told = {
            "id": bound, "status": "succeeded", "output": [f"a song of {owner.canary}"], "logs": owner.canary,
            "input": {"prompt": owner.canary}, "metrics": {owner.canary: 1}, "model": "meta/llama",
        }  # fmt: skip
        assert self.stack.webhook(done, json.dumps(told).encode())["statusCode"] == 200
        for path in ("/models/{owner}/{name}/versions/{id}/trainings", "/uploads", "/files", "/batches", "/pipelines"):
            self.create(owner, path)
        self.create(owner, "/recipes")

    def create(self, owner: Owner, resource: str) -> str:
        """Makes a thing by its own route; its id, or its name."""
        answer = self.call(owner, "POST", resource, mine=1.0)
        assert answer["statusCode"] == 201, (resource, answer)
        shown = json.loads(answer["body"])
        return str(shown["name" if resource == "/recipes" else "id"])

    # -- calls ----------------------------------------------------------------------------------------------------

    def body_of(self, owner: Owner, whose: Owner, resource: str, method: str) -> tuple[str, str]:
        """A body for a route, with names of whatever there is in it, and its media type."""
        self.n += 1
        said = f"{owner.canary} {self.n}"
        file_id = self.pick(whose, "file")
        url = f"https://api.example.com/v1/files/{file_id}/download"
        bodies: dict[str, Any] = {
            "/predictions": {"version": VERSION, "input": {"prompt": said, "image": url}},
            "/models/{owner}/{name}/predictions": {"input": {"prompt": said}},
            "/deployments/{owner}/{name}/predictions": {"input": {"prompt": said}},
            "/models/{owner}/{name}/versions/{id}/trainings": {
                "destination": "acme/fox", "input": {"prompt": said},
            },
            "/uploads": {"filename": f"{owner.canary}.txt", "size": 3, "metadata": {"said": said}},
            "/batches": self.rng.choice((
                {"requests": [{"model": "meta/llama", "input": {"prompt": said}}]},
                {"manifest": f"s3://inputs/batches/{whose.name}/x.jsonl"},
                {"requests": [{"prompt": said}], "recipe": self.pick(whose, "recipe")},
            )) if whose is not owner else {"requests": [{"model": "meta/llama", "input": {"prompt": said}}]},
            "/pipelines": {"steps": [{"name": "one", "model": "meta/llama", "input": {"prompt": said}}]},
        }  # fmt: skip
        recipe = {"model": "meta/llama", "input": {"prompt": said}, "schedule": {"expression": "rate(1 day)"}}
        bodies["/recipes"] = {"name": f"recipe-{self.n}", **recipe}
        bodies["/recipes/{name}"] = recipe
        if resource == "/files":
            part = 'Content-Disposition: form-data; name="content"; filename="'
            return f'--b0undary\r\n{part}{owner.canary}.txt"\r\n\r\n{said}\r\n--b0undary--\r\n', FORM
        if method in ("POST", "PATCH", "PUT") and resource not in bodies:
            return json.dumps({"description": said}), "application/json"
        return json.dumps(bodies.get(resource, {})), "application/json"

    def pick(self, whose: Owner, kind: str) -> str:
        """Something of that kind, mostly one that is there."""
        there = whose.ids.get(kind) or ["a" * 26]
        if kind != "recipe" and self.rng.random() < 0.03:
            return self.rng.choice(
                [
                    "a" * 26,
                    there[-1][:-1] + "a",
                    "..",
                    whose.name,
                    self.rng.choice([each for ids in whose.ids.values() for each in ids]),
                ]
            )
        return self.rng.choice(there[-6:] + there[:2])

    def path_of(self, resource: str, whose: Owner) -> str:
        """A path of a route, by what there is of an owner's."""
        kind = KINDS.get("/" + resource.split("/")[1], "prediction")
        if resource == "/webhooks/replicate/{id}":
            kind = "prediction"
        values = {
            "owner": "meta", "name": "llama", "id": self.pick(whose, kind), "slug": "text", "bucket": "outputs",
        }  # fmt: skip
        if resource.startswith("/recipes/"):
            values["name"] = self.pick(whose, "recipe")
        if resource.startswith("/models/") and "{id}" in resource:
            values["id"] = VERSION
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], "x"), resource)

    def call(
        self, owner: Owner, method: str, resource: str, *, mine: float, token: str | bool | None = True
    ) -> dict[str, Any]:
        """One call; `mine` is how likely what it names is the caller's own."""
        other = self.owners[OTHER[owner.name]]
        whose = owner if self.rng.random() < mine else other
        path = self.path_of(resource, whose)
        body: str | None = None
        headers: dict[str, str] = {}
        if method != "GET":
            body, headers["Content-Type"] = self.body_of(owner, whose, resource, method)
            if method == "POST" and self.rng.random() < 0.3:
                # The same keys for both: they are two requests.
                whose.keys.append(f"key-{self.n}")
                headers["Idempotency-Key"] = whose.keys[-1] if mine == 1.0 else self.rng.choice(whose.keys[-10:])
        if method == "GET" and whose.cursors and self.rng.random() < 0.3:
            path += f"?cursor={self.rng.choice(whose.cursors[-20:])}"
        if token is True and method == "GET" and whose.links and self.rng.random() < 0.05:
            path = self.rng.choice(whose.links[-20:])
        if token is True and method == "GET" and resource == "/predictions" and self.rng.random() < 0.3:
            path = "/predictions?" + self.rng.choice(
                ("source=api", "created_after=2020-01-01T00:00:00Z", "owner=" + other.name)
            )
        given = owner.token if token is True else token or None
        answer = self.stack.api(method, path, token=given, body=body, headers=headers)
        self.statuses[answer["statusCode"]] += 1
        if token is True:
            self.learn(owner, resource, answer)
            if answer["statusCode"] < 300:
                (self.own if whose is owner else self.foreign)[f"{method} {resource}"] += 1
        return answer

    def learn(self, owner: Owner, resource: str, answer: dict[str, Any]) -> None:
        """Notes ids, cursors and links of what a caller was shown: all of them are his."""
        text = answer.get("body") or ""
        if answer["statusCode"] not in (200, 201) or not text.startswith("{"):
            return
        shown = json.loads(text)
        kind = KINDS.get("/" + resource.split("/")[1], "prediction")
        if resource.endswith("/predictions"):
            kind = "prediction"
        if resource.endswith("/trainings"):
            kind = "training"
        if answer["statusCode"] == 201 and ("id" in shown or "name" in shown):
            owner.note(kind, str(shown["name"] if kind == "recipe" else shown.get("id")))
        owner.cursors += [*re.findall(r"cursor=([A-Za-z0-9_%-]+)", text)][:2]
        owner.links += [
            f"/{path}" for path in re.findall(r"https://api\.example\.com/v1/((?:files|objects)/[^\"]+)", text)
        ][:2]


def snapshot(stack: Stack, owner: str) -> dict[Any, Any]:
    """All that is kept of an owner's: items and objects with his word in them."""
    canary = CANARIES[owner]
    items = {
        key: json.dumps(item, sort_keys=True, default=str)
        for key, item in stack.table.items.items()
        if canary in str(item) or item.get("owner", {}).get("S") == owner or f"#{owner}" in key[0]
    }
    items |= {
        key: json.dumps(stack.table.items[key], sort_keys=True, default=str)
        for key in stack.table.items
        if key[0] in {pk for pk, _ in items}
    }
    objects = {
        key: body for key, (body, _) in stack.account.objects.items() if canary.encode() in body or f"/{owner}/" in key
    }
    return {**items, **objects}


@pytest.fixture
def town(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Town:
    """Two owners, with a few of each thing."""
    replicate = stack.replicate
    replicate.deployments["meta/llama"] = {
        "owner": "meta", "name": "llama",
        "current_release": {"number": 1, "model": "meta/llama", "version": VERSION},
    }  # fmt: skip
    replicate.versions[f"meta/llama/versions/{VERSION}"] = {"id": VERSION}
    # What is passed on is Replicate's: nothing of an owner's is in it.
    read = replicate._read

    def forwarded(asked: httpx.Request, path: str) -> httpx.Response:
        try:
            return read(asked, path)
        except (IndexError, KeyError):
            return httpx.Response(200, json={"next": None, "previous": None, "results": []})

    monkeypatch.setattr(replicate, "_read", forwarded)
    for path in ("/models/acme/fox",):
        replicate.others["GET", path] = lambda: httpx.Response(200, json={"owner": "acme", "name": "fox"})
    return Town(stack, 0)


@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_of_another_owner_is_seen_or_changed(
    stack: Stack, town: Town, part: int, record_property: Recorded
) -> None:
    town.rng.seed(part)
    print(f"seed {part}")  # noqa: T201  # with a failure it is shown
    began = time.process_time()
    routes = sorted(ROUTES)
    calls = 0
    while calls < CALLS // PARTS:
        owner = town.owners[town.rng.choice(("alice", "bob"))]
        other = town.owners[OTHER[owner.name]]
        before = snapshot(stack, other.name)
        # So many calls of one owner; then all that is the other's has to be as it was.
        for _ in range(50):
            method, resource = town.rng.choice(routes)
            mine = town.rng.choice((0.0, 0.3))
            answer = town.call(owner, method, resource, mine=mine)
            calls += 1
            text = json.dumps(answer)
            assert answer["statusCode"] != 500, (method, resource, answer)
            assert other.canary not in text, f"{owner.name} sees {other.name}'s: {method} {resource} {text[:2000]}"
        assert snapshot(stack, other.name) == before, f"{owner.name} changed what is {other.name}'s"
        if town.rng.random() < 0.2 and len(stack.table.items) < 1500:
            town.furnish(other)
    called = set(town.own) | set(town.foreign)
    assert sum(town.own.values()) > calls * 0.05, "own calls work"
    assert time.process_time() - began < 60
    record_property("calls", calls)
    record_property("own calls that worked", sum(town.own.values()))
    print(calls, dict(town.statuses), len(called))  # noqa: T201


ON_OTHERS = {
    "/predictions/{id}", "/predictions/{id}/cancel", "/trainings/{id}", "/trainings/{id}/cancel", "/files/{id}",
    "/batches/{id}", "/batches/{id}/cancel", "/batches/{id}/retry", "/pipelines/{id}", "/pipelines/{id}/cancel",
    "/recipes/{name}",
}  # fmt: skip
"""Routes that name a thing of an owner's."""


def test_every_route_that_names_a_thing_answers_its_owner_and_nobody_else(stack: Stack, town: Town) -> None:
    alice, bob = town.owners["alice"], town.owners["bob"]
    named = {(method, resource) for method, resource in ROUTES if resource in ON_OTHERS}
    # Whatever else has a name in its path is Replicate's, or public.
    for method, resource in ROUTES.keys() - named:
        folder = ROUTES[method, resource]["folder"]
        others = ("call_replicate", "start_prediction", "receive_webhook", "serve_files", "serve_console")
        assert "{" not in resource or folder in others
    for method, resource in sorted(named, key=lambda route: ("GET", "PUT", "POST", "DELETE").index(route[0])):
        kind = KINDS["/" + resource.split("/")[1]]
        path = re.sub(r"\{\w+\}", alice.ids[kind][0], resource)
        body = json.dumps({"model": "meta/llama", "input": {}, "schedule": {"expression": "rate(1 day)"}})
        given: dict[str, Any] = {"body": body if method == "PUT" else None}
        before = snapshot(stack, "alice")
        theirs = stack.api(method, path, token=bob.token, **given)
        # A recipe's name is its owner's: with the PUT, Bob gets one of his own, and deletes that.
        own = {"PUT": 201, "DELETE": 204}.get(method, 404) if kind == "recipe" and method != "GET" else 404
        assert theirs["statusCode"] == own, (method, path, theirs)
        assert alice.canary not in json.dumps(theirs)
        assert snapshot(stack, "alice") == before
        mine = stack.api(method, path, token=alice.token, **given)
        assert mine["statusCode"] in (200, 201, 204, 409), (method, path, mine)


def test_strangers_and_tokens_without_the_scope_are_refused_at_every_route(stack: Stack, town: Town) -> None:
    alice = town.owners["alice"]
    calls = 0
    for (method, resource), route in sorted(ROUTES.items()):
        before = dict(stack.table.items)
        for _ in range(3):
            for name, (token, statuses) in town.strangers.items():
                answer = town.call(alice, method, resource, mine=1.0, token=token or False)
                calls += 1
                if not route["public"]:
                    assert answer["statusCode"] in statuses, (name, method, resource, answer)
                elif resource == "/console":
                    # The page is the same for everybody.
                    assert answer["statusCode"] == 200, (name, method, resource, answer)
                    assert alice.canary not in json.dumps(answer)
                else:
                    assert answer["statusCode"] in (401, 404, 302), (name, method, resource, answer)
        assert stack.table.items == before, (method, resource)
    assert calls == len(ROUTES) * 9


def test_every_route_needs_its_scope(stack: Stack, town: Town) -> None:
    scopes = {(each.method, each.path): each.scopes for each in operations()}
    assert scopes.keys() == ROUTES.keys()
    # What one of several scopes allows; everything else needs the one that it names.
    training = "/models/{owner}/{name}/versions/{id}/trainings"
    several = {route: needed for route, needed in scopes.items() if len(needed) > 1}
    assert several == {
        ("POST", training): ("train", "manage"),
        ("POST", "/trainings/{id}/cancel"): ("predict", "train", "manage"),
        ("GET", "/usage"): ("read", "manage"),
    }
    assert scopes["GET", "/webhooks/default/secret"] == ("predict",), "`read` forges no webhook"
    refused = allowed = 0
    for (method, resource), needed in sorted(scopes.items()):
        if not needed:
            continue
        for scope in ALL_SCOPES:
            token = stack.tokens.create("alice", [scope])[0]
            before = dict(stack.table.items)
            answer = town.call(town.owners["alice"], method, resource, mine=1.0, token=token)
            if scope in needed:
                assert answer["statusCode"] != 403, (method, resource, answer)
                allowed += 1
            else:
                assert answer["statusCode"] == 403, (method, resource, scope, answer)
                assert stack.table.items == before
                refused += 1
    with_token = sum(bool(needed) for needed in scopes.values())
    assert (refused, allowed) == (with_token * 3 - 4, with_token + 4)


def test_same_key_of_two_owners_is_two_predictions(stack: Stack, town: Town) -> None:
    trainings = f"/models/meta/llama/versions/{VERSION}/trainings"
    for resource in ("/models/meta/llama/predictions", "/batches", "/pipelines", trainings):
        bodies = {
            trainings: {"destination": "acme/fox", "input": {"prompt": "x"}},
            "/batches": {"requests": [{"model": "meta/llama", "input": {"prompt": "x"}}]},
            "/pipelines": {"steps": [{"name": "one", "model": "meta/llama", "input": {"prompt": "x"}}]},
        }
        body = json.dumps(bodies.get(resource, {"input": {"prompt": "x"}}))
        found = [
            json.loads(
                stack.api(
                    "POST", resource, token=owner.token, body=body, headers={"Idempotency-Key": "the-same"}
                )["body"]
            )["id"]
            for owner in (*town.owners.values(), *town.owners.values())
        ]  # fmt: skip
        assert found[:2] == found[2:], "one's own key finds one's own"
        assert found[0] != found[1], resource


def test_webhook_of_one_prediction_sent_to_anothers_changes_nothing(stack: Stack, town: Town) -> None:
    alice, bob = town.owners["alice"], town.owners["bob"]
    before = snapshot(stack, "alice")
    for upstream_id in {*bob.ids["upstream"], *alice.ids["upstream"], "guessed0upstream0id00000000"}:
        for prediction_id in alice.ids["prediction"]:
            bound = stack.table.items[f"prediction#{prediction_id}", "status"].get("upstream_id", {}).get("S")
            if bound == upstream_id:
                continue
            webhook = f"https://api.example.com/v1/webhooks/replicate/{bob.ids['prediction'][0]}"
            told = {"id": upstream_id, "status": "succeeded", "output": bob.canary, "webhook": webhook}
            assert stack.webhook(prediction_id, json.dumps(told).encode())["statusCode"] == 200
    assert snapshot(stack, "alice") == before


def test_secret_of_webhooks_is_the_owners_and_no_other_owner_gets_it(stack: Stack, town: Town) -> None:
    keys = {}
    for name, owner in town.owners.items():
        shown = [
            json.loads(stack.api("GET", path, token=owner.token)["body"])["key"]
            for path in ("/webhooks/default/secret", f"/webhooks/default/secret?owner={OTHER[name]}")
        ]
        assert len(set(shown)) == 1
        keys[name] = shown[0]
        poor = stack.tokens.create(name, ["read", "train", "manage"])[0]
        refused = stack.api("GET", "/webhooks/default/secret", token=poor)
        assert refused["statusCode"] == 403
        assert keys[name] not in json.dumps(refused)
    assert keys["alice"] != keys["bob"]


def test_training_of_one_owner_is_canceled_by_no_other_whatever_the_scopes(stack: Stack, town: Town) -> None:
    alice = town.owners["alice"]
    for scopes in (["train"], ["predict"], ["manage"], list(ALL_SCOPES)):
        token = stack.tokens.create("bob", scopes)[0]
        before = snapshot(stack, "alice")
        for training in alice.ids["training"]:
            answer = stack.api("POST", f"/trainings/{training}/cancel", token=token)
            assert answer["statusCode"] == 404, scopes
        assert snapshot(stack, "alice") == before
