"""What a manifest may claim here: how far off its answers may be, and what they may take."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from bundles import changed, make_bundle, put_trusted

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Golden, Graph
from hubaoti.errors import LimitsExceeded
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.limits import Limits
from hubaoti.runtime.first_open import OpenHistory, find_untried, name_tested
from hubaoti.runtime.golden import GOLDEN_TOLERANCE
from hubaoti.settings import Settings

CPU = torch.device("cpu")
MODEST = Golden(dims={}, tolerances={"root/out": 1e-3}, memory=1 << 20)


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    """A graph that claims nothing unusual."""
    (graph,) = make_bundle(tmp_path / "modest").manifest.graphs
    return claim(graph, MODEST)


def claim(graph: Graph, golden: Golden | None) -> Graph:
    return msgspec.structs.replace(graph, golden=golden)


def replace(**fields: object) -> Golden:
    return msgspec.structs.replace(MODEST, **fields)


def test_what_hubaoti_itself_claims_is_within_the_limits(graph: Graph) -> None:
    tolerances = {f"root/{dtype}": most for dtype, most in GOLDEN_TOLERANCE.items()}
    Limits().require([graph, claim(graph, replace(tolerances=tolerances))])


@pytest.mark.parametrize(
    ("golden", "why"),
    [
        (None, "comes without golden answers"),
        (replace(tolerances={"root/out": 1e300}), "may be off by 1.0e[+]300"),
        (replace(tolerances={"root/a": 1e-3, "root/out": 0.2}), "root/out of graph root may be"),
        (replace(tolerances={"root/out": float("inf")}), "may be off by inf"),
        (replace(tolerances={"root/out": float("nan")}), "may be off by nan"),
        (replace(memory=1 << 40), "take 1099.5 GB, 34.4 GB are allowed"),
    ],
)
def test_what_claims_more_is_refused_unless_that_is_allowed(
    golden: Golden | None, why: str, graph: Graph
) -> None:
    with pytest.raises(LimitsExceeded, match=why) as caught:
        Limits().require([graph, claim(graph, golden)])
    assert "[limits]" in caught.value.hint
    if "nan" not in why:
        Limits(float("inf"), 1 << 41, True).require([claim(graph, golden)])


def test_all_that_is_too_much_is_named(graph: Graph) -> None:
    golden = replace(tolerances={"root/a": 1.0, "root/b": 2.0}, memory=1 << 40)
    with pytest.raises(LimitsExceeded) as caught:
        Limits().require([claim(graph, golden)])
    assert all(word in str(caught.value) for word in ("root/a", "root/b", "1099.5 GB"))


# Where it is asked


def put(bundle: Bundle, golden: Golden | None, mirror: Mirror) -> Artifact:
    """An artifact whose one graph claims this, of somebody who is trusted."""
    graphs = tuple(claim(graph, golden) for graph in bundle.manifest.graphs)
    return put_trusted(changed(bundle, graphs=graphs), mirror)


@pytest.mark.parametrize("golden", [None, replace(tolerances={"root/out": 1e300})])
def test_nobody_opens_what_claims_too_much_whatever_was_seen_of_it_before(
    golden: Golden | None, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    with Mirror.open(settings.mirror) as mirror:
        artifact = put(make_bundle(tmp_path / "bundle"), golden, mirror)
        history = OpenHistory.on(mirror, CPU, (), artifact)
        for _ in range(2):
            with pytest.raises(LimitsExceeded):
                find_untried(artifact, history)
            for graph in artifact.manifest.graphs:  # an older hubaoti opened it
                mirror.index.record_tested(name_tested(graph, artifact), history.hosts[-1], "")
        allow = "[limits]\ntolerance = 1e301\nwithout_golden = true\n"
        with mirror.trust.path.open("a") as file:
            file.write(allow)
        assert find_untried(artifact, history) == []


def test_what_was_built_here_may_claim_anything(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    with Mirror.open(settings.mirror) as mirror:
        artifact = put(make_bundle(tmp_path / "bundle"), None, mirror)
        mirror.index.record_built(artifact.manifest)
        assert find_untried(artifact, OpenHistory.on(mirror, CPU, (), artifact))
