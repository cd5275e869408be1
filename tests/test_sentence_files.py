"""Texts are read as sentence-transformers reads them, but that none is cut off silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from sentence_transformers import SentenceTransformer

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler import from_config
from hubaoti.compiler.request import CompileRequest
from hubaoti.engines.encoder import Encoder
from hubaoti.errors import OutOfBounds, UnknownTask
from hubaoti.hub.model_download import RUN_FILES
from hubaoti.program.model_files import TextRules, choose_max_length, read_text_rules
from hubaoti.runtime.text import TextEncoder
from hubaoti.settings import Settings

CPU = torch.device("cpu")
TEXTS = ["Cats sit on the sill.", "Interest rates were raised again by the BANK of England."]
LONG = "the cat sits on the warm windowsill and looks at the moon"
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}

Embed = Callable[[list[str]], torch.Tensor]


@pytest.fixture
def folder(minilm: Path, tmp_path: Path) -> Path:
    """A copy of a sentence-transformers model, whose files may be changed."""
    shutil.copytree(minilm, tmp_path / "model")
    return tmp_path / "model"


def write(path: Path, **fields: Any) -> None:
    """Other fields in a JSON file, which may be a new one."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | fields))


def open_engine(folder: Path) -> Embed:
    """As an engine answers without a graph."""
    request = CompileRequest(task="embed", regions="none")
    found = from_config.load_source(folder, request, CPU, weights=True)
    return Encoder(found.model, folder, found.config, found.positions).embed


def open_eager(folder: Path) -> Embed:
    settings = Settings(home=folder.parent / "eager", endpoint="http://127.0.0.1:9")
    return lambda texts: hubaoti.eager(folder, texts, settings=settings).values


@pytest.fixture
def open_graph(minilm_bundle: Bundle, tmp_path: Path) -> Callable[[Path], Embed]:
    """Opens the graph of the model over the weights and the tokenizer of another folder."""
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    return lambda folder: hubaoti.load(minilm_bundle, folder, trust=True, settings=settings)


@pytest.fixture(params=["graph", "engine", "eager"])
def opened(request: pytest.FixtureRequest, open_graph: Any) -> Any:
    """Each way to embed texts with the files of a folder."""
    return {"graph": open_graph, "engine": open_engine, "eager": open_eager}[request.param]


def embed(folder: Path, texts: list[str]) -> torch.Tensor:
    """The vectors of sentence-transformers itself."""
    model = SentenceTransformer(str(folder), device="cpu")
    return torch.as_tensor(model.encode(texts))


def prompted(folder: Path) -> None:
    write(folder / "config_sentence_transformers.json", **PROMPTS)


def lowered(folder: Path) -> None:
    """Small letters, of a tokenizer that has large ones of its own."""
    write(folder / "sentence_bert_config.json", do_lower_case=True)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(tokenizer))
    write(folder / "tokenizer_config.json", do_lower_case=False)


@pytest.mark.parametrize("change", [prompted, lowered, lambda folder: None])
def test_vectors_are_those_of_sentence_transformers(
    change: Callable[[Path], None], folder: Path, opened: Any
) -> None:
    change(folder)
    torch.testing.assert_close(opened(folder)(TEXTS), embed(folder, TEXTS), atol=1e-5, rtol=0)


def test_a_prompt_changes_vectors(folder: Path, open_graph: Any) -> None:
    before = open_graph(folder)(TEXTS)
    prompted(folder)
    assert (open_graph(folder)(TEXTS) - before).abs().max() > 0.01


def test_what_sentence_transformers_would_cut_off_is_refused(folder: Path, opened: Any) -> None:
    write(folder / "sentence_bert_config.json", max_seq_length=8)
    model, fits = opened(folder), ["the cat sits on the mat"]  # and two special tokens
    torch.testing.assert_close(model(fits), embed(folder, fits), atol=1e-5, rtol=0)
    with pytest.raises(OutOfBounds, match=r"end a text at 8 \(sentence_bert_config.json: max_seq"):
        model([LONG])


def test_a_prompt_counts_among_the_tokens_of_a_text(folder: Path, opened: Any) -> None:
    write(folder / "sentence_bert_config.json", max_seq_length=9)
    prompted(folder)
    model = opened(folder)
    model(["the cat sits on the"])
    with pytest.raises(OutOfBounds, match="has 10 tokens with the model's default prompt"):
        model(["the cat sits on the mat"])


def test_a_tokenizer_s_own_length_counts_where_nothing_else_is_said(
    folder: Path, opened: Any
) -> None:
    write(folder / "sentence_bert_config.json", max_seq_length=None)
    write(folder / "tokenizer_config.json", model_max_length=8)
    with pytest.raises(OutOfBounds, match=r"tokenizer_config\.json: model_max_length"):
        opened(folder)([LONG])


def test_a_prompt_that_is_not_pooled_is_refused_by_name(folder: Path, opened: Any) -> None:
    write(folder / "1_Pooling/config.json", include_prompt=False)
    opened(folder)(TEXTS)  # without a prompt it says nothing
    prompted(folder)
    with pytest.raises(UnknownTask, match="include_prompt") as caught:
        opened(folder)(TEXTS)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        (PROMPTS, "query: "),
        (PROMPTS | {"default_prompt_name": None}, ""),
        (PROMPTS | {"default_prompt_name": "document"}, ""),
        (PROMPTS | {"default_prompt_name": "absent"}, ""),
        ({"default_prompt_name": "query"}, ""),
        ({"prompts": ["query"], "default_prompt_name": "query"}, ""),
        ({"prompts": {"query": None}, "default_prompt_name": "query"}, ""),
        ({}, ""),
    ],
)
def test_only_a_prompt_that_is_named_and_there_is_the_default(
    config: dict[str, Any], prompt: str, tmp_path: Path
) -> None:
    write(tmp_path / "config_sentence_transformers.json", **config)
    assert read_text_rules(tmp_path, "embed") == TextRules(prompt)


def test_other_tasks_read_texts_as_they_are(folder: Path) -> None:
    prompted(folder)
    write(folder / "sentence_bert_config.json", max_seq_length=8, do_lower_case=True)
    assert read_text_rules(folder, "classify") == TextRules()
    assert TextEncoder(folder, task="classify").encode([LONG]).input_ids.shape[1] > 8


def test_what_is_said_lies_beside_the_encoder(tmp_path: Path) -> None:
    listing = [{"type": "x.Transformer", "path": "0_Transformer"}]
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps(listing))
    write(tmp_path / "0_Transformer/sentence_roberta_config.json", max_seq_length=128)
    assert read_text_rules(tmp_path, "embed").most == 128


@pytest.mark.parametrize("odd", [None, "256", 0, 1, -1, True, 1e30, [256]])
def test_a_length_that_is_none_is_no_limit(odd: Any, tmp_path: Path) -> None:
    write(tmp_path / "sentence_bert_config.json", max_seq_length=odd)
    assert read_text_rules(tmp_path, "embed").most is None


def test_what_is_compiled_by_default_ends_where_texts_do(minilm: Path) -> None:
    assert json.loads((minilm / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    found = from_config.load_source(minilm, CompileRequest(task="embed"), CPU)
    assert found.default_dims["seq"].high == 256
    forward = from_config.load_source(minilm, CompileRequest(task="forward"), CPU)
    assert forward.default_dims["seq"].high == 512


def test_the_sentence_files_come_before_the_tokenizer_s(folder: Path) -> None:
    write(folder / "tokenizer_config.json", model_max_length=128)
    config = from_config.load_source(folder, CompileRequest(task="embed"), CPU).config
    assert choose_max_length(folder, config, 512, 4096, "embed") == 256
    assert choose_max_length(folder, config, 512, 4096, "forward") == 128


@pytest.mark.parametrize(
    "name",
    [
        "sentence_bert_config.json",
        "0_Transformer/sentence_xlm-roberta_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
    ],
)
def test_what_says_how_texts_are_read_is_fetched(name: str) -> None:
    assert [*filter_repo_objects([name], allow_patterns=[*RUN_FILES])] == [name]
