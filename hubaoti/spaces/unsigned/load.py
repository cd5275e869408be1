"""Packages without a manifest: whom they serve, and what a worker does before it opens one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.package import holds_members
from hubaoti.artifact.schema import Graph
from hubaoti.attachment.attach import Attachment
from hubaoti.attachment.first_call import Verdicts
from hubaoti.attachment.stats import CallStats
from hubaoti.errors import HubaotiError, MissingConstant, NoMatch, Quarantined
from hubaoti.host.probe import Host
from hubaoti.hub.errors import hide_stored_login
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.runtime.first_open import RETRY, OpenHistory, name_host_kind
from hubaoti.settings import Settings
from hubaoti.spaces.deferred import Deferred
from hubaoti.spaces.devices import choose_serving_device
from hubaoti.spaces.unsigned.fetch import Fetched, NoDigests, Package
from hubaoti.spaces.unsigned.first_open import (
    fetch_kernels,
    open_package_in_child,
    register_kernels,
)
from hubaoti.spaces.unsigned.outcomes import CallOutcomes
from hubaoti.spaces.unsigned.region import UnsignedRegion, open_package
from hubaoti.spaces.worker import build_worker_host

# A package, and the modules that it serves, by path.
_Served = tuple[Graph, dict[str, nn.Module]]


def _hide_login_from_kernels(fetched: Fetched, settings: Settings) -> AbstractContextManager[None]:
    """While the kernels library asks the Hub for what packages call, if they call anything."""
    return hide_stored_login(settings) if fetched.kernels else nullcontext()


def _warn_without_digests(fetched: Fetched) -> None:
    """Warn of what nobody can check: the packages' bytes, and whom they were made for."""
    kernels = "".join(f", and calls the kernel {each['repo_id']}" for each in fetched.kernels)
    warnings.warn(
        f"{fetched.repo} at {fetched.commit} has packages without a manifest{kernels}: no "
        "digests say which bytes its publisher meant, and nothing for which module and calls they "
        "were made. Each call of a new look is answered by the module first, and compared",
        NoDigests,
        stacklevel=3,
    )


def _match_packages(module: nn.Module, fetched: Fetched) -> tuple[_Served, ...]:
    """The packages that serve modules of this model, one at least, with these modules."""
    found = ((graph, _find_modules(module, package)) for package, graph in fetched.packages)
    served = tuple((graph, modules) for graph, modules in found if modules)
    if not served:
        names = ", ".join(package.path for package, _ in fetched.packages)
        raise MissingConstant(
            f"{type(module).__name__} has no module that {names} of {fetched.repo} would serve",
            hint="load the packages of this very model; nothing was changed",
        )
    return served


def _find_modules(module: nn.Module, package: Package) -> dict[str, nn.Module]:
    """The modules of a class; or the one at a path, or each child of a list there."""
    where = package.module
    if where is None:
        named = module.named_modules()
        return {path: part for path, part in named if type(part).__name__ == package.cls}
    try:
        part = module.get_submodule(where)
    except AttributeError as error:
        raise MissingConstant(
            f"{type(module).__name__} has no {where}, for which there is a package",
            hint="load the packages of this very model; nothing was changed",
        ) from error
    if not _is_list(part):
        return {where: part}
    return {f"{where}.{name}".removeprefix("."): child for name, child in part.named_children()}


def _is_list(part: nn.Module) -> bool:
    """Whether a package at a module's path is for each of its children.

    `spaces` means all that can be walked through, `aokit` lists only; a sequence of unequal parts
    can only be meant as one.
    """
    if isinstance(part, nn.Sequential):
        return len(part) > 1 and len({type(child) for child in part}) == 1
    return isinstance(part, nn.ModuleList)


@dataclass(frozen=True, slots=True)
class _UnsignedWorker:
    """All that a process needs to open packages for a module."""

    served: tuple[_Served, ...]
    fetched: Fetched
    host: Host
    settings: Settings
    strict: bool
    outcomes: CallOutcomes
    verdicts: Verdicts
    ops: tuple[str, ...] = ()

    def open(self, module: nn.Module) -> Attachment:
        """Attach all packages; or none, where one was changed, or cannot be loaded here.

        No index and no digest is asked whose they are, so each process asks of their publishers.
        """
        self.fetched.require_trusted(Trust(self.settings.trust))
        device = choose_serving_device(module)
        with _hide_login_from_kernels(self.fetched, self.settings):
            self._require_all_sound(device)
            register_kernels(self.fetched.kernels)
        regions = [*self._open_regions(device)]
        tally = CallStats(None, self.strict)
        for region in regions:
            region.put(tally.count_miss, self.outcomes)
        return Attachment(module, regions, tally)

    def _open_regions(self, device: torch.device) -> Iterator[UnsignedRegion]:
        """Each module's own container over the library that all share."""
        for graph, modules in self.served:
            for path, module in modules.items():
                runner = open_package(self._folder(graph), graph.members, graph.id, device)
                yield UnsignedRegion(path, module, graph, runner, device)

    def _require_all_sound(self, device: torch.device) -> None:
        """See that nothing speaks against opening these packages here.

        Where another worker has asked, the files alone are looked at: a worker may be killed at any
        moment, and most of them shall not even touch the index.
        """
        graphs, host = [graph for graph, _ in self.served], name_host_kind(device)
        for graph in graphs:
            if self.verdicts.is_sound(_make_unopened_key(graph), host):
                raise HubaotiError(
                    f"{graph.id} could not be opened by another worker",
                    hint="see what that one said",
                )
        known = all(self.verdicts.is_sound(graph.sha256, host) for graph in graphs)
        if known and all(holds_members(self._folder(graph), graph) for graph in graphs):
            return
        with Mirror.open(self.settings.mirror) as mirror:
            for graph in graphs:
                self._require_sound(graph, mirror, device)
        for graph in graphs:
            self.verdicts.remember(graph.sha256, host)

    def _require_sound(self, graph: Graph, mirror: Mirror, device: torch.device) -> None:
        """See that a package is what was pulled, is for this host, and can be loaded at all."""
        mirror.verify_graph(graph)
        folder = self._folder(graph)
        if misfit := describe_misfit(
            _read_package_metadata(folder, graph), build_worker_host(self.host, device), device
        ):
            raise NoMatch(f"{graph.id} {misfit}", hint="use packages that were built for this host")
        tried = OpenHistory.on(mirror, device, self.ops)
        problem = tried.find_problem(graph)
        if problem is None:
            tried.require_ops(graph)
            verdict = open_package_in_child(folder, graph, device, self.fetched.kernels, self.ops)
            if not verdict.is_loadable:  # each request would ask a new process again
                self.verdicts.remember(_make_unopened_key(graph), tried.hosts[0])
            tried.settle(verdict, graph)
            problem = verdict.problem
        if problem:
            mirror.quarantine(graph)
            raise Quarantined(
                f"{graph.id}: {problem}",
                hint=f"ask its publisher; where this machine was to blame: {RETRY}",
            )

    def _folder(self, graph: Graph) -> Path:
        """The folder of the mirror in which a package lies unpacked."""
        return self.settings.mirror / "graphs" / graph.sha256


def _make_unopened_key(graph: Graph) -> str:
    """The name under which it is remembered that a package cannot be opened on a kind of host."""
    return f"{graph.sha256} unopened"


def _read_package_metadata(folder: Path, graph: Graph) -> dict[str, Any]:
    """What torch wrote into a package about the host that built it."""
    metadata: dict[str, Any] = {}
    for member in graph.members:
        if member.path.endswith("_metadata.json"):
            try:
                found = json.loads((folder / member.path).read_bytes())
            except ValueError:
                continue
            metadata |= found if isinstance(found, dict) else {}
    return metadata


def describe_misfit(metadata: dict[str, Any], host: Host, device: torch.device) -> str | None:
    """Why a package cannot run here, as far as it says; None where nothing speaks against it."""
    sm = "".join(filter(str.isdigit, str(metadata.get("AOTI_COMPUTE_CAPABILITY", ""))))
    pairs = {
        "device": (metadata.get("AOTI_DEVICE_KEY"), device.type),
        "operating system": (metadata.get("AOTI_PLATFORM"), host.os),
        "machine": (metadata.get("AOTI_MACHINE"), host.machine),
    }
    if host.gpus:
        pairs["GPU"] = (sm and f"sm_{sm}", f"sm_{host.gpus[0].sm}")
    for what, (built, here) in pairs.items():
        if built and built != here:
            return f"was built for the {what} {built}; here is {here}"
    wide = "AVX512" in str(metadata.get("AOTI_CPU_ISA", "")) and device.type == "cpu"
    if wide and host.level != "x86_64_v4":
        return f"was built for AVX-512; here is {host.level}"
    return None


def defer_unsigned(
    module: nn.Module,
    fetched: Fetched,
    host: Host,
    settings: Settings,
    *,
    strict: bool,
    ops: Sequence[str] = (),
) -> Deferred:
    """The module, waiting for a process that calls it."""
    served = _match_packages(module, fetched)
    _warn_without_digests(fetched)
    with _hide_login_from_kernels(fetched, settings):
        fetch_kernels(fetched.kernels)
    names = ((graph.sha256, _make_unopened_key(graph)) for graph, _ in served)
    worker = _UnsignedWorker(
        served=served,
        fetched=fetched,
        host=host,
        settings=settings,
        strict=strict,
        outcomes=CallOutcomes(),
        verdicts=Verdicts((name, "") for pair in names for name in pair),
        ops=(*ops,),
    )
    modules = {path: part for _, parts in served for path, part in parts.items()}
    tally = CallStats(None, strict)
    return Deferred(module, modules, worker.open, tally, only_elsewhere=settings.zerogpu)
