"""What compiling a 72B model costs, of whose weights none can be read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from benchmarks.figures import Figure, make_figure, measure_cost
from benchmarks.memory import watch_tree
from benchmarks.minilm import find_minilm
from benchmarks.models import ModelCase
from hubaoti.settings import Settings

_HUBAOTI = Path(sys.prefix) / "bin" / "hubaoti"
# Qwen/Qwen2-72B's own numbers.
_LARGE = ModelCase(
    transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        hidden_size=8192,
        intermediate_size=29568,
        max_position_embeddings=32768,
        num_attention_heads=64,
        num_hidden_layers=80,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
    {"task": "generate", "dims": {"batch": (1, 16), "seq": (1, 4096), "cache": (16, 32768)}},
)


def bench_large(
    scratch: Path, settings: Settings, rounds: int, case: ModelCase = _LARGE
) -> list[Figure]:
    """The command of a 72B model, in a process of its own.

    Of its weights there is a named pipe that nobody writes to: reading it would never end.
    """
    folder, output = scratch / "72b", scratch / "72b-bundle"
    case.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_minilm() / name, folder / name)
    os.mkfifo(folder / "model.safetensors")
    words = ["compile", folder, *_make_options(case.options), "-o", output]
    home = {"HUBAOTI_HOME": str(settings.home), "HF_HUB_OFFLINE": "1"}
    log = scratch / "72b.log"
    with log.open("w") as written, measure_cost() as cost:
        process = subprocess.Popen(
            [_HUBAOTI, *map(str, words)], env=os.environ | home, stdout=written, stderr=written
        )
        with watch_tree(process.pid) as memory:
            failed = process.wait()
    if failed:
        raise SystemExit(log.read_text())
    built = json.loads((output / "hubaoti.json").read_text())["built"]
    size = sum(file.stat().st_size for file in output.rglob("*"))
    peak = [memory.bytes / 1e9]
    return [
        make_figure("large", "72B, the whole command", [cost.seconds], "s", ("at most", 60)),
        make_figure("large", "72B, of processors", [cost.cpu], "s"),
        make_figure("large", "72B, of it after planning", [built["seconds"]], "s"),
        make_figure("large", "72B, peak memory of all processes", peak, "GB", ("at most", 3)),
        make_figure(
            "large", "72B, what the manifest says of it", [built["peak_bytes"] / 1e9], "GB"
        ),
        make_figure("large", "72B, the bundle", [size / 1e6], "MB", ("at most", 10)),
    ]


def _make_options(options: Mapping[str, Any]) -> list[str]:
    """A task and its dims, as the command has them."""
    dims = [f"{name}={low}:{high}" for name, (low, high) in options["dims"].items()]
    return ["--task", options["task"], *(word for dim in dims for word in ("--dim", dim))]
