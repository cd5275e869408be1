"""Request: the grammar of dims, and words that the compiler does not know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.compiler.request import DIMS, DTYPES, TASKS, Range, Request, parse_dims, ranges
from hubaoti.errors import BadDim, BadRequest, UnknownTask

names = st.from_regex(r"[a-z_]+", fullmatch=True)
sizes = st.integers(0, 10**9 - 1)


@given(st.dictionaries(names, st.tuples(sizes, sizes), max_size=4))
def test_parse_is_the_inverse_of_str(dims: dict[str, tuple[int, int]]) -> None:
    words = [f"{name}={Range(*bounds)}" for name, bounds in dims.items()]
    assert parse_dims(words) == ranges(dims) == ranges(words)


@given(st.text())
def test_any_other_text_is_a_bad_dim(text: str) -> None:
    try:
        parse_dims([text])
    except BadDim as error:
        assert error.hint
    else:
        name, _, bounds = text.partition("=")
        assert name.replace("_", "a").isalpha()
        assert all(part.isdecimal() for part in bounds.split(":"))


@pytest.mark.parametrize("text", ["", "seq", "seq=", "a=1", "a=1:", "a=-1:2", "=1:2", "a=1:2:3"])
def test_a_malformed_dim_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadDim, match="malformed") as caught:
        parse_dims([text])
    assert "--dim" in caught.value.hint


def test_a_dim_is_given_once() -> None:
    with pytest.raises(BadDim, match="twice"):
        parse_dims(["seq=1:2", "seq=1:2"])


@given(st.sampled_from(DIMS), st.integers(-5, 50), st.integers(-5, 50))
def test_a_dim_that_no_size_has_is_refused(name: str, low: int, high: int) -> None:
    if 1 <= low <= high:
        assert Request(dims={name: Range(low, high)}).dims[name] == Range(low, high)
    else:
        with pytest.raises(BadDim, match=f"{name} goes from"):
            Request(dims={name: Range(low, high)})


def test_a_dim_that_no_model_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadDim, match="depth") as caught:
        Request(dims={"depth": Range(1, 2)})
    assert all(name in caught.value.hint for name in DIMS)


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"task": "sing"}, UnknownTask, TASKS),
        ({"task": ""}, UnknownTask, TASKS),
        ({"dtype": "float64"}, BadRequest, DTYPES),
        ({"device": "tpu"}, BadRequest, ("cpu", "cuda")),
        ({"device": "cuda:"}, BadRequest, ("cpu", "cuda")),
        ({"device": "cpu\n"}, BadRequest, ("cpu", "cuda")),
    ],
)
def test_an_unknown_word_is_refused_with_the_known_ones(
    asked: dict[str, str], kind: type[BadRequest], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        Request(**asked)  # type: ignore[arg-type]
    assert all(word in caught.value.hint for word in words)
