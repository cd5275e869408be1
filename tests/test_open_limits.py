"""What a first open may take of the machine: real processes take more, and are ended for it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import greedy
import pytest

from hubaoti.runtime.open_child import OpenRequest, OpenVerdict, collect_verdicts

PATIENCE = 45.0  # seconds: what ends before that was not ended by the clock
CORES = os.cpu_count() or 1
MORE = 64 + 16 * CORES  # processes and threads that it may start


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where what is tried is found, and a temporary folder that holds nothing else."""
    monkeypatch.setenv("PYTHONPATH", str(Path(greedy.__file__).parent))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [*tmp_path.glob("hubaoti-open-*")]


def take(what: str, device: str = "cpu") -> tuple[OpenVerdict, float]:
    """What comes of a first open that takes something; the seconds that it took."""
    began = time.monotonic()
    request = OpenRequest(ids=[what], device=device, ops=[])
    (verdict,) = collect_verdicts("greedy", request, PATIENCE)
    return verdict, time.monotonic() - began


@pytest.mark.parametrize("what", ["touch_much", "start_what_touches_much"])
def test_for_a_gpu_where_addresses_are_not_limited_memory_is_watched(what: str) -> None:
    """Its own, and that of what it started; and nothing is held against a graph for it."""
    verdict, seconds = take(what, "cuda")
    assert seconds < PATIENCE / 2
    assert "SIGKILL: it took too much memory" in verdict.problem and not verdict.lasting


def test_what_takes_less_is_left_alone() -> None:
    verdict, seconds = take("touch_little", "cuda")
    assert seconds > 1.5 and verdict == OpenVerdict("touch_little", opened=True)


def test_what_computes_without_a_pause_is_ended_by_the_time_that_it_computed() -> None:
    """So that it ends even where nobody waits for it any more."""
    verdict, seconds = take("compute")
    assert seconds < PATIENCE / 2
    assert "SIGKILL" in verdict.problem or "SIGXCPU" in verdict.problem
    assert not verdict.lasting


def test_what_may_start_a_compiler_cannot_fill_the_machine_with_processes() -> None:
    if problem := find_why_nobody_counts():
        pytest.skip(problem)
    verdict, _ = take("fork_without_end")
    assert "Resource temporarily unavailable" in verdict.problem
    started = int(verdict.problem.split()[1].removesuffix(":"))
    assert 16 < started <= MORE  # of a user who does nothing else all of them


COUNTED = """
import os, resource, sys
sys.path[:0] = sys.argv[1:]
import greedy
if os.geteuid() == 0:
    greedy.become_nobody()
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    os.fork() or os._exit(0)
except OSError:
    print("counted")
"""


def find_why_nobody_counts() -> str:
    """Why this system limits nobody's processes; empty where it does."""
    paths = [str(Path(greedy.__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, *paths], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        return f"another user cannot be had: {done.stderr.strip().splitlines()[-1]}"
    if done.stdout.strip() != "counted":
        return "this system counts no processes of a user"
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    return "" if hard == resource.RLIM_INFINITY or hard > 2 * MORE else f"the limit is {hard} here"
