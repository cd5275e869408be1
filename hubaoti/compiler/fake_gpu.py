"""A GPU that is not there, for runs without storage: code that asks for one is answered.

Fake tensors may lie on a GPU on any machine. What a function of torch decides by the device, it
decides on them as it would on real ones; only what wants a driver is run as on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hubaoti.compiler.patched import patch_attribute

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLANNED = 80  # the capability that plans are made for: one plan is lowered for each of several


@contextmanager
def pretend_gpu(capability: int) -> Iterator[None]:
    """Inside, torch says that there is one GPU of a capability, and tensors of the CPU that meet
    its tensors are taken as lying there, too, as they do once a program is moved.

    Within a mode of fake tensors. The answers are the same on every machine, whatever is there.
    """
    major, minor = divmod(capability, 10)
    found = SimpleNamespace(name="GPU", major=major, minor=minor)
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: found,
        "get_device_name": lambda device=None: found.name,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or major >= 8,
    }
    # Functions of TorchScript would be compiled for the GPU, by its driver.
    unfused = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    with unfused, _answer(answers, torch.device("cuda")), _leave_gpu_alone(), _Together():
        yield


@contextmanager
def pretend_no_gpu() -> Iterator[None]:
    """Inside, torch says that there is no GPU, whatever is there."""
    with _answer({"is_available": lambda: False, "device_count": lambda: 0}, None):
        yield


@contextmanager
def _answer(answers: dict[str, Callable[..., Any]], device: torch.device | None) -> Iterator[None]:
    """Have torch's questions for a GPU answered, and those for any accelerator."""
    accelerator = {
        "is_available": answers["is_available"],
        "device_count": answers["device_count"],
        "current_accelerator": lambda check_available=False: device,
    }
    owners: list[tuple[ModuleType, dict[str, Callable[..., Any]]]] = [(torch.cuda, answers)]
    owners.append((torch.accelerator, accelerator))
    with ExitStack() as around:
        for owner, each in owners:
            for name in vars(owner).keys() & each.keys():
                around.enter_context(patch_attribute(owner, name, each[name]))
        yield


@contextmanager
def _leave_gpu_alone() -> Iterator[None]:
    """Have fake tensors not start the GPU that is said to be there, nor make constants on it.

    Private, there in torch 2.11 to 2.15: `init_gpu_context`, `FakeTensorMode.avoid_device_init`.
    Where they have other names, a machine without a GPU says that it finds no driver.
    """
    answers: list[tuple[Any, str, Any]] = [
        (fake_tensor, "init_gpu_context", lambda device: None),
        (fake_tensor.FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
    ]
    with ExitStack() as around:
        for owner, name, value in answers:
            if name in vars(owner):
                around.enter_context(patch_attribute(owner, name, value))
        yield


class _Together(TorchFunctionMode):
    """Has tensors of the CPU that are computed with beside those of the GPU lie there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            args, kwargs = tree_map(_take_to_gpu, (args, kwargs))
        try:
            return func(*args, **kwargs)
        except torch.AcceleratorError:  # it asked for a driver, as cuDNN's recurrent layers do
            args, kwargs = tree_map(_take_to_cpu, (args, kwargs))
            return tree_map(_take_to_gpu, func(*args, **kwargs))


def _take_to_gpu(leaf: Any) -> Any:
    """A tensor as one that lies on the GPU; any other value itself."""
    return _make_like(leaf, GPU) if isinstance(leaf, torch.Tensor) else leaf


def _take_to_cpu(leaf: Any) -> Any:
    """A tensor as one that lies on the CPU; any other value itself."""
    return _make_like(leaf, CPU) if isinstance(leaf, torch.Tensor) else leaf


def _make_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor's own self where it lies on a device, else one like it there."""
    if tensor.device.type == device.type:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
