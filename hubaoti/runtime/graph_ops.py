"""The ops that a package calls through torch's dispatcher: each is registered before it is opened.

An op that is missing is met in native code, by the first call, where nothing can be said of it.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import torch

from hubaoti.artifact.schema import Graph
from hubaoti.errors import CannotOpen, MissingOps
from hubaoti.runtime.attention_ops import NAMESPACE

# What to do where an op is missing: only its caller knows which module registers it.
NAME_OPS = 'name the module that registers it: ops=["my.ops"], or hubaoti run --ops my.ops'
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
    """See that each op that the unpacked package in `folder` calls is registered for a device.

    It says them itself where torch's executor calls them, and its manifest where its own code does.

    Raises:
        MissingOps: one is not. CannotOpen: its list of calls cannot be read.
    """
    for op in sorted(list_ops(folder, entry) | {*(entry.ops or ())}):
        if not _is_registered(op, device):
            ours = op.startswith(f"{NAMESPACE}::")
            raise MissingOps(
                f"graph {entry.id} calls {op}, an op that is not registered",
                hint="its artifact pins no kernel for it: compile it again" if ours else NAME_OPS,
            )


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
