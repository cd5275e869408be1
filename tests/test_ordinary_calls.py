"""Ordinary calls: a model that is called as its users call it is answered by its graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, PLAIN, VISION, Architecture
from ordinary import CALLS, asking, given

from hubaoti.compiler.capture import thaw_arguments
from hubaoti.compiler.constants import ConstantsFile
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest, Range
from hubaoti.compiler.traced import draft_graph, make_trial
from hubaoti.compiler.verify import find_broken_budget
from hubaoti.errors import BadDim
from hubaoti.program.identity import matches_program
from hubaoti.runtime.call_template import CallPlan, is_own_call
from hubaoti.runtime.fallback import CannotServe

CPU = torch.device("cpu")
CASES = {
    **{name: ARCHITECTURES[name] for name in ("bert", "modernbert", "distilbert", "t5", "whisper")},
    **{name: ARCHITECTURES[name] for name in ("vit", "dinov2", "siglip", "clip", "llama", "gpt2")},
    "clip_text": Architecture("CLIPText", PLAIN),
    "clip_vision": Architecture("CLIPVision", VISION),
    "siglip_vision": Architecture("SiglipVision", VISION),
    "albert": Architecture("Albert", {**PLAIN, "embedding_size": 32}),
    "mpnet": Architecture("MPNet", PLAIN),
    "squeezebert": Architecture("SqueezeBert", {**PLAIN, "embedding_size": 64}),
    "convbert": Architecture("ConvBert", {**PLAIN, "embedding_size": 64, "head_ratio": 2}),
    "eurobert": Architecture("EuroBert", {**PLAIN, "pad_token_id": 0, "mask_token_id": 1}),
}


def made(config: Any, auto: Any = transformers.AutoModel) -> Any:
    """A model whose attention does not look everywhere alike, as that of a new one does."""
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


WORDS: tuple[dict[str, Any], ...] = (
    {},
    {"return_dict": True, "output_attentions": False, "output_hidden_states": False},
    {"use_cache": False},
)


@pytest.mark.parametrize("name", CASES)
def test_what_a_tokenizer_or_a_processor_gives_is_answered_by_graphs(
    name: str, tmp_path: Path
) -> None:
    """With words that say nothing, too; a decoder is told to use no cache."""
    architecture = CASES[name]
    architecture.config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward", regions=architecture.regions)
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    model = made(architecture.config)
    own = {"use_cache": False} if architecture.generates else {}
    with torch.no_grad(), asking(model, found) as counts:
        for more in WORDS:
            for call in CALLS:
                model(**given(model.config, *call), **more | own)
    assert counts and counts == {"served": counts.total()}


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "albert", "vit"])
def test_a_whole_model_is_called_as_its_users_call_it(name: str, tmp_path: Path) -> None:
    """Without positions, which no tokenizer gives; of its own ones it is not deprived."""
    config = CASES[name].config
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward", regions="none")
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    model = made(config)
    assert matches_program(model, found.source.program, whole=True)
    with torch.no_grad(), asking(model, found) as counts:
        for more in ({}, {"output_attentions": False}, {"use_cache": False}):
            for call in CALLS:
                model(**given(model.config, *call), **more)
        served = counts.total()
        assert counts == {"served": served} and served == 3 * len(CALLS)
        if "input_ids" in (words := given(model.config, 1, 9, None)) and name == "bert":
            model(**words, position_ids=torch.arange(9).flip(0)[None])
            assert counts["served"] == served


def test_a_whole_decoder_answers_no_cache_to_who_wants_one(tmp_path: Path) -> None:
    config = CASES["llama"].config
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward", regions="none")
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    model = made(config)
    with torch.no_grad(), asking(model, found) as counts:
        words = given(model.config, 2, 9, 1)
        model(**words, use_cache=False)
        assert counts == {"served": 1}
        assert model(**words).past_key_values is not None
        assert counts["served"] == 1


DECODERS = {
    **{name: ARCHITECTURES[name] for name in ("llama", "gpt2", "qwen3_moe", "deepseek_v3")},
    "gpt_neo": Architecture(
        "GPTNeo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "window_size": 64,
        },
    ),
    "mpt": Architecture(
        "Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 128}
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_whatever_generates_over_a_static_cache_is_answered_by_graphs(
    name: str, tmp_path: Path
) -> None:
    """However its layers call their own number."""
    config = DECODERS[name].config
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="generate", dims={"cache": Range(8, 63)})
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    model = made(config, transformers.AutoModelForCausalLM)
    with torch.no_grad(), asking(model, found) as counts:
        for batch, seq in ((1, 5), (3, 11), (2, 26)):
            words = given(model.config, batch, seq, None) | {"use_cache": True}
            model.generate(
                **words, max_new_tokens=4, do_sample=False, cache_implementation="static"
            )
    assert counts and counts == {"served": counts.total()}


STAGES = {
    "swin": Architecture(
        "Swin",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "segformer": Architecture(
        "Segformer",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 32, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_with_heads_of_their_own_are_weighed_by_the_most(name: str, tmp_path: Path) -> None:
    STAGES[name].config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward")
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    for unit in found.units:
        module = found.source.model.get_submodule(unit.region)
        place = ConstantsFile(found.source.model, unit.region, module, "")
        trial = make_trial(found.source, unit, draft_graph(unit), place)
        assert trial.heads == 4
        assert find_broken_budget(dict.fromkeys(unit.bounds, 8), trial, 0.0, 1.0) is None


MAPS = {
    name: Architecture(name, {"image_size": 64, "hidden_sizes": [8, 16], "depths": [2, 2], **more})
    for name, more in (("ConvNextV2", {"num_stages": 2}), ("ConvNext", {"num_stages": 2}))
}


@pytest.mark.parametrize("name", MAPS)
def test_a_network_of_maps_takes_images_of_any_size(name: str, tmp_path: Path) -> None:
    config = MAPS[name].config
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward")
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    model = made(config)
    with torch.no_grad(), asking(model, found) as counts:
        for rows, height, width in ((1, 64, 64), (3, 96, 64), (2, 65, 127), (1, 128, 128)):
            model(torch.randn(rows, 3, height, width))
        served = counts.total()
        assert counts and counts == {"served": served}
        model(torch.randn(1, 3, 160, 64))
    assert counts.total() > served == counts["served"], "twice the size of its config is the most"


def test_the_sizes_of_images_are_dims_with_the_bounds_that_are_asked_for(tmp_path: Path) -> None:
    MAPS["ConvNextV2"].config.save_pretrained(tmp_path)
    asked = {"height": Range(32, 256), "width": Range(48, 64)}
    request = CompileRequest(task="forward", dims=asked)
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    assert found.dims.items() > asked.items()
    first = found.units[0]
    assert [*first.bounds.values()][1:] == [Range(8, 64), Range(12, 16)]
    assert first.face.inputs[0].shape[:2] == ("batch", 8)


COUNTING = {
    "vit": ARCHITECTURES["vit"],
    "dinov2": ARCHITECTURES["dinov2"],
    "mobilenet": Architecture("MobileNetV2", {"image_size": 32}),
}


@pytest.mark.parametrize("name", COUNTING)
def test_what_counts_patches_or_pixels_keeps_the_size_of_its_config(
    name: str, tmp_path: Path
) -> None:
    COUNTING[name].config.save_pretrained(tmp_path)
    request = CompileRequest(task="forward")
    found = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    assert [*found.dims] == ["batch"]
    if name != "mobilenet":  # of which the line that counts is named when it is exported
        asked = CompileRequest(task="forward", dims={"height": Range(32, 64)})
        with pytest.raises(BadDim, match="no dim 'height'"):
            make_plan(load_source(tmp_path, asked, CPU), asked, CPU)


# Templates


def test_a_flag_that_the_graph_does_not_know_may_be_off_but_for_the_one_that_masks() -> None:
    def forward(x: torch.Tensor, **flags: bool) -> torch.Tensor:
        return x

    template = {"args": [{"tensor": 0}], "kwargs": {"free": {"any": True}}}
    found, x = CallPlan(template, 1, forward), torch.ones(1)
    for flags in ({}, {"use_cache": False}, {"free": False}, {"free": True, "use_cache": None}):
        assert found.flatten([x], flags)[0] is x
    for flags in ({"use_cache": True}, {"is_causal": False}):
        with pytest.raises(CannotServe, match="the graph has nothing"):
            found.flatten([x], flags)


def test_a_flag_that_may_be_anything_is_the_one_of_the_call_that_was_compiled() -> None:
    template = {"args": [{"tensor": 0}], "kwargs": {"free": {"any": True}}}
    x = torch.ones(1)
    assert thaw_arguments(template, [x], {}) == ([x], {"free": True})
    assert is_own_call(template), "no tensor is missing"
