"""Caches whose tensors are a region's inputs: step by step as transformers' own static caches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hubaoti.attachment.expand import expand_to_shape
from hubaoti.compiler import kv_inputs as caches
from hubaoti.compiler.from_config import use_attention
from hubaoti.compiler.kv_inputs import (
    ATTENTION,
    Layer,
    Sliding,
    Static,
    attend_grouped,
    make_cache,
)
from hubaoti.errors import CompileFailed
from hubaoti.runtime.kv_cache import CacheState

WINDOW = 8
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def states(seq: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values of two rows and three heads."""
    generator = torch.Generator().manual_seed(seed + seq)
    keys, values = torch.randn(2, 2, 3, seq, 4, generator=generator)
    return keys, values


# One layer


@pytest.mark.parametrize("lengths", [(5, 1, 1, 1), (1, 1, 3, 2), (12,)])
def test_a_static_layer_holds_and_shows_what_transformers_does(lengths: tuple[int, ...]) -> None:
    theirs: Any = StaticLayer(12)
    held = (torch.zeros(2, 3, 12, 4), torch.zeros(2, 3, 12, 4))
    filled = 0
    for at, length in enumerate(lengths):
        new = states(length, at)
        position = torch.arange(filled, filled + length)
        filled += length
        ours = Static(*held, position, filled)
        assert ours.get_seq_length() == filled - length
        shown, expected = ours.update(*new), theirs.update(*new)
        assert all(torch.equal(a, b[:, :, :filled]) for a, b in zip(shown, expected, strict=True))
        assert torch.equal(held[0], theirs.keys) and torch.equal(held[1], theirs.values)
        assert all(tensor.untyped_storage().data_ptr() in map(where, held) for tensor in shown)


def where(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 1), (WINDOW, 2), (3 * WINDOW, 1)])
def test_a_full_window_moves_on_as_transformers_does(lengths: tuple[int, ...]) -> None:
    theirs: Any = StaticSlidingWindowLayer(99, WINDOW)
    theirs.update(*states(WINDOW, 9))
    held = (theirs.keys.clone(), theirs.values.clone())
    for at, length in enumerate(lengths):
        new = states(length, at)
        ours = Sliding(*held, length)
        assert ours.get_mask_sizes(length)[0] == theirs.get_mask_sizes(length)[0]
        shown, expected = ours.update(*new), [t.clone() for t in theirs.update(*new)]
        assert all(torch.equal(a, b) for a, b in zip(shown, expected, strict=True))
        assert torch.equal(held[0], theirs.keys) and torch.equal(held[1], theirs.values)


def test_more_than_the_cache_holds_is_never_shown() -> None:
    held = torch.zeros(2, 3, 4, 4)
    with pytest.raises(RuntimeError):
        Static(held, held.clone(), torch.arange(3), 5).update(*states(3))
    assert torch.equal(held, torch.zeros_like(held))


def test_looking_at_a_model_notes_what_each_layer_is_given() -> None:
    seen = caches.make_recording_cache(filled=9, seq=4, layers=2)
    keys, values = states(4)
    shown = seen.update(keys, values, 1)
    assert [tensor.shape for tensor in shown] == [(2, 3, 9, 4), (2, 3, 9, 4)]
    layers: Any = seen.layers
    assert (len(layers[0].puts), layers[1].puts[0][0] is keys) == (0, True)
    assert seen.get_seq_length() == 5


class Numbered(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        for name, value in attributes.items():
            setattr(self.inner, name, value)


@pytest.mark.parametrize(
    ("attributes", "layers"),
    [({}, 1), ({"layer_idx": 3}, 4), ({"layer_id": 1, "layer_number": 2}, 3), ({"layers": 9}, 1)],
)
def test_a_cache_has_room_for_the_number_that_a_block_has(
    attributes: dict[str, Any], layers: int
) -> None:
    assert caches.count_layers(Numbered(**attributes)) == layers


def llama4() -> Any:
    return transformers.Llama4TextConfig(
        **TINY, attention_chunk_size=WINDOW, no_rope_layers=[1, 0], moe_layers=[]
    )


def test_how_far_a_layer_looks_back_is_what_its_static_cache_says() -> None:
    def windows(config: Any) -> list[int | None]:
        return [caches.find_layer_window(config, at) for at in range(2)]

    assert windows(mistral().config) == [WINDOW, WINDOW]
    assert windows(gemma().config) == [WINDOW, None]
    assert windows(llama4()) == [WINDOW, None]  # a chunk is cached as a window
    assert windows(llama().config) == [None, None]
    kinds = ["linear_attention", "full_attention"]
    assert windows(transformers.Qwen3NextConfig(**TINY, layer_types=kinds)) == [None, None]
    assert caches.find_layer_window(None, 0) is None


# A block of a real model


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **more))


def mistral() -> Any:
    config = transformers.MistralConfig(**TINY, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config)


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**TINY, sliding_window=WINDOW, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def gpt_neox() -> Any:
    small = {name: TINY[name] for name in TINY if name not in {"num_key_value_heads", "head_dim"}}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small))


class Compared:
    """Each call of a block, answered a second time with tensors of ours as its cache."""

    def __init__(self, model: Any, block: nn.Module, index: int) -> None:
        self.model, self.forward, self.index = model, block.forward, index
        self.kinds: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = next(name for name, value in kwargs.items() if isinstance(value, StaticCache))
        theirs: Any = kwargs[name].layers[self.index]
        held = (theirs.keys.clone(), theirs.values.clone())
        mask = kwargs["attention_mask"]
        spent, seq = int(theirs.get_seq_length()), mask.shape[2]
        expected = self.forward(*args, **kwargs)
        layer = self.layer(theirs, held, spent, seq)
        self.kinds.append(type(layer).__name__)
        looked = expand_to_shape(mask, (*mask.shape[:-1], layer.filled), layer.filled)
        own = {name: make_cache(layer, self.index + 1), "attention_mask": looked}
        with use_attention(self.model, ATTENTION):
            found = self.forward(*args, **{**kwargs, **own})
        torch.testing.assert_close(tree_leaves(found)[0], tree_leaves(expected)[0])
        torch.testing.assert_close(held, (theirs.keys, theirs.values))
        return expected

    def layer(self, theirs: Any, held: Any, spent: int, seq: int) -> Layer:
        """Our layer for this call."""
        if theirs.is_sliding and spent + seq > theirs.max_cache_len:
            CacheState(theirs, *held, spent, seq, True, None).slide(*held)
            return Sliding(*held, seq)
        return Static(*held, torch.arange(spent, spent + seq), spent + seq)


@contextmanager
def comparing(model: Any) -> Iterator[list[Compared]]:
    """Every block of a model answers twice."""
    blocks = model.base_model.layers
    found = [Compared(model, block, at) for at, block in enumerate(blocks)]
    for block, compared in zip(blocks, found, strict=True):
        block.forward = compared
    yield found
    for block in blocks:
        del block.forward


def run(model: Any, lengths: tuple[int, ...]) -> list[list[str]]:
    """Feed a model tokens in steps, the second row padded on the left; what each layer was."""
    caches.register_attention()
    torch.manual_seed(3)
    model.eval()
    cache = StaticCache(config=model.config, max_cache_len=40)
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    cache.early_initialization(2, heads, 8, torch.float32, torch.device("cpu"))
    total = sum(lengths)
    ids = torch.randint(0, 50, (2, total))
    mask = torch.ones(2, total, dtype=torch.int64)
    mask[1, :2] = 0
    at = 0
    with torch.no_grad(), comparing(model) as found:
        for length in lengths:
            seen, at = at, at + length
            model(
                input_ids=ids[:, seen:at],
                attention_mask=mask[:, :at],
                position_ids=torch.arange(seen, at).expand(2, -1),
                past_key_values=cache,
                use_cache=True,
            )
    return [compared.kinds for compared in found]


@pytest.mark.parametrize("make", [llama, gpt_neox])
def test_a_block_answers_alike_over_our_cache_in_prefill_and_decode(
    make: Callable[[], Any],
) -> None:
    assert run(make(), (7, 1, 1, 5, 1)) == [["Static"] * 5] * 2


@pytest.mark.parametrize("make", [mistral, gemma])
def test_a_block_with_a_window_answers_alike_before_and_after_it_is_full(
    make: Callable[[], Any],
) -> None:
    first, second = run(make(), (5, 1, 2, 1, 1, 3, 1))
    window = ["Static"] * 3 + ["Sliding"] * 4
    assert first == window
    assert second == (window if make is mistral else ["Static"] * 7)


@pytest.mark.parametrize("lengths", [(5, 5, 1), (WINDOW - 1, 3, 1), (2 * WINDOW, 1, 3), (1, 20)])
@pytest.mark.parametrize("make", [mistral, gemma])
def test_a_window_that_becomes_full_in_the_middle_of_a_call_answers_alike(
    make: Callable[[], Any], lengths: tuple[int, ...]
) -> None:
    kinds = run(make(), lengths)[0]
    filled = [sum(lengths[: at + 1]) for at in range(len(lengths))]
    assert kinds == ["Static" if each <= WINDOW else "Sliding" for each in filled]


def test_a_wrong_place_in_the_cache_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: one place too far, and the block answers something else."""

    def late(self: Compared, theirs: Any, held: Any, spent: int, seq: int) -> Layer:
        return Static(*held, torch.arange(spent + 1, spent + 1 + seq), spent + seq)

    monkeypatch.setattr(Compared, "layer", late)
    with pytest.raises(AssertionError, match="not close"):
        run(llama(), (7, 1))


# Attention


def heads(count: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count + seq)
    return torch.randn(2, count, seq, 16, generator=generator)


class Grouped(nn.Module):
    num_key_value_groups = 4
    is_causal = True


def masks() -> dict[str, torch.Tensor | None]:
    seen = torch.ones(2, 1, 3, 7, dtype=torch.bool).tril(4)
    seen[1, ..., :2] = False
    added = torch.zeros(2, 1, 3, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"bool": seen, "float": added, "none": None}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_grouped_attention_is_transformers_own(mask: str, count: int, scaling: float) -> None:
    module = Grouped()
    module.num_key_value_groups = 8 // count
    given = (module, heads(8, 3), heads(count, 7), heads(count, 7), masks()[mask])
    found = attend_grouped(*given, scaling=scaling, dropout=0.0)
    expected = sdpa_attention_forward(*given, scaling=scaling, dropout=0.0)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] is None and found[0].is_contiguous()


class Shapes(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def test_grouped_keys_are_not_repeated_in_memory() -> None:
    given = (Grouped(), heads(8, 3), heads(2, 7), heads(2, 7), masks()["bool"])
    repeated = (2, 8, 7, 16)
    with Shapes() as theirs:
        sdpa_attention_forward(*given)
    with Shapes() as ours:
        attend_grouped(*given)
    assert repeated in theirs.made
    assert repeated not in ours.made


UNKNOWN = {
    "s_aux": torch.zeros(8),
    "softcap": 50.0,
    "sinks": torch.zeros(8),
    "cache": object(),
    "alibi": torch.zeros(1),
    "position_bias": torch.zeros(1, 8, 3, 7),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_an_argument_that_would_be_left_out_is_refused(name: str, mask: str) -> None:
    given = (Grouped(), heads(8, 3), heads(2, 7), heads(2, 7), masks()[mask])
    with pytest.raises(CompileFailed, match=f"the attention takes {name}") as caught:
        attend_grouped(*given, **{name: UNKNOWN[name]})
    assert "eager" in caught.value.hint


@pytest.mark.parametrize("mask", masks())
def test_where_nothing_is_grouped_it_is_transformers_own_in_all_it_takes(mask: str) -> None:
    module = Grouped()
    module.num_key_value_groups = 1
    given = (module, heads(8, 3), heads(8, 7), heads(8, 7), masks()[mask])
    bias = {"position_bias": torch.randn(1, 8, 3, 7, generator=torch.Generator().manual_seed(1))}
    found, expected = attend_grouped(*given, **bias), sdpa_attention_forward(*given, **bias)
    torch.testing.assert_close(found[0], expected[0])
    assert not torch.equal(found[0], attend_grouped(*given)[0])
    with pytest.raises((ValueError, CompileFailed), match="softcap"):
        attend_grouped(*given, softcap=50.0)
    with pytest.raises(CompileFailed, match="takes indices"):  # which no sdpa was ever given
        attend_grouped(*given, indices=torch.zeros(1, 3, 2))


def test_what_no_attention_computes_with_may_be_given() -> None:
    given = (Grouped(), heads(8, 3), heads(2, 7), heads(2, 7), masks()["bool"])
    harmless: dict[str, Any] = dict.fromkeys(caches.HARMLESS, 7) | {"s_aux": None, "softcap": None}
    harmless |= {"output_attentions": False, "output_router_logits": True}
    assert torch.equal(attend_grouped(*given, **harmless)[0], attend_grouped(*given)[0])


def test_a_registered_attention_has_sdpa_s_masks() -> None:
    caches.register_attention()
    model = llama().eval()
    seen: list[Any] = []
    block = model.model.layers[0]
    forward = block.forward
    block.forward = lambda *a, **k: (seen.append(k["attention_mask"]), forward(*a, **k))[1]
    ids = torch.ones(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        expected = model(ids, mask).logits
        with use_attention(model, ATTENTION):
            found = copy.copy(model)(ids, mask).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("seq", [1, 3])
@pytest.mark.parametrize("each_head", [False, True])
def test_one_token_is_attended_to_as_many_are(seq: int, each_head: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = heads(8, seq), heads(2, 7), heads(2, 7)
    mask = torch.randn(2, 8 if each_head else 1, seq, 7, generator=generator)
    found = attend_grouped(Grouped(), query, key, value, mask)[0]
    torch.testing.assert_close(found, sdpa_attention_forward(Grouped(), query, key, value, mask)[0])
