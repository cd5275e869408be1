"""A host as a file describes it: whole as doctor prints it, or a part over this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import CUDA, make_gpu_host, make_host

from hubaoti.artifact.requirements import Requirements
from hubaoti.errors import BadRequest
from hubaoti.host.described import read_host
from hubaoti.host.match import MatchResult, judge

NEEDS = Requirements(**CUDA, glibc="2.17", driver="13.0", libraries=("libcudart.so.13",))  # type: ignore[arg-type]


def write(folder: Path, facts: Any) -> Path:
    path = folder / "host.json"
    path.write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return path


def test_a_whole_host_is_read_as_it_was_printed(tmp_path: Path) -> None:
    there = make_gpu_host(libraries=frozenset({"libc.so.6"}))
    found = read_host(write(tmp_path, there.to_dict()), make_host())
    assert found == there


def test_what_says_nothing_of_the_fit_is_of_here(tmp_path: Path) -> None:
    there = make_host(endpoint="http://elsewhere", offline=True, kernels=frozenset({"k"}))
    here = make_host()
    found = read_host(write(tmp_path, there.to_dict()), here)
    assert (found.endpoint, found.offline, found.kernels) == (here.endpoint, False, frozenset())


def test_a_part_is_laid_over_this_machine(tmp_path: Path) -> None:
    facts = {"torch": {"version": "2.13.0+cu130", "cuda": "13.0"}, "gpus": [{"sm": 90}]}
    found = read_host(write(tmp_path, facts), make_host())
    assert found.level == "x86_64_v3" and found.glibc == "2.36"
    assert judge(NEEDS, found).fit is MatchResult.EXACT, "nobody knows its libraries"
    assert judge(NEEDS, make_host()).fit is MatchResult.INCOMPATIBLE


def test_libraries_that_are_said_are_judged(tmp_path: Path) -> None:
    facts = make_gpu_host().to_dict()
    (refusal,) = judge(NEEDS, read_host(write(tmp_path, facts), make_host())).refusals
    assert refusal.need == "the libraries libcudart.so.13"


@pytest.mark.parametrize(
    "facts",
    [
        "",
        "[]",
        "{",
        {"gpu": []},
        {"cores": "two"},
        {"torch": {"cuda": "13.0"}},
        {"torch": {"version": 2}},
        {"torch": "2.13"},
        {"gpus": [{"name": "H100"}]},
        {"gpus": [7]},
        {"gpus": 7},
        {"libraries": [1]},
    ],
    ids=str,
)
def test_what_is_no_host_is_refused_with_its_path(tmp_path: Path, facts: Any) -> None:
    path = write(tmp_path, facts)
    with pytest.raises(BadRequest, match=f"{path} describes no host") as why:
        read_host(path, make_host())
    assert "doctor --json" in why.value.hint
    assert "mapping" not in str(why.value) and "not iterable" not in str(why.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No such file"):
        read_host(tmp_path / "none.json", make_host())
