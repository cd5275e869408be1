"""Graphs serve what their build was asked for, and no manifest claims more for them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import make_bundle
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hubaoti.artifact.asked_sizes import find_size_problems
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import parse_manifest
from hubaoti.artifact.schema import Build, Cache, Graph, Input
from hubaoti.compiler.dims import DimRanges, limit_dims
from hubaoti.compiler.graph_plans import Form, GraphPlan, add_unmasked, split_into_buckets
from hubaoti.compiler.regions import Group
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature, specialize_full_window
from hubaoti.errors import BadDim, BadManifest


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").manifest.graphs[0]


def build_of(dims: dict[str, Any], *buckets: dict[str, Any]) -> Build:
    return Build(
        regions="none", dims=dims, dtype="float32", attention="sdpa", buckets=tuple(buckets)
    )


TEXTS = {"batch": (1, 32, 1), "seq": (8, 512, 8)}
DECODER = {"batch": (1, 4, 1), "seq": (1, 40, 1), "cache": (64, 64, 1)}


@pytest.mark.parametrize(
    ("dims", "buckets", "bounds", "steps", "said"),
    [
        (TEXTS, (), {"seq": (8, 4096)}, {"seq": 8}, "seq goes from 8 to 4096, its build was asked"),
        (TEXTS, (), {"batch": (0, 32)}, {}, "batch goes from 0 to 32, its build was asked for 1"),
        (TEXTS, (), {"seq": (8, 512)}, {}, "seq takes sizes that are no multiples of 8"),
        (TEXTS, (), {"seq": (8, 512)}, {"seq": 4}, "seq takes sizes that are no multiples of 8"),
        (TEXTS, (), {"length": (8, 512)}, {}, "dim length is none of its build"),
        (
            TEXTS,
            ({"seq": (8, 64)}, {"seq": (72, 512)}),
            {"seq": (8, 512)},
            {"seq": 8},
            "its bounds are in none of the buckets",
        ),
        (DECODER, (), {"cache": (62, 64)}, {}, "cache goes from 62 to 64"),
        (DECODER, (), {"cache": (64, 65)}, {}, "cache goes from 64 to 65"),
        (DECODER, (), {"filled": (1, 65)}, {}, "filled goes from 1 to 65"),
        ({"seq": (3, 2, 1)}, (), {}, {}, "build: dim seq goes from 3 to 2 in steps of 1"),
        ({"seq": (1, 2, 0)}, (), {}, {}, "build: dim seq goes from 1 to 2 in steps of 0"),
        (TEXTS, ({"seq": (9, 2)},), {}, {}, "build: bucket 1, seq goes from 9 to 2"),
    ],
)
def test_what_was_not_asked_for_is_refused(
    graph: Graph, dims: Any, buckets: Any, bounds: Any, steps: Any, said: str
) -> None:
    claimed = msgspec.structs.replace(graph, bounds=bounds, steps=steps)
    problems = find_size_problems(build_of(dims, *buckets), (claimed,))
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    ("dims", "buckets", "bounds", "steps"),
    [
        (TEXTS, (), {"batch": (2, 16), "seq": (16, 512)}, {"seq": 16}),
        (TEXTS, (), {"seq": (64, 64)}, {}),
        (TEXTS, ({"seq": (8, 64)}, {"batch": (1, 1)}), {"batch": (1, 32), "seq": (8, 64)}, {}),
        (DECODER, (), {"seq": (1, 1), "filled": (1, 64), "cache": (63, 64)}, {}),
        (DECODER, ({"seq": (1, 1)}, {"seq": (2, 40)}), {"batch": (1, 4)}, {}),
        ({}, (), {}, {}),
    ],
)
def test_less_than_was_asked_for_is_read(
    graph: Graph, dims: Any, buckets: Any, bounds: Any, steps: Any
) -> None:
    steps = steps or ({"seq": 8} if dims is TEXTS and "seq" in bounds else {})
    claimed = msgspec.structs.replace(graph, bounds=bounds, steps=steps)
    assert find_size_problems(build_of(dims, *buckets), (claimed,)) == []


def test_a_manifest_whose_graph_claims_more_is_refused(tmp_path: Path) -> None:
    bundle: Bundle = make_bundle(tmp_path / "bundle")
    graphs = (msgspec.structs.replace(bundle.manifest.graphs[0], bounds={"batch": (1, 4096)}),)
    text = msgspec.structs.replace(bundle.manifest, graphs=graphs).to_json()
    with pytest.raises(BadManifest, match="batch goes from 1 to 4096, its build was asked for 1 "):
        parse_manifest(text, "here")


# What the compiler makes


def ranges(most: int, steps: tuple[int, ...] = (1,)) -> st.SearchStrategy[Range]:
    return st.builds(
        lambda low, more, step: Range(low * step, (low + more) * step, step),
        st.integers(1, most),
        st.integers(0, most),
        st.sampled_from(steps),
    )


def face_of() -> CallSignature:
    """How a decoder's block is called, over a static cache."""
    inputs = (
        Input(name="mask", dtype="bool", shape=("batch", 1, "seq", "filled"), values="mask"),
        *(
            Input(
                name=name,
                dtype="float32",
                shape=("batch", 2, "cache", 8),
                values="real",
                mutated=True,
            )
            for name in ("keys", "values")
        ),
        Input(name="position", dtype="int64", shape=("seq",), values="position"),
    )
    return CallSignature({}, inputs, Cache(kind="static", keys=1, values=2, position=3))


def entry_of(plan: GraphPlan, graph: Graph) -> Graph:
    return msgspec.structs.replace(
        graph,
        id=plan.id,
        bounds={name: (sizes.low, sizes.high) for name, sizes in plan.bounds.items()},
        steps={name: sizes.step for name, sizes in plan.bounds.items() if sizes.step > 1},
        cache=plan.face.cache,
    )


@st.composite
def requests(draw: st.DrawFn) -> tuple[DimRanges, list[DimRanges]]:
    """Dims of a decoder, and buckets over some of them."""
    asked = {"seq": draw(ranges(40, (1, 4))), "cache": draw(ranges(60, (1, 8)))}
    default = {"batch": Range(1, 32), "seq": Range(1, 64), "cache": Range(16, 64)}
    try:
        dims = limit_dims(asked, default, None)
    except BadDim:
        assume(False)
    name = draw(st.sampled_from(["batch", "seq", "cache"]))
    cuts = sorted(draw(st.sets(st.sampled_from([*dims[name].sizes]), max_size=2)))
    step = dims[name].step
    starts = sorted({dims[name].low, *(cut + step for cut in cuts if cut < dims[name].high)})
    ends = [*(start - step for start in starts[1:]), dims[name].high]
    buckets = [{name: Range(low, high)} for low, high in zip(starts, ends, strict=True)]
    return dims, draw(st.sampled_from([[], buckets]))


@settings(max_examples=300)
@given(requests(), st.none() | st.integers(2, 60))
def test_what_the_compiler_plans_was_asked_for(
    graph: Graph, asked: tuple[DimRanges, list[DimRanges]], window: int | None
) -> None:
    dims, buckets = asked
    window = None if window is None or dims["cache"].high < window else window
    face, group = face_of(), Group("layers", ("layers.0",))
    faces = (
        {"": face} if window is None else {"": face, "-full": specialize_full_window(face, window)}
    )
    forms = [Form(group, suffix, each, window, True) for suffix, each in faces.items()]
    try:
        plans = [plan for form in forms for plan in split_into_buckets(form, dims, buckets)]
    except BadDim:
        assume(False)
    plans = [*itertools.chain.from_iterable(map(add_unmasked, plans))]
    build = build_of(
        {name: (sizes.low, sizes.high, sizes.step) for name, sizes in dims.items()},
        *({name: (b.low, b.high) for name, b in bucket.items()} for bucket in buckets),
    )
    assert find_size_problems(build, tuple(entry_of(plan, graph) for plan in plans)) == []
