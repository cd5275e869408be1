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

from benchmarks.figures import Figure, divide_pairs, make_figure, time_in_turn
from benchmarks.minilm import find_minilm
from benchmarks.opening import time_our_opening, time_public_opening
from hubaoti import api
from hubaoti.settings import Settings

_PEER = Path(__file__).with_name("peer.py")
_PYTHON = Path(sys.prefix) / "bin" / "python"
_REPO = "bench/minilm"
_TEXT = "The cat sits on the warm windowsill."
_WIDTHS = {"x86_64_v3": 256, "x86_64_v4": 512}  # of vectors in bits, by their level
_SHAPES = ((1, 8), (1, 128), (8, 128))


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
        line = [str(_PYTHON.parent / str(words[0])), *map(str, words[1:])]
        environment = self.environment(**more)
        return lambda: subprocess.run(line, env=environment, capture_output=True, check=True)


@contextmanager
def publish_model(scratch: Path, model: Path | None = None) -> Iterator[Bench]:
    """Compile, serve from another process, push, pull: what all sections start from."""
    model = model or find_minilm()
    home, token = scratch / "home", "bench"
    log = scratch / "serve.log"
    words = ["serve", "--port", "0", "--root", str(scratch / "hub"), "--token", token]
    with log.open("w") as written:
        server = subprocess.Popen([str(_PYTHON.parent / "hubaoti"), *words], stdout=written)
    try:
        while "HF_ENDPOINT=" not in (text := log.read_text()):
            if server.poll() is not None:
                raise SystemExit("hubaoti serve has ended")
            time.sleep(0.1)
        endpoint = text.split("HF_ENDPOINT=")[1].split()[0]
        here = Settings(home=home, endpoint=endpoint, token=token)
        bundle = api.compile(model, scratch / "bundle", settings=here)
        api.push(bundle, _REPO, settings=here)
        pulled = api.pull(_REPO, trust=True, settings=here)
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
        sides["ours"].append(time_our_opening(bench.here.mirror, bench.digest, cache))
        shutil.rmtree(cache, ignore_errors=True)
        sides["empty"].append(time_public_opening(bench.package, cache))
        sides["warm"].append(time_public_opening(bench.package, cache))
    times = [seconds * 1000 for seconds in sides["ours"]]
    empty, warm = (divide_pairs(sides[side], sides["ours"]) for side in ("empty", "warm"))
    return [
        make_figure("open", "a graph in the mirror, verified", times, "ms", ("at most", 5)),
        make_figure("open", "aoti_load_package, empty inductor folder", empty, "times", None),
        make_figure("open", "aoti_load_package, second time", warm, "times", None),
    ]


def bench_start(bench: Bench, rounds: int) -> list[Figure]:
    """Process start to the first vector."""
    ours = bench.command(
        "hubaoti", "run", f"{_REPO}@{bench.commit}", "--model", bench.model, "--text", _TEXT
    )
    peer = ("python", "-P", "-W", "ignore", _PEER, bench.model)
    warm = str(bench.scratch / "warm")
    compiled = bench.command(*peer, "compile", _TEXT, TORCHINDUCTOR_CACHE_DIR=warm)
    sides = {"ours": ours, "eager": bench.command(*peer, "eager", _TEXT)}
    spent = time_in_turn(sides, rounds)
    cold: dict[str, list[float]] = {"ours": [], "cold": [], "warm": []}
    for _ in range(min(rounds, max(2, rounds // 3))):
        shutil.rmtree(warm, ignore_errors=True)
        pair = time_in_turn({"ours": ours, "cold": compiled, "warm": compiled}, 1)
        for name, seconds in pair.items():
            cold[name] += seconds
    eager = divide_pairs(spent["eager"], spent["ours"])
    return [
        make_figure("start", "hubaoti run", spent["ours"], "s", None),
        make_figure("start", "transformers eager", eager, "times", ("at least", 2)),
        make_figure(
            "start", "torch.compile cold", divide_pairs(cold["cold"], cold["ours"]), "times",
            ("at least", 10),
        ),
        make_figure(
            "start", "torch.compile warm", divide_pairs(cold["warm"], cold["ours"]), "times",
            ("at least", 5),
        ),
    ]  # fmt: skip


def _make_sides(bench: Bench, widths: Mapping[str, int]) -> dict[str, Callable[..., object]]:
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
    widths: Mapping[str, int] = _WIDTHS,
    shapes: Sequence[tuple[int, int]] = _SHAPES,
) -> Iterator[Figure]:
    """A call, warm: over eager, and over torch.compile on the same vector width."""
    import torch

    sides = _make_sides(bench, widths)
    with torch.no_grad():
        for batch, seq in shapes:
            ids = torch.randint(1, 30522, (batch, seq))
            inputs = (ids, torch.ones_like(ids))
            calls = {name: partial(side, *inputs) for name, side in sides.items()}
            time_in_turn(calls, 3)  # torch.compile compiles, allocators settle
            spent = time_in_turn(calls, 20 * rounds)
            yield from _list_steady_figures(f"({batch}, {seq})", spent, widths)


def _list_steady_figures(
    shape: str, spent: Mapping[str, list[float]], widths: Mapping[str, int]
) -> Iterator[Figure]:
    """The figures of one shape."""
    times = [seconds * 1000 for seconds in spent["hubaoti x86_64_v3"]]
    yield make_figure("steady", f"{shape} hubaoti x86_64_v3", times, "ms", None)
    for level, width in widths.items():
        ours = spent[f"hubaoti {level}"]
        over = divide_pairs(spent["eager"], ours)
        goal = ("at least", 1.3) if level == "x86_64_v3" else None
        yield make_figure("steady", f"{shape} {level} over eager", over, "times", goal)
        for kind in ("dynamic", "static"):
            name = f"torch.compile {kind} {width}"
            over = divide_pairs(spent[name], ours)
            goal = ("at least", 1.0) if kind == "dynamic" and level == "x86_64_v3" else None
            yield make_figure("steady", f"{shape} {level} over {name}", over, "times", goal)


def bench_compile(bench: Bench, rounds: int) -> list[Figure]:
    """Compiling a model whose weights are not there."""
    bare = bench.scratch / "without-weights"
    shutil.copytree(bench.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    output = bench.scratch / "from-config"
    bench.command("hubaoti", "compile", bare, "-o", output, "--quiet")()
    built = json.loads((output / "hubaoti.json").read_text())["built"]
    memory, seconds = [built["peak_bytes"] / 1e9], [built["seconds"]]
    return [
        make_figure("compile", "peak memory, no weight file there", memory, "GB", ("at most", 1.5)),
        make_figure("compile", "time", seconds, "s", None),
    ]


def bench_cli(bench: Bench, rounds: int) -> list[Figure]:
    """The commands that should cost nothing."""
    sides = {
        "hf --help": bench.command("hf", "--help"),
        "hubaoti --help": bench.command("hubaoti", "--help"),
        "hubaoti mirror ls": bench.command("hubaoti", "mirror", "ls"),
        "warm pull": bench.command("hubaoti", "pull", f"{_REPO}@{bench.commit}", "--quiet"),
    }
    time_in_turn(sides, 1)
    spent = time_in_turn(sides, 3 * rounds)
    found = [make_figure("cli", "warm pull of a commit", spent["warm pull"], "s", ("at most", 0.5))]
    for name in ("hubaoti --help", "hubaoti mirror ls"):
        over = divide_pairs(spent[name], spent["hf --help"])
        found.append(make_figure("cli", f"{name} to hf --help", over, "times", ("at most", 1)))
    return found
