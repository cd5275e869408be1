"""Misses: the dims that are proposed would have served the calls that were missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import hubaoti, inside
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.artifact.misses import (
    AskedDims,
    Missed,
    Misses,
    distance_to_bucket,
    propose_dims,
    read_misses,
)
from hubaoti.compiler.request import make_bucket_ranges, parse_dims
from hubaoti.errors import BadRequest
from hubaoti.settings import Settings

SIZES = st.dictionaries(
    st.sampled_from(["batch", "seq", "cache"]), st.integers(1, 300), min_size=1, max_size=3
)
DIMS = st.fixed_dictionaries(
    {
        name: st.tuples(st.integers(1, 64), st.integers(64, 200), st.sampled_from([1, 1, 2, 8]))
        for name in ("batch", "seq", "cache")
    }
)
BUCKETS = st.sampled_from([(), ({"seq": (1, 1)}, {"seq": (2, 64)}), ({"batch": (1, 2)},)])


def missed(*sizes: dict[str, int], reason: str = "shape", **asked: Any) -> Misses:
    """A file that tells of calls of these sizes."""
    calls = tuple(Missed(region="layers.0", reason=reason, sizes=each, calls=1) for each in sizes)
    return Misses(schema=1, build=AskedDims(**asked), missed=calls)


@given(DIMS, BUCKETS, st.lists(SIZES, min_size=1, max_size=4))
def test_every_size_that_was_missed_is_within_what_is_proposed(
    dims: Any, buckets: Any, sizes: list[dict[str, int]]
) -> None:
    found = propose_dims(missed(*sizes, dims=dims, buckets=buckets))
    assert found is not None
    for name, (low, high, step) in dims.items():  # and what was served before is served on
        assert found.dims[name][0] <= low
        assert found.dims[name][1] >= high
        assert step % found.dims[name][2] == 0
    for each in sizes:
        for name, size in each.items():
            low, high, step = found.dims[name]
            assert low <= size <= high
            assert size % step == 0
        assert not buckets or any(distance_to_bucket(bucket, each) == 0 for bucket in found.buckets)


@given(DIMS, BUCKETS, SIZES)
def test_what_is_proposed_can_be_asked_for(dims: Any, buckets: Any, sizes: dict[str, int]) -> None:
    found = propose_dims(missed(sizes, dims=dims, buckets=buckets))
    assert found is not None
    words = found.to_arguments()
    given = [words[at + 1] for at, word in enumerate(words) if word == "--dim"]
    assert {n: tuple(r.__reduce__() and (r.low, r.high, r.step)) for n, r in
            parse_dims(given).items()} == found.dims  # fmt: skip
    asked = [words[at + 1] for at, word in enumerate(words) if word == "--bucket"]
    assert len(make_bucket_ranges(asked)) == len(buckets)


def test_a_cache_is_made_as_long_as_what_is_filled() -> None:
    sizes = {"batch": 1, "seq": 100, "filled": 100, "cache": 64}
    found = propose_dims(missed(sizes, dims={"seq": (1, 40, 1), "cache": (16, 64, 1)}))
    assert found is not None
    assert found.dims == {"seq": (1, 100, 1), "cache": (16, 100, 1)}


def test_other_reasons_propose_nothing() -> None:
    assert propose_dims(missed({"batch": 9}, reason="dtype", dims={"batch": (1, 4, 1)})) is None


@pytest.mark.parametrize("text", [b"", b"[]", b'{"schema": 1}', b'{"schema": 1, "build": {'])
def test_a_file_that_is_none_of_misses_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "misses.json").write_bytes(text)
    with pytest.raises(BadRequest, match="no file of misses"):
        read_misses(tmp_path / "misses.json")


def test_the_command_prints_what_would_have_served(tmp_path: Path) -> None:
    file = tmp_path / "misses.json"
    file.write_text(
        json.dumps(
            {
                "schema": 1,
                "artifact": None,
                "compiled": 7,
                "eager": 3,
                "build": {
                    "dims": {"batch": [1, 4, 1], "seq": [1, 40, 1]},
                    "buckets": [{"seq": [1, 1]}, {"seq": [2, 40]}],
                    "model": "acme/llama",
                    "task": "generate",
                },
                "regions": {"layers.0": {"compiled": {"layers": 7}, "eager": {"shape": 3}}},
                "missed": [
                    {
                        "region": "layers.0",
                        "reason": "shape",
                        "sizes": {"batch": 6, "seq": 50},
                        "calls": 3,
                    }
                ],
            }
        )
    )
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    done = hubaoti(settings, "compile", "--from-misses", file)
    assert done.code == 0, done.err
    assert "3 calls not served (shape)" in done.out
    assert (
        "proposed: hubaoti compile acme/llama --task generate --dim batch=1:6 --dim seq=1:50 "
        "--bucket seq=1:1 --bucket seq=2:50 -o bundle"
    ) in done.out
    assert "hubaoti.compile(" not in done.out
    file.write_text(file.read_text().replace("acme/llama", "Net").replace("generate", "forward"))
    done = hubaoti(settings, "compile", "--from-misses", file)
    assert (
        "proposed: hubaoti.compile(module, 'bundle', calls=calls, shapes=shapes, "
        "dims={'batch': (1, 6, 1), 'seq': (1, 50, 1)}, buckets=[{'seq': (1, 1)}, {'seq': (2, 50)}])"
    ) in done.out
    assert "shapes names the sizes batch, seq of the inputs of Net" in done.out
    assert "hubaoti compile" not in done.out, "which finds no module from Python"
    done = hubaoti(settings, "compile", "acme/net", "--from-misses", file)
    assert "proposed: hubaoti compile acme/net --task forward --dim batch=1:6" in done.out
    assert "hubaoti.compile(" not in done.out
    done = hubaoti(settings, "compile", "--from-misses", file, "--json")
    assert json.loads(done.out)["dims"] == {"batch": [1, 6, 1], "seq": [1, 50, 1]}
    assert hubaoti(settings, "compile", "--from-misses", tmp_path / "none").code == 2
    assert "MODEL" in hubaoti(settings, "compile").err
    done = inside(settings, "compile", "--from-misses", file, "-o", "out", "--force", "-q")
    assert done.code == 2 and "reads nothing of --output, --force" in done.err and not done.out
