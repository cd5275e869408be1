"""A pull beside `hf download` of the same repo, and a pull of what is here, with nobody to ask."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bundles import CPU, MEMBERS, make_bundle

from benchmarks.figures import Cost, Figure, compare_costs, make_figure, measure_cost
from hubaoti import api
from hubaoti.host.probe import find_torch
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings

_REPO = "bench/pulled"
_HUBAOTI, _HF = (str(Path(sys.prefix) / "bin" / name) for name in ("hubaoti", "hf"))


def bench_pull(
    scratch: Path, settings: Settings, rounds: int, size: int = 20_000_000
) -> Iterator[Figure]:
    """Commands as users run them, each cold one with homes of its own, against one endpoint."""
    torch = find_torch([])
    assert torch is not None
    members = {**MEMBERS, "model/weights": random.Random(0).randbytes(size)}
    bundle = make_bundle(scratch / "bundle", {**CPU, "torch": torch.version}, members)
    spent: dict[str, list[Cost]] = {"hubaoti": [], "hf": []}
    with serve_in_thread(scratch / "hub") as endpoint:
        here = replace(settings, endpoint=endpoint.url, token=endpoint.token)
        commit = api.push(bundle, _REPO, as_is=True, settings=here).commit
        sides = {"hubaoti": [_HUBAOTI, "pull", _REPO, "--trust"], "hf": [_HF, "download", _REPO]}
        for turn in range(rounds + 1):
            for name, command in sides.items():
                cost = _measure(command, scratch / f"{name}-{turn}", here)
                if turn:  # the first one reads what nobody has read yet
                    spent[name].append(cost)
        home = scratch / f"hubaoti-{rounds}"
    name = f"a pull of {size / 1e6:.0f} MB, to hf download"
    yield from compare_costs("pull", name, spent["hubaoti"], spent["hf"], ("at most", 1.3))
    warm = [_measure([_HUBAOTI, "pull", f"{_REPO}@{commit}"], home, here) for _ in range(rounds)]
    name = "a pull of a pin that is here, the endpoint gone"
    yield make_figure("pull", name, [each.seconds for each in warm], "s", ("at most", 0.3))
    yield make_figure("pull", f"{name}, of processors", [each.cpu for each in warm], "s")


def _measure(command: list[str], home: Path, settings: Settings) -> Cost:
    """What a command takes that has a home of its own."""
    homes = {"HUBAOTI_HOME": str(home / "hubaoti"), "HF_HOME": str(home / "hf")}
    environment = {**os.environ, **homes, "HF_ENDPOINT": settings.endpoint}
    environment["HF_TOKEN"] = settings.token or ""
    home.mkdir(exist_ok=True)
    with measure_cost() as cost:
        subprocess.run(command, env=environment, capture_output=True, check=True)
    return cost
