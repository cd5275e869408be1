"""Llamas with random weights: as wide as one of 8B on a GPU, narrow on a CPU; how they are asked.

They are called as their users call them: a prompt, padded on the left or not, and token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.cache_utils import StaticCache

from gpu.place import Place
from hubaoti.artifact.bundle import Bundle

BLOCKS, FEW = 32, 4  # of a model on a GPU, on a CPU
PROMPT, NEW, PLACES = 100, 24, 256  # tokens given, tokens one by one, places of the cache
MOST = 4096  # places of the longest cache that blocks are compiled for
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}
# How `generate` is asked, beside a number of tokens.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
    "disable_compile": True,
}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
NARROW |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512}


def choose_dtype(device: torch.device) -> str:
    """What is compiled; narrow models on a CPU are looked at closely."""
    return "bfloat16" if device.type == "cuda" else "float32"


def make_config(device: torch.device, blocks: int | None = None, narrow: bool = False) -> Any:
    """A Llama of some blocks, as many as a model of 8B has where it is not said."""
    config: Any = transformers.LlamaConfig
    wide = device.type == "cuda" and not narrow
    return config(
        **(WIDE if wide else NARROW),
        architectures=["LlamaForCausalLM"],
        attn_implementation="sdpa",
        dtype=choose_dtype(device),
        num_hidden_layers=blocks or (BLOCKS if wide else FEW),
    )


def compile_blocks(place: Place, name: str, config: Any, **words: Any) -> Bundle:
    """The blocks of a Llama over its cache, from the config alone; for single tokens too."""
    rows, most = (4, MOST) if place.is_gpu else (3, PLACES)
    words = {
        "task": "generate",
        "dims": {"batch": (1, rows), "seq": (1, most // 2), "cache": (16, most)},
        "buckets": [{"seq": (1, 1)}, {"seq": (2, most // 2)}],
        **words,
    }
    dtype = choose_dtype(place.device)
    return place.compile(name, place.write_config(name, config), dtype=dtype, **words)


def compile_model(place: Place, name: str = "model", **words: Any) -> Bundle:
    """The blocks of a model of 8B, or on a CPU of a narrow one."""
    return compile_blocks(place, name, make_config(place.device), **words)


def make_model(device: torch.device, config: Any) -> Any:
    """The model on a device, its matrices such that products keep their size, its norms off one."""
    dtype, auto = getattr(torch, choose_dtype(device)), transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with device, torch.no_grad():
        model: Any = auto.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        for tensor in model.parameters():
            matrix = tensor.dim() > 1
            tensor.normal_(0.0 if matrix else 1.0, tensor.shape[-1] ** -0.5 if matrix else 0.1)
    return model.eval().requires_grad_(False)


def make_prompt(model: Any, rows: int = 1, tokens: int = PROMPT) -> torch.Tensor:
    """Token ids of a prompt, on the model's device."""
    draw = torch.Generator().manual_seed(1000 * rows + tokens)
    ids = torch.randint(1, model.config.vocab_size, (rows, tokens), generator=draw)
    return ids.to(model.device)


def make_mask(ids: torch.Tensor, padded: bool) -> torch.Tensor | None:
    """Which tokens are text: all, or but a part of the last row, padded on the left."""
    if not padded:
        return None
    mask = torch.ones_like(ids)
    mask[-1, : ids.shape[1] // 4] = 0
    return mask


def make_cache(model: Any, places: int = PLACES) -> Any:
    """A static cache with nothing in it."""
    return StaticCache(config=model.config, max_cache_len=places)


def answer_prompt(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    new: int = NEW,
    places: int = PLACES,
) -> torch.Tensor:
    """The last hidden states of a prompt all but its last tokens, and of those one by one."""
    cache, found = make_cache(model, places), []
    numbers = _number(ids, mask)
    with torch.no_grad():
        for start, end in _cut(ids.shape[1], new):
            words: dict[str, Any] = {"past_key_values": cache}
            words["position_ids"] = numbers[:, start:end]
            if mask is not None:
                words["attention_mask"] = mask[:, :end]
            found.append(model.model(ids[:, start:end], **words).last_hidden_state)
    return torch.cat(found, 1)


def answer_at_once(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden states of whole texts, without a cache."""
    numbers = _number(ids, mask)
    with torch.no_grad():
        found = model.model(ids, attention_mask=mask, position_ids=numbers, use_cache=False)
    answer: torch.Tensor = found.last_hidden_state
    return answer


def _cut(tokens: int, new: int) -> list[tuple[int, int]]:
    """Where calls begin and end: a prompt, and one call for each of the last tokens."""
    first = tokens - new
    return [(0, first), *((place, place + 1) for place in range(first, tokens))]


def _number(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The places of tokens in their texts, as generate numbers them."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return (mask.cumsum(-1) - 1).clamp(min=0)


def bind_step(model: Any) -> Callable[[], Any]:
    """The last token of a prompt, again and again: the cache is set back to what was before it."""
    ids, cache = make_prompt(model), make_cache(model)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT - 1)
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=cache).logits

    return step
