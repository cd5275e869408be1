"""Extents: sizes that follow from dims."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.artifact.dim_expr import DimExpr

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = st.builds(
    str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + "0123456789_", max_size=6)
)
FACTORS = st.integers(-9999, 9999).filter(bool)
EXTENTS = st.builds(
    DimExpr.of, st.dictionaries(NAMES, FACTORS, min_size=1, max_size=4), st.integers(-9999, 9999)
)


@given(EXTENTS)
def test_an_extent_is_what_its_text_says(extent: DimExpr) -> None:
    assert DimExpr.parse(str(extent)) == extent


@given(EXTENTS, st.integers(1, 10_000))
def test_a_dim_is_found_again_from_a_size(extent: DimExpr, size: int) -> None:
    one = DimExpr.of(dict(extent.terms[:1]), extent.plus)
    assert one.solve(one.at({one.dims[0]: size})) == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("seq", 7), ("2*seq", 14), ("image+text", 12), ("cache+seq-1", 22), ("seq+seq", 14)],
)
def test_an_extent_has_the_size_its_text_says(text: str, size: int) -> None:
    assert DimExpr.parse(text).at({"seq": 7, "image": 8, "text": 4, "cache": 16}) == size


@pytest.mark.parametrize("text", ["", "7", "Seq", "seq*2", "seq//2", "2*", "seq + 1", "0*seq", "+"])
def test_what_is_no_extent_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no extent"):
        DimExpr.parse(text)


def test_a_size_between_two_multiples_has_no_dim() -> None:
    assert DimExpr.parse("8*seq").solve(12) is None
    assert DimExpr.parse("image+text").solve(12) is None


def test_only_a_dim_alone_is_plain() -> None:
    assert DimExpr.parse("seq").plain
    assert not any(DimExpr.parse(text).plain for text in ("2*seq", "seq+1", "image+text"))
