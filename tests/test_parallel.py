"""Units built side by side, in real processes; what they build is fake, which takes no time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import check_of, describe, write_zip

from hubaoti.artifact.bundle import make_file_entry
from hubaoti.compiler import parallel
from hubaoti.compiler.built import BuiltGraph, BuiltUnit
from hubaoti.compiler.elf import Needs
from hubaoti.compiler.graph_plans import GraphPlan
from hubaoti.compiler.parallel import build_all, choose_job_count, try_all
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import BadDim, BadRequest, CompileFailed, HubaotiError
from hubaoti.host import probe
from hubaoti.host.memory import OVERHEAD
from hubaoti.host.wire import ErrorRecord

CPU = torch.device("cpu")
WAIT = 20.0  # seconds after which what should come will not come

Build = Callable[[GraphPlan], BuiltUnit]


def unit(name: str) -> GraphPlan:
    face = CallSignature({"args": [{"tensor": 0}], "kwargs": {}}, ())
    return GraphPlan(name, (f"layers.{name}",), face, {"batch": Range(1, 8)})


UNITS = (unit("first"), unit("second"))


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A bundle in the making."""
    (tmp_path / "graphs").mkdir()
    return tmp_path


def made(unit: GraphPlan, scratch: Path) -> BuiltUnit:
    """Write a fake package and what belongs to it, as building a unit does."""
    write_zip(scratch / f"graphs/{unit.id}.pt2", {"name": unit.id.encode()})
    (scratch / f"{unit.id}.pid").write_text(str(os.getpid()))
    graph = BuiltGraph(
        graph=describe(scratch, unit.id),
        needs=Needs(("libc.so.6", "libm.so.6"), "2.34", None, "1.3"),
        files=(make_file_entry(scratch, f"{unit.id}.pid"),),
        checks=(check_of(unit.id),),
    )
    return BuiltUnit(
        graphs=(graph,),
        golden={f"{unit.id}/out": torch.tensor([float(len(unit.id)), float("inf")])},
    )


def graphs_of(built: BuiltUnit) -> list[BuiltGraph]:
    """What was built, none of which failed."""
    graphs = [each for each in built.graphs if isinstance(each, BuiltGraph)]
    assert len(graphs) == len(built.graphs)
    return graphs


def ids_of(built: BuiltUnit) -> list[str]:
    return [each.graph.id for each in graphs_of(built)]


def wait_for(file: Path) -> None:
    """Wait until a file is there."""
    wait_until(file.exists, f"{file.name} never came")


def wait_until(holds: Callable[[], bool], else_said: str) -> None:
    """Wait until something holds."""
    until = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < until, else_said
        time.sleep(0.01)


def process_of(unit: GraphPlan, scratch: Path) -> int:
    """The process in which a unit was built."""
    return int((scratch / f"{unit.id}.pid").read_text())


def alive(process: int) -> bool:
    """Whether a process runs, or waits for its parent as a zombie does."""
    return Path(f"/proc/{process}").exists()


def test_units_are_built_at_once_and_come_back_in_their_order(scratch: Path) -> None:
    """The first waits for the second, which a single process would never build."""

    def build(unit: GraphPlan) -> BuiltUnit:
        if unit is UNITS[0]:
            wait_for(scratch / "second.pid")
        return made(unit, scratch)

    found = build_all(UNITS, build, 2, scratch)
    assert [ids_of(built) for built in found] == [["first"], ["second"]]
    assert len({os.getpid(), *(process_of(unit, scratch) for unit in UNITS)}) == 3
    assert not any(alive(process_of(unit, scratch)) for unit in UNITS)


def test_all_that_was_built_comes_back_as_it_was(scratch: Path) -> None:
    found = build_all(UNITS, lambda unit: made(unit, scratch), 2, scratch)
    for each, built in zip(UNITS, found, strict=True):
        (graph,) = graphs_of(built)
        assert graph.graph == describe(scratch, each.id)
        assert graph.needs == Needs(("libc.so.6", "libm.so.6"), "2.34", None, "1.3")
        assert graph.files == (make_file_entry(scratch, f"{each.id}.pid"),)
        assert graph.checks == (check_of(each.id),)
        (tensor,) = built.golden.values()
        assert torch.equal(tensor, torch.tensor([float(len(each.id)), float("inf")]))


def test_nothing_but_what_was_built_is_left_in_the_bundle(scratch: Path) -> None:
    build_all(UNITS, lambda unit: made(unit, scratch), 2, scratch)
    names = {path.name for path in scratch.iterdir()}
    assert names == {"graphs", "first.pid", "second.pid"}


def test_no_more_are_built_at_a_time_than_were_asked_for(scratch: Path) -> None:
    units = [unit(f"unit{at}") for at in range(5)]

    def build(unit: GraphPlan) -> BuiltUnit:
        mark = scratch / f"{unit.id}.running"
        mark.touch()
        time.sleep(0.1)
        (scratch / f"{unit.id}.most").write_text(str(len([*scratch.glob("*.running")])))
        mark.unlink()
        return made(unit, scratch)

    found = build_all(units, build, 2, scratch)
    assert [ids_of(built) for built in found] == [[unit.id] for unit in units]
    assert max(int(file.read_text()) for file in scratch.glob("*.most")) <= 2


def test_one_at_a_time_is_this_process_without_a_fork(scratch: Path) -> None:
    found = build_all(UNITS, lambda unit: made(unit, scratch), 1, scratch)
    assert [ids_of(built) for built in found] == [["first"], ["second"]]
    assert {process_of(unit, scratch) for unit in UNITS} == {os.getpid()}


def test_who_waits_is_told_what_is_being_built(scratch: Path) -> None:
    def build(unit: GraphPlan) -> BuiltUnit:
        built = made(unit, scratch)
        if unit is UNITS[1]:
            wait_for(scratch / "first.pid")
            wait_until(lambda: not alive(process_of(UNITS[0], scratch)), "the first never ended")
        return built

    said: list[str] = []
    build_all(UNITS, build, 2, scratch, said.append)
    assert said == ["compile first, second", "compile second"]


def fail_in_our_words() -> None:
    raise BadDim("export first: seq must be a multiple of 8", hint="say so: --dim seq=8:64:8")


def fail_in_other_words() -> None:
    raise ZeroDivisionError("integer modulo by zero\nand more of it")


def fail_without_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Unprintable(HubaotiError):
    """An error of ours that no other process knows by its name."""


def fail_in_words_of_others() -> None:
    raise Unprintable("graphs must not be printed", hint="do not print them")


def fail_in_half_a_word() -> None:
    """As one that is ended while it says what is wrong."""
    log = Path("/proc/self/fd/1").readlink()
    record = msgspec.msgpack.encode(ErrorRecord("BadDim", "export first: no"))
    log.with_suffix(".record").write_bytes(record[: len(record) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


FAILURES: dict[str, tuple[Callable[[], None], type[HubaotiError], str, str]] = {
    "an error of ours": (
        fail_in_our_words,
        BadDim,
        "export first: seq must be a multiple of 8",
        "say so: --dim seq=8:64:8",
    ),
    "an error of others": (
        fail_in_other_words,
        CompileFailed,
        "build first: ZeroDivisionError: integer modulo by zero",
        "none of the errors",
    ),
    "an exit": (lambda: sys.exit(3), CompileFailed, "build first: SystemExit: 3", "none"),
    "half a word": (fail_in_half_a_word, CompileFailed, "its process ended with -9", "--jobs 1"),
    "words of others": (
        fail_in_words_of_others,
        HubaotiError,
        "graphs must not be printed",
        "do not print them",
    ),
    "a kill": (fail_without_memory, CompileFailed, "first: its process ended with -9", "--jobs 1"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_process_that_fails_is_told_of_and_the_others_are_ended(case: str, scratch: Path) -> None:
    """With what they started, and with what they would have taken along."""
    fail, kind, message, hint = FAILURES[case]

    def build(unit: GraphPlan) -> BuiltUnit:
        if unit is UNITS[0]:
            wait_for(scratch / "compiler.pid")
            fail()
        made(unit, scratch)
        command = f"echo $$ > {scratch}/compiler; mv {scratch}/compiler {scratch}/compiler.pid"
        try:
            subprocess.run(["sh", "-c", f"{command}; exec sleep 60"], check=True)
        finally:
            (scratch / "workplace").rmdir()
        raise AssertionError("it was not ended")

    (scratch / "workplace").mkdir()
    started = time.monotonic()
    with pytest.raises(HubaotiError) as caught:
        build_all(UNITS, build, 2, scratch)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert time.monotonic() - started < WAIT
    assert not alive(process_of(UNITS[1], scratch))
    assert not alive(int((scratch / "compiler.pid").read_text()))
    assert not (scratch / "workplace").exists()
    assert not (scratch / parallel.PARTS).exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_of_those_that_are_tried_one_that_fails_ends_no_other(jobs: int, scratch: Path) -> None:
    units = (*UNITS, unit("third"))

    def build(unit: GraphPlan) -> BuiltUnit:
        if unit is UNITS[0]:
            fail_in_our_words()
        if unit is UNITS[1]:
            fail_in_other_words()
        return made(unit, scratch)

    ours, others, built = try_all(units, build, jobs, scratch)
    assert isinstance(ours, BadDim) and "multiple of 8" in str(ours) and "--dim" in ours.hint
    assert isinstance(others, CompileFailed) and "build second: ZeroDivisionError" in str(others)
    assert all("Traceback" in each.notes[0] for each in (ours, others))
    assert isinstance(built, BuiltUnit) and ids_of(built) == ["third"]
    assert not (scratch / parallel.PARTS).exists()


def test_of_those_that_are_tried_one_that_is_killed_ends_no_other(scratch: Path) -> None:
    def build(unit: GraphPlan) -> BuiltUnit:
        if unit is UNITS[0]:
            fail_without_memory()
        return made(unit, scratch)

    killed, built = try_all(UNITS, build, 2, scratch)
    assert isinstance(killed, CompileFailed) and "ended with -9" in str(killed)
    assert isinstance(built, BuiltUnit)


def test_an_interrupt_ends_them_all(scratch: Path) -> None:
    def build(unit: GraphPlan) -> BuiltUnit:
        made(unit, scratch)
        if unit is UNITS[1]:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
        raise AssertionError("it was not ended")

    with pytest.raises(KeyboardInterrupt):
        build_all(UNITS, build, 2, scratch)
    assert not any(alive(process_of(unit, scratch)) for unit in UNITS)
    assert not (scratch / parallel.PARTS).exists()


def test_what_a_process_prints_and_where_it_failed_is_for_the_report(
    scratch: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(unit: GraphPlan) -> BuiltUnit:
        os.write(2, b"g++: of native code\n")
        sys.stdout = os.fdopen(1, "w", closefd=False)  # as outside of a test
        sys.stdout.write("of Python\n")
        subprocess.run(["echo", "of what it started"], check=True)
        try:
            fail_in_other_words()
        except ZeroDivisionError as why:
            raise CompileFailed("lower first: no", hint="none") from why
        raise AssertionError

    with pytest.raises(CompileFailed) as caught:
        build_all(UNITS, build, 2, scratch)
    notes = "\n".join(caught.value.notes)
    said = ("fail_in_other_words", "and more of it", "of native", "of Python", "of what it started")
    for words in said:
        assert words in notes
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("asked", "units", "fitting", "cores", "found"),
    [
        (None, 8, 64.0, 4, 4),  # as many as there are cores
        (None, 8, 3.5, 16, 3),  # as fit into memory
        (None, 8, 0.5, 16, 1),  # one is tried in any case: what it takes is an estimate
        (None, 2, 64.0, 16, 2),  # no more than there are units
        (3, 8, 0.5, 1, 3),  # who asks knows
        (3, 2, 64.0, 16, 2),
        (1, 8, 64.0, 16, 1),
    ],
)
def test_how_many_are_built_at_a_time(
    asked: int | None,
    units: int,
    fitting: float,
    cores: int,
    found: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = 1 << 28
    monkeypatch.setattr(
        parallel, "read_available_memory", lambda: int(fitting * (OVERHEAD + weights))
    )
    monkeypatch.setattr(parallel, "count_cores", lambda: cores)
    assert choose_job_count(asked, units, weights) == found


@pytest.mark.parametrize("asked", [0, -1])
def test_none_at_a_time_is_refused(asked: int) -> None:
    with pytest.raises(BadRequest, match=f"--jobs {asked}") as caught:
        choose_job_count(asked, 2, 0)
    assert caught.value.hint


def test_only_cores_that_are_ours_are_counted() -> None:
    ours = os.sched_getaffinity(0)
    assert probe.count_cores() == len(ours)
    os.sched_setaffinity(0, {min(ours)})
    try:
        assert probe.count_cores() == 1
    finally:
        os.sched_setaffinity(0, ours)
