import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from predictions.errors import Problem
from predictions.intents.model import Reference
from predictions.pipelines.definition import (
    BODY_LIMIT_PLACEHOLDERS,
    BODY_LIMIT_VALUES,
    FAN_OUTS_LIMIT,
    ITEMS_LIMIT,
    PART_LIMIT_BYTES,
    PART_LIMIT_VALUES,
    STEPS_LIMIT,
    Definition,
    create_definition,
    fingerprint,
)
from predictions.upstream.input_schema import InputSchema

from tests.support.fakes import SCHEMA
from tests.support.pipeline_definitions import FLUX, INPUT, graphs, step

_closed: dict[str, Any] = copy.deepcopy(SCHEMA)
_closed["components"]["schemas"]["Input"]["additionalProperties"] = False  # as Cog writes it
SCHEMA_OF_FLUX = InputSchema.from_openapi(_closed)


def check(reference: Reference, asked: Mapping[str, Any]) -> list[dict[str, str]]:
    """As the stack does it, with two models."""
    if reference.name == "local/none":
        raise Problem(404, "There is no model local/none.")
    if reference.name == "local/late":
        raise Problem(503, "Replicate could not be asked.")
    return SCHEMA_OF_FLUX.violations(asked) if reference.name == FLUX else []


def refused(*steps: Any, **others: Any) -> dict[str, str]:
    """What is wrong, by field."""
    with pytest.raises(Problem) as caught:
        create_definition({"input": INPUT, "steps": list(steps), **others}, check)
    assert caught.value.status == 422
    return {each["field"]: each["detail"] for each in caught.value.invalid_fields}


def needing(expression: str) -> dict[str, Any]:
    return step("caption", {"image": f"{{{{ {expression} }}}}"})


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["steps"]),
        ({"steps": []}, ["steps"]),
        ({"steps": [step(f"s{n}") for n in range(STEPS_LIMIT + 1)]}, ["steps"]),
        ({"steps": "all"}, ["steps"]),
        ({"steps": ["image"]}, ["steps.0"]),
        ({"steps": [step()], "webhook_completed": "https://example.com"}, ["webhook_completed"]),
        ({"steps": [step()], "input": []}, ["input"]),
        ({"steps": [step(webhook="https://example.com")]}, ["steps.0.webhook"]),
        ({"steps": [step(idempotency_key="a")]}, ["steps.0.idempotency_key"]),
        ({"steps": [{"name": "image", "model": "meta/llama"}, step(7)]}, ["steps.0.input", "steps.1.name"]),
        ({"steps": [step(for_each=3)]}, ["steps.0.for_each"]),
    ],
)
def test_body_of_another_shape_is_refused(body: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(Problem) as caught:
        create_definition(body, check)
    assert [each["field"] for each in caught.value.invalid_fields] == fields


def test_refusal_of_a_shape_names_the_step() -> None:
    with pytest.raises(Problem, match="Step `image`: Unknown field"):
        create_definition({"steps": [step(webhook="https://example.com")]}, check)


@pytest.mark.parametrize("name", ["", "Image", "1st", "my-step", "a" * 33, "a.b", "bild\n", "größe"])
def test_step_with_a_name_that_no_expression_could_use_is_refused(name: str) -> None:
    assert refused(step(name)).keys() == {"steps.0.name"}


def test_second_step_of_a_name_is_refused() -> None:
    assert refused(step(), step()) == {"steps.1.name": "Step `image`: Another step has this name."}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"model": "llama"}, "model"),
        ({"model": "meta/llama", "version": "meta/llama"}, "model"),
        ({"deployment": "one"}, "deployment"),
        ({"model": "meta/llama", "lifetime": "soon"}, "lifetime"),
        ({"model": "local/none"}, "model"),
    ],
)
def test_step_that_nothing_can_run_is_refused_with_its_name(request_: dict[str, Any], field: str) -> None:
    found = refused(step(), step("second", **request_))
    assert found.keys() == {f"steps.1.{field}"}
    assert found[f"steps.1.{field}"].startswith("Step `second`: ")


def test_model_that_cannot_be_asked_for_now_is_no_fault_of_the_pipeline() -> None:
    with pytest.raises(Problem) as caught:
        create_definition({"steps": [step(model="local/late")]}, check)
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("steps.painting.output", "Step `painting` not found."),
        ("steps.caption.output", "A step cannot depend on its own output."),
        ("steps.image.logs", "A step has only `output`, not `logs`."),
        ("steps.image", "Name the step and its output"),
        ("steps.*.output", "Name the step and its output"),
        ("keys(steps)", "Name the step and its output"),
        ("@", "Name the step and its output"),
        ("[@]", "Name the step and its output"),
        ("steps | *", "Name the step and its output"),
        ("{a: steps.image}", "Name the step and its output"),
        ("values(@)[0]", "Name the step and its output"),
        ("steps || `1`", "Name the step and its output"),
        ("input.promt", "The pipeline's input has no `promt`."),
        ("inptu.prompt", "An expression must begin with `input`, `steps` (got `inptu`)."),
        ("item", "`item` needs `for_each`."),
        ("index", "`index` needs `for_each`."),
        ("a b", "is not JMESPath"),
    ],
)
def test_expression_that_refers_to_what_is_not_there_is_refused(expression: str, reason: str) -> None:
    found = refused(step(), needing(expression))
    assert found.keys() == {"steps.1.input.image"}
    assert found["steps.1.input.image"].startswith("Step `caption`: ")
    assert reason in found["steps.1.input.image"]


@pytest.mark.parametrize(
    ("for_each", "reason"),
    [
        ("etching", "Must be a list, or exactly one placeholder"),
        ("a {{ input.styles }}", "Must be a list, or exactly one placeholder"),
        ("{{ input.styles }}{{ input.styles }}", "Must be a list, or exactly one placeholder"),
        ("{{ input.prompt }}", "Must give a list (got a string)."),
        ("{{ input.count }}", "Must give a list (got a number)."),
        ("{{ input.styles[5] }}", "finds nothing"),
        ("{{ item }}", "`item` needs `for_each`."),
        ("{{ steps.none.output }}", "Step `none` not found."),
        ([0] * (ITEMS_LIMIT + 1), f"Exceeds the limit of {ITEMS_LIMIT} elements (got {ITEMS_LIMIT + 1})."),
        (["{{ input.none }}"], "The pipeline's input has no `none`."),
    ],
)
def test_fan_out_over_no_list_is_refused(for_each: Any, reason: str) -> None:
    detail, *_ = refused(step(for_each=for_each)).values()
    assert reason in detail


def test_more_fan_outs_than_a_history_can_hold_are_refused() -> None:
    steps = [step(f"s{n}", for_each=[1]) for n in range(FAN_OUTS_LIMIT + 1)]
    assert refused(*steps).keys() == {f"steps.{FAN_OUTS_LIMIT}.for_each"}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "input.prompt"),
        ({"prompt": 7}, "input.prompt"),
        ({"prompt": "{{ input.count }}"}, "input.prompt"),
        ({"prompt": "a", "num_outputs": "{{ input.prompt }}"}, "input.num_outputs"),
        ({"prompt": "a", "num_outputs": 9}, "input.num_outputs"),
        ({"prompt": "{{ steps.image.output }}", "steps": 3}, "input.steps"),
        ({"prompt": "a", "image": "{{ steps.image.output }}"}, "input.image"),
        ({"prompt": "{{ input.styles[7] }}"}, "input.prompt"),
    ],
)
def test_value_that_the_model_does_not_take_is_refused_before_anything_is_started(
    asked: dict[str, Any], field: str
) -> None:
    found = refused(step(), step("large", asked, model=FLUX))
    assert found.keys() == {f"steps.1.{field}"}
    assert found[f"steps.1.{field}"].startswith("Step `large`: ")


def test_everything_that_is_wrong_is_said_at_once() -> None:
    found = refused(
        step("a", {"x": "{{ steps.b.output }}"}),
        step("b", {"x": "{{ steps.a.output }}", "y": "{{ input.none }}"}),
        step("c", model="local/none"),
        step("d", {"prompt": 1}, model=FLUX),
        step("d"),
    )
    assert found == {
        "steps.0.input": "Step `a`: The step depends on itself: `a` needs `b` needs `a`.",
        "steps.1.input": "Step `b`: The step depends on itself: `b` needs `a` needs `b`.",
        "steps.1.input.y": "Step `b`: The pipeline's input has no `none`.",
        "steps.2.model": "Step `c`: There is no model local/none.",
        "steps.3.input.prompt": "Step `d`: Must be a string, not a number.",
        "steps.4.name": "Step `d`: Another step has this name.",
    }


# -- taken ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "needs"),
    [
        ("steps.image.output", ("image",)),
        ('steps."image".output[0]', ("image",)),
        ("steps | image.output", ("image",)),
        ("steps.image.output[?size > `3`].url | [0]", ("image",)),
        ("sort_by(steps.image.output, &steps)", ("image",)),
        ("join(', ', [steps.image.output, input.prompt])", ("image",)),
        ("{a: steps.image.output, b: input}", ("image",)),
        ("steps.image.output || steps.other.output", ("image", "other")),
        ('input.style || `"etching"`', ()),
        ("input.prompt", ()),
        ('`"steps.image.output"`', ()),
    ],
)
def test_what_an_expression_needs_is_read_from_it(expression: str, needs: tuple[str, ...]) -> None:
    definition = create_definition({"input": INPUT, "steps": [needing(expression), step(), step("other")]}, check)
    assert definition.steps[0].needs == needs
    assert next(each.name for each in definition.in_order) == ("image" if "image" in needs else "caption")


def test_last_steps_are_those_that_no_other_one_needs() -> None:
    definition = create_definition({"steps": [step(), needing("steps.image.output"), step("other")]}, check)
    assert [each.name for each in definition.last] == ["caption", "other"]


def test_step_with_for_each_has_its_item() -> None:
    fanned = step("each", {"prompt": "{{ item }} {{ index }}"}, for_each="{{ steps.image.output }}", model=FLUX)
    assert create_definition({"steps": [step(), fanned]}, check).steps[1].needs == ("image",)


def test_definition_survives_being_stored() -> None:
    definition = create_definition(
        {"input": INPUT, "steps": [step(), needing("steps.image.output"), step("each", for_each=[1])]}, check
    )
    assert Definition.from_json(definition.to_json()) == definition
    assert json.loads(definition.to_json())["input"] == INPUT


def test_fingerprint_is_the_same_whatever_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [1.0]}) == fingerprint({"b": [1], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@given(graphs(cyclic=True))
@settings(max_examples=100, deadline=None)
def test_cycle_is_always_refused(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(Problem, match="The step depends on itself"):
        create_definition({"steps": steps}, check)


@given(graphs(cyclic=False))
@settings(max_examples=100, deadline=None)
def test_steps_without_a_cycle_have_an_order(steps: list[dict[str, Any]]) -> None:
    definition = create_definition({"steps": steps}, check)
    done: set[str] = set()
    for each in definition.in_order:
        assert set(each.needs) <= done
        done.add(each.name)
    assert len(done) == len(steps)


class TestSize:
    @pytest.mark.parametrize(
        ("body", "field", "said"),
        [
            ({"input": {"r": [0] * PART_LIMIT_VALUES}}, "input", f"the limit of {PART_LIMIT_VALUES}"),
            ({"input": {"r": "x" * PART_LIMIT_BYTES}}, "input", f"the limit of {PART_LIMIT_BYTES}"),
            ({"input": {"r": "é" * (PART_LIMIT_BYTES // 2)}}, "input", f"the limit of {PART_LIMIT_BYTES}"),
            ({"steps": [step(input={"r": {"": {}} | {f"f{n}": 1 for n in range(PART_LIMIT_VALUES // 2)}})]},
             "steps.0.input", f"the limit of {PART_LIMIT_VALUES}"),
            ({"steps": [step(), step("many", for_each=[{"r": [0] * PART_LIMIT_VALUES}])]},
             "steps.1.input", f"the limit of {PART_LIMIT_VALUES}"),
            ({"steps": [step(f"s{n}", {"r": [0] * 70_000}) for n in range(3)]},
             "steps", f"the limit of {BODY_LIMIT_VALUES}"),
            ({"steps": [step(input={"r": "{{ input.prompt }}" * (BODY_LIMIT_PLACEHOLDERS + 1)})]},
             "steps", f"the limit of {BODY_LIMIT_PLACEHOLDERS}"),
        ],
    )  # fmt: skip
    def test_pipeline_that_is_too_large_to_fill_is_refused_by_its_field(
        self, body: dict[str, Any], field: str, said: str
    ) -> None:
        asked = {"input": INPUT, "steps": [step()], **body}
        found = refused(*asked["steps"], input=asked["input"])
        assert list(found) == [field]
        assert said in found[field]

    def test_pipeline_within_the_limits_is_taken(self) -> None:
        body = {"input": {"r": [0] * (PART_LIMIT_VALUES - 3)}, "steps": [step(input={"r": "{{ input.r }}"})]}
        assert create_definition(body, check).input == body["input"]

    def test_pipeline_that_takes_long_to_check_is_left_to_its_run(self) -> None:
        # Fifty steps each fill all of the input: what is beyond a second of work is not filled here.
        steps = [step(f"s{n}", {"r": "{{ input.r }}"}) for n in range(STEPS_LIMIT)]
        body = {"input": {"r": [0] * (PART_LIMIT_VALUES - 3)}, "steps": steps}
        assert len(create_definition(body, check).steps) == STEPS_LIMIT
