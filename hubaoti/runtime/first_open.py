"""The first open of a graph on this kind of host, in a process of its own: only it may crash.

Before a graph is opened in this process, its bytes are those that its manifest names; and one that
came from elsewhere, or is for a GPU, was opened once by a child, in which it answered its golden
questions, for which no weights are needed. What could not be opened there is not opened here
either. On a device that computes nothing, answers say nothing, and nothing is remembered.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.schema import Graph
from hubaoti.errors import MissingOps, NotEnoughMemory, NotTried, Quarantined, rebuild_error
from hubaoti.host.confinement import list_gaps
from hubaoti.mirror import Artifact, Mirror
from hubaoti.progress import Progress
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.runtime.open_child import OpenVerdict, open_in_child

if TYPE_CHECKING:
    import torch

RETRY = "hubaoti mirror retry"  # forgets verdicts, and brings back what has the right bytes
_WITHOUT_KERNEL = (
    "pull a recipe that calls no kernel, as hubaoti pull REPO --recipe bfloat16-sdpa, compile the "
    "model with --attention sdpa"
)


def require_sound(
    artifact: Artifact,
    mirror: Mirror,
    device: torch.device,
    progress: Progress,
    ops: Sequence[str] = (),
) -> None:
    """See that an artifact's graphs may be opened here; what was tried before is remembered.

    What was built on this machine for its CPU was compared with eager when it was built; it may
    have crashed since. What is for a GPU was built where none computes. The modules `ops` are
    imported, here and where graphs are tried, and the kernels that it pins are loaded.

    Raises:
        Untrusted, Blocked: its code may not run here, whoever opens it.
        DigestMismatch: a file was changed; it is in quarantine.
        KernelMissing, KernelDigestMismatch: of a kernel; else as `runtime.kernels.open_kernels`.
        NoMatch: the device is of another kind than the graphs are for.
        LimitsExceeded: its manifest claims more than is allowed here.
        Quarantined: a graph crashes, or answers otherwise than where it was built.
        CannotOpen: the system does not load one. MissingOps: one calls ops that nobody registers.
        NotTried: what tried one was ended. NotEnoughMemory: there is too little to try it.
    """
    from hubaoti.runtime.kernels import judge_kernels, open_kernels

    mirror.require_allowed(artifact.digest)
    mirror.leases.hold(artifact.digest)
    kernels = artifact.manifest.requires.kernels
    judge_kernels(kernels, device)
    mirror.verify(artifact)
    history = OpenHistory.on(mirror, device, ops, artifact)
    waiting = find_untried(artifact, history)
    if waiting and not (device.type == "cpu" and mirror.index.is_built(artifact.digest)):
        _try_graphs(artifact, waiting, history, device, progress)
    open_kernels(kernels, artifact.kernels, device)
    mirror.usage.record_open(artifact.digest)


def _try_graphs(
    artifact: Artifact,
    graphs: Sequence[Graph],
    history: OpenHistory,
    device: torch.device,
    progress: Progress,
) -> None:
    """Have graphs opened by a child, and note what came of it."""
    verdicts = open_first(artifact, graphs, history, device, progress)
    by_id = {graph.id: graph for graph in graphs}
    for verdict in verdicts:
        history.settle(verdict, by_id[verdict.graph])
    refuse_problems({each.graph: each.problem for each in verdicts if each.problem}, artifact)


def find_untried(artifact: Artifact, history: OpenHistory) -> list[Graph]:
    """The graphs of an artifact that were never opened on this kind of host.

    Raises:
        LimitsExceeded: it was built elsewhere, and claims more than is allowed here.
        Quarantined: one of the others was, and has a problem.
    """
    graphs, mirror = artifact.manifest.graphs, history.mirror
    if not mirror.index.is_built(artifact.digest):
        mirror.trust.read().limits.require(graphs)
    known = {graph.id: history.find_problem(graph) for graph in graphs}
    refuse_problems({name: problem for name, problem in known.items() if problem}, artifact)
    return [graph for graph in graphs if known[graph.id] is None]


def open_first(
    artifact: Artifact,
    graphs: Sequence[Graph],
    history: OpenHistory,
    device: torch.device,
    progress: Progress,
) -> list[OpenVerdict]:
    """Have a child open graphs of an artifact whose bytes were verified; nothing is noted yet.

    Raises:
        NoMatch: the device is of another kind than they are for. MissingOps: it is known that one
            calls ops that nobody registers.
        NotTried: the child told of other graphs. NotEnoughMemory: there is too little to try one.
    """
    _require_gpu(artifact, device)
    for graph in graphs:
        history.require_ops(graph)
    progress("first open")
    for gap in list_gaps():
        progress(gap)
    verdicts = open_in_child(artifact.path, artifact.graphs, graphs, device, history.ops)
    names = {graph.id for graph in graphs}
    for verdict in verdicts:
        if verdict.graph not in names:
            raise NotTried(
                f"a first open told of graph {verdict.graph!r:.80}, which was not tried",
                hint="nothing was opened here; pull another variant, or compile the model here",
            )
    return verdicts


def _require_gpu(artifact: Artifact, device: torch.device) -> None:
    """See that a GPU is of the kind that an artifact is for: who attaches names it."""
    from hubaoti.runtime.gpus import require_gpu

    require_gpu(artifact.manifest.requires, device)


@dataclass(frozen=True, slots=True)
class OpenHistory:
    """What first opens came to on a kind of host, with the modules whose ops a caller has.

    It is of the graphs as an `artifact` has them: what one is called with, which kernels it calls
    and what it has to answer is in its manifest, and a stranger's may say it falsely of somebody
    else's package. A package without a manifest is asked nothing.
    What went well without such modules, or crashed, does so with them; what did with them, with
    these alone. Of a device that computes nothing, nothing is kept.
    """

    mirror: Mirror
    hosts: tuple[str, ...]
    ops: tuple[str, ...]
    artifact: Artifact | None = None
    is_kept: bool = True

    @classmethod
    def on(
        cls,
        mirror: Mirror,
        device: torch.device,
        ops: Sequence[str],
        artifact: Artifact | None = None,
    ) -> OpenHistory:
        """What is known on the host of a device; the caller's modules are imported.

        Raises:
            BadRequest, MissingOps: they cannot be.
        """
        from hubaoti.runtime.gpus import computes
        from hubaoti.runtime.threads import measure_threads

        state, host = register_ops(ops), name_host_kind(device)
        if device.type == "cpu":
            measure_threads(mirror.index, host)
        hosts = (host, f"{host} ops {state}") if ops else (host,)
        return cls(mirror, hosts, (*ops,), artifact, is_kept=computes(device))

    def find_problem(self, graph: Graph) -> str | None:
        """What is wrong with a graph, empty where nothing is; None if it was never opened."""
        name = name_tested(graph, self.artifact)
        found = (self.mirror.index.find_problem(name, host) for host in self.hosts)
        return next((each for each in found if each is not None), None)

    def require_ops(self, graph: Graph) -> None:
        """See that a graph was not found to call ops that nobody registers.

        Raises:
            MissingOps: it was.
        """
        if problem := self.mirror.index.find_problem(self._name_missing_ops(graph), self.hosts[-1]):
            raise self._make_missing_ops(problem)

    def settle(self, verdict: OpenVerdict, graph: Graph) -> None:
        """Note what came of a first open, and keep apart what must not be opened.

        Raises:
            CannotOpen, MissingOps: it was not opened there, and is not opened here.
            NotTried, NotEnoughMemory: nothing that says anything of its graph.
        """
        error = verdict.error
        if error and error.kind == MissingOps.__name__:
            self._remember(self._name_missing_ops(graph), verdict.problem)
            raise self._make_missing_ops(verdict.problem)
        if error and (error.kind == NotEnoughMemory.__name__ or not verdict.is_loadable):
            raise rebuild_error(error.kind, verdict.problem, error.hint)
        if not verdict.lasting:
            raise NotTried(
                f"the first open of graph {graph.id}: {verdict.problem}",
                hint="try again, with more memory if it took too much; it was not opened here, and "
                "nothing is held against it",
            )
        self._remember(name_tested(graph, self.artifact), verdict.problem)
        if verdict.problem and self.is_kept and not verdict.of_kernel:
            if self.artifact is None:
                self.mirror.quarantine(graph)
            else:
                self.mirror.withdraw(self.artifact)

    def _remember(self, name: str, problem: str) -> None:
        if self.is_kept and self.mirror.index.is_writable:
            self.mirror.index.record_tested(name, self.hosts[-1], problem)

    def _name_missing_ops(self, graph: Graph) -> str:
        """The name under which it is remembered that a graph's ops are not registered."""
        return f"{name_tested(graph, self.artifact)} lacks ops"

    def _make_missing_ops(self, problem: str) -> MissingOps:
        """The ops of a graph that nobody registers, and what to do about it."""
        from hubaoti.runtime.graph_ops import NAME_OPS

        named = f", which {' and '.join(self.ops)} did not register" if self.ops else ""
        return MissingOps(
            f"{problem}{named}", hint=f"{NAME_OPS}; it was not opened (to have it tried: {RETRY})"
        )


def name_tested(graph: Graph, artifact: Artifact | None) -> str:
    """The name under which it is remembered what came of a graph, as an artifact has it."""
    return graph.sha256 if artifact is None else f"{graph.sha256} of {artifact.digest}"


def refuse_problems(problems: Mapping[str, str], artifact: Artifact) -> None:
    """See that there is nothing that is held against an artifact's graphs, by their ids.

    Raises:
        Quarantined: there is.
    """
    if problems:
        message = "; ".join(f"graph {graph}: {problem}" for graph, problem in problems.items())
        kernels = [pin.full_name for pin in artifact.manifest.requires.kernels]
        if unnamed := [name for name in kernels if name not in message]:
            message += f"; it calls the kernel {' and '.join(unnamed)}"
        other = _WITHOUT_KERNEL if kernels else "pull another variant, compile the model here"
        raise Quarantined(
            f"artifact {artifact.digest[:12]} failed its first open on this host: {message}",
            hint=f"it is not opened; {other}, or use --eager; "
            f"where this machine was to blame: {RETRY}",
        )


def name_host_kind(device: torch.device) -> str:
    """What a verdict holds for: this torch, and this kind of processor."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"{name} {torch.cuda.get_device_capability(device)}"
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {platform.machine()} {kind} torch {torch.__version__}"
