"""What is noticed of a module that is not what its graphs were bound to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from hubaoti.attachment.module_guard import ModuleGuard, list_traits


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pads = (1, 2)
        self.act = partial(nn.functional.gelu, approximate="tanh")

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


class Block(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.more = nn.ModuleList([nn.Linear(2, 2)])

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x)


class Twice:
    """What is called, and no function."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def double(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * x


CHANGES: dict[str, Callable[[Any], object]] = {
    "a function": lambda part: setattr(part, "mix", lambda x: x),
    "a method that was bound": lambda part: setattr(part, "mix", MethodType(double, part)),
    "a function with arguments": lambda part: setattr(part, "mix", partial(double, part)),
    "what can be called": lambda part: setattr(part, "mix", Twice()),
    "another activation": lambda part: setattr(part, "act", partial(nn.functional.gelu)),
    "a tuple": lambda part: setattr(part, "pads", (0, 0)),
}


@pytest.mark.parametrize("where", ["", "inner"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_part_computes_by_is_noticed_when_it_is_replaced(change: str, where: str) -> None:
    block = Block().eval()
    before, guard = list_traits(dict(block.named_modules())), ModuleGuard(block, (), ())
    assert guard.is_same()
    CHANGES[change](block.get_submodule(where))
    assert not guard.is_same()
    after = list_traits(dict(block.named_modules()))
    assert [name for name in before if before[name] != after[name]] == [where]
    assert ModuleGuard(block, (), ()).is_same()


@pytest.mark.parametrize("kind", [Block, Inner])
def test_a_method_that_is_put_on_a_class_is_noticed(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block().eval()
    before, guard = list_traits({"": block, "inner": block.inner}), ModuleGuard(block, (), ())
    monkeypatch.setattr(kind, "mix", double)
    assert not guard.is_same()
    assert list_traits({"": block, "inner": block.inner}) != before
    monkeypatch.undo()
    assert guard.is_same()


def test_what_says_nothing_of_a_call_is_not_minded(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block().eval()
    guard = ModuleGuard(block, (), ())
    monkeypatch.setattr(Inner, "extra_repr", lambda self: "inner", raising=False)
    monkeypatch.setattr(nn.Linear, "extra_repr", lambda self: "linear")
    block.notes = ["mine"]  # type: ignore[assignment]
    assert guard.is_same()
    before = list_traits({"": block})  # then what transformers sets where a model is trained
    block._gradient_checkpointing_func = partial(double)  # type: ignore[assignment]
    assert list_traits({"": block}) == before
    assert "__getstate__" not in list_traits({"": block})[""][2]
