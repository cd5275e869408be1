"""Request: the grammar of dims, and words that the compiler does not know."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.compiler.request import (
    DTYPES,
    LAYOUTS,
    RECIPES,
    TASKS,
    CompileRequest,
    Range,
    make_bucket_ranges,
    make_ranges,
    parse_dims,
)
from hubaoti.errors import BadDim, BadRequest, UnknownTask
from hubaoti.runtime import recipes

names = st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True)
sizes = st.integers(0, 10**9 - 1)
steps = st.integers(1, 10**9 - 1)
bounds_of = st.tuples(sizes, sizes) | st.tuples(sizes, sizes, steps)


@given(st.dictionaries(names, bounds_of, max_size=4))
def test_parse_is_the_inverse_of_str(dims: dict[str, tuple[int, int]]) -> None:
    words = [f"{name}={Range(*bounds)}" for name, bounds in dims.items()]
    assert parse_dims(words) == make_ranges(dims) == make_ranges(words)


@given(st.lists(st.dictionaries(names, bounds_of, min_size=1, max_size=3), max_size=3))
def test_a_bucket_is_some_dims_between_commas(
    buckets: list[dict[str, tuple[int, int]]],
) -> None:
    words = [",".join(f"{n}={Range(*b)}" for n, b in bucket.items()) for bucket in buckets]
    expected = tuple(make_ranges(bucket) for bucket in buckets)
    assert make_bucket_ranges(words) == make_bucket_ranges(buckets) == expected


@given(st.text())
def test_any_other_text_is_a_bad_dim(text: str) -> None:
    try:
        parse_dims([text])
    except BadDim as error:
        assert error.hint
    else:
        name, _, bounds = text.partition("=")
        assert name.replace("_", "a").isalnum() and name[0].isalpha()
        assert all(part.isdecimal() for part in bounds.split(":"))


MALFORMED = ["", "seq", "seq=", "a=1", "a=1:", "a=-1:2", "=1:2", "1a=1:2", "a=1:2:", "a=1:2:3:4"]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_dim_is_refused_with_an_example(text: str) -> None:
    for parse in (parse_dims, make_bucket_ranges):
        with pytest.raises(BadDim, match="malformed") as caught:
            parse([text])
        assert "--dim" in caught.value.hint


@pytest.mark.parametrize(("text", "fixed"), [("seq=32", "seq=32:32"), ("seq", "seq=20:20")])
def test_a_dim_of_one_size_is_told_how_to_write_it(text: str, fixed: str) -> None:
    with pytest.raises(BadDim) as caught:
        parse_dims([text])
    assert caught.value.hint.endswith(f"--dim batch=1:32, or for one size alone as --dim {fixed}")
    assert parse_dims([fixed])


def test_a_dim_is_given_once() -> None:
    with pytest.raises(BadDim, match="twice"):
        parse_dims(["seq=1:2", "seq=1:2"])
    with pytest.raises(BadDim, match="twice"):
        make_bucket_ranges(["seq=1:2,seq=1:2"])


@given(names, st.integers(-5, 50), st.integers(-5, 50))
def test_a_dim_that_no_size_has_is_refused(name: str, low: int, high: int) -> None:
    if 1 <= low <= high:
        assert CompileRequest(dims={name: Range(low, high)}).dims[name] == Range(low, high)
    else:
        with pytest.raises(BadDim, match=f"{name} goes from"):
            CompileRequest(dims={name: Range(low, high)})


@given(st.integers(1, 60), st.integers(1, 60), st.integers(-2, 16))
def test_a_step_that_the_ends_are_no_multiples_of_is_refused(
    low: int, high: int, step: int
) -> None:
    low, high = min(low, high), max(low, high)
    if step > 0 and low % step == 0 and high % step == 0:
        assert CompileRequest(dims={"seq": Range(low, high, step)}).dims["seq"].step == step
    else:
        with pytest.raises(BadDim, match=f"in steps of {step}") as caught:
            CompileRequest(dims={"seq": Range(low, high, step)})
        assert "--dim seq=8:4096:8" in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"task": "sing"}, UnknownTask, TASKS),
        ({"task": ""}, UnknownTask, TASKS),
        ({"dtype": "float64"}, BadRequest, DTYPES),
        ({"device": "tpu"}, BadRequest, ("cpu", "cuda")),
        ({"device": "cuda:"}, BadRequest, ("cpu", "cuda")),
        ({"device": "cpu\n"}, BadRequest, ("cpu", "cuda")),
        ({"layout": "hub"}, BadRequest, LAYOUTS),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones(
    asked: dict[str, str], kind: type[BadRequest], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        CompileRequest(**asked)  # type: ignore[arg-type]
    assert all(word in caught.value.hint for word in words)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"task": "generate"}, "the task generate"),
        ({"buckets": ({"seq": Range(1, 1)},)}, "several graphs"),
        ({"quantize": "int8wo"}, "int8wo"),
    ],
)
def test_what_loaders_without_a_manifest_cannot_do_is_refused(
    asked: dict[str, Any], what: str
) -> None:
    assert CompileRequest(task="forward", layout="zerogpu").layout == "zerogpu"
    with pytest.raises(BadRequest, match=what) as caught:
        CompileRequest(**asked, layout="zerogpu")
    assert "leave it out" in caught.value.hint


def test_a_quantization_that_nobody_knows_is_refused_before_torch_is_asked() -> None:
    assert recipes.RECIPES == RECIPES
    with pytest.raises(BadRequest, match="unknown quantization: 'foo'"):
        CompileRequest(quantize="foo")


@pytest.mark.parametrize("sizes", [4, (1,), (1, 2, 3, 4), None])
def test_dims_that_are_no_ranges_are_refused(sizes: Any) -> None:
    with pytest.raises(BadDim, match="dims are") as caught:
        make_ranges({"batch": sizes})
    assert "(min, max)" in caught.value.hint
