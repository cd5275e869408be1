"""Quantized weights of attached models: beside the module's own, or in their place."""

from __future__ import annotations

import copy
import mmap
import operator
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoModelForCausalLM, StaticCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import Attachment, find_regions
from hubaoti.attachment.quantized import NEEDS, WEIGHTS, QuantizedLinear, quantize_linear
from hubaoti.attachment.stats import Fallback
from hubaoti.errors import BadRequest, MissingConstant
from hubaoti.program.silence import silence_torchao
from hubaoti.runtime import heap
from hubaoti.runtime.quantize import make_quantized, make_torchao_config
from hubaoti.settings import Settings

CPU = torch.device("cpu")
STATIC: dict[str, Any] = {
    "max_new_tokens": 20,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
}
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    """The decoder, anew for each test."""
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


@pytest.fixture
def attached(model: Any, quantized_bundle: Bundle, built_at: Settings) -> Iterator[Attachment]:
    """Graphs over the decoder's blocks, which gave their own weights up."""
    with hubaoti.attach(
        model, quantized_bundle, quantize=True, strict=True, settings=built_at
    ) as attachment:
        yield attachment


@pytest.fixture
def torchao(tiny_decoder: Path) -> Any:
    """The decoder as torchao itself quantizes its blocks."""
    from torchao.quantization import quantize_

    found = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    with silence_torchao(), torch.no_grad():
        quantize_(found.model.layers, make_torchao_config("int8wo", CPU))
    return found


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Those of a prefill into a new static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits  # type: ignore[no-any-return]


def alone(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The same of the module itself: no graph serves a call without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The matrices of the blocks that they are made of."""
    named = model.model.layers.named_parameters()
    return {name: each for name, each in named if each.dim() > 1}


def test_without_being_asked_a_module_keeps_its_weights_beside_those_of_its_graphs(
    model: Any, torchao: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    before = {name: each.data_ptr() for name, each in model.named_parameters()}
    with hubaoti.attach(model, quantized_bundle, strict=True, settings=built_at):
        torch.testing.assert_close(logits(model), alone(torchao))
        assert {name: each.data_ptr() for name, each in model.named_parameters()} == before


def test_a_module_that_is_quantized_holds_what_its_graphs_read_and_nothing_else(
    model: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    former = [weakref.ref(each) for each in weights_of(model).values()]
    size = sum(each().nbytes for each in former)  # type: ignore[union-attr]
    with hubaoti.attach(model, quantized_bundle, quantize=True, settings=built_at):
        assert len(former) == 14 and not any(each() for each in former)
        held = {each.data_ptr(): each.nbytes for each in model.model.layers.buffers()}
        assert sum(held.values()) < size / 3  # so narrow a block has many scales
        made = {c.fqn for c in quantized_bundle.manifest.graphs[0].constants if c.origin.transform}
        for region in find_regions(model):
            tensors, _ = region.inside.find_constants()
            assert {tensors[fqn].data_ptr() for fqn in made} <= held.keys()


def test_its_graphs_answer_as_torchao_s_own_quantized_model(
    model: Any, torchao: Any, attached: Attachment
) -> None:
    torch.testing.assert_close(logits(model), alone(torchao))
    found = model.generate(IDS, **STATIC)
    assert torch.equal(found, torchao.generate(IDS, **STATIC))
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (2 + 2 * 20, 0)


def test_what_the_module_answers_itself_is_of_the_same_weights(
    model: Any, torchao: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    with hubaoti.attach(model, quantized_bundle, quantize=True, settings=built_at):
        with pytest.warns(Fallback):
            found = alone(model)
        torch.testing.assert_close(found, alone(torchao))
        torch.testing.assert_close(logits(model), found)


def test_it_stays_quantized_and_is_attached_again_by_reference(
    model: Any, attached: Attachment, quantized_bundle: Bundle, built_at: Settings
) -> None:
    expected, held = logits(model), [each.data_ptr() for each in model.buffers()]
    attached.detach()
    torch.testing.assert_close(alone(model), expected)
    for again in (True, False):
        with hubaoti.attach(
            model, quantized_bundle, quantize=again, strict=True, settings=built_at
        ) as other:
            assert torch.equal(logits(model), expected)
            assert other.stats()["compiled"] == 2  # its code is known: the first call is no trial
        assert [each.data_ptr() for each in model.buffers()] == held


def test_plain_weights_are_quantized_as_they_are_loaded(
    model: Any, attached: Attachment, torchao: Any, tiny_decoder: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    plain = copy.deepcopy(other.state_dict())
    expected = logits(model)
    with torch.no_grad():
        for each in weights_of(other).values():
            each.mul_(1.5)
    model.load_state_dict(other.state_dict())
    attached.rebind()
    assert not torch.allclose(logits(model), expected, rtol=1e-2)
    model.load_state_dict(plain)
    assert torch.equal(logits(model), expected)  # written where the graphs read
    assert (attached.stats()["compiled"], attached.stats()["eager"]) == (6, 0)


def test_weights_that_are_written_beside_torch_s_count_are_quantized_anew(
    model: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    """As peft merges into a layer, and as averages of weights are kept."""
    with hubaoti.attach(model, quantized_bundle, settings=built_at) as attached:
        before = logits(model)
        for each in weights_of(model).values():
            each.data.mul_(1.5)
        after = logits(model)
        assert not torch.allclose(after, before, rtol=1e-2)
        attached.rebind()
        assert torch.equal(logits(model), after)


def test_its_state_and_its_copies_are_quantized_too(model: Any, attached: Attachment) -> None:
    expected, other = logits(model), copy.deepcopy(model)
    assert not [*find_regions(other)]
    torch.testing.assert_close(alone(other), expected)
    for each in other.model.layers.buffers():
        each.zero_()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(alone(other), expected)


def test_in_another_dtype_it_answers_itself(
    model: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    with hubaoti.attach(model, quantized_bundle, quantize=True, settings=built_at):
        expected = logits(model)
        model.to(torch.bfloat16)
        with pytest.warns(Fallback, match="weights"):
            found = logits(model)
        assert found.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.up_proj.qdata.dtype == torch.int8
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)


def test_an_artifact_that_is_not_quantized_quantizes_nothing(
    model: Any, decoder_bundle: Bundle, built_at: Settings
) -> None:
    with pytest.raises(BadRequest, match="not quantized.*float32-sdpa") as why:
        hubaoti.attach(model, decoder_bundle, quantize=True, settings=built_at)
    assert "--quantize" in why.value.hint
    assert len(weights_of(model)) == 14


def test_what_does_not_fit_is_told_before_anything_is_quantized(
    model: Any, quantized_bundle: Bundle, built_at: Settings
) -> None:
    last = model.model.layers[1].mlp
    down = last.down_proj
    last.down_proj = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    with pytest.raises(MissingConstant, match="down_proj.weight is torch.bfloat16"):
        hubaoti.attach(model, quantized_bundle, quantize=True, settings=built_at)
    last.down_proj = NonDynamicallyQuantizableLinear(64, 32, bias=False)
    with pytest.raises(BadRequest, match="mlp.down_proj is a NonDynamically.*, not a Linear"):
        hubaoti.attach(model, quantized_bundle, quantize=True, settings=built_at)
    last.down_proj = down
    assert len(weights_of(model)) == 14 and not [*find_regions(model)]


# Layers


@pytest.mark.parametrize("recipe", WEIGHTS)
def test_a_quantized_linear_is_near_the_one_that_it_was(recipe: str) -> None:
    torch.manual_seed(3)
    layer = nn.Linear(256, 64, dtype=torch.bfloat16)
    x, plain = torch.randn(3, 256, dtype=torch.bfloat16), layer.weight.detach().clone()
    expected = layer(x)
    quantize_linear(layer, recipe, NEEDS[recipe])
    assert isinstance(layer, QuantizedLinear) and recipe in repr(layer)
    assert {*layer.state_dict()} == {"bias", *NEEDS[recipe]}
    assert (layer.weight.dtype, layer.weight.shape) == (plain.dtype, plain.shape)
    off = (layer(x) - expected).norm() / expected.norm()
    assert 0 < off < {"int8wo": 0.01, "int4wo": 0.12, "float8dq": 0.04}[recipe]


@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_its_weight_is_torchao_s(recipe: str) -> None:
    from torchao.quantization import quantize_

    torch.manual_seed(3)
    layer = nn.Linear(256, 64, bias=False)
    theirs = nn.Sequential(copy.deepcopy(layer))
    with silence_torchao(), torch.no_grad():
        quantize_(theirs, make_torchao_config(recipe, CPU))
        rows = theirs(torch.eye(256)).t()
    quantize_linear(layer, recipe, NEEDS[recipe])
    torch.testing.assert_close(layer.weight, rows, rtol=1e-4, atol=1e-5)


def test_it_is_pickled_and_moved_as_a_linear() -> None:
    layer = nn.Linear(32, 16)
    quantize_linear(layer, "int8wo", NEEDS["int8wo"])
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other.weight, layer.weight)
    assert other.to(torch.float64).weight.dtype == torch.float64
    assert other.to("meta").weight.is_meta


def test_a_weight_of_its_own_cannot_be_set(model: Any, attached: Attachment) -> None:
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(64, 32))


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_is_merged_into_it_is_refused_and_not_lost(safe: bool) -> None:
    holder = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    quantize_linear(holder[0], "int8wo", NEEDS["int8wo"])
    inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), holder)
    x = torch.randn(2, 32)
    expected = holder(x)
    expected.sum().backward()  # it is trained over quantized weights
    with pytest.raises(BadRequest, match="written into it would be lost") as caught:
        holder[0].merge(safe_merge=safe)
    assert "before attach" in caught.value.hint
    assert not holder[0].merged and torch.equal(holder(x), expected)


WRITES: dict[str, Callable[[Any], object]] = {
    "a method": lambda layer: layer.weight.add_(1),
    "an operator": lambda layer: operator.iadd(layer.weight, 1),
    "rows": lambda layer: operator.setitem(layer.weight, 0, 1),
    "as data": lambda layer: setattr(layer.weight, "data", torch.zeros(16, 32)),
    "a method of its data": lambda layer: layer.weight.data.copy_(torch.zeros(16, 32)),
    "rows of its data": lambda layer: operator.setitem(layer.weight.data, slice(0, 2), 0),
    "init": lambda layer: nn.init.zeros_(layer.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_its_weight_is_refused_and_not_lost(write: str) -> None:
    layer = nn.Linear(32, 16)
    quantize_linear(layer, "int8wo", NEEDS["int8wo"])
    with pytest.raises(BadRequest, match="would be lost"), torch.no_grad():
        WRITES[write](layer)
    layer.weight.requires_grad_(False)


def test_what_is_computed_of_its_weight_is_plain() -> None:
    layer = nn.Linear(32, 16)
    quantize_linear(layer, "int8wo", NEEDS["int8wo"])
    weight = layer.weight
    plain = pickle.loads(pickle.dumps(weight))
    assert torch.equal(plain, weight)
    copied, written = copy.deepcopy(weight), torch.zeros(16, 32).copy_(weight)
    assert torch.equal(written, weight)
    for each in (plain, copied, written, weight + 0, weight.t(), layer(torch.ones(1, 32))):
        assert type(each) is torch.Tensor


# Pages


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_pages_of_a_mapped_file_are_given_back_and_still_there(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"\7" * (64 << 20))
    tensor = torch.from_file(str(file), size=64 << 20, dtype=torch.uint8)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * (64 << 20)
    before, start = resident(), tensor.data_ptr()
    heap.release_pages([(start + 5, start + tensor.nbytes)])
    assert before - resident() > 56 << 20
    assert int(tensor.sum(dtype=torch.int64)) == 7 * (64 << 20)


def test_only_whole_pages_within_a_file_are_named() -> None:
    page = mmap.PAGESIZE
    assert [*heap.intersect_pages([(5, 4 * page + 5)], [(2 * page, 9 * page)])] == [
        (2 * page, 4 * page)
    ]
    assert [*heap.intersect_pages([(5, page + 5)], [(0, 9 * page)])] == []


def test_a_sketch_looks_as_what_would_be_made() -> None:
    from hubaoti.attachment.quantized import ConstantSketches

    weight, sketched = torch.randn(16, 128), ConstantSketches()
    for transform in ("int8wo.qdata", "int8wo.scale", "int4wo.qdata", "int4wo.scale_and_zero"):
        ours, real = sketched(transform, weight), make_quantized(transform, weight)
        assert (ours.dtype, ours.shape, ours.stride()) == (real.dtype, real.shape, real.stride())
        assert sketched(transform, weight.clone()) is ours
