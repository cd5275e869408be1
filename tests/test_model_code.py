"""The code of a model: all files that compute it, wherever they lie, and no others."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hubaoti.program.model_code import Code, collect_code, digest_sources

TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
PACKAGE = {
    "__init__.py": "",
    "net.py": """
from torch import nn
from .ops import louder
from . import unused_by_nobody

class Net(nn.Module):
    def forward(self, x):
        return louder(x)
""",
    "ops.py": """
from .constants import SCALE

def louder(x):
    return SCALE * x
""",
    "constants.py": "SCALE = 2.0",
    "unused_by_nobody.py": "",
    "stranger.py": "import torch",
}
Place = Callable[..., Code]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Install the package below a folder, with changed files, and give the code of its net."""

    def placed(folder: str, **changes: str) -> Code:
        where = tmp_path / folder / "acme_blocks"
        where.mkdir(parents=True)
        for name, text in PACKAGE.items():
            (where / name).write_text(changes.get(name.removesuffix(".py"), text))
        forget()
        monkeypatch.syspath_prepend(str(where.parent))
        importlib.invalidate_caches()
        return collect_code(importlib.import_module("acme_blocks.net").Net())

    def forget() -> None:
        for name in [*sys.modules]:
            if name.startswith("acme_"):
                del sys.modules[name]

    yield placed
    forget()


def meta(cls: type, config: object) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def test_code_is_the_same_wherever_it_is_installed(place: Place) -> None:
    assert place("home/lib/python/site-packages").digest == place("opt/checkout").digest


@pytest.mark.parametrize("name", ["net", "ops", "constants"])
def test_every_file_that_takes_part_counts(name: str, place: Place) -> None:
    changed = {name: PACKAGE[f"{name}.py"] + "\n# another line\n"}
    assert place("first").digest != place("second", **changed).digest


def test_a_file_that_nothing_imports_does_not_count(place: Place) -> None:
    assert place("first").digest == place("second", stranger="import json").digest


def test_files_beside_a_script_count_and_installed_packages_do_not(place: Place) -> None:
    package = place("first")
    folder = Path(package.modules[0].__file__ or "").parents[1]
    imports = "import numpy\nfrom safetensors import safe_open\nfrom acme_ops import louder\n"
    (folder / "acme_ops.py").write_text("def louder(x): return x")
    (folder / "acme_net.py").write_text(imports + PACKAGE["net.py"].replace("from .", "# "))
    importlib.invalidate_caches()
    code = collect_code(importlib.import_module("acme_net").Net())
    assert [each.__name__ for each in code.modules] == ["acme_net", "acme_ops"]


def test_what_loads_and_generates_is_no_part_of_a_model() -> None:
    config = transformers.LlamaConfig(**TINY)
    code = collect_code(meta(transformers.LlamaForCausalLM, config), {type(config)})
    names = {each.__name__.removeprefix("transformers.") for each in code.modules}
    assert {"models.llama.modeling_llama", "models.llama.configuration_llama"} <= names
    assert {"masking_utils", "modeling_rope_utils", "integrations.sdpa_attention"} <= names
    assert not {name for name in names if "generation" in name or name == "modeling_utils"}
    assert not {name for name in names if name.startswith(("torch", "hubaoti", "models.auto"))}


def test_heads_of_one_file_differ_by_their_names() -> None:
    config = transformers.BertConfig(**TINY)
    heads = (transformers.BertForMaskedLM, transformers.BertLMHeadModel)
    first, second = (collect_code(meta(head, config), {type(config)}) for head in heads)
    assert first.modules == second.modules
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("config", "head", "reads"),
    [
        (transformers.BertConfig, transformers.BertModel, False),
        (transformers.LlamaConfig, transformers.LlamaForCausalLM, False),
        (transformers.LlamaConfig, transformers.LlamaForSequenceClassification, True),
        (transformers.RobertaConfig, transformers.RobertaModel, True),
        (transformers.GPT2Config, transformers.GPT2LMHeadModel, False),
        (transformers.GPT2Config, transformers.GPT2ForSequenceClassification, True),
    ],
)
def test_other_models_of_a_file_are_not_read(config: type, head: type, reads: bool) -> None:
    made = config(**TINY)
    code = collect_code(meta(head, made), {config})
    assert code.reads("pad_token_id", "padding_idx") is reads
    assert code.reads("vocab_size")
    assert not code.reads("a_key_of_nobody")


def test_sources_are_known_by_their_names_and_bytes(tmp_path: Path) -> None:
    for name, text in {"a": "1", "b": "2"}.items():
        (tmp_path / name).write_text(text)
    files = [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    before = digest_sources(files)
    assert digest_sources(files[::-1]) == before
    assert digest_sources([("a", tmp_path / "b"), ("b", tmp_path / "a")]) != before
    (tmp_path / "b").write_text("3")
    assert digest_sources(files) != before
