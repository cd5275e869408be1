"""FlashAttention-3: which builds can have graphs that call it, and what of these does not."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from hubaoti.artifact.schema import Graph, Target
from hubaoti.compiler.request import refuse_fa3_for
from hubaoti.compiler.symbols import list_parts
from hubaoti.errors import BadRequest, CompileFailed

_HALF = ("bfloat16", "float16")
WIDEST = 256  # heads, of a build that has all of its code
_BUILD_FLAGS = "build_flags"
_LARGEST_CONFIG = 64 << 10  # bytes


@dataclass(frozen=True, slots=True)
class KernelAbilities:
    """What a build of the kernel has beside bfloat16; by default what one has that says nothing.

    Nothing of ours asks for windows, softcap and paging. `lengths` and `appends` are what a graph
    asks for that is told where a text begins, and `widest` is the widest head.
    """

    fp16: bool = False
    windows: bool = False
    softcap: bool = False
    paging: bool = False
    lengths: bool = True
    appends: bool = True
    widest: int = WIDEST


_OPTIONAL = {"fp16": "FP16", "windows": "LOCAL", "softcap": "SOFTCAP", "paging": "PAGEDKV"}
_USUAL = {"lengths": "VARLEN", "appends": "APPENDKV"}
_WIDTHS = (64, 96, 128, 192, 256)  # a head has the next one's code
assert {*_OPTIONAL, *_USUAL, "widest"} == {each.name for each in fields(KernelAbilities)}


_NAMES = (*_OPTIONAL.values(), *_USUAL.values(), *(f"HDIM{width}" for width in _WIDTHS))


def read_abilities(files: Mapping[str, Path]) -> KernelAbilities:
    """What a build of the kernel has, of whose files these are, by the flags that its setup wrote.

    They are read and not run. Without them, or where they cannot be read, it is the default.
    """
    for path in sorted(path for path in files if path.endswith("_config.py")):
        if flags := _read_flags(files[path]):
            lacks = {name: flags.get(f"FLASHATTENTION_DISABLE_{name}") for name in _NAMES}
            widths = [width for width in _WIDTHS if not lacks[f"HDIM{width}"]]
            return KernelAbilities(
                **{name: lacks[flag] is False for name, flag in _OPTIONAL.items()},
                **{name: not lacks[flag] for name, flag in _USUAL.items()},
                widest=max(widths, default=0),
            )
    return KernelAbilities()


def _read_flags(path: Path) -> dict[str, object]:
    """The flags of `CONFIG = {"build_flags": {…}}` in a file; none where it says something else."""
    if path.stat().st_size > _LARGEST_CONFIG:
        return {}
    try:
        body = ast.parse(path.read_bytes()).body
        values = [
            ast.literal_eval(each.value)
            for each in body
            if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "CONFIG"
        ]
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return {}
    config = values[0] if values and isinstance(values[0], dict) else {}
    flags = config.get(_BUILD_FLAGS)
    return flags if isinstance(flags, dict) else {}


_MASKED = "memory-efficient"
_OTHERS: Mapping[Any, str] = {  # what computes attention otherwise, as programs call it
    torch.ops.aten._scaled_dot_product_flash_attention.default: "flash",
    torch.ops.aten._scaled_dot_product_efficient_attention.default: _MASKED,
}
_MASK = 3  # its place among the arguments of that


def list_other_attention(program: ExportedProgram) -> tuple[str, ...]:
    """The attention of a program that another kernel computes: each kind of it once."""
    nodes = (node for part in list_parts(program) for node in part.graph.nodes)
    return tuple(dict.fromkeys(map(_describe, (n for n in nodes if n.target in _OTHERS))))


def _describe(node: torch.fx.Node) -> str:
    """What a node computes, and by what."""
    kernel, given = _OTHERS[node.target], [*node.args]
    key: Any = given[1]
    heads, _, width = key.meta["val"].shape[1:]
    masked = " under a mask" * (kernel == _MASKED and given[_MASK] is not None)
    return f"{heads} heads of {width}{masked}: {kernel}"


def refuse_unused(graphs: Sequence[Graph]) -> CompileFailed:
    """Why graphs that were asked for with the kernel, and call it nowhere, are not kept."""
    others = dict.fromkeys(each for graph in graphs for each in graph.not_fa3 or ())
    found = f"its attention is {'; '.join(others)}" if others else "nothing in it attends"
    return CompileFailed(
        f"lower: no graph calls FlashAttention-3, which takes no masks: {found}",
        hint="compile it with --attention sdpa",
    )


def refuse_fa3(target: Target, dtype: str) -> BadRequest | None:
    """Why no build of the kernel serves a target and a dtype; None where one may."""
    if refusal := refuse_fa3_for(target.sm):
        return refusal
    return None if dtype in _HALF else _refuse_dtype(dtype, "the kernel")


def require_dtype(dtype: str, abilities: KernelAbilities, kernel: str) -> None:
    """See that a build of the kernel computes in a half type.

    Raises:
        BadRequest: it does not.
    """
    if dtype != "bfloat16" and not abilities.fp16:
        raise _refuse_dtype(dtype, kernel)


def _refuse_dtype(dtype: str, kernel: str) -> BadRequest:
    return BadRequest(
        f"--attention fa3 is asked in {dtype}, in which {kernel} does not compute",
        hint="add --dtype bfloat16, or leave it with --attention sdpa",
    )
