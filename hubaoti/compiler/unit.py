"""One graph: given memory, exported, lowered, described, checked against eager, and questioned."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import nn

from hubaoti.bundle import file_entry
from hubaoti.compiler import constants, elf, verify
from hubaoti.compiler.callspec import ARCHIVE, CallSpec, call_spec_of, direct_of, require_direct
from hubaoti.compiler.constants import Place
from hubaoti.compiler.export import Exported, export
from hubaoti.compiler.faces import Flat
from hubaoti.compiler.inductor import lower
from hubaoti.compiler.lent import given_back, in_memory
from hubaoti.compiler.literals import require_unread, written_out
from hubaoti.compiler.plan import ROOT, Unit, tracing_attention
from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import example_sizes, probes
from hubaoti.compiler.source import Source, attention_of
from hubaoti.compiler.strides import take_any_strides
from hubaoti.compiler.tasks import WHOLE, largest_of
from hubaoti.errors import CompileFailed, HubaotiError
from hubaoti.manifest import Check, File, Golden, Graph, Outputs
from hubaoti.package import members_of, unpack_all
from hubaoti.runtime import golden
from hubaoti.runtime.graph import Graph as Open
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.quantize import quantize
from hubaoti.runtime.rule import write
from hubaoti.steps import Say

if TYPE_CHECKING:
    from hubaoti.compiler.build import Job


@dataclass(frozen=True, slots=True)
class Built:
    """A graph as the manifest has it, what its library needs, and how it was checked."""

    graph: Graph
    needs: elf.Needs
    files: tuple[File, ...] = ()
    checks: tuple[Check, ...] = ()
    golden: dict[str, torch.Tensor] = field(default_factory=dict)


def build_unit(job: Job, unit: Unit, scratch: Path, say: Say) -> Built:
    """Compile one unit of a plan into `scratch`.

    Raises:
        HubaotiError: of the step that failed; the message names the unit.
    """
    source = job.plan.source
    modules = [source.model.get_submodule(path) for path in (unit.modules[0], unit.modules[-1])]
    try:
        with in_memory(modules, job.device, source.live) as (module, twin):
            say(f"export {unit.id}")
            place = Place(source.model, unit.region, module, file_of(unit))
            unit = with_written(source, unit, place, job.device)
            exported = traced(source, unit, module, job.device)
            final = replace(unit, face=exported.face, bounds=exported.bounds)
            trial = trial_of(source, final, bare_graph(final), place, job.device)
            verify.attempt(trial, probes(final.bounds))
            if twin is not module:
                require_same(exported, traced(source, unit, twin, job.device), unit)
            if job.build.quantization:
                place = quantized(place, job.build.quantization, job.device)
                exported = traced(source, unit, place.module, job.device)
            return lowered_and_checked(job, unit, place, exported, scratch, say)
    except HubaotiError as why:
        step, colon, told = str(why).partition(": ")
        message = f"{step} {unit.id}: {told}" if colon else f"{unit.id}: {step}"
        raise type(why)(message, hint=f"{why.hint}{without_window(unit)}") from why


def without_window(unit: Unit) -> str:
    """What to do where only the form for a full window fails."""
    cache = unit.face.cache
    if cache is None or cache.window is None:
        return ""
    return f"; a cache below the window needs no such graph: --dim cache=1:{cache.window - 1}"


def with_written(source: Source, unit: Unit, place: Place, device: torch.device) -> Unit:
    """The unit, its inputs marked that the module writes; eager is asked whether it can at all."""
    trial = trial_of(source, unit, bare_graph(unit), place, device)
    written = verify.attempt(trial, [sizes_to_trace(source, unit)])
    inputs = tuple(
        msgspec.structs.replace(entry, mutated=entry.mutated or entry.name in written)
        for entry in unit.face.inputs
    )
    return replace(unit, face=replace(unit.face, inputs=inputs))


def sizes_to_trace(source: Source, unit: Unit) -> dict[str, int]:
    """Sizes to trace with: of one of the user's calls where they fit, which may go together only.

    None is 0 or 1, which tracing would take for constants.
    """
    chosen = example_sizes(unit.bounds)
    for sizes in zip(*source.recorded.values(), strict=True) if source.recorded else ():
        call = dict(zip(source.recorded, sizes, strict=True))
        known = all(name in call for name in unit.bounds)
        if known and all(fits(call[name], bounds) for name, bounds in unit.bounds.items()):
            return {name: call[name] for name in unit.bounds}
    return chosen


def fits(size: int, bounds: Range) -> bool:
    """Whether a size can be traced with, and is within bounds."""
    return size == bounds.low == bounds.high or (size > 1 and bounds.low <= size <= bounds.high)


def lowered_and_checked(
    job: Job, unit: Unit, place: Place, exported: Exported, scratch: Path, say: Say
) -> Built:
    """From a program to a graph that was compared with eager."""
    spec = own_spec(job.plan.source, unit, exported)
    if job.plan.source.layout and spec is None:
        require_direct(bare_graph(unit))
    say(f"compile {unit.id}")
    package = scratch / "graphs" / f"{unit.id}.pt2"
    where = f"{job.key[:12]}-{unit.id}"
    root = ARCHIVE if job.plan.source.layout else unit.id
    with given_back(place.module):
        lower(exported.program, job.target.level, job.build.options, package, where, spec, root)
    say(f"check {unit.id}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpack_all(package, Path(folder))
        return checked(job, unit, place, exported, Path(folder), scratch)


def own_spec(source: Source, unit: Unit, exported: Exported) -> CallSpec | None:
    """How the module itself is called; a whole model's task may be called in another way.

    What a graph leaves in its call no loader without a manifest could put there.
    """
    leaves = not isinstance(exported.outputs.writes, msgspec.UnsetType)
    if leaves or (unit.id == ROOT and source.program.task in WHOLE):
        return None
    return call_spec_of(exported.face, exported.outputs.template)


def file_of(unit: Unit) -> str:
    """Where a unit's own small tensors are; a whole model's have one file."""
    return constants.BUFFERS if unit.id == ROOT else f"buffers/{unit.id}.safetensors"


def quantized(place: Place, recipe: str, device: torch.device) -> Place:
    """The place with a copy of its module whose weights are quantized; configs are not copied."""
    configs = (getattr(part, "config", None) for part in place.module.modules())
    memo: dict[int, Any] = {id(config): config for config in configs if config is not None}
    module = copy.deepcopy(place.module, memo)
    made = quantize(module, recipe, device).made
    return replace(place, module=module, made=made, recipe=recipe)


def traced(source: Source, unit: Unit, module: nn.Module, device: torch.device) -> Exported:
    """The unit's program, of one of its modules."""
    sizes = sizes_to_trace(source, unit)
    tensors = [tensor.to(device) for tensor in golden.inputs_for(bare_graph(unit), sizes)]
    around = written_out(module) if source.layout else nullcontext(set[str]())
    with attention_of(source.model, tracing_attention(source)), around as unwritten:
        exported = export(module, unit.face, unit.bounds, tensors, source.stated)
    require_unread(exported.program, unwritten)
    if source.layout:
        take_any_strides(exported.program, exported.face.inputs)
    return exported


def trial_of(
    source: Source, unit: Unit, entry: Graph, place: Place, device: torch.device
) -> verify.Trial:
    """What the unit's graph is compared with: the module with transformers' own attention."""
    text = source.config.get_text_config() if source.config is not None else None
    flat = Flat(place.module, unit.face)
    # A classifier's logits are few; those of a language model are the most that it makes.
    words = source.outputs if source.program.task == "logits" else ()

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with attention_of(source.model, source.attention):
            return flat(*tensors)

    return verify.Trial(
        entry=entry,
        bounds=unit.bounds,
        eager=eager,
        module=place.module,
        device=device,
        tolerance=max(verify.TOLERANCE[source.dtype], verify.COARSE.get(place.recipe or "", 0.0)),
        scores=largest_of(text, "num_attention_heads", 1),
        width=largest_of(text, "hidden_size", 0) + (source.vocabulary if "logits" in words else 0),
    )


def require_same(first: Exported, other: Exported, unit: Unit) -> None:
    """Refuse a group of which two members compute something else.

    Raises:
        CompileFailed: their programs differ, or constants that are in no module.
    """
    same = first.outputs.writes == other.outputs.writes and code_of(first) == code_of(other)
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


def code_of(exported: Exported) -> str:
    """A program as text, without the numbers that torch gives to symbols."""
    return str(exported.program.graph_module.code)


def bare_graph(unit: Unit, outputs: Outputs | None = None) -> Graph:
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


def checked(
    job: Job, unit: Unit, place: Place, exported: Exported, unpacked: Path, scratch: Path
) -> Built:
    """Describe a compiled graph, compare it with eager, and ask it the golden questions."""
    source, device = job.plan.source, job.device
    final = replace(unit, face=exported.face, bounds=exported.bounds)
    entry = final_entry(final, exported, scratch, source.outputs)
    entry, files = described(entry, place, exported, unpacked, scratch)
    graph = open_graph(unpacked, entry, device)
    spec = own_spec(source, unit, exported)
    graph.entry = entry = direct_of(entry, spec, graph.call_spec(), source.model)
    if source.layout:
        require_direct(entry)
    graph.bind(verify.constants_of(place.module, entry, scratch))
    trial = trial_of(source, final, entry, place, device)
    checks = verify.verify(graph, trial)
    libraries = [unpacked / m.path for m in entry.members if m.path.endswith(".wrapper.so")]
    by_rule = not source.live and not place.made
    if by_rule:
        name_by_rule(graph, place.module)
    entry, answers = questioned(graph, scratch, by_rule)
    return Built(entry, elf.needs_of(libraries[0]), files, checks, answers)


def called(outputs: Outputs, names: tuple[str, ...]) -> Outputs:
    """Outputs by the names that their task has for them."""
    if len(names) != len(outputs.tensors):
        return outputs
    tensors = zip(outputs.tensors, names, strict=True)
    named = tuple(msgspec.structs.replace(tensor, name=name) for tensor, name in tensors)
    return msgspec.structs.replace(outputs, tensors=named)


def final_entry(unit: Unit, exported: Exported, scratch: Path, names: tuple[str, ...]) -> Graph:
    """The manifest's graph with its package, its constants not yet known."""
    file = file_entry(scratch, f"graphs/{unit.id}.pt2")
    return msgspec.structs.replace(
        bare_graph(unit, called(exported.outputs, names)),
        sha256=file.sha256,
        size=file.size,
        members=members_of(scratch / file.path),
    )


def described(
    bare: Graph, place: Place, exported: Exported, unpacked: Path, scratch: Path
) -> tuple[Graph, tuple[File, ...]]:
    """Add what only the compiled library can tell: the constants that it reads."""
    device = next(place.module.parameters()).device
    fqns = open_graph(unpacked, bare, device).constant_fqns()
    listed, shipped = constants.describe(fqns, place, exported.program)
    files: tuple[File, ...] = ()
    if shipped:
        (scratch / place.file).parent.mkdir(exist_ok=True)
        constants.save(shipped, scratch / place.file)
        files = (file_entry(scratch, place.file),)
    return msgspec.structs.replace(bare, constants=listed), files


def name_by_rule(graph: Open, module: nn.Module) -> None:
    """Give tied constants the values of the name that the graph has for them, of their several.

    Who opens the graph knows no other; the module's parameters got theirs by its own first name.
    """
    named = constants.tensors_of(module)
    for constant in graph.entry.constants:
        if constant.aliases and isinstance(named.get(constant.fqn), nn.Parameter):
            write(named[constant.fqn], constant.fqn)


def questioned(graph: Open, folder: Path, by_rule: bool) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The golden answers of a graph, and its entry that tells of them.

    A graph that is bound to the rule's constants already is asked as it is. A decoder is asked with
    two places filled, since attention over one place says nothing about keys.

    Raises:
        CheckFailed: the answers would prove nothing.
    """
    entry = graph.entry
    sizes = golden.smallest(entry)
    if "filled" in sizes and entry.bounds["filled"][1] > 1:
        sizes |= {"filled": max(2, sizes["filled"]), "cache": max(2, sizes["cache"])}
    blank = Golden(dims=sizes, tolerances={}, memory=0)
    graph.entry = msgspec.structs.replace(entry, golden=blank)
    answers = golden.replies(graph) if by_rule else golden.answer(graph, folder)
    if not all(tensor.isfinite().all() for tensor in answers.values()):
        graph.entry = entry
        return entry, {}
    return msgspec.structs.replace(entry, golden=golden.golden_of(graph.entry, answers)), answers
