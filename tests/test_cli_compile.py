"""`hubaoti compile` as a stranger types it: its options, what it explains, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import Done, hubaoti, inside

from hubaoti import errors
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings

# What the shared decoder was compiled with, in words.
ASKED = ("--task", "generate", "--dim", "batch=1:4", "--dim", "seq=1:40", "--dim", "cache=16:64")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def compiled(settings: Settings, model: Path, *words: str) -> Done:
    """The command, in this process."""
    return inside(settings, "compile", model, "-o", "bundle", *words)


BAD: dict[str, tuple[tuple[str, ...], type[errors.HubaotiError], tuple[str, ...]]] = {
    "a gap between buckets": (
        (*ASKED, "--bucket", "seq=1:1", "--bucket", "seq=8:40"),
        errors.BadDim,
        ("seq=2:7",),
    ),
    "a bucket beyond its dim": (
        (*ASKED, "--bucket", "seq=1:1", "--bucket", "seq=2:80"),
        errors.BadDim,
        ("seq=2:80", "1:40"),
    ),
    "a bucket of no dim": ((*ASKED, "--bucket", "depth=1:1"), errors.BadDim, ("depth", "seq")),
    "a dim that no input has": ((*ASKED, "--dim", "width=1:4"), errors.BadDim, ("width", "cache")),
    "an option that nearly is one": (
        ("--inductor", "max_fusion_siz=8"),
        errors.BadRequest,
        ("max_fusion_siz", "max_fusion_size"),
    ),
    "an option without a value": (("--inductor", "epilogue_fusion"), errors.BadRequest, ("=",)),
    "an option of another type": (
        ("--inductor", "max_fusion_size=many"),
        errors.BadRequest,
        ("max_fusion_size", "many"),
    ),
    "an option that holds weights": (
        ("--inductor", "freezing=true"),
        errors.BadRequest,
        ("freezing", "weights"),
    ),
    "a mode": (("--mode", "fastest"), errors.BadRequest, ("fastest", "max-autotune")),
    "a recipe": (("--quantize", "int7wo"), errors.BadRequest, ("int7wo", "int8wo")),
    "a region": (("--regions", "model.layer"), errors.BadRequest, ("model.layer", "model.layers")),
    "no jobs": ((*ASKED, "--jobs", "0"), errors.BadRequest, ("--jobs 0",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_refused_in_words_and_leaves_nothing(
    case: str, settings: Settings, tiny_decoder: Path, here: Path
) -> None:
    words, kind, said = BAD[case]
    done = compiled(settings, tiny_decoder, *words)
    assert (done.code, done.out) == (kind.exit_code, ""), done
    assert "error: " in done.err and "hint: " in done.err
    assert [word for word in said if word not in done.err] == []
    assert list(here.iterdir()) == []


def test_code_that_a_model_brings_runs_only_when_allowed(
    settings: Settings, tiny_decoder: Path, here: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_decoder, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nraise ImportError('ours')\n")
    done = compiled(settings, folder, *ASKED)
    assert done.code not in {0, 1}
    assert "--trust-remote-code" in done.err
    assert not ran.exists()
    assert list(here.iterdir()) == []


def test_what_would_be_compiled_is_printed_and_nothing_is_written(
    settings: Settings, tiny_decoder: Path, here: Path
) -> None:
    buckets = ("--bucket", "seq=1:1", "--bucket", "seq=2:40")
    words = ("compile", tiny_decoder, "--explain", *ASKED, *buckets)
    text = hubaoti(settings, *words)
    assert text.code == 0, text
    as_json = inside(settings, *words, "--json", "--quiet")
    assert (as_json.code, as_json.err) == (0, "")
    found = json.loads(as_json.out)
    assert [graph["dims"]["seq"] for graph in found["graphs"]] == ["1:1", "2:40"]
    for graph in found["graphs"]:
        assert graph["modules"] == ["model.layers.0", "model.layers.1"]
        assert f"  {graph['id']}: 2 modules, from model.layers.0\n" in text.out
    assert text.out.startswith(f"{found['recipe']} for {found['variant']}, regions auto\n")
    assert f"key {found['key'][:12]}, not built yet" in text.out
    assert "seq=2:40" in text.out and "static cache" in text.out
    assert "hidden_states (batch, seq, 32)" in text.out
    assert list(here.iterdir()) == []


def test_what_cannot_be_compiled_cannot_be_explained(
    settings: Settings, tiny_decoder: Path, here: Path
) -> None:
    done = inside(settings, "compile", tiny_decoder, "--explain", *ASKED, "--dim", "width=1:4")
    assert done.code == errors.BadDim.exit_code
    assert "width" in done.err and "hint: " in done.err


def test_what_is_built_already_is_found_and_said(
    built_at: Settings, decoder_bundle: Bundle, tiny_decoder: Path, here: Path
) -> None:
    done = compiled(built_at, tiny_decoder, *ASKED, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["digest"] == decoder_bundle.manifest.digest
    assert f"found {decoder_bundle.manifest.key[:12]} in the mirror" in done.err
    assert (here / "bundle" / "hubaoti.json").is_file()
    again = compiled(built_at, tiny_decoder, *ASKED)
    assert "in bundle" in again.err
    assert "  model.layers serves 2 modules\n" in again.out
