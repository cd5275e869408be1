"""Ops of ours as C that is compiled into a library: it asks torch's dispatcher for them.

Else a library asks torch's proxy executor, which only torch's own runners make, whose calls let no
other thread of Python go on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

from hubaoti.compiler.symbols import list_parts
from hubaoti.runtime.attention_ops import NAMESPACE

# An argument by its type in a schema: its type in C, as inductor gives it, and how it is put where
# the dispatcher takes it, in 8 bytes (`StableIValue`, torch 2.11 to 2.15), of which a tensor is a
# handle of its own, and one that may be missing the address of that.
_TYPES = {
    "Tensor": ("AtenTensorHandle", "error = error ? error : own({name}, &stack[{place}]);"),
    "Optional[Tensor]": (
        "AtenTensorHandle*",
        "if ({name} && !error) error = own(*{name}, new_place(&stack[{place}]));",
    ),
    "float": ("double", "std::memcpy(&stack[{place}], &{name}, 8);"),
    "bool": ("int32_t", "stack[{place}] = {name} != 0;"),
    "int": ("int64_t", "stack[{place}] = static_cast<uint64_t>({name});"),
}
# It is in no library's table of symbols: each library has its own.
_SHIM = """__attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cuda_{op}(
    {arguments}, AtenTensorHandle* answer) {{
  auto own = [](AtenTensorHandle given, uint64_t* place) {{
    AtenTensorHandle made = nullptr;
    AOTITorchError error = aoti_torch_new_tensor_handle(given, &made);
    *place = reinterpret_cast<uint64_t>(made);
    return error;
  }};
  [[maybe_unused]] auto new_place = [](uint64_t* place) {{
    uint64_t* made = new uint64_t(0);
    *place = reinterpret_cast<uint64_t>(made);
    return made;
  }};
  AOTITorchError error = AOTI_TORCH_SUCCESS;
  uint64_t stack[{count}] = {{}};
  {puts}
  error = error ? error : aoti_torch_call_dispatcher("{name}", "", stack);
  if (!error) *answer = reinterpret_cast<AtenTensorHandle>(stack[0]);
  return error;
}}"""


def write_shims(program: ExportedProgram) -> dict[Any, list[str]]:
    """What inductor is told of each op of ours that a program calls on a GPU; empty without one."""
    nodes = (node for part in list_parts(program) for node in part.graph.nodes)
    ops = {node.target for node in nodes if _is_own(node)}
    return {op: [_write_shim(op)] for op in sorted(ops, key=str)}


def _write_shim(op: torch._ops.OpOverload) -> str:
    """The C function by which a library calls an op that answers one tensor."""
    arguments = op._schema.arguments
    types = [_TYPES[str(argument.type)] for argument in arguments]
    puts = [
        put.format(name=argument.name, place=place)
        for place, (argument, (_, put)) in enumerate(zip(arguments, types, strict=True))
    ]
    return _SHIM.format(
        op=op._schema.name.partition("::")[2],
        name=op._schema.name,
        arguments=", ".join(
            f"{kind} {argument.name}" for argument, (kind, _) in zip(arguments, types, strict=True)
        ),
        count=len(arguments),
        puts="\n  ".join(puts),
    )


def _is_own(node: torch.fx.Node) -> bool:
    """Whether a node calls an op of ours on a GPU."""
    op, value = node.target, node.meta.get("val")
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != NAMESPACE:
        return False
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"
