"""Memory lent to blocks that have none: filled by the rule, given back while others need it."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hubaoti.compiler.module_copy import copy_to_cpu, list_devices, require_one_device
from hubaoti.runtime.synthetic import fill_synthetic

_MEMORY_ATTRIBUTE = "_hubaoti_pages"  # the attribute of a parameter that holds its memory


@contextmanager
def lend_memory(
    modules: list[nn.Module], device: torch.device, live: bool
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules with memory where they had none; all of them share it, their values do not matter.

    Afterwards they have none again. A live module keeps what it has; of one that lies on a GPU and
    is compiled on the CPU a copy that lies there is given, which nobody keeps.

    Raises:
        CompileFailed: the tensors of a live module lie on several devices.
    """
    if live:
        copies = {id(module): _find_live(module, device) for module in (modules[0], modules[-1])}
        yield copies[id(modules[0])], copies[id(modules[-1])]
        return
    made = {
        name: _allocate_parameter(name, old, device) for name, old in modules[0].named_parameters()
    }
    kept = [
        (owner, name, old)
        for module in modules
        for owner, name, old in _list_parameter_slots(module)
    ]
    for module in modules:
        new = {id(old): made[name] for name, old in module.named_parameters() if name in made}
        for owner, name, old in _list_parameter_slots(module):
            owner._parameters[name] = new.get(id(old), old)
        module.to(device)  # its buffers, which are real
    try:
        yield modules[0], modules[-1]
    finally:
        for owner, name, old in kept:
            owner._parameters[name] = old


def _find_live(module: nn.Module, device: torch.device) -> nn.Module:
    """A live module itself where it lies on a device of this kind, else a copy on the CPU."""
    require_one_device(module)
    kinds = {torch.device(name).type for name in list_devices(module)}
    return module if kinds <= {device.type} else copy_to_cpu(module)


def _allocate_parameter(name: str, old: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A parameter with memory, and the values that the golden rule gives to its name."""
    tensor = old.detach()
    pages = None
    if old.is_meta and device.type == "cpu" and old.numel() and hasattr(mmap, "MADV_DONTNEED"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # of shared memory nothing is given back
        pages = mmap.mmap(-1, old.untyped_storage().nbytes(), flags)
        tensor = torch.frombuffer(pages, dtype=old.dtype).as_strided(old.shape, old.stride())
    elif old.is_meta:
        tensor = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
    fill_synthetic(tensor, name)
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(parameter, _MEMORY_ATTRIBUTE, pages)
    return parameter


@contextmanager
def give_memory_back(module: nn.Module) -> Iterator[None]:
    """Around work that needs no values but much memory: afterwards the values are there again.

    Addresses stay, since inductor tells constants from each other by them.
    """
    freed = free_memory(module)
    yield
    for name, parameter in freed.items():
        fill_synthetic(parameter, name)


def free_memory(module: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """Give the system back what was lent to a module, whose values are needed no more.

    All of it, or what was lent to the parameters of some `names`. The parameters that have none
    now, by their names.
    """
    freed = {}
    for name, parameter in module.named_parameters():
        is_meant = names is None or name in names
        if is_meant and (pages := getattr(parameter, _MEMORY_ATTRIBUTE, None)):
            pages.madvise(mmap.MADV_DONTNEED)
            freed[name] = parameter
    return freed


def _list_parameter_slots(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every place of a module that holds a parameter; a tied one has several."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
