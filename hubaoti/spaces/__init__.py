"""ZeroGPU: a module whose graphs are planned where there is no GPU, and opened where there is one.

A Space's main process has no GPU; each call that needs one runs in a forked worker, which is ended
without a word. So the main process pulls, verifies and plans, and each worker opens for itself, at
its first call, what fits the GPU that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hubaoti.errors import HubaotiError
from hubaoti.extras import require
from hubaoti.host import Host, probe
from hubaoti.hub.client import HubClient
from hubaoti.hub.fleet import (
    Offer,
    branch_catalogs,
    chosen_of,
    device_in,
    first_catalog,
    pull_fleet,
    pulled_before,
)
from hubaoti.hub.foreign import Fetched, fetch, packages_in
from hubaoti.hub.foreign import NoDigests as NoDigests
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import Puller
from hubaoti.hub.trust import Trust
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings
from hubaoti.steps import Say, silent
from hubaoti.variant import Recipe

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.runtime.waiting import Deferred
    from hubaoti.spaces.worker import Plan


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
    say: Say = silent,
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
        AlreadyAttached: it has graphs already.
        MissingOps: a module of `ops` cannot be imported.
    """
    require("spaces.load", "run")
    settings = settings or Settings.from_env()
    ref = reference(repo, revision)
    from hubaoti.runtime.attach import refuse_attached
    from hubaoti.runtime.waiting import nothing

    refuse_attached(module)
    if not settings.graphs:
        return nothing(module)
    from hubaoti.runtime.ops import register

    register(ops)
    host = probe(settings)
    asked = None if recipe is None else Recipe.parse(recipe)
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(
            mirror=mirror,
            client=HubClient(settings, say),
            trusted=Trust(settings.trust),
            host=host,
            recipe=asked,
            trust=trust,
            say=say,
        )
        found = brought(puller, ref, module, variant)
    say("plan")
    if isinstance(found, Fetched):
        from hubaoti.spaces import loose

        return loose.deferred(module, found, host, settings, strict=strict, ops=ops)
    from hubaoti.spaces.worker import deferred

    plans = plans_of(module, found)
    return deferred(module, plans, host, settings, strict=strict, recipe=asked, ops=ops)


def reference(repo: str, revision: str | None) -> RepoRef:
    """The repo, at a revision that may stand in its name or beside it.

    Raises:
        BadRequest: a part is malformed.
    """
    return RepoRef.parse(repo) if revision is None else RepoRef(repo, revision)


def brought(
    puller: Puller, ref: RepoRef, module: nn.Module, variant: str | None
) -> tuple[Offer, ...] | Fetched:
    """The artifacts that may serve a module on this host, in the mirror; or packages of others.

    Raises:
        HubaotiError: as `pull` raises.
    """
    if puller.client.is_offline:
        return pulled_before(puller, ref)
    catalogs, kinds = [first_catalog(puller, ref)], kinds_for(module, puller.host)
    if not catalogs[0].artifacts and (packages := packages_in(catalogs[0], variant)):
        return fetch(puller, ref, catalogs[0], packages, variant)
    found = {device_in(each) for each in chosen_of(puller, catalogs[0], kinds)}
    if ref.revision is None and found != kinds:
        catalogs += branch_catalogs(puller, ref)
    return pull_fleet(puller, ref, catalogs, kinds)


def kinds_for(module: nn.Module, host: Host) -> frozenset[str]:
    """The kinds of device on which a module may be called on this host.

    One that is on the CPU now may be moved by a worker that has a GPU.
    """
    from hubaoti.runtime.planned import kind_of

    if kind_of(module) == "cuda":
        return frozenset({"cuda"})
    has_cuda = host.torch is not None and host.torch.cuda is not None
    return frozenset({"cpu", "cuda"} if has_cuda else {"cpu"})


def plans_of(module: nn.Module, offers: Sequence[Offer]) -> list[Plan]:
    """Which modules each artifact serves; those of other models are left out.

    Raises:
        OtherProgram, MissingConstant, BadRequest: all are of other models.
    """
    from hubaoti.compiler.program import is_program_of
    from hubaoti.runtime.planned import planned
    from hubaoti.spaces.worker import Plan

    plans, problems = [], []
    for offer in offers:
        manifest = offer.artifact.manifest
        try:
            known = is_program_of(module, manifest.program, manifest.is_whole)
            plans.append(Plan(offer, tuple(planned(module, manifest)), known))
        except HubaotiError as why:
            problems.append(why)
    if not plans:
        raise problems[0]
    return plans
