"""Limits of an owner for one model: by every way to name the model, refused, waited for and given back."""

import json
from dataclasses import replace
from typing import Any

import pytest
from predictions.admission.quotas import LimitReached, ModelLimits, OwnerLimits, OwnersLimits, OwnersUsage
from predictions.aws import clients
from predictions.errors import PredictionThrottled, Problem
from predictions.intents.model import Intent, Reference, create_intent
from predictions.store.predictions import PredictionsTable

from tests.support.apps import AwsCalls
from tests.support.fakes import VERSION, Clock, ReplicateInMemory, answer
from tests.support.predictions import current
from tests.support.protocol import Submissions

SDXL = "stability-ai/sdxl"
DOCUMENT = {"components": {"schemas": {"Input": {"type": "object", "properties": {"prompt": {"type": "string"}}}}}}
ONE = OwnerLimits(models={SDXL: ModelLimits(in_flight=1)})


@pytest.fixture
def usage(cloud: None, clock: Clock) -> OwnersUsage:
    """What owners use."""
    return OwnersUsage("predictions", clients.client("dynamodb"), now=clock.now)


@pytest.fixture(autouse=True)
def described(replicate: ReplicateInMemory) -> None:
    """Replicate describes the model, its version and a deployment of it."""
    replicate.versions = {f"{SDXL}/versions/{VERSION}": {"id": VERSION, "openapi_schema": DOCUMENT}}
    release = {"number": 3, "model": SDXL, "version": VERSION}
    replicate.deployments = {"acme/painter": {"owner": "acme", "name": "painter", "current_release": release}}


def wanted(version: str | None = None, reference: Reference | None = None, **body: Any) -> Intent:
    sent = {"input": {"prompt": "a fox"}, **({"version": version} if version else {}), **body}
    return create_intent(
        json.dumps(sent).encode(), {}, owner="alice", reference=reference, allow_loopback_webhooks=False
    )


def queued(table: PredictionsTable, clock: Clock, intent: Intent) -> str:
    """A prediction of the queue, only written down."""
    return table.put_intent(
        replace(intent, source="queue"), version=intent.reference.version, deadline=int(clock.now()) + 86400,
        expires=int(clock.now()) + 864000, claim=False, execution_arn="arn:x", now=clock.now(),
    ).id  # fmt: skip


def used() -> dict[str, Any]:
    """What alice uses, by item."""
    found = clients.client("dynamodb").scan(TableName="predictions")["Items"]
    items = {item["sk"]["S"]: item for item in found if item["pk"]["S"] == "usage#alice"}
    return {sk: set(item["ids"]["M"]) if "ids" in item else int(item["n"]["N"]) for sk, item in items.items()}


NAMED: dict[str, dict[str, Any]] = {
    "its name": {"reference": Reference("model", SDXL)},
    "its name in capitals": {"reference": Reference("model", "Stability-AI/SDXL")},
    "its name and version": {"version": f"{SDXL}:{VERSION}"},
    "a deployment": {"reference": Reference("deployment", "acme/painter")},
    "a version whose model is stored": {"version": VERSION},
}


class TestStarted:
    @pytest.mark.parametrize("named", NAMED)
    def test_caller_over_a_models_limit_is_told_which_and_another_model_starts(
        self, submissions: Submissions, replicate: ReplicateInMemory, clock: Clock, named: str
    ) -> None:
        replicate.models["Stability-AI/SDXL"] = replicate.models[SDXL]
        first = submissions.start(wanted(version=f"{SDXL}:{VERSION}"), limits=ONE)
        with pytest.raises(Problem) as problem:
            submissions.start(wanted(**NAMED[named]), limits=ONE)
        assert (problem.value.status, problem.value.headers) == (429, {"Retry-After": "10"})
        assert problem.value.detail == (
            "Owner alice has reached its limit of 1 predictions of stability-ai/sdxl in flight. Retry when one of them"
            " finishes, or use another model."
        )
        submissions.start(wanted(reference=Reference("model", "meta/llama")), limits=ONE)
        assert len(replicate.creates) == 2
        assert used() == {f"in_flight#{SDXL}": {first.id}}
        replicate.finish(first.upstream_id or "")
        submissions.poll(first.id)
        clock.advance(5)  # a full map is looked through again after two seconds
        assert submissions.start(wanted(**NAMED[named]), limits=ONE).upstream_id

    def test_version_of_an_unknown_model_starts_and_counts_once_its_model_is_learned(
        self, submissions: Submissions
    ) -> None:
        submissions.start(wanted(version=VERSION), limits=ONE)
        assert used() == {}
        submissions.start(wanted(version=VERSION), limits=ONE)
        with pytest.raises(Problem, match="1 predictions of stability-ai/sdxl in flight"):
            submissions.start(wanted(version=VERSION), limits=ONE)

    def test_prediction_that_replicate_refuses_gives_both_slots_back(
        self, submissions: Submissions, replicate: ReplicateInMemory
    ) -> None:
        limits = replace(ONE, in_flight=1)
        replicate.faults = [answer(422)]
        with pytest.raises(Problem):
            submissions.start(wanted(version=f"{SDXL}:{VERSION}"), limits=limits)
        assert submissions.start(wanted(version=f"{SDXL}:{VERSION}"), limits=limits).upstream_id

    def test_owner_with_limits_of_other_models_costs_as_before(self, submissions: Submissions) -> None:
        others = OwnerLimits(models={"meta/llama": ModelLimits(1, 1)})
        calls, counts = AwsCalls(), []
        for limits in (OwnerLimits(), OwnerLimits(), others):
            calls.made.clear()
            submissions.start(wanted(version=f"{SDXL}:{VERSION}"), limits=limits)
            counts.append(len(calls.made))
        assert counts[1] == counts[2]
        assert used() == {}


class TestQueued:
    def test_queued_prediction_waits_for_its_models_slot_while_another_model_goes(
        self, submissions: Submissions, table: PredictionsTable, replicate: ReplicateInMemory, clock: Clock
    ) -> None:
        owners = OwnersLimits("predictions", clients.client("dynamodb"))
        owners.set_limits("alice", OwnerLimits(in_flight=2))
        owners.set_model_limits("alice", SDXL, ModelLimits(in_flight=1))
        # The second one names a deployment: its model is known only after a lookup.
        first = queued(table, clock, wanted(version=f"{SDXL}:{VERSION}"))
        second = queued(table, clock, wanted(reference=Reference("deployment", "acme/painter")))
        other = queued(table, clock, wanted(reference=Reference("model", "meta/llama")))
        submissions.submit(first)
        for _ in range(2):
            with pytest.raises(PredictionThrottled):
                submissions.submit(second)
        assert used() == {"in_flight": {first}, f"in_flight#{SDXL}": {first}}
        submissions.submit(other)
        replicate.finish(current(table, first).upstream_id or "")
        submissions.poll(first)
        clock.advance(5)
        submissions.submit(second)
        assert used() == {"in_flight": {second, other}, f"in_flight#{SDXL}": {second}}
        assert len(replicate.creates) == 3


class TestSlots:
    def test_day_of_a_model_that_is_full_uses_nothing_of_the_owners(self, usage: OwnersUsage) -> None:
        limits = OwnerLimits(in_flight=5, per_day=5, models={SDXL: ModelLimits(5, 1)})
        usage.acquire_slot("alice", "a" * 26, limits, SDXL)
        for model in (SDXL, SDXL.upper()):
            with pytest.raises(LimitReached, match="limit of 1 predictions of stability-ai/sdxl per day"):
                usage.acquire_slot("alice", "b" * 26, limits, model)
        assert used() == {"in_flight": {"a" * 26}, f"in_flight#{SDXL}": {"a" * 26}, "day#2025-06-15": 1}
        usage.acquire_slot("alice", "b" * 26, limits, "meta/llama")
        usage.acquire_slot("alice", "c" * 26, limits, None)
        assert used()["day#2025-06-15"] == 3

    def test_slot_that_is_released_frees_the_models_and_its_day_once(self, usage: OwnersUsage) -> None:
        limits = OwnerLimits(in_flight=1, models={SDXL: ModelLimits(1, 1)})
        slot = usage.acquire_slot("alice", "a" * 26, limits, SDXL)
        for _ in range(2):
            usage.release_slot("alice", "a" * 26, slot)
        usage.acquire_slot("alice", "b" * 26, limits, SDXL)
        with pytest.raises(LimitReached):
            usage.acquire_slot("alice", "c" * 26, limits, SDXL)
        assert used()["day#2025-06-15"] == 1

    def test_crash_after_the_models_slot_leaves_it_taken_for_two_minutes(
        self, usage: OwnersUsage, clock: Clock
    ) -> None:
        usage.acquire_slot("alice", "a" * 26, ONE, SDXL)
        with pytest.raises(LimitReached):
            usage.acquire_slot("alice", "b" * 26, ONE, SDXL)
        clock.advance(121)
        usage.acquire_slot("alice", "b" * 26, ONE, SDXL)
        assert used() == {f"in_flight#{SDXL}": {"b" * 26}}

    def test_item_of_limits_as_earlier_releases_read_it_keeps_the_owners(self, usage: OwnersUsage) -> None:
        limits = OwnersLimits("predictions", clients.client("dynamodb"))
        limits.set_model_limits("alice", SDXL, ModelLimits(per_day=3))
        found = limits.set_limits("alice", OwnerLimits(in_flight=2))
        assert found == OwnerLimits(in_flight=2, models={SDXL: ModelLimits(per_day=3)})
        assert OwnerLimits.of_context(found.context()) == found
        assert limits.remove_limits("alice", ["in_flight"]) == OwnerLimits(models={SDXL: ModelLimits(per_day=3)})
        assert not limits.remove_limits("alice")
