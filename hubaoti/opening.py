"""What is asked of an artifact before a graph of it is opened in this process.

Its bytes are those that its manifest names; and a graph that came from elsewhere was opened once on
this kind of host by a process of its own, in which it answered its golden questions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubaoti.errors import HubaotiError, Quarantined
from hubaoti.manifest import Graph
from hubaoti.mirror import Artifact, Mirror
from hubaoti.steps import Say

if TYPE_CHECKING:
    import torch

    from hubaoti.runtime.selftest import Verdict


def require_sound(artifact: Artifact, mirror: Mirror, device: torch.device, say: Say) -> None:
    """See that an artifact's graphs may be opened here; what was tried before is remembered.

    What was built on this machine was compared with eager when it was built; it may have crashed
    since.

    Raises:
        DigestMismatch: a file was changed; it is in quarantine.
        Quarantined: a graph crashes, or answers otherwise than where it was built.
        NotEnoughMemory: there is too little to try it.
    """
    mirror.verify(artifact)
    from hubaoti.runtime.selftest import kind_of_host, selftest
    from hubaoti.runtime.threads import learn

    host = kind_of_host(device)
    if device.type == "cpu":
        learn(mirror.index, host)
    known = {
        graph.id: mirror.index.tested(graph.sha256, host) for graph in artifact.manifest.graphs
    }
    refuse({graph: problem for graph, problem in known.items() if problem}, artifact)
    if mirror.index.is_built(artifact.digest):
        return
    waiting = [graph for graph in artifact.manifest.graphs if known[graph.id] is None]
    if not waiting:
        return
    say("first open")
    told = selftest(artifact.path, artifact.graphs, waiting, device)
    verdicts = [verdict for verdict in told if verdict.opened]
    remember(verdicts, {graph.id: graph for graph in waiting}, mirror, host)
    refuse({each.graph: each.problem for each in verdicts if each.problem}, artifact)


def remember(verdicts: list[Verdict], graphs: dict[str, Graph], mirror: Mirror, host: str) -> None:
    """Note what came of first opens, and keep apart what must not be opened.

    Raises:
        HubaotiError: a process was ended from outside, which says nothing of its graph; or it told
            of another graph.
    """
    for verdict in verdicts:
        graph = graphs.get(verdict.graph)
        if graph is None:
            raise HubaotiError(
                f"a first open told of graph {verdict.graph!r:.80}, which was not tried",
                hint="nothing was opened here; pull another variant, or compile the model here",
            )
        if not verdict.lasting:
            raise HubaotiError(
                f"the first open of graph {graph.id}: {verdict.problem}",
                hint="free some memory and try again; the graph was not opened here",
            )
        if mirror.index.is_writable:
            mirror.index.record_tested(graph.sha256, host, verdict.problem)
        if verdict.problem:
            mirror.quarantine(graph)


def refuse(problems: dict[str, str], artifact: Artifact) -> None:
    """Refuse an artifact whose graphs have problems.

    Raises:
        Quarantined: with all of them.
    """
    if problems:
        told = "; ".join(f"graph {graph}: {problem}" for graph, problem in problems.items())
        raise Quarantined(
            f"artifact {artifact.digest[:12]} failed its first open on this host: {told}",
            hint="it is not opened; pull another variant, compile the model here, or use --eager",
        )
