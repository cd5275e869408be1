"""What a worker does at its first call: judge the device that it was given, and open what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.variant import Recipe
from hubaoti.attachment import attach
from hubaoti.attachment.first_call import Verdicts
from hubaoti.attachment.module_guard import list_traits
from hubaoti.attachment.served_modules import find_module_device
from hubaoti.attachment.stats import CallStats
from hubaoti.errors import HubaotiError, NoMatch, NotEnoughMemory, NotTried, OtherProgram
from hubaoti.host.match import judge
from hubaoti.host.probe import Host
from hubaoti.hub.pull_all import Offer, rank_offers
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.artifact import has_kernels, is_whole
from hubaoti.mirror.policy import Evidence, decide
from hubaoti.mirror.trust import Trust
from hubaoti.program.adapters import separate_adapters
from hubaoti.progress import report_nothing
from hubaoti.runtime import gpus
from hubaoti.runtime.first_open import name_host_kind, require_sound
from hubaoti.runtime.kernels import open_kernels
from hubaoti.settings import Settings
from hubaoti.spaces import devices
from hubaoti.spaces.deferred import Deferred


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """An artifact that may serve a module: where, and whether the module is known to be its own."""

    offer: Offer
    paths: tuple[str, ...]
    known: bool


@dataclass(frozen=True, slots=True)
class _Worker:
    """All that a process needs to open graphs for a module, found out by the one before it."""

    plans: tuple[WorkerPlan, ...]
    host: Host
    settings: Settings
    recipe: Recipe | None
    strict: bool
    verdicts: Mapping[str, Verdicts]
    evidence: Mapping[str, Evidence]
    traits: Mapping[str, Mapping[str, Any]]  # of the modules by their paths, when they were loaded
    ops: tuple[str, ...] = ()

    def open(self, module: nn.Module) -> attach.Attachment:
        """Attach the best of what fits this process's device; what fails there is passed over.

        Where nothing fits, or none can be opened, every reason is told; NotTried: it may be later.
        """
        problems: dict[str, HubaotiError] = {}
        for plan in self._rank_plans(devices.choose_serving_device(module)):
            try:
                return self._attach(module, plan)
            except HubaotiError as error:
                hint = f" ({error.hint})" if error.hint else ""
                problems[f"{plan.offer.place}: {error}{hint}"] = error
        passing = any(isinstance(error, NotTried | NotEnoughMemory) for error in problems.values())
        kind = NotTried if passing else HubaotiError
        raise kind("; ".join(problems), hint="see what is said of each artifact")

    def _rank_plans(self, device: torch.device) -> list[WorkerPlan]:
        """The plans for a device, the best first."""
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
        if others := ", ".join(str(offer.place) for offer in offers if offer not in same):
            reasons.append(f"the module is on {device.type}, {others} is for another device")
        raise NoMatch("; ".join(reasons), hint="compile and push an artifact for this kind of host")

    def _attach(self, module: nn.Module, plan: WorkerPlan) -> attach.Attachment:
        """The graphs of one artifact, checked once more where they are opened."""
        self._require_same(module, plan)
        artifact = plan.offer.artifact
        device = find_module_device(module, artifact.manifest.target.device)
        self._require_sound(artifact, device)
        parts = attach.Parts(artifact.manifest, artifact.path, artifact.graph_folder)
        verdicts = self.verdicts[artifact.digest]
        return attach.attach_graphs(
            module, parts, strict=self.strict, tries=not plan.known, verdicts=verdicts
        )

    def _require_same(self, module: nn.Module, plan: WorkerPlan) -> None:
        """See that modules compute as they did when they were compared with the artifact.

        Raises:
            OtherProgram: one was changed since.
        """
        for path in plan.paths:
            if _list_own_traits(module.get_submodule(path)) != self.traits[path]:
                raise OtherProgram(
                    f"{path or 'the module'} was changed since it was loaded",
                    hint="change it before spaces.load",
                )

    def _require_sound(self, artifact: Artifact, device: torch.device) -> None:
        """As everywhere; where another worker has asked, the files alone are looked at.

        A worker may be killed at any moment, and most of them shall not even touch the index. What
        was said since of whose code may run here, each hears.
        """
        verdicts, host = self.verdicts[artifact.digest], name_host_kind(device)
        is_known = verdicts.is_sound(artifact.digest, host) and self._is_allowed(artifact)
        if is_known and is_whole(artifact) and has_kernels(artifact):
            open_kernels(artifact.manifest.requires.kernels, artifact.kernels, device)
            return
        with Mirror.open(self.settings.mirror) as mirror:
            require_sound(artifact, mirror, device, report_nothing, self.ops)
        verdicts.remember(artifact.digest, host)

    def _is_allowed(self, artifact: Artifact) -> bool:
        """Whether what is known of it is enough; if not, the index may say more by now."""
        said = Trust(self.settings.trust).read()
        return decide(self.evidence[artifact.digest], said).allowed


def _list_own_traits(module: nn.Module) -> Mapping[str, Any]:
    """What a module computes by, beside its tensors and its adapters."""
    return list_traits(separate_adapters(module)[0])


def build_worker_host(host: Host, device: torch.device) -> Host:
    """The host as a worker has it: with the GPU that its torch sees."""
    if device.type != "cuda":
        return host
    driver = host.driver_cuda or devices.query_driver_cuda()
    return replace(host, gpus=(gpus.query_gpu(device),), driver_cuda=driver)


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
    manifests = [plan.offer.artifact.manifest for plan in plans]
    verdicts = {}
    for each in manifests:
        names = [(path, graph.id) for graph in each.graphs for path in graph.modules]
        verdicts[each.digest] = Verdicts([(each.digest, ""), *names])
    with Mirror.open(settings.mirror) as mirror:
        evidence = {each.digest: mirror.gather_evidence(each.digest) for each in manifests}
    modules = {path: module.get_submodule(path) for plan in plans for path in plan.paths}
    traits = {path: _list_own_traits(each) for path, each in modules.items()}
    known = verdicts, evidence, traits
    worker = _Worker(tuple(plans), host, settings, recipe, strict, *known, (*ops,))
    tally = CallStats(manifests[0], strict)
    return Deferred(module, modules, worker.open, tally, only_elsewhere=settings.zerogpu)
