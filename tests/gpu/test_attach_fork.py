"""Children of a process that never touched the device, one after the other; one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import forks
from gpu.conftest import Found
from gpu.llama import compile_blocks, make_config
from gpu.place import Place, describe
from hubaoti.artifact.bundle import Bundle

_FORKS, _FEW = 10, 2  # on a GPU, on a CPU


def compile_narrow(place: Place) -> Bundle:
    """The blocks of a narrow model, since it is processes that are looked at."""
    return compile_blocks(place, "fork", make_config(place.device, narrow=True))


@pytest.fixture(scope="module")
def bundle(place: Place) -> Bundle:
    """They are compiled once."""
    return place.get_bundle("fork", compile_narrow)


def test_built(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts)


def run_forks(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the program that forks, as it may not be forked from a process with threads."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Else torch would touch the driver to ask whether there is a GPU.
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    command = [sys.executable, "-P", "-W", "ignore", forks.__file__, *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_children(bundle: Bundle, place: Place, found: Found) -> None:
    count = _FORKS if place.is_gpu else _FEW
    config = place.write_config("fork", make_config(place.device, narrow=True))
    done = run_forks(place.device, bundle.path, config, place.settings.home, count)
    assert done.returncode == 0, done.stderr.splitlines()[-1] + f"\n{done.stderr}"
    facts = json.loads(done.stdout.splitlines()[-1])
    answered = [each for each in facts["children"] if "off" in each]
    signals = [each.get("signal") for each in facts["children"]]
    worst = max(each["off"] for each in answered)
    said = f"{len(answered)} answered, {worst:.1e} off, {signals.count(9)} killed"
    more = facts["used"][1] - facts["used"][0] if facts["used"] else 0
    said += f"; {more:+d} MB afterwards" if facts["used"] else ""
    found(said, **facts)
    assert len(answered) == count and all(each["compiled"] > 0 for each in answered), said
    assert [index for index, each in enumerate(signals) if each == 9] == [count // 2], said
    assert worst <= (0.1 if place.is_gpu else 1e-4) and more <= 64, said


def test_forks_of_no_bundle_say_why(tmp_path: Path) -> None:
    done = run_forks("cpu", tmp_path / "no", tmp_path, tmp_path, 1)
    assert done.returncode == 1
    assert "is not a bundle" in done.stderr
    assert json.dumps("off") not in done.stdout
