"""Templates: what is refused, what is filled, and that hostile ones end soon."""

import json
import time
from typing import Any

import pytest
from predictions import templating
from predictions.templating import (
    STEPS_LIMIT,
    Allowance,
    Filler,
    PlaceholderError,
    TooSlow,
    expressions,
    fill,
    holds_placeholders,
)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps alone end a filling, however slow this machine is now."""
    monkeypatch.setattr(templating, "SECONDS_LIMIT", 1000.0)


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


def test_a_template_that_looks_through_a_long_list_again_and_again_is_stopped() -> None:
    began = time.monotonic()
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill({"a": ["{{ max(numbers) }}"] * 5000}, {"numbers": list(range(300_000))})
    assert time.monotonic() - began < 15, "and not in minutes"


NUMBERS = list(range(150_000))
TEXTS = ["x" * 60] * 50_000
LONG = {
    "numbers": NUMBERS,
    "texts": TEXTS,
    "empty": [[]] * 150_000,
    "same": [{"a": n} for n in range(20_000)],
    "also": [{"a": n} for n in range(20_000)],
    "text": "a" * 8_000_000,
    "fields": {f"f{n}": n for n in range(150_000)},
}


@pytest.mark.parametrize(
    "expression",
    [
        "max(numbers)",
        "min(numbers)",
        "sum(numbers)",
        "avg(numbers)",
        "length(sort(texts))",
        "length(reverse(numbers))",
        "length(numbers)",
        "contains(numbers, `-1`)",
        "contains(text, 'b')",
        "length(to_string(same))",
        "length(keys(fields))",
        "starts_with(text, 'b')",
        "same == also",
        "text == 'b'",
        "numbers[:][0]",
        "empty[] | length(@)",
        "length(join('', texts))",
    ],
)
def test_work_on_a_long_value_is_charged_however_few_steps_name_it(expression: str) -> None:
    # Each was one or two steps, and is now about as many as there are values, or 64 characters.
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill({"a": ["{{ " + expression + " }}"] * 10}, LONG)


def test_text_that_would_not_fit_the_memory_is_refused_before_it_is_made() -> None:
    context = {"separator": "x" * 1_000_000, "texts": ["a"] * 20_000}  # 20 GB
    with pytest.raises(PlaceholderError, match="too many steps"):
        fill("{{ join(separator, texts) }}", context)


def test_refused_value_is_not_quoted_however_large_it_is() -> None:
    with pytest.raises(PlaceholderError) as refused:
        fill({"a": "{{ abs(texts) }}"}, {"texts": ["secret " * 100_000]})
    assert refused.value.detail == "`{{ abs(texts) }}` cannot be filled: abs() takes number, and is given array"


def test_expressions_are_charged_for_being_read() -> None:
    # Each text is another expression, and finds its value in a few steps.
    template = [f"{{{{ {'a.' * 100}a{n} || `1` }}}}" for n in range(STEPS_LIMIT // 100)]
    with pytest.raises(PlaceholderError, match=f"more than {STEPS_LIMIT} steps"):
        fill(template, {})


def test_template_without_placeholders_is_charged() -> None:
    with pytest.raises(PlaceholderError, match=f"more than {STEPS_LIMIT} steps"):
        fill([1] * STEPS_LIMIT, {})


def test_all_that_is_filled_for_one_message_shares_one_allowance() -> None:
    allowance = Allowance()
    for _ in range(19):
        Filler(CONTEXT, allowance).fill("{{ rows }}")
    with pytest.raises(PlaceholderError, match="too many steps"):
        Filler(CONTEXT, allowance).fill("{{ rows }}")


def test_steps_run_out_at_the_same_place_on_every_machine() -> None:
    fields = set()
    for _ in range(2):
        with pytest.raises(PlaceholderError) as refused:
            fill({"a": ["{{ max(numbers) }}"] * 10}, LONG)
        fields.add(refused.value.field)
    assert fields == {"a.1"}


def test_machine_that_stalls_is_no_fault_of_the_template() -> None:
    ticks = iter(range(1000))
    allowance = Allowance(seconds=2, clock=lambda: float(next(ticks)))
    with pytest.raises(TooSlow, match="limit of 2 seconds"):
        Filler(CONTEXT, allowance).fill(["{{ flag }}"] * 10)


def test_work_of_the_whole_allowance_takes_less_than_its_time() -> None:
    # Measured in seconds of a processor: the function has more than half of one.
    for template in (
        ["{{ rows }}"] * 50,
        ["{{ rows[?id > `5` && name != 'x'].id }}"] * 50,
        ["{{ max(numbers) }}"] * 50,
    ):
        began = time.process_time()
        with pytest.raises(PlaceholderError):
            fill(template, CONTEXT | LONG, Allowance(seconds=1000))
        assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("https://x.example/?key={{ object.key }}", "https://x.example/?key=<in/fox.png>"),
        ("{{ object.key }}?n={{ object.size }}", "in/fox.png?n=<7>"),
        ("{{ object.key }}", "in/fox.png"),
    ],
)
def test_values_after_the_beginning_of_a_text_are_encoded(template: str, filled: str) -> None:
    assert Filler(CONTEXT).fill(template, encode=lambda text: f"<{text}>") == filled


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
