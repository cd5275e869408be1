"""A module again on the CPU: equal in all that a graph reads, and nothing written on the first."""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode

from hubaoti.compiler.module_copy import (
    copy_module,
    copy_to_cpu,
    describe_devices,
    lies_on_gpu,
    list_devices,
    require_one_device,
)
from hubaoti.errors import CompileFailed


class Pair(NamedTuple):
    """Two tensors."""

    first: torch.Tensor
    second: torch.Tensor


class Holder(nn.Module):
    """Tensors in every place that a module may have them in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.turned = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
        self.register_buffer("wide", torch.ones(1, 4).expand(3, 4))
        whole = torch.arange(32.0)
        self.register_buffer("low", whole[4:12])
        self.register_buffer("high", whole[8:16].reshape(2, 4))
        self.plain = torch.full((4,), 2.0)
        self.held: Any = {"list": [torch.ones(4), 3], "pair": Pair(torch.ones(1), self.plain)}
        self.device, self.out_device = torch.device("cuda", 0), "cuda:0"
        self.kind = "cuda"
        self.config = transformers.BertConfig()
        self.parts = [self.first]
        self.bound = self.first.forward
        self.partial = functools.partial(self.add, more=self.plain)

    def add(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return x + more + self.turned[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.partial(self.tied(self.bound(x)) + self.held["list"][0])
        return answer


@pytest.fixture
def holder() -> Holder:
    torch.manual_seed(3)
    return Holder().eval()


def test_a_copy_answers_the_same_and_shares_no_tensor(holder: Holder) -> None:
    copied = copy_to_cpu(holder)
    x = torch.randn(2, 4)
    assert torch.equal(copied(x), holder(x))
    for name, tensor in (*holder.named_parameters(), *holder.named_buffers()):
        other = dict((*copied.named_parameters(), *copied.named_buffers()))[name]
        assert type(other) is type(tensor) and other is not tensor
        assert torch.equal(other, tensor) and other.stride() == tensor.stride()
        assert other.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert holder.first.weight.abs().sum() > 0


def test_what_is_tied_stays_tied_and_views_of_one_memory_share_it(holder: Holder) -> None:
    copied: Any = copy_to_cpu(holder)
    assert copied.tied.weight is copied.first.weight
    assert copied.held["pair"].second is copied.plain is not holder.plain
    copied.low[4] = 77.0
    assert copied.high[0, 0] == 77.0 and holder.high[0, 0] == 8.0  # type: ignore[index]
    memory = copied.low.untyped_storage()
    assert memory.nbytes() == 12 * 4, "of a memory no more is copied than the module has"


def test_what_a_module_holds_of_itself_is_the_copy_s_own(holder: Holder) -> None:
    copied: Any = copy_to_cpu(holder)
    assert copied.parts == [copied.first]
    assert copied.bound.__self__ is copied.first
    assert copied.partial.func.__self__ is copied
    assert copied.partial.keywords["more"] is copied.plain


def test_devices_that_it_has_noted_are_the_copy_s_and_configs_are_shared(holder: Holder) -> None:
    copied: Any = copy_to_cpu(holder)
    assert copied.device == torch.device("cpu") and copied.out_device == "cpu"
    assert copied.kind == "cuda", "which is no device by its name"
    assert copied.config is holder.config


def test_what_it_does_not_own_is_not_copied(holder: Holder) -> None:
    outside = nn.Linear(2, 2)
    holder.held = {"parent": [outside], "lock": types.SimpleNamespace(tensor=torch.ones(1))}
    copied: Any = copy_to_cpu(holder)
    assert copied.held["parent"][0] is outside
    assert copied.held["lock"] is holder.held["lock"]


def test_tensors_of_a_copy_are_what_the_mover_makes_of_them(holder: Holder) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        copied = copy_module(holder, lambda t: torch.empty_like(t, device="cuda:0"), "cuda:0")
    assert list_devices(copied).keys() == {"cuda:0"} and list_devices(holder).keys() == {"cpu"}


class _Hook:
    """As accelerate's AlignDevicesHook: it moves what a module is given."""


_Hook.__module__ = "accelerate.hooks"


def test_what_accelerate_places_tensors_with_is_left_out(holder: Holder) -> None:
    def move(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it would move to a GPU")

    layer: Any = holder.first
    layer._hf_hook, layer._old_forward = _Hook(), layer.forward
    layer.forward = functools.update_wrapper(functools.partial(move, layer), layer._old_forward)
    copied: Any = copy_to_cpu(holder)
    assert torch.equal(copied.first(torch.ones(1, 4)), layer._old_forward(torch.ones(1, 4)))
    assert not hasattr(copied.first, "_hf_hook")
    assert layer._hf_hook is not None and layer.forward.func is move


def test_a_module_on_several_devices_is_refused_with_what_lies_where(holder: Holder) -> None:
    require_one_device(holder)
    with FakeTensorMode():
        holder.first.weight = nn.Parameter(torch.empty(4, 4, device="cuda:0"))
        holder.first.bias = nn.Parameter(torch.empty(4, device="cuda:0"))
    with pytest.raises(CompileFailed) as caught:
        require_one_device(holder)
    assert "first.weight, first.bias on cuda:0" in str(caught.value)
    assert "turned" in str(caught.value) and "--regions" in caught.value.hint


def test_what_is_offloaded_lies_nowhere() -> None:
    with pytest.raises(CompileFailed, match="weight, bias on meta"):
        require_one_device(nn.Linear(4, 4, device="meta"))


def test_a_refusal_names_a_few_tensors() -> None:
    assert describe_devices({"cpu": ["a", "b", "c", "d"]}) == "a, b, c and others on cpu"


def test_a_module_lies_on_a_gpu_where_any_of_its_tensors_does() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not lies_on_gpu(module)
    with FakeTensorMode():
        module[1].bias = nn.Parameter(torch.empty(2, device="cuda"))
    assert lies_on_gpu(module)
