"""Structure: equal for equal modules, and another wherever something else is computed."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from transformers import LlamaConfig, LlamaModel

from hubaoti.artifact.canonical import digest_canonical
from hubaoti.program.identity import identify_module_program
from hubaoti.program.module_fingerprint import Listing, convert_plain_value


def structure(module: nn.Module) -> str:
    return digest_canonical(Listing(module).parts())


class Kind(enum.Enum):
    ROUND = 1
    FLAT = 2


@dataclass
class Sizes:
    width: int = 4
    more: dict[str, Any] = field(default_factory=dict)


class Holder(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.kept = value


def scaled(factor: float) -> Callable[[float], float]:
    return lambda x: factor * x


def local(factor: float) -> type[nn.Module]:
    class Local(nn.Module):
        def forward(self, x: float) -> float:
            return factor * x

    return Local


def generated(factor: float) -> nn.Module:
    """A module of a class that no file tells of."""
    names: dict[str, Any] = {"nn": nn, "__name__": "nowhere"}
    text = f"class Typed(nn.Module):\n    def forward(self, x):\n        return {factor} * x"
    exec(text, names)
    module: nn.Module = names["Typed"]()
    return module


def ring(size: int) -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = [object() for _ in range(size)]
    found.append(found)
    return found


MAKERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "a number": (lambda: Holder(1), lambda: Holder(2)),
    "no number": (lambda: Holder(None), lambda: Holder(0)),
    "infinity": (lambda: Holder(float("inf")), lambda: Holder(float("-inf"))),
    "a word": (lambda: Holder("sdpa"), lambda: Holder("eager")),
    "bytes": (lambda: Holder(b"a"), lambda: Holder(b"b")),
    "a row": (lambda: Holder((1, 2)), lambda: Holder((2, 1))),
    "a set": (lambda: Holder({"a", "b"}), lambda: Holder({"a", "c"})),
    "a table": (lambda: Holder({"a": [1, Sizes()]}), lambda: Holder({"a": [1, Sizes(5)]})),
    "an enum": (lambda: Holder(Kind.ROUND), lambda: Holder(Kind.FLAT)),
    "a dtype": (lambda: Holder(torch.float16), lambda: Holder(torch.bfloat16)),
    "a record": (lambda: Holder(Sizes()), lambda: Holder(Sizes(more={"a": 1}))),
    "a namespace": (lambda: Holder(SimpleNamespace(a=1)), lambda: Holder(SimpleNamespace(a=2))),
    "a lambda": (lambda: Holder(lambda x: x + 1), lambda: Holder(lambda x: x + 2)),
    "a closure": (lambda: Holder(scaled(1.0)), lambda: Holder(scaled(2.0))),
    "a default": (lambda: Holder(lambda x=1: x), lambda: Holder(lambda x=2: x)),
    "torch's function": (lambda: Holder(torch.sin), lambda: Holder(torch.cos)),
    "a partial": (
        lambda: Holder(functools.partial(scaled, 1.0)),
        lambda: Holder(functools.partial(scaled, 2.0)),
    ),
    "a method": (
        lambda: Holder(Holder(1).extra_repr),
        lambda: Holder(Holder(2).extra_repr),
    ),
    "a class": (lambda: Holder(nn.ReLU), lambda: Holder(nn.GELU)),
    "a local class": (lambda: local(1.0)(), lambda: local(2.0)()),
    "a class without a file": (lambda: generated(1.0), lambda: generated(2.0)),
    "a loose tensor": (lambda: Holder(torch.ones(2)), lambda: Holder(torch.zeros(2))),
    "half a tensor": (
        lambda: Holder(torch.ones(2, dtype=torch.bfloat16)),
        lambda: Holder(torch.zeros(2, dtype=torch.bfloat16)),
    ),
    "a complex tensor": (
        lambda: Holder(torch.tensor([1j])),
        lambda: Holder(torch.tensor([2j])),
    ),
    "a ring": (lambda: Holder(ring(1)), lambda: Holder(ring(2))),
    "a child": (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.GELU())),
    "a child's option": (lambda: nn.Sequential(nn.GELU()), lambda: nn.Sequential(nn.GELU("tanh"))),
    "a width": (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 4)),
    "a bias": (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3, bias=False)),
    "a parameter's dtype": (lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3).half()),
    "an epsilon": (lambda: nn.LayerNorm(4), lambda: nn.LayerNorm(4, eps=1e-3)),
    "torch's activation": (
        lambda: nn.TransformerEncoderLayer(4, 2, 4),
        lambda: nn.TransformerEncoderLayer(4, 2, 4, activation="gelu"),
    ),
    "a traced module": (
        lambda: fx.symbolic_trace(lambda x: x + 1),
        lambda: fx.symbolic_trace(lambda x: x + 2),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_equal_modules_have_equal_structures_and_others_have_not(name: str) -> None:
    first, other = MAKERS[name]
    assert structure(first()) == structure(first())
    assert structure(first()) != structure(other())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.5)),
        (lambda: nn.Embedding(4, 2), lambda: nn.Embedding(4, 2, padding_idx=1)),
        (lambda: nn.Linear(2, 2).train(), lambda: nn.Linear(2, 2).eval()),
        (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2).requires_grad_(False)),
        (lambda: Holder(torch.device("cpu")), lambda: Holder(torch.device("meta"))),
    ],
)
def test_what_changes_no_answer_changes_no_structure(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module]
) -> None:
    assert structure(first()) == structure(second())


def buffered(value: float, persistent: bool) -> nn.Module:
    module = nn.Module()
    module.register_buffer("table", torch.full((2,), value), persistent=persistent)
    return module


def test_a_buffer_counts_by_value_where_no_checkpoint_has_it() -> None:
    assert structure(buffered(1, True)) == structure(buffered(2, True))
    assert structure(buffered(1, False)) != structure(buffered(2, False))
    assert structure(buffered(1, False)) != structure(buffered(1, True))


def test_what_transformers_hooks_collect_counts_not() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaModel(config)
    before = identify_module_program(model)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), output_hidden_states=True, use_cache=False)
    assert model.layers[0]._forward_hooks
    assert identify_module_program(model) == before


def test_a_hook_counts() -> None:
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, args, result: result + 1)
    assert structure(hooked) != structure(nn.ReLU())


def test_what_hubaoti_puts_on_a_module_does_not_count() -> None:
    recorded = nn.ReLU()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x

    forward.__module__ = "hubaoti.compiler.capture"
    recorded.forward = forward  # type: ignore[method-assign]
    recorded.register_forward_pre_hook(forward)  # type: ignore[arg-type]
    assert structure(recorded) == structure(nn.ReLU())
    forward.__module__ = "acme.patches"
    assert structure(recorded) != structure(nn.ReLU())


def test_a_module_that_is_kept_twice_is_one() -> None:
    """By its name, so that a parent or a tied child is no endless road."""
    parent = nn.Sequential(nn.Linear(2, 2))
    object.__setattr__(parent[0], "parent", parent)
    assert Listing(parent).parts()["0"]["attributes"]["parent"] == "module "


words = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary()


@given(st.lists(words, max_size=4))
def test_every_plain_value_has_a_canonical_form(values: list[Any]) -> None:
    assert digest_canonical(convert_plain_value(values)) == digest_canonical(
        convert_plain_value(convert_plain_value(values))
    )
