"""ATen's ops on the stand-in's device, computed by the CPU over the same memory.

A package calls ATen in two ways: through torch's dispatcher, where `OnHost` sees the call, and by
its C shims, which `shims` tells of. Either way the op is computed here. What it makes anew lies as
torch's own rules say for a GPU, since that is what the package's host code counts on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.memory import carry_over, mark_unwritten, see_on_host
from hubaoti.compiler.interpreter.replaced import UNCOMPUTED, find_replacement

_EMPTY = ("empty", "new_empty")  # how ops begin whose tensors nobody has written yet
# Their host code has conditions that inductor does not know.
_REFUSING = {
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
}
_UNTOUCHED = {"set_", "resize_", "record_stream"}  # the memory is not looked at


class OnHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, each op that torch dispatches with tensors of the device is computed on the CPU."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What the op makes."""
        named = dict(kwargs or {})
        if not isinstance(func, OpOverload) or not _is_on_device(args, named):
            return func(*args, **named)
        name = func._schema.name.partition("::")[2]
        if name.startswith(_EMPTY):
            return mark_unwritten(func(*args, **named))
        if func.is_view or name in _UNTOUCHED:
            return func(*args, **named)
        return compute_on_host(func, args, named)


def _is_on_device(args: Any, kwargs: Any) -> bool:
    """Whether a tensor among the arguments is on the device, or is asked for there."""
    leaves = tree_flatten((args, kwargs))[0]
    return any(
        each.is_cuda if isinstance(each, torch.Tensor) else _is_device(each) for each in leaves
    )


def _is_device(value: Any) -> bool:
    """Whether it is the device."""
    return isinstance(value, torch.device) and value.type == "cuda"


def compute_on_host(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an op makes of tensors of the device; what it writes is written there.

    `OnHost` is not active meanwhile.

    Raises:
        NotInterpreted: the CPU has no such op, or it draws numbers by chance.
        RuntimeError: it refuses what it is given.
    """
    name = str(op)
    replacement = find_replacement(op)
    if replacement is None and torch.Tag.nondeterministic_seeded in op.tags:
        raise NotInterpreted(f"{name}: it draws numbers, and a GPU draws others")
    if name in _REFUSING:
        _ask_host_code(op, args, kwargs)
    lent: dict[int, torch.Tensor] = {}

    def lend(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            seen = see_on_host(value)
            lent[id(seen)] = value
            return seen
        return torch.device("cpu") if _is_device(value) else value

    on_host = tree_map(lend, (list(args), dict(kwargs)))
    kept = tree_flatten(on_host)[0]  # by their ids: they must not go meanwhile
    compute = replacement or op
    try:
        with torch.no_grad():
            made = compute(*on_host[0], **on_host[1])
    except NotImplementedError as error:
        raise NotInterpreted(f"{name}: the CPU has no such op") from error
    del kept
    return _put_on_device(op, args, kwargs, made, lent)


def _ask_host_code(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Have torch's own host code for a GPU look at what an op is given; its kernels do nothing.

    Raises:
        RuntimeError: it refuses, as it would on a GPU.
    """
    try:
        op(*args, **kwargs)
    except RuntimeError as error:
        if "CUDA error" not in str(error):  # else it is the stand-in that lacks something
            raise


def _put_on_device(
    op: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    made: Any,
    lent: Mapping[int, torch.Tensor],
) -> Any:
    """An op's answer as the device has it: its own tensors again, or new ones."""
    leaves, spec = tree_flatten(made)
    if all(id(each) in lent for each in leaves if each is UNCOMPUTED or _is_tensor(each)):
        return tree_unflatten([lent.get(id(each), each) for each in leaves], spec)
    device = _find_device(args, kwargs)
    if device is None:  # it was asked for on the CPU
        return made
    expected = _predict(op, args, kwargs)
    found = []
    for index, leaf in enumerate(leaves):
        rule = expected[index] if index < len(expected) else None
        found.append(lent[id(leaf)] if id(leaf) in lent else _place(leaf, rule, device))
    return tree_unflatten(found, spec)


def _place(leaf: Any, rule: Any, device: torch.device) -> Any:
    """One of an op's answers on the device, laid out as torch's rules say where they know."""
    if leaf is UNCOMPUTED:
        if not _is_tensor(rule):
            return rule if isinstance(rule, int) else 0
        empty = torch.empty_strided(rule.shape, rule.stride(), dtype=rule.dtype, device=device)
        return mark_unwritten(empty)
    if not _is_tensor(leaf):
        return leaf
    if _is_tensor(rule) and rule.shape == leaf.shape and rule.stride() != leaf.stride():
        laid = torch.empty_strided(rule.shape, rule.stride(), dtype=leaf.dtype)
        leaf = laid.copy_(leaf)
    return carry_over(leaf.detach(), device)


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, torch.Tensor)


def _find_device(args: Any, kwargs: Any) -> torch.device | None:
    """Where an op's answer belongs: where it is asked for, else where its tensors are."""
    leaves = tree_flatten((args, kwargs))[0]
    for leaf in leaves:
        if isinstance(leaf, torch.device):
            return leaf if leaf.type == "cuda" else None
    return next((each.device for each in leaves if _is_tensor(each) and each.is_cuda), None)


def _predict(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """How what an op makes lies on a GPU, as inductor was told; nothing where values tell."""
    with FakeTensorMode() as mode:

        def pretend(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        try:
            fakes = tree_map(pretend, (list(args), dict(kwargs)))
            return tree_flatten(op(*fakes[0], **fakes[1]))[0]
        except Exception:  # of sizes that only values tell, or an op without such rules
            return []
