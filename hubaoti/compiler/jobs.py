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

from hubaoti.compiler import elf
from hubaoti.compiler.plan import Unit
from hubaoti.compiler.unit import Built
from hubaoti.disks import FULL, OUTPUT, TEMPORARY, full_disk, no_room
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, again, first_line
from hubaoti.manifest import Check, File, Graph
from hubaoti.memory import OVERHEAD, available
from hubaoti.steps import Say, silent

PARTS = ".parts"  # a folder of the bundle in the making
STOPPED = 143
PRINTED = 20_000  # bytes of what a process printed that a report has


class Told(msgspec.Struct):
    """What a process tells of its unit, beside the tensors."""

    graph: Graph
    libraries: tuple[str, ...]
    versions: tuple[str | None, str | None, str | None]
    files: tuple[File, ...]
    checks: tuple[Check, ...]


class Raised(msgspec.Struct):
    """What a process raised."""

    kind: str
    message: str
    hint: str
    trace: str


def how_many(asked: int | None, units: int, weights: int, device: torch.device) -> int:
    """How many units are compiled at a time: what was asked, or what memory and cores allow.

    Raises:
        BadRequest: less than one was asked, or more than one on a GPU, which a forked process
            cannot use.
    """
    if asked is not None and asked < 1:
        raise BadRequest(f"--jobs {asked}", hint="one or more")
    if device.type == "cuda":
        if asked and asked > 1:
            raise BadRequest("--jobs needs --device cpu", hint="a GPU compiles one at a time")
        return 1
    fitting = available() // (OVERHEAD + weights)
    most = asked or min(cores(), max(1, fitting))
    return min(most, units)


def cores() -> int:
    """The cores that a container, or `taskset`, leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_all(
    units: Sequence[Unit],
    build: Callable[[Unit], Built],
    jobs: int,
    scratch: Path,
    say: Say = silent,
) -> list[Built]:
    """Build every unit, `jobs` at a time, in the order of the units.

    With several, `say` is told which are being built.

    Raises:
        HubaotiError: of the first unit that failed; the others are ended.
    """
    if jobs <= 1:
        return [build(unit) for unit in units]
    parts = scratch / PARTS
    parts.mkdir()
    waiting, running = list(units), dict[int, Unit]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop(0)
                running[started(unit, build, parts)] = unit
            say(f"compile {', '.join(unit.id for unit in running.values())}")
            process, status = ended(running)
            require_done(running.pop(process), status, parts)
        return [read(unit, parts) for unit in units]
    finally:
        stop(running)
        shutil.rmtree(parts)


def stop(running: Iterable[int]) -> None:
    """End some processes; each takes its temporary files and its own processes along."""
    for process in running:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    for process in running:
        with suppress(ChildProcessError):
            os.waitpid(process, 0)


def started(unit: Unit, build: Callable[[Unit], Built], parts: Path) -> int:
    """Fork a process that builds one unit; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
        print_to(parts / f"{unit.id}.log")
        # More threads would wait forever for those of the parent, which a fork leaves behind.
        torch.set_num_threads(1)
        write(unit, build(unit), parts)
        status = 0
    except BaseException as why:  # a fork that went on would do the parent's work again
        told = msgspec.json.encode(told_of(why, unit, parts))
        (parts / f"{unit.id}.error").write_bytes(told)
    finally:
        sys.stdout.flush()  # for the report; an ended process has no other chance
        os._exit(status)


def print_to(log: Path) -> None:
    """Send what this process and those it starts print to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)


def told_of(why: BaseException, unit: Unit, parts: Path) -> Raised:
    """An error as it is told: ours as it is, others in words."""
    trace = "".join(traceback.format_exception(why))
    if isinstance(why, OSError) and why.errno in FULL:
        why = no_room(full_disk(why, parts), 0, f"{OUTPUT}, or {TEMPORARY}")
    if isinstance(why, HubaotiError):
        kind, message, hint = type(why).__name__, str(why), why.hint
    else:
        kind, message = "CompileFailed", f"build {unit.id}: {type(why).__name__}: {first_line(why)}"
        hint = "it is none of the errors that we know"
    return Raised(kind, message, hint, trace)


def ended(running: Iterable[int]) -> tuple[int, int]:
    """Wait for one of some processes, and for no other; its pid and status."""
    while True:
        for process in running:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return process, status
        time.sleep(0.05)


def write(unit: Unit, built: Built, parts: Path) -> None:
    """Leave what was built for the parent."""
    needs = built.needs
    versions = (needs.glibc, needs.glibcxx, needs.cxxabi)
    told = Told(built.graph, needs.libraries, versions, built.files, built.checks)
    golden = {name: tensor.contiguous() for name, tensor in built.golden.items()}
    save_file(golden, parts / f"{unit.id}.safetensors")
    (parts / f"{unit.id}.json").write_bytes(msgspec.json.encode(told))


def read(unit: Unit, parts: Path) -> Built:
    """What a process has built."""
    told = msgspec.json.decode((parts / f"{unit.id}.json").read_bytes(), type=Told)
    golden = load_file(parts / f"{unit.id}.safetensors")
    needs = elf.Needs(told.libraries, *told.versions)
    return Built(told.graph, needs, told.files, told.checks, golden)


def require_done(unit: Unit, status: int, parts: Path) -> None:
    """Raise what a process raised, or say how it ended; what it left to read is a note on that.

    Raises:
        HubaotiError: it did not end well.
    """
    if status == 0:
        return
    error, log = parts / f"{unit.id}.error", parts / f"{unit.id}.log"
    why: HubaotiError = CompileFailed(
        f"build {unit.id}: its process ended with {os.waitstatus_to_exitcode(status)}",
        hint="a negative number is a signal, -9 the system's when memory is short: try --jobs 1",
    )
    if told := said_in(error):
        why = again(told.kind, told.message, told.hint)
        why.add_note(told.trace)
    if log.is_file():
        why.add_note(end_of(log))
    raise why


def said_in(error: Path) -> Raised | None:
    """What a process raised; None where it left nothing, or was ended while it wrote it."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(error.read_bytes(), type=Raised)
    return None


def end_of(log: Path) -> str:
    """The last of what a process printed."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - PRINTED))
        return file.read(PRINTED).decode(errors="replace")
