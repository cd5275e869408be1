"""ZeroGPU: a module whose graphs are planned where there is no GPU, and opened where there is one.

A Space's main process has no GPU; each call that needs one runs in a forked worker, which is ended
without a word. So the main process pulls, verifies and plans, and each worker opens for itself, at
its first call, what fits the GPU that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubaoti.artifact.variant import Recipe
from hubaoti.errors import HubaotiError
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.host.probe import Host, probe_host
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.lockfile import find_lock
from hubaoti.hub.pull import Puller
from hubaoti.hub.pull_all import (
    Offer,
    artifact_device,
    choose_artifacts,
    find_pulled,
    pull_fleet,
    read_branch_catalogs,
    read_revision_catalog,
)
from hubaoti.mirror import Mirror
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings
from hubaoti.spaces.unsigned.fetch import Fetched, fetch_packages, find_packages
from hubaoti.spaces.unsigned.fetch import NoDigests as NoDigests

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.spaces.deferred import Deferred
    from hubaoti.spaces.worker import WorkerPlan


def load(  # noqa: PLR0913 - a face of keywords
    module: nn.Module,
    repo: str,
    *,
    revision: str | None = None,
    recipe: str | None = None,
    variant: str | None = None,
    trust: bool = False,
    strict: bool = False,
    ops: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Deferred:
    """Have a repo's graphs answer for a module, in each process that calls it.

    Call it at import, beside the model, before any worker is forked. Every artifact that fits this
    host in all but its GPU is pulled and verified, and the module's tensors are compared with what
    the graphs need. A process that calls the module opens the artifact that fits its own device
    best, once; what no graph serves is answered by the module itself, counted, and warned of once
    for each reason. In a ZeroGPU Space the main process opens nothing: it may not touch the GPU.

    A repo of packages that `spaces` and `aokit` read is loaded, too, with the warning `NoDigests`;
    `variant` chooses among `{BlockClass}.{variant}` folders.

    `ops` are modules of the caller's that register the ops which graphs call: they are imported
    here, and where a graph is tried.

    Raises:
        NoMatch: nothing fits this host, with every reason; NoArtifact: the repo has nothing.
        Untrusted: its publisher is not trusted here; `trust=True` remembers that it is.
        OtherProgram, MissingConstant: the module is not the one that was compiled; nothing changed.
        AlreadyAttached: it has graphs already. BadRequest: it is no module, or the repo no name.
        MissingOps: a module of `ops` cannot be imported.
    """
    require_flags(trust=trust, strict=strict)
    require("spaces.load", "run")
    settings = settings or Settings.from_env()
    ref = RepoRef.parse(repo) if revision is None else RepoRef(repo, revision)
    from hubaoti.attachment.attach import refuse_attached, require_module
    from hubaoti.spaces.deferred import defer_nothing

    require_module(module)
    refuse_attached(module)
    if not settings.graphs:
        return defer_nothing(module)
    from hubaoti.runtime.custom_ops import register_ops

    register_ops(ops)
    host = probe_host(settings)
    wanted = None if recipe is None else Recipe.parse(recipe)
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(
            mirror,
            settings,
            host,
            recipe=wanted,
            trust=trust,
            lock=find_lock(False, settings),
            progress=progress,
        )
        found = _pull_candidates(puller, ref, module, variant)
    progress("plan")
    if isinstance(found, Fetched):
        from hubaoti.spaces.unsigned import load

        return load.defer_unsigned(module, found, host, settings, strict=strict, ops=ops)
    from hubaoti.spaces.worker import defer_artifacts

    plans = plan_modules(module, found)
    return defer_artifacts(module, plans, host, settings, strict=strict, recipe=wanted, ops=ops)


def _pull_candidates(
    puller: Puller, ref: RepoRef, module: nn.Module, variant: str | None
) -> tuple[Offer, ...] | Fetched:
    """The artifacts that may serve a module on this host, in the mirror; or packages of others."""
    if puller.client.is_offline:
        return find_pulled(puller, ref)
    catalogs = [read_revision_catalog(puller, ref)]
    kinds = _choose_device_kinds(module, puller.host)
    packages = None if puller.lock else find_packages(catalogs[0], variant)  # they have no digest
    if not catalogs[0].artifacts and packages:
        return fetch_packages(puller, ref, catalogs[0], packages, variant)
    found = {artifact_device(each) for each in choose_artifacts(puller, catalogs[0], kinds)}
    if ref.revision is None and found != kinds:
        catalogs += read_branch_catalogs(puller, ref)
    return pull_fleet(puller, ref, catalogs, kinds)


def _choose_device_kinds(module: nn.Module, host: Host) -> frozenset[str]:
    """The kinds of device on which a module may be called on this host.

    One that is on the CPU now may be moved by a worker that has a GPU.
    """
    from hubaoti.attachment.served_modules import find_device_kind

    if find_device_kind(module) == "cuda":
        return frozenset({"cuda"})
    has_cuda = host.torch is not None and host.torch.cuda is not None
    return frozenset({"cpu", "cuda"} if has_cuda else {"cpu"})


def plan_modules(module: nn.Module, offers: Sequence[Offer]) -> list[WorkerPlan]:
    """Which modules each artifact serves; those of other models are left out.

    Raises:
        OtherProgram, MissingConstant, BadRequest: all are of other models.
    """
    from hubaoti.attachment.served_modules import find_served_modules, list_misfits_anywhere
    from hubaoti.program.identity import matches_program
    from hubaoti.spaces.worker import WorkerPlan

    plans, problems = [], []
    for offer in offers:
        manifest = offer.artifact.manifest
        try:
            known = matches_program(module, manifest.program, manifest.is_whole)
            served = find_served_modules(module, manifest, "load", list_misfits_anywhere)
            plans.append(WorkerPlan(offer, tuple(each.path for each in served), known))
        except HubaotiError as error:
            problems.append(error)
    if not plans:
        raise problems[0]
    return plans
