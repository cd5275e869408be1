"""What a process holds that generates: plain, attached, and with quantized weights for its own.

Each side is a process of its own, which loads the model as anybody does and then counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import StaticCache

import hubaoti
from benchmarks.children import ask_module
from benchmarks.figures import Figure, divide_pairs, make_figure
from benchmarks.memory import read_memory
from benchmarks.models import ModelCase, make_settings
from hubaoti.artifact.bundle import Bundle
from hubaoti.runtime.quantize import make_torchao_config
from hubaoti.settings import Settings

_RECIPE = "int8wo"
# 158 million parameters, of which 142 are in the blocks.
MEDIUM = ModelCase(
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=1024,
        intermediate_size=2816,
        max_position_embeddings=1024,
        num_attention_heads=16,
        num_hidden_layers=12,
        num_key_value_heads=8,
        vocab_size=8000,
    ),
    {
        "task": "generate",
        "quantize": _RECIPE,
        "dims": {"batch": (1, 4), "seq": (1, 128), "cache": (16, 512)},
    },
)
_SIDES = ("plain", "torchao", "attached")


def measure_quantized(
    scratch: Path, settings: Settings, case: ModelCase, processes: int
) -> Iterator[Figure]:
    """The memory of a model whose weights were replaced, and whether it answers as it should."""
    folder = scratch / "quantized"
    bundle = case.compile(folder, settings)
    model = case.make_model()
    model.save_pretrained(folder)
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    del model
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in _SIDES}
    for side in _SIDES * processes:
        found[side].append(ask_side(side, folder, bundle, settings))
    name = f"{_RECIPE}, {millions:.0f} M parameters"
    for what in ("held", "peak"):
        sides = {side: [each[what] for each in found[side]] for side in _SIDES}
        over = divide_pairs(sides["attached"], sides["plain"])
        title = f"{name}, memory {what}, attached"
        yield make_figure("attach", f"{title} to plain", over, "times", ("at most", 0.85))
        yield make_figure("attach", title, sides["attached"], "MB")
    words = {side: found[side][0]["words"] for side in _SIDES}
    same = _count_same(words["attached"], words["torchao"])
    title = f"{name}, greedy words that are torchao's eager"
    yield make_figure("attach", title, [same], "", ("at least", 1))
    for side in _SIDES[1:]:
        title = f"{name}, greedy words that are the plain model's, {side}"
        yield make_figure("attach", title, [_count_same(words[side], words["plain"])], "")


def _count_same(ours: list[int], theirs: list[int]) -> float:
    """The share of places with the same word."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def ask_side(side: str, folder: Path, bundle: Bundle, settings: Settings) -> dict[str, Any]:
    """What a new process says of itself that loads a model plain, quantized by torchao, attached.

    `held` and `peak` in MB, after it has generated; `attach_ms`, of a model of whose code another
    process has attached one before; `words`, which come next after random ones.
    """
    found: dict[str, Any] = ask_module("held_memory", side, folder, bundle.path, settings.home)
    return found


def _load_model(folder: Path) -> Any:
    """A model as anybody loads it; of random weights where the folder has none."""
    auto: Any = transformers.AutoModelForCausalLM
    if [*folder.glob("*.safetensors")]:
        return auto.from_pretrained(folder).eval()
    torch.manual_seed(0)
    return auto.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()


def _attach(model: Any, bundle: Bundle, home: Path) -> float:
    """Attach the graphs, the weights quantized where they are; the milliseconds that it takes."""
    settings, quantize = make_settings(home), bundle.manifest.build.quantization is not None
    start = time.perf_counter()
    hubaoti.attach(model, bundle, quantize=quantize, strict=True, settings=settings)
    return (time.perf_counter() - start) * 1000


def _choose_words(model: Any, bundle: Bundle) -> list[int]:
    """The likeliest next words after random ones, of as many as the graph serves at most."""
    torch.manual_seed(1)
    dims = bundle.manifest.build.dims
    rows, length = dims["batch"][1], dims["seq"][1]
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    words: list[int] = logits.argmax(-1).flatten().tolist()
    return words


def main() -> None:
    """Load, generate, and say what it took."""
    side, folder, path, home = sys.argv[1], *map(Path, sys.argv[2:])
    bundle, model, spent = Bundle.read(path), _load_model(folder), 0.0
    if side == "torchao":
        from torchao.quantization import quantize_

        quantize_(model.model.layers, make_torchao_config(_RECIPE, torch.device("cpu")))
    if side == "attached":
        spent = _attach(model, bundle, home)
    model.generate(
        torch.arange(3, 19)[None],
        max_new_tokens=24,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    held, peak = read_memory("VmRSS") / 1e6, read_memory("VmHWM") / 1e6
    answer = {"held": held, "peak": peak, "attach_ms": spent, "words": _choose_words(model, bundle)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
