"""From a fresh process to its first token, beside `torch.compile` with a cache that is warm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import llama, tokens
from gpu.conftest import Found
from gpu.place import Place
from hubaoti.artifact.bundle import Bundle

pytestmark = pytest.mark.gpu  # with --device cpu on a CPU, too: it takes a minute

_SECONDS = 70
_KEPT: dict[str, float] = {}


@pytest.fixture(scope="module")
def bundle(place: Place) -> Bundle:
    """The blocks of a model of 8B."""
    return place.get_bundle("model", llama.compile_model)


@pytest.fixture(scope="module")
def config(place: Place) -> Path:
    """The model's config."""
    return place.write_config("model", llama.make_config(place.device))


def time_process(place: Place, *words: object) -> dict[str, float]:
    """The seconds of a process, by what it had done then."""
    environment = os.environ | place.settings.to_env()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(place.folder / "inductor")
    command = [sys.executable, "-P", "-W", "ignore", tokens.__file__, str(place.device)]
    done = subprocess.run(
        [*command, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_attach(bundle: Bundle, config: Path, place: Place, found: Found) -> None:
    """The second process; a first one tried the graphs, once for this machine."""
    for _ in range(2 if place.is_gpu else 1):
        facts = time_process(place, config, "attach", bundle.path)
    _KEPT["attach"] = facts["tokens"] - facts["model"]
    found(f"{_KEPT['attach']:.2f} s from the model to the token", **facts)


@pytest.mark.gpu("on a CPU nothing is generated for torch.compile here")
def test_compile(config: Path, place: Place, found: Found) -> None:
    """`torch.compile` of each block, its cache empty."""
    facts = time_process(place, config, "compile")
    found(f"{facts['tokens'] - facts['model']:.2f} s, its cache empty", **facts)


@pytest.mark.gpu("on a CPU nothing is generated for torch.compile here")
def test_warm(config: Path, place: Place, found: Found) -> None:
    """The same again: all is in its cache."""
    facts = time_process(place, config, "compile")
    spent = facts["tokens"] - facts["model"]
    ratio = spent / _KEPT["attach"] if "attach" in _KEPT else None
    said = f", {ratio:.2f} times as long as attached" if ratio else ""
    found(f"{spent:.2f} s, its cache warm{said}", **facts, ratio=ratio)
