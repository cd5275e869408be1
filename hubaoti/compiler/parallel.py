"""Units compiled side by side, each in a process of its own, when memory allows.

A process is forked, so it has the model already, which for a module from Python is nowhere else.
It leaves its graph where it belongs, and tells the rest in files: nothing is pickled, and what it
prints goes to one of them, so that lines of several never mix.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from hubaoti.artifact.manifest import Check, File, Graph
from hubaoti.compiler import elf
from hubaoti.compiler.graph_build import BuiltGraph
from hubaoti.compiler.plan import GraphPlan
from hubaoti.disk import DISK_FULL, OUTPUT, TEMPORARY, describe_no_room, find_full_disk
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, first_line, rebuild_error
from hubaoti.host.memory import OVERHEAD, read_available_memory
from hubaoti.progress import Progress, report_nothing

PARTS = ".parts"  # a folder of the bundle in the making
_STOPPED = 143
_PRINTED = 20_000  # bytes of what a process printed that a report has


class Told(msgspec.Struct):
    """What a process tells of its unit, beside the tensors."""

    graph: Graph
    libraries: tuple[str, ...]
    versions: tuple[str | None, str | None, str | None]
    files: tuple[File, ...]
    checks: tuple[Check, ...]


class Raised(msgspec.Struct):
    """What a process raised: the error's class, words and hint, and its traceback as text."""

    kind: str
    message: str
    hint: str
    trace: str


def choose_job_count(request: int | None, units: int, weights: int, device: torch.device) -> int:
    """How many units are compiled at a time: what was asked, or what memory and cores allow.

    Raises:
        BadRequest: less than one was asked, or more than one on a GPU, which a forked process
            cannot use.
    """
    if request is not None and request < 1:
        raise BadRequest(f"--jobs {request}", hint="one or more")
    if device.type == "cuda":
        if request and request > 1:
            raise BadRequest("--jobs needs --device cpu", hint="a GPU compiles one at a time")
        return 1
    fitting = read_available_memory() // (OVERHEAD + weights)
    most = request or min(count_cores(), max(1, fitting))
    return min(most, units)


def count_cores() -> int:
    """The cores that a container, or `taskset`, leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_all(
    units: Sequence[GraphPlan],
    build: Callable[[GraphPlan], BuiltGraph],
    jobs: int,
    scratch: Path,
    progress: Progress = report_nothing,
) -> list[BuiltGraph]:
    """Build every unit, `jobs` at a time, in the order of the units.

    With several, `progress` is told which are being built.

    Raises:
        HubaotiError: of the first unit that failed; the others are ended.
    """
    if jobs <= 1:
        return [build(unit) for unit in units]
    parts = scratch / PARTS
    parts.mkdir()
    waiting, running = list(units), dict[int, GraphPlan]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop(0)
                running[_fork_build(unit, build, parts)] = unit
            progress(f"compile {', '.join(unit.id for unit in running.values())}")
            process, status = _wait_for_one(running)
            _require_done(running.pop(process), status, parts)
        return [_read_result(unit, parts) for unit in units]
    finally:
        _stop_processes(running)
        shutil.rmtree(parts)


def _stop_processes(running: Iterable[int]) -> None:
    """End some processes; each takes its temporary files and its own processes along."""
    for process in running:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    for process in running:
        with suppress(ChildProcessError):
            os.waitpid(process, 0)


def _fork_build(unit: GraphPlan, build: Callable[[GraphPlan], BuiltGraph], parts: Path) -> int:
    """Fork a process that builds one unit; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
        _redirect_output(parts / f"{unit.id}.log")
        # More threads would wait forever for those of the parent, which a fork leaves behind.
        torch.set_num_threads(1)
        _write_result(unit, build(unit), parts)
        status = 0
    except BaseException as error:  # a fork that went on would do the parent's work again
        message = msgspec.json.encode(describe_error(error, unit, parts))
        (parts / f"{unit.id}.error").write_bytes(message)
    finally:
        sys.stdout.flush()  # for the report; an ended process has no other chance
        os._exit(status)


def _redirect_output(log: Path) -> None:
    """Send what this process and those it starts print to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


def describe_error(error: BaseException, unit: GraphPlan, parts: Path) -> Raised:
    """An error as it is told: ours as it is, others in words."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        error = describe_no_room(find_full_disk(error, parts), 0, f"{OUTPUT}, or {TEMPORARY}")
    if isinstance(error, HubaotiError):
        kind, message, hint = type(error).__name__, str(error), error.hint
    else:
        kind = "CompileFailed"
        message = f"build {unit.id}: {type(error).__name__}: {first_line(error)}"
        hint = "it is none of the errors that we know"
    return Raised(kind, message, hint, trace)


def _wait_for_one(running: Iterable[int]) -> tuple[int, int]:
    """Wait for one of some processes, and for no other; its pid and status."""
    while True:
        for process in running:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return process, status
        time.sleep(0.05)


def _write_result(unit: GraphPlan, built: BuiltGraph, parts: Path) -> None:
    """Leave what was built for the parent."""
    needs = built.needs
    versions = (needs.glibc, needs.glibcxx, needs.cxxabi)
    result = Told(built.graph, needs.libraries, versions, built.files, built.checks)
    golden = {name: tensor.contiguous() for name, tensor in built.golden.items()}
    save_file(golden, parts / f"{unit.id}.safetensors")
    (parts / f"{unit.id}.json").write_bytes(msgspec.json.encode(result))


def _read_result(unit: GraphPlan, parts: Path) -> BuiltGraph:
    """The graph that a process has built, as `_write_result` left it for the parent."""
    result = msgspec.json.decode((parts / f"{unit.id}.json").read_bytes(), type=Told)
    golden = load_file(parts / f"{unit.id}.safetensors")
    needs = elf.Needs(result.libraries, *result.versions)
    return BuiltGraph(result.graph, needs, result.files, result.checks, golden)


def _require_done(unit: GraphPlan, status: int, parts: Path) -> None:
    """Raise what a process raised, or say how it ended; what it left to read is a note on that.

    Raises:
        HubaotiError: it did not end well.
    """
    if status == 0:
        return
    report, log = parts / f"{unit.id}.error", parts / f"{unit.id}.log"
    error: HubaotiError = CompileFailed(
        f"build {unit.id}: its process ended with {os.waitstatus_to_exitcode(status)}",
        hint="a negative number is a signal, -9 the system's when memory is short: try --jobs 1",
    )
    if raised := _read_error(report):
        error = rebuild_error(raised.kind, raised.message, raised.hint)
        error.add_note(raised.trace)
    if log.is_file():
        error.add_note(_read_log_tail(log))
    raise error


def _read_error(report: Path) -> Raised | None:
    """What a process raised; None where it left nothing, or was ended while it wrote it."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(report.read_bytes(), type=Raised)
    return None


def _read_log_tail(log: Path) -> str:
    """The last of what a process printed."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _PRINTED))
        return file.read(_PRINTED).decode(errors="replace")
