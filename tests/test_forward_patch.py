"""What answers in the place of a module's forward: to callers, copies, tracers, and afterwards."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from torch import nn

from hubaoti.attachment.attach import find_regions, refuse_attached
from hubaoti.attachment.forward_patch import ForwardPatch, GraphPatch, find_patch
from hubaoti.errors import AlreadyAttached
from hubaoti.runtime.fallback import CannotServe

X = torch.ones(1, 2)


class Double(nn.Module):
    def forward(self, x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by


class Zero(ForwardPatch):
    """Answers zeros, but to three times."""

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get("by") == 3.0:
            raise CannotServe("arguments", "three times")
        return torch.zeros(1, 2)


@pytest.fixture
def module() -> Double:
    return Double().eval()


@pytest.fixture
def patch(module: Double) -> Zero:
    patch = Zero("", module)
    patch.install()
    return patch


def test_it_answers_and_what_it_refuses_is_the_module_s_and_counted(
    module: Double, patch: Zero
) -> None:
    missed = []
    patch._count_miss = lambda path, error: missed.append((path, error.reason))
    assert torch.equal(module(X), 0 * X)
    assert torch.equal(module(X, by=3.0), 3 * X)
    assert missed == [("", "arguments")]


def test_removed_the_module_is_as_it_was_and_answers(module: Double, patch: Zero) -> None:
    assert find_patch(module) is patch and [*find_regions(module)] == [patch]
    patch.remove()
    assert "forward" not in vars(module) and find_patch(module) is None
    assert torch.equal(module(X), 2 * X)
    patch.remove()


def test_a_forward_of_the_module_s_own_comes_back(module: Double) -> None:
    own = module.forward = lambda x: 5 * x  # type: ignore[method-assign]
    patch = Zero("", module)
    patch.install()
    assert torch.equal(patch.eager(X), 5 * X)
    assert torch.equal(copy.deepcopy(module)(X), 5 * X)
    patch.remove()
    assert vars(module)["forward"] is own


def replicate(linear: Any) -> nn.Module:
    """A copy as nn.DataParallel makes it for another device."""
    replica = linear._replicate_for_data_parallel()
    del replica._is_replica
    for name, each in linear._parameters.items():
        replica.register_parameter(name, nn.Parameter(each.detach().clone()))
    return replica  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        lambda each: pickle.loads(pickle.dumps(each)),
        lambda each: replicate(each),
        lambda each: copy.copy(replicate(each)),
    ],
)
def test_a_copy_answers_as_it_is_itself(make: Callable[[Any], Any]) -> None:
    """Also when the original is gone, and when the copy is changed."""
    linear = nn.Linear(2, 2).eval()
    expected = linear(X)
    patch = Zero("", linear)
    patch.install()
    other = make(linear)
    assert vars(other).keys() == vars(nn.Linear(2, 2)).keys() and find_patch(other) is None
    assert torch.equal(other(X), expected) and torch.equal(linear(X), 0 * X)
    del linear, patch
    gc.collect()
    other.weight = nn.Parameter(torch.zeros(2, 2))
    assert torch.equal(other(X), other.bias[None])
    patch = Zero("", other)
    patch.install()
    patch.remove()
    assert vars(other).keys() == vars(nn.Linear(2, 2)).keys()


def test_copies_for_other_devices_are_told_of(module: Double, patch: Zero) -> None:
    missed = []
    patch._count_miss = lambda path, error: missed.append((path, error.reason))
    assert torch.equal(replicate(module)(X), 2 * X)
    assert missed == [("", "device")]
    patch.remove()
    assert torch.equal(replicate(module)(X), 2 * X)
    assert missed == [("", "device")]


def test_a_copy_has_a_forward_that_was_the_module_s_own(module: Double) -> None:
    own = module.forward = lambda x: 5 * x  # type: ignore[method-assign]
    for _ in range(2):
        Zero("", module).install()
    assert vars(copy.copy(module))["forward"] is own


def test_a_copy_has_what_somebody_put_over_it(module: Double, patch: Zero) -> None:
    over = module.forward = lambda x: x  # type: ignore[method-assign]
    assert vars(copy.copy(module))["forward"] is over


def test_a_forward_that_was_kept_without_its_module_says_so() -> None:
    module = Double()
    patch = Zero("", module)
    patch.install()
    del module
    gc.collect()
    patch.remove()
    with pytest.raises(ReferenceError, match="keep the module"):
        patch(X)


def test_what_lies_over_it_stays_and_calls_the_module(module: Double, patch: Zero) -> None:
    over = module.forward = lambda x: patch(x) + 1  # type: ignore[method-assign]
    assert torch.equal(module(X), 0 * X + 1)
    with pytest.raises(AlreadyAttached):
        refuse_attached(module)
    patch.remove()
    assert vars(module)["forward"] is over and find_patch(module) is None
    assert torch.equal(module(X), 2 * X + 1)
    refuse_attached(module)


def test_copies_are_of_the_module_itself(module: Double, patch: Zero) -> None:
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(X), 2 * X) and find_patch(other) is None
    assert torch.equal(module(X), 0 * X)


def test_it_has_the_face_of_the_module_s_own(module: Double, patch: Zero) -> None:
    assert inspect.signature(module.forward) == inspect.signature(Double().forward)
    assert [*inspect.signature(module.forward).parameters] == ["x", "by"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_whole_module_is_exported_as_itself(module: Double, patch: Zero, strict: bool) -> None:
    traced = []
    patch._note_tracing = lambda: traced.append(1) if not strict else None
    program = torch.export.export(module, (X,), strict=strict)
    assert torch.equal(program.module()(X), 2 * X)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert names == ["x"] and (strict or traced)


def test_a_whole_module_is_compiled_as_itself(module: Double, patch: Zero) -> None:
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), 2 * X)
    assert torch.equal(module(X), 0 * X)


def test_it_keeps_no_module_alive() -> None:
    module = Double()
    patch = Zero("", module)
    patch.install()
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None and patch.is_gone
        patch.remove()
    finally:
        gc.enable()


class Bound(GraphPatch):
    """Has a lock, as what graphs are bound to has."""

    __slots__ = ()

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return torch.zeros(1, 2)

    def bind(self, *, anew: bool = False) -> None:
        raise NotImplementedError


def test_a_wrapper_takes_none_of_its_state_so_that_copies_are_the_module(module: Double) -> None:
    """As accelerate wraps a forward: whatever a function has is the wrapper's, too."""
    patch = Bound("", module, [], [])
    patch.install()
    old = vars(module)["forward"]
    module.forward = update_wrapper(partial(old), old)  # type: ignore[method-assign]
    module._old_forward = old  # type: ignore[assignment]
    assert torch.equal(module(X), 0 * X)
    assert torch.equal(copy.deepcopy(module)(X), 2 * X)
