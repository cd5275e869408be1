"""One graph: given memory, exported, lowered, described, checked against eager, and questioned."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from hubaoti.artifact.bundle import make_file_entry
from hubaoti.artifact.package import list_members, unpack_all
from hubaoti.artifact.schema import Check, File, Golden, Graph, Outputs
from hubaoti.compiler import constants, elf, verify
from hubaoti.compiler.callspec import (
    ARCHIVE,
    CallSpec,
    make_call_spec,
    record_call_spec,
    require_direct,
)
from hubaoti.compiler.constants import ConstantsFile
from hubaoti.compiler.dims import choose_example_sizes, choose_probes
from hubaoti.compiler.export import Exported, export
from hubaoti.compiler.from_config import Source, use_attention
from hubaoti.compiler.inductor import lower
from hubaoti.compiler.job import Job
from hubaoti.compiler.literals import require_unread, write_out_buffers
from hubaoti.compiler.materialize import give_memory_back, lend_memory
from hubaoti.compiler.plan import WHOLE_MODEL, GraphPlan, choose_tracing_attention
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import FlatModule
from hubaoti.compiler.strides import take_any_strides
from hubaoti.compiler.tasks import WHOLE_TASKS, read_config_maximum
from hubaoti.errors import CompileFailed, HubaotiError
from hubaoti.progress import Progress
from hubaoti.runtime import golden
from hubaoti.runtime.graph import Graph as Open
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.quantize import quantize
from hubaoti.runtime.synthetic import fill_synthetic


class BuiltGraph(msgspec.Struct, frozen=True, tag=True):
    """A graph as the manifest has it, what its library needs, and how it was checked."""

    graph: Graph
    needs: elf.Needs
    files: tuple[File, ...] = ()
    checks: tuple[Check, ...] = ()
    golden: dict[str, torch.Tensor] = {}


def build_unit(job: Job, unit: GraphPlan, scratch: Path, progress: Progress) -> BuiltGraph:
    """Compile one unit of a plan into `scratch`.

    Raises:
        HubaotiError: of the step that failed; the message names the unit.
    """
    source = job.plan.source
    modules = [source.model.get_submodule(path) for path in (unit.modules[0], unit.modules[-1])]
    try:
        with lend_memory(modules, job.device, source.live) as (module, twin):
            progress(f"export {unit.id}")
            place = ConstantsFile(source.model, unit.region, module, name_constants_file(unit))
            unit = _mark_written_inputs(source, unit, place, job.device)
            exported = trace_unit(source, unit, module, job.device)
            final = replace(unit, face=exported.face, bounds=exported.bounds)
            trial = make_trial(source, final, draft_graph(final), place, job.device)
            verify.try_eager(trial, choose_probes(final.bounds))
            if twin is not module:
                require_same_programs(exported, trace_unit(source, unit, twin, job.device), unit)
            if job.build.quantization:
                place = _quantize_copy(place, job.build.quantization, job.device)
                exported = trace_unit(source, unit, place.module, job.device)
            return _lower_and_check(job, unit, place, exported, scratch, progress)
    except HubaotiError as error:
        step, colon, reason = str(error).partition(": ")
        message = f"{step} {unit.id}: {reason}" if colon else f"{unit.id}: {step}"
        raise type(error)(message, hint=f"{error.hint}{_advise_smaller_cache(unit)}") from error


def _advise_smaller_cache(unit: GraphPlan) -> str:
    """What to do where only the form for a full window fails."""
    cache = unit.face.cache
    if cache is None or cache.window is None:
        return ""
    return f"; a cache below the window needs no such graph: --dim cache=1:{cache.window - 1}"


def _mark_written_inputs(
    source: Source, unit: GraphPlan, place: ConstantsFile, device: torch.device
) -> GraphPlan:
    """The unit, its inputs marked that the module writes; eager is asked whether it can at all."""
    trial = make_trial(source, unit, draft_graph(unit), place, device)
    written = verify.try_eager(trial, [choose_trace_sizes(source, unit)])
    inputs = tuple(
        msgspec.structs.replace(entry, mutated=entry.mutated or entry.name in written)
        for entry in unit.face.inputs
    )
    return replace(unit, face=replace(unit.face, inputs=inputs))


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


def _lower_and_check(
    job: Job,
    unit: GraphPlan,
    place: ConstantsFile,
    exported: Exported,
    scratch: Path,
    progress: Progress,
) -> BuiltGraph:
    """From a program to a graph that was compared with eager."""
    spec = _derive_call_spec(job.plan.source, unit, exported)
    if job.plan.source.layout and spec is None:
        require_direct(draft_graph(unit))
    progress(f"compile {unit.id}")
    package = scratch / "graphs" / f"{unit.id}.pt2"
    where = f"{job.key[:12]}-{unit.id}"
    root = ARCHIVE if job.plan.source.layout else unit.id
    with give_memory_back(place.module):
        lower(exported.program, job.target.level, job.build.options, package, where, spec, root)
    progress(f"check {unit.id}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpack_all(package, Path(folder))
        return _check_unit(job, unit, place, exported, Path(folder), scratch)


def _derive_call_spec(source: Source, unit: GraphPlan, exported: Exported) -> CallSpec | None:
    """How the module itself is called; a whole model's task may be called in another way.

    What a graph leaves in its call no loader without a manifest could put there.
    """
    leaves = not isinstance(exported.outputs.writes, msgspec.UnsetType)
    if leaves or (unit.id == WHOLE_MODEL and source.program.task in WHOLE_TASKS):
        return None
    return make_call_spec(exported.face, exported.outputs.template)


def name_constants_file(unit: GraphPlan) -> str:
    """Where a unit's own small tensors are; a whole model's have one file."""
    return constants.BUFFERS if unit.id == WHOLE_MODEL else f"buffers/{unit.id}.safetensors"


def _quantize_copy(place: ConstantsFile, recipe: str, device: torch.device) -> ConstantsFile:
    """The place with a copy of its module whose weights are quantized; configs are not copied."""
    configs = (getattr(part, "config", None) for part in place.module.modules())
    memo: dict[int, Any] = {id(config): config for config in configs if config is not None}
    module = copy.deepcopy(place.module, memo)
    made = quantize(module, recipe, device).made
    return replace(place, module=module, made=made, recipe=recipe)


def trace_unit(
    source: Source, unit: GraphPlan, module: nn.Module, device: torch.device
) -> Exported:
    """The unit's program, of one of its modules."""
    sizes = choose_trace_sizes(source, unit)
    tensors = [tensor.to(device) for tensor in golden.make_golden_inputs(draft_graph(unit), sizes)]
    around = write_out_buffers(module) if source.layout else nullcontext(set[str]())
    with use_attention(source.model, choose_tracing_attention(source)), around as unwritten:
        exported = export(module, unit.face, unit.bounds, tensors, source.stated)
    require_unread(exported.program, unwritten)
    if source.layout:
        take_any_strides(exported.program, exported.face.inputs)
    return exported


def make_trial(
    source: Source, unit: GraphPlan, entry: Graph, place: ConstantsFile, device: torch.device
) -> verify.Trial:
    """What the unit's graph is compared with: the module with transformers' own attention."""
    text = source.config.get_text_config() if source.config is not None else None
    flat = FlatModule(place.module, unit.face)
    # A classifier's logits are few; those of a language model are the most that it makes.
    words = source.outputs if source.program.task == "logits" else ()

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with use_attention(source.model, source.attention):
            return flat(*tensors)

    return verify.Trial(
        entry=entry,
        bounds=unit.bounds,
        eager=eager,
        module=place.module,
        device=device,
        tolerance=max(
            verify.CHECK_TOLERANCE[source.dtype], verify.COARSE.get(place.recipe or "", 0.0)
        ),
        scores=read_config_maximum(text, "num_attention_heads", 1),
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
    )


def _check_unit(
    job: Job,
    unit: GraphPlan,
    place: ConstantsFile,
    exported: Exported,
    unpacked: Path,
    scratch: Path,
) -> BuiltGraph:
    """Describe a compiled graph, compare it with eager, and ask it the golden questions."""
    source, device = job.plan.source, job.device
    final = replace(unit, face=exported.face, bounds=exported.bounds)
    entry, files = _describe_graph(final, source.outputs, place, exported, unpacked, scratch)
    graph = open_graph(unpacked, entry, device)
    spec = _derive_call_spec(source, unit, exported)
    graph.entry = entry = record_call_spec(entry, spec, graph.read_call_spec(), source.model)
    if source.layout:
        require_direct(entry)
    graph.bind(verify.share_constants(place.module, entry, scratch))
    trial = make_trial(source, final, entry, place, device)
    checks = verify.verify(graph, trial)
    libraries = [unpacked / m.path for m in entry.members if m.path.endswith(".wrapper.so")]
    by_rule = not source.live and not place.made
    if by_rule:
        _fill_tied_constants(graph, place.module)
    entry, answers = _record_golden(graph, scratch, by_rule)
    return BuiltGraph(entry, elf.read_needs(libraries[0]), files, checks, answers)


def _describe_graph(
    unit: GraphPlan,
    names: tuple[str, ...],
    place: ConstantsFile,
    exported: Exported,
    unpacked: Path,
    scratch: Path,
) -> tuple[Graph, tuple[File, ...]]:
    """The manifest's graph with its package, its outputs' names, and its constants, of which only
    the compiled library can tell; and the files that it needs beside it."""
    file, outputs = make_file_entry(scratch, f"graphs/{unit.id}.pt2"), exported.outputs
    if len(names) == len(outputs.tensors):
        tensors = zip(outputs.tensors, names, strict=True)
        named = tuple(msgspec.structs.replace(tensor, name=name) for tensor, name in tensors)
        outputs = msgspec.structs.replace(outputs, tensors=named)
    bare = msgspec.structs.replace(
        draft_graph(unit, outputs),
        sha256=file.sha256,
        size=file.size,
        members=list_members(scratch / file.path),
    )
    device = next(place.module.parameters()).device
    fqns = open_graph(unpacked, bare, device).read_constant_fqns()
    listed, shipped = constants.describe_constants(fqns, place, exported.program)
    files: tuple[File, ...] = ()
    if shipped:
        (scratch / place.file).parent.mkdir(exist_ok=True)
        constants.save_tensors(shipped, scratch / place.file)
        files = (make_file_entry(scratch, place.file),)
    return msgspec.structs.replace(bare, constants=listed), files


def _fill_tied_constants(graph: Open, module: nn.Module) -> None:
    """Give tied constants the values of the name that the graph has for them, of their several.

    Who opens the graph knows no other; the module's parameters got theirs by its own first name.
    """
    named = constants.collect_named_tensors(module)
    for constant in graph.entry.constants:
        if constant.aliases and isinstance(named.get(constant.fqn), nn.Parameter):
            fill_synthetic(named[constant.fqn], constant.fqn)


def _record_golden(
    graph: Open, folder: Path, by_rule: bool
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The golden answers of a graph, and its entry that tells of them.

    A graph that is bound to the rule's constants already is asked as it is. A decoder is asked with
    two places filled, since attention over one place says nothing about keys.

    Raises:
        CheckFailed: the answers would prove nothing.
    """
    entry = graph.entry
    sizes = golden.choose_smallest_dims(entry)
    if "filled" in sizes and entry.bounds["filled"][1] > 1:
        sizes |= {"filled": max(2, sizes["filled"]), "cache": max(2, sizes["cache"])}
    blank = Golden(dims=sizes, tolerances={}, memory=0)
    graph.entry = msgspec.structs.replace(entry, golden=blank)
    answers = golden.answer_golden_inputs(graph) if by_rule else golden.ask_golden(graph, folder)
    if not all(tensor.isfinite().all() for tensor in answers.values()):
        graph.entry = entry
        return entry, {}
    return msgspec.structs.replace(
        entry, golden=golden.describe_golden(graph.entry, answers)
    ), answers
