"""One unit's program, the module that it was made of, and what its graphs are compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import nn

from hubaoti.artifact.bundle import make_file_entry
from hubaoti.artifact.package import list_members
from hubaoti.artifact.schema import File, Graph, Outputs
from hubaoti.compiler import constants, verify
from hubaoti.compiler.callspec import CallSpec, make_call_spec, record_call_spec, require_direct
from hubaoti.compiler.constants import ConstantsFile, collect_named_tensors
from hubaoti.compiler.device_code import require_same_on_gpu, settle_autocast
from hubaoti.compiler.dims import choose_example_sizes, choose_probes
from hubaoti.compiler.export import Exported, export
from hubaoti.compiler.from_config import Source, use_attention, use_traceable_experts
from hubaoti.compiler.graph_plans import WHOLE_MODEL, GraphPlan
from hubaoti.compiler.job import Job
from hubaoti.compiler.literals import require_unread, write_out_buffers
from hubaoti.compiler.materialize import free_memory
from hubaoti.compiler.plan import choose_tracing_attention
from hubaoti.compiler.precision import ScaledOnCpu
from hubaoti.compiler.request import Range
from hubaoti.compiler.scales import write_out_scales
from hubaoti.compiler.signature import FlatModule
from hubaoti.compiler.strides import take_any_strides
from hubaoti.compiler.tasks import WHOLE_TASKS, read_config_maximum
from hubaoti.errors import CompileFailed
from hubaoti.runtime import golden
from hubaoti.runtime.input_checks import parse_dtype
from hubaoti.runtime.quantize import quantize

CPU = torch.device("cpu")  # where programs are made, whatever they are made for


@dataclass(frozen=True, slots=True)
class Traced:
    """A unit with the face and the bounds of its program, its module, and its own call spec."""

    unit: GraphPlan
    place: ConstantsFile
    exported: Exported
    spec: CallSpec | None


def trace(jobs: Sequence[Job], unit: GraphPlan, module: nn.Module, twin: nn.Module) -> Traced:
    """The program of a unit, of the first of its modules; `twin` is the last.

    Eager is asked before and after, so that what it cannot do either costs no time; the program of
    the twin has to be the same, and so has that of each GPU that it is for.

    Raises:
        HubaotiError: of the step that failed.
    """
    job, source = jobs[0], jobs[0].plan.source
    place = ConstantsFile(source.model, unit.region, module, name_constants_file(unit))
    unit = _mark_written_inputs(source, unit, place)
    guarded = job.target.device == "cpu"
    for sm in dict.fromkeys(each.target.sm for each in jobs):
        if sm is not None:
            _require_same_on_gpu(source, unit, module, sm)
    exported = trace_unit(source, unit, module, guarded)
    final = replace(unit, face=exported.face, bounds=exported.bounds)
    trial = make_trial(source, final, draft_graph(final), place)
    verify.try_eager(trial, choose_probes(final.bounds))
    if twin is not module:
        require_same_programs(exported, trace_unit(source, unit, twin, guarded), unit)
    if job.build.quantization:
        place = _quantize_copy(place, job)
        exported = trace_unit(source, unit, place.module, guarded)
        write_out_scales(exported.program)
    spec = _derive_call_spec(source, unit, exported)
    if source.layout and spec is None:
        require_direct(draft_graph(unit))
    final = replace(unit, face=exported.face, bounds=exported.bounds)
    return Traced(final, place, exported, spec)


def _mark_written_inputs(source: Source, unit: GraphPlan, place: ConstantsFile) -> GraphPlan:
    """The unit, its inputs marked that the module writes; eager is asked whether it can at all."""
    trial = make_trial(source, unit, draft_graph(unit), place)
    written = verify.try_eager(trial, [choose_trace_sizes(source, unit)])
    inputs = tuple(
        msgspec.structs.replace(entry, mutated=entry.mutated or entry.name in written)
        for entry in unit.face.inputs
    )
    return replace(unit, face=replace(unit.face, inputs=inputs))


def _require_same_on_gpu(
    source: Source, unit: GraphPlan, module: nn.Module, capability: int
) -> None:
    """Refuse a module whose code does something else on a GPU than here."""
    tensors = golden.make_golden_inputs(draft_graph(unit), choose_trace_sizes(source, unit))
    with _use_traceable_parts(source, unit, guarded=False):
        require_same_on_gpu(module, unit.face, tensors, capability)


@contextmanager
def _use_traceable_parts(source: Source, unit: GraphPlan, guarded: bool) -> Iterator[None]:
    """Around tracing: the model has attention that is traced for every length, and for a GPU, where
    somebody's own module has others, experts that are."""
    others = source.live and not guarded
    experts = use_traceable_experts(source.model, parse_dtype(source.dtype))
    attention = use_attention(source.model, choose_tracing_attention(source, unit))
    with attention, experts if others else nullcontext():
        yield


def choose_trace_sizes(source: Source, unit: GraphPlan) -> dict[str, int]:
    """Sizes to trace with: of one of the user's calls where they fit, which may go together only.

    None is 0 or 1, which tracing would take for constants.
    """
    chosen = choose_example_sizes(unit.bounds)
    for sizes in zip(*source.recorded.values(), strict=True) if source.recorded else ():
        call = dict(zip(source.recorded, sizes, strict=True))
        if all(_is_traceable(call.get(name, 0), each) for name, each in unit.bounds.items()):
            return {name: call[name] for name in unit.bounds}
    return chosen


def _is_traceable(size: int, bounds: Range) -> bool:
    """Whether a size can be traced with, and is within bounds."""
    return size == bounds.low == bounds.high or (size > 1 and bounds.low <= size <= bounds.high)


def name_constants_file(unit: GraphPlan) -> str:
    """Where a unit's own small tensors are; a whole model's have one file."""
    return constants.BUFFERS if unit.id == WHOLE_MODEL else f"buffers/{unit.id}.safetensors"


def _quantize_copy(place: ConstantsFile, job: Job) -> ConstantsFile:
    """The place with a copy of its module whose weights are quantized, and all else shared.

    What was lent to the weights that are needed no more is given back.
    """
    configs = [getattr(part, "config", None) for part in place.module.modules()]
    shared = [*filter(None, configs), *collect_named_tensors(place.module).values()]
    module = copy.deepcopy(place.module, {id(each): each for each in shared})
    recipe = job.build.quantization or ""
    made = quantize(module, recipe, job.target.device, job.target.sm or 0).made
    free_memory(place.module, {each.source for each in made.values()})
    return replace(place, module=module, made=made, recipe=recipe)


def trace_unit(source: Source, unit: GraphPlan, module: nn.Module, guarded: bool) -> Exported:
    """The unit's program, of one of its modules; `guarded` as `export` has it."""
    sizes = choose_trace_sizes(source, unit)
    tensors = golden.make_golden_inputs(draft_graph(unit), sizes)
    around = write_out_buffers(module) if source.layout else nullcontext(set[str]())
    with _use_traceable_parts(source, unit, guarded), around as unwritten:
        exported = export(module, unit.face, unit.bounds, tensors, source.stated, guarded)
    if not guarded:
        exported = replace(exported, program=settle_autocast(exported.program))
    require_unread(exported.program, unwritten)
    if source.layout:
        take_any_strides(exported.program, exported.face.inputs)
    return exported


def make_trial(source: Source, unit: GraphPlan, entry: Graph, place: ConstantsFile) -> verify.Trial:
    """What the unit's graph is compared with: the module with transformers' own attention."""
    text = source.config.get_text_config() if source.config is not None else None
    flat = FlatModule(place.module, unit.face)
    # A classifier's logits are few; those of a language model are the most that it makes.
    words = source.outputs if source.program.task == "logits" else ()

    scaled = ScaledOnCpu if place.recipe == "float8dq" else nullcontext

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with use_attention(source.model, source.attention), scaled():
            return flat(*tensors)

    return verify.Trial(
        entry=entry,
        bounds=unit.bounds,
        eager=eager,
        module=place.module,
        tolerance=max(
            verify.CHECK_TOLERANCE[source.dtype], verify.COARSE.get(place.recipe or "", 0.0)
        ),
        heads=read_config_maximum(text, "num_attention_heads", 1),
        width=read_config_maximum(text, "hidden_size", 0)
        + (source.vocabulary if "logits" in words else 0),
    )


def require_same_programs(first: Exported, other: Exported, unit: GraphPlan) -> None:
    """Refuse a group of which two members compute something else.

    Raises:
        CompileFailed: their programs differ, or constants that are in no module.
    """
    same = first.outputs.writes == other.outputs.writes
    # As text, without the numbers that torch gives to symbols.
    codes = [str(exported.program.graph_module.code) for exported in (first, other)]
    same = same and codes[0] == codes[1]
    same = same and all(
        torch.equal(value, other.program.constants[name])
        for name, value in first.program.constants.items()
        if isinstance(value, torch.Tensor)
    )
    if not same:
        raise CompileFailed(
            f"export: {unit.modules[0]} and {unit.modules[-1]} look alike and compute something "
            "else",
            hint=f"compile each of them: --regions {unit.modules[0]}",
        )


def draft_graph(unit: GraphPlan, outputs: Outputs | None = None) -> Graph:
    """The manifest's graph as far as it is known before it is compiled."""
    return Graph(
        id=unit.id,
        file=f"graphs/{unit.id}.pt2",
        sha256="",
        size=0,
        members=(),
        modules=unit.modules,
        bounds={name: (sizes.low, sizes.high) for name, sizes in unit.bounds.items()},
        steps={name: sizes.step for name, sizes in unit.bounds.items() if sizes.step > 1},
        order=unit.order,
        call=unit.face.template,
        inputs=unit.face.inputs,
        outputs=outputs or Outputs(template=None, tensors=()),
        constants=(),
        cache=unit.face.cache,
        unmasked=True if unit.unmasked else msgspec.UNSET,
        masks=unit.masks or msgspec.UNSET,
    )


def _derive_call_spec(source: Source, unit: GraphPlan, exported: Exported) -> CallSpec | None:
    """How the module itself is called; a whole model's task may be called in another way.

    What a graph leaves in its call no loader without a manifest could put there.
    """
    leaves = not isinstance(exported.outputs.writes, msgspec.UnsetType)
    if leaves or (unit.id == WHOLE_MODEL and source.program.task in WHOLE_TASKS):
        return None
    return make_call_spec(exported.face, exported.outputs.template)


def describe_graph(
    traced: Traced, source: Source, fqns: Iterable[str], scratch: Path
) -> tuple[Graph, tuple[File, ...]]:
    """The manifest's graph with its outputs' names and the constants that it reads, which are
    called `fqns`; and the files that it needs beside it, which are written into `scratch`."""
    outputs, place = traced.exported.outputs, traced.place
    if len(source.outputs) == len(outputs.tensors):
        tensors = zip(outputs.tensors, source.outputs, strict=True)
        named = tuple(msgspec.structs.replace(tensor, name=name) for tensor, name in tensors)
        outputs = msgspec.structs.replace(outputs, tensors=named)
    listed, shipped = constants.describe_constants(fqns, place, traced.exported.program)
    files: tuple[File, ...] = ()
    if shipped:
        (scratch / place.file).parent.mkdir(exist_ok=True)
        constants.save_tensors(shipped, scratch / place.file)
        files = (make_file_entry(scratch, place.file),)
    return msgspec.structs.replace(draft_graph(traced.unit, outputs), constants=listed), files


def describe_package(
    traced: Traced, source: Source, read: tuple[Iterable[str], Sequence[str]], scratch: Path
) -> tuple[Graph, tuple[File, ...]]:
    """The manifest's graph of a package that lies in its bundle, of which the constants that it
    reads and its call spec were `read`; and the files that it needs beside it.

    Raises:
        CompileFailed: it has a layout, and its loaders could not call it.
    """
    fqns, call_spec = read
    described, files = describe_graph(traced, source, fqns, scratch)
    entry = add_package(described, scratch)
    entry = record_call_spec(entry, traced.spec, call_spec, source.model)
    if source.layout:
        require_direct(entry)
    return entry, files


def add_package(entry: Graph, scratch: Path) -> Graph:
    """The entry of a graph whose package lies in its bundle, with what there is to know of that."""
    file = make_file_entry(scratch, entry.file)
    members = list_members(scratch / file.path)
    return msgspec.structs.replace(entry, sha256=file.sha256, size=file.size, members=members)
