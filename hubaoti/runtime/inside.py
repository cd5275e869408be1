"""What a region's graphs took of its module: its tensors, its parts, and that nothing listens.

A graph stands for the module as it was. So at each call the module is asked whether it still is: by
identity of its parts and parameters, by hooks, by train mode. Nothing of this costs a microsecond.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import getitem, is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hubaoti.errors import MissingConstant
from hubaoti.manifest import Constant
from hubaoti.runtime.checks import address, alignment_of, check_constant, dtype_of
from hubaoti.runtime.quantize import make
from hubaoti.runtime.reasons import Unserved

PLAIN = (torch.Tensor, nn.Parameter)
# Hooks of every module, which a graph's inner modules would not run (torch.nn.modules.module).
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Found:
    """A constant in a module: the dictionary and the name that hold it, and the tensor itself.

    `bound` is what a graph is given: the very tensor, unless it has to be made of it, as it was at
    a version.
    """

    store: dict[str, Any]
    name: str
    tensor: torch.Tensor
    bound: torch.Tensor
    version: int = 0

    @property
    def is_fresh(self) -> bool:
        """Whether the tensor was not written to since something was made of it."""
        return self.bound is self.tensor or self.version == version(self.tensor)


class Inside:
    """One module as its graphs know it."""

    def __init__(
        self, module: nn.Module, constants: Sequence[Constant], shipped: Mapping[str, torch.Tensor]
    ) -> None:
        # The module holds its region, which holds this: a way back would keep a model that nobody
        # has any more, until the garbage collector comes.
        self._module = weakref.ref(module)
        self.constants = constants
        self.shipped = shipped
        self._parts = {n: part for n, part in parts_of(module).items() if part is not module}
        self._found: dict[str, Found] = {}
        self._adapters: list[Any] = []
        self._watch({})

    def is_same(self) -> bool:
        """Whether nothing of it was replaced, hooked, or set to train."""
        try:
            return (
                not self.module.training
                and not any(self._hooks)
                and all(map(is_, map(getitem, self._stores, self._names), self._things))
                and [*map(len, self._states)] == self._sizes
                and True not in map(getitem, self._states, repeat("training"))
                and (not self._adapters or all(map(is_merged, self._adapters)))
                and (not self._made or all(each.is_fresh for each in self._made))
            )
        except KeyError:
            return False

    @property
    def module(self) -> nn.Module:
        """The module; who calls it holds it."""
        module = self._module()
        assert module is not None
        return module

    def wants_gradients(self) -> bool:
        """Whether one of the tensors that were bound is trained."""
        return any(tensor.requires_grad for tensor in self._things if isinstance(tensor, PLAIN))

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The constants by fqn as they are now, from here on the ones that are watched.

        Raises:
            Unserved: the module is not what it was, or a tensor does not fit.
        """
        self._require_quiet()
        self._require_same_parts()
        found: dict[str, Found] = {}
        problems = [*self._problems(found, device)]
        if problems:
            raise Unserved("weights", "; ".join(problems))
        self._watch(found)
        shipped = {c.fqn: self.shipped[c.fqn] for c in self.constants if c.fqn not in found}
        return shipped | {fqn: each.bound for fqn, each in found.items()}

    def problems(self, device: torch.device) -> list[str]:
        """Why constants do not fit, each with its name, what is expected and what is there."""
        return [*self._problems({}, device)]

    def _problems(self, found: dict[str, Found], device: torch.device) -> Iterator[str]:
        for constant in self.constants:
            try:
                each = self._find(constant, device)
            except (MissingConstant, Unserved) as why:
                yield f"{why}"
                continue
            if each is not None:
                found[constant.fqn] = each

    def _find(self, constant: Constant, device: torch.device) -> Found | None:
        """A constant in the module; None where the artifact brought it.

        Raises:
            MissingConstant: it is nowhere, or another tensor than the graph was compiled for.
        """
        held, made = self._held(constant.fqn), lambda tensor: tensor.detach().clone()
        origin = constant.origin
        if held is None and origin.transform and origin.module:
            held, made = self._held(origin.module), lambda tensor: quantized(constant, tensor)
        elif held is not None and self._fits(constant, held[0][held[1]], device):
            return Found(*held, held[0][held[1]], held[0][held[1]])
        if held is not None:
            found = self._remade(constant, held, made)
            check_constant(constant, found.bound, device)
            return found
        if constant.fqn in self.shipped:
            return None
        dtype, shape = constant.dtype, list(constant.shape)
        raise MissingConstant(
            f"{constant.fqn} is not there; expected is {dtype} {shape}",
            hint="attach the model that the artifact was compiled for",
        )

    def _held(self, fqn: str) -> tuple[dict[str, Any], str] | None:
        """The dictionary that holds a tensor, and its name there."""
        path, _, name = fqn.rpartition(".")
        part = self._parts.get(path) if path else self.module
        if part is None:
            return None
        for store in (vars(part)["_parameters"], vars(part)["_buffers"]):
            if store.get(name) is not None:
                return store, name
        return None

    def _fits(self, constant: Constant, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor can be bound as it is; one at an odd address has to be copied.

        Raises:
            MissingConstant: it is not the tensor that the graph was compiled for.
        """
        require_plain(constant.fqn, tensor)
        if tensor.data_ptr() % alignment_of(tensor.dtype, device):
            return False
        check_constant(constant, tensor, device)
        return True

    def _remade(
        self,
        constant: Constant,
        held: tuple[dict[str, Any], str],
        made: Callable[[torch.Tensor], torch.Tensor],
    ) -> Found:
        """What is made of a tensor, once for each of its values."""
        tensor = held[0][held[1]]
        require_plain(held[1], tensor)
        before = self._found.get(constant.fqn)
        if before is not None and before.tensor is tensor and before.is_fresh:
            return before
        return Found(*held, tensor, made(tensor), version(tensor))

    def _watch(self, found: Mapping[str, Found]) -> None:
        """From here on these are what `is_same` compares with."""
        parts = [*self.module.modules()]
        inner = parts[1:]
        edges = [(vars(p)["_modules"], n, c) for p in parts for n, c in p._modules.items()]
        watched = [*edges, *((each.store, each.name, each.tensor) for each in found.values())]
        self._stores = [store for store, _, _ in watched]
        self._names = [name for _, name, _ in watched]
        self._things = [thing for _, _, thing in watched]
        self._states = [vars(part) for part in inner]
        self._sizes = [*map(len, self._states)]
        self._hooks = [getattr(torch_module, name) for name in GLOBAL_HOOKS]
        self._hooks += [part._forward_hooks for part in inner]
        self._hooks += [part._forward_pre_hooks for part in inner]
        # What was made of a tensor must be made again when that is written to.
        self._made = [each for each in found.values() if each.bound is not each.tensor]
        self._found = {**found}

    def _require_quiet(self) -> None:
        """Refuse train mode, hooks, and parts whose `forward` is not their class's any more."""
        for name, part in self.module.named_modules():
            if part.training:
                raise Unserved("training", f"{name or 'the region'} is in train mode")
            if part is self.module:
                continue
            if part._forward_hooks or part._forward_pre_hooks:
                raise Unserved("hooks", f"{name} has a hook")
            if "forward" in vars(part):
                raise Unserved("changed", f"the forward of {name} was replaced")
        if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
            raise Unserved("hooks", "there is a hook on all modules")

    def _require_same_parts(self) -> None:
        """Refuse parts that were replaced, but by an adapter that is merged into its layer."""
        now = parts_of(self.module)
        self._adapters = []
        for name, part in self._parts.items():
            current = now.get(name)
            if current is part:
                continue
            if getattr(current, "base_layer", None) is not part:
                raise Unserved("changed", f"{name} was replaced by a {type(current).__name__}")
            if not is_merged(current):
                raise Unserved("adapters", f"{name} has an adapter that is not merged")
            self._adapters.append(current)
        adapted = tuple(
            f"{name}." for name, part in self._parts.items() if now.get(name) is not part
        )
        for name in now.keys() - self._parts.keys() - {""}:
            if not name.startswith(adapted):
                raise Unserved("changed", f"{name} is new")


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """A module and all within it, by every name that they have."""
    return dict(module.named_modules(remove_duplicate=False))


def require_plain(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is more than its values, and one that has none.

    Raises:
        MissingConstant: with its kind.
    """
    if type(tensor) not in PLAIN:
        raise MissingConstant(f"{name} is a {type(tensor).__name__}", hint="give it plain tensors")
    if tensor.is_meta:
        raise MissingConstant(
            f"{name} has no values: it is offloaded, or was never loaded",
            hint="load all of the model onto its device",
        )


def quantized(constant: Constant, tensor: torch.Tensor) -> torch.Tensor:
    """A quantized constant, of the module's own weight.

    Raises:
        MissingConstant: the weight has another dtype than the one that it was quantized from.
    """
    origin = constant.origin
    if origin.dtype is not None and tensor.dtype != dtype_of(origin.dtype):
        raise MissingConstant(
            f"{origin.module} is {tensor.dtype}; expected is {origin.dtype}, of which "
            f"{constant.fqn} is made",
            hint="load the model in the dtype that the recipe names",
        )
    assert origin.transform is not None
    return make(origin.transform, tensor.detach())


def is_merged(adapter: Any) -> bool:
    """Whether an adapter's part is in its layer's own weight, so that the layer answers for both.

    As peft's layers say it, which are found in no other way.
    """
    return bool(getattr(adapter, "merged", False))


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, and where it lies; inference tensors do not count."""
    return hash((address(tensor), -1 if tensor.is_inference() else tensor._version))
