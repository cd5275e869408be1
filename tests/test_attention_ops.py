"""Ops of attention: what they say of themselves, and the answers that kernels are held to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hubaoti.runtime.attention_ops import DECODE, FORWARD, NAMESPACE, REFERENCES, SCHEMAS, VARLEN

SCALE = 0.3
PLAIN: dict[str, Any] = {"causal": False, "window_left": -1, "window_right": -1, "softcap": 0.0}


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **words: Any) -> torch.Tensor:
    return REFERENCES[FORWARD](q, k, v, SCALE, *(PLAIN | words).values())


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same by torch, over (batch, rows, heads, width)."""
    laid = (each.transpose(1, 2) for each in (q, k, v))
    return scaled_dot_product_attention(*laid, mask, scale=SCALE, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_op_is_there_until_a_kernel_is(name: str) -> None:
    tensors = [torch.zeros(1, 2, 1, 8)] * 3
    rest = {
        VARLEN: [torch.tensor([0, 1])] * 2 + [1, 1],
        DECODE: tensors[:2] + [torch.ones(1), None],
    }
    with pytest.raises(NotImplementedError, match=f"{NAMESPACE}::{name}"):
        getattr(torch.ops.hubaoti, name)(*tensors, *rest.get(name, []), 1.0, False, -1, -1, 0.0)


def test_graphs_that_were_built_call_the_ops_as_they_are() -> None:
    """A library for a GPU puts so many arguments there, and nothing at run time counts them: an op
    that takes others has to have another name."""
    rule = "float scale, bool causal, int window_left, int window_right, float softcap"
    read, lengths = "Tensor q, Tensor k, Tensor v", "SymInt max_q, SymInt max_k"
    cache = "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new"
    assert {name: str(getattr(torch.ops.hubaoti, name).default._schema) for name in SCHEMAS} == {
        "fa3_fwd": f"hubaoti::fa3_fwd({read}, {rule}) -> Tensor",
        "fa3_varlen": f"hubaoti::fa3_varlen({read}, Tensor cu_q, Tensor cu_k, {lengths}, {rule})"
        " -> Tensor",
        "fa3_decode": f"hubaoti::fa3_decode({cache}, Tensor used, Tensor? leftpad, {rule})"
        " -> Tensor",
    }


def test_only_the_caches_are_said_to_be_written() -> None:
    schemas = {name: getattr(torch.ops.hubaoti, name).default._schema for name in SCHEMAS}
    written = {
        name: [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        for name, schema in schemas.items()
    }
    assert written == {FORWARD: [], VARLEN: [], DECODE: ["k_cache", "v_cache"]}
    assert not any(each.alias_info for schema in schemas.values() for each in schema.returns)


@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    keys=st.integers(1, 9),
    causal=st.booleans(),
    left=st.integers(-1, 4),
    right=st.integers(-1, 4),
    group=st.sampled_from([1, 2, 4]),
)
def test_windows_and_causal_rows_are_seen_from_the_last_key(
    rows: int, keys: int, causal: bool, left: int, right: int, group: int
) -> None:
    q, k, v = make(2, rows, 4, 8), make(2, keys, 4 // group, 8), make(2, keys, 4 // group, 16)
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    for row in range(rows):
        last = row + keys - rows
        end = last if causal else keys if right < 0 else last + right
        for key in range(0 if left < 0 else max(0, last - left), min(keys, end + 1)):
            seen[row, key] = True
    answer = forward(q, k, v, causal=causal, window_left=left, window_right=right)
    expected = attend(q, k, v, seen)
    expected[:, ~seen.any(1)] = 0.0
    torch.testing.assert_close(answer, expected)
    assert answer.is_contiguous()


def test_without_words_it_is_plain_attention_and_a_cap_bends_its_scores() -> None:
    q, k, v = make(2, 5, 4, 8), make(2, 7, 2, 8), make(2, 7, 2, 8)
    torch.testing.assert_close(forward(q, k, v), attend(q, k, v))
    torch.testing.assert_close(forward(q, k, v, softcap=1e4), attend(q, k, v))
    scores = torch.einsum("bihw,bjhw->bhij", q, k.repeat_interleave(2, 2)) * SCALE
    weights = (0.5 * torch.tanh(scores / 0.5)).softmax(-1)
    capped = torch.einsum("bhij,bjhw->bihw", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(forward(q, k, v, softcap=0.5), capped)


def test_sequences_of_one_axis_do_not_see_each_other() -> None:
    q, k, v = make(7, 4, 8), make(9, 2, 8), make(9, 2, 8)
    rule = (SCALE, True, -1, -1, 0.0)
    starts = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 5, 9])
    answer = REFERENCES[VARLEN](q, k, v, *starts, 4, 4, *rule)
    parts = [
        forward(q[None, a:b], k[None, c:d], v[None, c:d], causal=True)
        for a, b, c, d in ((0, 3, 0, 4), (3, 7, 5, 9))
    ]
    torch.testing.assert_close(answer, torch.cat(parts, 1)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_new_keys_are_put_where_the_used_ones_end_and_padding_is_not_seen(transposed: bool) -> None:
    places, new, used, padding = 12, 3, [4, 7], [0, 2]
    caches = [
        torch.full((2, 2, places, 8) if transposed else (2, places, 2, 8), float("nan"))
        for _ in range(2)
    ]
    if transposed:
        caches = [each.transpose(1, 2) for each in caches]
    q, k, v = make(2, new, 4, 8), make(2, new, 2, 8), make(2, new, 2, 8, seed=1)
    kept = [make(2, places, 2, 8, seed=seed) for seed in (2, 3)]
    for cache, old in zip(caches, kept, strict=True):
        for index, count in enumerate(used):
            cache[index, :count] = old[index, :count]
    lengths = [torch.tensor(each, dtype=torch.int32) for each in (used, padding)]
    answer = REFERENCES[DECODE](
        q, *caches, k, v, *lengths, SCALE, *(PLAIN | {"causal": True}).values()
    )
    for index, (count, first) in enumerate(zip(used, padding, strict=True)):
        keys, values = (
            torch.cat([old[index, :count], come[index]])
            for old, come in zip(kept, (k, v), strict=True)
        )
        assert torch.equal(caches[0][index, : count + new], keys)
        assert torch.equal(caches[1][index, : count + new], values)
        assert caches[0][index, count + new :].isnan().all()
        alone = forward(q[index, None], keys[None, first:], values[None, first:], causal=True)
        torch.testing.assert_close(answer[index], alone[0])


def test_the_rows_of_padding_itself_answer_zeros() -> None:
    q, k, v = make(1, 4, 2, 8), make(1, 4, 2, 8), make(1, 4, 2, 8)
    caches = torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8)
    lengths = torch.tensor([0]), torch.tensor([2])
    answer = REFERENCES[DECODE](q, *caches, k, v, *lengths, SCALE, True, -1, -1, 0.0)
    assert not answer[:, :2].any()
    torch.testing.assert_close(answer[:, 2:], forward(q[:, 2:], k[:, 2:], v[:, 2:], causal=True))


def test_an_answer_is_of_the_querys_dtype() -> None:
    half = [make(1, 5, 2, 8).bfloat16() for _ in range(3)]
    answer = forward(*half)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, forward(*(each.float() for each in half)).bfloat16())


def test_what_a_graph_is_told_of_an_answer_is_its_shape() -> None:
    with torch.device("meta"):
        q, k, v = torch.empty(2, 5, 4, 8), torch.empty(2, 7, 2, 8), torch.empty(2, 7, 2, 16)
    answer = torch.ops.hubaoti.fa3_fwd(q, k, v, 1.0, False, -1, -1, 0.0)
    assert (answer.shape, answer.is_contiguous()) == ((2, 5, 4, 16), True)
