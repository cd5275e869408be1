"""What a process holds that generates: plain, and with quantized weights in the place of its own.

Each side is a process of its own, which loads the model as anybody does and then counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from decoding import kilobytes
from figures import Figure, figure, ratios
from recording import shaken
from transformers.cache_utils import StaticCache

import hubaoti
from hubaoti import api
from hubaoti.bundle import Bundle
from hubaoti.settings import Settings

RECIPE = "int8wo"
# 158 million parameters, of which 142 are in the blocks.
MEDIUM: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "num_key_value_heads": 8,
    "vocab_size": 8000,
}
SIDES = ("plain", "torchao", "attached")


def bench_quantized(settings: Settings, scratch: Path) -> Iterator[Figure]:
    """The memory of a model whose weights were replaced, and whether it answers as it should."""
    folder = scratch / "quantized-model"
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **MEDIUM)
    model = shaken(transformers.LlamaForCausalLM(config))
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    del model
    bundle = api.compile(folder, scratch / "quantized-bundle", task="generate", quantize=RECIPE,
                         dims={"batch": (1, 4), "seq": (1, 128), "cache": (16, 512)},
                         settings=settings)  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for side in SIDES * 3:
        found[side].append(in_process(side, folder, bundle, settings, scratch))
    name = f"{RECIPE}, {millions:.0f} M parameters"
    for what, goal in (("held", 0.85), ("peak", 0.85)):
        sides = {side: [each[what] for each in found[side]] for side in SIDES}
        yield figure("attach", f"{name}, memory {what}, attached to plain",
                     ratios(sides["attached"], sides["plain"]), "times",
                     ("at most", goal))  # fmt: skip
        yield figure("attach", f"{name}, memory {what}, attached", sides["attached"], "MB")
    words = {side: found[side][0]["words"] for side in SIDES}
    yield figure("attach", f"{name}, greedy words that are torchao's eager",
                 [alike(words["attached"], words["torchao"])], "", ("at least", 1))  # fmt: skip
    for side in SIDES[1:]:
        share = alike(words[side], words["plain"])
        yield figure("attach", f"{name}, greedy words that are the plain model's, {side}",
                     [share], "")  # fmt: skip


def alike(ours: list[int], theirs: list[int]) -> float:
    """The share of places with the same word."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def in_process(
    side: str, folder: Path, bundle: Bundle, settings: Settings, scratch: Path
) -> dict[str, Any]:
    """What a new process of one side says of itself."""
    with tempfile.TemporaryDirectory(dir=scratch) as compiled:
        words = [sys.executable, "-W", "ignore", __file__, side, folder, bundle.path, settings.home]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False,
                              env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled})  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def loaded(side: str, folder: Path, bundle: Path, home: Path) -> Any:
    """A side's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if side == "torchao":
        from torchao.quantization import quantize_

        from hubaoti.runtime.quantize import config_of

        quantize_(model.model.layers, config_of(RECIPE, torch.device("cpu")))
    if side == "attached":
        settings = Settings(home=home, endpoint="http://127.0.0.1:9")
        hubaoti.attach(model, Bundle.read(bundle), quantize=True, strict=True, settings=settings)
    return model


def main() -> None:
    """Load, generate, and say what it took, in MB, and which words come next after random ones."""
    side, folder, bundle, home = sys.argv[1], *map(Path, sys.argv[2:])
    model = loaded(side, folder, bundle, home)
    model.generate(torch.arange(3, 19)[None], max_new_tokens=24, do_sample=False,
                   cache_implementation="static", disable_compile=True,
                   pad_token_id=0, eos_token_id=None)  # fmt: skip
    held, peak = kilobytes("VmRSS") / 1000, kilobytes("VmHWM") / 1000
    torch.manual_seed(1)
    ids = torch.randint(0, MEDIUM["vocab_size"], (4, 128))
    cache = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    answer = {"held": held, "peak": peak, "words": logits.argmax(-1).flatten().tolist()}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
