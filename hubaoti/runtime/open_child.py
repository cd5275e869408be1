"""A first open, seen from who wants it: what a child is asked, what it says, what came of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hubaoti.artifact.schema import Graph
from hubaoti.disk import explain_disk_errors
from hubaoti.errors import (
    CannotOpen,
    KernelArchUnsupported,
    KernelConflict,
    KernelFailed,
    KernelMissing,
    KernelSchemaMismatch,
    MissingDependency,
    MissingOps,
    NotEnoughMemory,
)
from hubaoti.folder_trees import remove_tree
from hubaoti.host.memory import read_available_memory
from hubaoti.host.processes import (
    CRASHES,
    ChildOutput,
    collect_records,
    describe_exit,
    list_search_path,
)
from hubaoti.host.wire import ErrorRecord
from hubaoti.settings import read_needed_environment

if TYPE_CHECKING:
    import torch

OPEN_SECONDS = 300.0  # for one graph, the start of a process included
_CHILD = "hubaoti.runtime.open_artifact"
_BASE = 600 << 20  # bytes of a process that has torch
_LONGEST = 2000  # characters of what is wrong with a graph
# Of the system, or of what a process has registered, loaded or installed.
_UNOPENED = {
    each.__name__
    for each in (
        *(CannotOpen, MissingOps, MissingDependency),
        *(KernelMissing, KernelArchUnsupported, KernelSchemaMismatch, KernelConflict),
    )
}


@dataclass(frozen=True, slots=True)
class OpenVerdict:
    """What came of a graph's first open; `problem` is empty where it answers as it should.

    Only a crash, a wrong answer and what a kernel refuses are `lasting`: all else may have been
    this moment's, as a process that was ended from outside, or too little memory. `error` stands
    where there was no answer but one. It was `opened` where it got as far as its first call, and
    `compared` where its golden answers were. Of a kernel's problem the graph is not to blame.
    """

    graph: str
    problem: str = ""
    lasting: bool = True
    error: ErrorRecord | None = None
    opened: bool = False
    compared: bool = False
    of_kernel: bool = False

    @property
    def is_loadable(self) -> bool:
        """Whether the system loaded it, and its ops are registered: not so on a noexec disk."""
        return self.error is None or self.error.kind not in _UNOPENED


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to open, with the modules that register the caller's ops, and their place.

    It may take `seconds`, and `memory` bytes beside what torch does, and write into `scratch`.
    """

    ids: list[str]
    device: str
    ops: list[str]
    search: list[bytes] = msgspec.field(default_factory=list_search_path)
    memory: int = 0
    seconds: float = OPEN_SECONDS
    scratch: bytes = b""


class ArtifactRequest(OpenRequest, frozen=True, kw_only=True):
    """Graphs of an artifact, whose packages lie unpacked in `graphs` by their sha256.

    Where the device `computes`, their golden answers are compared.
    """

    path: bytes
    graphs: bytes
    computes: bool


class OpenReport(msgspec.Struct, frozen=True):
    """What a child says of a graph: that it begins with its kernels, or with itself, has opened it,
    or what came of it."""

    graph: str
    problem: str | None = None
    error: ErrorRecord | None = None
    is_limited: bool = False
    opened: bool = False
    compared: bool = False
    of_kernel: bool = False


def open_in_child(
    path: Path,
    graphs: Path,
    entries: Sequence[Graph],
    device: torch.device,
    ops: Sequence[str] = (),
    patience: float = OPEN_SECONDS,
) -> list[OpenVerdict]:
    """Open each graph of the artifact at `path` in a child, and compare its golden answers.

    `graphs` has the unpacked packages by their sha256, and lies beside the kernels that they call;
    the caller has verified all of it. A child that takes more than `patience` seconds for each
    graph is ended. After a verdict that does not last, the graphs behind it have none.

    Raises:
        NotEnoughMemory: a graph's answers take more than is free here.
    """
    from hubaoti.runtime.gpus import computes

    for entry in entries:
        _require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[OpenVerdict] = []
    while waiting and all(each.lasting or not each.is_loadable for each in verdicts):
        request = ArtifactRequest(
            ids=waiting,
            device=str(device),
            ops=[*ops],
            memory=max(each.golden.memory if each.golden else 0 for each in entries),
            path=os.fsencode(path),
            graphs=os.fsencode(graphs),
            computes=computes(device),
        )
        verdicts += collect_verdicts(_CHILD, request, patience)
        done = {verdict.graph for verdict in verdicts}
        waiting = [graph for graph in waiting if graph not in done]
    return verdicts


def _require_room(entry: Graph) -> None:
    """See that a graph's golden answers can be asked for here."""
    needed = _BASE + (entry.golden.memory if entry.golden else 0)
    if (have := read_available_memory()) < needed:
        raise NotEnoughMemory(
            f"the first open of graph {entry.id} takes {needed / 1e9:.1f} GB of memory; "
            f"{have / 1e9:.1f} GB are free",
            hint="free some: a graph is not opened before it was tried",
        )


def collect_verdicts(
    module: str, request: OpenRequest, patience: float = OPEN_SECONDS
) -> list[OpenVerdict]:
    """Have the `main` of a module open graphs in a child, by `report_opens`; what came of them.

    Of this process's environment it has what a graph needs, and a temporary folder of its own.
    """
    seconds = patience * len(request.ids)
    with _make_scratch() as scratch:
        request = msgspec.structs.replace(request, seconds=seconds, scratch=os.fsencode(scratch))
        output = collect_records(
            module, request, OpenReport, seconds, environment=_make_environment(scratch)
        )
    return [*read_verdicts(output, request.ids)]


@contextmanager
def _make_scratch() -> Iterator[Path]:
    """A folder for a while, to which a stranger may do anything.

    Raises:
        HubaotiError, DiskFull: there is no room for one.
    """
    place = Path(tempfile.gettempdir())
    with explain_disk_errors(place):
        scratch = Path(tempfile.mkdtemp(prefix="hubaoti-open-", dir=place))
    try:
        yield scratch
    finally:
        with suppress(OSError):
            remove_tree(scratch)


def _make_environment(scratch: Path) -> dict[str, str]:
    """All that a child is told of this process's environment, and where it may keep files."""
    own = ("TMPDIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    return read_needed_environment() | dict.fromkeys(own, str(scratch)) | {"HF_HUB_OFFLINE": "1"}


def read_verdicts(output: ChildOutput, waiting: Sequence[str]) -> Iterator[OpenVerdict]:
    """What a child said of graphs; the one at which it ended has a verdict, too."""
    left, begun, is_garbled = [*waiting], None, output.is_garbled
    for report in output.records:
        if report.graph not in left:
            is_garbled = True
            break
        begun = report
        if report.problem is not None:
            left.remove(report.graph)
            begun = None
            failed = report.error is not None and report.error.kind == KernelFailed.__name__
            yield OpenVerdict(
                graph=report.graph,
                problem=report.problem[:_LONGEST],
                lasting=report.error is None or failed,
                error=report.error,
                opened=report.opened,
                compared=report.compared,
                of_kernel=failed,
            )
    if not left:
        return
    if is_garbled:
        problem = "its process said what is no answer of ours"
        yield OpenVerdict(begun.graph if begun else left[0], problem, lasting=False)
        return
    last = f": {output.last}" if output.last and output.code > 0 else ""
    problem = f"{describe_exit(output.code)}{last}"
    if begun is None:  # nothing, for it was not even begun with
        yield OpenVerdict(left[0], f"before it was opened, {problem}", lasting=False)
    else:  # nothing, unless it crashed there, and not for memory
        lasting = -output.code in CRASHES and not begun.is_limited
        when = "as its kernels were loaded, " * begun.of_kernel
        yield OpenVerdict(
            begun.graph,
            f"{when}{problem}",
            lasting,
            opened=begun.opened,
            of_kernel=begun.of_kernel,
        )
