"""Source: a model from its config alone, for the task that its files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.request import CompileRequest, Range
from hubaoti.compiler.tasks import infer_task
from hubaoti.errors import (
    LINE,
    BadRequest,
    CompileFailed,
    MissingConstant,
    ModelNotFound,
    UnknownTask,
    first_line,
)
from hubaoti.program.model_files import POOLING, parse_pooling_modes, read_sentence_steps
from hubaoti.program.pooling import pool

CPU = torch.device("cpu")
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 40,
}


def model_of(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """A model's folder, of a config and other JSON files, without any weight."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["right", "left"])
def hidden_and_mask(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Token vectors of three texts of 5, 3 and 1 tokens, padded on a side."""
    hidden = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return hidden, mask.flip(1) if request.param == "left" else mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", POOLING)
def test_pooling_is_that_of_sentence_transformers(
    mode: str, dtype: torch.dtype, hidden_and_mask: tuple[torch.Tensor, torch.Tensor]
) -> None:
    hidden, mask = hidden_and_mask
    hidden = hidden.to(dtype)
    theirs = Pooling(8, mode)({"token_embeddings": hidden, "attention_mask": mask})  # type: ignore[arg-type]
    ours = pool(mode, hidden, mask)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs["sentence_embedding"])


def test_a_model_embeds_as_sentence_transformers_do(minilm: Path) -> None:
    texts = ["A cat sits on the sill.", "Interest rates were raised again by the bank."]
    theirs = SentenceTransformer(str(minilm), device="cpu")
    tokens = theirs.tokenizer(texts, padding=True, return_tensors="pt")
    ours = load_source(minilm, CompileRequest(), CPU, weights=True)
    with torch.no_grad():
        (found,) = ours.model(tokens["input_ids"], tokens["attention_mask"])
    expected = theirs.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({}, ["mean"]),
        ({"pooling_mode_mean_tokens": True}, ["mean"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ["cls", "mean"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weightedmean"]),
        ({"pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len_tokens"]),
        ({"pooling_mode": "max"}, ["max"]),
        ({"pooling_mode": ["max", "mean"]}, ["max", "mean"]),
    ],
)
def test_pooling_configs_old_and_new_are_read(config: dict[str, Any], modes: list[str]) -> None:
    assert parse_pooling_modes(config) == modes


@pytest.mark.parametrize("named", ["attention", ["mean", "attention"], []])
def test_an_unknown_pooling_is_refused(named: object) -> None:
    with pytest.raises(UnknownTask) as caught:
        parse_pooling_modes({"pooling_mode": named})
    assert "mean" in caught.value.hint


def modules(*kinds: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]


def test_the_steps_after_the_encoder_are_those_of_the_listing(tmp_path: Path) -> None:
    listing = modules("Transformer", "Pooling", "Normalize")
    folder = model_of(tmp_path / "m", BERT, modules=listing)
    assert read_sentence_steps(folder) == ("mean", "normalize")
    model_of(folder / "Pooling", {"pooling_mode": ["cls", "max"]})
    assert read_sentence_steps(folder) == ("cls", "max", "normalize")
    loaded = load_source(folder, CompileRequest(), CPU)
    assert loaded.program.steps == ("cls", "max", "normalize")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.normal_()
        (found,) = loaded.model(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3).long())
    assert found.shape == (2, 16)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("kinds", [("Transformer",), ("Transformer", "Pooling", "Dense")])
def test_an_end_that_a_graph_cannot_hold_is_refused(kinds: tuple[str, ...], tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", BERT, modules=modules(*kinds))
    with pytest.raises(UnknownTask) as caught:
        load_source(folder, CompileRequest(task="embed"), CPU)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embed"),
        ("BertForSequenceClassification", "classify"),
        ("BertForMaskedLM", "logits"),
        ("LlamaForCausalLM", "logits"),
        ("GPT2LMHeadModel", "logits"),
    ],
)
def test_the_task_is_what_the_config_says(architecture: str, task: str, tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", BERT)
    config = type("Config", (), {"architectures": [architecture]})
    assert infer_task(folder, config) == task
    (folder / "modules.json").write_text("[]")
    assert infer_task(folder, config) == "embed"


@pytest.mark.parametrize("architectures", [[], ["BertForTokenClassification"]])
def test_a_model_that_does_not_say_its_task_has_to_be_told(
    architectures: list[str], tmp_path: Path
) -> None:
    folder = model_of(tmp_path / "m", BERT | {"architectures": architectures})
    with pytest.raises(UnknownTask, match="does not say") as caught:
        load_source(folder, CompileRequest(), CPU)
    assert "--task" in caught.value.hint
    assert load_source(folder, CompileRequest(task="embed"), CPU).program.task == "embed"


def test_a_masked_language_model_keeps_its_own_head(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", BERT | {"architectures": ["BertForMaskedLM"]})
    loaded = load_source(folder, CompileRequest(), CPU)
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    assert loaded.outputs == ("logits",)


VIT = {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 8}


HALVES: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize("task", ["forward", "embed"])
def test_an_encoder_that_stands_for_itself_wants_no_decoder_s_tokens(
    task: str, tmp_path: Path
) -> None:
    encoder = transformers.T5EncoderModel(transformers.T5Config(**HALVES, vocab_size=100)).eval()
    encoder.save_pretrained(tmp_path)
    found = load_source(tmp_path, CompileRequest(task=task, regions="none"), CPU, weights=True)
    assert type(found.model) is transformers.T5EncoderModel
    assert [entry.name for entry in found.face.inputs] == ["input_ids", "attention_mask"]
    words = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2).long()}
    with torch.no_grad():
        answer = found.model(**words)
        hidden = encoder(**words).last_hidden_state
    assert torch.equal(answer[0], hidden if task == "forward" else hidden.mean(1))


CLIP_TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.mark.parametrize("weights", [True, False])
def test_forward_is_that_of_the_class_which_the_files_name(tmp_path: Path, weights: bool) -> None:
    config = transformers.CLIPTextConfig(
        **CLIP_TEXT, num_attention_heads=2, vocab_size=100, projection_dim=8, eos_token_id=9
    )
    named = transformers.CLIPTextModelWithProjection(config).eval()
    named.save_pretrained(tmp_path)
    request = CompileRequest(task="forward", regions="none" if weights else None)
    found = load_source(tmp_path, request, CPU, weights=weights)
    assert type(found.model) is transformers.CLIPTextModelWithProjection
    assert found.attention == "sdpa"
    assert dict(found.model.named_parameters()).keys() == dict(named.named_parameters()).keys()
    if weights:
        words = {"input_ids": torch.tensor([[3, 4, 9]]), "attention_mask": torch.ones(1, 3).long()}
        with torch.no_grad():
            assert torch.equal(found.model(**words)[0], named(**words)[0])


@pytest.mark.parametrize("names", [None, [], ["NoModel"], ["BertModel"], ["AutoModel"]])
def test_forward_without_a_class_of_its_own_is_the_plain_model_s(
    names: Any, tmp_path: Path
) -> None:
    config = transformers.CLIPTextConfig(
        **CLIP_TEXT, num_attention_heads=2, vocab_size=100, architectures=names
    )
    config.save_pretrained(tmp_path)
    model = load_source(tmp_path, CompileRequest(task="forward"), CPU).model
    assert type(model) is transformers.CLIPTextModel


def test_a_model_with_both_halves_keeps_them(tmp_path: Path) -> None:
    transformers.T5Model(transformers.T5Config(**HALVES, vocab_size=100)).save_pretrained(tmp_path)
    found = load_source(tmp_path, CompileRequest(task="forward", regions="none"), CPU, weights=True)
    assert type(found.model) is transformers.T5Model
    assert "decoder_input_ids" in [entry.name for entry in found.face.inputs]


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownTask, match="takes no text"):
        load_source(model_of(tmp_path / "m", VIT), CompileRequest(task="embed"), CPU)


def test_a_model_without_the_head_of_a_task_is_refused(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", BERT | {"model_type": "clip_text_model"})
    with pytest.raises(UnknownTask, match="cannot do logits") as caught:
        load_source(folder, CompileRequest(task="logits"), CPU)
    assert len(str(caught.value)) < LINE + 100
    assert "--task" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "architecture", "words", "hint"),
    [
        (
            lambda: transformers.T5Config(**HALVES, vocab_size=100),
            "T5ForConditionalGeneration",
            "keeps what it saw of its encoder in a cache of its own",
            "--task forward",
        ),
        (
            lambda: transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1),
            "WhisperForConditionalGeneration",
            "keeps what it saw of its encoder in a cache of its own",
            "--task forward",
        ),
        (
            lambda: transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50),
            "MambaForCausalLM",
            "keeps recurrent states between tokens, and no KV cache",
            "as it is",
        ),
    ],
)
def test_what_keeps_more_or_other_than_a_kv_cache_is_not_compiled_to_generate(
    config: Callable[[], Any], architecture: str, words: str, hint: str, tmp_path: Path
) -> None:
    made = config()
    made.architectures = [architecture]
    made.save_pretrained(tmp_path)
    with pytest.raises(UnknownTask, match=words) as caught:
        load_source(tmp_path, CompileRequest(task="generate"), CPU)
    assert hint in caught.value.hint
    assert "Seen" not in str(caught.value)


def test_a_decoder_that_was_made_to_stand_alone_generates(tmp_path: Path) -> None:
    config = transformers.BartConfig(
        vocab_size=50, d_model=16, decoder_layers=1, decoder_attention_heads=2, encoder_layers=1
    )
    config.architectures = ["BartForCausalLM"]
    config.save_pretrained(tmp_path)
    loaded = load_source(tmp_path, CompileRequest(task="generate"), CPU)
    assert type(loaded.model) is transformers.BartForCausalLM


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no config.json") as caught:
        load_source(tmp_path, CompileRequest(), CPU)
    assert caught.value.hint


@pytest.fixture
def own_code(tmp_path: Path) -> tuple[Path, Path]:
    """A model that brings its own code, and the file that the code would write."""
    ran = tmp_path / "ran"
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    folder = model_of(tmp_path / "m", config)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    return folder, ran


def test_code_that_a_model_brings_is_not_run_before_it_is_trusted(
    own_code: tuple[Path, Path],
) -> None:
    folder, ran = own_code
    with pytest.raises(BadRequest, match="brings its own code") as caught:
        load_source(folder, CompileRequest(task="embed"), CPU)
    assert "--trust-remote-code" in caught.value.hint
    assert not ran.exists()


def test_of_classes_that_transformers_has_by_now_it_takes_its_own(tmp_path: Path) -> None:
    """As of Phi 3, whose repos still bring what was new once; what is another class is refused."""
    config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=32)
    config.architectures = ["LlamaForCausalLM"]
    config.auto_map = {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "acme/other--modeling_llama.LlamaForCausalLM",
        "AutoTokenizer": ["tokenization.OwnTokenizer", None],
    }
    config.save_pretrained(tmp_path)
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    found = load_source(tmp_path, CompileRequest(task="logits"), CPU)
    assert type(found.model) is transformers.LlamaForCausalLM
    config.auto_map["AutoModelForCausalLM"] = "modeling_llama.LlamaWithMoreForCausalLM"
    config.save_pretrained(tmp_path)
    with pytest.raises(BadRequest, match="its own code"):
        load_source(tmp_path, CompileRequest(task="logits"), CPU)


def test_code_that_is_trusted_is_run(own_code: tuple[Path, Path]) -> None:
    folder, ran = own_code
    with pytest.raises(ModelNotFound, match="has no attribute 'Own'"):  # it defines nothing
        load_source(folder, CompileRequest(task="embed", trust_remote_code=True), CPU)
    assert ran.exists()


@pytest.mark.parametrize(
    ("limit", "positions", "longest"),
    [(None, 40, 40), (16, 40, 16), (10**30, 40, 40), (10**30, 4000, 512), ("many", 40, 40)],
)
def test_seq_ends_where_the_model_or_its_tokenizer_ends(
    limit: object, positions: int, longest: int, tmp_path: Path
) -> None:
    config = BERT | {"max_position_embeddings": positions}
    folder = model_of(tmp_path / "m", config, tokenizer_config={"model_max_length": limit})
    assert load_source(folder, CompileRequest(), CPU).default_dims["seq"] == Range(2, longest)


def test_the_positions_of_a_roberta_begin_after_its_padding(tiny_roberta: Path) -> None:
    assert load_source(tiny_roberta, CompileRequest(), CPU).positions == 64


def test_a_model_of_rotary_positions_has_no_table_of_them(tiny_llama: Path) -> None:
    loaded = load_source(tiny_llama, CompileRequest(), CPU)
    assert loaded.positions is None
    assert loaded.default_dims["seq"].high == 64


def test_the_dtype_is_the_config_s_unless_another_is_asked(tiny_llama: Path) -> None:
    for asked, dtype in ((None, torch.bfloat16), ("float32", torch.float32)):
        model = load_source(tiny_llama, CompileRequest(dtype=asked), CPU).model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_dtype_that_is_not_compiled_has_to_be_replaced(tmp_path: Path) -> None:
    folder = model_of(tmp_path / "m", BERT | {"dtype": "float64"})
    with pytest.raises(BadRequest, match="float64") as caught:
        load_source(folder, CompileRequest(), CPU)
    assert "--dtype" in caught.value.hint
    assert load_source(folder, CompileRequest(dtype="float32"), CPU).dtype == "float32"


def test_a_checkpoint_that_was_quantized_before_is_refused_by_the_method_s_name(
    tmp_path: Path,
) -> None:
    quantized = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    with pytest.raises(CompileFailed, match="m is quantized with awq") as caught:
        load_source(model_of(tmp_path / "m", BERT | quantized), CompileRequest(), CPU)
    assert "--quantize" in caught.value.hint


def test_no_weight_file_is_opened(minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = load_source(folder, CompileRequest(), CPU)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(b"neither a tensor nor a pickle")
    assert load_source(folder, CompileRequest(), CPU).program == whole.program


def test_weights_that_are_tied_are_one_tensor_though_none_is_made(tiny_llama: Path) -> None:
    model: Any = load_source(tiny_llama, CompileRequest(), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("asked", "regions", "bare"),
    [
        (CompileRequest(), "none", False),
        (CompileRequest(task="generate"), "auto", True),
        (CompileRequest(task="forward"), "auto", True),
        (CompileRequest(regions="model.layers.0"), "model.layers.0", True),
        (CompileRequest(task="generate", regions="none"), "none", False),
    ],
)
def test_a_model_that_is_compiled_by_regions_has_no_memory(
    asked: CompileRequest, regions: str, bare: bool, tiny_llama: Path
) -> None:
    loaded = load_source(tiny_llama, asked, CPU)
    assert loaded.regions == regions
    assert {parameter.is_meta for parameter in loaded.model.parameters()} == {bare}
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


def test_a_model_s_buffers_are_those_of_one_that_has_its_weights(tiny_llama: Path) -> None:
    bare = load_source(tiny_llama, CompileRequest(task="generate"), CPU).model
    whole = load_source(tiny_llama, CompileRequest(), CPU, weights=True).model
    expected = dict(whole.named_buffers())
    found = dict(bare.named_buffers())
    assert found.keys() == expected.keys() and found
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_model_without_memory_keeps_its_tied_weights(tiny_llama: Path) -> None:
    model: Any = load_source(tiny_llama, CompileRequest(task="generate"), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_decoder_takes_what_is_filled_as_its_mask_s_length(tiny_llama: Path) -> None:
    loaded = load_source(tiny_llama, CompileRequest(task="generate"), CPU)
    shapes = {entry.name: entry.shape for entry in loaded.face.inputs}
    assert shapes == {
        "input_ids": ("batch", "seq"),
        "attention_mask": ("batch", "filled"),
        "position_ids": ("batch", "seq"),
    }
    assert loaded.face.template["kwargs"]["past_key_values"] == {"cache": True}
    assert loaded.default_dims == {
        "batch": Range(1, 32),
        "seq": Range(1, 64),
        "cache": Range(16, 64),
    }


T5 = {
    "model_type": "t5",
    "architectures": ["T5Model"],
    "vocab_size": 100,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 2,
    "num_heads": 2,
}


def test_an_encoder_and_decoder_takes_the_target_s_tokens_too(tmp_path: Path) -> None:
    loaded = load_source(model_of(tmp_path / "m", T5), CompileRequest(task="forward"), CPU)
    shapes = {entry.name: entry.shape for entry in loaded.face.inputs}
    assert shapes["decoder_input_ids"] == ("batch", "target")
    assert loaded.default_dims.keys() == {"batch", "seq", "target"}


def test_a_model_of_images_takes_them_at_its_config_s_size(tmp_path: Path) -> None:
    config = VIT | {"image_size": 8, "patch_size": 4, "num_attention_heads": 2}
    config |= {"num_hidden_layers": 2, "intermediate_size": 8, "num_channels": 1}
    loaded = load_source(model_of(tmp_path / "m", config), CompileRequest(task="forward"), CPU)
    assert [(e.name, e.shape) for e in loaded.face.inputs] == [("pixel_values", ("batch", 1, 8, 8))]
    assert loaded.default_dims == {"batch": Range(1, 32)}


def test_eager_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingConstant, match="weights") as caught:
        load_source(model_of(tmp_path / "m", BERT), CompileRequest(), CPU, weights=True)
    assert "--model" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "line"), [("\n  a\nb", "a"), ("", "ValueError"), ("x" * 999, "x" * 299 + "…")]
)
def test_of_a_foreign_error_one_short_line_is_told(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


def test_a_model_of_which_a_part_would_be_random_is_refused(minilm: Path) -> None:
    """An encoder's checkpoint has no head that goes on with texts."""
    request = CompileRequest(task="generate")
    with pytest.raises(MissingConstant, match="they would be random") as caught:
        load_source(minilm, request, torch.device("cpu"), weights=True)
    assert "cls.predictions" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(("lost", "is_refused"), [("pooler.", False), ("encoder.layer.0.", True)])
def test_only_a_pooler_may_be_random_where_vectors_are_made(
    lost: str, is_refused: bool, minilm: Path, tmp_path: Path
) -> None:
    for file in minilm.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    weights = load_file(minilm / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in f"{name}."}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    refused = pytest.raises(MissingConstant, match=lost) if is_refused else nullcontext()
    with refused:
        load_source(tmp_path, CompileRequest(task="embed"), CPU, weights=True)
