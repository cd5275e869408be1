"""Names and places: parse and str are inverses, everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import CUDA, make_bundle
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.artifact.repo_name import is_name
from hubaoti.errors import BadManifest, BadRequest
from hubaoti.hub.catalog import find_artifact_paths
from hubaoti.hub.layout import (
    ArtifactPath,
    RepoRef,
    artifact_path,
    is_revision,
    require_agreement,
)

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(is_name)
REVISIONS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,30}", fullmatch=True).filter(is_revision)
PLACE = "bfloat16-sdpa-int8wo+decode/torch2.13-cu130-sm90-x86_64_v3-linux"


@given(owner=NAMES, name=NAMES, revision=st.none() | REVISIONS)
def test_a_repo_is_read_as_it_is_written(owner: str, name: str, revision: str | None) -> None:
    ref = RepoRef(f"{owner}/{name}", revision)
    assert RepoRef.parse(str(ref)) == ref
    assert ref.owner == owner


@given(text=st.text(max_size=40) | st.from_regex(r"[a-z./@-]{1,20}", fullmatch=True))
def test_whatever_is_read_is_written_the_same(text: str) -> None:
    try:
        ref = RepoRef.parse(text)
    except BadRequest as why:
        assert why.hint
        return
    assert str(ref) == text
    assert ".." not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/b",
        "a/",
        "a/b@",
        "a /b",
        "../b",
        "a/..",
        "a/b.git",
        "a/b--c",
        "-a/b",
        "a/b@a..b",
        "a/b@/x",
        "a/b@x/",
        "a/b@x y",
        "a/b@-x",
        "a/b@x.lock",
        "a/b\n",
        "http://a/b",
        "a/" + "b" * 96,
        "a/b@v1@v2",
    ],
)
def test_what_names_no_repo_is_refused_before_the_network(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        RepoRef.parse(text)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_only_a_full_commit_id_is_a_pin() -> None:
    assert RepoRef("a/b", "c" * 40).commit == "c" * 40
    for revision in (None, "main", "c" * 39, "c" * 41, "C" * 40, "refs/pr/1"):
        assert RepoRef("a/b", revision).commit is None


def test_a_place_is_read_as_it_is_written() -> None:
    place = ArtifactPath.parse(PLACE)
    assert str(place) == PLACE
    assert place.manifest == f"{PLACE}/hubaoti.json"
    assert place.file("graphs/root.pt2") == f"{PLACE}/graphs/root.pt2"


@pytest.mark.parametrize("text", ["", "float32-sdpa", f"x/{PLACE}", PLACE.upper(), f"{PLACE}/x"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        ArtifactPath.parse(text)


def test_only_a_label_may_differ_from_the_manifest(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle", CUDA).manifest
    require_agreement(artifact_path(manifest), manifest)
    require_agreement(artifact_path(manifest, "mine"), manifest)
    for text in (
        "bfloat16-sdpa/torch2.13-cu130-sm90-x86_64_v3-linux",
        "float32-fa3/torch2.13-cu130-sm90-x86_64_v3-linux",
        "float32-sdpa-int8wo/torch2.13-cu130-sm90-x86_64_v3-linux",
        "float32-sdpa/torch2.13-cu130-sm80-x86_64_v3-linux",
        "float32-sdpa/torch2.13-cpu-x86_64_v3-linux",
    ):
        with pytest.raises(BadManifest, match="describes float32-sdpa/torch2.13-cu130-sm90"):
            require_agreement(ArtifactPath.parse(text), manifest)


def test_paths_that_are_no_artifacts_are_noted() -> None:
    paths = ["README.md", "hubaoti.json", f"{PLACE}/hubaoti.json", "a/b/hubaoti.json", PLACE + "/x"]
    places, notes = find_artifact_paths(paths)
    assert [str(place) for place in places] == [PLACE]
    assert [note.split(" ")[0] for note in notes] == ["a/b/hubaoti.json", "hubaoti.json"]


def test_a_digest_that_is_cut_short_is_told_where_all_of_it_stands() -> None:
    with pytest.raises(BadRequest, match="malformed revision") as caught:
        RepoRef.parse("acme/x@sha256:0724f5eaa019")
    assert "all 64 digits" in caught.value.hint and "mirror ls --json" in caught.value.hint
