"""The road of a graph for GPUs, without one: compiled, pushed, pulled, opened, called, released.

Under the stand-in all host code runs and nothing is computed. What a graph answers was looked at
before anybody got it, by interpretation, and stands in its manifest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_models import MODELS, SMS
from torch import nn
from under_stand_in import ask, make_stand_in

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler import gpu_build
from hubaoti.compiler.interpreted import (
    INTERPRETED_TOLERANCE,
    Interpretation,
    InterpretRequest,
    interpret,
)
from hubaoti.compiler.stand_in import StandIn
from hubaoti.host.match import judge_gpus
from hubaoti.host.probe import Gpu, find_torch
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

pytestmark = pytest.mark.cuda
_TORCH = find_torch([])
_UNLOADS = _TORCH is not None and _TORCH.version >= "2.13"  # before, a library stays for ever

# Pull, attach, two calls, one that is captured, detach; `NAME` and `REPO` are given.
ROAD = """
    import os, gc, torch, hubaoti
    from cuda_models import MODELS, capture_served, iterate_sizes
    from hubaoti.settings import Settings
    kind, settings, steps = MODELS[os.environ["NAME"]], Settings.from_env(), []

    def count_after_all():
        gc.collect(); torch.cuda.synchronize(); torch.cuda.empty_cache()
        return count_live()

    def take_road():
        model = kind.make_on("cuda:0")
        capture_served(model, kind)  # what torch keeps for ever is there from here on
        pulled = hubaoti.pull(os.environ["REPO"], trust=True, settings=settings)
        attachment = hubaoti.attach(model, pulled, settings=settings, progress=steps.append)
        shapes = [list(kind.call(model, *sizes).shape) for sizes in iterate_sizes()]
        served = attachment.stats()
        capture_served(model, kind)
        captured = attachment.stats()
        attachment.detach()
        del attachment
        counts = []  # what was captured stays, so that a replay finds its kernels
        for _ in range(2):
            again = hubaoti.attach(model, pulled, settings=settings, progress=steps.append)
            kind.call(model, 1, 5)
            again.detach()
            del again
            counts.append(count_after_all())
        left = {kind: counts[1][kind] - counts[0][kind] for kind in counts[0]}
        return dict(variant=str(pulled.place), shapes=shapes, served=served, captured=captured,
                    left=left, steps=steps)

    say(**take_road())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda") / "home"


@pytest.fixture(scope="module")
def stand_in(home: Path) -> StandIn:
    return make_stand_in(home)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("bert", marks=pytest.mark.newest),
        "qwen2",
        pytest.param("flux", marks=pytest.mark.slow),
    ],
)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a model; all tests of one come together, so that it is compiled once."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def bundles(name: str, home: Path) -> tuple[Bundle, ...]:
    """A model compiled for each capability, by one command."""
    settings = Settings(home=home, endpoint="http://127.0.0.1:9")
    return MODELS[name].compile(home.parent / name, settings)


@pytest.fixture(scope="module")
def repo(name: str, bundles: tuple[Bundle, ...], endpoint: Endpoint, home: Path) -> str:
    """All of its bundles, published in one commit."""
    settings = Settings(home=home, endpoint=endpoint.url, token=endpoint.token)
    commit = hubaoti.push(bundles, f"acme/{name}-cuda", tag="v1", settings=settings)
    assert len(commit.artifacts) == len(MODELS[name].sms)
    return f"{commit.repo}@v1"


def test_one_command_makes_a_bundle_for_each_capability(
    name: str, bundles: tuple[Bundle, ...]
) -> None:
    assert [bundle.manifest.target.sm for bundle in bundles] == [*MODELS[name].sms]
    assert [bundle.path.name for bundle in bundles] == [str(b.manifest.variant) for b in bundles]
    for bundle in bundles:
        bundle.check()
        for graph in bundle.manifest.graphs:
            assert graph.device_code.capability == bundle.manifest.target.sm
            assert graph.device_code.kernels > 0
    assert len({bundle.manifest.key for bundle in bundles}) == len(bundles)
    compared = [[c for c in b.manifest.checks if c.where == "cpu"] for b in bundles]
    assert compared[0] and all(each == compared[0] for each in compared), "compared once"


@pytest.mark.slow
def test_packages_that_differ_in_machine_code_alone_are_interpreted_once(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def interpret_less(request: InterpretRequest, stand_in: StandIn, sm: int) -> Interpretation:
        asked.append(sm)
        return interpret(request, stand_in, sm)

    monkeypatch.setattr(gpu_build, "interpret", interpret_less)
    small = nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval()
    with torch.no_grad(), hubaoti.capture(small) as calls:
        for rows in (3, 5):
            small(torch.randn(rows, 8))
    settings = Settings(home=home, endpoint="http://127.0.0.1:9")
    folder = home.parent / "alike"
    found = hubaoti.compile_for(small, SMS, folder, calls=calls, jobs=1, settings=settings)
    checks = [[c for c in each.manifest.checks if c.where == "interpreted"] for each in found]
    assert len(asked) == 1
    assert checks[0]
    assert checks[0] == checks[1] == checks[2]
    assert len({each.manifest.graphs[0].device_code.capability for each in found}) == len(SMS)


def test_answers_were_looked_at_at_three_sizes_and_more(bundles: tuple[Bundle, ...]) -> None:
    for manifest in (bundle.manifest for bundle in bundles):
        checks = [check for check in manifest.checks if check.where == "interpreted"]
        sizes = Counter(check.graph for check in checks)
        assert all(sizes[graph.id] >= 3 for graph in manifest.graphs), manifest.graphs
        worst = max(check.max_relative for check in checks)
        assert worst <= INTERPRETED_TOLERANCE[manifest.build.dtype]
        assert not any(graph.not_interpreted for graph in manifest.graphs)


def test_a_graph_is_pulled_opened_called_and_given_back(
    name: str, repo: str, stand_in: StandIn, endpoint: Endpoint, tmp_path: Path
) -> None:
    for sm in MODELS[name].sms:
        take_road(sm, name, repo, stand_in, endpoint, tmp_path / f"{sm}")


def take_road(
    sm: int, name: str, repo: str, stand_in: StandIn, endpoint: Endpoint, tmp_path: Path
) -> None:
    """Pull, attach, call, capture and detach, on a GPU of a capability."""
    env = {"NAME": name, "REPO": repo, "HUBAOTI_HOME": str(tmp_path / "home")}
    env |= {"HF_ENDPOINT": endpoint.url, "HF_TOKEN": endpoint.token}
    found = ask(stand_in, ROAD, sm, env=env)
    assert f"sm{sm}" in found["variant"]
    for path in MODELS[name].served:
        region = found["served"]["regions"][path]
        assert sum(region["compiled"].values()) >= 2 and not region["eager"], region
        captured = found["captured"]["regions"][path]
        more = sum(captured["compiled"].values()) - sum(region["compiled"].values())
        # What each part is given is seen in a call before, which the last word is of.
        assert not captured["eager"] and more > 1, captured
    # The device computes nothing, so that nothing is believed of it: each attach opens it first.
    assert found["steps"].count("first open") == 3
    left = found["left"]
    if not _UNLOADS:
        left |= {"module": 0, "memory": 0}
    assert not any(left.values()), left


def test_what_is_captured_is_ours_and_asks_no_event(
    name: str, repo: str, stand_in: StandIn, endpoint: Endpoint, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    env = {"NAME": name, "REPO": repo, "HUBAOTI_HOME": str(tmp_path / "home")}
    env |= {"HF_ENDPOINT": endpoint.url, "HF_TOKEN": endpoint.token, "STAND_IN_LOG": str(log)}
    ask(stand_in, ROAD, 90, env=env)
    lines = log.read_text().splitlines()
    begun = [place for place, line in enumerate(lines) if line == "capture begins"]
    ended = [place for place, line in enumerate(lines) if line.startswith("capture of")]
    own, ours = (lines[first:last] for first, last in zip(begun, ended, strict=True))
    launched = [line for line in ours if line.startswith("launch triton_")]
    assert launched and not any(line.startswith("launch triton_") for line in own)
    assert not [line for line in ours if line.startswith("event")]
    assert "event recorded" in lines, "the log tells of them"


# Attach a bundle to a model on a device, and call it: what came of it.
ATTACH = """
    import os, torch, hubaoti
    from pathlib import Path
    from cuda_models import MODELS
    from hubaoti.errors import HubaotiError
    from hubaoti.settings import Settings
    kind, device = MODELS["bert"], os.environ["DEVICE"]
    model, found = kind.make_on(device), {}
    os.environ["STAND_IN_MEMORY"] = os.environ.get("LEFT", "")  # of the child that opens first
    try:
        bundle = Path(os.environ["BUNDLE"])
        attachment = hubaoti.attach(model, bundle, trust=True, settings=Settings.from_env())
        found["places"] = sorted({str(graph.device) for graph in attachment.graphs})
    except HubaotiError as error:
        found |= dict(kind=type(error).__name__, message=str(error), hint=error.hint)
    found["shape"] = list(kind.call(model, 4, 40).shape)
    if "places" in found: found["stats"] = attachment.stats()
    say(**found)
"""


@pytest.fixture(scope="module")
def encoder(home: Path) -> dict[int, Bundle]:
    """The encoder's bundles by their capabilities; what is built already is found."""
    settings = Settings(home=home, endpoint="http://127.0.0.1:9")
    found = MODELS["bert"].compile(home.parent / "bert", settings)
    return {bundle.manifest.target.sm or 0: bundle for bundle in found}


def attach(
    stand_in: StandIn, home: Path, bundle: Bundle, *capabilities: int, **env: str
) -> dict[str, Any]:
    """What comes of attaching a bundle where there are GPUs of these capabilities."""
    around = {"BUNDLE": str(bundle.path), "DEVICE": "cuda:0", "HUBAOTI_HOME": str(home), **env}
    around |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    return ask(stand_in, ATTACH, *capabilities, env=around)


def test_what_is_compiled_again_is_found(encoder: dict[int, Bundle]) -> None:
    assert [*encoder] == [*SMS]


def test_a_graph_for_another_gpu_is_refused_and_the_model_answers(
    stand_in: StandIn, home: Path, encoder: dict[int, Bundle]
) -> None:
    found = attach(stand_in, home, encoder[90], 86)
    assert found["kind"] == "NoMatch" and found["shape"] == [4, 40, 64]
    assert "sm_90" in found["message"] and "sm_86" in found["message"], found


def test_of_two_gpus_the_one_on_which_the_model_is_counts(
    stand_in: StandIn, home: Path, encoder: dict[int, Bundle]
) -> None:
    found = attach(stand_in, home, encoder[80], 90, 80, DEVICE="cuda:1")
    assert found["places"] == ["cuda:1"] and found["stats"]["eager"] == 0
    found = attach(stand_in, home, encoder[80], 90, 80, DEVICE="cuda:0")
    assert found["kind"] == "NoMatch" and "sm_90" in found["message"]


def test_a_gpu_whose_memory_others_have_is_told_of(
    stand_in: StandIn, home: Path, encoder: dict[int, Bundle]
) -> None:
    found = attach(stand_in, home, encoder[90], 90, LEFT=f"{1 << 20}")
    assert found["kind"] == "NotEnoughMemory" and found["shape"] == [4, 40, 64]
    assert "out of memory" in found["message"] and "free some" in found["hint"]


def test_without_a_gpu_there_is_none_that_fits(
    stand_in: StandIn, home: Path, encoder: dict[int, Bundle]
) -> None:
    found = attach(stand_in, home, encoder[90], 90, DEVICE="cpu", CUDA_VISIBLE_DEVICES="")
    assert found["kind"] in {"NoMatch", "BadRequest"} and found["shape"] == [4, 40, 64]


def test_more_shared_memory_than_the_gpu_has_is_refused(encoder: dict[int, Bundle]) -> None:
    manifest = encoder[80].manifest
    shared = max(graph.device_code.shared_memory for graph in manifest.graphs)
    assert manifest.requires.shared_memory == shared
    gpu = Gpu("a GPU", 80, 1 << 30)
    assert not judge_gpus(manifest.requires, [gpu]).refusals
    greedy = replace(manifest.requires, shared_memory=164 << 10)
    (refusal,) = judge_gpus(greedy, [gpu]).refusals
    assert "shared memory" in refusal.need and "sm_80" in refusal.have


def test_an_older_gpu_is_told_what_there_is(
    stand_in: StandIn, home: Path, encoder: dict[int, Bundle], endpoint: Endpoint
) -> None:
    settings = Settings(home=home, endpoint=endpoint.url, token=endpoint.token)
    commit = hubaoti.push([*encoder.values()], "acme/encoder-cuda", settings=settings)
    code = """
        import os, hubaoti
        from hubaoti.errors import NoMatch
        from hubaoti.settings import Settings
        try: hubaoti.pull(os.environ["REPO"], trust=True, settings=Settings.from_env())
        except NoMatch as error: say(message=str(error), hint=error.hint)
    """
    env = {"REPO": commit.repo, "HUBAOTI_HOME": str(home), "HF_ENDPOINT": endpoint.url}
    found = ask(stand_in, code, 75, env=env | {"HF_TOKEN": endpoint.token})
    for sm in SMS:
        assert f"sm{sm}" in found["message"] or f"sm_{sm}" in found["message"], found
