"""Which commit a pull takes: one that the repo's owner put there, and none from before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti.errors import RepoMoved, RolledBack, Untrusted
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.revisions import Revisions, resolve_owned
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.rows import Pin
from hubaoti.progress import report_nothing
from hubaoti.server import Endpoint
from hubaoti.settings import Settings


@pytest.fixture
def hub(endpoint: Endpoint) -> HfApi:
    """The publisher's own client."""
    return HfApi(endpoint.url, token=endpoint.token)


@pytest.fixture
def commits(hub: HfApi, repo: str) -> list[str]:
    """Three commits of a repo, the oldest first; main is at the last."""
    hub.create_repo(repo)
    return [commit(hub, repo, f"{n}") for n in range(3)]


@pytest.fixture
def revisions(settings: Settings) -> Iterator[Revisions]:
    with Mirror.open(settings.mirror) as mirror:
        yield Revisions(HubClient(settings), mirror, report_nothing)


def commit(hub: HfApi, repo: str, text: str, branch: str | None = None) -> str:
    """One more commit; its id."""
    return str(
        hub.upload_file(
            path_or_fileobj=text.encode(), path_in_repo="file", repo_id=repo, revision=branch
        ).oid
    )


def make_orphan(hub: HfApi, repo: str) -> str:
    """A commit that no branch has any more, as a proposal is of none."""
    hub.create_branch(repo, branch="draft")
    found = commit(hub, repo, "native code of somebody", "draft")
    hub.delete_branch(repo, branch="draft")
    return found


# Whose a commit is


def test_a_branch_a_tag_and_what_they_have_in_their_history_is_the_owner_s(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    hub.create_tag(repo, tag="v1", revision=commits[1])
    first, second, third = commits
    for named, found in {
        None: third,
        "main": third,
        "v1": second,
        "refs/heads/main": third,
    }.items():
        assert revisions.pin(RepoRef(repo, named)) == found
    for one in commits:
        assert revisions.pin(RepoRef(repo, one)) == one
    assert revisions.pin(RepoRef(repo, first[:12])) == first


def test_a_commit_that_no_branch_and_no_tag_has_is_anybody_s(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    orphan = make_orphan(hub, repo)
    for named in (orphan, orphan[:12]):
        with pytest.raises(Untrusted, match=f"no branch and no tag of {repo} has") as why:
            revisions.pin(RepoRef(repo, named))
        assert "merge it" in why.value.hint
    hub.create_tag(repo, tag="v2", revision=orphan)
    assert revisions.pin(RepoRef(repo, orphan)) == orphan


@pytest.mark.parametrize("named", ["refs/pr/1", "refs/convert/parquet", "refs/other"])
def test_proposals_are_not_even_asked_for(
    repo: str, revisions: Revisions, proxy: Proxy, named: str
) -> None:
    with pytest.raises(Untrusted, match="is no branch and no tag: anybody may have made it"):
        revisions.pin(RepoRef(repo, named))
    assert proxy.requests == []


def test_only_an_id_that_is_no_head_pays_for_the_history(
    repo: str, commits: list[str], revisions: Revisions, proxy: Proxy
) -> None:
    def count(named: str | None) -> tuple[int, int]:
        before = len(proxy.requests)
        revisions.pin(RepoRef(repo, named))
        asked = proxy.requests[before:]
        return len(asked), sum("/commits/" in str(each) for each in asked)

    assert count(None) == (1, 0)
    assert count(commits[2]) == (2, 0)
    assert count(commits[0]) == (3, 1)


def test_what_was_pulled_before_is_asked_of_nobody(
    repo: str, revisions: Revisions, settings: Settings, proxy: Proxy, tmp_path: Path
) -> None:
    from bundles import make_bundle

    bundle = make_bundle(tmp_path / "bundle")
    pin = Pin(settings.endpoint, repo, "a" * 40, "", "host")
    with Mirror.open(settings.mirror) as mirror:
        files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
        origin = PullOrigin(settings.endpoint, repo, "a" * 40, "path")
        mirror.index.record_pull(pin, mirror.put(bundle.manifest, files, origin).digest, "path")
    assert revisions.pin(RepoRef(repo, "a" * 40)) == "a" * 40
    assert proxy.requests == []


def test_a_repo_that_has_another_name_now_is_refused_with_both(
    repo: str, commits: list[str], revisions: Revisions, proxy: Proxy
) -> None:
    proxy.mutate = lambda told: told | {"id": "mallory/x"} if "sha" in told else told
    for named in (None, "main", commits[0], commits[2]):
        with pytest.raises(RepoMoved, match=f"{repo} at .* is called mallory/x now") as why:
            revisions.pin(RepoRef(repo, named))
        assert "ask for mallory/x" in why.value.hint


# Going back


def test_a_branch_goes_on(hub: HfApi, repo: str, commits: list[str], revisions: Revisions) -> None:
    assert revisions.pin(RepoRef(repo)) == commits[2]
    after = [commit(hub, repo, f"more {n}") for n in range(2)]
    assert revisions.pin(RepoRef(repo, "main")) == after[1]


@pytest.mark.parametrize("how", ["back", "another history"])
def test_a_branch_that_went_back_is_refused_with_both_ids(
    how: str, hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    hub.create_branch(repo, branch="stable")
    assert revisions.pin(RepoRef(repo, "stable")) == commits[2]
    hub.delete_branch(repo, branch="stable")
    hub.create_branch(repo, branch="stable", revision=commits[0])
    now = commits[0] if how == "back" else commit(hub, repo, "other", "stable")
    for _ in range(2):  # asking again is no consent
        with pytest.raises(RolledBack, match="went back, or has another history") as why:
            revisions.pin(RepoRef(repo, "stable"))
        assert commits[2] in str(why.value) and now in str(why.value)
        assert "--allow-rollback" in why.value.hint
    assert replace(revisions, allow_rollback=True).pin(RepoRef(repo, "stable")) == now
    assert revisions.pin(RepoRef(repo, "stable")) == now, "it is where it is from now on"


def test_a_tag_that_moved_is_refused_wherever_it_went(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    hub.create_tag(repo, tag="v1", revision=commits[1])
    assert revisions.pin(RepoRef(repo, "v1")) == commits[1]
    for moved in (commits[2], commits[0]):
        hub.delete_tag(repo, tag="v1")
        hub.create_tag(repo, tag="v1", revision=moved)
        with pytest.raises(RolledBack, match=f"the tag v1 of {repo} was moved") as why:
            revisions.pin(RepoRef(repo, "v1"))
        assert commits[1] in str(why.value) and moved in str(why.value)
    assert replace(revisions, allow_rollback=True).pin(RepoRef(repo, "v1")) == commits[0]


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_branch_that_takes_a_tag_s_name_is_refused(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions, is_deleted: bool
) -> None:
    for tag in ("v1.0.0", "v1"):
        hub.create_tag(repo, tag=tag, revision=commits[0])
        assert revisions.pin(RepoRef(repo, tag)) == commits[0]
        if is_deleted:
            hub.delete_tag(repo, tag=tag)
        hub.create_branch(repo, branch=tag, revision=commits[2])
    if not is_deleted:  # what is asked for is the version
        assert revisions.pin(RepoRef(repo, "~=1.0")) == commits[0]
        assert revisions.pin(RepoRef(repo, "v1")) == commits[0]
        return
    for tag in ("v1.0.0", "v1"):
        with pytest.raises(RolledBack, match=f"{commits[0]}.*{commits[2]}"):
            revisions.pin(RepoRef(repo, tag))


def test_a_branch_may_be_called_as_a_version_is(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    hub.create_branch(repo, branch="v2", revision=commits[1])
    assert revisions.pin(RepoRef(repo, "v2")) == commits[1]
    new = commit(hub, repo, "on", "v2")
    assert revisions.pin(RepoRef(repo, "v2")) == new


def test_a_repo_that_was_made_anew_under_the_same_name_is_said(
    hub: HfApi, repo: str, commits: list[str], revisions: Revisions
) -> None:
    assert revisions.pin(RepoRef(repo)) == commits[2]
    hub.delete_repo(repo)
    hub.create_repo(repo)
    commit(hub, repo, "somebody else's")
    with pytest.raises(RolledBack, match="has another history"):
        revisions.pin(RepoRef(repo))


def test_kernels_are_asked_about_in_their_own_repos(
    endpoint: Endpoint, hub: HfApi, repo: str, settings: Settings
) -> None:
    hub.create_repo(repo, repo_type="kernel")
    made = hub.upload_file(
        path_or_fileobj=b"1", path_in_repo="file", repo_id=repo, repo_type="kernel"
    ).oid
    client = HubClient(settings)
    assert resolve_owned(client, repo, made, "kernel") == made
    with pytest.raises(Untrusted):
        resolve_owned(client, repo, "refs/pr/3", "kernel")
