"""One launch of a kernel, computed by Triton's interpreter over the stand-in's memory.

Several blocks of a grid are computed as one larger block where a kernel's text shows that this is
the same: numpy takes a row of 4096 numbers nearly as fast as one of 64. Only whole blocks that the
launch asks for are joined, so a grid that is too small leaves out what it leaves out on a GPU.

Private, checked on triton 3.6 and 3.9: `interpreter_builder`, `TensorHandle`.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.kernels import Kernel
from hubaoti.compiler.interpreter.memory import find_on_host

_SCALARS: dict[str, Any] = {
    "i1": ctypes.c_bool,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u1": ctypes.c_bool,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
_AXES = "XYZ"
# How a block's place follows from its number, in kernels of which blocks may be joined.
_OFFSET = re.compile(
    r"[xyz]offset = tl\.program_id\(([012])\)(?:\.to\(tl\.int64\))? \* ([XYZ])BLOCK$"
)
_INNER = re.compile(r"\b(R\d_BLOCK)(?:: tl\.constexpr)? = (\d+)$", re.MULTILINE)
_LARGEST = 1 << 16  # numbers in a block that was joined


def run_launch(kernel: Kernel, grid: tuple[int, int, int], params: Any) -> None:
    """Compute a launch: `params` points to the places of its arguments, as `cuLaunchKernel` has it.

    Raises:
        NotInterpreted: an argument is of a kind that the interpreter has not.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    language: Any = import_module("triton.language")
    given = {
        name: _read_argument(interpreter, language, kind, params[index])
        for index, (name, kind) in enumerate(kernel.passed.items())
    }
    wanted, annotations = kernel.function.arg_names, kernel.function.fn.__annotations__
    plain = {name for name, annotation in annotations.items() if "constexpr" in str(annotation)}
    fixed = {
        name: value if name in plain or value is None else interpreter._implicit_cvt(value)
        for name, value in kernel.fixed.items()
        if name in wanted
    }
    if lost := [name for name in wanted if name not in given and name not in fixed]:
        raise NotInterpreted(f"{kernel.name}: nobody knows its {', '.join(lost)}")
    if "x_grid_barrier" in kernel.text:  # one block after the other, it would wait for ever
        raise NotInterpreted(f"{kernel.name}: its blocks wait for each other")
    builder, function = interpreter.interpreter_builder, kernel.function.rewrite()
    builder.grid_dim = grid
    for place, sizes in _split_grid(kernel, grid):
        builder.grid_idx = place
        function(**given, **(fixed | sizes))


def _read_argument(interpreter: Any, language: Any, kind: str, place: int) -> Any:
    """An argument as the interpreter has it: an address of the host, or a number.

    Raises:
        NotInterpreted: it is neither.
    """
    if kind.startswith("*"):
        address = ctypes.cast(place, ctypes.POINTER(ctypes.c_void_p))[0]
        data = np.array([find_on_host(address or 0)], dtype=np.uint64)
    elif kind in _SCALARS:
        number = ctypes.cast(place, ctypes.POINTER(_SCALARS[kind]))[0]
        data = np.array([number], dtype=np.dtype(_SCALARS[kind]))
    else:
        raise NotInterpreted(f"an argument of type {kind}")
    typed = language.str_to_ty(kind, None)
    return language.tensor(interpreter.TensorHandle(data, typed), typed)


def _split_grid(
    kernel: Kernel, grid: tuple[int, int, int]
) -> Iterator[tuple[tuple[int, ...], dict[str, int]]]:
    """A grid in parts: the number of each block, and its sizes where several are joined."""
    sizes = _find_joinable(kernel)
    room = max(1, _LARGEST // prod((*sizes.values(), *_read_inner_blocks(kernel))))
    axes = []
    for axis, count in enumerate(grid):
        axes.append([*_split_axis(count, room if axis in sizes else 1)])
        room //= max((joined for _, joined in axes[-1]), default=1)
    for parts in itertools.product(*axes):
        joined = {f"{_AXES[axis]}BLOCK": size * parts[axis][1] for axis, size in sizes.items()}
        yield tuple(number for number, _ in parts), joined


def _split_axis(count: int, room: int) -> Iterator[tuple[int, int]]:
    """So many blocks as runs of 1, 2, 4, … of them: the number that a run has among its equals, and
    how many blocks it is."""
    start, joined = 0, 1 << (max(room, 1).bit_length() - 1)
    while start < count:
        while start + joined > count:
            joined //= 2
        yield start // joined, joined
        start += joined


def _find_joinable(kernel: Kernel) -> dict[int, int]:
    """The axes along which blocks may be joined, with the size of a block; none if unsure."""
    lines = [line.strip() for line in kernel.text.splitlines() if "program_id" in line]
    matches = [_OFFSET.fullmatch(line) for line in lines]
    if not all(matches) or "num_programs" in kernel.text:
        return {}
    found = {int(match[1]): f"{match[2]}BLOCK" for match in matches if match}
    if any(_AXES[axis] != block[0] for axis, block in found.items()):
        return {}
    return {axis: kernel.fixed[block] for axis, block in found.items() if block in kernel.fixed}


def _read_inner_blocks(kernel: Kernel) -> Sequence[int]:
    """The sizes of a block's other axes, over which it reduces."""
    written = {name: int(size) for name, size in _INNER.findall(kernel.text)}
    given = {n: v for n, v in kernel.fixed.items() if re.fullmatch(r"R\d_BLOCK", n)}
    return [*(written | given).values()]
