"""Torch's C shims for a device: read from its header, and C that tells each call of one.

Compiled packages call ATen through these functions. The header is torch's own
(`torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h`, checked on torch 2.11 to 2.15), so that a
newer torch needs nothing new here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHIMS = Path("torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h")
_FUNCTION = re.compile(r"AOTITorchError\s+aoti_torch_cuda_(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"(.*[\s*])(\w+)")
# They give another view of a tensor, or call only what torch's dispatcher sees: torch's own serve.
_VIEWS = {
    *("narrow", "permute", "reshape", "resize_", "resize_as_", "set__source_Tensor"),
    *("slice_Tensor", "squeeze_dim", "view_as_complex", "view_as_real", "view_dtype"),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a C function: its type without spaces, as `constint64_t*`, and its name."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Shim:
    """A function of the header: its name after `aoti_torch_cuda_`, and what it takes."""

    name: str
    parameters: tuple[Parameter, ...]


def read_shims(include: Path) -> tuple[Shim, ...]:
    """The functions that a package may call of torch whose header files are in `include`.

    Views of tensors are left to torch, which computes nothing for them.
    """
    header = (include / SHIMS).read_text()
    found = (Shim(name, _read_parameters(text)) for name, text in _FUNCTION.findall(header))
    return tuple(shim for shim in found if shim.name not in _VIEWS)


def _read_parameters(text: str) -> tuple[Parameter, ...]:
    """What stands between the parentheses of a declaration."""
    matches = (_PARAMETER.fullmatch(each.strip()) for each in text.split(",") if each.strip())
    return tuple(Parameter("".join(m[1].split()), m[2]) for m in matches if m)


def write_shims(include: Path) -> str:
    """C that stands before all of these functions, with what they need of `aten.c`."""
    shared = (Path(__file__).parent / "aten.c").read_text()
    return "\n".join((shared, *map(_write_shim, read_shims(include)), ""))


def _write_shim(shim: Shim) -> str:
    """The function that stands before one of torch's."""
    name = f"aoti_torch_cuda_{shim.name}"
    kinds = [
        "void *" if each.kind.endswith(("*", "Handle")) else each.kind for each in shim.parameters
    ]
    taken = ", ".join(f"{kind} a{index}" for index, kind in enumerate(kinds))
    places = ", ".join(f"&a{index}" for index in range(len(kinds)))
    given = ", ".join(f"a{index}" for index in range(len(kinds)))
    return (
        f"int32_t {name}({taken}) {{\n"
        f"    static int32_t (*torchs)({', '.join(kinds)});\n"
        f"    void *arguments[] = {{{places}}};\n"
        f'    if (answer) return answer("{shim.name}", arguments);\n'
        f'    if (!torchs) torchs = find_torchs("{name}");\n'
        f"    return torchs({given});\n"
        "}"
    )
