"""What is asked of an artifact before a graph of it is opened in this process.

Its bytes are those that its manifest names; and a graph that came from elsewhere was opened once on
this kind of host by a process of its own, in which it answered its golden questions. What could not
be opened there is not opened here either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import Graph
from hubaoti.errors import (
    BadRequest,
    MissingOps,
    NotEnoughMemory,
    NotTried,
    Quarantined,
    rebuild_error,
)
from hubaoti.mirror import Artifact, Mirror
from hubaoti.progress import Progress

if TYPE_CHECKING:
    import torch

    from hubaoti.runtime.first_open_child import OpenVerdict

RETRY = "hubaoti mirror retry"  # forgets verdicts, and brings back what has the right bytes


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
    from hubaoti.runtime.first_open_child import OPEN_SECONDS, open_in_child

    tried = OpenHistory.on(mirror, device, ops)
    graphs = {graph.id: graph for graph in artifact.manifest.graphs}
    known = {name: tried.problem(graph) for name, graph in graphs.items()}
    _refuse_problems({name: problem for name, problem in known.items() if problem}, artifact)
    if mirror.index.is_built(artifact.digest):
        return
    waiting = [graph for graph in graphs.values() if known[graph.id] is None]
    if not waiting:
        return
    for graph in waiting:
        tried.require_ops(graph)
    progress("first open")
    verdicts = open_in_child(artifact.path, artifact.graphs, waiting, device, OPEN_SECONDS, ops)
    for verdict in verdicts:
        if verdict.graph not in graphs:
            raise NotTried(
                f"a first open told of graph {verdict.graph!r:.80}, which was not tried",
                hint="nothing was opened here; pull another variant, or compile the model here",
            )
        tried.settle(verdict, graphs[verdict.graph])
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
        from hubaoti.runtime.custom_ops import register_ops
        from hubaoti.runtime.first_open_child import name_host_kind
        from hubaoti.runtime.threads import measure_threads

        state, host = register_ops(ops), name_host_kind(device)
        if device.type == "cpu":
            measure_threads(mirror.index, host)
        return cls(mirror, (host, f"{host} ops {state}") if ops else (host,), (*ops,))

    def problem(self, graph: Graph) -> str | None:
        """What is wrong with a graph, empty where nothing is; None if it was never opened."""
        told = (self.mirror.index.find_problem(graph.sha256, host) for host in self.hosts)
        return next((each for each in told if each is not None), None)

    def require_ops(self, graph: Graph) -> None:
        """See that a graph was not found to call ops that nobody registers.

        Raises:
            MissingOps: it was.
        """
        if problem := self.mirror.index.find_problem(_make_missing_ops_key(graph), self.hosts[-1]):
            raise self._missing(problem)

    def settle(self, verdict: OpenVerdict, graph: Graph) -> None:
        """Note what came of a first open, and keep apart what must not be opened.

        Raises:
            CannotOpen, MissingOps: it was not opened there, and is not opened here.
            NotTried, NotEnoughMemory: nothing that says anything of its graph.
        """
        if verdict.kind == MissingOps.__name__:
            self._remember(_make_missing_ops_key(graph), verdict.problem)
            raise self._missing(verdict.problem)
        if verdict.kind == NotEnoughMemory.__name__ or not verdict.opened:
            raise rebuild_error(verdict.kind, verdict.problem, verdict.hint)
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

    def _missing(self, problem: str) -> MissingOps:
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
    """Refuse an artifact whose graphs have problems.

    Raises:
        Quarantined: with all of them.
    """
    if problems:
        message = "; ".join(f"graph {graph}: {problem}" for graph, problem in problems.items())
        raise Quarantined(
            f"artifact {artifact.digest[:12]} failed its first open on this host: {message}",
            hint="it is not opened; pull another variant, compile the model here, or use --eager; "
            f"where this machine was to blame: {RETRY}",
        )


def refuse_parts(artifact: Artifact) -> None:
    """Refuse an artifact whose graphs are parts of a model: alone they answer no text.

    Raises:
        BadRequest: it is one.
    """
    manifest = artifact.manifest
    if not manifest.is_whole:
        served = sum(len(graph.modules) for graph in manifest.graphs if not graph.order)
        raise BadRequest(
            f"the artifact was built for {manifest.program.task}, its graphs serve {served} blocks "
            "of a model and not the whole of it",
            hint=("go on with prompts: --prompt; " if manifest.program.task == "generate" else "")
            + "for texts, compile with --task embed, classify or logits and --regions none",
        )
