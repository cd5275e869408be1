"""First opens under the stand-in of a GPU: a graph is opened and launched, and nothing is believed.

Real packages for a real capability; a device that computes nothing.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hubaoti.compiler.stand_in import StandIn, build_stand_in
from hubaoti.host.probe import find_torch
from hubaoti.settings import merge_environment

TORCH = find_torch([])
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(TORCH is None or TORCH.cuda is None, reason="torch is a CPU build"),
]
HERE = Path(__file__).parent
VERIFY = """
import json, sys
from pathlib import Path
from hubaoti.api import verify
from hubaoti.artifact.bundle import Bundle
from hubaoti.cli.verify import _serialize
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings
bundle, settings = Bundle.read(Path(sys.argv[1])), Settings(home=Path(sys.argv[2]))
Trust(settings.trust).add_artifact(bundle.manifest.digest)
found = verify(bundle.path, opens=True, settings=settings)
print(json.dumps([_serialize(each) for each in found]))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    assert TORCH is not None
    return build_stand_in(TORCH, tmp_path_factory.mktemp("home"))


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    paths = f"{HERE}:{HERE.parent}"
    env = merge_environment({**environment, "PYTHONPATH": paths})
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bundle(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a graph for sm 90."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    done = run(stand_in.environment([90]), HERE / "cuda_bundle.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def opened(environment: dict[str, str], bundle: Path, home: Path) -> dict[str, Any]:
    """What `verify --open` finds of a bundle, in a process of these devices."""
    done = run(environment, "-c", VERIFY, bundle, home)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads(done.stdout.splitlines()[-1])
    return dict(found)


def test_a_graph_opens_and_launches_and_nothing_is_compared_or_remembered(
    stand_in: StandIn, bundle: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    found = opened(stand_in.environment([90], log=log), bundle, tmp_path / "home")
    assert found["problem"] == ""
    (graph,) = found["graphs"]
    assert graph == {
        "graph": "root",
        "opened": True,
        "compared": False,
        "problem": "",
        "lasting": False,
        "device": "cuda:0",
    }
    assert "launch" in log.read_text().lower()
    with sqlite3.connect(tmp_path / "home/mirror/index.sqlite3") as index:
        assert index.execute("select count(*) from tested").fetchone() == (0,)
    index.close()


@pytest.mark.parametrize(("devices", "chosen"), [((120, 90), "cuda:1"), ((90, 120), "cuda:0")])
def test_of_two_kinds_of_gpus_the_one_that_fits_is_chosen(
    devices: tuple[int, ...], chosen: str, stand_in: StandIn, bundle: Path, tmp_path: Path
) -> None:
    found = opened(stand_in.environment(devices), bundle, tmp_path / "home")
    assert [graph["device"] for graph in found["graphs"]] == [chosen]


@pytest.mark.parametrize(
    ("devices", "visible", "words"),
    [
        ((80, 120), "0,1", "here is sm_80"),
        ((90, 90), "", "sees none"),
        ((120, 90), "0", "here is sm_120"),
    ],
)
def test_where_no_gpu_fits_that_is_said_and_nothing_is_opened(
    devices: tuple[int, ...],
    visible: str,
    words: str,
    stand_in: StandIn,
    bundle: Path,
    tmp_path: Path,
) -> None:
    environment = stand_in.environment(devices) | {"CUDA_VISIBLE_DEVICES": visible}
    found = opened(environment, bundle, tmp_path / "home")
    assert words in found["problem"]
    for graph in found["graphs"]:
        assert words in graph["problem"]
        assert not (graph["opened"] or graph["lasting"])


def test_too_little_of_a_gpu_s_memory_is_said_and_held_against_no_graph(
    stand_in: StandIn, bundle: Path, tmp_path: Path
) -> None:
    environment = stand_in.environment([90], memory=1 << 20)
    for _ in range(2):  # so nothing is remembered
        found = opened(environment, bundle, tmp_path / "home")
        (graph,) = found["graphs"]
        assert "out of memory" in graph["problem"]
        assert not graph["lasting"]
