"""What a mask says is read from all of it, and told as no simpler than it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.attachment.masks import (
    Says,
    find_step_mask,
    has_all_rows,
    read_mask,
    read_step_mask,
    show_unfilled,
)

LOWEST = torch.finfo(torch.float32).min


def make(rows: int, places: int, *paddings: int) -> torch.Tensor:
    """A mask of texts that begin behind so many places, whose last row sees all behind them."""
    row, place = torch.arange(rows)[:, None], torch.arange(places)
    causal = place <= row + places - rows
    return torch.stack([(causal & (place >= padding))[None] for padding in paddings])


@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    before=st.integers(0, 6),
    paddings=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    flipped=st.none() | st.integers(0),
)
def test_lengths_are_told_where_they_say_all_and_nowhere_else(
    rows: int, before: int, paddings: list[int], flipped: int | None
) -> None:
    places = rows + before
    mask = make(rows, places, *paddings)
    if flipped is not None:
        flat = mask.view(-1)
        flat[flipped % len(flat)] ^= True
    said = Says(int(read_mask(mask)))
    firsts = [int(places - text[0, -1].sum()) for text in mask]
    if torch.equal(mask, make(rows, places, *[0] * len(paddings))):
        assert said is Says.CAUSAL
    elif max(firsts) < places and torch.equal(mask, make(rows, places, *firsts)):
        assert said is Says.PADDED
    else:
        assert said is Says.ANYTHING


def test_numbers_that_are_added_say_what_they_hide_or_something_else() -> None:
    seen = make(3, 5, 0, 0)
    for hidden in (LOWEST, float("-inf")):
        assert int(read_mask(torch.zeros(seen.shape).masked_fill(~seen, hidden))) == Says.CAUSAL
    assert int(read_mask(torch.zeros(seen.shape).masked_fill(~seen, -9.0))) == Says.ANYTHING
    padded = make(3, 5, 0, 2)
    added = torch.zeros(padded.shape).masked_fill(~padded, LOWEST)
    assert int(read_mask(added)) == Says.ANYTHING
    assert int(read_mask(padded.long())) == Says.PADDED


def test_a_mask_of_two_axes_has_one_row_for_each_text() -> None:
    assert int(read_mask(torch.ones(2, 5, dtype=torch.long))) == Says.CAUSAL
    assert int(read_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))) == Says.ANYTHING


@pytest.mark.parametrize(
    ("shape", "whole"), [((2, 1, 4, 9), True), ((1, 1, 4, 12), True), ((2, 1, 1, 9), False)]
)
def test_a_mask_that_is_made_longer_has_not_all_rows(shape: tuple[int, ...], whole: bool) -> None:
    assert has_all_rows(torch.ones(shape), (2, 1, 4, 9)) is whole
    assert has_all_rows(None, (2, 1, 4, 9))


@settings(deadline=None)
@given(
    places=st.integers(1, 8),
    data=st.data(),
    flipped=st.none() | st.integers(0),
)
def test_a_steps_mask_is_told_by_lengths_where_it_ends_at_what_is_written(
    places: int, data: st.DataObject, flipped: int | None
) -> None:
    count = data.draw(st.integers(0, places - 1))
    firsts = data.draw(st.lists(st.integers(0, places), min_size=1, max_size=3))
    place = torch.arange(places)
    mask = torch.stack([(place >= first) & (place <= count) for first in firsts])[:, None, None]
    if flipped is not None:
        flat = mask.view(-1)
        flat[flipped % len(flat)] ^= True
    rows = [row[0, 0].nonzero().flatten().tolist() for row in mask]
    runs = all(row and row == [*range(row[0], count + 1)] for row in rows)
    counts = [torch.tensor(count), torch.tensor(count)]
    said = read_step_mask(mask, counts)
    assert said is (Says.PADDED if runs else Says.ANYTHING)
    other = torch.tensor(count - 1)
    assert read_step_mask(mask, [counts[0], other]) is Says.ANYTHING
    if runs:
        hidden = (~show_unfilled(mask, counts[0])).sum(-1).flatten().tolist()
        assert hidden == [row[0] for row in rows]


def test_which_of_a_steps_tensors_its_mask_is_has_to_be_known() -> None:
    whole, ids = torch.ones(2, 1, 1, 8, dtype=torch.bool), torch.ones(2, 1, dtype=torch.long)
    assert find_step_mask({("ids",): ids, ("mask", "full"): whole}, 2, 8) == ("mask", "full")
    assert find_step_mask({("a",): whole, ("b",): whole}, 2, 8) is None
    for other in (whole.int(), whole[:1], whole[..., :7], whole.expand(2, 2, 1, 8)):
        assert find_step_mask({("mask",): other}, 2, 8) is None
