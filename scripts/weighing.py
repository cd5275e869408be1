"""What a process holds that generates: plain, attached, and with quantized weights for its own.

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
from recording import Asked
from transformers.cache_utils import StaticCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings

RECIPE = "int8wo"
# 158 million parameters, of which 142 are in the blocks.
MEDIUM = Asked(
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
        "quantize": RECIPE,
        "dims": {"batch": (1, 4), "seq": (1, 128), "cache": (16, 512)},
    },
)
SIDES = ("plain", "torchao", "attached")
PEAK = """
import torch, transformers, hubaoti
from pathlib import Path
from weighing import kilobytes, text
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings
torch.manual_seed(0)
config = transformers.AutoConfig.from_pretrained({folder!r})
model = transformers.LlamaForCausalLM(config).eval()
if {attached}:
    settings = Settings(home=Path({home!r}), endpoint="http://127.0.0.1:9")
    attachment = hubaoti.attach(model, Bundle.read(Path({bundle!r})), settings=settings)
text(model)
if {attached}:
    assert attachment.stats()["eager"] == 0, attachment.stats()
print(kilobytes("VmHWM"))
"""


def peak_memory(folder: Path, bundle: Bundle, settings: Settings, processes: int) -> Figure:
    """The most that a process holds that generates, attached to not, by the model's config."""
    peaks: dict[bool, list[float]] = {False: [], True: []}
    places = {"folder": str(folder), "home": str(settings.home), "bundle": str(bundle.path)}
    for attached in (False, True) * processes:
        peaks[attached].append(told_by(PEAK.format(attached=attached, **places), folder))
    blocks = sum(len(entry.modules) for entry in bundle.manifest.graphs if entry.order == 0)
    return figure("attach", f"memory, {blocks} blocks, attached to plain",
                  ratios(peaks[True], peaks[False]), "times", ("at most", 1.02))  # fmt: skip


def told_by(program: str, scratch: Path) -> float:
    """The number that a program says last, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        words = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=False, env=environment(folder))  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.split()[-1]))


def environment(folder: str) -> dict[str, str]:
    """That of a child, which compiles nothing."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}


def text(model: Any) -> Any:
    """Some tokens, greedily."""
    return model.generate(torch.arange(3, 19)[None], max_new_tokens=24, do_sample=False,
                          cache_implementation="static", disable_compile=True,
                          pad_token_id=0, eos_token_id=None)  # fmt: skip


def bench_quantized(
    scratch: Path, settings: Settings, asked: Asked = MEDIUM, processes: int = 3
) -> Iterator[Figure]:
    """The memory of a model whose weights were replaced, and whether it answers as it should."""
    folder = scratch / "quantized"
    bundle = asked.compiled(folder, settings)
    model = asked.model()
    model.save_pretrained(folder)
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    del model
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for side in SIDES * processes:
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
                              env=environment(compiled))  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def loaded(side: str, folder: Path, bundle: Path, home: Path) -> Any:
    """A side's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if side == "torchao":
        from torchao.quantization import quantize_

        from hubaoti.runtime.quantize import make_torchao_config

        quantize_(model.model.layers, make_torchao_config(RECIPE, torch.device("cpu")))
    if side == "attached":
        settings = Settings(home=home, endpoint="http://127.0.0.1:9")
        hubaoti.attach(model, Bundle.read(bundle), quantize=True, strict=True, settings=settings)
    return model


def main() -> None:
    """Load, generate, and say what it took, in MB, and which words come next after random ones."""
    side, folder, bundle, home = sys.argv[1], *map(Path, sys.argv[2:])
    model = loaded(side, folder, bundle, home)
    text(model)
    held, peak = kilobytes("VmRSS") / 1000, kilobytes("VmHWM") / 1000
    torch.manual_seed(1)
    dims = Bundle.read(bundle).manifest.build.dims
    rows, length = dims["batch"][1], dims["seq"][1]  # the most that the graph serves
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    answer = {"held": held, "peak": peak, "words": logits.argmax(-1).flatten().tolist()}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
