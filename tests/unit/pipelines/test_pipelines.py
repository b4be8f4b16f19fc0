"""Pipelines from their request to their end: the state machine, the queue and the stream are played by the test."""

import contextlib
import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from predictions import templating
from predictions.aws import clients
from predictions.aws.dynamodb import deserialize, serialize
from predictions.errors import Problem
from predictions.intents.model import create_requested_intent
from predictions.intents.sources import Message, RequestRefused
from predictions.pipelines.advance import RESEND_SECONDS, Turn
from predictions.pipelines.definition import ITEMS_LIMIT, PART_LIMIT_VALUES
from predictions.pipelines.manage import LIFETIME_SECONDS
from predictions.pipelines.state import run_id, run_key
from predictions.pipelines.steps import (
    GATHERED_LIMIT_BYTES,
    GATHERED_LIMIT_VALUES,
    event_of,
    prediction_ended,
)
from predictions.pipelines.store import Pipeline
from predictions.store.origins import is_active
from predictions.store.payloads import PAYLOAD_LIMIT_BYTES
from predictions.views.prediction import ANSWER_LIMIT_BYTES

from tests.support.apps import AwsCalls
from tests.support.fakes import API_URL, PNG, Died, Executed, Fault, Wakes, faulty, served
from tests.support.pipeline_definitions import FLUX, INPUT, graphs, step
from tests.support.pipelines import FAILED, IMAGE, World, world

__all__ = ["world"]  # a fixture

FILE = "https://replicate.delivery/xezq/abc/out-0.png"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps alone end a filling, however slow this machine is now."""
    monkeypatch.setattr(templating, "SECONDS_LIMIT", 1000.0)


LARGE = step("large", {"image": "{{ steps.image.output }}"})
CAPTION = step("caption", {"about": "{{ steps.large.output }} of {{ input.prompt }}"})
EACH = step("each", {"style": "{{ item }}", "n": "{{ index }}"}, for_each="{{ input.styles }}")
MANY = step("many", {"x": "{{ item }}"}, for_each="{{ steps.image.output }}")


class TestRefused:
    def test_refused_pipeline_leaves_nothing(self, world: World, pipeline_executed: Executed) -> None:
        with pytest.raises(Problem, match="Step `large`"):
            world.create(LARGE)
        with pytest.raises(Problem, match="Idempotency-Key"):
            world.create(IMAGE, key="with space")
        assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []
        assert pipeline_executed.inputs == {}

    def test_model_that_is_not_there_is_refused_with_its_step(self, world: World) -> None:
        with pytest.raises(Problem) as caught:
            world.create(step("image", model="nobody/nothing"))
        assert [each["field"] for each in caught.value.invalid_fields] == ["steps.0.model"]

    def test_key_of_another_pipeline_is_refused_and_changes_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, key="k")
        with pytest.raises(Problem, match="another pipeline"):
            world.create(EACH, key="k")
        assert list(world.statuses(pipeline_id)) == ["image"]

    @pytest.mark.parametrize("other", ["bob", ""])
    def test_pipeline_of_another_owner_is_not_there(self, world: World, other: str) -> None:
        pipeline_id = world.create(IMAGE)
        for ask in (world.api.own_pipeline, world.api.cancel_pipeline):
            with pytest.raises(Problem, match="404"):
                ask(pipeline_id, other)
        assert world.table.get_pipeline(pipeline_id).cancel_requested is None  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"pipeline_id": "x"}, "pipeline_id: must be 26"),
            ({"pipeline_id": 7}, "pipeline_id: must be 26"),
            ({"pipeline_id": "a" * 26}, f"pipeline {'a' * 26} not found"),
            ({"step": "none"}, "step 'none' not found"),
            ({"step": None}, "step: must be"),
            ({"index": 1}, "has no run 1"),
            ({"index": -1}, "index: must be a whole"),
            ({"index": True}, "index: must be a whole"),
            ({"index": "0"}, "index: must be a whole"),
            ({"owner": "bob"}, "owner: unknown field in a message of a pipeline"),
        ],
    )
    def test_message_that_names_no_run_is_refused(self, world: World, change: dict[str, Any], reason: str) -> None:
        pipeline_id = world.create(IMAGE)
        with pytest.raises(RequestRefused, match=reason):
            world.deliver({"pipeline_id": pipeline_id, "step": "image", "index": 0, **change})
        assert world.inputs() == []

    def test_message_that_comes_too_early_starts_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, LARGE)
        assert world.deliver({"pipeline_id": pipeline_id, "step": "large", "index": 0}) == []
        assert world.statuses(pipeline_id)["large"] == "waiting"


class TestRun:
    def test_steps_run_one_after_the_other_with_each_others_outputs(self, world: World) -> None:
        world.replicate.files[FILE] = served(PNG)
        pipeline_id = world.create(CAPTION, LARGE, IMAGE)
        assert world.sent() == [{"pipeline_id": pipeline_id, "step": "image", "index": 0}]
        [image] = world.deliver({"pipeline_id": pipeline_id, "step": "image", "index": 0})
        assert (image.source, image.owner, image.depth) == ("pipeline", "alice", 0)
        assert image.origin == {"pipeline": pipeline_id, "step": "image", "index": 0}
        assert world.turn(pipeline_id) == Turn(done=False, seen=0)
        assert world.statuses(pipeline_id) == {"caption": "waiting", "large": "waiting", "image": "starting"}
        world.clock.advance(7)
        world.end(pipeline_id, "image", FILE)
        assert world.turn(pipeline_id) == Turn(done=False, seen=1)
        world.deliver()
        [link] = [each["image"] for each in world.inputs()[1:]]
        deadline = 1_750_000_000 + LIFETIME_SECONDS
        assert link.startswith(f"{API_URL}/objects/outputs/0?")
        assert f"expires={deadline}" in link
        world.end(pipeline_id, "large", "large one")
        world.turn(pipeline_id)
        world.deliver()
        assert world.inputs()[2] == {"about": "large one of a fox"}
        assert world.shown(pipeline_id)["output"] is None
        assert [bool(each["cost"]) for each in world.shown(pipeline_id)["steps"]] == [False, True, True]
        assert world.shown(pipeline_id)["cost"] is None
        world.end(pipeline_id, "caption", ["A", " fox"])
        assert world.turn(pipeline_id) == Turn(done=True, seen=-1)
        shown = world.shown(pipeline_id)
        assert (shown["status"], shown["error"], shown["output"]) == ("succeeded", None, {"caption": ["A", " fox"]})
        assert [each["seconds"] for each in shown["steps"]] == [0, 0, 7]
        assert {each["cost"]["reason"] for each in shown["steps"]} == {"The cost of 1 of 1 predictions is unknown."}
        assert shown["cost"]["reason"] == "The cost of 3 of 3 predictions is unknown."
        assert "X-Amz-Signature" in shown["steps"][2]["output"]
        assert shown["steps"][2]["predictions"] == [image.id]
        assert len(world.inputs()) == 3

    def test_independent_steps_are_sent_at_once(self, world: World) -> None:
        pipeline_id = world.create(step("one"), step("two"), IMAGE)
        assert {each["step"] for each in world.sent()} == {"one", "two", "image"}
        world.turn(pipeline_id)
        assert world.sent() == []

    def test_messages_are_in_the_group_of_the_pipelines_owner(self, world: World) -> None:
        world.create(EACH)
        found = clients.client("sqs").receive_message(
            QueueUrl=world.queue_url, MaxNumberOfMessages=10, MessageSystemAttributeNames=["MessageGroupId"]
        )["Messages"]
        assert [each["Attributes"]["MessageGroupId"] for each in found] == ["alice"] * 2

    def test_message_gives_the_same_input_however_late_it_comes_again(self, world: World) -> None:
        world.replicate.files[FILE] = served(PNG)
        pipeline_id = world.create(IMAGE, LARGE)
        world.deliver()
        world.end(pipeline_id, "image", FILE)
        world.turn(pipeline_id)
        [body] = world.sent()
        message = Message("m", "AIDA", json.dumps(body), 0)
        first = world.pipelines.intent(body, message)
        world.clock.advance(86400)
        assert world.pipelines.intent(body, message) == first

    def test_id_of_a_run_is_that_of_its_intent(self, world: World) -> None:
        intent = create_requested_intent(
            {"model": "meta/llama", "input": {}}, owner="alice", source="pipeline",
            source_key=run_key("p" * 26, "image", 3), allow_loopback_webhooks=False,
        )  # fmt: skip
        assert intent.id == run_id("alice", "p" * 26, "image", 3)

    def test_same_key_is_the_same_pipeline(self, world: World, pipeline_executed: Executed) -> None:
        assert world.create(IMAGE, key="k") == world.create(IMAGE, key="k")
        assert len(world.sent()) == 1
        assert list(pipeline_executed.inputs.values()) == [{"id": world.create(IMAGE, key="k")}]

    def test_large_definition_is_an_object(self, world: World) -> None:
        large = step("large", {"text": "x" * PAYLOAD_LIMIT_BYTES})
        pipeline_id = world.create(large)
        assert len(world.deliver()) == 1
        listed = clients.client("s3").list_objects_v2(Bucket="outputs", Prefix=f"payloads/pipelines/{pipeline_id}/")
        assert listed["KeyCount"] == 1

    def test_pipelines_of_an_owner_are_listed_newest_first(self, world: World) -> None:
        ids = []
        for _ in range(3):
            ids.append(world.create(IMAGE))
            world.clock.advance(1)
        results, first, beyond = world.api.list_pipelines("alice", None, older=True, size=2)
        assert [each["id"] for each in results] == [ids[2], ids[1]]
        assert first is not None
        assert beyond is not None
        rest, _, none = world.api.list_pipelines("alice", beyond, older=True, size=2)
        assert ([each["id"] for each in rest], none) == ([ids[0]], None)
        assert world.api.list_pipelines("bob", None, older=True, size=2) == ([], None, None)

    def test_outputs_that_no_answer_can_carry_are_left_out_and_named(self, world: World) -> None:
        pipeline_id = world.create(step("a"), step("b"))
        world.deliver()
        world.end(pipeline_id, "a", "x" * 2_000_000)
        world.end(pipeline_id, "b", "y" * 2_000_000)
        world.turn(pipeline_id)
        shown = world.shown(pipeline_id)
        assert shown["outputs_left_out"] == ["b"]
        assert (len(shown["output"]["a"]), shown["output"]["b"]) == (2_000_000, None)


class TestFanOut:
    def test_step_runs_once_for_each_element_and_gives_the_outputs_in_their_order(self, world: World) -> None:
        pipeline_id = world.create(EACH, step("after", {"all": "{{ steps.each.output }}"}))
        world.deliver()
        assert sorted(world.inputs(), key=str) == [{"style": "etching", "n": 0}, {"style": "mosaic", "n": 1}]
        world.end(pipeline_id, "each", "second", index=1)
        assert not world.turn(pipeline_id).done
        assert world.sent() == []
        world.end(pipeline_id, "each", "first", index=0)
        world.turn(pipeline_id)
        world.deliver()
        assert world.inputs()[-1] == {"all": ["first", "second"]}
        assert world.shown(pipeline_id)["steps"][0]["output"] == ["first", "second"]

    def test_files_of_a_step_are_its_followers_elements(self, world: World) -> None:
        files = [FILE, FILE.replace("0.png", "1.png")]
        world.replicate.files |= {each: served(PNG) for each in files}
        pipeline_id = world.create(IMAGE, MANY)
        world.deliver()
        world.end(pipeline_id, "image", files)
        world.turn(pipeline_id)
        assert len(world.deliver()) == 2
        assert all(each["x"].startswith(f"{API_URL}/objects/outputs/") for each in world.inputs()[1:])

    def test_element_that_fails_fails_the_step_and_the_others_finish(self, world: World) -> None:
        pipeline_id = world.create(EACH, step("after", {"all": "{{ steps.each.output }}"}))
        world.deliver()
        world.end(pipeline_id, "each", FAILED, index=0)
        assert not world.turn(pipeline_id).done
        world.end(pipeline_id, "each", "second", index=1)
        assert world.turn(pipeline_id).done
        shown = world.shown(pipeline_id)
        assert [(each["status"], each["error"]) for each in shown["steps"]] == [
            ("failed", "1 of 2 did not succeed. 0: out of paint"),
            ("skipped", "Needs `each`, which failed."),
        ]
        assert shown["status"] == "failed"
        assert "`each` failed (1 of 2 did not succeed. 0: out of paint)" in shown["error"]

    def test_empty_list_succeeds_with_an_empty_list(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, MANY, step("after", {"all": "{{ steps.many.output }}"}))
        world.deliver()
        world.end(pipeline_id, "image", [])
        world.turn(pipeline_id)
        world.deliver()
        assert world.inputs()[-1] == {"all": []}
        world.end(pipeline_id, "after", "done")
        assert world.turn(pipeline_id).done
        assert world.shown(pipeline_id)["steps"][1]["output"] == []

    @pytest.mark.parametrize(
        ("output", "reason"),
        [
            ("one text", "(got a string)"),
            (["x"] * (ITEMS_LIMIT + 1), f"the limit of {ITEMS_LIMIT} elements"),
            (None, "finds nothing"),
        ],
    )
    def test_output_that_is_no_list_fails_the_step_that_needs_one(self, world: World, output: Any, reason: str) -> None:
        pipeline_id = world.create(IMAGE, MANY)
        world.deliver()
        world.end(pipeline_id, "image", output)
        assert world.turn(pipeline_id).done
        many = world.shown(pipeline_id)["steps"][1]
        assert (many["status"], many["predictions"]) == ("failed", [])
        assert reason in many["error"]
        assert "Step `many`: for_each" in many["error"]


class TestFailure:
    def test_failed_step_ends_what_needs_it_and_nothing_else(self, world: World) -> None:
        pipeline_id = world.create(
            IMAGE, LARGE, CAPTION, step("other"), step("last", {"x": "{{ steps.other.output }}"})
        )
        world.deliver()
        world.end(pipeline_id, "image", FAILED)
        world.end(pipeline_id, "other", "fine")
        assert not world.turn(pipeline_id).done
        world.deliver()
        world.end(pipeline_id, "last", "fine too")
        assert world.turn(pipeline_id).done
        assert world.statuses(pipeline_id) == {
            "image": "failed", "large": "skipped", "caption": "skipped", "other": "succeeded", "last": "succeeded",
        }  # fmt: skip
        shown = world.shown(pipeline_id)
        assert shown["status"] == "failed"
        assert shown["error"].startswith("Steps: `image` failed (out of paint); `large` skipped (Needs `image`, which")
        assert shown["output"] == {"caption": None, "last": "fine too"}

    @pytest.mark.parametrize("output", [None, {"other": 1}])
    def test_input_that_cannot_be_filled_fails_the_step_with_its_field(
        self, world: World, wakes: Wakes, output: Any
    ) -> None:
        pipeline_id = world.create(step("one"), step("two", {"deep": [{"x": "{{ steps.one.output.title }}"}]}))
        world.deliver()
        world.end(pipeline_id, "one", output)
        seen = world.turn(pipeline_id).seen
        assert world.deliver() == []
        there = world.table.get_pipeline(pipeline_id)
        assert there is not None
        assert there.events == seen + 1, "the pipeline is told"
        assert world.turn(pipeline_id).done
        two = world.shown(pipeline_id)["steps"][1]
        assert two["status"] == "failed"
        assert two["error"].startswith("Step `two`: input.deep.0.x: ")

    def test_element_that_cannot_be_filled_does_not_end_the_others(self, world: World) -> None:
        pipeline_id = world.create(step("one"), step("two", {"x": "{{ item.x }}"}, for_each="{{ steps.one.output }}"))
        world.deliver()
        world.end(pipeline_id, "one", [{"x": 1}, {}])
        world.turn(pipeline_id)
        assert len(world.deliver()) == 1
        assert not world.turn(pipeline_id).done
        world.end(pipeline_id, "two", "fine", index=0)
        assert world.turn(pipeline_id).done
        assert "1 of 2 did not succeed. 1: Step `two`: input.x" in world.shown(pipeline_id)["steps"][1]["error"]

    def test_output_of_another_type_than_the_model_takes_fails_the_step(self, world: World) -> None:
        pipeline_id = world.create(step("one"), step("two", {"prompt": "{{ steps.one.output }}"}, model=FLUX))
        world.deliver()
        world.end(pipeline_id, "one", {"no": "text"})
        world.turn(pipeline_id)
        [prediction] = world.deliver()
        world.hear(prediction.id)
        assert world.turn(pipeline_id).done
        assert "input.prompt: Must be a string" in world.shown(pipeline_id)["steps"][1]["error"]

    def test_deleted_output_fails_the_step_that_needs_it(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, LARGE)
        world.deliver()
        world.end(pipeline_id, "image", "text")
        image = world.predictions.get(world.run_id(pipeline_id, "image"))
        assert image is not None
        world.submissions.delete_ended(image)
        world.turn(pipeline_id)
        assert world.deliver() == []
        assert world.turn(pipeline_id).done
        assert "Step `large`: input.image" in world.shown(pipeline_id)["steps"][1]["error"]


class TestCancel:
    def test_canceled_pipeline_cancels_what_runs_and_starts_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, LARGE, step("other"))
        world.deliver()
        world.end(pipeline_id, "image", "text")
        shown = world.api.cancel_pipeline(pipeline_id, "alice")
        assert (shown["status"], bool(shown["cancel_requested_at"])) == ("running", True)
        world.turn(pipeline_id)
        other = world.predictions.get(world.run_id(pipeline_id, "other"))
        assert other is not None
        assert world.replicate.canceled == [other.upstream_id]
        assert world.sent() == []
        world.hear(other.id)
        assert world.turn(pipeline_id).done
        assert world.shown(pipeline_id)["status"] == "canceled"
        assert world.statuses(pipeline_id) == {"image": "succeeded", "large": "canceled", "other": "canceled"}

    def test_message_that_waited_in_the_queue_starts_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        world.api.cancel_pipeline(pipeline_id, "alice")
        assert world.deliver() == []
        assert world.turn(pipeline_id).done
        assert world.deliver({"pipeline_id": pipeline_id, "step": "image", "index": 0}) == []
        assert world.inputs() == []

    def test_intent_that_was_read_before_the_cancel_and_written_after_it_is_not_submitted(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        [body] = world.sent()
        intent = world.pipelines.intent(body, Message("m", "AIDA", json.dumps(body), 0))
        assert intent is not None
        world.api.cancel_pipeline(pipeline_id, "alice")
        assert world.turn(pipeline_id).done
        late = world.requests.start(intent)
        world.submissions.submit(late.id)
        assert world.predictions.get(late.id).status == "canceled"  # type: ignore[union-attr]
        assert world.inputs() == []

    def test_cancel_without_time_goes_on_in_the_next_turn(self, world: World) -> None:
        pipeline_id = world.create(EACH)
        world.deliver()
        world.api.cancel_pipeline(pipeline_id, "alice")
        assert world.turn(pipeline_id, remaining_seconds=1) == Turn(done=False, seen=-1)
        assert world.replicate.canceled == []
        world.turn(pipeline_id)
        assert len(world.replicate.canceled) == 2

    def test_cancel_of_what_has_ended_changes_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        world.deliver()
        world.end(pipeline_id, "image", "text")
        world.turn(pipeline_id)
        before = world.shown(pipeline_id)
        assert world.api.cancel_pipeline(pipeline_id, "alice") == before
        assert before["status"] == "succeeded"

    def test_pipeline_past_its_deadline_is_canceled_and_fails(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, LARGE)
        world.deliver()
        world.clock.advance(LIFETIME_SECONDS)
        assert world.turn(pipeline_id) == Turn(done=False, seen=-1)
        world.turn(pipeline_id)
        assert len(world.replicate.canceled) == 1
        assert world.turn(pipeline_id).done
        shown = world.shown(pipeline_id)
        assert shown["status"] == "failed"
        assert shown["error"].startswith("The deadline has passed.")

    def test_prediction_that_its_owner_cancels_ends_what_needs_it(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, LARGE)
        [image] = world.deliver()
        world.submissions.cancel(image)
        world.submissions.poll(image.id)
        world.turn(pipeline_id)
        shown = world.shown(pipeline_id)
        assert (shown["status"], [each["status"] for each in shown["steps"]]) == ("failed", ["canceled", "skipped"])


class TestTwiceLateNever:
    def test_turn_that_comes_twice_sends_once(self, world: World) -> None:
        pipeline_id = world.create(IMAGE, EACH)
        world.turn(pipeline_id)
        world.turn(pipeline_id)
        assert len(world.sent()) == 3

    def test_message_that_comes_twice_starts_once(self, world: World) -> None:
        world.create(IMAGE)
        [body] = world.sent()
        first, second = world.deliver(body, body)
        assert first.id == second.id
        assert len(world.inputs()) == 1

    def test_record_of_the_stream_that_comes_twice_is_one_more_look(self, world: World, wakes: Wakes) -> None:
        pipeline_id = world.create(IMAGE, LARGE)
        world.deliver()
        self.wait(pipeline_id, "token")
        world.end(pipeline_id, "image", "text")
        world.hear(world.run_id(pipeline_id, "image"))
        assert wakes.tokens.count("token") == 2
        world.turn(pipeline_id)
        world.turn(pipeline_id)
        assert len(world.sent()) == 1

    def test_record_that_comes_after_the_end_changes_nothing(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        world.deliver()
        world.end(pipeline_id, "image", "text")
        world.turn(pipeline_id)
        before = world.table.get_pipeline(pipeline_id)
        world.hear(world.run_id(pipeline_id, "image"))
        assert world.table.get_pipeline(pipeline_id) == before
        prediction_ended("p", {"pipeline": "b" * 26}, "succeeded")
        assert world.table.get_pipeline("b" * 26) is None

    def test_wake_that_is_lost_is_made_good_by_the_next_look(self, world: World, wakes: Wakes) -> None:
        pipeline_id = world.create(IMAGE)
        world.deliver()
        self.wait(pipeline_id, "gone")
        wakes.stale.add("gone")
        world.end(pipeline_id, "image", "text")
        assert world.turn(pipeline_id).done

    def test_end_between_a_look_and_the_wait_is_not_waited_for(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        world.deliver()
        seen = world.turn(pipeline_id).seen
        world.end(pipeline_id, "image", "text")
        assert not self.wait(pipeline_id, "token", seen)

    def test_request_that_started_nothing_is_sent_again_after_an_hour(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        assert len(world.sent()) == 1
        world.clock.advance(RESEND_SECONDS - 1)
        world.turn(pipeline_id)
        assert world.sent() == []
        world.clock.advance(1)
        world.turn(pipeline_id)
        assert len(world.sent()) == 1

    @pytest.mark.parametrize("fault", Fault)
    def test_turn_that_dies_anywhere_is_made_good_by_the_next(self, world: World, fault: Fault) -> None:
        for n in range(40):
            body = {"steps": [IMAGE, EACH, step("after", {"x": "{{ steps.each.output }}"})], "input": INPUT}
            pipeline_id = world.api.create_pipeline("alice", json.dumps(body).encode(), {})["id"]
            # Died is no Exception; how else a turn fails, depends on the fault.
            with faulty(fault, n) as made, contextlib.suppress(Died, Exception):
                world.turn(pipeline_id)
            struck = len(made) > n
            world.turn(pipeline_id)
            started = world.deliver()
            assert len({each.id for each in started}) == 3
            world.turn(pipeline_id)
            assert world.sent() == []
            if not struck:
                break
        assert not struck
        assert len(world.inputs()) == 3 * (n + 1)

    def test_pipeline_whose_execution_is_gone_is_started_again(self, world: World, pipeline_executed: Executed) -> None:
        pipeline_id = world.create(IMAGE)
        pipeline_executed.stop(f"{pipeline_id}-1")
        world.clock.advance(3600)
        assert world.submissions.sweep(10, lambda: 100, {"pipeline": world.executions.restart}) == 1
        assert pipeline_executed.inputs[f"{pipeline_id}-2"] == {"id": pipeline_id}
        assert world.submissions.sweep(10, lambda: 100, {"pipeline": world.executions.restart}) == 0

    def test_pipeline_that_has_ended_is_not_swept(self, world: World) -> None:
        pipeline_id = world.create(step("none", for_each=[]))
        assert world.shown(pipeline_id)["status"] == "succeeded"
        world.clock.advance(3600)
        assert world.submissions.sweep(10, lambda: 100, {"pipeline": world.executions.restart}) == 0

    def test_item_of_a_kind_that_nobody_sweeps_does_not_stop_the_sweep(self, world: World) -> None:
        world.create(IMAGE)
        world.clock.advance(3600)
        assert world.submissions.sweep(10, lambda: 100) == 1

    def test_create_that_died_after_it_was_written_down_is_started_by_its_repetition(
        self, world: World, pipeline_executed: Executed
    ) -> None:
        body = json.dumps({"steps": [step()]}).encode()
        # What a process asks once is asked here: the model, the API's URL.
        world.api.create_pipeline("alice", body, {"idempotency-key": "warm"})
        with faulty(Fault.REFUSED, 10_000) as made:
            world.api.create_pipeline("alice", body, {"idempotency-key": "counted"})
        start = made.index("stepfunctions.StartExecution")
        with faulty(Fault.DIED_BEFORE, start), pytest.raises(Died):
            world.api.create_pipeline("alice", body, {"idempotency-key": "k"})
        shown = world.api.create_pipeline("alice", body, {"idempotency-key": "k"})
        assert f"{shown['id']}-1" in pipeline_executed.inputs

    def wait(self, pipeline_id: str, token: str, seen: int | None = None) -> bool:
        """What AwaitStep writes; whether it waits."""
        dynamodb = clients.client("dynamodb")
        condition, values = "#status = :running", {":token": token, ":running": "running"}
        try:
            dynamodb.update_item(
                TableName="predictions",
                Key=serialize({"pk": f"pipeline#{pipeline_id}", "sk": "status"}),
                UpdateExpression="SET task_token = :token",
                ConditionExpression=condition + ("" if seen is None else " AND #events = :seen"),
                ExpressionAttributeNames={"#status": "status"} | ({} if seen is None else {"#events": "events"}),
                ExpressionAttributeValues=serialize(values | ({} if seen is None else {":seen": seen})),
            )
        except dynamodb.exceptions.ConditionalCheckFailedException:
            return False
        return True


@pytest.mark.slow
@given(graphs(cyclic=False), st.data())
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_step_runs_once_and_after_what_it_needs(
    world: World, steps: list[dict[str, Any]], data: st.DataObject
) -> None:
    before = len(world.inputs())
    pipeline_id = world.create(*steps)
    needs = {each["name"]: {name.replace("n", "s") for name in each["input"]} for each in steps}
    ended: dict[str, bool] = {}
    running: set[str] = set()
    while True:
        for message in world.sent():
            for prediction in world.deliver(*([message] * data.draw(st.integers(1, 2)))):
                name = str(prediction.origin["step"])
                assert all(ended.get(other) for other in needs[name])
                running |= {name} - ended.keys()
        if not running:
            break
        name = data.draw(st.sampled_from(sorted(running)))
        running.remove(name)
        ended[name] = data.draw(st.integers(0, 9)) > 0
        world.end(pipeline_id, name, "fine" if ended[name] else FAILED)
        for _ in range(data.draw(st.integers(1, 2))):
            world.turn(pipeline_id)
    expected = {name for name in needs if all(ended.get(other) for other in needs[name])}
    assert ended.keys() == expected
    assert len(world.inputs()) - before == len(ended)
    assert world.turn(pipeline_id).done
    assert world.shown(pipeline_id)["status"] == ("succeeded" if all(ended.get(name) for name in needs) else "failed")


class TestEvent:
    def records(self, world: World, *steps: dict[str, Any]) -> Iterator[dict[str, Any]]:
        key = {"pk": {"S": ""}, "sk": {"S": "status"}}
        pipeline_id = world.create(*steps)
        before = self.item(pipeline_id)
        yield {"dynamodb": {"Keys": key, "NewImage": before}}
        yield {"dynamodb": {"Keys": key, "OldImage": before, "NewImage": before}}
        world.deliver()
        world.end(pipeline_id, "image", "text")
        world.turn(pipeline_id)
        after = self.item(pipeline_id)
        yield {"dynamodb": {"Keys": key, "OldImage": before, "NewImage": after}}
        yield {"dynamodb": {"Keys": key, "OldImage": after, "NewImage": after}}
        yield {"dynamodb": {"Keys": key, "OldImage": after}}

    def item(self, pipeline_id: str) -> Any:
        return clients.client("dynamodb").get_item(
            TableName="predictions", Key=serialize({"pk": f"pipeline#{pipeline_id}", "sk": "status"})
        )["Item"]

    def test_only_the_end_is_an_event(self, world: World) -> None:
        events = [event_of(record) for record in self.records(world, IMAGE, step("none", for_each=[]))]
        assert [event is not None for event in events] == [False, False, True, False, False]
        kind, detail = events[2]  # type: ignore[misc]
        assert kind == "Pipeline Completed"
        assert json.loads(json.dumps(detail)) == {
            "version": "1",
            "event_id": f"{detail['id']}-completed",
            "id": detail["id"],
            "owner": "alice",
            "status": "succeeded",
            "error": None,
            "depth": 0,
            "created_at": "2025-06-15T15:06:40.000000Z",
            "completed_at": "2025-06-15T15:06:40.000000Z",
            "steps": {"succeeded": 2},
        }

    def test_what_is_noted_of_a_step_is_no_event(self, world: World) -> None:
        world.create(EACH)
        for item in clients.client("dynamodb").scan(TableName="predictions")["Items"]:
            if deserialize(item)["sk"] != "status":
                assert event_of({"dynamodb": {"NewImage": item}}) is None


class TestMemory:
    """What a step gathers is bounded before it is read: by its noted length, then by its values."""

    def start(self, world: World, outputs: list[Any], refer: str = "{{ steps.each.output }}") -> str:
        """A pipeline whose last step is due, and refers to the outputs of the first."""
        each = step("each", {"n": "{{ index }}"}, for_each=[str(n) for n in range(len(outputs))])
        pipeline_id = world.create(each, step("after", {"x": refer}))
        world.deliver()
        for index, output in enumerate(outputs):
            world.end(pipeline_id, "each", output, index)
        return pipeline_id

    def note_length(self, world: World, pipeline_id: str, index: int, length: int) -> None:
        prediction_id = world.run_id(pipeline_id, "each", index)
        prediction = world.predictions.get(prediction_id)
        assert prediction is not None
        clients.client("dynamodb").update_item(
            TableName="predictions",
            Key=serialize({"pk": f"prediction#{prediction_id}", "sk": f"result#{prediction.upstream_id}"}),
            UpdateExpression="SET #length = :length",
            ExpressionAttributeNames={"#length": "length"},
            ExpressionAttributeValues=serialize({":length": length}),
        )

    @pytest.mark.parametrize("over", [0, 1])
    def test_outputs_whose_length_is_above_the_limit_are_not_read_and_fail_the_pipeline(
        self, world: World, over: int
    ) -> None:
        large = "x" * (PAYLOAD_LIMIT_BYTES + 1)  # objects
        pipeline_id = self.start(world, [large, large])
        self.note_length(world, pipeline_id, 0, GATHERED_LIMIT_BYTES - 1000)
        self.note_length(world, pipeline_id, 1, 1000 + over)
        world.turn(pipeline_id)
        calls = AwsCalls()
        started = world.deliver()
        if not over:
            assert len(started) == 1
            assert calls.made[: calls.made.index("dynamodb.PutItem")].count("s3.GetObject") == 2
            return
        assert started == []
        assert "s3.GetObject" not in calls.made
        assert world.turn(pipeline_id).done
        shown = world.shown(pipeline_id)
        assert shown["status"] == "failed"
        assert f"The outputs of `each` exceed the limit of {GATHERED_LIMIT_BYTES} bytes" in shown["error"]
        assert f"(got {GATHERED_LIMIT_BYTES + 1})" in shown["error"]

    def test_outputs_with_too_many_values_are_not_parsed_and_fail_the_pipeline(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As many small values as take the most memory for their length.
        monkeypatch.setattr("predictions.pipelines.steps.GATHERED_LIMIT_VALUES", 10_000)
        pipeline_id = self.start(world, [[{}] * 4000, [{}] * 4000])
        world.turn(pipeline_id)
        assert world.deliver() == []
        assert world.turn(pipeline_id).done
        assert "exceed the limit of 10000 values" in world.shown(pipeline_id)["error"]

    def test_list_that_is_counted_is_bounded_likewise(self, world: World) -> None:
        each = step("each", {"n": "{{ index }}"}, for_each=["a"])
        pipeline_id = world.create(each, step("many", {"x": "{{ item }}"}, for_each="{{ steps.each.output[0] }}"))
        world.deliver()
        world.end(pipeline_id, "each", ["a" * 3000])  # no small one, which would be in its status item
        self.note_length(world, pipeline_id, 0, GATHERED_LIMIT_BYTES + 1)
        assert world.turn(pipeline_id).done
        assert world.sent() == []
        shown = world.shown(pipeline_id)
        assert shown["status"] == "failed"
        assert f"exceed the limit of {GATHERED_LIMIT_BYTES} bytes" in shown["error"]

    def test_outputs_that_are_left_out_of_an_answer_are_not_read(self, world: World) -> None:
        large = "x" * (PAYLOAD_LIMIT_BYTES + 1)
        pipeline_id = self.start(world, [large, large])
        self.note_length(world, pipeline_id, 0, ANSWER_LIMIT_BYTES)
        calls = AwsCalls()
        shown = world.shown(pipeline_id)
        assert shown["outputs_left_out"] == ["each"]
        assert "s3.GetObject" not in calls.made

    def test_message_that_was_given_up_fails_its_pipeline_and_is_not_sent_again(self, world: World) -> None:
        pipeline_id = world.create(IMAGE)
        [sent] = world.sent()
        message = Message("m", "AIDA", json.dumps(sent), int(world.clock.now()))
        with pytest.MonkeyPatch.context() as only_here:
            only_here.setattr("predictions.intake.queue._pipelines", lambda: world.pipelines)
            for _ in range(2):
                world.requests.give_up(message, "It was tried four times.")
        assert world.turn(pipeline_id).done
        assert "It was tried four times." in world.shown(pipeline_id)["error"]
        world.clock.advance(RESEND_SECONDS)
        world.turn(pipeline_id)
        assert world.sent() == []

    @pytest.mark.parametrize("body", ["{", "[]", "{}", '{"pipeline_id": 7}', '{"pipeline_id": "x"}', "[" * 100_000])
    def test_given_up_message_of_no_pipeline_is_passed_over(self, world: World, body: str) -> None:
        world.requests.give_up(Message("m", "AIDA", body, 0), "reason")
        assert clients.client("dynamodb").scan(TableName="predictions")["Items"] == []


def test_no_pipeline_within_the_limits_takes_a_second_of_a_message(world: World) -> None:
    # The attack: long lists, looked through again and again by each of hundreds of messages.
    rows = list(range(PART_LIMIT_VALUES - 10))
    hungry = ["{{ max(input.r) }}{{ length(sort(input.r)) }}{{ input.r == input.r }}"] * 600
    each = step("each", {"a": hungry}, for_each=["a"] * 100)
    pipeline_id = world.create(each, input={"r": rows})
    began = time.process_time()
    assert world.deliver({"pipeline_id": pipeline_id, "step": "each", "index": 0}) == []
    assert time.process_time() - began < 2
    assert world.statuses(pipeline_id)["each"] == "starting"
    notes = world.table.read_pipeline(pipeline_id)
    assert notes is not None
    assert "too many steps" in notes.notes["each"].errors[0]


@pytest.mark.parametrize(
    ("element", "marks"),
    [("{}", 2), ("[]", 2), ("[1234,1567]", 3), ('{"a":1}', 3), ('"x"', 1), ("1234.5", 1)],
)
def test_outputs_within_the_limits_fit_the_memory_of_the_smallest_function(element: str, marks: int) -> None:
    count = min(GATHERED_LIMIT_VALUES // marks, GATHERED_LIMIT_BYTES // (len(element) + 1)) - 10
    tracemalloc.start()
    try:
        text = '{"output":[' + ",".join([element] * count) + '],"logs":""}'
        output = json.loads(text)["output"]
        peak_mb = tracemalloc.get_traced_memory()[1] // 1024**2
    finally:
        tracemalloc.stop()
    assert len(output) == count
    # advance_pipeline has 512 MB, of which it uses about 130 for its code and clients.
    assert peak_mb < 100


def test_list_and_input_of_a_message_share_their_steps(world: World) -> None:
    rows = [f"n{n}" for n in range(9000)]
    half = " || ".join(["(input.r[?@ == 'none'])[0]"] * 5)
    each = step("each", {"a": f"{{{{ {half} || 'x' }}}}"}, for_each=f"{{{{ {half} || `[1]` }}}}")
    pipeline_id = world.create(each, input={"r": rows})
    assert world.deliver({"pipeline_id": pipeline_id, "step": "each", "index": 0}) == []
    notes = world.table.read_pipeline(pipeline_id)
    assert notes is not None
    assert "too many steps" in notes.notes["each"].errors[0]


def test_pipeline_that_is_not_there_counts_as_canceled(world: World) -> None:
    assert not is_active({"pipeline": "a" * 26})
    pipeline_id = world.create(IMAGE)
    assert is_active({"pipeline": pipeline_id})
    world.api.cancel_pipeline(pipeline_id, "alice")
    assert not is_active({"pipeline": pipeline_id})


def test_token_is_not_shown_where_a_pipeline_is_logged() -> None:
    pipeline = Pipeline("a" * 26, "alice", "running", "", 0, 0, 0, "", 1, task_token="secret")
    assert "secret" not in repr(pipeline)
