"""Units compiled side by side, or one for several GPUs, each in a process of its own.

A process is forked, so it has the model already, which for a module from Python is nowhere else.
It leaves its graph where it belongs, and tells the rest in files: nothing is pickled, and what it
prints goes to one of them, so that lines of several never mix.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import torch
from safetensors.torch import load_file, save_file

from hubaoti.compiler.built import BuiltUnit
from hubaoti.disk import DISK_FULL, OUTPUT, TEMPORARY, describe_no_room, find_full_disk
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, first_line
from hubaoti.folder_trees import remove_tree
from hubaoti.host.memory import OVERHEAD, read_available_memory
from hubaoti.host.probe import count_cores
from hubaoti.host.processes import fork_child, stop_forks, wait_for_one
from hubaoti.host.wire import ErrorRecord, Garbled, decode_record
from hubaoti.progress import Progress, report_nothing

PARTS = ".parts"  # a folder of the bundle in the making
_PRINTED = 20_000  # bytes of what a process printed that a report has


def choose_job_count(request: int | None, builds: int, weights: int) -> int:
    """How many graphs are compiled at a time: what was asked, or what memory and cores allow.

    Raises:
        BadRequest: less than one was asked.
    """
    if request is not None and request < 1:
        raise BadRequest(f"--jobs {request}", hint="one or more")
    fitting = read_available_memory() // (OVERHEAD + weights)
    most = request or min(count_cores(), max(1, fitting))
    return min(most, builds)


class _Named(Protocol):
    @property
    def id(self) -> str: ...


_Work = TypeVar("_Work", bound=_Named)


def build_all(
    units: Sequence[_Work],
    build: Callable[[_Work], BuiltUnit],
    jobs: int,
    scratch: Path,
    progress: Progress = report_nothing,
) -> list[BuiltUnit]:
    """Build every unit, `jobs` at a time, in the order of the units.

    With several, `progress` is told which are being built.

    Raises:
        HubaotiError: of the first unit that failed; the others are ended.
    """
    if jobs <= 1:
        return [build(unit) for unit in units]
    built = dict[str, BuiltUnit]()
    with closing(_build_in_forks(units, build, jobs, scratch, progress)) as ended:
        for unit, found in ended:
            if isinstance(found, HubaotiError):
                raise found
            built[unit.id] = found
    return [built[unit.id] for unit in units]


def try_all(
    units: Sequence[_Work],
    build: Callable[[_Work], BuiltUnit],
    jobs: int,
    scratch: Path,
    progress: Progress = report_nothing,
) -> list[BuiltUnit | HubaotiError]:
    """As `build_all`, but one that fails ends no other: what was built, or why it was not."""
    if jobs <= 1:
        return [_try_one(unit, build, scratch) for unit in units]
    with closing(_build_in_forks(units, build, jobs, scratch, progress)) as ended:
        built = {unit.id: found for unit, found in ended}
    return [built[unit.id] for unit in units]


def _try_one(
    unit: _Work, build: Callable[[_Work], BuiltUnit], scratch: Path
) -> BuiltUnit | HubaotiError:
    """Build a unit in this process; an error is told as a fork would tell it."""
    try:
        return build(unit)
    except Exception as error:
        return describe_error(error, unit, scratch).rebuild()


def _build_in_forks(
    units: Sequence[_Work],
    build: Callable[[_Work], BuiltUnit],
    jobs: int,
    scratch: Path,
    progress: Progress,
) -> Generator[tuple[_Work, BuiltUnit | HubaotiError]]:
    """Each unit as soon as its process has ended; once nobody asks any more, the others are ended.

    What a process printed is a note on its error.
    """
    parts = scratch / PARTS
    parts.mkdir()
    waiting, running = list(units), dict[int, _Work]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop(0)
                work = partial(_build_and_tell, unit, build, parts)
                running[fork_child(work, parts / f"{unit.id}.log")] = unit
            progress(f"compile {', '.join(unit.id for unit in running.values())}")
            process, code = wait_for_one(running)
            unit = running.pop(process)
            yield unit, _read_result(unit, code, parts)
    finally:
        stop_forks(running)
        remove_tree(parts)


def _build_and_tell(unit: _Work, build: Callable[[_Work], BuiltUnit], parts: Path) -> None:
    """In a fork, build a unit, and leave what came of it for the parent."""
    # More threads would wait forever for those of the parent, which a fork leaves behind.
    torch.set_num_threads(1)
    record: BuiltUnit | ErrorRecord
    try:
        record = build(unit)
        golden = {name: tensor.contiguous() for name, tensor in record.golden.items()}
        save_file(golden, parts / f"{unit.id}.safetensors")
        record = msgspec.structs.replace(record, golden={})
    except BaseException as error:
        record = describe_error(error, unit, parts)
    (parts / f"{unit.id}.record").write_bytes(msgspec.msgpack.encode(record))


def describe_error(error: BaseException, unit: _Named, parts: Path) -> ErrorRecord:
    """An error as it is told: ours as it is, others in words; a note has its traceback."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        error = describe_no_room(find_full_disk(error, parts), 0, f"{OUTPUT}, or {TEMPORARY}")
    if not isinstance(error, HubaotiError):
        error = CompileFailed(
            f"build {unit.id}: {type(error).__name__}: {first_line(error)}",
            hint="it is none of the errors that we know",
        )
    return ErrorRecord.of(error, trace)


def _read_result(unit: _Named, code: int, parts: Path) -> BuiltUnit | HubaotiError:
    """What a process has built, which ended with `code`; else what it raised, or how it ended."""
    record: BuiltUnit | ErrorRecord = ErrorRecord(
        CompileFailed.__name__,
        f"build {unit.id}: its process ended with {code}",
        "a negative number is a signal, -9 the system's when memory is short: try --jobs 1",
    )
    with suppress(OSError, Garbled):  # it left nothing, or was ended while it wrote it
        content = (parts / f"{unit.id}.record").read_bytes()
        record = decode_record(content, BuiltUnit | ErrorRecord)
    if isinstance(record, BuiltUnit):
        golden = load_file(parts / f"{unit.id}.safetensors")
        return msgspec.structs.replace(record, golden=golden)
    error = record.rebuild()
    log = parts / f"{unit.id}.log"
    if log.is_file():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _PRINTED))
            error.add_note(file.read().decode(errors="replace"))
    return error
