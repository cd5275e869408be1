"""Attach: a module's regions answer by their graphs; everything else about it stays.

All or nothing: whatever the graphs need is looked for in the module before anything of it is
touched. What is bound is bound by reference, so the module holds its weights once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.sizes import format_count
from hubaoti.attachment.binding import ConstantBinding
from hubaoti.attachment.dispatch import Dispatcher
from hubaoti.attachment.first_call import FirstCallCheck, Verdicts
from hubaoti.attachment.forward_patch import GraphPatch, find_patch
from hubaoti.attachment.quantized import ConstantSketches, refuse_other_layers
from hubaoti.attachment.region import Region
from hubaoti.attachment.replays import StepReplays
from hubaoti.attachment.served_modules import (
    Misfit,
    ServedModule,
    find_module_device,
    find_served_modules,
    name_first,
)
from hubaoti.attachment.stats import CallStats
from hubaoti.errors import (
    AlreadyAttached,
    BadRequest,
    MissingConstant,
    NotAttached,
    NotEnoughMemory,
    OtherProgram,
    first_line,
)
from hubaoti.runtime.call_template import takes_containers
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.graph import Graph, open_graph
from hubaoti.runtime.weights import load_shipped_tensors

# transformers asks the model itself whether `generate` compiles it (generation/utils.py, 5.22).
_AUTO_COMPILE = "_valid_auto_compile_criteria"
_SEES_CONTAINERS = 3  # the version of builds that carry what a module leaves in its call


@dataclass(frozen=True, slots=True)
class Parts:
    """An artifact that was verified: where its small tensors lie, and each graph unpacked."""

    manifest: Manifest
    path: Path
    graph_folder: Callable[[Entry], Path]


class Attachment:
    """What was attached to a module: counts, other weights, and the way back."""

    def __init__(
        self,
        module: nn.Module,
        regions: Iterable[GraphPatch],
        tally: CallStats,
    ) -> None:
        self._module = weakref.ref(module)
        self._regions = tuple(regions)
        self._tally = tally
        self._replays: StepReplays | None = None

    def __repr__(self) -> str:
        module, stats = self._module(), self.stats()
        name = "a module that is gone" if module is None else type(module).__name__
        artifact = f"artifact {stats['artifact'][:12]}" if stats["artifact"] else "no artifact"
        counts = f"{stats['compiled']} calls compiled, {stats['eager']} eager"
        regions = format_count(len(self._regions), "region")
        return f"Attachment({name}, {artifact}, {regions}, {counts})"

    @property
    def regions(self) -> tuple[str, ...]:
        """The paths of the modules that graphs answer for."""
        return tuple(region.path for region in self._regions)

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The open graphs of all regions; packages without a manifest are none."""
        each = (graph for region in self._regions for graph in region.graphs)
        return tuple(graph for graph in each if isinstance(graph, Graph))

    def replay_steps(self, device: torch.device) -> None:
        """Capture a decoder's steps in CUDA graphs from here on, and replay them.

        Raises:
            NotEnoughMemory: there is too little to begin; the module has everything back.
        """
        module = self._module()
        assert module is not None
        regions = [region for region in self._regions if isinstance(region, Region)]
        try:
            self._replays = StepReplays(module, regions, device)
        except RuntimeError as error:  # of the driver
            self.detach()
            raise NotEnoughMemory(
                f"no CUDA graph can be made: {first_line(error)}",
                hint="free some of the GPU's memory, or leave cuda_graphs=True out",
            ) from error
        self._replays.put(self._tally.count_miss)

    def rebind(self) -> None:
        """Bind the module's tensors as they are now, as after other weights were loaded.

        A region also notices by itself, at its next call, when a tensor of it was replaced or
        moved; this says at once whether all of them fit.

        Raises:
            MissingConstant: some do not; their regions are answered by the module until they do.
        """
        problems = []
        if self._replays is not None:
            self._replays.forget()
        for region in self._regions:
            try:
                region.bind(anew=True)
            except CannotServe as error:
                problems.append(f"{region.path}: {error}")
        if problems:
            raise MissingConstant(
                f"{len(problems)} regions cannot be bound: {name_first(problems)}",
                hint="until they can, the module itself answers for them",
            )

    def detach(self) -> None:
        """Give the module everything back; a second time does nothing."""
        if self._replays is not None:
            self._replays.remove()
        for region in self._regions:
            region.remove()
        module = self._module()
        if module is not None and isinstance(vars(module).get(_AUTO_COMPILE), _Uncompiled):
            delattr(module, _AUTO_COMPILE)
        self._regions = ()

    def stats(self) -> dict[str, Any]:
        """Calls by region: how many each graph answered, how many the module, and why.

        Where first calls were answered by the module beside a graph, `compared` has how many; they
        count as neither. `missed` has the sizes of the calls that no graph could serve, once for
        all regions that share graphs and with the most that was `filled` of a cache. Steps that
        were replayed are counted under `cuda_graphs` alone, where they were asked for. It is plain
        JSON.
        """
        found = self._tally.stats(
            {region.path: region.counts() for region in self._regions},
            {region.path: region.compared() for region in self._regions},
        )
        return found if self._replays is None else {**found, "cuda_graphs": self._replays.stats()}

    def save_misses(self, path: str | Path) -> None:
        """Write `stats` to a file, for `hubaoti compile --from-misses`."""
        self._tally.save(self.stats(), Path(path))

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach_graphs(
    module: nn.Module,
    parts: Parts,
    *,
    strict: bool,
    tries: bool,
    quantize: bool = False,
    verdicts: Verdicts | None = None,
) -> Attachment:
    """Have the graphs of an artifact answer for the regions of a module.

    With `tries`, the first call of each graph is answered by the module, and compared; `verdicts`
    are of other processes that have done so. With `strict`, a call that no graph serves
    raises. With `quantize`, the weights that the graphs have quantized are replaced in the module,
    too.

    Raises:
        AlreadyAttached: it has graphs already, or a module within it has.
        BadRequest: the artifact answers texts, serves no module, or was built for another kind of
            device; what is to be quantized is not quantized in the artifact, or cannot be in the
            module.
        MissingConstant: the module lacks tensors that the graphs need, or has others; the first
            are named. Nothing was touched.
    """
    manifest = parts.manifest
    refuse_attached(module)
    tally = CallStats(manifest, strict)
    bound = _bind_modules(module, parts, ConstantSketches() if quantize else None)
    regions = [*_open_regions(bound, parts)]
    for region in regions:
        if quantize:
            region.inside.quantize()
        _bind_first(region)
    # Compiled before anybody looked at what modules leave in containers.
    is_old = manifest.build.version < _SEES_CONTAINERS
    for region in regions:
        # What no graph reads may still be computed with: a config tells of no bias that was added.
        all_of_them = tries or region.inside.more
        entries = region.dispatcher.entries
        tried = (e.id for e in entries if all_of_them or (is_old and takes_containers(e.call)))
        region.put(tally.count_miss, FirstCallCheck(tried, region.path, verdicts))
    if hasattr(module, _AUTO_COMPILE):
        setattr(module, _AUTO_COMPILE, _Uncompiled(module))
    return Attachment(module, regions, tally)


def has_steps(manifest: Manifest) -> bool:
    """Whether an artifact's graphs are a decoder's blocks on a GPU, so that steps are captured."""
    is_whole = any("" in graph.modules for graph in manifest.graphs)
    is_decoder = manifest.program.task == "generate" and not is_whole
    return is_decoder and manifest.target.device == "cuda"


def require_steps(module: nn.Module, manifest: Manifest) -> None:
    """Refuse to capture the decoding steps of what has none.

    Raises:
        BadRequest: with what it is.
    """
    if manifest.target.device != "cuda":
        raise BadRequest(
            "the artifact's graphs are for a CPU, where there are no CUDA graphs",
            hint="leave cuda_graphs=True out, or attach one that was compiled for this GPU",
        )
    if not has_steps(manifest):
        raise BadRequest(
            f"{type(module).__name__} is not attached by the blocks of a decoder, so it has no "
            "steps to capture",
            hint="leave cuda_graphs=True out; torch.cuda.graph captures a call of it",
        )


def attach_nothing(module: nn.Module) -> Attachment:
    """An attachment without graphs: the module answers everything itself, as it did."""
    return Attachment(module, (), CallStats(None, False))


def detach_graphs(module: nn.Module) -> None:
    """Give a module everything back that `attach_graphs` took.

    Raises:
        NotAttached: nothing was attached to it.
    """
    regions = [*find_regions(module)]
    replays = find_patch(module)
    if not regions:
        raise NotAttached(f"{type(module).__name__} has no graphs attached", hint="nothing to do")
    if isinstance(replays, StepReplays):
        replays.remove()
    Attachment(module, regions, CallStats(None, False)).detach()


def find_regions(module: nn.Module) -> Iterator[Region]:
    """The regions that are attached to a module and all within it."""
    found = map(find_patch, module.modules())
    return (each for each in found if each is not None and not isinstance(each, StepReplays))


def require_module(module: object) -> None:
    """Refuse what is no module.

    Raises:
        BadRequest: with its kind.
    """
    if not isinstance(module, nn.Module):
        raise BadRequest(
            f"a {type(module).__name__} is no module",
            hint="give a torch.nn.Module; of a pipeline one of its modules, as pipe.transformer",
        )


def refuse_attached(module: nn.Module) -> None:
    """Refuse a module that has graphs already.

    Raises:
        AlreadyAttached: with the region.
    """
    for region in find_regions(module):
        raise AlreadyAttached(
            f"{type(module).__name__} has graphs attached already, at {region.path or 'itself'}",
            hint="detach it first: hubaoti.detach(model)",
        )


def _bind_modules(
    module: nn.Module, parts: Parts, sketched: ConstantSketches | None
) -> list[tuple[ServedModule, ConstantBinding]]:
    """The modules that graphs serve, and what each has for them; nothing of it is touched.

    With `sketched`, they are to be quantized.
    """
    bindings = []
    shipped: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}

    def list_misfits(served: ServedModule) -> list[Misfit]:
        if sketched is not None:
            _require_quantized(parts.manifest)
        device = find_module_device(served.module, parts.manifest.target.device)
        key = (device, *(entry.id for entry in served.graphs))
        if key not in shipped:
            each = (load_shipped_tensors(entry, parts.path, device) for entry in served.graphs)
            shipped[key] = dict(itertools.chain.from_iterable(each))
        binding = ConstantBinding(served.module, served.constants, shipped[key], device)
        bindings.append(binding)
        misfits = binding.list_misfits(sketched)
        if sketched is not None:
            refuse_other_layers(served.module, binding.constants)
        return misfits

    served = find_served_modules(module, parts.manifest, "attach", list_misfits)
    return [*zip(served, bindings, strict=True)]


def _require_quantized(manifest: Manifest) -> None:
    """Refuse to quantize a module as an artifact is that is not quantized."""
    if manifest.build.quantization is None:
        raise BadRequest(
            f"the artifact's weights are not quantized: its recipe is {manifest.recipe}",
            hint="leave quantize=True out, or attach one that was compiled with --quantize",
        )


def _open_regions(
    bound: Iterable[tuple[ServedModule, ConstantBinding]], parts: Parts
) -> Iterator[Region]:
    """A region for each module: graphs of its own over libraries and dispatchers that all share."""
    shared: dict[tuple[Any, ...], Dispatcher] = {}
    for served, binding in bound:
        key = (binding.device, type(served.module), *(entry.id for entry in served.graphs))
        if key not in shared:
            shared[key] = _make_dispatcher(served, binding.device, parts.manifest)
        dispatcher = shared[key]
        graphs = [
            open_graph(parts.graph_folder(entry), entry, binding.device, checks)
            for entry, checks in zip(dispatcher.entries, dispatcher.checks, strict=True)
        ]
        yield Region(served.path, dispatcher, graphs, binding)


def _make_dispatcher(served: ServedModule, device: torch.device, manifest: Manifest) -> Dispatcher:
    """How the graphs of a module are called."""
    expands = "model_type" in manifest.program.config
    try:
        return Dispatcher(served.graphs, served.module, device, expands, manifest.build.attention)
    except CannotServe as error:
        raise OtherProgram(
            f"{served.path or type(served.module).__name__} is called otherwise than the module "
            f"that was compiled: {error}",
            hint="attach the artifact of this very model; nothing was changed",
        ) from error


def _bind_first(region: Region) -> None:
    """Bind a region's graphs, before the module is touched."""
    try:
        region.bind()
    except CannotServe as error:
        if error.reason in {"training", "hooks", "changed", "adapters"}:
            return  # the module answers, and says so, until that is over
        raise MissingConstant(
            f"{region.path}: {error}", hint="nothing was changed; attach what was compiled"
        ) from error


class _Uncompiled:
    """Says for a model that `generate` is not to compile it: its graphs answer."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the model's own answer."""
        return getattr, (self._module(), _AUTO_COMPILE)
