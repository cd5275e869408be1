"""Units compiled side by side, each in a process of its own, when memory allows.

A process is forked, so it has the model already, which for a module from Python is nowhere else.
It leaves its graph where it belongs, and tells the rest in a file: nothing is pickled.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from hubaoti import errors
from hubaoti.compiler import elf
from hubaoti.compiler.memory import OVERHEAD, available
from hubaoti.compiler.plan import Unit
from hubaoti.compiler.unit import Built
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, first_line
from hubaoti.manifest import Check, File, Graph

PARTS = ".parts"  # a folder of the bundle in the making


class Told(msgspec.Struct):
    """What a process tells of its unit, beside the tensors."""

    graph: Graph
    libraries: tuple[str, ...]
    versions: tuple[str | None, str | None, str | None]
    files: tuple[File, ...]
    checks: tuple[Check, ...]


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
    most = asked or min(os.cpu_count() or 1, max(1, fitting))
    return min(most, units)


def build_all(
    units: Sequence[Unit], build: Callable[[Unit], Built], jobs: int, scratch: Path
) -> list[Built]:
    """Build every unit, `jobs` at a time, in the order of the units.

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
            process, status = ended(running)
            require_done(running.pop(process), status, parts)
        return [read(unit, parts) for unit in units]
    finally:
        for process in running:
            os.kill(process, 15)
            os.waitpid(process, 0)
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()


def started(unit: Unit, build: Callable[[Unit], Built], parts: Path) -> int:
    """Fork a process that builds one unit; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        # More threads would wait forever for those of the parent, which a fork leaves behind.
        torch.set_num_threads(1)
        write(unit, build(unit), parts)
        status = 0
    except HubaotiError as why:
        told = {"kind": type(why).__name__, "message": str(why), "hint": why.hint}
        (parts / f"{unit.id}.error").write_text(json.dumps(told))
    except BaseException as why:
        told = {"kind": "CompileFailed", "message": f"{unit.id}: {first_line(why)}", "hint": ""}
        (parts / f"{unit.id}.error").write_text(json.dumps(told))
    finally:
        os._exit(status)


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
    save_file(built.golden, parts / f"{unit.id}.safetensors")
    (parts / f"{unit.id}.json").write_bytes(msgspec.json.encode(told))


def read(unit: Unit, parts: Path) -> Built:
    """What a process has built."""
    told = msgspec.json.decode((parts / f"{unit.id}.json").read_bytes(), type=Told)
    golden = load_file(parts / f"{unit.id}.safetensors")
    needs = elf.Needs(told.libraries, *told.versions)
    return Built(told.graph, needs, told.files, told.checks, golden)


def require_done(unit: Unit, status: int, parts: Path) -> None:
    """Raise what a process raised, or say how it ended."""
    if status == 0:
        return
    error = parts / f"{unit.id}.error"
    if error.is_file():
        told = json.loads(error.read_text())
        raise getattr(errors, told["kind"])(told["message"], hint=told["hint"])
    raise CompileFailed(
        f"compile: the process of {unit.id} ended with {os.waitstatus_to_exitcode(status)}",
        hint="a negative number is a signal, -9 the system's when memory is short: try --jobs 1",
    )
