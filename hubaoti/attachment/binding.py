"""What a region's graphs took of its module: its tensors, its parts, and that nothing listens.

A graph stands for the module as it was when it was bound; its guard tells whether it still is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hubaoti.artifact.schema import Constant
from hubaoti.attachment.forward_patch import ModuleReference
from hubaoti.attachment.module_guard import (
    GLOBAL_HOOKS,
    FoundConstant,
    ModuleGuard,
    list_traits,
)
from hubaoti.attachment.quantized import (
    ConstantSketches,
    find_quantized_constant,
    quantize_in_place,
)
from hubaoti.attachment.served_modules import Misfit, explain_misfits
from hubaoti.errors import MissingConstant
from hubaoti.program.adapters import Adapter, separate_adapters, stands_aside, tensor_version
from hubaoti.program.output_capturing import is_capture
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.input_checks import (
    OtherDtype,
    advise_on_dtypes,
    check_constant,
    describe_layout,
    has_memory,
    parse_dtype,
    tensor_alignment,
)
from hubaoti.runtime.quantize import make_quantized

_PLAIN = (torch.Tensor, nn.Parameter)
_CAST = "call model.to({}), and graphs answer for the module again"
_Held = tuple[dict[str, Any], str]  # the dictionary of a module that holds a tensor, and its name


class ConstantBinding(ModuleReference):
    """One module as its graphs know it: where it has their constants."""

    def __init__(
        self,
        module: nn.Module,
        constants: Sequence[Constant],
        shipped: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        super().__init__(module)
        self.device = device
        self._make: Callable[[str, torch.Tensor], torch.Tensor] = make_quantized
        self.constants = constants
        self.shipped = shipped
        self._read = {
            name
            for each in constants
            for name in (each.fqn, each.origin.module, find_quantized_constant(each))
            if name
        }
        self._compiled = self._find_compiled_adapters(module)
        parts = self._find_parts(module)[0]
        self._parts = {name: part for name, part in parts.items() if part is not module}
        self._traits = list_traits(parts)
        self._found: dict[str, FoundConstant] = {}
        self._states: list[tuple[Any, ...]] = []
        self.more = self._list_unread(parts)

    def _find_compiled_adapters(self, module: nn.Module) -> dict[str, tuple[Any, ...]]:
        """The adapters that were compiled with their layers, and what they are set to."""
        return {
            each.path: each.mode()
            for each in separate_adapters(module)[1]
            if any(name.startswith(f"{each.path}.base_layer.".lstrip(".")) for name in self._read)
        }

    def _find_parts(self, module: nn.Module) -> tuple[dict[str, nn.Module], list[Adapter]]:
        """All parts by their paths, those under adapters in the place of these; and these."""
        return separate_adapters(module, self._compiled)

    def quantize(self) -> None:
        """Have the module hold what its graphs read, and not what that is made of."""
        self.forget()
        self._make = make_quantized
        quantize_in_place(self.module, self.constants)
        parts = self._find_parts(self.module)[0]
        self._traits = list_traits(parts)
        self.more = self._list_unread(parts)

    def _list_unread(self, parts: Mapping[str, nn.Module]) -> frozenset[str]:
        """The tensors that no graph reads, as a bias that the program has not."""
        return frozenset(_list_tensor_names(parts)) - self._read

    def find_constants(self) -> tuple[dict[str, torch.Tensor], ModuleGuard]:
        """The constants by fqn as they are now, and what tells when that is so no more.

        Raises:
            CannotServe: the module is not what it was, or a tensor does not fit.
        """
        if self.is_gone:
            raise CannotServe("changed", "the module is gone")
        require_quiet(self.module)
        parts, adapters = self._find_parts(self.module)
        self._require_same(parts)
        self._require_aside(adapters)
        self._require_no_more(parts)
        states = [each.state() for each in adapters]
        if states != self._states:  # what was made is of a weight that may be another
            self.forget()
        found: dict[str, FoundConstant] = {}
        misfits = [*self._find_all(found)]
        if misfits:
            message, dtypes = explain_misfits("the module", misfits)
            advice = advise_on_dtypes(*dtypes, _CAST) if dtypes else ""
            raise CannotServe("weights", message, advice=advice)
        self._found, self._states = found, states
        shipped = {c.fqn: self.shipped[c.fqn] for c in self.constants if c.fqn not in found}
        tensors = shipped | {fqn: each.bound for fqn, each in found.items()}
        known = [*zip(adapters, states, strict=True)]
        return tensors, ModuleGuard(self.module, [*found.values()], known)

    def forget(self) -> None:
        """Make everything anew that is made of the module's tensors."""
        self._found = {}

    def list_misfits(self, sketched: ConstantSketches | None = None) -> list[Misfit]:
        """Why constants do not fit, each with its name, what is expected and what is there.

        What had to be made to tell is kept for `find_constants`; what was only sketched is not.
        """
        found: dict[str, FoundConstant] = {}
        if sketched is None:
            self._found = found
        else:
            self._make = sketched
        return [*self._find_all(found)]

    def _find_all(self, found: dict[str, FoundConstant]) -> Iterator[Misfit]:
        """Add all constants that fit to those that were found; why the others do not."""
        for constant in self.constants:
            try:
                each = self._find(constant)
            except OtherDtype as error:
                yield Misfit(f"{error}", error.dtypes)
                continue
            except (MissingConstant, CannotServe) as error:
                yield Misfit(f"{error}")
                continue
            if each is not None:
                found[constant.fqn] = each

    def _find(self, constant: Constant) -> FoundConstant | None:
        """A constant in the module; None where the artifact brought it; nowhere is refused."""
        origin = constant.origin
        held = self._locate(constant.fqn) or self._locate(find_quantized_constant(constant) or "")
        is_source = held is None and bool(origin.transform and origin.module)
        if is_source:
            held = self._locate(origin.module or "")
        elif held is None:  # it came along, and the module's own may be another by now
            held = self._locate_attribute(constant.fqn)
        elif self._fits(constant, held[0][held[1]]):
            return FoundConstant(*held, held[0][held[1]], held[0][held[1]])
        if held is not None:
            found = self._remake(constant, held, is_source)
            check_constant(constant, found.bound, self.device)
            return found
        if constant.fqn in self.shipped:
            return None
        dtype, shape = constant.dtype, list(constant.shape)
        raise MissingConstant(
            f"{constant.fqn} is not there; expected is {dtype} {shape}",
            hint="attach the model that the artifact was compiled for",
        )

    def _locate(self, fqn: str) -> _Held | None:
        """The dictionary that holds a tensor, and its name there."""
        path, _, name = fqn.rpartition(".")
        part = self._parts.get(path) if path else self.module
        if part is None:
            return None
        for store in (vars(part)["_parameters"], vars(part)["_buffers"]):
            if store.get(name) is not None:
                return store, name
        return None

    def _locate_attribute(self, fqn: str) -> _Held | None:
        """The same of a tensor that is an attribute, and neither parameter nor buffer."""
        path, _, name = fqn.rpartition(".")
        part = self._parts.get(path) if path else self.module
        is_tensor = part is not None and isinstance(vars(part).get(name), torch.Tensor)
        return (vars(part), name) if is_tensor else None

    def _fits(self, constant: Constant, tensor: torch.Tensor) -> bool:
        """Whether a tensor can be bound as it is; one at an odd address has to be copied."""
        _require_plain_weight(constant.fqn, tensor)
        if tensor.data_ptr() % tensor_alignment(tensor.dtype, self.device):
            return False
        check_constant(constant, tensor, self.device)
        return True

    def _remake(self, constant: Constant, held: _Held, quantize: bool) -> FoundConstant:
        """What is made of a tensor for each of its values: quantized, or in another place."""
        tensor = held[0][held[1]]
        _require_plain_weight(held[1], tensor)
        before = self._found.get(constant.fqn)
        if before is not None and before.tensor is tensor and before.is_fresh:
            return before
        if quantize:
            made = self._quantize(constant, tensor)
        else:  # attributes do not move with their module
            made = tensor.detach().to(self.device, copy=True)
        store = {} if held[0] is vars(self.module) else held[0]
        return FoundConstant(store, held[1], tensor, made, tensor_version(tensor))

    def _quantize(self, constant: Constant, tensor: torch.Tensor) -> torch.Tensor:
        """A quantized constant, of the module's own weight in the dtype that the recipe names."""
        origin = constant.origin
        if origin.dtype is not None and tensor.dtype != (wanted := parse_dtype(origin.dtype)):
            raise OtherDtype(
                f"{origin.module} is {tensor.dtype}; expected is {origin.dtype}, of which "
                f"{constant.fqn} is made",
                tensor.dtype,
                wanted,
            )
        assert origin.transform is not None
        return self._make(origin.transform, tensor.detach())

    def _require_same(self, now: Mapping[str, nn.Module]) -> None:
        """Refuse parts that were replaced, are of another class, or new."""
        for name, part in self._parts.items():
            if now.get(name) is not part:
                other = type(now.get(name)).__name__
                raise CannotServe("changed", f"{name} was replaced by a {other}")
        self._require_traits(now)
        new = now.keys() - self._parts.keys() - {""}
        if new:
            raise CannotServe("changed", f"{min(new)} is new")

    def _require_traits(self, now: Mapping[str, nn.Module]) -> None:
        """Refuse parts of another class, or one whose methods or attributes are others."""
        traits = list_traits({name: now[name] for name in self._traits})
        for name, (kind, methods, known) in self._traits.items():
            (other_kind, others, found), where = traits[name], name or "the region"
            if other_kind is not kind:
                raise CannotServe("changed", f"{where} is a {other_kind.__name__} now")
            if methods != others:
                other = _find_other(methods, others)
                raise CannotServe("changed", f"the {other} of {kind.__name__} was replaced")
            if known != found:
                other = _find_other(known, found)
                raise CannotServe("changed", f"{other} of {where} was changed")

    def _require_aside(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters that add to their layers, and those that were compiled otherwise."""
        for each in adapters:
            compiled = self._compiled.get(each.path)
            if compiled is not None and compiled != each.mode():
                raise CannotServe("adapters", f"{each.path} has an adapter that was set otherwise")
            if compiled is None and not stands_aside(each.layer):
                raise CannotServe("adapters", f"{each.path} has an adapter that is not merged")

    def _require_no_more(self, parts: Mapping[str, nn.Module]) -> None:
        """Refuse tensors that were not there when it was attached."""
        new = self._list_unread(parts) - self.more
        if new:
            raise CannotServe("changed", f"{', '.join(sorted(new))} is new")


def _find_other(known: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first name by which two mappings differ."""
    names = known.keys() | found.keys()
    return min(name for name in names if known.get(name) != found.get(name))


def _list_tensor_names(parts: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of parameters and of buffers in parts by their paths, each tensor's first one."""
    seen = set()
    for path, part in parts.items():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(part)[kind].items():
                if tensor is not None and (kind, id(tensor)) not in seen:
                    seen.add((kind, id(tensor)))
                    yield f"{path}.{name}" if path else name


def require_quiet(module: nn.Module, own: tuple[type, ...] = ()) -> None:
    """Refuse train mode, hooks, and parts whose `forward` is not their class's any more.

    `own` are the kinds of `forward` that graphs put there. transformers' own hooks are none that
    anybody would miss, but in a call that collects by them, which `collecting` refuses.

    Raises:
        CannotServe: with the reason.
    """
    for name, part in module.named_modules():
        if part.training:
            raise CannotServe("training", f"{name or 'the region'} is in train mode")
        if part is module:
            continue
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not all(map(is_capture, hooks)):
            raise CannotServe("hooks", f"{name} has a hook")
        if "forward" in vars(part) and not isinstance(vars(part)["forward"], own):
            raise CannotServe("changed", f"the forward of {name} was replaced")
    if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
        raise CannotServe("hooks", "there is a hook on all modules")


def _require_plain_weight(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is more than its values, and one that has none."""
    if type(tensor) not in _PLAIN:
        raise MissingConstant(f"{name} is a {type(tensor).__name__}", hint="give it plain tensors")
    if tensor.is_meta:
        raise MissingConstant(
            f"{name} has no values: it is offloaded, or was never loaded",
            hint="load all of the model onto its device",
        )
    if not has_memory(tensor):
        raise MissingConstant(
            f"{name} has no plain memory{describe_layout(tensor)}",
            hint="give the module plain tensors: to_dense(), clone()",
        )
