"""A program as a function on the CPU: what the graph that is made of it has to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from hubaoti.compiler.precision import compute_scaled
from hubaoti.errors import MissingConstant

_CONSTANTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


class ProgramOnCpu:
    """A program with its constants; called as its graph is, it writes what its module writes."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph, self._signature = program.graph_module, program.graph_signature
        self._tensors: dict[str, Any] = {**program.state_dict, **program.constants}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give it constants by the names that the program has for them; others keep their values.

        Raises:
            MissingConstant: a weight is not among them.
        """
        for name in self._signature.parameters:
            if name not in tensors:
                raise MissingConstant(f"the program reads {name}, which is not given")
        self._tensors |= tensors

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What the program answers to the inputs of a graph."""
        given, values = iter(inputs), []
        for spec in self._signature.input_specs:
            is_constant = spec.kind in _CONSTANTS
            values.append(self._tensors[str(spec.target)] if is_constant else next(given))
        with torch.no_grad(), compute_scaled(self._graph):
            answers = self._graph(*values)
        named = dict(zip(self._signature.user_inputs, inputs, strict=True))
        outputs = []
        for spec, answer in zip(self._signature.output_specs, answers, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(answer)
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                named[str(spec.target)].copy_(answer)
        return outputs


def list_constants(program: ExportedProgram) -> list[str]:
    """The names of what a program reads beside its inputs."""
    specs = program.graph_signature.input_specs
    return [str(spec.target) for spec in specs if spec.kind in _CONSTANTS]
