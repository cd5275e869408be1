"""Extents: sizes that follow from dims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.extents import Extent

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = st.builds(
    str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + "0123456789_", max_size=6)
)
FACTORS = st.integers(-9999, 9999).filter(bool)
EXTENTS = st.builds(
    Extent.of, st.dictionaries(NAMES, FACTORS, min_size=1, max_size=4), st.integers(-9999, 9999)
)


@given(EXTENTS)
def test_an_extent_is_what_its_text_says(extent: Extent) -> None:
    assert Extent.parse(str(extent)) == extent


@given(EXTENTS, st.integers(1, 10_000))
def test_a_dim_is_found_again_from_a_size(extent: Extent, size: int) -> None:
    one = Extent.of(dict(extent.terms[:1]), extent.plus)
    assert one.solve(one.at({one.dims[0]: size})) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("seq", 7), ("2*seq", 14), ("image+text", 12), ("cache+seq-1", 22), ("seq+seq", 14)],
)
def test_an_extent_has_the_size_its_text_says(text: str, size: int) -> None:
    assert Extent.parse(text).at({"seq": 7, "image": 8, "text": 4, "cache": 16}) == size


@pytest.mark.parametrize("text", ["", "7", "Seq", "seq*2", "seq//2", "2*", "seq + 1", "0*seq", "+"])
def test_what_is_no_extent_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no extent"):
        Extent.parse(text)


def test_a_size_between_two_multiples_has_no_dim() -> None:
    assert Extent.parse("8*seq").solve(12) is None
    assert Extent.parse("image+text").solve(12) is None


def test_only_a_dim_alone_is_plain() -> None:
    assert Extent.parse("seq").plain
    assert not any(Extent.parse(text).plain for text in ("2*seq", "seq+1", "image+text"))
