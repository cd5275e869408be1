"""What a worker does at its first call: judge the device that it was given, and open what fits."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import HubaotiError, NoMatch, NotEnoughMemory, NotTried
from hubaoti.host.match import judge
from hubaoti.host.probe import Gpu, Host
from hubaoti.hub.pull_all import Offer, rank_offers
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.store import is_whole
from hubaoti.progress import report_nothing
from hubaoti.runtime.first_open import require_sound
from hubaoti.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hubaoti.attachment.attach import Attachment
    from hubaoti.attachment.first_call import Verdicts
    from hubaoti.attachment.served_modules import Spot
    from hubaoti.spaces.deferred import Deferred


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """An artifact that may serve a module: where, and whether the module is known to be its own."""

    offer: Offer
    spots: tuple[Spot, ...]
    known: bool


@dataclass(frozen=True, slots=True)
class Worker:
    """All that a process needs to open graphs for a module, found out by the one before it."""

    module: weakref.ref[nn.Module]
    plans: tuple[WorkerPlan, ...]
    host: Host
    settings: Settings
    recipe: Recipe | None
    strict: bool
    verdicts: Mapping[str, Verdicts]
    ops: tuple[str, ...] = ()

    def open(self) -> Attachment:
        """Attach the best of what fits this process's device; what fails there is passed over.

        Raises:
            NoMatch: nothing fits, with every reason.
            HubaotiError: what fits cannot be opened, with every reason; NotTried: it may be later.
        """
        from hubaoti.spaces.devices import choose_serving_device

        module = self.module()
        assert module is not None  # it is being called
        problems: dict[str, HubaotiError] = {}
        for plan in self._fitting(choose_serving_device(module)):
            try:
                return self._attached(module, plan)
            except HubaotiError as error:
                hint = f" ({error.hint})" if error.hint else ""
                problems[f"{plan.offer.place}: {error}{hint}"] = error
        passing = any(isinstance(error, NotTried | NotEnoughMemory) for error in problems.values())
        kind = NotTried if passing else HubaotiError
        raise kind("; ".join(problems), hint="see what is said of each artifact")

    def _fitting(self, device: torch.device) -> list[WorkerPlan]:
        """The plans for a device, the best first.

        Raises:
            NoMatch: there is none.
        """
        host = build_worker_host(self.host, device)
        plans = {plan.offer.place: plan for plan in self.plans}
        offers = tuple(plan.offer for plan in self.plans)
        same = tuple(o for o in offers if o.artifact.manifest.target.device == device.type)
        found, verdicts = rank_offers(same, lambda needs: judge(needs, host), self.recipe)
        if found:
            return [plans[offer.place] for offer in found]
        reasons = [
            f"{place} needs {refusal.need}, here is {refusal.have}"
            for place, verdict in verdicts.items()
            for refusal in verdict.refusals
        ]
        others = ", ".join(str(offer.place) for offer in offers if offer not in same)
        reasons += (
            [f"the module is on {device.type}, {others} is for another device"] if others else []
        )
        raise NoMatch("; ".join(reasons), hint="compile and push an artifact for this kind of host")

    def _attached(self, module: nn.Module, plan: WorkerPlan) -> Attachment:
        """The graphs of one artifact, checked once more where they are opened."""
        from hubaoti.attachment import attach as runtime

        artifact = plan.offer.artifact
        device = runtime.find_module_device(module, artifact.manifest.target.device)
        self._require_sound(artifact, device)
        parts = runtime.Parts(artifact.manifest, artifact.path, artifact.graph_folder)
        tries, trials = not plan.known, self.verdicts[artifact.digest].trials
        return runtime.attach_graphs(module, parts, strict=self.strict, tries=tries, trials=trials)

    def _require_sound(self, artifact: Artifact, device: torch.device) -> None:
        """As everywhere; where another worker has asked, the files alone are looked at.

        A worker may be killed at any moment, and most of them shall not even touch the index.
        """
        from hubaoti.runtime.first_open import name_host_kind

        verdicts, host = self.verdicts[artifact.digest], name_host_kind(device)
        if verdicts.is_sound(artifact.digest, host) and is_whole(artifact):
            return
        with Mirror.open(self.settings.mirror) as mirror:
            require_sound(artifact, mirror, device, report_nothing, self.ops)
        verdicts.remember(artifact.digest, host)


def build_worker_host(host: Host, device: torch.device) -> Host:
    """The host as a worker has it: with the GPU that its torch sees."""
    if device.type != "cuda":
        return host
    from hubaoti.spaces.devices import query_driver_cuda, query_gpu

    name, sm, memory = query_gpu(device)
    driver = host.driver_cuda or query_driver_cuda()
    return replace(host, gpus=(Gpu(name, sm, memory),), driver_cuda=driver)


def defer_artifacts(  # noqa: PLR0913 - all that a worker needs
    module: nn.Module,
    plans: Sequence[WorkerPlan],
    host: Host,
    settings: Settings,
    *,
    strict: bool,
    recipe: Recipe | None,
    ops: Sequence[str] = (),
) -> Deferred:
    """The module, waiting for a process that calls it."""
    from hubaoti.attachment.first_call import Verdicts
    from hubaoti.attachment.stats import CallStats
    from hubaoti.spaces.deferred import Deferred

    artifacts = [plan.offer.artifact for plan in plans]
    verdicts = {each.digest: Verdicts(_list_verdict_names(each.manifest)) for each in artifacts}
    worker = Worker(
        weakref.ref(module), tuple(plans), host, settings, recipe, strict, verdicts, (*ops,)
    )
    preload_for_workers()
    spots = {spot.path: spot for plan in plans for spot in plan.spots}
    return Deferred(
        module,
        spots.values(),
        worker.open,
        CallStats(artifacts[0].manifest, strict),
        only_elsewhere=settings.zerogpu,
        single=is_single(module),
    )


def _list_verdict_names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The artifact, and each region's graphs by path and id."""
    yield manifest.digest, ""
    for graph in manifest.graphs:
        yield from ((path, graph.id) for path in graph.modules)


def is_single(module: nn.Module) -> bool:
    """Whether forked children may compute on the CPU, where they cannot use their parent's threads.

    One that moves the module to a GPU has one thread for the rest: slow is better than a hang.
    """
    from hubaoti.attachment.served_modules import device_kind

    return device_kind(module) != "cuda"


def preload_for_workers() -> None:
    """Import what each worker needs, once for all that are forked from here."""
    for name in ("torch._dynamo", "hubaoti.runtime.graph", "hubaoti.spaces.devices"):
        import_module(name)
