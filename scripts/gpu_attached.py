"""The models that `gpu_attach` looks at: how they are compiled, made, attached, and asked.

The blocks of a Llama at its real width, with random weights, as many as a 7B model has; on a CPU a
few that are tiny.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import gpu_llama
from gpu_blocks import REPORT
from gpu_road import Failed, Finding, Road, Skipped

BLOCKS, FEW = 32, 4  # on a GPU, on a CPU
PROMPT, NEW, PLACES = 100, 24, 256  # tokens given, tokens generated, places of the cache
MODEL, INT8, FORK = "attach-model", "attach-int8wo", "attach-fork"


def settings_of(road: Road) -> Any:
    """The home that all checks share; nothing is fetched."""
    from hubaoti.settings import Settings

    return Settings(home=road.folder / "home", endpoint="http://127.0.0.1:9")


def config_of(road: Road, name: str) -> Any:
    """The Llama of a group of checks: as wide as a 7B model, or tiny where processes are looked at.

    The tiny one is compiled in the same dtype.
    """
    import transformers

    config = gpu_llama.config_of(road)
    config.num_hidden_layers = BLOCKS if road.cuda and name != FORK else FEW
    if name == FORK:
        words = {**config.to_dict(), **gpu_llama.NARROW}
        config = transformers.LlamaConfig(**words, attn_implementation="sdpa")
    return config


def compiled(road: Road, name: str, quantize: str | None = None) -> Finding:
    """The blocks, from the config alone: a graph for single tokens, and one for prompts."""
    from hubaoti import api
    from hubaoti.errors import HubaotiError

    if quantize and importlib.util.find_spec("torchao") is None:
        raise Skipped("torchao is not installed")
    folder, output = road.folder / "models" / name, road.folder / "bundles" / name
    config_of(road, name).save_pretrained(folder)
    output.parent.mkdir(exist_ok=True)
    try:
        bundle = api.compile(
            folder,
            output,
            task="generate",
            dims={"batch": (1, 4), "seq": (1, PLACES), "cache": (16, 4 * PLACES)},
            buckets=[{"seq": (1, 1)}, {"seq": (2, PLACES)}],
            dtype=gpu_llama.dtype_of(road),
            quantize=quantize,
            device=road.device,
            settings=settings_of(road),
        )
    except HubaotiError as why:
        report = output.with_name(f"{output.name}.report.txt")
        told = report.read_text()[-REPORT:] if report.is_file() else ""
        raise Failed(str(why), {"report": told, "hint": why.hint}) from why
    road.made[name, "bundle"] = bundle
    found = bundle.manifest
    facts = {"seconds": found.built.seconds, "bytes": found.size, "recipe": str(found.recipe)}
    return Finding(f"{found.built.seconds:.1f} s, {found.size / 1e6:.1f} MB", facts)


def model_on(road: Road, name: str, device: str) -> Any:
    """The model on a device, its matrices such that products keep their size, its norms off one."""
    import torch
    import transformers

    config, dtype = config_of(road, name), getattr(torch, gpu_llama.dtype_of(road))
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        for tensor in model.parameters():
            matrix = tensor.dim() > 1
            tensor.normal_(0.0 if matrix else 1.0, tensor.shape[-1] ** -0.5 if matrix else 0.1)
    return model.eval().requires_grad_(False)


def words_of(model: Any, rows: int = 1) -> Any:
    """Token ids of a prompt."""
    import torch

    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, model.config.vocab_size, (rows, PROMPT), generator=draw)
    return ids.to(model.device)


def told(model: Any, ids: Any) -> Any:
    """The logits of a prompt all but its last NEW tokens, and of those one by one."""
    import torch
    from transformers.cache_utils import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PLACES)
    with torch.no_grad():
        found = [model(ids[:, :-NEW], past_key_values=cache).logits]
        for at in range(ids.shape[1] - NEW, ids.shape[1]):
            found.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


def attach(road: Road, name: str, model: Any, **words: Any) -> Any:
    """The graphs of a group over a model; what no graph serves is an error."""
    import hubaoti

    bundle = road.made[name, "bundle"]
    return hubaoti.attach(model, bundle, strict=True, settings=settings_of(road), **words)


def one_step(model: Any) -> Callable[[], Any]:
    """The last token of a prompt, again and again: the cache is set back to what was before it."""
    import torch
    from transformers.cache_utils import StaticCache

    ids, cache = words_of(model), StaticCache(config=model.config, max_cache_len=PLACES)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)

    def step() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT - 1)
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=cache).logits

    return step


def of_regions(model: Any) -> list[Any]:
    """What is attached to a model."""
    from hubaoti.attachment.attach import find_regions

    return [*find_regions(model)]


def answering(regions: list[Any], call: Callable[[], Any]) -> Callable[[], Any]:
    """A call in which the blocks answer themselves."""

    def run() -> Any:
        for region in regions:
            region.inside.module.forward = region.eager
        try:
            return call()
        finally:
            for region in regions:
                region.inside.module.forward = region

    return run


def by_replay(model: Any, ids: Any) -> tuple[Any, Callable[[], None]]:
    """The logits of a prompt's last tokens, each by a replay; and the last replay again."""
    import torch
    from transformers.cache_utils import StaticCache

    start = ids.shape[1] - NEW
    cache = StaticCache(config=model.config, max_cache_len=PLACES)
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

        warmed(step, back)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = step()
        back()
        found = []
        for at in range(start, ids.shape[1]):
            token.copy_(ids[:, at : at + 1])
            place.fill_(at)
            graph.replay()
            found.append(answer.clone())

    def again() -> None:
        back()
        graph.replay()

    return torch.cat(found, 1), again


def warmed(step: Callable[[], Any], back: Callable[[], None]) -> None:
    """Take a step a few times, aside from the stream that is captured, as torch wants it."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
            back()
    torch.cuda.current_stream().wait_stream(aside)
