"""A program as a function on the CPU: what the graph that is made of it has to answer.

In float32, too, whatever its dtype: one weight at a time is made wider, so that this takes no more
memory than the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_map

from hubaoti.errors import MissingConstant

_aten = torch.ops.aten
NARROW = (torch.bfloat16, torch.float16)
_CONSTANTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_ROWS = 16 << 20  # elements of a weight that are made wider at a time


class ProgramOnCpu:
    """A program with its constants, called with a graph's inputs; some it may write in place.

    With `wide=True` it computes in float32 what it would in bfloat16 or float16.
    """

    def __init__(self, program: ExportedProgram, *, wide: bool = False) -> None:
        self._program, self._wide = program, wide
        self._tensors: dict[str, Any] = {**program.state_dict, **program.constants}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give it constants by the names that the program has for them; others keep their values.

        Raises:
            MissingConstant: a weight is not among them.
        """
        for name in self._program.graph_signature.parameters:
            if name not in tensors:
                raise MissingConstant(f"the program reads {name}, which is not given")
        self._tensors |= tensors

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """What the program answers; as a graph, it writes into inputs that its module writes."""
        signature = self._program.graph_signature
        given, values = iter(inputs), []
        for spec in signature.input_specs:
            is_constant = spec.kind in _CONSTANTS
            values.append(self._tensors[str(spec.target)] if is_constant else next(given))
        with torch.no_grad():
            answers = _Run(self._program.graph_module, self._wide).run(*values)
        outputs, named = [], {spec.arg.name: index for index, spec in self._number_inputs()}
        for spec, answer in zip(signature.output_specs, answers, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(answer)
            elif spec.kind is OutputKind.USER_INPUT_MUTATION:
                inputs[named[str(spec.target)]].copy_(answer)
        return outputs

    def _number_inputs(self) -> list[tuple[int, Any]]:
        """The inputs of a call with their places."""
        specs = self._program.graph_signature.input_specs
        return [*enumerate(spec for spec in specs if spec.kind is InputKind.USER_INPUT)]


class _Run(fx.Interpreter):
    """One run of a graph, node by node; values go as soon as nobody reads them any more."""

    def __init__(self, module: fx.GraphModule, wide: bool) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._wide = wide

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a node computes, of wider numbers where this run is wide."""
        compute = _INSTEAD.get(target, target)
        args, kwargs = tree_map(self._wrap_graph, (args, kwargs))
        if not self._wide:
            return compute(*args, **kwargs)
        if target is _aten.linear.default and args[1].dtype in NARROW and args[1].numel() > _ROWS:
            return _multiply_by_parts(*args)
        args, kwargs = tree_map(widen, (args, kwargs))
        return compute(*args, **kwargs)

    def _wrap_graph(self, value: Any) -> Any:
        """The graph of a higher-order op, which is run in the same way."""
        if isinstance(value, fx.GraphModule):
            return _Run(value, self._wide).run
        return value


def widen(value: Any) -> Any:
    """A tensor of a half type, or such a type itself, in float32; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in NARROW:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in NARROW else value


def _multiply_by_parts(
    value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer in float32 of whose weight only a part is in float32 at any time."""
    rows = max(1, _ROWS // weight.shape[1])
    starts = range(0, weight.shape[0], rows)
    parts = [value.float() @ weight[start : start + rows].float().T for start in starts]
    made = torch.cat(parts, -1)
    return made if bias is None else made + bias.float()


def _multiply_scaled(  # noqa: PLR0913 - the op's own
    left: torch.Tensor,
    right: torch.Tensor,
    scale_left: torch.Tensor,
    scale_right: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`aten._scaled_mm` in float32; the CPU's own has no scales by rows on every torch."""
    made = (left.float() * scale_left) @ (right.float() * scale_right)
    made = made if bias is None else made + bias.float()
    made = made if scale_result is None else made * scale_result
    return made.to(out_dtype or left.dtype)


_INSTEAD: dict[Any, Callable[..., Any]] = {_aten._scaled_mm.default: _multiply_scaled}
