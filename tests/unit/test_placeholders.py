"""Templates: what is refused, what is filled, and that hostile ones end soon."""

import json
import time
from typing import Any

import pytest
from predictions import placeholders
from predictions.placeholders import PlaceholderError, expressions, fill, holds_placeholders

CONTEXT: dict[str, Any] = {
    "object": {"key": "in/fox.png", "size": 7, "metadata": {"origin-depth": "1"}, "tags": ["a", "b"]},
    "flag": True,
    "nothing": None,
    "rows": [{"id": n, "name": f"n{n}"} for n in range(2000)],
}


@pytest.mark.parametrize(
    ("template", "field", "said"),
    [
        ({"input": {"image": "{{ object.url }}"}}, "input.image", "finds nothing here"),
        ({"input": {"image": "x {{ nothing }}"}}, "input.image", "finds nothing here"),
        ({"input": {"images": ["ok", "{{ nowhere }}"]}}, "input.images.1", "finds nothing here"),
        ({"a": "{{ object..key }}"}, "a", "is not JMESPath"),
        ({"a": "{{ }}"}, "a", "is not JMESPath"),
        ({"a": "{{ " + "(" * 250 + " }}"}, "a", "is not JMESPath"),
        ({"a": "{{ object.key"}, "a", "does not end"),
        ({"a": "{{ flag }} and {{ flag"}, "a", "does not end"),
        ({"a": "{{ " + "a" * 257 + " }}"}, "a", "at most 256 characters"),
        ({"a": "{{ flag }}" * 65}, "a", "at most 64 placeholders"),
        ({"a": "{{ nofunction(object) }}"}, "a", "cannot be filled"),
        ({"a": "{{ abs('x') }}"}, "a", "cannot be filled"),
        ({"a": "{{ &object }}"}, "a", "finds no value"),
        ({"a": "{{ to_number('nan') }}"}, "a", "no number that JSON can carry"),
        ({"a": "{{ sum(`[1e308, 1e308]`) }}"}, "a", "no number that JSON can carry"),
        ({"a": "{{ to_number('" + "9" * 200 + "e200') }}"}, "a", "no number that JSON can carry"),
        # Half a surrogate pair, which only an escape in a literal makes, cannot be stored.
        ({"a": '{{ `"\\ud83d"` }}'}, "a", "half of a surrogate pair"),
        ({"a": '{{ nothing || `{"\\ud83d": 1}` }}'}, "a", "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_its_field(template: Any, field: str, said: str) -> None:
    with pytest.raises(PlaceholderError) as refused:
        fill(template, CONTEXT)
    assert (refused.value.field, said in refused.value.detail) == (field, True), refused.value.detail


@pytest.mark.parametrize(
    "expression",
    [
        # Each of these doubles what there is with every step.
        "|".join(["[@,@][]"] * 32),
        "|".join(["[@,@]"] * 40),
        "|".join(["[@,@]"] * 35) + "|to_string(@)",
        "|".join(["{a:@,b:@}"] * 25),
        "to_string(@)|" + "|".join(["join('',[@,@])"] * 15),
        "|".join(["[@,@][]"] * 16) + "|length(@)",
        "rows|" + "|".join(["[*].[@,@][]"] * 20),
    ],
)
def test_an_expression_that_grows_without_end_is_stopped(expression: str) -> None:
    assert len(expression) <= 256
    began = time.monotonic()
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill({"a": "{{ " + expression + " }}"}, CONTEXT)
    assert time.monotonic() - began < 30, "and not never"


def test_all_placeholders_of_a_template_share_their_steps() -> None:
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill({"a": ["{{ rows }}" * 64] * 100}, CONTEXT)


def test_a_template_that_looks_through_a_long_list_again_and_again_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placeholders, "SECONDS_LIMIT", 0.2)
    began = time.monotonic()
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill({"a": ["{{ max(numbers) }}"] * 5000}, {"numbers": list(range(300_000))})
    assert time.monotonic() - began < 15, "and not in minutes"


def test_a_template_nested_too_deep_is_refused() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for use in (lambda: fill(deep, {}), lambda: list(expressions(deep))):
        with pytest.raises(PlaceholderError, match="nested deeper"):
            use()


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("plain", "plain"),
        ("", ""),
        ("{ not } one {", "{ not } one {"),
        ("{{ object.key }}", "in/fox.png"),
        ("{{object.size}}", 7),
        ("{{ flag }}", True),
        ("{{ object.tags }}", ["a", "b"]),
        ("s3://{{ object.key }}?size={{ object.size }}&{{ flag }}", "s3://in/fox.png?size=7&true"),
        (" {{ object.size }}", " 7"),
        ("tags: {{ object.tags }}", 'tags: ["a","b"]'),
        ('{{ object.metadata."origin-depth" }}', "1"),
        ('{{ nothing || `"default"` }}', "default"),
        ("{{ nothing || `0` }}", 0),
        # Two closing braces side by side would end the placeholder.
        ("{{ {a: {b: object.size} } }}", {"a": {"b": 7}}),
        ({"{{ name }}": [1, None, 2.5, {"deep": "{{ object.size }}"}]}, {"{{ name }}": [1, None, 2.5, {"deep": 7}]}),
        ("{{ rows[-1].name }}", "n1999"),
        ("{{ length(rows[?id > `1990`]) }}", 9),
    ],
)
def test_placeholders_are_filled(template: Any, filled: Any) -> None:
    assert fill(template, CONTEXT) == filled
    json.dumps(fill(template, CONTEXT), allow_nan=False)


def test_filling_changes_neither_template_nor_context() -> None:
    template = {"input": {"image": "{{ object.tags }}"}}
    before = json.dumps([template, CONTEXT])
    fill(template, CONTEXT)
    assert json.dumps([template, CONTEXT]) == before


def test_expressions_are_told_with_their_places() -> None:
    template = {"input": {"a": "{{ x.y }} and {{ z }}", "b": ["plain", "{{ w }}"]}}
    assert list(expressions(template)) == [("input.a", "x.y"), ("input.a", "z"), ("input.b.1", "w")]
    assert holds_placeholders(template)
    assert not holds_placeholders({"a": ["plain", 1]})


def test_one_expression_that_cannot_be_read_is_told_when_it_is_written() -> None:
    with pytest.raises(PlaceholderError, match=r"input\.b: .*is not JMESPath"):
        list(expressions({"input": {"a": "{{ fine }}", "b": "{{ ! }}"}}))
