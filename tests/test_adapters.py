"""Adapters of peft: a layer under one answers by its graph while that answers alone, else not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Constant, ConstantOrigin
from hubaoti.attachment.binding import ConstantBinding
from hubaoti.attachment.stats import Fallback
from hubaoti.program.adapters import separate_adapters, stands_aside
from hubaoti.runtime.fallback import CannotServe
from hubaoti.settings import Settings

CPU = torch.device("cpu")


def lora(*names: str, layers: list[int] | None = None) -> peft.LoraConfig:
    """An adapter that says something from the start."""
    return peft.LoraConfig(
        r=4, target_modules=[*names], layers_to_transform=layers, init_lora_weights=False
    )


def step(model: Any) -> torch.Tensor:
    """The logits of a prefill into a new static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def alike(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    """The decoder, anew for each test."""
    torch.manual_seed(3)  # for the adapters, which are random
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


def wrapped(model: Any) -> Any:
    return peft.get_peft_model(model, lora("q_proj", "down_proj")).eval()


def with_a_head_of_its_own(model: Any) -> Any:
    config = lora("q_proj")
    config.modules_to_save = ["lm_head"]
    return peft.get_peft_model(model, config).eval()


def within(model: Any) -> Any:
    return wrapped(model).get_base_model()


def added(model: Any) -> Any:
    model.add_adapter(lora("q_proj", "down_proj"))
    return model.eval()


def merge(model: Any) -> None:
    for _, module in model.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()


@pytest.mark.parametrize("way", [wrapped, with_a_head_of_its_own, within, added])
def test_adapters_that_are_merged_before_attach_are_served(
    way: Callable[[Any], Any], model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    adapted = way(model)
    before = step(adapted)
    merge(adapted)
    with hubaoti.attach(adapted, decoder_bundle, strict=True, settings=built_at) as attachment:
        alike(step(adapted), before)
        assert attachment.stats()["compiled"] == 2
    found = {name: {*vars(module)} for name, module in adapted.named_modules()}
    hubaoti.attach(adapted, decoder_bundle, settings=built_at)
    hubaoti.detach(adapted)
    assert {name: {*vars(module)} for name, module in adapted.named_modules()} == found
    alike(step(adapted), before)


def test_attached_before_it_is_merged_a_block_answers_itself_until_it_is(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    base = step(model)
    adapted = wrapped(model)
    own = step(adapted)
    assert not torch.allclose(own, base, atol=1e-2)
    with (
        hubaoti.attach(adapted, decoder_bundle, settings=built_at) as attachment,
        warnings.catch_warnings(action="ignore", category=Fallback),
    ):
        for change in (lambda: None, adapted.merge_adapter, adapted.unmerge_adapter):
            change()
            alike(step(adapted), own)
        with adapted.disable_adapter():
            alike(step(adapted), base)
        alike(step(adapted), own)
        adapted.merge_adapter(safe_merge=True)  # which gives the weights another memory
        alike(step(adapted), own)
        counts = attachment.stats()["regions"]["model.layers.0"]
    assert counts == {"compiled": {"model.layers": 3}, "eager": {"adapters": 3}}


def test_an_adapter_that_is_not_heard_is_no_reason(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    adapted = peft.get_peft_model(model, lora("q_proj", layers=[0]))
    adapted.add_adapter("other", lora("v_proj", layers=[1]))
    adapted.eval()
    expected = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        expected[name] = step(adapted)
    adapted.set_adapter("default")
    adapted.merge_adapter()
    with hubaoti.attach(adapted, decoder_bundle, settings=built_at) as attachment:
        alike(step(adapted), expected["default"])
        assert attachment.stats()["eager"] == 0
        model.model.layers[0].self_attn.q_proj.unmerge()
        adapted.set_adapter("other")
        with warnings.catch_warnings(action="ignore", category=Fallback):
            alike(step(adapted), expected["other"])
        regions = attachment.stats()["regions"]
    assert [regions[f"model.layers.{at}"]["eager"] for at in (0, 1)] == [{}, {"adapters": 1}]


def test_what_graphs_make_of_weights_is_made_anew_for_each_swap(
    model: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    """peft writes to `weight.data`, of which no version tells, and nobody calls in between.

    What it takes out of a weight again is not what it was to the last bit, and a rounding away.
    """
    names = ("q_proj", "down_proj")
    adapted = peft.get_peft_model(model, lora(*names), adapter_name="one")
    adapted.add_adapter("two", lora(*names))
    adapted.eval()
    plain = {}
    for name in ("one", "two"):
        alone = copy.deepcopy(adapted)
        alone.set_adapter(name)
        plain[name] = alone.merge_and_unload()
    expected = {}
    for name, each in plain.items():
        with hubaoti.attach(each, quantized_bundle, strict=True, settings=built_at):
            expected[name] = step(each)
    assert not torch.allclose(expected["one"], expected["two"], atol=0.05)
    with hubaoti.attach(adapted, quantized_bundle, settings=built_at) as attachment:
        for name in ("one", "two", "one", "two"):
            adapted.set_adapter(name)
            adapted.merge_adapter()
            alike(step(adapted), expected[name], 5e-3)
            adapted.unmerge_adapter()
        adapted.set_adapter("one")
        adapted.merge_adapter()
        alike(step(adapted), expected["one"], 5e-3)
        adapted.unmerge_adapter()
        state = peft.get_peft_model_state_dict(adapted, adapter_name="two")
        peft.set_peft_model_state_dict(adapted, state, adapter_name="one")
        adapted.merge_adapter()  # under the same name
        alike(step(adapted), expected["two"], 5e-3)
        assert (attachment.stats()["compiled"], attachment.stats()["eager"]) == (12, 0)


def adapted_layer() -> nn.Module:
    """A module with one layer under an adapter."""
    module = nn.Sequential(nn.Linear(4, 4))
    return peft.inject_adapter_in_model(lora("0"), module).eval()  # type: ignore[no-any-return]


def constant(name: str) -> Constant:
    origin = ConstantOrigin(module=name)
    return Constant(fqn=name, dtype="float32", shape=(4, 4), stride=(4, 1), origin=origin)


def test_an_adapter_that_was_compiled_with_its_layer_has_to_stay_as_it_was() -> None:
    module = adapted_layer()
    inside = ConstantBinding(module, [constant("0.base_layer.weight")], {}, CPU)
    for _ in range(2):
        inside.find_constants()
        module[0].merge()  # type: ignore[index]
        with pytest.raises(CannotServe, match="set otherwise"):
            inside.find_constants()
        module[0].unmerge()  # type: ignore[index]


def test_a_layer_is_found_under_its_adapter_and_answers_alone_or_not() -> None:
    module = adapted_layer()
    parts, adapters = separate_adapters(module)
    assert type(parts["0"]) is nn.Linear and {*parts} == {"", "0"}
    layer = adapters[0].layer
    assert [each.path for each in adapters] == ["0"] and not stands_aside(layer)
    layer.set_adapter(["another"])
    assert stands_aside(layer)
    layer.set_adapter(["default"])
    layer.enable_adapters(False)
    assert stands_aside(layer)
    layer.enable_adapters(True)
    layer.merge()
    assert stands_aside(layer)
    layer.enable_adapters(False)  # it takes its part out again when it is called
    assert not stands_aside(layer)
