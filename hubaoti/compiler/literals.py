"""Tensors that no state_dict has, written out as numbers where a module is traced.

Loaders that know no manifest bind what is in a module's `state_dict`. What a module computed when
it was made, as the frequencies of a rope, has to be in the graph itself: as operations that make
it, since torch's containers hold either all constants of a graph or none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from hubaoti.compiler.capture import replace_forward
from hubaoti.compiler.patched import shadow_attribute
from hubaoti.errors import CompileFailed

MOST_LITERALS = 1024  # runs of equal numbers that are chosen from, one by one
_Make = Callable[[], torch.Tensor]


@contextmanager
def write_out_buffers(module: nn.Module) -> Iterator[set[str]]:
    """Inside, a call of the module makes what its `state_dict` has not, and reads that.

    Gives the names of those that have too many numbers, and stay as they are.
    """
    found = [
        (where, part, name, make_literal(tensor))
        for where, part, name, tensor in _find_unsaved(module)
    ]
    forward = module.forward

    @functools.wraps(forward)
    def write_out_and_call(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as around:
            for _, part, name, make in found:
                if make is not None:
                    around.enter_context(shadow_attribute(part, name, make()))
            return forward(*args, **kwargs)

    with replace_forward(module, write_out_and_call):
        yield {where for where, *_, make in found if make is None}


def require_unread(program: ExportedProgram, names: Set[str]) -> None:
    """Refuse a program that reads a tensor of these names.

    Raises:
        CompileFailed: with those that it reads.
    """
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    specs = program.graph_signature.input_specs
    read = sorted({str(each.target) for each in specs if each.arg.name in used} & names)
    if read:
        raise CompileFailed(
            f"export: {', '.join(read)} is in no state_dict, and more than {MOST_LITERALS} numbers "
            "of which none follows from another cannot be written into a graph",
            hint="register it as a persistent buffer, or leave --layout zerogpu out and load it by "
            "hubaoti.spaces.load",
        )


def _find_unsaved(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """The tensors of a module that are not in its `state_dict`: where, whose, its name, and what.

    Buffers that are not persistent, and tensors that are plain attributes.
    """
    saved = module.state_dict(keep_vars=True)
    for path, part in module.named_modules(remove_duplicate=False):
        for name, value in (*part.named_buffers(recurse=False), *vars(part).items()):
            where = f"{path}.{name}".lstrip(".")
            if type(value) is torch.Tensor and where not in saved:
                yield where, part, name, value


def make_literal(tensor: torch.Tensor) -> _Make | None:
    """What makes a tensor anew, bit for bit, of nothing but numbers; None if of too many."""
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
    flat = tensor.detach().cpu().reshape(-1)
    ends = _find_run_ends(flat)
    if len(ends) < 2:
        value = flat[0].item() if ends else 0
        return lambda: torch.full(shape, value, dtype=dtype, device=device)
    if counting := _find_progression(flat):
        return lambda: torch.arange(*counting, dtype=dtype, device=device).view(shape)
    if len(ends) > MOST_LITERALS:
        return None
    numbers = [flat[end - 1].item() for end in ends]

    def choose() -> torch.Tensor:
        index = torch.arange(ends[-1], device=device)
        return _select_by_run(numbers, ends, index, dtype).view(shape)

    return choose


def _find_run_ends(flat: torch.Tensor) -> list[int]:
    """The place after each run of numbers that are the same bit for bit, as zero and minus zero are
    not."""
    rows = flat.view(-1, 1).view(torch.uint8) if len(flat) else flat.view(0, 1)
    changes = (rows[1:] != rows[:-1]).any(1).nonzero().flatten() + 1
    return [*changes.tolist(), len(flat)] if len(flat) else []


def _find_progression(flat: torch.Tensor) -> tuple[int, int, int] | None:
    """What `arange` makes whole numbers of that follow one another in equal steps."""
    if flat.dtype.is_floating_point or flat.dtype.is_complex or flat.dtype is torch.bool:
        return None
    first, step = int(flat[0]), int(flat[1]) - int(flat[0])
    counting = (first, first + step * len(flat), step)
    same = step != 0 and torch.equal(flat, torch.arange(*counting, dtype=flat.dtype))
    return counting if same else None


def _select_by_run(
    numbers: Sequence[Any], ends: Sequence[int], index: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """At each place the number whose run it is in; runs end before `ends`."""
    if len(numbers) == 1:
        return torch.full(index.shape, numbers[0], dtype=dtype, device=index.device)
    half = len(numbers) // 2
    first = _select_by_run(numbers[:half], ends[:half], index, dtype)
    last = _select_by_run(numbers[half:], ends[half:], index, dtype)
    return torch.where(index < ends[half - 1], first, last)
