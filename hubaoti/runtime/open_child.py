"""The process in which graphs are opened first: what it is asked, what it says, what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hubaoti.artifact.manifest import FILENAME, parse_manifest
from hubaoti.artifact.schema import Graph
from hubaoti.errors import (
    CannotOpen,
    HubaotiError,
    KernelArchUnsupported,
    KernelConflict,
    KernelFailed,
    KernelMissing,
    KernelSchemaMismatch,
    MissingDependency,
    MissingOps,
    NotEnoughMemory,
    NotTried,
    first_line,
)
from hubaoti.host.memory import is_limited, read_available_memory
from hubaoti.host.processes import (
    CRASHES,
    ChildOutput,
    collect_records,
    describe_exit,
    join_parent,
    list_search_path,
)
from hubaoti.host.wire import Channel, ErrorRecord
from hubaoti.mirror import Artifact
from hubaoti.runtime.custom_ops import register_ops

if TYPE_CHECKING:
    import torch

OPEN_SECONDS = 300.0  # for one graph, the start of a process included
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
    """What a child is to open, with the modules that register the caller's ops, and their place."""

    ids: list[str]
    device: str
    ops: list[str]
    search: list[bytes] = msgspec.field(default_factory=list_search_path)


class _ArtifactRequest(OpenRequest, frozen=True, kw_only=True):
    """Graphs of an artifact, whose packages lie unpacked in `graphs` by their sha256."""

    path: bytes
    graphs: bytes


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
    for entry in entries:
        _require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[OpenVerdict] = []
    while waiting and all(each.lasting or not each.is_loadable for each in verdicts):
        request = _ArtifactRequest(
            ids=waiting,
            device=str(device),
            ops=[*ops],
            path=os.fsencode(path),
            graphs=os.fsencode(graphs),
        )
        verdicts += collect_verdicts(__name__, request, patience)
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
    """Have the `main` of a module open graphs in a child, by `report_opens`; what came of them."""
    seconds = patience * len(request.ids)
    return [*read_verdicts(collect_records(module, request, OpenReport, seconds), request.ids)]


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


@dataclass(slots=True)
class Attempt:
    """A graph that a child opens, and says so: at a crash its last word stands."""

    graph: str
    channel: Channel
    opened: bool = False
    compared: bool = False

    def begin(self, *, of_kernel: bool = False) -> None:
        """From now on the graph is blamed for what happens, or first a kernel that it calls."""
        report = OpenReport(
            self.graph, is_limited=is_limited(), opened=self.opened, of_kernel=of_kernel
        )
        self.channel.send(report)

    def note_opened(self) -> None:
        """It is open, and is called next."""
        self.opened = True
        self.begin()

    def report(self, problem: str, error: ErrorRecord | None = None) -> None:
        """What came of it: what is wrong in words, else nothing."""
        report = OpenReport(self.graph, problem, error, opened=self.opened, compared=self.compared)
        self.channel.send(report)


def report_opens(
    channel: Channel, request: OpenRequest, try_graph: Callable[[Attempt], str]
) -> None:
    """In a child, try each graph and say what came of it: what is wrong in words, else nothing.

    `try_graph` begins its attempt right before it opens the graph. What keeps the caller's modules
    from being imported says nothing of a graph.
    """
    attempts = [Attempt(name, channel) for name in request.ids]
    try:
        register_ops(request.ops, request.search)
    except HubaotiError as error:
        for attempt in attempts:
            attempt.report(f"{error}", ErrorRecord(NotTried.__name__, f"{error}"))
        return
    for attempt in attempts:
        try:
            attempt.report(try_graph(attempt))
        except HubaotiError as error:
            attempt.report(f"{error}", ErrorRecord.of(error))


def main() -> None:
    """The child that opens graphs of an artifact."""
    import torch

    channel = join_parent(is_awaited=True)
    request: _ArtifactRequest = channel.receive(_ArtifactRequest)
    path, graphs = (Path(os.fsdecode(each)) for each in (request.path, request.graphs))
    manifest = parse_manifest((path / FILENAME).read_bytes(), str(path))
    artifact = Artifact(manifest.digest, path, graphs, manifest)
    report_opens(channel, request, partial(_try_graph, artifact, torch.device(request.device)))


def _try_graph(artifact: Artifact, device: torch.device, attempt: Attempt) -> str:
    """Open a graph of an artifact and compare its golden answers: what is wrong, else nothing."""
    import torch

    from hubaoti.runtime import golden
    from hubaoti.runtime.gpus import computes
    from hubaoti.runtime.graph import open_graph
    from hubaoti.runtime.kernels import open_kernels

    entry = next(each for each in artifact.manifest.graphs if each.id == attempt.graph)
    if kernels := artifact.manifest.requires.kernels:
        attempt.begin(of_kernel=True)
        open_kernels(kernels, artifact.kernels, device)
    attempt.begin()
    try:
        graph = open_graph(artifact.graph_folder(entry), entry, device)
        if entry.golden is None:
            attempt.opened = True
            return ""
        expected = golden.load_expected(entry, artifact.path)
        attempt.note_opened()
        found = golden.ask_golden(graph, artifact.path)
    except torch.OutOfMemoryError as error:  # of a GPU: others have the rest of it
        hint = "free some of the GPU's memory: a graph is not opened before it was tried"
        raise NotEnoughMemory(f"graph {entry.id}: {first_line(error)}", hint=hint) from error
    if not computes(device):
        return ""
    attempt.compared = True
    return "; ".join(golden.compare_golden_answers(found, expected, entry.golden.tolerances))
