"""Program: one for all fine-tunes of a model, another for everything that computes otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.schema import Program
from hubaoti.program.identity import Normal, identify_module_program, identify_program
from hubaoti.program.model_code import collect_code

TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SPOKEN = {
    "vocab_size": 100,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "decoder_start_token_id": 6,
}
SPARSE = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
SEEN = {"image_size": 32, "patch_size": 16}
SMALL = {key: TINY[key] for key in TINY if key not in {"vocab_size", "max_position_embeddings"}}
CLIP = {
    "text_config": TINY,
    "vision_config": SMALL | SEEN,
    "projection_dim": 16,
}
GEMMA3 = {
    "text_config": GROUPED | {"sliding_window": 8},
    "vision_config": SMALL | SEEN,
    "mm_tokens_per_image": 4,
    "image_token_id": 90,
}
# A kind's config and model, what they are made with, and the task.
KINDS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "logits"),
    "llama-score": ("LlamaConfig", "LlamaForSequenceClassification", GROUPED, "classify"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, "generate"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED, "generate"),
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", GROUPED | EXPERTS, "generate"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED, "generate"),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", GEMMA3, "generate"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GROUPED, "logits"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED, "generate"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", TINY, "logits"),
    "gpt2-score": ("GPT2Config", "GPT2ForSequenceClassification", TINY, "classify"),
    "bloom": ("BloomConfig", "BloomModel", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, "embed"),
    "bert": ("BertConfig", "BertModel", TINY, "embed"),
    "bert-score": ("BertConfig", "BertForSequenceClassification", TINY, "classify"),
    "roberta": ("RobertaConfig", "RobertaModel", TINY, "embed"),
    "esm": ("EsmConfig", "EsmModel", TINY | {"pad_token_id": 1, "mask_token_id": 2}, "embed"),
    "nllb": ("NllbMoeConfig", "NllbMoeModel", SPOKEN | SPARSE, "embed"),
    "whisper": ("WhisperConfig", "WhisperModel", SPOKEN, "embed"),
    "vit": ("ViTConfig", "ViTModel", SMALL | SEEN, "embed"),
    "vit-score": ("ViTConfig", "ViTForImageClassification", SMALL | SEEN, "classify"),
    "clip": ("CLIPConfig", "CLIPModel", CLIP, "embed"),
}
NESTED_NAMES = {"_name_or_path": "acme/tower", "architectures": ["Tower"]}
GENERATING = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.05}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config's arguments with others, those of nested configs within them."""
    nested = {k: base[k] | v for k, v in changes.items() if isinstance(base.get(k), dict)}
    return base | changes | nested


def program(kind: str, **changes: Any) -> Program:
    make, head, base, task = KINDS[kind]
    config = getattr(transformers, make)(**merged(base, changes))
    with torch.device("meta"):
        return identify_program(getattr(transformers, head)(config), config, task, ())


@cache
def plain(kind: str) -> Program:
    return program(kind)


SAME = [
    ("llama", {"name_or_path": "acme/fine-tune"}),
    ("llama", {"architectures": ["LlamaModel"]}),
    ("llama", {"transformers_version": "4.31.0"}),
    ("llama", {"dtype": "float16"}),
    ("llama", {"torch_dtype": "bfloat16"}),
    ("llama", {"bos_token_id": 5, "eos_token_id": [6, 7, 8]}),
    ("llama", {"pad_token_id": 3}),
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"use_cache": False}),
    ("llama", {"initializer_range": 0.5}),
    ("llama", {"pretraining_tp": 4}),
    ("llama", {"tokenizer_class": "LlamaTokenizerFast"}),
    ("llama", {"auto_map": {"AutoModel": "modeling_llama.LlamaModel"}}),
    ("llama", {"id2label": {0: "spam", 1: "ham", 2: "eggs"}}),
    ("llama", {"gradient_checkpointing": True}),
    ("llama", {"output_hidden_states": True, "return_dict": False}),
    ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.1"}),
    ("llama", {"note": {"author": "acme", "steps": 1000}}),
    ("llama", {"rope_theta": 10000}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
    ("llama", GENERATING),
    ("llama", {"max_length": 4096, "min_length": 3, "num_beams": 4}),
    ("llama-score", {"id2label": {0: "spam", 1: "ham"}, "label2id": {"spam": 0, "ham": 1}}),
    ("llama-score", {"problem_type": "multi_label_classification"}),
    ("qwen2", {"attention_dropout": 0.2, "bos_token_id": 1, "eos_token_id": 2}),
    ("qwen2", GENERATING),
    ("qwen2", {"use_mrope": False}),
    ("qwen3", {"eos_token_id": [4, 5], "pad_token_id": 6}),
    ("qwen3moe", {"router_aux_loss_coef": 0.5}),
    ("qwen3moe", {"output_router_logits": True}),
    ("gemma3", {"text_config": NESTED_NAMES, "vision_config": NESTED_NAMES}),
    ("gemma3", {"text_config": {"eos_token_id": [1, 106], "attention_dropout": 0.3}}),
    ("gemma3", {"text_config": {"dtype": "bfloat16", "use_cache": False}}),
    ("gemma3", {"vision_config": {"attention_dropout": 0.3, "id2label": {0: "a"}}}),
    ("mixtral", {"router_aux_loss_coef": 0.02, "output_router_logits": True}),
    ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.3}),
    ("gpt2", {"summary_type": "mean", "summary_first_dropout": 0.3, "summary_use_proj": False}),
    ("gpt2", {"task_specific_params": {"text-generation": {"do_sample": True}}}),
    ("gpt2", {"pad_token_id": 2, "prefix": "Once upon"}),
    ("gpt2-score", {"name_or_path": "acme/fine-tune", "finetuning_task": "mnli"}),
    ("bert", {"pad_token_id": 7, "hidden_dropout_prob": 0.5}),
    ("bert", {"classifier_dropout": 0.3, "problem_type": "regression"}),
    ("bert", {"num_labels": 5}),
    ("bert", {"position_embedding_type_note": "absolute"}),
    ("bert-score", {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}),
    ("bert-score", {"architectures": ["BertForMaskedLM"]}),
    ("roberta", {"bos_token_id": 3, "eos_token_id": 4}),
    ("whisper", {"encoder_layerdrop": 0.1, "dropout": 0.2, "activation_dropout": 0.3}),
    ("whisper", {"suppress_tokens": [1, 2], "begin_suppress_tokens": [3]}),
    ("whisper", {"median_filter_width": 9, "init_std": 0.3}),
    ("whisper", {"forced_decoder_ids": [[1, 50259]], "eos_token_id": 8}),
    ("vit", {"hidden_dropout_prob": 0.2, "num_labels": 1000}),
    ("vit-score", {"id2label": {0: "cat", 1: "dog"}}),
    ("clip", {"text_config": NESTED_NAMES, "vision_config": NESTED_NAMES}),
    ("clip", {"text_config": {"bos_token_id": 1, "attention_dropout": 0.1}}),
    ("clip", {"vision_config": {"initializer_range": 0.1, "initializer_factor": 2.0}}),
]
OTHER = [
    ("llama", {"hidden_size": 32}),
    ("llama", {"intermediate_size": 32}),
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"num_attention_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"head_dim": 4}),
    ("llama", {"vocab_size": 101}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rms_norm_eps": 1e-5}),
    ("llama", {"rope_theta": 5e5}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"max_position_embeddings": 64}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}),
    ("llama-score", {"pad_token_id": 3}),
    ("llama-score", {"num_labels": 3}),
    ("llama-score", {"id2label": {0: "a", 1: "b", 2: "c"}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}),
    ("qwen3", {"rms_norm_eps": 1e-5}),
    ("qwen3moe", {"norm_topk_prob": True}),
    ("qwen3moe", {"num_experts_per_tok": 1}),
    ("qwen3moe", {"decoder_sparse_step": 2}),
    ("qwen3moe", {"mlp_only_layers": [0]}),
    ("gemma2", {"final_logit_softcapping": 10.0}),
    ("gemma2", {"attn_logit_softcapping": 10.0}),
    ("gemma2", {"query_pre_attn_scalar": 64}),
    ("gemma3", {"text_config": {"sliding_window": 16}}),
    ("gemma3", {"text_config": {"layer_types": ["sliding_attention", "full_attention"]}}),
    ("gemma3", {"text_config": {"rope_local_base_freq": 20000.0}}),
    ("gemma3", {"text_config": {"use_bidirectional_attention": True}}),
    ("gemma3", {"vision_config": {"patch_size": 8}}),
    ("gemma3", {"image_token_id": 91}),
    ("granite", {"embedding_multiplier": 2.0}),
    ("granite", {"logits_scaling": 2.0}),
    ("granite", {"residual_multiplier": 2.0}),
    ("granite", {"attention_multiplier": 2.0}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"num_local_experts": 4}),
    ("mixtral", {"sliding_window": 16}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"layer_norm_epsilon": 1e-3}),
    ("gpt2-score", {"pad_token_id": 2}),
    ("bloom", {"pretraining_tp": 2}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"layer_norm_eps": 1e-5}),
    ("bert", {"type_vocab_size": 3}),
    ("bert", {"is_decoder": True}),
    ("bert-score", {"num_labels": 5}),
    ("roberta", {"pad_token_id": 2}),
    ("esm", {"token_dropout": True}),
    ("esm", {"mask_token_id": 3}),
    ("nllb", {"moe_token_dropout": 0.1}),
    ("nllb", {"normalize_router_prob_before_dropping": True}),
    ("whisper", {"encoder_layers": 2}),
    ("whisper", {"activation_function": "relu"}),
    ("whisper", {"scale_embedding": True}),
    ("whisper", {"num_mel_bins": 40}),
    ("vit", {"image_size": 64}),
    ("vit", {"patch_size": 8}),
    ("vit", {"qkv_bias": False}),
    ("vit-score", {"num_labels": 3}),
    ("clip", {"text_config": {"hidden_act": "gelu"}}),
    ("clip", {"text_config": {"eos_token_id": 9}}),
    ("clip", {"vision_config": {"layer_norm_eps": 1e-3}}),
    ("clip", {"projection_dim": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), SAME, ids=str)
def test_a_fine_tune_has_the_program_of_its_base(kind: str, changes: dict[str, Any]) -> None:
    assert program(kind, **changes).digest == plain(kind).digest


@pytest.mark.parametrize(("kind", "changes"), OTHER, ids=str)
def test_what_computes_otherwise_has_another_program(kind: str, changes: dict[str, Any]) -> None:
    assert program(kind, **changes).digest != plain(kind).digest


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixtral", "gpt2", "roberta", "clip"])
def test_a_key_that_is_absent_is_the_same_as_its_default(kind: str, tmp_path: Path) -> None:
    make, head, base, task = KINDS[kind]
    config = getattr(transformers, make)(**base)
    programs = []
    for text in (config.to_json_string(use_diff=True), config.to_json_string(use_diff=False)):
        (tmp_path / "config.json").write_text(text)
        read = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            programs.append(identify_program(getattr(transformers, head)(read), read, task, ()))
    assert programs[0].digest == programs[1].digest == plain(kind).digest


def test_an_old_config_has_the_program_of_a_new_one(tmp_path: Path) -> None:
    old = GROUPED | {"model_type": "llama", "rope_theta": 10000, "rope_scaling": None}
    del old["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(read)
    assert identify_program(model, read, "logits", ()).digest == plain("llama").digest


def test_the_code_is_part_of_the_program() -> None:
    kinds = ("llama", "bert", "gpt2", "bert-score", "gpt2-score")
    assert len({plain(kind).code for kind in kinds}) == len(kinds)


def test_task_and_steps_are_part_of_the_program() -> None:
    config = transformers.BertConfig(**TINY)
    with torch.device("meta"):
        model = transformers.BertModel(config)
    asked = [("embed", ("mean",)), ("embed", ("mean", "normalize")), ("logits", ())]
    programs = [identify_program(model, config, task, steps) for task, steps in asked]
    assert len({each.digest for each in programs}) == len(asked)


def test_a_module_that_is_called_as_it_is_says_what_comes_out() -> None:
    """The tasks of ours take one answer; a caller of the module itself gets whatever it gives."""
    config, more = (transformers.BertConfig(**TINY, output_hidden_states=o) for o in (False, True))
    with torch.device("meta"):
        model, talkative = transformers.BertModel(config), transformers.BertModel(more)
    assert identify_program(model, config, "embed", ()) == identify_program(
        talkative, more, "embed", ()
    )
    assert identify_program(model, config, "forward", ()) != identify_program(
        talkative, more, "forward", ()
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
normal = Normal(collect_code(nn.Linear(1, 1)), "forward")


@given(st.dictionaries(st.text(max_size=3), values))
def test_any_value_of_a_config_has_one_canonical_form(config: dict[str, Any]) -> None:
    once = normal.plain(config)
    assert encode_canonical(normal.plain(once)) == encode_canonical(once)


def test_a_value_that_is_no_json_becomes_its_name() -> None:
    kept = normal.plain({"kind": torch.float32, "sizes": (2, {3: 4}), "limit": float("inf")})
    assert kept == {"kind": "torch.float32", "sizes": [2, {"3": 4}], "limit": "inf"}


REMOTE = {
    "config.json": """{"model_type": "echo", "width": 8, "architectures": ["EchoModel"], "auto_map":
        {"AutoConfig": "configuration_echo.EchoConfig", "AutoModel": "modeling_echo.EchoModel"}}""",
    "configuration_echo.py": """
from transformers import PreTrainedConfig

class EchoConfig(PreTrainedConfig):
    model_type = "echo"

    def __init__(self, width=8, depth=1, motto="none", **kwargs):
        self.width, self.depth, self.motto = width, depth, motto
        super().__init__(**kwargs)
""",
    "ops_echo.py": """
from .constants_echo import SCALE

def louder(x):
    return SCALE * x
""",
    "constants_echo.py": "SCALE = 2.0",
    "modeling_echo.py": """
from torch import nn
from transformers import PreTrainedModel

from .configuration_echo import EchoConfig
from .ops_echo import louder

class EchoModel(PreTrainedModel):
    config_class = EchoConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.width
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.post_init()

    def forward(self, x):
        for layer in self.layers:
            x = louder(layer(x))
        return x
""",
}


def remote(folder: Path, changes: dict[str, tuple[str, str]], **config: Any) -> Program:
    """The program of a model that brings its code, from a folder of its own."""
    folder.mkdir()
    for name, text in REMOTE.items():
        old, new = changes.get(name, ("", ""))
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1) if old else text)
    words = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(words))
    read = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_config(read, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    return identify_program(model, read, "embed", ())


def test_two_repos_with_the_same_code_have_one_program(tmp_path: Path) -> None:
    base = remote(tmp_path / "echo-base", {}, motto="base", note=1)
    assert remote(tmp_path / "echo-tuned", {}, motto="tuned", note=2) == base
    assert base.config == {"model_type": "echo", "width": 8, "depth": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"modeling_echo.py": ("louder(layer(x))", "-louder(layer(x))")},
        {"ops_echo.py": ("SCALE * x", "SCALE + x")},
        {"constants_echo.py": ("2.0", "3.0")},
        {"configuration_echo.py": ("depth=1", "depth=2")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_code_that_a_model_brings_is_part_of_its_program(
    change: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    assert remote(tmp_path / "echo", change).digest != remote(tmp_path / "base", {}).digest


def test_a_config_that_is_read_by_a_computed_name_counts_as_a_whole(tmp_path: Path) -> None:
    computed = {"modeling_echo.py": ("config.depth", 'getattr(config, "dep" + "th")')}
    programs = [
        remote(tmp_path / f"echo-{depth}", computed, depth=depth, motto="all").config
        for depth in (1, 2)
    ]
    assert [each["depth"] for each in programs] == [1, 2]
    assert programs[0]["motto"] == "all"


class Block(nn.Module):
    """A plain module, of the script or of an installed file."""

    def __init__(self, width: int = 4, scale: float = 1.0, rate: float = 0.1) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.drop = nn.Dropout(rate)
        self._scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scale * self.drop(self.inner(x))


def test_a_plain_module_has_one_program_whatever_its_weights() -> None:
    first, second = identify_module_program(Block()), identify_module_program(Block())
    assert first == second
    assert first.task == "forward"
    assert first.config["class"] == "Block"


@pytest.mark.parametrize("change", [{"width": 8}, {"scale": 2.0}])
def test_another_hyperparameter_is_another_program(change: dict[str, Any]) -> None:
    assert identify_module_program(Block(**change)) != identify_module_program(Block())


def test_a_rate_of_dropout_is_not_part_of_the_program() -> None:
    assert identify_module_program(Block(rate=0.5)) == identify_module_program(Block())


def test_a_wrapped_model_has_one_program_with_its_fine_tunes() -> None:
    config, tuned = (
        transformers.LlamaConfig(**GROUPED, pad_token_id=pad, name_or_path=f"acme/{pad}")
        for pad in (1, 2)
    )
    wide = transformers.LlamaConfig(**GROUPED, rms_norm_eps=1e-3)
    with torch.device("meta"):
        first, second, other = (
            identify_module_program(nn.Sequential(transformers.LlamaModel(each)))
            for each in (config, tuned, wide)
        )
    assert first == second
    assert first != other


def test_a_loaded_model_has_the_program_of_a_built_one(tmp_path: Path) -> None:
    built = transformers.BertModel(transformers.BertConfig(**TINY))
    built.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    assert identify_module_program(loaded) == identify_module_program(built)


def flux(**changes: Any) -> nn.Module:
    """A tiny Flux transformer."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    more = {"num_layers": 1, "num_single_layers": 1, "in_channels": 4, "axes_dims_rope": (4, 4, 8)}
    with torch.device("meta"):
        model: nn.Module = diffusers.FluxTransformer2DModel(
            **(sizes | more | {"pooled_projection_dim": 32} | changes)
        )
    return model


def test_a_diffusers_model_is_known_by_its_config_and_its_parts() -> None:
    base = identify_module_program(flux())
    assert base.config["attention_head_dim"] == 16
    assert not [key for key in base.config if key.startswith("_")]
    named = flux()
    named.register_to_config(_name_or_path="acme/flux")  # type: ignore[operator]
    assert identify_module_program(named) == base
    assert identify_module_program(flux(axes_dims_rope=(8, 4, 4))) != base
    fused = flux()
    fused.fuse_qkv_projections()  # type: ignore[operator]
    assert identify_module_program(fused) != base


SCRIPT = """
import sys
import torch
from torch import nn
from hubaoti.program.identity import identify_module_program

FACTOR = {factor}

def louder(x):
    return FACTOR * x

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return louder(self.inner(x))

{more}
print(identify_module_program(Net()).digest)
"""


def digest_of_script(factor: float, more: str = "") -> str:
    """The program of a class of `__main__`, which has no file."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: list[str] = []
    names["print"] = printed.append
    exec(compile(SCRIPT.format(factor=factor, more=more), "<stdin>", "exec"), names)
    return printed[0]


def test_a_class_without_a_file_is_known_by_what_it_runs() -> None:
    base = digest_of_script(2.0)
    assert digest_of_script(2.0, "unrelated = 1") == base
    assert digest_of_script(3.0) != base


def test_another_process_finds_the_same_program() -> None:
    """Sets have another order there, and objects other addresses."""
    more = "Net.kinds = frozenset({'a', 'b', 'c', 'd'})"
    code = SCRIPT.format(factor=2.0, more=more)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout.decode().strip() == digest_of_script(2.0, more)
