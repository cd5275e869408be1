"""The first open of a graph on this kind of host, in a process of its own: only it may crash.

Before a graph is opened in this process, its bytes are those that its manifest names; and one that
came from elsewhere was opened once by a child, in which it answered its golden questions, for which
no weights are needed. What could not be opened there is not opened here either.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    MissingDependency,
    MissingOps,
    NotEnoughMemory,
    NotTried,
    Quarantined,
    rebuild_error,
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
from hubaoti.mirror import Artifact, Mirror
from hubaoti.progress import Progress
from hubaoti.runtime.custom_ops import register_ops

if TYPE_CHECKING:
    import torch

RETRY = "hubaoti mirror retry"  # forgets verdicts, and brings back what has the right bytes
OPEN_SECONDS = 300.0  # for one graph, the start of a process included
_BASE = 600 << 20  # bytes of a process that has torch
_LONGEST = 2000  # characters of what is wrong with a graph
# Of the system, or of what a process has registered or installed.
_UNOPENED = (CannotOpen.__name__, MissingOps.__name__, MissingDependency.__name__)


def require_sound(
    artifact: Artifact,
    mirror: Mirror,
    device: torch.device,
    progress: Progress,
    ops: Sequence[str] = (),
) -> None:
    """See that an artifact's graphs may be opened here; what was tried before is remembered.

    What was built on this machine was compared with eager when it was built; it may have crashed
    since. The modules `ops` are imported, here and where graphs are tried.

    Raises:
        DigestMismatch: a file was changed; it is in quarantine.
        Quarantined: a graph crashes, or answers otherwise than where it was built.
        CannotOpen: the system does not load one. MissingOps: one calls ops that nobody registers.
        NotTried: what tried one was ended. NotEnoughMemory: there is too little to try it.
    """
    mirror.verify(artifact)
    history = OpenHistory.on(mirror, device, ops)
    graphs = {graph.id: graph for graph in artifact.manifest.graphs}
    known = {name: history.find_problem(graph) for name, graph in graphs.items()}
    _refuse_problems({name: problem for name, problem in known.items() if problem}, artifact)
    if mirror.index.is_built(artifact.digest):
        return
    waiting = [graph for graph in graphs.values() if known[graph.id] is None]
    if not waiting:
        return
    for graph in waiting:
        history.require_ops(graph)
    progress("first open")
    verdicts = open_in_child(artifact.path, artifact.graphs, waiting, device, ops)
    for verdict in verdicts:
        if verdict.graph not in graphs:
            raise NotTried(
                f"a first open told of graph {verdict.graph!r:.80}, which was not tried",
                hint="nothing was opened here; pull another variant, or compile the model here",
            )
        history.settle(verdict, graphs[verdict.graph])
    _refuse_problems({each.graph: each.problem for each in verdicts if each.problem}, artifact)


@dataclass(frozen=True, slots=True)
class OpenHistory:
    """What first opens came to on a kind of host, with the modules whose ops a caller has.

    What went well without such modules, or crashed, does so with them; what did with them, with
    these alone.
    """

    mirror: Mirror
    hosts: tuple[str, ...]
    ops: tuple[str, ...]

    @classmethod
    def on(cls, mirror: Mirror, device: torch.device, ops: Sequence[str]) -> OpenHistory:
        """What is known on the host of a device; the caller's modules are imported.

        Raises:
            BadRequest, MissingOps: they cannot be.
        """
        from hubaoti.runtime.threads import measure_threads

        state, host = register_ops(ops), name_host_kind(device)
        if device.type == "cpu":
            measure_threads(mirror.index, host)
        return cls(mirror, (host, f"{host} ops {state}") if ops else (host,), (*ops,))

    def find_problem(self, graph: Graph) -> str | None:
        """What is wrong with a graph, empty where nothing is; None if it was never opened."""
        found = (self.mirror.index.find_problem(graph.sha256, host) for host in self.hosts)
        return next((each for each in found if each is not None), None)

    def require_ops(self, graph: Graph) -> None:
        """See that a graph was not found to call ops that nobody registers.

        Raises:
            MissingOps: it was.
        """
        if problem := self.mirror.index.find_problem(_make_missing_ops_key(graph), self.hosts[-1]):
            raise self._make_missing_ops(problem)

    def settle(self, verdict: OpenVerdict, graph: Graph) -> None:
        """Note what came of a first open, and keep apart what must not be opened.

        Raises:
            CannotOpen, MissingOps: it was not opened there, and is not opened here.
            NotTried, NotEnoughMemory: nothing that says anything of its graph.
        """
        error = verdict.error
        if error and error.kind == MissingOps.__name__:
            self._remember(_make_missing_ops_key(graph), verdict.problem)
            raise self._make_missing_ops(verdict.problem)
        if error and (error.kind == NotEnoughMemory.__name__ or not verdict.opened):
            raise rebuild_error(error.kind, verdict.problem, error.hint)
        if not verdict.lasting:
            raise NotTried(
                f"the first open of graph {graph.id}: {verdict.problem}",
                hint="try again, with more memory if it took too much; it was not opened here, and "
                "nothing is held against it",
            )
        self._remember(graph.sha256, verdict.problem)
        if verdict.problem:
            self.mirror.quarantine(graph)

    def _remember(self, graph: str, problem: str) -> None:
        if self.mirror.index.is_writable:
            self.mirror.index.record_tested(graph, self.hosts[-1], problem)

    def _make_missing_ops(self, problem: str) -> MissingOps:
        """The ops of a graph that nobody registers, and what to do about it."""
        from hubaoti.runtime.graph import NAME_OPS

        named = f", which {' and '.join(self.ops)} did not register" if self.ops else ""
        return MissingOps(
            f"{problem}{named}", hint=f"{NAME_OPS}; it was not opened (to have it tried: {RETRY})"
        )


def _make_missing_ops_key(graph: Graph) -> str:
    """The name under which it is remembered that a graph's ops are not registered."""
    return f"{graph.sha256} lacks ops"


def _refuse_problems(problems: Mapping[str, str], artifact: Artifact) -> None:
    """Refuse an artifact whose graphs have problems."""
    if problems:
        message = "; ".join(f"graph {graph}: {problem}" for graph, problem in problems.items())
        raise Quarantined(
            f"artifact {artifact.digest[:12]} failed its first open on this host: {message}",
            hint="it is not opened; pull another variant, compile the model here, or use --eager; "
            f"where this machine was to blame: {RETRY}",
        )


@dataclass(frozen=True, slots=True)
class OpenVerdict:
    """What came of a graph's first open; `problem` is empty where it answers as it should.

    Only a crash and a wrong answer are `lasting`: all else may have been this moment's, as a
    process that was ended from outside, or too little memory. `error` stands where there was no
    answer but one.
    """

    graph: str
    problem: str = ""
    lasting: bool = True
    error: ErrorRecord | None = None

    @property
    def opened(self) -> bool:
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
    """What a child says of a graph: that it begins with it, or what came of it."""

    graph: str
    problem: str | None = None
    error: ErrorRecord | None = None
    is_limited: bool = False


def open_in_child(
    path: Path,
    graphs: Path,
    entries: Sequence[Graph],
    device: torch.device,
    ops: Sequence[str] = (),
    patience: float = OPEN_SECONDS,
) -> list[OpenVerdict]:
    """Open each graph of the artifact at `path` in a child, and compare its golden answers.

    `graphs` has the unpacked packages by their sha256; the caller has verified both. A child that
    takes more than `patience` seconds for each graph is ended. After a verdict that does not last,
    the graphs behind it have none.

    Raises:
        NotEnoughMemory: a graph's answers take more than is free here.
    """
    for entry in entries:
        _require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[OpenVerdict] = []
    while waiting and all(each.lasting or not each.opened for each in verdicts):
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
            problem = report.problem[:_LONGEST]
            yield OpenVerdict(report.graph, problem, report.error is None, report.error)
    if not left:
        return
    if is_garbled:
        problem = "its process said what is no answer of ours"
        yield OpenVerdict(begun.graph if begun else left[0], problem, lasting=False)
    elif begun is None:  # nothing, for it was not even begun with
        last = f": {output.last}" if output.last else ""
        problem = f"before it was opened, {describe_exit(output.code)}{last}"
        yield OpenVerdict(left[0], problem, lasting=False)
    else:  # nothing, unless it crashed there, and not for memory
        lasting = -output.code in CRASHES and not begun.is_limited
        yield OpenVerdict(begun.graph, describe_exit(output.code), lasting)


def report_opens(
    channel: Channel, request: OpenRequest, try_graph: Callable[[str, Callable[[], None]], str]
) -> None:
    """In a child, try each graph and say what came of it: what is wrong in words, else nothing.

    `try_graph` calls what it is given right before it opens the graph, which is blamed from then
    on. What keeps the caller's modules from being imported says nothing of a graph.
    """
    try:
        register_ops(request.ops, request.search)
    except HubaotiError as error:
        record = ErrorRecord(NotTried.__name__, f"{error}")
        for name in request.ids:
            channel.send(OpenReport(name, record.message, record))
        return
    for name in request.ids:
        begin = partial(channel.send, OpenReport(name, is_limited=is_limited()))
        try:
            report = OpenReport(name, try_graph(name, begin))
        except HubaotiError as error:
            report = OpenReport(name, f"{error}", ErrorRecord.of(error))
        channel.send(report)


def main() -> None:
    """The child that opens graphs of an artifact."""
    import torch

    from hubaoti.runtime import golden
    from hubaoti.runtime.graph import open_graph

    channel = join_parent(is_awaited=True)
    request: _ArtifactRequest = channel.receive(_ArtifactRequest)
    path, graphs = (Path(os.fsdecode(each)) for each in (request.path, request.graphs))
    manifest = parse_manifest((path / FILENAME).read_bytes(), str(path))
    entries = {entry.id: entry for entry in manifest.graphs}

    def try_graph(name: str, begin: Callable[[], None]) -> str:
        entry = entries[name]
        begin()
        graph = open_graph(graphs / entry.sha256, entry, torch.device(request.device))
        if entry.golden is None:
            return ""
        expected = golden.load_expected(entry, path)
        found = golden.ask_golden(graph, path)
        return "; ".join(golden.compare_golden_answers(found, expected, entry.golden.tolerances))

    report_opens(channel, request, try_graph)


def name_host_kind(device: torch.device) -> str:
    """What a verdict holds for: this torch, and this kind of processor."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"{name} {torch.cuda.get_device_capability(device)}"
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {platform.machine()} {kind} torch {torch.__version__}"
