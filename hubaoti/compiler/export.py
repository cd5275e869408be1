"""torch.export, through transformers' exporter, with one named Dim for each of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import example_inputs, example_sizes
from hubaoti.compiler.source import Source, quiet
from hubaoti.errors import BadDim, CompileFailed, first_line
from hubaoti.manifest import Input, Output, Outputs

VALUES = {"attention_mask": "mask"}


@dataclass(frozen=True, slots=True)
class Exported:
    """A program that torch can lower, and its face in the manifest's words."""

    program: ExportedProgram
    inputs: tuple[Input, ...]
    outputs: Outputs


def export(source: Source, dims: dict[str, Range], device: torch.device) -> Exported:
    """Trace a model once, for every size within the dims.

    Raises:
        BadDim: the model takes only one size of a dim.
        CompileFailed: it cannot be traced.
    """
    inputs = example_inputs(example_sizes(dims), source.vocabulary, device)
    named = {name: dim_of(name, sizes) for name, sizes in dims.items()}
    shapes = {name: {0: named["batch"], 1: named["seq"]} for name in inputs}
    try:
        with quiet():
            program = trace(source.model, inputs, shapes)
    except Exception as why:  # torch raises of many kinds, each with its own words
        raise explained(why) from why
    return Exported(program, inputs_of(program, dims, source), outputs_of(program, source))


def dim_of(name: str, sizes: Range) -> Any:
    """A named Dim, or the number itself where there is only one size."""
    return Dim(name, min=sizes.low, max=sizes.high) if sizes.low < sizes.high else sizes.low


def trace(model: nn.Module, inputs: dict[str, torch.Tensor], shapes: Any) -> ExportedProgram:
    """Export through transformers, whose patches make more models traceable.

    Checked on transformers 5.17 to 5.22 (there since 5.15, marked experimental). The public way,
    `torch.export.export`, takes the same inputs.
    """
    try:
        from transformers.exporters import exporter_dynamo
    except ImportError:
        with torch.no_grad():
            return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    private: Any = exporter_dynamo
    config = private.DynamoConfig(dynamic_shapes=shapes)
    program: ExportedProgram = private.DynamoExporter().export(model, dict(inputs), config)
    return program


def explained(why: Exception) -> BadDim | CompileFailed:
    """Torch's words, and what to do about them."""
    if "ConstraintViolation" in type(why).__name__ or "Constraints violated" in str(why):
        return BadDim(
            f"export: the model does not take every size of a dim: {constraint(str(why))}",
            hint="narrow the dim with --dim, as the message says",
        )
    return CompileFailed(
        f"export: {type(why).__name__}: {first_line(why)}",
        hint="the model does something that cannot be traced; it stays eager",
    )


def constraint(text: str) -> str:
    """The line of torch's message that names the dim."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip().startswith("-")]
    return lines[0] if lines else text.splitlines()[0]


def inputs_of(
    program: ExportedProgram, dims: dict[str, Range], source: Source
) -> tuple[Input, ...]:
    """The inputs in the order in which the compiled graph takes them."""
    found = []
    for node in placeholders(program):
        fake = node.meta["val"]
        found.append(
            Input(
                name=node.name,
                dtype=str(fake.dtype).removeprefix("torch."),
                shape=("batch", "seq"),
                values=VALUES.get(node.name, f"ids<{source.vocabulary}"),
            )
        )
    return tuple(found)


def placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    """The graph's user inputs, in order."""
    names = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names]


def outputs_of(program: ExportedProgram, source: Source) -> Outputs:
    """The outputs, with the dims that torch's symbols stand for."""
    names: dict[str, str] = {}
    for node in placeholders(program):
        sizes = zip(node.meta["val"].shape, ("batch", "seq"), strict=True)
        names |= {str(size): dim for size, dim in sizes if not isinstance(size, int)}
    results = [n for n in program.graph.nodes if n.op == "output"][0].args[0]
    tensors = tuple(
        Output(
            name=source.output if at == 0 else f"{source.output}_{at}",
            dtype=str(node.meta["val"].dtype).removeprefix("torch."),
            shape=tuple(size_name(size, names) for size in node.meta["val"].shape),
        )
        for at, node in enumerate(results)
    )
    return Outputs(template=[{"tensor": at} for at in range(len(tensors))], tensors=tensors)


def size_name(size: Any, names: dict[str, str]) -> str | int | None:
    """A size as the manifest says it: a number, a dim, or None for an expression."""
    return size if isinstance(size, int) else names.get(str(size))
