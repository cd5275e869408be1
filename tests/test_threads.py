"""Small calls stay in one thread, and leave the caller's threads as they were."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.input_checks import Checks
from hubaoti.runtime.threads import (
    LEAST,
    MOST_WORK,
    OPENMP,
    SMALL,
    Constants,
    Limit,
    compute_thread_limit,
    measure_threads,
    run_in_one_thread,
    time_parallel_loop,
)
from hubaoti.settings import Settings

CPU = torch.device("cpu")
needs_openmp = pytest.mark.skipif(OPENMP is None, reason="this torch has no OpenMP")
# Threads of the process before, after a small call, and after one that is not.
STARTED = """
import os, sys, torch
from pathlib import Path
from hubaoti.artifact.bundle import Bundle
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.threads import OPENMP
OPENMP.omp_set_num_threads(1)  # whatever torch itself does meanwhile
bundle, folder = Bundle.read(Path(sys.argv[1])), Path(sys.argv[2])
entry = bundle.manifest.graphs[0]
graph = open_graph(folder, entry, torch.device("cpu"))
graph.bind(golden.make_golden_constants(entry, bundle.path, graph.device))
count = lambda: len(os.listdir("/proc/self/task"))
found = [count()]
for rows, seq in ((1, 2), (4, 40)):
    sizes = {"batch": rows, "seq": seq, "cache": 64, "filled": seq}
    inputs = golden.make_golden_inputs(entry, sizes)
    found.append(int(graph.checks.is_small(inputs)))
    OPENMP.omp_set_num_threads(2)
    graph(*inputs)
    OPENMP.omp_set_num_threads(1)
    found.append(count())
print(*found)
"""
# What a thread has within such a call, and what torch has there afterwards.
NEW_THREAD = """
import sys, threading, torch
from hubaoti.runtime.threads import OPENMP, run_in_one_thread
torch.set_num_threads(int(sys.argv[1]))

def call(query):
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
    return OPENMP.omp_get_max_threads()

def work():
    print(run_in_one_thread(call, torch.zeros(1, 2, 8, 16)), torch.get_num_threads())

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


class Kept(dict[str, bytes]):
    """Notes that are kept in memory."""

    read_note = dict.get
    note = dict.update


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host where nobody has measured; what others learned in this process comes back."""
    monkeypatch.setattr(Limit, "multiplications", SMALL)
    monkeypatch.setattr(Limit, "is_known", True)


@needs_openmp
def test_a_parallel_loop_is_measured_once_and_the_same_calls_are_small_ever_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = Kept()
    monkeypatch.setattr(Limit, "is_known", False)
    measure_threads(notes, "this host")
    first = Limit.multiplications
    assert LEAST <= first <= MOST_WORK and first.bit_count() == 1
    (digest,) = notes
    notes[digest] = (1 << 22).to_bytes(4, "big")
    measure_threads(notes, "this host")
    assert Limit.multiplications == first  # this process has begun with it
    monkeypatch.setattr(Limit, "is_known", False)
    measure_threads(notes, "this host")
    assert Limit.multiplications == 1 << 22
    monkeypatch.setattr(Limit, "is_known", False)
    measure_threads(notes, "another host")
    assert len(notes) == 2


@needs_openmp
@pytest.mark.parametrize("noted", [b"", b"\xff" * 9])
def test_a_note_that_is_none_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, noted: bytes
) -> None:
    class Damaged(Kept):
        def read_note(self, digest: str) -> bytes | None:
            return noted

    monkeypatch.setattr(Limit, "is_known", False)
    measure_threads(Damaged(), "this host")
    assert LEAST <= Limit.multiplications <= MOST_WORK


def test_the_longer_a_loop_takes_to_start_the_more_is_done_in_one_thread() -> None:
    assert compute_thread_limit(0.0) == LEAST
    assert (
        compute_thread_limit(1e-6)
        < compute_thread_limit(9e-6)
        == SMALL
        < compute_thread_limit(1e-4)
        <= compute_thread_limit(1.0)
        == MOST_WORK
    )


@needs_openmp
def test_a_loop_costs_microseconds_and_leaves_the_number_of_threads() -> None:
    assert OPENMP is not None
    before = torch.get_num_threads(), OPENMP.omp_get_max_threads()
    assert 0 <= time_parallel_loop(OPENMP) < 0.1
    assert (torch.get_num_threads(), OPENMP.omp_get_max_threads()) == before


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
                run_in_one_thread(run, [7])
        else:
            assert run_in_one_thread(run, [7]) == [7]
        assert seen == [1]
        assert torch.get_num_threads() == 3
    finally:
        OPENMP.omp_set_num_threads(before)


@needs_openmp
@pytest.mark.parametrize("threads", [1, 2])
def test_a_new_thread_has_torch_s_number_after_its_first_call(threads: int) -> None:
    """Torch sets it when the thread first computes, which may be within the call."""
    asked = [sys.executable, "-c", NEW_THREAD, str(threads)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    within, after = map(int, done.stdout.split())
    assert (within, after) == (1, threads)


BLOCK = [(64, 64), (32, 64), (172, 64), (64, 172), (64,), ()]
KERNEL = (64, 1, 1024)


@pytest.mark.parametrize(
    ("tensor", "shapes", "expected"),
    [
        (torch.zeros(2, 3, 64), BLOCK, 6),
        (torch.zeros(2, 3, dtype=torch.int64), BLOCK, 6),  # ids, each of which becomes a vector
        (torch.zeros(1, 3, 32), BLOCK, 3),  # not what all matrices have: the narrowest of them
        (torch.zeros(2, 1, 3, 3, dtype=torch.bool), BLOCK, 1),
        (torch.zeros(()), BLOCK, 1),
        (torch.zeros(3, 0), BLOCK, 0),
        (torch.zeros(2, 3, 64), [*BLOCK, (7, 9)], 55),  # one that mixes another axis
        (torch.zeros(2, 3, 64), [*BLOCK, KERNEL], 384),  # which meets every number
        (torch.zeros(2, 3, 64), [(64,)], 384),
        (torch.zeros(2, 3, 64), [], 384),
        (torch.zeros(2, 3, 64), [(0, 64)], 6),
    ],
)
def test_rows(tensor: torch.Tensor, shapes: list[tuple[int, ...]], expected: int) -> None:
    assert Constants.of(shapes).rows(tensor) == expected


def test_a_call_is_small_by_rows_and_by_what_each_of_them_meets() -> None:
    hidden = torch.zeros(1, 2, 64)
    most = SMALL // 2 - hidden.numel() * 64 // 2
    assert Constants(most, frozenset({64}), 1).is_small([hidden], [hidden])
    assert not Constants(most + 1, frozenset({64}), 1).is_small([hidden], [hidden])
    block = Constants.of(BLOCK)
    cache = torch.zeros(1, 4, 256, 32)  # which a token looks through, and is no row
    assert block.is_small([hidden, cache, cache], [hidden])
    longer = torch.zeros(1, 4, 16384, 32)
    assert not block.is_small([hidden, longer, longer], [hidden])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Conv1d(1, 64, 1024), (1, 1, 64000)),
        (torch.nn.Conv1d(2, 64, 400), (1, 2, 16000)),
        (torch.nn.Conv2d(3, 8, 3), (1, 3, 224, 224)),
        (torch.nn.Linear(1, 64), (1, 100_000, 1)),
        (torch.nn.Identity(), (1, 4096)),  # whatever it does with itself
    ],
)
def test_what_takes_long_is_not_small(module: torch.nn.Module, shape: tuple[int, ...]) -> None:
    constants = Constants.of(tuple(each.shape) for each in module.parameters())
    given = [torch.zeros(shape)]
    assert not constants.is_small(given, given)


def test_a_region_s_small_calls_are_made_in_one_thread(
    decoder_bundle: Bundle,
    tiny_decoder: Path,
    built_at: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also: whether one is small is not decided by how much of a cache was filled at first."""
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    alone: list[int] = []

    def counted(run: Callable[[Any], Any], inputs: Any) -> Any:
        alone.append(inputs[0].shape[0] * inputs[0].shape[1])
        return run_in_one_thread(run, inputs)

    monkeypatch.setattr("hubaoti.runtime.graph.run_in_one_thread", counted)
    with torch.no_grad(), hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at):
        for rows, seq in ((1, 2), (4, 40)):
            cache = StaticCache(config=model.config, max_cache_len=64)
            model(torch.ones(rows, seq, dtype=torch.int64), past_key_values=cache)
    assert alone == [2, 2]


@pytest.mark.parametrize(("rows", "seq"), [(1, 2), (4, 40)], ids=["torch", "interface"])
def test_eight_threads_call_one_graph_and_each_has_its_own_answer(
    rows: int, seq: int, decoder_bundle: Bundle, tmp_path: Path
) -> None:
    """A small call by torch's runner, a long one by the library's own interface."""
    entry = decoder_bundle.manifest.graphs[0]
    unpack_all(decoder_bundle.path / entry.file, tmp_path)
    graph = open_graph(tmp_path, entry, CPU)
    graph.bind(golden.make_golden_constants(entry, decoder_bundle.path, CPU))
    sizes = {"batch": rows, "seq": seq, "cache": 64, "filled": seq}
    made = golden.make_golden_inputs(entry, sizes)
    assert graph.checks.is_small(made) == (rows == 1)

    def call(number: int) -> list[torch.Tensor]:
        """The answer to a thread's own input, and the cache that it wrote."""
        hidden, *rest = (each.clone() for each in made)
        answers = graph(hidden * (number + 1) + number, *rest)
        return [*answers, *itertools.compress(rest, [each.mutated for each in entry.inputs[1:]])]

    expected = [call(number) for number in range(8)]
    begin = threading.Barrier(8)

    def work(number: int) -> list[list[torch.Tensor]]:
        begin.wait()
        return [call(number) for _ in range(10)]

    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(work, range(8))]
    assert (graph._runner._container is not None) == (rows > 1)  # type: ignore[attr-defined]
    for number, each in enumerate(found):
        assert not torch.allclose(expected[number][0], expected[number - 1][0], atol=1e-2)
        for answer in each:
            torch.testing.assert_close(answer, expected[number], rtol=1e-4, atol=1e-4)


def test_what_stays_on_a_gpu_is_not_small(decoder_bundle: Bundle) -> None:
    entry = decoder_bundle.manifest.graphs[0]
    inputs = golden.make_golden_inputs(entry, golden.choose_smallest_dims(entry))
    assert Checks(entry, CPU).is_small(inputs)
    assert not Checks(entry, torch.device("cuda", 0)).is_small(inputs)
