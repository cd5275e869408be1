"""The verb that looks again: is what is stored still whole, and does it open here as it should?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.api.attaching import put, require_kernels
from hubaoti.api.mirroring import find_rows, is_digest
from hubaoti.artifact.bundle import Bundle, find_bundles
from hubaoti.artifact.repo_name import is_repo
from hubaoti.artifact.schema import Graph
from hubaoti.errors import BadRequest, DigestMismatch, HubaotiError, NoMatch
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.host.match import judge
from hubaoti.host.probe import Host, probe_host
from hubaoti.mirror import Artifact, Mirror, Row
from hubaoti.progress import Progress, report_nothing
from hubaoti.runtime.first_open import OpenHistory, find_untried, open_first, refuse_problems
from hubaoti.runtime.open_child import OpenVerdict
from hubaoti.settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class GraphVerdict:
    """What came of a graph's open on a device; `problem` is empty where all is well.

    It was `opened` where it got as far as its first call, and `compared` where its answers were
    with the golden ones. A problem that is `lasting` is held against the graph on this host.
    """

    graph: str
    opened: bool
    compared: bool
    problem: str
    lasting: bool
    device: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found of an artifact; `error` is None where all is well.

    `graphs` has those that were opened, and those that were to be.
    """

    digest: str
    recipe: str
    variant: str
    error: HubaotiError | None = None
    graphs: tuple[GraphVerdict, ...] = ()


def verify(
    what: str | Path | None = None,
    *,
    opens: bool = False,
    device: str | None = None,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> list[Verified]:
    """Hash artifacts again; with `opens`, open each of their graphs again.

    `what` is a bundle or a folder of bundles, an artifact of the mirror by the beginning of its
    digest, or what was pulled from a repo, at a full commit id if one is named; None is all that
    the mirror has. Graphs are opened as for the first time: in a child, on the CPU or on the GPU
    that fits best unless a `device` is named, and what came of it is remembered. What is held
    against a graph already stays so. A bundle that is opened is put into the mirror.

    Raises:
        NoArtifact: the mirror has nothing of this name. BadManifest: a folder is no bundle.
        BadRequest: what is asked for is neither a repo nor a digest.
    """
    require_flags(opens=opens)
    settings = settings or Settings.from_env()
    host = None
    if opens:
        require("verify --open", "run")
        host = probe_host(settings)
    with Mirror.open(settings.mirror) as mirror:
        look = _Look(mirror, settings, host, device, (*ops,), progress)
        return [look.at(each) for each in _find(what, mirror, settings)]


def _find(what: str | Path | None, mirror: Mirror, settings: Settings) -> Sequence[Row | Bundle]:
    """What is called so: a folder goes before a digest, and that before a repo."""
    if what is None:
        return mirror.ls()
    if what == "":
        raise BadRequest("'' names nothing", hint="name a bundle's folder, a digest or a repo")
    path = Path(what)
    if isinstance(what, Path) or path.is_dir() or (path.suffix == ".tar" and path.is_file()):
        return find_bundles(path)
    if not is_digest(what) and not is_repo(what.partition("@")[0]):
        hint = "name a bundle's folder, a digest as hubaoti mirror ls has it, or owner/name"
        raise BadRequest(f"{what} is no folder here, no digest and no repo", hint=hint)
    return find_rows(what, mirror, settings)


@dataclass(frozen=True, slots=True)
class _Look:
    """How artifacts are looked at; opened only where there is a host to judge them for."""

    mirror: Mirror
    settings: Settings
    host: Host | None
    device: str | None
    ops: tuple[str, ...]
    progress: Progress

    def at(self, found: Row | Bundle) -> Verified:
        """What comes of an artifact; an error is its own affair, and hides no other."""
        verified = _name(found)
        self.progress(f"hashing {verified.digest[:12]}")
        try:
            artifact = self._hash(found)
            if artifact is None or self.host is None:
                return verified
            return self._open(artifact, verified, self.host)
        except HubaotiError as error:
            return replace(verified, error=error)

    def _hash(self, found: Row | Bundle) -> Artifact | None:
        """Compare all bytes with the manifest; the artifact, where it is in the mirror.

        Raises:
            DigestMismatch, BadPackage: they are others. Untrusted, Blocked: it may not be opened.
        """
        if isinstance(found, Bundle):
            found.check()
            if self.host is None:
                return None
            self.mirror.require_allowed(found.manifest.digest)
            return put(found, self.mirror)
        artifact = self.mirror.artifact(found.digest)
        if artifact is None:
            raise DigestMismatch(
                f"artifact {found.digest[:12]} has not all of its files any more",
                hint="get it again as it came: pull, compile or import it",
            )
        self.mirror.verify_own(artifact)
        if self.host is not None:
            self.mirror.require_allowed(artifact.digest)
            return artifact
        for pin in artifact.manifest.requires.kernels:
            if self.mirror.has_kernel(pin):  # what was built here needs none before it is opened
                self.mirror.verify_kernel(pin)
        return artifact

    def _open(self, artifact: Artifact, verified: Verified, host: Host) -> Verified:
        """Open all graphs of an artifact whose bytes are right, and note what came of it."""
        graphs = {graph.id: graph for graph in artifact.manifest.graphs}
        try:
            device = _choose_device(artifact, host, self.device)
            require_kernels(artifact, self.mirror, self.settings, self.progress)
            for pin in artifact.manifest.requires.kernels:
                self.mirror.verify_kernel(pin)
        except HubaotiError as error:  # of all of them
            where = self.device or artifact.manifest.target.device
            refused = (
                _describe(OpenVerdict(name, f"{error}", lasting=False), where) for name in graphs
            )
            return replace(verified, error=error, graphs=tuple(refused))
        history = OpenHistory.on(self.mirror, device, self.ops, artifact)
        find_untried(artifact, history)
        found = open_first(artifact, [*graphs.values()], history, device, self.progress)
        errors = [_settle(each, graphs[each.graph], history, artifact) for each in found]
        known = {each.graph: each for each in found}
        return replace(
            verified,
            error=next(filter(None, errors), None),
            graphs=tuple(_describe(known.get(name, _untried(name)), device) for name in graphs),
        )


def _name(found: Row | Bundle) -> Verified:
    """An artifact, of which nothing is wrong so far."""
    if isinstance(found, Row):
        return Verified(found.digest, found.recipe, found.variant)
    manifest = found.manifest
    return Verified(manifest.digest, str(manifest.recipe), str(manifest.variant))


def _choose_device(artifact: Artifact, host: Host, wanted: str | None) -> torch.device:
    """Where an artifact is opened, which has to be a host that it was built for."""
    from hubaoti.runtime.gpus import choose_device, query_gpu

    manifest = artifact.manifest
    device = choose_device(manifest, wanted)
    gpus = (query_gpu(device),) if device.type == "cuda" else host.gpus
    if refusals := judge(manifest.requires, replace(host, gpus=gpus)).refusals:
        reasons = "; ".join(f"needs {each.need}, here is {each.have}" for each in refusals)
        raise NoMatch(f"artifact {artifact.digest[:12]} {reasons}", hint=refusals[0].advice)
    return device


def _settle(
    verdict: OpenVerdict, graph: Graph, history: OpenHistory, artifact: Artifact
) -> HubaotiError | None:
    """Note a verdict; the error that an attach would raise of it."""
    try:
        history.settle(verdict, graph)
        refuse_problems({graph.id: verdict.problem} if verdict.problem else {}, artifact)
    except HubaotiError as error:
        return error
    return None


def _untried(graph: str) -> OpenVerdict:
    problem = "it was not tried, since one before it came to nothing"
    return OpenVerdict(graph, problem, lasting=False)


def _describe(verdict: OpenVerdict, device: torch.device | str) -> GraphVerdict:
    return GraphVerdict(
        graph=verdict.graph,
        opened=verdict.opened,
        compared=verdict.compared,
        problem=verdict.problem,
        lasting=bool(verdict.problem) and verdict.lasting,
        device=f"{device}",
    )
