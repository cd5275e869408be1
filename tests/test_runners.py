"""`hubaoti.runtime.runners`: what a container is bound to is not kept by it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import find_regions
from hubaoti.runtime.runners import FREE, Bound
from hubaoti.settings import Settings

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    """The decoder, anew for each test."""
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


def generated(model: Any) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        IDS, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None,
        cache_implementation="static",
    )  # fmt: skip


def owners(tensor: torch.Tensor) -> int:
    """How many hold a tensor's memory, this question among them."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def waiting() -> int:
    """How many aliases nobody has."""
    gc.collect()
    return sum(map(len, FREE.values()))


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.randn(3, 4),
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(9)[2:7],
        lambda: torch.arange(6, dtype=torch.int8).reshape(2, 3),
        lambda: torch.randn(3).bfloat16(),
        lambda: torch.empty(0, 4),
        lambda: torch.tensor(3),
    ],
)
def test_an_alias_is_the_same_tensor_and_owns_nothing(made: Callable[[], torch.Tensor]) -> None:
    tensor = made()
    before = owners(tensor)
    for _ in range(2):  # a new one, and one that is used again
        bound = Bound({"it": tensor})
        alias = bound.aliases["it"]
        assert torch.equal(alias, tensor) and alias.data_ptr() == tensor.data_ptr()
        assert (alias.stride(), alias.dtype) == (tensor.stride(), tensor.dtype)
        del bound, alias
        assert owners(tensor) == before


def test_an_alias_that_was_made_in_inference_mode_is_used_outside_of_it() -> None:
    with torch.inference_mode():
        alias = Bound({"it": torch.ones(2)}).aliases["it"]
    assert not alias.is_inference()
    alias.set_(torch.zeros(2).untyped_storage(), 0, (2,), (1,))


def test_what_a_model_was_attached_by_keeps_none_of_its_weights(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    before = owners(weight)
    with hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at) as attachment:
        generated(model)
        attachment.rebind()
        assert owners(weight) > before  # a graph that may be called keeps what it reads
    gc.collect()
    assert owners(weight) == before


def test_aliases_are_used_again_by_the_next_model(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    def once() -> None:
        with hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at) as attachment:
            attachment.rebind()

    once()
    before = waiting()
    for _ in range(5):
        once()
    assert waiting() == before > 0


def test_while_a_call_is_under_way_its_aliases_are_nobody_else_s(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with hubaoti.attach(model, decoder_bundle, strict=True, settings=built_at) as attachment:
        generated(model)
        graph = next(find_regions(model)).graphs[0]
        held = graph._bound  # as `run` does
        attachment.rebind()
        aliases = {id(each) for each in held.aliases.values()}
        assert aliases.isdisjoint(id(each) for each in graph._bound.aliases.values())
        assert aliases.isdisjoint(id(each) for free in FREE.values() for each in free)
        assert all(torch.equal(held.aliases[name], held[name]) for name in held)
