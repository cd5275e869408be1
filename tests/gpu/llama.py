"""A decoder block: its weights, its inputs, and how eager and a graph run it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import StaticCache
from transformers.models.llama import modeling_llama

from hubaoti.program.silence import silence_torchao
from hubaoti.runtime.quantize import make_torchao_config

WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
NARROW |= {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512}

Known = dict[str, Any]  # tensors by the names that a graph's inputs have


@dataclass(frozen=True, slots=True)
class Size:
    """A call: rows and new tokens; of a cache its places, and how many are filled afterwards."""

    batch: int
    seq: int
    filled: int = 0
    cache: int = 0

    def __str__(self) -> str:
        held = f" at {self.filled} of {self.cache}" if self.cache else ""
        return f"{self.batch}x{self.seq}{held}"


@dataclass(frozen=True, slots=True)
class Llama:
    """One block with random weights: in the dtype that is compiled, and the same in float32."""

    config: Any
    rotary: Any
    block: Any
    exact: Any

    @property
    def device(self) -> Any:
        """Where its weights are."""
        return self.block.input_layernorm.weight.device


def choose_dtype(device: torch.device) -> str:
    """What is compiled; tiny shapes on a CPU are looked at closely."""
    return "bfloat16" if device.type == "cuda" else "float32"


def make_config(device: torch.device) -> Any:
    """A Llama of two such blocks."""
    config: Any = transformers.LlamaConfig
    return config(
        **(WIDE if device.type == "cuda" else NARROW),
        architectures=["LlamaForCausalLM"],
        attn_implementation="sdpa",
        dtype=choose_dtype(device),
        num_hidden_layers=2,
    )


def write_config(device: torch.device, folder: Path) -> Path:
    """A model's folder that has a config and nothing else."""
    if not (folder / "config.json").is_file():
        make_config(device).save_pretrained(folder)
    return folder


def make_llama(device: torch.device) -> Llama:
    """The block, its matrices such that products keep their size, its norms off one."""
    config = make_config(device)
    torch.manual_seed(0)
    with device, torch.no_grad():
        block = modeling_llama.LlamaDecoderLayer(config, 0)
        rotary = modeling_llama.LlamaRotaryEmbedding(config)
        for tensor in block.parameters():
            matrix = tensor.dim() > 1
            tensor.normal_(0.0 if matrix else 1.0, tensor.shape[-1] ** -0.5 if matrix else 0.1)
    block = block.to(getattr(torch, choose_dtype(device))).eval().requires_grad_(False)
    return Llama(config, rotary, block, copy.deepcopy(block).float())


def quantize_block(block: Any, recipe: str) -> Any:
    """A copy of a block as torchao itself quantizes it, for eager and `torch.compile`."""
    from torchao.quantization import quantize_

    found = copy.deepcopy(block)
    with silence_torchao(), torch.no_grad():
        quantize_(found, make_torchao_config(recipe, block.input_layernorm.weight.device))
    return found


def round_weights(peer: Any, exact: Any) -> Any:
    """A float32 block whose matrices are those of a quantized one, as they were rounded."""
    found = copy.deepcopy(exact)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if weight.dim() > 1:
                parts = peer.get_parameter(name)  # its own `dequantize` rounds to the dtype
                weight.copy_(parts.qdata.float() * parts.scale.float())
    return found


def make_inputs(of: Llama, size: Size) -> Known:
    """What a call of this size brings: a causal mask whose last row is padded, tables, a cache.

    `whole_mask` is over all places of the cache, which is what eager looks at.
    """
    config, dtype = of.config, of.block.input_layernorm.weight.dtype
    filled, places = size.filled or size.seq, size.cache or size.seq
    with of.device:
        torch.manual_seed(size.batch * 1000 + size.seq)
        hidden = torch.randn(size.batch, size.seq, config.hidden_size).to(dtype)
        position = torch.arange(filled - size.seq, filled)
        place = torch.arange(places)
        seen = (place <= position[:, None]).repeat(size.batch, 1, 1, 1)
        if size.batch > 1:
            seen[-1] &= (place >= filled // 4) | (place == position[:, None])
        ids = position.repeat(size.batch, 1)
        cos, sin = of.rotary(hidden, ids)
        known = {"hidden_states": hidden, "position_ids": ids, "position": position}
        known |= {"position_embeddings_0": cos, "position_embeddings_1": sin, "whole_mask": seen}
        known["attention_mask"] = seen[..., :filled].contiguous()
        if size.cache:
            width = config.hidden_size // config.num_attention_heads
            shape = (size.batch, config.num_key_value_heads, size.cache, width)
            known |= {name: torch.randn(shape).to(dtype) for name in ("keys", "values")}
    return known


def widen(known: Known) -> Known:
    """The very same numbers, for float32 eager."""
    return {n: each.float() if each.is_floating_point() else each for n, each in known.items()}


def fill_cache(of: Llama, known: Known) -> Any:
    """A static cache of transformers with a call's keys and values; None where it has none."""
    if "keys" not in known:
        return None
    cache = StaticCache(config=of.config, max_cache_len=known["keys"].shape[2])
    layer: Any = cache.layers[0]
    layer.lazy_initialization(known["keys"][:, :, :1], known["values"][:, :, :1])
    layer.keys.copy_(known["keys"])
    layer.values.copy_(known["values"])
    return cache


def bind_eager(block: Any, known: Known, cache: Any) -> Callable[[], Any]:
    """A call of a block as transformers makes it, over a static cache where there is one."""
    tables = known["position_embeddings_0"], known["position_embeddings_1"]
    named = {"position_ids": known["position_ids"], "position_embeddings": tables}
    if cache is None:
        return lambda: block(known["hidden_states"], attention_mask=known["whole_mask"], **named)
    before, length = int(known["position"][0]), cache.layers[0]

    def step() -> Any:
        length.cumulative_length.fill_(before)  # else the cache would be full after a few calls
        return block(
            known["hidden_states"],
            attention_mask=known["whole_mask"],
            past_key_values=cache,
            use_cache=True,
            **named,
        )

    return step


def bind_graph(graph: Any, known: Known) -> Callable[[], Any]:
    """The same call of a compiled graph, which writes into the call's own keys and values."""
    inputs = [known[item.name] for item in graph.entry.inputs]
    if "keys" not in known:
        return lambda: graph(*inputs)[0]
    places, position = known["position"].clone(), known["position"]

    def step() -> Any:
        position.copy_(places)  # one launch a step, as the other side has one for its length
        return graph(*inputs)[0]

    return step


def answer_eagerly(of: Llama, block: Any, known: Known) -> Known:
    """What eager answers, and what it wrote into its cache."""
    cache = fill_cache(of, known)
    with torch.no_grad():
        found = {"output": bind_eager(block, known, cache)()}
    layer = cache.layers[0] if cache else None
    return found | (select_written(known, layer.keys, layer.values) if layer else {})


def select_written(known: Mapping[str, Any], keys: Any, values: Any) -> Known:
    """The new entries of a cache."""
    pairs = {"keys": keys, "values": values}
    return {name: each.index_select(2, known["position"]) for name, each in pairs.items()}


def find_other_writes(known: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Which of keys and values changed at places that a call had nothing to write to."""
    position, found = known["position"], []
    for name in ("keys", "values"):
        kept = after[name].clone()
        kept.index_copy_(2, position, known[name].index_select(2, position))
        if not torch.equal(kept, known[name]):
            found.append(name)
    return found
