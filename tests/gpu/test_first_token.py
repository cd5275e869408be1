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
_KEPT: dict[str, dict[str, float]] = {}


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
    _KEPT["attach"] = facts
    found(word_spent(facts), **facts)


@pytest.mark.gpu("on a CPU nothing is generated for torch.compile here")
def test_compile(config: Path, place: Place, found: Found) -> None:
    """`torch.compile` of each block, its cache empty."""
    facts = time_process(place, config, "compile")
    found(f"{word_spent(facts)}, its cache empty", **facts)


@pytest.mark.gpu("on a CPU nothing is generated for torch.compile here")
def test_warm(config: Path, place: Place, found: Found) -> None:
    """The same again: all is in its cache."""
    facts = time_process(place, config, "compile")
    ratios = compare_spent(facts, _KEPT["attach"]) if "attach" in _KEPT else {}
    said = ", ".join(f"{ratio:.2f} times as long by {what}" for what, ratio in ratios.items())
    found(f"{word_spent(facts)}, its cache warm; {said}", **facts, ratios=ratios)


def split_spent(facts: dict[str, float]) -> dict[str, float]:
    """The seconds to the token: of the whole process, and since its model was there."""
    return {"the process": facts["token"], "its model": facts["token"] - facts["model"]}


def word_spent(facts: dict[str, float]) -> str:
    """Those, in words."""
    whole, since = split_spent(facts).values()
    return f"{whole:.2f} s to the token, {since:.2f} s of them since the model was there"


def compare_spent(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """How many times as long as ours another process took, by both."""
    longer, spent = split_spent(theirs), split_spent(ours)
    return {what: longer[what] / spent[what] for what in longer}


# What the check would see


def test_the_whole_process_is_compared_and_not_its_last_part_alone() -> None:
    ours, theirs = {"model": 9.0, "token": 10.0}, {"model": 9.0, "token": 13.0}
    assert compare_spent(theirs, ours) == {"the process": 1.3, "its model": 4.0}
