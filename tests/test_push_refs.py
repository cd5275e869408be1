"""The repo and the tag of a push: made when they are needed, moved when it is said, taken back."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from bundles import CPU, CUDA, make_bundle
from commands import inside
from huggingface_hub import HfApi
from proxies import DROPPED, Proxy
from test_server_fleet import page

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.errors import BadRequest, Conflict, HubaotiError, HubUnreachable
from hubaoti.hub import retry
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Commit, Destination, push_bundles
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"


@pytest.fixture
def api(settings: Settings) -> HfApi:
    return HfApi(settings.endpoint, token=settings.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


def ship(bundle: Bundle, repo: str, settings: Settings, **to: str | bool) -> Commit:
    return push_bundles([bundle], Destination(RepoRef(repo), **to), settings)  # type: ignore[arg-type]


def tags(api: HfApi, repo: str) -> dict[str, str]:
    return {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}


# Tags


def test_a_tag_moves_where_it_is_said(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    first = ship(bundle, repo, settings, tag="v1.2.0")
    other = make_bundle(tmp_path / "other", target=CUDA)
    with pytest.raises(
        Conflict, match=f"v1.2.0 of {repo} names another commit, {first.commit}"
    ) as c:
        ship(other, repo, settings, tag="v1.2.0")
    assert "--move-tag" in c.value.hint
    assert tags(api, repo) == {"v1.2.0": first.commit}
    second = ship(other, repo, settings, tag="v1.2.0", move_tag=True)
    assert second.commit != first.commit
    assert tags(api, repo) == {"v1.2.0": second.commit}


def test_where_a_tag_moved_from_and_to_is_said_and_what_a_push_links_to_is_there(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, endpoint: Endpoint
) -> None:
    first = ship(bundle, repo, settings, tag="v1")
    make_bundle(tmp_path / "other", target=CUDA)
    words = ("--as-is", tmp_path / "other", repo, "--tag", "v1", "--move-tag")
    done = inside(settings, "push", *words)
    moved, link = done.out.splitlines()[-2:]
    commit = link.rpartition("/")[2]
    assert moved == f"  moved v1 from {first.commit} to {commit}"
    status, _, headers = page(endpoint, f"/{repo}/commit/{commit}")
    assert (status, headers["location"]) == (307, f"{endpoint.url}/#model/{repo}")
    assert page(endpoint, f"/{repo}/commit/{'0' * 40}")[0] == 404
    assert f'id="model/{repo}"' in page(endpoint)[1]
    assert "  moved" not in inside(settings, "push", *words).out


def test_a_tag_that_could_not_be_moved_stays_where_it_was(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi, proxy: Proxy
) -> None:
    first = ship(bundle, repo, settings, tag="v1")
    other = make_bundle(tmp_path / "other", target=CUDA)
    proxy.matching, proxy.answers = "/tag/", [(200, {}), (403, {})]  # it is removed, and not made
    with pytest.raises(HubaotiError):
        ship(other, repo, settings, tag="v1", move_tag=True)
    assert tags(api, repo) == {"v1": first.commit}


def test_a_tag_to_be_moved_is_named() -> None:
    with pytest.raises(BadRequest, match="none is named") as why:
        Destination(RepoRef("acme/x"), move_tag=True)
    assert "--tag" in why.value.hint


@pytest.mark.parametrize("tag", ["refs/heads/x", "refs/tags/v1", "HEAD", "main", "deadbeef" * 5])
def test_a_tag_that_reads_as_something_else_is_refused_before_anything_is_asked(
    tag: str, bundle: Bundle, repo: str, settings: Settings, proxy: Proxy
) -> None:
    done = inside(settings, "push", bundle.path, repo, "--tag", tag, "--as-is")
    assert done.code == BadRequest.exit_code, done
    assert f"the tag {tag} reads as" in done.err and "v1" in done.err
    assert not proxy.requests


@pytest.mark.parametrize("move", [False, True])
def test_a_tag_is_not_called_as_a_branch(
    move: bool, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    before = api.create_repo(repo) and api.repo_info(repo).sha
    api.create_branch(repo, branch="stable")
    with pytest.raises(Conflict, match="has a branch stable"):
        ship(bundle, repo, settings, tag="stable", move_tag=move)
    assert tags(api, repo) == {} and api.repo_info(repo).sha == before


def test_a_push_whose_tag_fails_removes_the_repo_that_it_made(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi, proxy: Proxy
) -> None:
    proxy.matching, proxy.answers = "/tag/", [(400, {"X-Error-Message": "no such tag is wanted"})]
    with pytest.raises(HubaotiError, match="no such tag is wanted") as why:
        ship(bundle, repo, settings, tag="v1")
    assert "the same push" not in why.value.hint
    assert not api.repo_exists(repo)
    ship(bundle, repo, settings, tag="v1")
    assert tags(api, repo) == {"v1": str(api.repo_info(repo).sha)}


def test_a_push_whose_tag_fails_says_which_commit_is_there_and_sets_the_tag_when_repeated(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi, proxy: Proxy
) -> None:
    api.create_repo(repo)
    proxy.matching, proxy.answers = "/tag/", [(403, {})]
    with pytest.raises(HubaotiError) as why:
        ship(bundle, repo, settings, tag="v1")
    head = str(api.repo_info(repo).sha)
    assert f"has the commit {head} now, and the tag v1 is not set" in str(why.value)
    assert "the same push again" in why.value.hint
    again = ship(bundle, repo, settings, tag="v1")
    assert (again.commit, again.created, tags(api, repo)) == (head, False, {"v1": head})


# Another artifact at the path


def test_an_artifact_of_another_key_is_replaced_where_it_is_said(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    ship(make_bundle(tmp_path / "two", graphs=("root", "step")), repo, settings)
    other = make_bundle(tmp_path / "other", mode="max-autotune")
    with pytest.raises(Conflict, match="holds another artifact at") as why:
        ship(other, repo, settings)
    assert "--replace" in why.value.hint
    made = ship(other, repo, settings, replace=True)
    assert made.created and made.path == PLACE
    there = {path for path in api.list_repo_files(repo) if path.startswith(PLACE)}
    files = {file.path for file in other.manifest.all_files()} | {FILENAME}
    assert there == {f"{PLACE}/{path}" for path in files}
    assert not ship(other, repo, settings, replace=True).created, "it is there already"


def test_what_cannot_be_read_is_replaced_where_it_is_said(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    api.create_repo(repo)
    path = f"{PLACE}/{FILENAME}"
    api.upload_file(path_or_fileobj=b"{}", path_in_repo=path, repo_id=repo)
    assert ship(bundle, repo, settings, replace=True).created
    assert not ship(bundle, repo, settings).created


def test_the_command_has_the_words_for_both(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi
) -> None:
    assert inside(settings, "push", bundle.path, repo, "--tag", "v1", "--as-is").code == 0
    other = make_bundle(tmp_path / "other", mode="max-autotune")
    words = ("push", other.path, repo, "--tag", "v1", "--as-is")
    assert inside(settings, *words).code == Conflict.exit_code
    assert inside(settings, *words, "--replace").code == Conflict.exit_code
    assert inside(settings, *words, "--replace", "--move-tag").code == 0
    assert tags(api, repo) == {"v1": str(api.repo_info(repo).sha)}


# The repo


def test_a_push_that_fails_removes_the_repo_that_it_made(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi, proxy: Proxy
) -> None:
    proxy.matching, proxy.answers = "/commit/", [DROPPED] * 100
    with pytest.raises(HubUnreachable):
        ship(bundle, repo, settings)
    assert not api.repo_exists(repo)


def test_a_push_that_fails_leaves_a_repo_that_was_there(
    bundle: Bundle, repo: str, settings: Settings, api: HfApi, proxy: Proxy
) -> None:
    api.create_repo(repo)
    proxy.matching, proxy.answers = "/commit/", [DROPPED] * 100
    with pytest.raises(HubUnreachable):
        ship(bundle, repo, settings)
    assert api.repo_exists(repo)


def test_a_push_that_fails_leaves_what_others_pushed_to_its_repo(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, api: HfApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other = make_bundle(tmp_path / "other", target=CUDA)
    commit = HubClient.commit

    def push_between(self: HubClient, *args: object) -> None:
        monkeypatch.setattr(HubClient, "commit", commit)
        ship(other, repo, settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(HubClient, "commit", push_between)
    with pytest.raises(KeyboardInterrupt):
        ship(bundle, repo, settings)
    assert api.file_exists(repo, f"{PLACE.replace('cpu', 'cu130-sm90')}/{FILENAME}")


def push_one(folder: Path, repo: str, settings: Settings) -> str:
    return ship(Bundle.read(folder), repo, settings).commit


def test_eight_processes_push_eight_variants_into_a_new_repo_and_lose_nothing(
    tmp_path: Path, repo: str, settings: Settings, api: HfApi
) -> None:
    folders = [tmp_path / f"sm{sm}" for sm in (75, 80, 86, 89, 90, 100, 120)]
    for folder in folders:
        make_bundle(folder, target={**CUDA, "sm": int(folder.name.removeprefix("sm"))})
    folders.append(make_bundle(tmp_path / "cpu", target=CPU).path)
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        commits = pool.starmap(push_one, [(folder, repo, settings) for folder in folders])
        pool.close()
        pool.join()
    assert len({*commits}) == 8
    assert len(api.list_repo_commits(repo)) == 9, "one each, and the first of the repo"
    held = api.list_repo_files(repo)
    assert sum(path.endswith(FILENAME) for path in held) == 8
    readme = Path(api.hf_hub_download(repo, "README.md")).read_text()
    for folder in folders:
        bundle = Bundle.read(folder)
        place = f"float32-sdpa/{bundle.manifest.variant}"
        assert {f"{place}/{file.path}" for file in bundle.manifest.all_files()} <= {*held}
        assert str(bundle.manifest.variant) in readme
