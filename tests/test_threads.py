"""Small calls stay in one thread, and leave the caller's threads as they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hubaoti.bundle import Bundle
from hubaoti.package import unpack_all
from hubaoti.runtime import golden
from hubaoti.runtime.checks import Checks
from hubaoti.runtime.threads import OPENMP, SMALL, in_one, is_small, rows

CPU = torch.device("cpu")
needs_openmp = pytest.mark.skipif(OPENMP is None, reason="this torch has no OpenMP")
# Threads of the process before, after a small call, and after one that is not.
STARTED = """
import os, sys, torch
from pathlib import Path
from hubaoti.bundle import Bundle
from hubaoti.package import unpack_all
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.threads import OPENMP
OPENMP.omp_set_num_threads(1)  # whatever torch itself does meanwhile
bundle, folder = Bundle.read(Path(sys.argv[1])), Path(sys.argv[2])
entry = bundle.manifest.graphs[0]
graph = open_graph(folder, entry, torch.device("cpu"))
graph.bind(golden.constants_for(entry, bundle.path, graph.device))
count = lambda: len(os.listdir("/proc/self/task"))
found = [count()]
for rows, seq in ((1, 2), (4, 40)):
    sizes = {"batch": rows, "seq": seq, "cache": 64, "filled": seq}
    inputs = golden.inputs_for(entry, sizes)
    found.append(int(graph.checks.is_small(inputs)))
    OPENMP.omp_set_num_threads(2)
    graph(*inputs)
    OPENMP.omp_set_num_threads(1)
    found.append(count())
print(*found)
"""


@needs_openmp
def test_threads_are_started_by_the_first_call_that_has_work_for_them(
    decoder_bundle: Bundle, tmp_path: Path
) -> None:
    unpack_all(decoder_bundle.path / decoder_bundle.manifest.graphs[0].file, tmp_path)
    words = [sys.executable, "-c", STARTED, str(decoder_bundle.path), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    before, *small, is_small, large = map(int, done.stdout.split())
    assert small == [True, before]
    assert not is_small
    assert large > before


@needs_openmp
@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_s_threads_are_as_they_were(fails: bool) -> None:
    assert OPENMP is not None
    before = OPENMP.omp_get_max_threads()
    OPENMP.omp_set_num_threads(3)
    seen = []

    def run(inputs: list[int]) -> list[int]:
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError("as native code does")
        return inputs

    try:
        if fails:
            with pytest.raises(RuntimeError, match="as native code does"):
                in_one(run, [7])
        else:
            assert in_one(run, [7]) == [7]
        assert seen == [1]
        assert torch.get_num_threads() == 3
    finally:
        OPENMP.omp_set_num_threads(before)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(2, 3, 8), 6),
        (torch.zeros(2, 3, dtype=torch.int64), 6),  # ids, each of which becomes a vector
        (torch.zeros(2, 1, 3, 3, dtype=torch.bool), 6),
        (torch.zeros(()), 1),
        (torch.zeros(3, 0), 0),
    ],
)
def test_rows(tensor: torch.Tensor, expected: int) -> None:
    assert rows(tensor) == expected


def test_a_call_is_small_by_rows_and_by_what_each_of_them_meets() -> None:
    hidden = torch.zeros(1, 2, 64)
    constants = SMALL // 2 - hidden.numel()
    assert is_small(constants, [hidden], [hidden])
    assert not is_small(constants + 1, [hidden], [hidden])
    cache = torch.zeros(1, 4, 256, 32)  # which a token looks through, and is no row
    assert is_small(1000, [hidden, cache, cache], [hidden])
    assert not is_small(1000, [hidden, cache, cache], [hidden, cache])


def test_what_stays_on_a_gpu_is_not_small(decoder_bundle: Bundle) -> None:
    entry = decoder_bundle.manifest.graphs[0]
    inputs = golden.inputs_for(entry, golden.smallest(entry))
    assert Checks(entry, CPU).is_small(inputs)
    assert not Checks(entry, torch.device("cuda", 0)).is_small(inputs)
