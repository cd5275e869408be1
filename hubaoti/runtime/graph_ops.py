"""The ops that a package calls through torch's dispatcher: registered before it is opened, as then.

An op that is missing is met in native code, by the first call, where nothing can be said of it. To
one that has another schema by now a library gives what it took when it was compiled: nobody would
see which argument is which.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import torch

from hubaoti.artifact.schema import LONGEST_SCHEMA, Graph
from hubaoti.errors import CannotOpen, KernelSchemaMismatch, MissingOps
from hubaoti.runtime.attention_ops import NAMESPACE

# What to do where an op is missing: only its caller knows which module registers it.
NAME_OPS = 'name the module that registers it: ops=["my.ops"], or hubaoti run --ops my.ops'
# The namespaces of ops that come with torch, whose schemas its version says.
WITH_TORCH = frozenset({"aten", "prims", "quantized", "_c10d_functional", "inductor"})
_CALLS = ".wrapper.json"  # of such calls, beside the library
_LARGEST = 64 << 20  # bytes
_OWN = re.compile(rb"\b%s::[a-z0-9_]+(?=\0)" % NAMESPACE.encode())


class _Target(msgspec.Struct):
    target: str


class _Node(msgspec.Struct):
    node: _Target


class _Calls(msgspec.Struct):
    nodes: list[_Node] = []


# msgspec learns a type when it is first used, and two threads that meet there end the process.
_DECODER = msgspec.json.Decoder(_Calls)


def require_ops(folder: Path, entry: Graph, device: torch.device) -> None:
    """See that each op that the unpacked package in `folder` calls is registered for a device, with
    the schema that it had where the graph was compiled, if the manifest says which.

    Raises:
        MissingOps: one is not. KernelSchemaMismatch: one has another schema.
        CannotOpen: its list of calls cannot be read.
    """
    for op in _list_called(folder, entry):
        ours = op.startswith(f"{NAMESPACE}::")
        if not _is_registered(op, device):
            raise MissingOps(
                f"graph {entry.id} calls {op}, an op that is not registered",
                hint="its artifact pins no kernel for it: compile it again" if ours else NAME_OPS,
            )
        _require_schema(op, entry, "hubaoti" if ours else "the module that registers it")


def _require_schema(op: str, entry: Graph, registrar: str) -> None:
    """See that a registered op has the schema that a graph was compiled for."""
    compiled, found = (entry.schemas or {}).get(op), _read_schema(op)
    if compiled is not None and compiled != found:
        raise KernelSchemaMismatch(
            f"graph {entry.id} was compiled for {op}{compiled}, and here that op is {op}{found}",
            hint=f"compile it again, or have the version of {registrar} that it was compiled with",
        )


def describe_schemas(folder: Path, entry: Graph) -> dict[str, str] | msgspec.UnsetType:
    """The schemas of the ops that a package calls, as they are registered here, by their names.

    Those of torch itself are not among them.

    Raises:
        CannotOpen: its list of calls cannot be read.
    """
    called = (op for op in _list_called(folder, entry) if op.split("::")[0] not in WITH_TORCH)
    return {op: _read_schema(op) for op in called} or msgspec.UNSET


def _list_called(folder: Path, entry: Graph) -> list[str]:
    """The ops that a graph asks for: its package says them where torch's executor calls them, and
    its manifest where its own code does."""
    return sorted(list_ops(folder, entry) | {*(entry.ops or ())})


def _read_schema(op: str) -> str:
    """What a registered op takes and answers, as torch writes it: `(Tensor x) -> Tensor`.

    On torch 2.11 to 2.15 the same op has the same text.
    """
    name, _, overload = op.partition(".")
    namespace, _, name = name.partition("::")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    return str(found._schema).removeprefix(op)[:LONGEST_SCHEMA]


def list_ops(folder: Path, entry: Graph) -> set[str]:
    """The ops that a package calls by their names, as `hubaoti::fa3_fwd`.

    Raises:
        CannotOpen: its list of calls cannot be read.
    """
    files = [folder / each.path for each in entry.members if each.path.endswith(_CALLS)]
    try:
        return set[str]().union(*map(_read_calls, files))
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise CannotOpen(
            f"the calls of graph {entry.id} cannot be read: {error}",
            hint="its publisher must compile it again",
        ) from error


def list_own_ops(library: Path) -> tuple[str, ...]:
    """Those of ours that a library calls which was just made: their names are strings in it."""
    return tuple(sorted({name.decode() for name in _OWN.findall(library.read_bytes())}))


def _read_calls(file: Path) -> set[str]:
    """What is called; a call of a torchbind object's method is no op, and has no namespace."""
    if (size := file.stat().st_size) > _LARGEST:
        raise ValueError(f"it has {size} bytes")
    targets = (each.node.target for each in _DECODER.decode(file.read_bytes()).nodes)
    return {target for target in targets if "::" in target}


def _is_registered(op: str, device: torch.device) -> bool:
    """Whether an op has an implementation for a kind of device, of its own or one for all.

    Private, checked on torch 2.11 to 2.15: torch.library itself asks so.
    """
    try:
        key = device.type.upper()
        return bool(torch._C._dispatch_has_computed_kernel_for_dispatch_key(op, key))
    except RuntimeError:  # there is no such op
        return False
