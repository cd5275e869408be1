"""torch.export of a module as its face calls it, with one named Dim for each of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch import nn
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from hubaoti.compiler.faces import Face, Flat, plain_size, substitute
from hubaoti.compiler.guards import (
    Fixes,
    Lines,
    beyond,
    fixes_in,
    guard_lines,
    limits_in,
    within_guards,
)
from hubaoti.compiler.index_guards import guard_indices
from hubaoti.compiler.observe import without_fake
from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import Bounds
from hubaoti.compiler.source import quiet
from hubaoti.compiler.symbols import extent_of, fake, placeholders, symbols_of
from hubaoti.errors import BadDim, CompileFailed, HubaotiError, first_line
from hubaoti.manifest import Output, Outputs

ATTEMPTS = 4  # at refining dims; torch tells of one thing at a time


@dataclass(frozen=True, slots=True)
class Exported:
    """A program that torch can lower, the face and the bounds it has, and what it answers."""

    program: ExportedProgram
    face: Face
    bounds: Bounds
    outputs: Outputs


def export(
    module: nn.Module,
    face: Face,
    bounds: Bounds,
    tensors: Sequence[torch.Tensor],
    stated: frozenset[str],
) -> Exported:
    """Trace a module once, for every size within the bounds.

    Dims that nobody stated are refined as the model's code wants them; of a stated one the user is
    told.

    Raises:
        BadDim: the model takes only some sizes of a stated dim, or relates it to another.
        CompileFailed: it cannot be traced.
    """
    for _ in range(ATTEMPTS):
        flat = Flat(module, face)
        try:
            with flat.answering(), quiet():
                program = trace(module, face, bounds, tensors)
        except HubaotiError:
            raise
        except Exception as why:  # torch raises of many kinds, each with its own words
            fixes = fixes_in(str(why))
            lines = lines_of(module, face, bounds, tensors)
            require_allowed(fixes, bounds, stated, lines)
            fixes = within_guards(fixes, bounds)
            if not any((fixes.multiples, fixes.related, fixes.ranges)):
                raise refused(why, lines.each) from why
            face, bounds = refined(face, bounds, fixes)
            continue
        keep_names(program)
        face, bounds = related(program, face, bounds)
        face = with_ids(program, face)
        if all(tensor.device.type == "cpu" for tensor in tensors):
            guard_indices(
                program, [*zip(placeholders(program), face.inputs, strict=True)], face.cache
            )
        return Exported(program, face, bounds, outputs_of(program, face, bounds, flat))
    raise CompileFailed(
        f"export: torch wants other dims after {ATTEMPTS} attempts",
        hint="state the dims of the inputs, or compile with fewer of them",
    )


def keep_names(program: ExportedProgram) -> None:
    """Let inductor keep the names of tensors that stand in the model's code, as `tensor(16.0)`.

    It gives constants names of its own, which nothing leads back from; buffers keep theirs.
    """
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


def trace(
    module: nn.Module, face: Face, bounds: Bounds, tensors: Sequence[torch.Tensor]
) -> ExportedProgram:
    """Export through transformers for a whole model, whose patches make more of them traceable.

    Checked on transformers 5.15 to 5.24, where it is marked experimental. The public way,
    `torch.export.export`, takes the same tensors.
    """
    shapes = dynamic_shapes(face, bounds)
    names = [entry.name for entry in face.inputs]
    exporter = whole_exporter(module)
    if exporter is None:
        with torch.no_grad():
            return torch.export.export(
                module, tuple(tensors), dynamic_shapes=(tuple(shapes),), strict=False
            )
    config = exporter.DynamoConfig(dynamic_shapes=dict(zip(names, shapes, strict=True)))
    return program_by(
        exporter.DynamoExporter(), module, dict(zip(names, tensors, strict=True)), config
    )


def program_by(
    exporter: Any, module: nn.Module, inputs: dict[str, torch.Tensor], config: Any
) -> ExportedProgram:
    """The program that transformers' exporter traces; from 5.23 on `export` makes a model of it."""
    program: ExportedProgram
    if hasattr(exporter, "export_program"):
        program, _ = exporter.export_program(module, inputs, config)
    else:
        program = exporter.export(module, inputs, config)
    return program


def whole_exporter(module: nn.Module) -> Any:
    """transformers' exporter, for what it is made for: whole models of transformers."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return None
    try:
        from transformers.exporters import exporter_dynamo
    except ImportError:
        return None
    return exporter_dynamo


def dynamic_shapes(face: Face, bounds: Bounds) -> list[dict[int, Any]]:
    """Torch's Dims for each input; an axis with one size has none."""
    single = {name: sizes.low for name, sizes in bounds.items() if sizes.low == sizes.high}
    roots = {name: root_of(name, bounds[name]) for name in bounds.keys() - single.keys()}
    shapes: list[dict[int, Any]] = [{} for _ in face.inputs]
    for at, axis, whole in face.extents():
        extent = substitute(whole, single)
        if not extent.terms:
            continue
        if len(extent.terms) > 1:  # torch finds the sum by itself
            shapes[at][axis] = Dim.DYNAMIC
            continue
        name, factor = extent.terms[0]
        dim = times(roots[name], factor * bounds[name].step)
        shapes[at][axis] = dim + extent.plus if extent.plus else dim
    return shapes


def times(dim: Any, factor: int) -> Any:
    """A multiple of a Dim; torch has no word for the one-fold of one."""
    return factor * dim if factor != 1 else dim


def root_of(name: str, sizes: Range) -> Any:
    """The Dim that counts the steps of one of ours."""
    step = sizes.step
    own = name if step == 1 else f"_{name}"
    return Dim(own, min=sizes.low // step, max=sizes.high // step)


def require_allowed(fixes: Fixes, bounds: Bounds, stated: frozenset[str], lines: Lines) -> None:
    """Refuse what nobody may decide but the user, and what no bounds can mend.

    Raises:
        BadDim: with the dim, the line of model code and the remedy.
    """
    refuse_fixed(fixes, lines)
    refuse_beyond(fixes, bounds, stated, lines)
    for name, factor in fixes.multiples.items():
        if name in stated:
            first, last = -(-bounds[name].low // factor), bounds[name].high // factor
            raise BadDim(
                f"export: {name} must be a multiple of {factor}{at_line(lines.each)}",
                hint=f"say so: --dim {name}={max(first, 1) * factor}:{last * factor}:{factor}",
            )
    for name, extent in fixes.related.items():
        if name in stated:
            raise BadDim(
                f"export: {name} must always be {extent}{at_line(lines.each)}",
                hint=f'say so where the shape names {name}: shapes={{…: ("{extent}", …)}}',
            )
    for name, (low, high) in fixes.ranges.items():
        if name in stated:
            narrow = Range(
                max(low or 1, bounds[name].low), min(high or bounds[name].high, bounds[name].high)
            )
            where = at_line(lines.bounds or lines.each)
            raise BadDim(
                f"export: the model does not take every {name} of {bounds[name]}{where}",
                hint=f"narrow it: --dim {name}={narrow}",
            )


def refuse_beyond(fixes: Fixes, bounds: Bounds, stated: frozenset[str], lines: Lines) -> None:
    """Tell of stated dims that exceed what the model's code takes.

    Raises:
        BadDim: with the dims, the line of model code and the remedy.
    """
    for name, most in limits_in(fixes, bounds).items():
        named = [each for each in beyond(name, most, bounds) if each in stated]
        told = " and ".join(f"{each} goes up to {bounds[each].high}" for each in named)
        ends = (f"--dim {each}={min(bounds[each].low, most)}:{most}" for each in named)
        if named:
            raise BadDim(
                f"export: {told}, and the model's code takes {most} at most: of {most + 1} it "
                f"would do something else{at_line(lines.holes[-1:] or lines.each[-1:])}",
                hint=f"end it there: {' '.join(ends)}",
            )


def refuse_fixed(fixes: Fixes, lines: Lines) -> None:
    """Refuse a dim of which one size fits only, or sizes that no bounds and steps say.

    Raises:
        BadDim: with the dim, the line of model code and the remedy.
    """
    for name, size in fixes.sizes.items():
        raise BadDim(
            f"export: the model's code makes {name} the constant {size}{at_line(lines.each[-1:])}",
            hint=f"give it that one size (--dim {name}={size}:{size}), or change that line",
        )
    for name, form in fixes.forms.items():
        raise BadDim(
            f"export: {name} must be {form} for a whole n{at_line(lines.each)}",
            hint=f"give it one such size: --dim {name}=N:N",
        )


def at_line(lines: Sequence[str]) -> str:
    """Where it was decided, as the end of a sentence."""
    return f", at {lines[0]}" if lines else ""


def lines_of(
    module: nn.Module, face: Face, bounds: Bounds, tensors: Sequence[torch.Tensor]
) -> Lines:
    """Trace once more, to see where torch decides on sizes."""
    answering = Flat(module, face).answering()
    # It failed before, too; only where it passes on the way is of interest.
    with guard_lines() as lines, suppress(Exception), quiet(), answering:
        trace(module, face, bounds, tensors)
    return lines


def refined(face: Face, bounds: Bounds, fixes: Fixes) -> tuple[Face, Bounds]:
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
    return face.renamed(fixes.related), fitting


def refused(why: Exception, lines: Sequence[str]) -> CompileFailed:
    """Torch's words, and what to do about them."""
    if isinstance(why, UnsupportedOperatorException):
        return without_fake("export", why)
    return CompileFailed(
        f"export: {type(why).__name__}: {first_line(why)}{at_line(lines[-1:])}",
        hint="the model does something that cannot be traced; it stays eager",
    )


def related(program: ExportedProgram, face: Face, bounds: Bounds) -> tuple[Face, Bounds]:
    """Face and bounds with the relations that torch found by itself, as of a sum.

    Raises:
        CompileFailed: a size follows from others in a way that no extent says.
    """
    symbols = symbols_of(program, face, bounds)
    inputs = list(face.inputs)
    for at, axis, _ in face.extents():
        size = fake(program, at).shape[axis]
        if isinstance(size, int):
            continue
        extent = extent_of(size, symbols)
        if extent is None:
            raise CompileFailed(
                f"export: {inputs[at].name} has a size of {size} on axis {axis}",
                hint="state the dims of the inputs with shapes=",
            )
        shape = list(inputs[at].shape)
        shape[axis] = plain_size(extent)
        inputs[at] = msgspec.structs.replace(inputs[at], shape=tuple(shape))
    found = replace(face, inputs=tuple(inputs))
    return found, {name: bounds[name] for name in bounds if name in found.dims}


def with_ids(program: ExportedProgram, face: Face) -> Face:
    """The face with the bounds of numbers that choose rows of a table: others would be outside."""
    inputs = list(face.inputs)
    for at, (entry, node) in enumerate(zip(inputs, placeholders(program), strict=True)):
        looked: list[Any] = [
            user.args[0]
            for user in node.users
            if user.target is torch.ops.aten.embedding.default and user.args[1] is node
        ]
        rows = [table.meta["val"].shape[0] for table in looked]
        if entry.values.startswith("any<") and rows:
            inputs[at] = msgspec.structs.replace(entry, values=f"ids<{min(rows)}")
    return replace(face, inputs=tuple(inputs))


def outputs_of(program: ExportedProgram, face: Face, bounds: Bounds, flat: Flat) -> Outputs:
    """What the graph answers, with the dims that torch's symbols stand for."""
    symbols = symbols_of(program, face, bounds)
    names = iter(flat.names)
    tensors = tuple(
        Output(
            name=next(names),
            dtype=str(result.dtype).removeprefix("torch."),
            shape=tuple(named_size(size, symbols) for size in result.shape),
        )
        for result in results_of(program)
    )
    return Outputs(template=flat.template, tensors=tensors, writes=flat.writes or msgspec.UNSET)


def named_size(size: Any, symbols: Mapping[Any, Any]) -> str | int | None:
    """A size as the manifest says it: a number, an extent, or None for another expression."""
    extent = extent_of(size, symbols)
    return None if extent is None else plain_size(extent)


def results_of(program: ExportedProgram) -> Iterator[Any]:
    """What the user gets of a graph's results: mutated inputs are results, too, inside of torch."""
    wanted = {*program.graph_signature.user_outputs}
    for node in next(n for n in program.graph.nodes if n.op == "output").args[0]:
        if node.name in wanted:
            yield node.meta["val"]
