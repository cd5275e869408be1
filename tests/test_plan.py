"""Plan: which regions a model is compiled as, how they are called, for which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from serving import Form, serving
from torch import nn
from transformers import StaticCache

from hubaoti.artifact.schema import Input, Program
from hubaoti.compiler.capture import record_calls
from hubaoti.compiler.from_config import Source, load_source, use_attention
from hubaoti.compiler.from_module import make_source
from hubaoti.compiler.kv_inputs import ATTENTION
from hubaoti.compiler.plan import Plan, choose_tracing_attention, make_plan
from hubaoti.compiler.request import CompileRequest, Range, make_bucket_ranges, make_ranges
from hubaoti.compiler.signature import CallSignature, FlatModule
from hubaoti.errors import BadDim, BadRequest, CompileFailed

CPU = torch.device("cpu")
WINDOW = 8
TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def llama() -> Any:
    return transformers.LlamaConfig(**TINY, architectures=["LlamaForCausalLM"])


def mistral() -> Any:
    names = ["MistralForCausalLM"]
    return transformers.MistralConfig(**TINY, sliding_window=WINDOW, architectures=names)


def gemma() -> Any:
    return transformers.Gemma3TextConfig(
        **TINY,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        architectures=["Gemma3ForCausalLM"],
    )


def softcapped() -> Any:
    names = ["Gemma2ForCausalLM"]
    return transformers.Gemma2Config(**TINY, sliding_window=WINDOW, architectures=names)


def bloom() -> Any:
    return transformers.BloomConfig(
        vocab_size=50,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["BloomForCausalLM"],
    )


HYBRID: dict[str, Any] = {**TINY, "layer_types": ["conv", "full_attention"] * 2}
LINEAR: dict[str, Any] = {**TINY, "layer_types": ["linear_attention", "full_attention"] * 2}
STATES: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def lfm() -> Any:
    return transformers.Lfm2Config(**HYBRID, architectures=["Lfm2ForCausalLM"])


def qwen_next() -> Any:
    return transformers.Qwen3NextConfig(
        **LINEAR,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        architectures=["Qwen3NextForCausalLM"],
    )


def granite() -> Any:
    names = ["GraniteMoeHybridForCausalLM"]
    kinds = ["mamba", "attention"] * 2
    made = {**TINY, **STATES, "layer_types": kinds, "shared_intermediate_size": 16}
    return transformers.GraniteMoeHybridConfig(**made, num_local_experts=0, architectures=names)


def falcon() -> Any:
    names = ["FalconH1ForCausalLM"]
    return transformers.FalconH1Config(**TINY, **STATES, mamba_d_ssm=64, architectures=names)


def gemma_eyes() -> Any:
    return transformers.Gemma3Config(
        text_config=gemma().to_dict(),
        vision_config=EYES,
        architectures=["Gemma3ForConditionalGeneration"],
    )


def mistral_eyes() -> Any:
    return transformers.Mistral3Config(
        text_config={**TINY, "model_type": "mistral"},
        vision_config={**EYES, "model_type": "pixtral", "head_dim": 8},
        architectures=["Mistral3ForConditionalGeneration"],
    )


def qwen_eyes() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2VLConfig(
        text_config={**TINY, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
        architectures=["Qwen2VLForConditionalGeneration"],
    )


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a config, for a request in words."""

    def find(config: Any, *buckets: str, task: str = "generate", **more: Any) -> Plan:
        config.save_pretrained(tmp_path)
        dims = make_ranges(more.pop("dims", ()))
        request = CompileRequest(task=task, dims=dims, buckets=make_bucket_ranges(buckets), **more)
        return make_plan(load_source(tmp_path, request, CPU), request, CPU)

    return find


def shapes(face: CallSignature) -> dict[str, tuple[int | str, ...]]:
    return {entry.name: entry.shape for entry in face.inputs}


# Loaders that know no manifest


def test_their_blocks_take_all_that_transformers_give_where_nobody_pads(
    planned: Callable[..., Plan],
) -> None:
    (unit,) = planned(llama(), task="forward", layout="zerogpu").units
    assert shapes(unit.face) == {
        "hidden_states": ("batch", "seq", 32),
        "position_embeddings_0": (1, "seq", 8),
        "position_embeddings_1": (1, "seq", 8),
        "position_ids": (1, "seq"),
    }
    assert unit.face.template["kwargs"]["attention_mask"] is None


@pytest.mark.parametrize("padded", [False, True])
def test_their_blocks_take_masks_where_captured_calls_pad(padded: bool) -> None:
    model = transformers.LlamaForCausalLM(llama()).eval()
    request = CompileRequest(layout="zerogpu")
    with record_calls(model) as calls, torch.no_grad():
        for shape in ((2, 7), (3, 11)):
            mask = torch.ones(shape, dtype=torch.int64)
            mask[0, :3] = 0 if padded else 1
            model(torch.ones(shape, dtype=torch.int64), attention_mask=mask, use_cache=False)
    source, _ = make_source(model, replace(request, calls=[calls]))
    (unit,) = make_plan(source, request, CPU).units
    assert ("attention_mask" in shapes(unit.face)) == padded


def test_a_cache_that_a_captured_model_makes_is_refused_with_the_way_without_it() -> None:
    model = transformers.LlamaForCausalLM(llama()).eval()
    with record_calls(model) as calls, torch.no_grad():
        for shape in ((2, 7), (3, 11)):
            model(torch.ones(shape, dtype=torch.int64))
    source, _ = make_source(model, CompileRequest(calls=[calls]))
    with pytest.raises(CompileFailed, match="captured with use_cache=False it is given none"):
        make_plan(source, CompileRequest(), CPU)


def test_an_encoder_is_called_for_them_with_what_its_tokenizer_gives(
    planned: Callable[..., Plan],
) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    (unit,) = planned(config, task="forward", layout="zerogpu", regions="none").units
    assert {*unit.face.template["kwargs"]} == {"input_ids", "token_type_ids", "attention_mask"}


# Decoders


def test_a_decoder_s_block_takes_what_it_computes_with_and_its_cache(
    planned: Callable[..., Plan],
) -> None:
    found = planned(llama())
    (unit,) = found.units
    assert (unit.id, unit.region, len(unit.modules)) == ("model.layers", "model.layers.0", 4)
    assert shapes(unit.face) == {
        "hidden_states": ("batch", "seq", 32),
        "attention_mask": ("batch", 1, "seq", "filled"),
        "position_embeddings_0": ("batch", "seq", 8),
        "position_embeddings_1": ("batch", "seq", 8),
        "keys": ("batch", 2, "cache", 8),
        "values": ("batch", 2, "cache", 8),
        "position": ("seq",),
    }
    assert unit.bounds == {
        "batch": Range(1, 32),
        "seq": Range(1, 128),
        "filled": Range(1, 128),
        "cache": Range(16, 128),
    }
    assert found.dims.keys() == {"batch", "seq", "cache"}
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (gemma_eyes, {"sliding": [0, 2], "sliding-full": [0, 2], "full": [1, 3]}),
        (mistral_eyes, {"": [0, 1, 2, 3]}),
        (qwen_eyes, {"": [0, 1, 2, 3]}),
    ],
)
def test_of_a_model_that_sees_the_text_decoder_is_planned(
    config: Callable[[], Any], layers: dict[str, list[int]], planned: Callable[..., Plan]
) -> None:
    found = planned(config())
    place = "model.language_model.layers"
    assert {unit.id: unit.modules for unit in found.units} == {
        f"{place}.{name}".rstrip("."): tuple(f"{place}.{at}" for at in each)
        for name, each in layers.items()
    }
    assert all(unit.face.cache for unit in found.units)
    assert found.left_out == ()


@pytest.mark.parametrize("config", [lfm, qwen_next, granite])
def test_blocks_that_keep_recurrent_states_stay_eager_and_those_that_attend_do_not(
    config: Callable[[], Any], planned: Callable[..., Plan]
) -> None:
    found = planned(config())
    (unit,) = found.units
    assert unit.modules == ("model.layers.1", "model.layers.3")
    assert unit.face.cache is not None and unit.face.cache.kind == "static"
    (reason,) = found.left_out
    assert "keeps recurrent states in the cache" in reason


def test_of_blocks_that_attend_beside_recurrent_states_the_parts_are_planned(
    planned: Callable[..., Plan],
) -> None:
    found = planned(falcon())
    caches = {unit.region: unit.face.cache is not None for unit in found.units}
    assert caches == {"model.layers.0.feed_forward": False, "model.layers.0.self_attn": True}
    assert all(len(unit.modules) == 4 for unit in found.units)
    (reason,) = found.left_out
    assert "recurrent states" in reason


def test_a_rope_that_grows_is_left_to_the_model(planned: Callable[..., Plan]) -> None:
    config = llama()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (unit,) = planned(config).units
    assert shapes(unit.face)["position_embeddings_0"] == ("batch", "seq", 8)


def test_a_graph_of_a_whole_model_over_its_caches_is_refused(
    planned: Callable[..., Plan],
) -> None:
    with pytest.raises(BadRequest, match="a KV cache for each layer") as caught:
        planned(llama(), regions="none")
    assert "leave --regions none out" in caught.value.hint


def test_rows_of_heads_are_a_multiple_of_the_batch(planned: Callable[..., Plan]) -> None:
    (unit,) = planned(bloom()).units
    assert shapes(unit.face)["alibi"] == ("4*batch", 1, "filled")


def test_sliding_and_full_layers_are_planned_apart(planned: Callable[..., Plan]) -> None:
    units = {unit.id: unit for unit in planned(gemma()).units}
    layers = {name: [int(path[-1]) for path in unit.modules] for name, unit in units.items()}
    assert layers == {
        "model.layers.sliding": [0, 2],
        "model.layers.sliding-full": [0, 2],
        "model.layers.full": [1, 3],
    }
    window = units["model.layers.sliding-full"]
    assert window.face.cache is not None and window.face.cache.kind == "sliding"
    assert shapes(window.face)["attention_mask"] == ("batch", 1, "seq", f"seq+{WINDOW - 1}")
    assert window.bounds.keys() == {"batch", "seq"}
    kinds = [unit.face.cache.kind for unit in units.values() if unit.face.cache]
    assert kinds == ["static", "sliding", "static"]


def test_a_layer_that_looks_at_all_has_no_window_though_it_holds_one(
    planned: Callable[..., Plan],
) -> None:
    """As Exaone 4's full layers, which keep the window of the others."""
    config = transformers.Exaone4Config(
        **TINY, sliding_window=WINDOW, architectures=["Exaone4ForCausalLM"]
    )
    ids = {unit.id: unit.modules[0] for unit in planned(config).units}
    assert sorted(ids.values()).count("model.layers.3") == 1
    assert [name.endswith("-full") for name in ids] == [False, True, False]


def test_a_model_of_images_takes_no_words(planned: Callable[..., Plan]) -> None:
    """BEiT's config has a vocabulary, of what its training predicts, and its code takes a mask."""
    config = transformers.BeitConfig(
        **TINY, image_size=32, patch_size=8, architectures=["BeitModel"]
    )
    found = planned(config, task="forward")
    assert [entry.name for entry in found.source.face.inputs] == ["pixel_values"]
    assert sum(len(unit.modules) for unit in found.units) == TINY["num_hidden_layers"]


def test_code_that_chooses_its_attention_itself_is_given_no_name_of_ours(
    planned: Callable[..., Plan],
) -> None:
    """Falcon's takes the slow one for any name but its own, and answers the scores beside."""
    config = transformers.FalconConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        architectures=["FalconForCausalLM"],
    )
    assert choose_tracing_attention(planned(config).source) == "sdpa"
    assert choose_tracing_attention(planned(llama()).source) == ATTENTION


def test_a_cache_that_never_exceeds_the_window_needs_no_other_form(
    planned: Callable[..., Plan],
) -> None:
    few = {"seq": (1, 4), "cache": (2, WINDOW - 1)}
    assert [unit.id for unit in planned(mistral(), dims=few).units] == ["model.layers"]
    more = {"seq": (1, 4), "cache": (2, WINDOW + 1)}
    ids = [unit.id for unit in planned(mistral(), dims=more).units]
    assert ids == ["model.layers", "model.layers-full"]


@pytest.mark.parametrize("sizes", [["16:64"], ["16:30", "31:64"]])
def test_caches_above_a_window_leave_its_layers_the_places_of_the_window(
    sizes: list[str], planned: Callable[..., Plan]
) -> None:
    """They fill from the first place on, whatever the other layers hold."""
    asked = {"seq": (1, 40), "cache": (16, 64)}
    buckets = [f"cache={each}" for each in sizes if len(sizes) > 1]
    units = {unit.id: unit for unit in planned(gemma(), *buckets, dims=asked).units}
    held = units["model.layers.sliding"].bounds
    assert (held["cache"], held["filled"], held["seq"].high) == (Range(8, 64), Range(1, 64), 40)
    assert units["model.layers.sliding-full"].bounds["seq"].high == 40
    others = [str(unit.bounds["cache"]) for name, unit in units.items() if ".full" in name]
    assert others == sizes


def test_an_attention_that_ours_would_get_wrong_is_transformers_eager_one(
    planned: Callable[..., Plan],
) -> None:
    found = planned(softcapped())
    assert found.source.attention == "eager"
    assert found.units
    assert planned(llama()).source.attention == "sdpa"


def test_without_a_cache_a_mask_is_as_long_as_the_text(planned: Callable[..., Plan]) -> None:
    (unit,) = planned(llama(), task="forward").units
    assert unit.face.cache is None
    assert shapes(unit.face)["attention_mask"] == ("batch", 1, "seq", "seq")


def test_a_plan_is_a_function_of_what_was_asked(planned: Callable[..., Plan]) -> None:
    first, second = planned(gemma()), planned(gemma())
    assert first.units == second.units and first.dims == second.dims


# Eager, as the faces call it


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )


@pytest.mark.parametrize("make", [llama, mistral, gemma, gpt2])
def test_each_form_answers_as_the_model_s_own_block(
    make: Callable[[], Any], planned: Callable[..., Plan]
) -> None:
    """Prefill, steps, and several tokens at once, with padding, beyond the window."""
    config = make()
    found = planned(make())
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    forms: dict[str, dict[str, Form]] = {}
    for unit in found.units:
        assert unit.face.cache is not None
        for path in unit.modules:
            flat = FlatModule(model.get_submodule(path), unit.face)
            form = Form(unit.face.template, unit.face.inputs, unit.face.cache, flat)
            forms.setdefault(path, {})[unit.face.cache.kind] = form
    expected = logits(model)
    with serving(model, forms), use_attention(model, ATTENTION):
        answers = logits(model)
    for ours, theirs in zip(answers, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(form.calls for each in forms.values() for form in each.values())


def logits(model: Any) -> list[torch.Tensor]:
    """What a model answers step by step, over a static cache."""
    assert model.config._attn_implementation in {"sdpa", ATTENTION}
    cache = StaticCache(config=model.config, max_cache_len=24)
    heads = getattr(model.config, "num_key_value_heads", 4)
    cache.early_initialization(2, heads, 8, torch.float32, CPU)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (2, 16), generator=generator)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, :2] = 0
    answers, at = [], 0
    with torch.no_grad():
        for length in (5, 1, 2, 1, 3, 1):
            seen, at = at, at + length
            out = model(
                input_ids=ids[:, seen:at],
                attention_mask=mask[:, :at],
                position_ids=torch.arange(seen, at).expand(2, -1),
                past_key_values=cache,
                use_cache=True,
            )
            answers.append(out.logits)
    return answers


# Buckets


def test_each_bucket_is_a_graph_of_its_own_in_their_order(planned: Callable[..., Plan]) -> None:
    found = planned(llama(), "seq=1:1", "seq=2:128", dims={"cache": (16, 128)})
    assert [(u.id, u.order, u.bounds["seq"]) for u in found.units] == [
        ("model.layers-seq1", 0, Range(1, 1)),
        ("model.layers-seq2_128", 1, Range(2, 128)),
    ]
    assert {unit.modules for unit in found.units} == {found.units[0].modules}
    assert [unit.bounds["filled"] for unit in found.units] == [Range(1, 128), Range(2, 128)]
    assert {unit.bounds["cache"] for unit in found.units} == {Range(16, 128)}


def test_a_bucket_over_a_dim_that_a_form_has_not_says_nothing_about_it(
    planned: Callable[..., Plan],
) -> None:
    """A full window's cache has one size."""
    found = planned(mistral(), "cache=8:32", "cache=33:128", dims={"cache": (8, 128)})
    assert [unit.id for unit in found.units] == [
        "model.layers-cache8_32",
        "model.layers-cache33_128",
        "model.layers-full",
    ]


@pytest.mark.parametrize("asked", [(64, 64), (64, 64, 64)])
def test_a_cache_of_one_length_is_traced_as_one_of_several(
    asked: tuple[int, ...], planned: Callable[..., Plan]
) -> None:
    """Of a constant length torch would take what is filled to be less, always."""
    found = planned(llama(), dims={"seq": (1, 64), "cache": asked})
    assert found.dims["cache"] == Range(*asked)
    assert [unit.bounds["cache"] for unit in found.units] == [Range(63, 64)]


def test_a_cache_that_each_call_fills_has_its_one_length(planned: Callable[..., Plan]) -> None:
    found = planned(llama(), dims={"seq": (64, 64), "cache": (64, 64)})
    assert [unit.bounds["cache"] for unit in found.units] == [Range(64, 64)]


def test_a_window_between_the_steps_of_the_caches_is_a_length_too(
    planned: Callable[..., Plan],
) -> None:
    asked = {"seq": (1, 40), "cache": (16, 64, 16)}
    units = {unit.id: unit for unit in planned(mistral(), dims=asked).units}
    assert units["model.layers"].bounds["cache"] == Range(WINDOW, 64)


def test_prompts_longer_than_a_window_are_planned_beside_those_that_fill_it(
    planned: Callable[..., Plan],
) -> None:
    buckets = ("seq=1:8", "seq=9:16", "seq=17:40")
    asked = {"seq": (1, 40), "cache": (16, 64)}
    found = planned(mistral(), *buckets, dims=asked)
    assert [len(found.units), len({unit.id for unit in found.units})] == [6, 6]


def test_overlapping_buckets_are_taken_in_their_order(planned: Callable[..., Plan]) -> None:
    found = planned(llama(), "seq=1:8,batch=1:1", "seq=1:128")
    assert [unit.order for unit in found.units] == [0, 1]
    assert found.units[0].bounds["batch"] == Range(1, 1)
    assert found.units[1].bounds["batch"] == Range(1, 32)


def test_a_whole_model_has_buckets_too(planned: Callable[..., Plan]) -> None:
    found = planned(llama(), "seq=2:16", "seq=17:128", task="logits")
    assert [(unit.id, unit.modules) for unit in found.units] == [
        ("root-seq2_16", ("",)),
        ("root-seq17_128", ("",)),
    ]


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        (("seq=1:1", "seq=3:128"), "(?m)no bucket serves seq=2:2$"),
        (("seq=1:1",), "(?m)no bucket serves seq=2:128$"),
        (("seq=1:128,batch=1:4",), "(?m)no bucket serves batch=5:32,seq=1:128$"),
        (("depth=1:2",), "over 'depth'"),
    ],
)
def test_a_shape_that_no_bucket_serves_is_refused_by_name(
    buckets: tuple[str, ...], words: str, planned: Callable[..., Plan]
) -> None:
    with pytest.raises(BadDim, match=words) as caught:
        planned(llama(), *buckets)
    assert caught.value.hint


def test_a_dim_that_no_model_has_is_refused_with_those_it_has(
    planned: Callable[..., Plan],
) -> None:
    with pytest.raises(BadDim, match="'depth'") as caught:
        planned(llama(), dims={"depth": (1, 2)})
    assert all(name in caught.value.hint for name in ("batch", "seq", "cache"))


# Regions


def test_a_model_s_whole_is_one_region_where_that_is_asked(planned: Callable[..., Plan]) -> None:
    found = planned(llama(), task="logits")
    assert found.source.regions == "none"
    assert [(unit.id, unit.modules) for unit in found.units] == [("root", ("",))]


@pytest.mark.parametrize(
    "task",
    [
        "forward",
        "generate",
    ],
)
def test_one_place_is_planned_alone(task: str, planned: Callable[..., Plan]) -> None:
    found = planned(llama(), regions="model.layers.1", task=task)
    assert [unit.modules for unit in found.units] == [("model.layers.1",)]


def test_a_place_that_is_not_there_is_refused(planned: Callable[..., Plan]) -> None:
    with pytest.raises(BadRequest, match=r"no module 'model\.layer\.1'"):
        planned(llama(), regions="model.layer.1")


class Block(nn.Module):
    """Two layers, and whatever is done around them."""

    def __init__(self, around: Callable[[torch.Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.up, self.down, self.around = nn.Linear(4, 4), nn.Linear(4, 4), around

    def forward(self, x: torch.Tensor, extra: Any = None) -> Any:
        return self.around(self.down(self.up(x)))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module, extra: Any = None) -> None:
        super().__init__()
        self.layers, self.extra = nn.ModuleList(blocks), extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, block in enumerate(self.layers):
            x = block(x, self.extra[at]) if self.extra else block(x)
        return x


LOOKS = {"rows": (2, 3, 7), "seq": (9, 14, 23)}


def source_of(model: nn.Module) -> Source:
    """A plain module as a source."""
    inputs = (Input(name="x", dtype="float32", shape=("rows", "seq", 4), values="real"),)
    face = CallSignature({"args": [{"tensor": 0}], "kwargs": {}}, inputs)
    return Source(
        model=model,
        program=Program(config={}, code="a" * 64, task="forward"),
        regions="auto",
        dtype="float32",
        attention="native",
        face=face,
        default_dims={"rows": Range(1, 8), "seq": Range(1, 64)},
        looks=LOOKS,
    )


def test_a_module_of_no_repeated_blocks_is_compiled_whole() -> None:
    found = make_plan(source_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), CompileRequest(), CPU)
    assert [unit.id for unit in found.units] == ["root"]
    assert found.source.regions == "none"


def test_a_block_that_cannot_be_recorded_stays_eager_with_the_reason() -> None:
    model = Stack(Block(), Block(), extra=[None, {1, 2}])
    found = make_plan(source_of(model), CompileRequest(), CPU)
    assert [unit.modules for unit in found.units] == [("layers.0",)]
    assert found.left_out == ("layers.1: extra is a builtins.set",)


def test_where_no_block_can_be_compiled_the_reasons_are_told() -> None:
    model = Stack(Block(), Block(), extra=[{1}, {2}])
    with pytest.raises(CompileFailed, match=r"layers\.0: extra is a builtins\.set; layers\.1"):
        make_plan(source_of(model), CompileRequest(), CPU)


def test_a_model_that_calls_no_block_says_so() -> None:
    class Idle(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(CompileFailed, match="the model calls none of them") as caught:
        make_plan(source_of(Idle(Block(), Block())), CompileRequest(), CPU)
    assert "--regions none" in caught.value.hint


def test_a_length_that_follows_from_none_is_a_dim_with_the_sizes_that_were_seen() -> None:
    model = Stack(Block(lambda x: x[:, ::4]), Block())
    found = make_plan(source_of(model), CompileRequest(), CPU)
    bounds = {unit.id: unit.bounds for unit in found.units}
    (odd,) = [name for each in bounds.values() for name in each if name not in LOOKS]
    assert found.dims[odd] == Range(3, 6)
    wide = make_plan(source_of(model), CompileRequest(dims={odd: Range(1, 16)}), CPU)
    assert wide.dims[odd] == Range(1, 16)
