"""The op `fwd` of a build of FlashAttention-3: which arguments it may have, and what they mean.

All builds have this one op for everything, and differ in which arguments it has, in what order:
`flash-attn3` of kernels-community, and PyPI's fa3-fwd; `vllm-flash-attn3`, which has attention
sinks and no chunks; `sgl-flash-attn3`, which has both. So an argument is known by its name, and one
that nobody here knows is refused, for nobody can say what it would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

CALLED = "fwd"
# What calls of ours ask for.
ASKED = (
    *("q", "k", "v", "k_new", "v_new", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k"),
    *("max_seqlen_q", "max_seqlen_k", "softmax_scale", "is_causal"),
    *("window_size_left", "window_size_right", "softcap"),
)
# What none of them asks for, and what says so.
UNASKED: Mapping[str, Any] = {
    **dict.fromkeys(("q_v", "out", "cu_seqlens_k_new", "seqused_q", "page_table", "kv_batch_idx")),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "seqlens_rotary", "scheduler_metadata")),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale", "pack_gqa")),
    **dict.fromkeys(("s_aux", "s_aux_", "sinks", "cp_tot_seqused_k")),
    "attention_chunk": 0,
    "is_rotary_interleaved": False,
    "num_splits": 0,  # as many as the kernel finds best
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


def read_arguments(schema: str) -> list[str]:
    """The names of the arguments of a schema, as a library has it: `fwd(Tensor q, …) -> …`."""
    inner = schema.partition("(")[2].rpartition(") -> ")[0]
    named = [part.partition("=")[0].split() for part in inner.split(",")]
    return [words[-1] for words in named if words]


def list_unknown(arguments: Iterable[str]) -> list[str]:
    """Why nobody knows how to call an op with these arguments; none where it is known."""
    names = {*arguments}
    unknown = [f"has {name}" for name in sorted(names - {*ASKED, *UNASKED})]
    return unknown + [f"lacks {name}" for name in ASKED if name not in names]
