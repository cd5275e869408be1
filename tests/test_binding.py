"""What graphs are given of their module: its own tensors, wherever it has them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from hubaoti.artifact.schema import Constant, ConstantOrigin
from hubaoti.attachment.binding import ConstantBinding
from hubaoti.runtime.fallback import CannotServe

CPU = torch.device("cpu")


class Shifted(nn.Module):
    """A block with a tensor that is neither parameter nor buffer, so that it came along."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.shift = torch.full((4,), shift)  # type: ignore[assignment]


SHIPPED = {"inner.shift": torch.zeros(4)}


ORIGIN = ConstantOrigin(file="buffers/block.safetensors")
CONSTANT = Constant(fqn="inner.shift", dtype="float32", shape=(4,), stride=(1,), origin=ORIGIN)


def bind(module: nn.Module) -> ConstantBinding:
    return ConstantBinding(module, [CONSTANT], SHIPPED, CPU)


def test_a_tensor_that_is_an_attribute_is_the_module_s_own_and_not_what_came_along() -> None:
    module: Any = Shifted(2.0).eval()
    tensors, guard = bind(module).find_constants()
    assert tensors["inner.shift"].tolist() == [2.0] * 4 and guard.is_same()


@pytest.mark.parametrize("change", ["replaced", "written", "written as data"])
def test_such_a_tensor_is_noticed_when_it_becomes_another(change: str) -> None:
    module: Any = Shifted(2.0).eval()
    binding = bind(module)
    _, guard = binding.find_constants()
    if change == "replaced":
        module.inner.shift = torch.full((4,), 6.0)
    else:
        (module.inner.shift if change == "written" else module.inner.shift.data).mul_(3)
    assert not guard.is_same()
    tensors, guard = binding.find_constants()
    assert tensors["inner.shift"].tolist() == [6.0] * 4 and guard.is_same()


def test_such_a_tensor_of_the_region_itself_is_noticed_and_keeps_nothing_alive() -> None:
    module: Any = Shifted(2.0).eval().inner
    module.weight = nn.Parameter(torch.ones(1))
    constant = msgspec.structs.replace(CONSTANT, fqn="shift")
    binding = ConstantBinding(module, [constant], SHIPPED, CPU)
    module.shift = torch.full((4,), 5.0)
    tensors, guard = binding.find_constants()
    assert tensors["shift"].tolist() == [5.0] * 4 and guard.is_same()
    module.shift = torch.full((4,), 6.0)
    assert not guard.is_same()
    module.kept = [binding, binding.find_constants()]  # as by its region
    gone = weakref.ref(module.weight)
    gc.disable()
    try:
        del module, binding, guard
        assert gone() is None
    finally:
        gc.enable()


def test_such_a_tensor_of_another_shape_is_refused() -> None:
    module: Any = Shifted(2.0).eval()
    module.inner.shift = torch.zeros(5)
    with pytest.raises(CannotServe, match=r"inner\.shift"):
        bind(module).find_constants()


def test_what_the_module_lacks_is_what_came_along() -> None:
    module: Any = Shifted(2.0).eval()
    del module.inner.shift
    tensors, guard = bind(module).find_constants()
    assert tensors["inner.shift"] is SHIPPED["inner.shift"] and guard.is_same()
