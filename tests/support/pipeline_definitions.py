"""Definitions of pipelines, given and generated."""

from typing import Any

from hypothesis import strategies as st

FLUX = "black-forest-labs/flux-schnell"
INPUT = {"prompt": "a fox", "count": 2, "styles": ["etching", "mosaic"]}


def step(name: Any = "image", input: Any = None, **others: Any) -> dict[str, Any]:  # noqa: A002  # the body's word
    model = {} if others.keys() & {"model", "version", "deployment"} else {"model": "meta/llama"}
    return {"name": name, **model, "input": {} if input is None else input, **others}


@st.composite
def graphs(draw: st.DrawFn, *, cyclic: bool) -> list[dict[str, Any]]:
    """Steps in any order; `cyclic` ones have a way from one step back to itself."""
    count = draw(st.integers(2, 7))
    needs: dict[int, set[int]] = {
        number: draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set() for number in range(count)
    }
    if cyclic:
        ring = draw(st.permutations(range(count)))[: draw(st.integers(2, count))]
        for one, other in zip(ring, [*ring[1:], ring[0]], strict=True):
            needs[one].add(other)
    steps = [
        step(f"s{number}", {f"n{each}": f"{{{{ steps.s{each}.output }}}}" for each in needs[number]})
        for number in range(count)
    ]
    return draw(st.permutations(steps))
