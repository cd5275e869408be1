"""Models whose blocks are attached: how they are compiled, made, attached, and asked.

The blocks of a Llama at its real width, with random weights, as many as a 7B model has; on a CPU a
few that are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import StaticCache

from gpu import llama
from gpu.blocks import compile_with_report
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import find_regions
from hubaoti.settings import Settings

BLOCKS, FEW = 32, 4  # on a GPU, on a CPU
PROMPT, NEW, PLACES = 100, 24, 256  # tokens given, tokens generated, places of the cache


def make_config(device: torch.device, tiny: bool = False) -> Any:
    """The Llama of a group of checks: as wide as a 7B model, or tiny where processes are looked at.

    The tiny one is compiled in the same dtype.
    """
    config = llama.make_config(device)
    config.num_hidden_layers = BLOCKS if device.type == "cuda" and not tiny else FEW
    if tiny:
        sizes: dict[str, Any] = {**config.to_dict(), **llama.NARROW}
        config = transformers.LlamaConfig(**sizes, attn_implementation="sdpa")  # type: ignore[call-arg]
    return config


def compile_blocks(
    device: torch.device, config: Any, folder: Path, settings: Settings, quantize: str | None = None
) -> Bundle:
    """The blocks, from the config alone: a graph for single tokens, and one for prompts."""
    config.save_pretrained(folder / "models" / "model")
    return compile_with_report(
        folder / "models" / "model",
        folder / "bundles" / "model",
        task="generate",
        dims={"batch": (1, 4), "seq": (1, PLACES), "cache": (16, 4 * PLACES)},
        buckets=[{"seq": (1, 1)}, {"seq": (2, PLACES)}],
        dtype=llama.choose_dtype(device),
        quantize=quantize,
        device=str(device),
        settings=settings,
    )


def describe(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    """What a bundle took, in words and as facts."""
    found = bundle.manifest
    facts = {"seconds": found.built.seconds, "bytes": found.size, "recipe": str(found.recipe)}
    return f"{found.built.seconds:.1f} s, {found.size / 1e6:.1f} MB", facts


def make_model(device: torch.device, config: Any) -> Any:
    """The model on a device, its matrices such that products keep their size, its norms off one."""
    dtype, auto = getattr(torch, llama.choose_dtype(device)), transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with device, torch.no_grad():
        model: Any = auto.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        for tensor in model.parameters():
            matrix = tensor.dim() > 1
            tensor.normal_(0.0 if matrix else 1.0, tensor.shape[-1] ** -0.5 if matrix else 0.1)
    return model.eval().requires_grad_(False)


def make_prompt(model: Any, rows: int = 1) -> Any:
    """Token ids of a prompt."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, model.config.vocab_size, (rows, PROMPT), generator=draw)
    return ids.to(model.device)


def answer_prompt(model: Any, ids: Any) -> Any:
    """The logits of a prompt all but its last NEW tokens, and of those one by one."""
    cache = StaticCache(config=model.config, max_cache_len=PLACES)
    with torch.no_grad():
        found = [model(ids[:, :-NEW], past_key_values=cache).logits]
        for index in range(ids.shape[1] - NEW, ids.shape[1]):
            found.append(model(ids[:, index : index + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


def bind_step(model: Any) -> Callable[[], Any]:
    """The last token of a prompt, again and again: the cache is set back to what was before it."""
    ids = make_prompt(model)
    cache: Any = StaticCache(config=model.config, max_cache_len=PLACES)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT - 1)
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=cache).logits

    return step


def bypass_graphs(model: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call in which the blocks of an attached model answer themselves."""
    regions = [*find_regions(model)]

    def run() -> Any:
        for region in regions:
            region.inside.module.forward = region.eager
        try:
            return call()
        finally:
            for region in regions:
                region.inside.module.forward = region

    return run


def capture_step(model: Any, ids: Any) -> tuple[Any, Callable[[], None]]:
    """The logits of a prompt's last tokens, each by a replay; and the last replay again."""
    start = ids.shape[1] - NEW
    cache: Any = StaticCache(config=model.config, max_cache_len=PLACES)
    with torch.device(model.device), torch.no_grad():
        model(ids[:, :start], past_key_values=cache)
        token, place = ids[:, start : start + 1].clone(), torch.full((1, 1), start)
        seen = torch.zeros(1, 1, 1, PLACES, dtype=torch.bool)

        def step() -> Any:
            seen.copy_((torch.arange(PLACES) <= place)[None, None])
            words = {"attention_mask": seen, "position_ids": place, "past_key_values": cache}
            return model(token, **words).logits

        def back() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(start)

        warm_up(step, back)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = step()
        back()
        found = []
        for index in range(start, ids.shape[1]):
            token.copy_(ids[:, index : index + 1])
            place.fill_(index)
            graph.replay()
            found.append(answer.clone())

    def again() -> None:
        back()
        graph.replay()

    return torch.cat(found, 1), again


def warm_up(step: Callable[[], Any], back: Callable[[], None]) -> None:
    """Take a step a few times, aside from the stream that is captured, as torch wants it."""
    stream: Any = torch.cuda.Stream
    aside = stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
            back()
    torch.cuda.current_stream().wait_stream(aside)
