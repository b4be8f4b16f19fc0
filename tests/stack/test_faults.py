"""The deployed stack while functions are killed at their calls of AWS, and while everything is wrong at once.

`make faults` runs more of it; what fails here says with which command it is seen again.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.stack.audit import Evidence, audit, verdict
from tests.stack.crowd import Crowd
from tests.stack.faults import ON_THE_WAY, everything_at_once, faulty_stack, strike_each
from tests.support.aws_proxy import Call

ROUNDS = 12
PREDICTIONS = 200
"""In all, those of the rounds included."""

# One stack is struck for minutes, while a worker runs the tests of a file one after the other.
pytestmark = pytest.mark.slow

AT_ONCE = 50
"""At least so many of them while everything is wrong, however many rounds it took to strike each call."""

SEED = 1


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    """Callers at a stack of their own: faults in the shared one would be everybody's."""
    with faulty_stack() as (cloud, proxy), Crowd(cloud, proxy, SEED) as crowd:
        yield crowd


@pytest.fixture(scope="module")
def struck(crowd: Crowd) -> list[Call]:
    """The calls that a clean round makes; each has been killed before and after, as far as it came again."""
    return strike_each(crowd, ROUNDS)


def test_each_call_of_each_function_is_survived_when_it_is_killed_before_and_after_it(
    crowd: Crowd, struck: list[Call]
) -> None:
    assert {call.function for call in struck} == ON_THE_WAY
    missed = [f'make faults CALL="{call}" FAULT="{fault}"' for call, fault in crowd.proxy.armed()]
    assert not missed, "not struck: " + ", ".join(missed)
    happened = {(strike.call, strike.fault) for strike in crowd.proxy.strikes}
    assert happened >= {(call, fault) for call in struck for fault in call.kills}
    crowd.cloud.replicate.reset()
    assert verdict(crowd.evidence()) == ""


@pytest.fixture(scope="module")
def left_behind(crowd: Crowd, struck: list[Call]) -> Evidence:
    """What is left behind when everything was wrong at once, as well."""
    crowd.proxy.calm()
    everything_at_once(crowd, max(AT_ONCE, PREDICTIONS - len(crowd.requests)))
    return crowd.evidence()


def test_every_promise_is_kept_while_everything_is_wrong(left_behind: Evidence) -> None:
    assert len(left_behind.requests) >= PREDICTIONS
    broken = verdict(left_behind)
    assert not broken, f"{broken}\n\nmake faults PREDICTIONS={PREDICTIONS} SEED={SEED}"


class TestAudit:
    """It has teeth: each of these, done to what a good run left behind, is noticed."""

    def test_missing_object_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "is missing", lambda e: e.objects.pop(_stored(e)))

    def test_partial_object_is_noticed(self, left_behind: Evidence) -> None:
        def cut(evidence: Evidence) -> None:
            key = _stored(evidence)
            evidence.objects[key] = (evidence.objects[key][0] - 1, "0" * 64)

        self._noticed(left_behind, "has other bytes", cut)

    def test_other_bytes_than_replicates_are_noticed(self, left_behind: Evidence) -> None:
        self._noticed(
            left_behind, "stored files, of Replicate's", lambda e: _run(e, files=True)["files"].append("0" * 64)
        )

    def test_object_that_nothing_explains_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "nothing explains: stray", lambda e: e.objects.update(stray=(1, "0" * 64)))

    def test_unfinished_upload_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "left unfinished: half", lambda e: e.uploads.append("half"))

    def test_double_create_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "double start", lambda e: e.upstream.append({**_run(e), "id": "another"}))

    def test_run_that_nobody_is_bound_to_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "no prediction is bound", lambda e: _run(e).update(id="another"))

    def test_run_that_goes_on_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "still processing", lambda e: _run(e).update(status="processing"))

    def test_prediction_that_is_lost_is_noticed(self, left_behind: Evidence) -> None:
        def lose(evidence: Evidence) -> None:
            id_ = next(iter(next(request for request in evidence.requests if request.ids).ids))
            del evidence.items[id_], evidence.shown[id_]

        self._noticed(left_behind, "lost: ", lose)

    def test_message_that_is_lost_is_noticed(self, left_behind: Evidence) -> None:
        def lose(evidence: Evidence) -> None:
            request = next(request for request in evidence.requests if request.door == "queue")
            for id_ in [id_ for id_, shown in evidence.shown.items() if request.mark in str(shown["input"])]:
                del evidence.items[id_], evidence.shown[id_]

        self._noticed(left_behind, "lost: it was accepted", lose)

    def test_prediction_that_is_open_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "has not ended", lambda e: _item(e).update(open="open"))

    def test_other_end_than_replicates_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "ended failed, at Replicate", lambda e: _item(e).update(visible="failed"))

    def test_end_that_the_api_shows_otherwise_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "the API shows failed", lambda e: e.shown[_item(e)["id"]].update(status="failed"))

    def test_output_that_is_none_is_noticed(self, left_behind: Evidence) -> None:
        def empty(evidence: Evidence) -> None:
            run = _run(evidence, files=False)
            item = next(item for item in evidence.items.values() if item.get("upstream_id") == run["id"])
            evidence.shown[item["id"]]["output"] = None

        self._noticed(left_behind, "its output is another one", empty)

    def test_terminal_status_that_changed_for_a_moment_is_noticed(self, left_behind: Evidence) -> None:
        def change(evidence: Evidence) -> None:
            end = next(after for _, _, after in reversed(evidence.changes) if after.get("rank") == 9)
            evidence.changes += [
                (end["id"], end, {**end, "status": "lost"}),
                (end["id"], {**end, "status": "lost"}, end),
            ]

        self._noticed(left_behind, "a terminal status changed", change)

    def test_bind_that_changed_is_noticed(self, left_behind: Evidence) -> None:
        def change(evidence: Evidence) -> None:
            bound = next(after for _, _, after in evidence.changes if after.get("upstream_id") and after["rank"] < 9)
            evidence.changes.append((bound["id"], bound, {**bound, "upstream_id": "another"}))

        self._noticed(left_behind, "then to another", change)

    def test_execution_that_runs_on_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "still runs", lambda e: e.executions.update({next(iter(e.executions)): "RUNNING"}))

    def test_execution_of_two_machines_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "two state mach", lambda e: e.executions.update({next(iter(e.executions)): "TWICE"}))

    def test_execution_of_nobody_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "belongs to no prediction", lambda e: e.executions.update({"nobody-1": "SUCCEEDED"}))

    def test_caller_who_was_not_told_is_noticed(self, left_behind: Evidence) -> None:
        self._noticed(left_behind, "its caller's webhook was told []", lambda e: e.told.clear())

    def test_bus_that_was_told_another_end_is_noticed(self, left_behind: Evidence) -> None:
        def tell(evidence: Evidence) -> None:
            evidence.events.append((_item(evidence)["id"], "Prediction Failed", "", "failed"))

        self._noticed(left_behind, "the bus was told ['failed', 'succeeded']", tell)

    @staticmethod
    def _noticed(good: Evidence, what: str, tamper: Callable[[Evidence], object]) -> None:
        evidence = copy.deepcopy(good)
        tamper(evidence)
        found = [str(finding) for finding in audit(evidence)]
        assert [each for each in found if what in each], found
        assert not [finding for finding in audit(good) if what in str(finding)]


def _run(evidence: Evidence, *, files: bool | None = None) -> dict[str, Any]:
    """One of the stand-in's predictions that succeeded: with files, with none, or any."""
    succeeded = (run for run in evidence.upstream if run["status"] == "succeeded")
    return next(run for run in succeeded if files in (None, bool(run["files"])))


def _item(evidence: Evidence) -> dict[str, Any]:
    """The item of a prediction that succeeded."""
    return next(item for item in evidence.items.values() if item["visible"] == "succeeded")


def _stored(evidence: Evidence) -> str:
    """The key of an object with bytes."""
    return next(key for key, (size, _) in evidence.objects.items() if size)
