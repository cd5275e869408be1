"""A model's own files against the program of a graph: shapes alone do not tell models apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import inside

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Program
from hubaoti.errors import ModelNotFound, OtherProgram
from hubaoti.program.model_files import flatten_config, read_sentence_steps, refuse_other_program
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

PROGRAM = Program(
    config={
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    code="0" * 64,
    task="logits",
)


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "hidden_act": "silu", "rope_theta": 10000},
        {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "eos_token_id": 7, "_name_or_path": "x"},
    ],
)
def test_a_fine_tune_is_of_the_program(config: dict[str, Any], tmp_path: Path) -> None:
    refuse_other_program(folder_of(tmp_path / "m", config), PROGRAM)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rope_theta": 500000.0}, "rope_theta"),
        ({"model_type": "mistral"}, "model_type"),
    ],
)
def test_another_value_of_a_config_is_refused_by_its_name(
    config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(OtherProgram, match=name):
        refuse_other_program(folder_of(tmp_path / "m", config), PROGRAM)


def test_a_name_with_two_values_is_not_compared() -> None:
    assert flatten_config({"a": {"theta": 1.0}, "b": {"theta": 2.0}, "eps": 3}) == {"eps": 3}


def test_a_listing_does_not_lead_outside(tmp_path: Path) -> None:
    listing = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../../else"}]
    folder = folder_of(tmp_path / "m", {})
    (folder / "modules.json").write_text(json.dumps(listing))
    with pytest.raises(ModelNotFound, match="outside"):
        read_sentence_steps(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("config.json", '"gelu"', '"relu"'), "hidden_act is 'relu', the graph has 'gelu'"),
        (
            (
                "1_Pooling/config.json",
                '"pooling_mode_cls_token": false',
                '"pooling_mode_cls_token": true',
            ),
            "it ends with ['cls', 'mean', 'normalize'], the graph with ['mean', 'normalize']",
        ),
    ],
)
def test_run_refuses_weights_of_another_program(
    edit: tuple[str, str, str],
    said: str,
    minilm: Path,
    minilm_bundle: Bundle,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    settings = Settings(tmp_path / "home", endpoint.url, endpoint.token)
    other = tmp_path / "other"
    shutil.copytree(minilm, other)
    file, old, new = edit
    text = (other / file).read_text()
    assert old in text
    (other / file).write_text(text.replace(old, new))
    hubaoti.push(minilm_bundle, "acme/other-program", as_is=True, settings=settings)
    words = ("run", "acme/other-program", "--trust", "--model", other, "--text", "Hello")
    done = inside(settings, *words)
    assert done.code == OtherProgram.exit_code
    assert said in done.err
