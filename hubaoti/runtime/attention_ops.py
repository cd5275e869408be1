"""FlashAttention-3 as ops of our own, which graphs call whatever the kernel behind them is called.

A kernel's own ops are named after one build of it, and do not say that they write into a cache.
These stay as they are, and say what they write. None of them is implemented here: what is loaded
for a host is registered as their implementation, and without it they are missing.

Tensors are (batch, rows, heads, width), of keys and values with as many heads as divide the
query's; in `fa3_varlen` the rows of all sequences are one axis, (rows, heads, width), and sequence
i has those from `cu[i]` to `cu[i + 1]`. Of caches any strides are taken whose last one is 1.

`causal` lets the last row see the last key, and each row above it one key less. Seen from the key
that is a row's last then, a row sees `window_left` keys before it and `window_right` after it; -1
is all of them. `softcap` c makes c*tanh(x/c) of each score x; 0.0 is none. A row that sees no key
answers zeros. An answer is contiguous, of the query's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

FA3 = "fa3"  # as recipes, and lists of kernels, have it
NAMESPACE = "hubaoti"
FORWARD, VARLEN, DECODE = "fa3_fwd", "fa3_varlen", "fa3_decode"

_RULE = "float scale, bool causal, int window_left, int window_right, float softcap"
# `fa3_decode` puts the new keys and values at the places from `used` on (int32, one for each of the
# batch), then attends to all from `leftpad` on (int32, or none) that are used by now.
SCHEMAS: Mapping[str, str] = {
    FORWARD: f"(Tensor q, Tensor k, Tensor v, {_RULE}) -> Tensor",
    VARLEN: "(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, "
    f"{_RULE}) -> Tensor",
    DECODE: "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k_new, Tensor v_new, "
    f"Tensor used, Tensor? leftpad, {_RULE}) -> Tensor",
}

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _make_answer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    """An answer that nobody computed: a row of a value's width for each head of each row."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(f"{_name}{_schema}")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _make_answer, lib=_LIBRARY)


def call_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    """`fa3_fwd` without windows and cap; by default scores are divided by the root of the width."""
    chosen = q.shape[-1] ** -0.5 if scale is None else scale
    answer: torch.Tensor = torch.ops.hubaoti.fa3_fwd(q, k, v, chosen, causal, -1, -1, 0.0)
    return answer


def call_decode(
    tensors: Sequence[torch.Tensor],
    used: torch.Tensor,
    leftpad: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`fa3_decode`, causal, without windows and cap, of its first five tensors.

    The scale is as `call_forward` has it.
    """
    chosen = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    answer: torch.Tensor = torch.ops.hubaoti.fa3_decode(
        *tensors, used, leftpad, chosen, True, -1, -1, 0.0
    )
    return answer


@dataclass(frozen=True, slots=True)
class _Rule:
    """What each row sees, and how its scores become weights; as the ops have it."""

    scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of one sequence, (rows, heads, width), computed in float32."""
        keys, values = (
            each.float().repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v)
        )
        scores = torch.einsum("ihw,jhw->hij", q.float(), keys) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = ~self._find_seen(q.shape[0], k.shape[0])
        # Twice: of a row that sees nothing the softmax is no number.
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
        return torch.einsum("hij,jhw->ihw", weights, values).to(q.dtype)

    def _find_seen(self, rows: int, keys: int) -> torch.Tensor:
        """Which keys each row sees, (rows, keys)."""
        last = torch.arange(rows)[:, None] + keys - rows
        place = torch.arange(keys)
        seen = torch.ones(rows, keys, dtype=torch.bool)
        right = 0 if self.causal else self.window_right
        if right >= 0:
            seen &= place <= last + right
        if self.window_left >= 0:
            seen &= place >= last - self.window_left
        return seen


def _compute_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rule: Any) -> torch.Tensor:
    """`fa3_fwd`."""
    attend = _Rule(*rule).attend
    answers = [attend(*each) for each in zip(q, k, v, strict=True)]
    return torch.stack(answers) if answers else _make_answer(q, k, v)


def _compute_varlen(  # noqa: PLR0913 - the op's own
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *rule: Any,
) -> torch.Tensor:
    """`fa3_varlen`; the longest lengths say nothing that the others do not."""
    answer, attend = torch.zeros_like(_make_answer(q, k, v)), _Rule(*rule).attend
    bounds = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for (start, end), (first, last) in bounds:
        answer[start:end] = attend(q[start:end], k[first:last], v[first:last])
    return answer


def _compute_decode(  # noqa: PLR0913 - the op's own
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    used: torch.Tensor,
    leftpad: torch.Tensor | None,
    *rule: Any,
) -> torch.Tensor:
    """`fa3_decode`; what lies in places that are not used is not looked at."""
    answer, attend = _make_answer(q, k_cache, v_cache), _Rule(*rule).attend
    padded = [0] * q.shape[0] if leftpad is None else leftpad.tolist()
    for index, (before, first) in enumerate(zip(used.tolist(), padded, strict=True)):
        end = before + k_new.shape[1]
        k_cache[index, before:end], v_cache[index, before:end] = k_new[index], v_new[index]
        keys, values = k_cache[index, first:end], v_cache[index, first:end]
        answer[index] = attend(q[index], keys, values)
    return answer


# What each op answers, by its name, in plain torch on the CPU: what kernels are compared with.
REFERENCES: Mapping[str, Callable[..., torch.Tensor]] = {
    FORWARD: _compute_forward,
    VARLEN: _compute_varlen,
    DECODE: _compute_decode,
}


@contextmanager
def answer_by_reference(device: str) -> Iterator[None]:
    """While it lasts, plain torch answers the ops in this process, on a kind of device.

    It is for looking at graphs where no kernel is. Private, checked on torch 2.11 to 2.15:
    `_scoped_library`, which takes back what a library has registered.
    """
    with torch.library._scoped_library(NAMESPACE, "IMPL") as library:
        for name, compute in REFERENCES.items():
            library.impl(name, compute, device.upper())
        yield
