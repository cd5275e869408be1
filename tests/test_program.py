"""Program: one for all fine-tunes of a model, another for everything that computes otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.compiler.program import digest_of_sources, normalized, program_of, reads_pad_token
from hubaoti.manifest import Program, canonical

TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
HEADS = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2ForSequenceClassification),
}


def program(kind: str, **changes: Any) -> Program:
    make_config, head = HEADS[kind]
    config = make_config(**(TINY | changes))
    task = "logits" if kind == "llama" else "classify"
    with torch.device("meta"):
        return program_of(head(config), config, task, ())


SAME = [
    ("bert", {"name_or_path": "acme/fine-tune"}),
    ("bert", {"architectures": ["BertForMaskedLM"]}),
    ("bert", {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}),
    ("bert", {"pad_token_id": 7}),
    ("bert", {"bos_token_id": 3, "eos_token_id": 4}),
    ("bert", {"transformers_version": "5.0.0"}),
    ("bert", {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0}),
    ("bert", {"classifier_dropout": 0.3}),
    ("bert", {"initializer_range": 0.5}),
    ("bert", {"problem_type": "single_label_classification"}),
    ("bert", {"dtype": "float16"}),
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"pad_token_id": 3, "bos_token_id": 5}),
    ("llama", {"use_cache": False}),
]
OTHER = [
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"layer_norm_eps": 1e-5}),
    ("bert", {"vocab_size": 101}),
    ("bert", {"num_hidden_layers": 2}),
    ("bert", {"num_attention_heads": 4}),
    ("bert", {"num_labels": 5}),
    ("bert", {"max_position_embeddings": 64}),
    ("bert", {"type_vocab_size": 3}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"rms_norm_eps": 1e-5}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True}),
    ("roberta", {"pad_token_id": 2}),
    ("gpt2", {"pad_token_id": 2}),
]


@pytest.mark.parametrize(("kind", "changes"), SAME, ids=str)
def test_a_fine_tune_has_the_program_of_its_base(kind: str, changes: dict[str, Any]) -> None:
    assert program(kind, **changes) == program(kind)


@pytest.mark.parametrize(("kind", "changes"), OTHER, ids=str)
def test_what_computes_otherwise_has_another_program(kind: str, changes: dict[str, Any]) -> None:
    assert program(kind, **changes).digest != program(kind).digest


def test_the_code_is_part_of_the_program() -> None:
    codes = {program(kind).code for kind in HEADS}
    assert len(codes) == len(HEADS)


def test_task_and_steps_are_part_of_the_program() -> None:
    config = transformers.BertConfig(**TINY)
    with torch.device("meta"):
        model = transformers.BertModel(config)
    asked = [("embed", ("mean",)), ("embed", ("mean", "normalize")), ("logits", ())]
    programs = [program_of(model, config, task, steps) for task, steps in asked]
    assert len({each.digest for each in programs}) == len(asked)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), plain))
def test_normalizing_twice_is_normalizing_once(config: dict[str, Any]) -> None:
    once = normalized(config)
    assert normalized(once) == once
    assert canonical(once)


def test_a_value_that_is_no_json_becomes_its_name() -> None:
    kept = normalized({"kind": torch.float32, "sizes": (2, {3: 4})})
    assert kept == {"kind": "torch.float32", "sizes": [2, {"3": 4}]}


def test_names_are_left_out_at_any_depth() -> None:
    nested = {"text_config": {"_name_or_path": "a", "hidden_size": 8, "dropout": 0.1}}
    assert normalized(nested) == {"text_config": {"hidden_size": 8}}


def test_sources_are_known_by_their_names_and_bytes(tmp_path: Path) -> None:
    for name, text in {"a.py": "1", "b.py": "2"}.items():
        (tmp_path / name).write_text(text)
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    before = digest_of_sources(files)
    assert digest_of_sources(files[::-1]) == before
    (tmp_path / "b.py").write_text("3")
    assert digest_of_sources(files) != before


@pytest.mark.parametrize(
    ("cls", "reads"),
    [
        (transformers.models.bert.modeling_bert.BertEmbeddings, False),
        (transformers.models.llama.modeling_llama.LlamaModel, False),
        (transformers.models.roberta.modeling_roberta.RobertaEmbeddings, True),
        (transformers.GPT2ForSequenceClassification, True),
    ],
)
def test_a_row_that_is_only_kept_from_training_is_not_computed_with(cls: type, reads: bool) -> None:
    assert reads_pad_token({cls}) is reads
