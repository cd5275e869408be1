"""A repo that has another name by now: nobody is led there, and both names are said."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from bundles import make_bundle, make_host
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from proxies import Proxy

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import RepoMoved
from hubaoti.hub.client import HubClient
from hubaoti.server import Endpoint
from hubaoti.settings import Settings


@pytest.fixture
def hub(endpoint: Endpoint) -> HfApi:
    """The publisher's own client."""
    return HfApi(endpoint.url, token=endpoint.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_verb_follows_a_repo_to_another_name(
    status: int, bundle: Bundle, hub: HfApi, repo: str, settings: Settings, proxy: Proxy
) -> None:
    mallory = f"mallory/{repo.partition('/')[2]}"
    for name in (repo, mallory):
        api.push(bundle, name, as_is=True, tag="v1.0.0", settings=settings)
    commits, digest = hub.list_repo_commits(repo), bundle.manifest.digest
    before = hub.list_repo_refs(mallory)
    proxy.redirect = (status, repo, mallory)
    refs = ("", "@main", "@v1.0.0", "@v1", f"@{commits[0].commit_id}", f"@sha256:{digest}")
    verbs: dict[str, Callable[[], object]] = {
        f"pull {repo}{each}": partial(
            api.pull, f"{repo}{each}", host=make_host(), trust=True, settings=settings
        )
        for each in refs
    }
    verbs |= {
        "versions": lambda: api.versions(repo, settings=settings),
        "explain": lambda: api.explain_repo(repo, host=make_host(), settings=settings),
        "lock": lambda: api.lock(repo, settings=settings),
        "push": lambda: api.push(bundle, repo, as_is=True, settings=settings),
        "a list": lambda: HubClient(settings).files(repo, commits[0].commit_id),
        "a history": lambda: HubClient(settings).history(repo, commits[0].commit_id),
        "a file": lambda: HubClient(settings).download(repo, commits[0].commit_id, "README.md"),
        "a tag": lambda: HubClient(settings).tag(repo, "v2", commits[0].commit_id),
        "a commit": lambda: HubClient(settings).commit(
            repo, {"a": b"a"}, (), "a", commits[0].commit_id
        ),
    }
    for what, verb in verbs.items():
        with pytest.raises(RepoMoved, match=f"{repo} at .* is called {mallory} now"):
            verb()
            pytest.fail(what)
    proxy.reset()
    assert hub.list_repo_refs(mallory) == before


def test_a_repo_that_was_moved_here_says_its_new_name_and_is_not_made_anew(
    bundle: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    api.push(bundle, repo, as_is=True, tag="v1.0.0", settings=settings)
    moved = f"{repo}-moved"
    hub.move_repo(repo, moved)
    for verb in (
        lambda: api.versions(repo, settings=settings),
        lambda: api.pull(repo, host=make_host(), trust=True, settings=settings),
        lambda: api.push(bundle, repo, as_is=True, settings=settings),
    ):
        with pytest.raises(RepoMoved, match=f"{repo} at .* is called {moved} now"):
            verb()
    assert hub.repo_info(repo).id == moved
    assert HubClient(settings).model_folder(repo, None, ("*.md",))[0].is_dir()  # as others do


def test_a_name_in_other_letters_is_the_same_repo_and_refused_with_both(
    bundle: Bundle, hub: HfApi, repo: str, settings: Settings
) -> None:
    api.push(bundle, repo, as_is=True, settings=settings)
    for other in (repo.replace("acme", "Acme"), repo.replace("test_", "Test_")):
        with pytest.raises(RepoMoved, match=f"{other} at .* is called {repo} now"):
            api.pull(other, host=make_host(), trust=True, settings=settings)
        with pytest.raises(RepoMoved, match=f"{other} at .* is called {repo} now"):
            api.push(bundle, other, as_is=True, settings=settings)
        with pytest.raises(HfHubHTTPError, match="409"):
            hub.create_repo(other)
