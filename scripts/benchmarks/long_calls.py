"""Calls that compute for a while: by torch's runner, by the library itself, in several threads.

In one thread of OpenMP each, so that what several threads of Python gain is not taken already.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import hubaoti
from benchmarks.answers import require_same
from benchmarks.figures import Figure, divide_pairs, make_figure, time_in_turn
from hubaoti import api
from hubaoti.attachment.attach import find_regions
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

_WIDTH, _ROWS = 512, 256
_THREADS = 4
_CALLS = 8  # of each thread, in one turn


def _make_block() -> nn.Module:
    inner = nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
    return nn.Sequential(*inner).eval().requires_grad_(False)


def measure_long_calls(settings: Settings, scratch: Path, rounds: int) -> Iterator[Figure]:
    """The library's own interface to torch's runner, and four graphs in four threads to in one."""
    blocks, x = [_make_block() for _ in range(_THREADS)], torch.randn(_ROWS, _WIDTH)
    with hubaoti.capture(blocks[0]) as calls:
        blocks[0](x)
    bundle = api.compile(
        blocks[0], scratch / "long-bundle", calls=calls, settings=settings, regions="none"
    )
    graphs = []
    for block in blocks:
        hubaoti.attach(block, bundle, settings=settings)
        block(x)  # the first is a trial
        graphs += [region.graphs[0] for region in find_regions(block)]
    yield from _compare_graphs(graphs, x, 10 * rounds)


def _compare_graphs(graphs: list[Graph], x: torch.Tensor, rounds: int) -> Iterator[Figure]:
    def repeat(graph: Graph) -> None:
        for _ in range(_CALLS):
            graph.run([x], small=False)

    def repeat_held(graph: Graph) -> None:
        for _ in range(_CALLS):
            graph._run_short([x])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(_THREADS, initializer=lambda: torch.set_num_threads(1)) as pool:
        require_same(graphs[0].run([x], small=False), graphs[0]._run_short([x]))
        sides = {
            "library": lambda: repeat(graphs[0]),
            "runner": lambda: repeat_held(graphs[0]),
            "in turn": lambda: [*map(repeat, graphs)],
            "beside": lambda: [*pool.map(repeat, graphs)],
            "beside, held": lambda: [*pool.map(repeat_held, graphs)],
        }
        time_in_turn(sides, 2)
        spent = time_in_turn(sides, rounds)
    torch.set_num_threads(threads)
    name = f"a call of {spent['runner'][0] / _CALLS * 1e3:.0f} ms"
    over = divide_pairs(spent["library"], spent["runner"])
    yield make_figure(
        "attach", f"{name}, the library to the runner", over, "times", ("includes", 1)
    )
    gain = divide_pairs(spent["in turn"], spent["beside"])
    name = f"{_THREADS} graphs, in one thread to in {_THREADS}"
    yield make_figure("attach", name, gain, "times", ("at least", 1.8))
    gain = divide_pairs(spent["in turn"], spent["beside, held"])
    yield make_figure("attach", f"{name}, by the runner", gain, "times")
