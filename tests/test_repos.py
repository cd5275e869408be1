"""What a repo holds, without fetching it: its versions, and how every artifact fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import CPU, CUDA, make_bundle, make_gpu_host, make_host
from commands import inside
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti import api
from hubaoti.errors import BadRequest, NoArtifact
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
OTHER = PLACE.replace("cpu", "cu130-sm90")
OLD = PLACE.replace("2.13", "2.11")


@pytest.fixture
def held(tmp_path: Path, repo: str, settings: Settings) -> list[str]:
    """A repo of three artifacts and two versions; their commits, the newest first."""
    kinds = {"cpu": CPU, "cuda": CUDA, "old": {**CPU, "torch": "2.11.0+cpu"}}
    first, *others = (make_bundle(tmp_path / name, target=each) for name, each in kinds.items())
    one = push_bundles([first], Destination(RepoRef(repo), tag="v1.9.0"), settings)
    two = push_bundles(others, Destination(RepoRef(repo), tag="v1.10.0"), settings)
    HfApi(settings.endpoint, token=settings.token).create_tag(repo, tag="stable")
    return [two.commit, one.commit]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """The file of a machine with a GPU."""
    path = tmp_path / "host.json"
    path.write_text(json.dumps(make_gpu_host().to_dict()))
    return path


def test_versions_are_listed_the_newest_first_with_what_they_hold(
    repo: str, held: list[str], settings: Settings
) -> None:
    found = api.versions(repo, settings=settings)
    assert [(each.version, each.tag) for each in found] == [
        ("1.10.0", "v1.10.0"),
        ("1.9.0", "v1.9.0"),
    ]
    assert [each.commit for each in found] == held
    assert [each.artifacts for each in found] == [3, 1]


def test_only_the_newest_versions_are_looked_into(
    repo: str, held: list[str], settings: Settings, proxy: Proxy
) -> None:
    hub = HfApi(settings.endpoint, token=settings.token)
    for at in range(12):
        made = hub.upload_file(path_or_fileobj=b"%d" % at, path_in_repo="x", repo_id=repo).oid
        hub.create_tag(repo, tag=f"v2.{at}.0", revision=made)
    proxy.requests.clear()
    found = api.versions(repo, settings=settings)
    assert [each.artifacts for each in found] == [3] * 10 + [None] * 4
    assert len(proxy.requests) == 11


def test_every_artifact_is_explained_the_best_one_first(
    repo: str, held: list[str], settings: Settings
) -> None:
    found = api.explain_repo(repo, host=make_gpu_host(), settings=settings)
    assert found.commit == held[0]
    verdicts = {str(each.place): str(each.verdict.fit) for each in found.considered if each.verdict}
    assert [*verdicts.items()][:2] == [(OTHER, "exact"), (PLACE, "compatible")]
    assert verdicts[OLD] == "incompatible"
    assert not (settings.mirror / "artifacts").exists() or not [
        *(settings.mirror / "artifacts").iterdir()
    ]


def test_a_revision_is_explained_and_an_unreadable_artifact_is(
    repo: str, held: list[str], settings: Settings
) -> None:
    (only,) = api.explain_repo(f"{repo}@v1.9.0", host=make_host(), settings=settings).considered
    assert str(only.place) == PLACE
    hub = HfApi(settings.endpoint, token=settings.token)
    hub.upload_file(path_or_fileobj=b"{}", path_in_repo=f"{OLD}/hubaoti.json", repo_id=repo)
    found = api.explain_repo(repo, host=make_host(), settings=settings)
    (bad,) = (each for each in found.considered if each.error)
    assert str(bad.place) == OLD


def test_a_repo_without_artifacts_is_said(repo: str, settings: Settings) -> None:
    HfApi(settings.endpoint, token=settings.token).create_repo(repo)
    with pytest.raises(NoArtifact, match=f"{repo} at .* holds no artifact"):
        api.explain_repo(repo, settings=settings)


def test_the_commands_say_the_same(
    repo: str, held: list[str], settings: Settings, host: Path
) -> None:
    done = inside(settings, "versions", repo)
    assert done.code == 0 and done.out.index("v1.10.0") < done.out.index("v1.9.0")
    assert json.loads(inside(settings, "versions", repo, "--json").out)[0]["artifacts"] == 3
    done = inside(settings, "explain", repo, "--host", host)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{repo} at {held[0]}"
    assert lines[1].split() == ["exact", OTHER]
    assert f"refused       {OLD}" in lines
    assert any("needs torch 2.11.0+cpu; here is torch 2.13.0+cu130" in line for line in lines)
    host.write_text(json.dumps(replace(make_gpu_host(), level="x86_64_v4").to_dict()))
    blocks = inside(settings, "explain", repo, "--host", host).out.split("\nrefused")
    note = "needs a CPU of level x86_64_v3; here is x86_64_v4"
    assert note in blocks[0] and len(blocks) > 1
    assert not any(note in each for each in blocks[1:]), "which is no reason against it"
    facts = json.loads(inside(settings, "explain", repo, "--host", host, "--json").out)
    (old,) = (each["verdict"] for each in facts["artifacts"] if each["path"] == OLD)
    assert any(each["need"] in note for each in old["notes"])
    facts = json.loads(inside(settings, "explain", f"{repo}@v1", "--host", host, "--json").out)
    assert [each["verdict"]["fit"] for each in facts["artifacts"]][0] == "compatible"
    assert len(facts["artifacts"]) == 3


def test_what_is_for_another_host_is_pulled_for_it_and_not_taken_for_this_one(
    repo: str, held: list[str], settings: Settings, host: Path
) -> None:
    words = ("--trust", "--json", "--host")
    done = inside(settings, "pull", repo, *words, host)
    assert done.code == 0, done.err
    assert json.loads(done.out)["path"] == OTHER
    host.write_text(json.dumps(make_host().to_dict()))
    found = json.loads(inside(settings, "pull", repo, *words, host).out)
    assert found["path"] == PLACE and not found["from_mirror"]
    host.write_text("{}x")
    assert inside(settings, "pull", repo, *words, host).code == BadRequest.exit_code
