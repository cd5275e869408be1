"""torch.export of a module as its face calls it, with one named Dim for each of ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from hubaoti.artifact.schema import Output, Outputs
from hubaoti.compiler.asserts import drop_ties
from hubaoti.compiler.dims import DimRanges
from hubaoti.compiler.fake_run import describe_missing_fake
from hubaoti.compiler.guards import (
    Fixes,
    Lines,
    collect_guard_lines,
    find_exceeding_dims,
    limit_by_guards,
    read_fixes,
    read_limits,
)
from hubaoti.compiler.index_guards import guard_indices
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature, FlatModule, substitute
from hubaoti.compiler.symbols import encode_size, get_fake_value, list_placeholders, map_symbols
from hubaoti.errors import BadDim, CompileFailed, HubaotiError, first_line
from hubaoti.program.silence import silence_transformers
from hubaoti.runtime.input_checks import name_dtype

# What lowers a program takes a size for more than one where its hint is: of one that is 1 or 2 it
# makes 2, and the graph reads and writes as much of a call with 1 (torch 2.11).
_LEAST_HIGH = 3
_MOST_TRACES = 4  # at refining dims; torch tells of one thing at a time


@dataclass(frozen=True, slots=True)
class Exported:
    """A program that torch can lower, the face and the bounds it has, and what it answers."""

    program: ExportedProgram
    face: CallSignature
    bounds: DimRanges
    outputs: Outputs


def export(
    module: nn.Module,
    face: CallSignature,
    bounds: DimRanges,
    tensors: Sequence[torch.Tensor],
    stated: frozenset[str],
    guarded: bool = True,
) -> Exported:
    """Trace a module once, for every size within the bounds.

    Dims that nobody stated are refined as the model's code wants them; of a stated one the user is
    told. A `guarded` program looks at the numbers that choose rows, which a GPU's kernels do
    themselves.

    Raises:
        BadDim: the model takes only some sizes of a stated dim, or relates it to another.
        CompileFailed: it cannot be traced.
    """
    deferred = False
    for _ in range(_MOST_TRACES):
        flat = FlatModule(module, face)
        try:
            with flat.replace_own_forward(), silence_transformers():
                program = _trace_with_room(module, face, bounds, tensors, deferred)
        except HubaotiError:
            raise
        except Exception as error:  # torch raises of many kinds, each with its own words
            fixes = read_fixes(str(error))
            lines = find_guard_lines(module, face, bounds, tensors)
            _require_allowed(fixes, bounds, stated, lines)
            fixes = limit_by_guards(fixes, bounds)
            if not any((fixes.multiples, fixes.related, fixes.ranges)):
                if guarded or deferred:
                    raise _describe_export_error(error, lines.each) from error
                deferred = True  # each assert is held against all sizes when it is lowered
            face, bounds = _apply_fixes(face, bounds, fixes)
            continue
        _keep_names(program)
        if deferred:
            drop_ties(program, bounds)
        face, bounds = _apply_relations(program, face, bounds)
        face = _limit_embedding_ids(program, face)
        if guarded and all(tensor.device.type == "cpu" for tensor in tensors):
            guard_indices(
                program, [*zip(list_placeholders(program), face.inputs, strict=True)], face.cache
            )
        return Exported(program, face, bounds, _describe_outputs(program, face, bounds, flat))
    raise CompileFailed(
        f"export: torch wants other dims after {_MOST_TRACES} attempts",
        hint="state the dims of the inputs, or compile with fewer of them",
    )


def _keep_names(program: ExportedProgram) -> None:
    """Let inductor keep the names of tensors that stand in the model's code, as `tensor(16.0)`.

    It gives constants names of its own, which nothing leads back from; buffers keep theirs.
    """
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def _trace_with_room(
    module: nn.Module,
    face: CallSignature,
    bounds: DimRanges,
    tensors: Sequence[torch.Tensor],
    deferred: bool,
) -> ExportedProgram:
    """Export with room above dims of two sizes, but for those of which the module takes no more."""
    roomy = {name for name, each in bounds.items() if each.high // each.step < _LEAST_HIGH}
    while True:
        try:
            return _trace(module, face, bounds, tensors, deferred, roomy)
        except Exception as error:
            fixes = read_fixes(str(error))
            named = {*fixes.sizes, *fixes.ranges, *fixes.guards}
            if not roomy & named:
                raise
            roomy -= named


def _trace(
    module: nn.Module,
    face: CallSignature,
    bounds: DimRanges,
    tensors: Sequence[torch.Tensor],
    deferred: bool = False,
    roomy: Collection[str] = (),
) -> ExportedProgram:
    """Export through transformers for a whole model, whose patches make more of them traceable.

    With `deferred` what torch cannot prove of sizes is an assert of the program, and no refusal.
    Dims that are `roomy` may be larger than their bounds.

    Checked on transformers 5.15 to 5.24, where it is marked experimental. The public way,
    `torch.export.export`, takes the same tensors.
    """
    shapes = _make_dynamic_shapes(face, bounds, roomy)
    names = [entry.name for entry in face.inputs]
    exporter = _find_exporter(module)
    if exporter is None:
        with torch.no_grad():
            return torch.export.export(
                module,
                tuple(tensors),
                dynamic_shapes=(tuple(shapes),),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )
    config = exporter.DynamoConfig(
        dynamic_shapes=dict(zip(names, shapes, strict=True)),
        prefer_deferred_runtime_asserts_over_guards=deferred,
    )
    return run_exporter(
        exporter.DynamoExporter(), module, dict(zip(names, tensors, strict=True)), config
    )


def run_exporter(
    exporter: Any, module: nn.Module, inputs: dict[str, torch.Tensor], config: Any
) -> ExportedProgram:
    """The program that transformers' exporter traces; from 5.23 on `export` makes a model of it."""
    if hasattr(exporter, "export_program"):
        return exporter.export_program(module, inputs, config)[0]  # type: ignore[no-any-return]
    return exporter.export(module, inputs, config)  # type: ignore[no-any-return]


def _find_exporter(module: nn.Module) -> Any:
    """transformers' exporter, for what it is made for: whole models of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    try:
        from transformers.exporters import exporter_dynamo
    except ImportError:
        return None
    return exporter_dynamo


def _make_dynamic_shapes(
    face: CallSignature, bounds: DimRanges, roomy: Collection[str]
) -> list[dict[int, Any]]:
    """Torch's Dims for each input; an axis with one size has none."""
    single = {name: sizes.low for name, sizes in bounds.items() if sizes.low == sizes.high}
    roots = {
        # Of a dim with steps torch's Dim counts the steps.
        name: Dim(
            name if sizes.step == 1 else f"_{name}",
            min=sizes.low // sizes.step,
            max=max(_LEAST_HIGH if name in roomy else 0, sizes.high // sizes.step),
        )
        for name, sizes in bounds.items()
        if name not in single
    }
    shapes: list[dict[int, Any]] = [{} for _ in face.inputs]
    for index, axis, whole in face.list_extents():
        extent = substitute(whole, single)
        if not extent.terms:
            continue
        if len(extent.terms) > 1:  # torch finds the sum by itself
            shapes[index][axis] = Dim.DYNAMIC
            continue
        name, factor = extent.terms[0]
        factor *= bounds[name].step
        dim: Any = factor * roots[name] if factor != 1 else roots[name]  # it has no 1-fold
        shapes[index][axis] = dim + extent.plus if extent.plus else dim
    return shapes


def _require_allowed(fixes: Fixes, bounds: DimRanges, stated: frozenset[str], lines: Lines) -> None:
    """Refuse what nobody may decide but the user, and what no bounds can mend."""
    _refuse_fixed(fixes, lines)
    refuse_beyond(fixes, bounds, stated, lines)
    for name, factor in fixes.multiples.items():
        if name in stated:
            first, last = -(-bounds[name].low // factor), bounds[name].high // factor
            raise BadDim(
                f"export: {name} must be a multiple of {factor}{_cite_line(lines.each)}",
                hint=f"say so: --dim {name}={max(first, 1) * factor}:{last * factor}:{factor}",
            )
    for name, extent in fixes.related.items():
        if name in stated:
            raise BadDim(
                f"export: {name} must always be {extent}{_cite_line(lines.each)}",
                hint=f'say so where the shape names {name}: shapes={{…: ("{extent}", …)}}',
            )
    for name, (low, high) in fixes.ranges.items():
        if name in stated:
            narrow = Range(
                max(low or 1, bounds[name].low), min(high or bounds[name].high, bounds[name].high)
            )
            where = _cite_line(lines.bounds or lines.each)
            raise BadDim(
                f"export: the model does not take every {name} of {bounds[name]}{where}",
                hint=f"narrow it: --dim {name}={narrow}",
            )


def refuse_beyond(fixes: Fixes, bounds: DimRanges, stated: frozenset[str], lines: Lines) -> None:
    """Tell of stated dims that exceed what the model's code takes.

    Raises:
        BadDim: with the dims, the line of model code and the remedy.
    """
    for name, most in read_limits(fixes, bounds).items():
        named = [each for each in find_exceeding_dims(name, most, bounds) if each in stated]
        if named:
            exceeding = " and ".join(f"{each} goes up to {bounds[each].high}" for each in named)
            ends = (f"--dim {each}={min(bounds[each].low, most)}:{most}" for each in named)
            raise BadDim(
                f"export: {exceeding}, and the model's code takes {most} at most: of {most + 1} it "
                f"would do something else{_cite_line(lines.holes[-1:] or lines.each[-1:])}",
                hint=f"end it there: {' '.join(ends)}",
            )


def _refuse_fixed(fixes: Fixes, lines: Lines) -> None:
    """Refuse a dim of which one size fits only, or sizes that no bounds and steps say."""
    for name, size in fixes.sizes.items():
        raise BadDim(
            f"export: the model's code makes {name} the constant {size}"
            f"{_cite_line(lines.each[-1:])}",
            hint=f"give it that one size (--dim {name}={size}:{size}), or change that line",
        )
    for name, form in fixes.forms.items():
        raise BadDim(
            f"export: {name} must be {form} for a whole n{_cite_line(lines.each)}",
            hint=f"give it one such size: --dim {name}=N:N",
        )


def _cite_line(lines: Sequence[str]) -> str:
    """The first of some lines as the end of a sentence, nothing where there is none."""
    return f", at {lines[0]}" if lines else ""


def find_guard_lines(
    module: nn.Module, face: CallSignature, bounds: DimRanges, tensors: Sequence[torch.Tensor]
) -> Lines:
    """Trace once more, to see where torch decides on sizes."""
    answering = FlatModule(module, face).replace_own_forward()
    # It failed before, too; only where it passes on the way is of interest.
    with collect_guard_lines() as lines, suppress(Exception), silence_transformers(), answering:
        _trace(module, face, bounds, tensors)
    return lines


def _apply_fixes(
    face: CallSignature, bounds: DimRanges, fixes: Fixes
) -> tuple[CallSignature, DimRanges]:
    """Face and bounds with what torch suggests of dims that nobody stated."""
    fitting = dict(bounds)
    for name, factor in fixes.multiples.items():
        old = bounds[name]
        low, high = -(-old.low // factor) * factor, old.high // factor * factor
        fitting[name] = Range(low, high, factor)
    for name, (least, most) in fixes.ranges.items():
        old = fitting[name]
        fitting[name] = Range(max(old.low, least or 1), min(old.high, most or old.high), old.step)
    for name in fixes.related:
        fitting.pop(name, None)
    return face.substitute_dims(fixes.related), fitting


def _describe_export_error(error: Exception, lines: Sequence[str]) -> CompileFailed:
    """Torch's words, and what to do about them."""
    if isinstance(error, UnsupportedOperatorException):
        return describe_missing_fake("export", error)
    return CompileFailed(
        f"export: {type(error).__name__}: {first_line(error)}{_cite_line(lines[-1:])}",
        hint="the model does something that cannot be traced; it stays eager",
    )


def _apply_relations(
    program: ExportedProgram, face: CallSignature, bounds: DimRanges
) -> tuple[CallSignature, DimRanges]:
    """Face and bounds with the relations that torch found by itself, as of a sum.

    Raises:
        CompileFailed: a size follows from others in a way that no extent says.
    """
    symbols = map_symbols(program, face, bounds)
    inputs = list(face.inputs)
    for index, axis, _ in face.list_extents():
        size = get_fake_value(program, index).shape[axis]
        if isinstance(size, int):
            continue
        encoded = encode_size(size, symbols)
        if encoded is None:
            raise CompileFailed(
                f"export: {inputs[index].name} has a size of {size} on axis {axis}",
                hint="state the dims of the inputs with shapes=",
            )
        shape = list(inputs[index].shape)
        shape[axis] = encoded
        inputs[index] = msgspec.structs.replace(inputs[index], shape=tuple(shape))
    found = replace(face, inputs=tuple(inputs))
    return found, {name: bounds[name] for name in bounds if name in found.dims}


def _limit_embedding_ids(program: ExportedProgram, face: CallSignature) -> CallSignature:
    """The face with the bounds of numbers that choose rows of a table: others would be outside."""
    inputs = list(face.inputs)
    for index, (entry, node) in enumerate(zip(inputs, list_placeholders(program), strict=True)):
        looked: list[Any] = [
            user.args[0]
            for user in node.users
            if user.target is torch.ops.aten.embedding.default and user.args[1] is node
        ]
        rows = [table.meta["val"].shape[0] for table in looked]
        if entry.values.startswith("any<") and rows:
            inputs[index] = msgspec.structs.replace(entry, values=f"ids<{min(rows)}")
    return replace(face, inputs=tuple(inputs))


def _describe_outputs(
    program: ExportedProgram, face: CallSignature, bounds: DimRanges, flat: FlatModule
) -> Outputs:
    """What the graph answers, with the dims that torch's symbols stand for."""
    symbols = map_symbols(program, face, bounds)
    # Mutated inputs are results, too, inside of torch.
    wanted = {*program.graph_signature.user_outputs}
    nodes = [node for node in program.graph.output_node().args[0] if node.name in wanted]
    results = [node.meta["val"] for node in nodes]
    tensors = tuple(
        Output(
            name=name,
            dtype=name_dtype(result.dtype),
            shape=tuple(encode_size(size, symbols) for size in result.shape),
        )
        for name, result in zip(flat.names, results, strict=True)
    )
    return Outputs(template=flat.template, tensors=tensors, writes=flat.writes or msgspec.UNSET)
