"""What stands behind the @ of a repo: versions, and the digest of an artifact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import CPU, make_bundle, make_host
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from proxies import Proxy
from test_mirror_store import put

from hubaoti.api.attaching import get_artifact
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import (
    BadRequest,
    Blocked,
    NoArtifact,
    NoMatch,
    NoVersion,
    RepoNotFound,
    RolledBack,
    Untrusted,
)
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.hub.revisions import Revisions
from hubaoti.hub.versions import list_releases
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.trust import Trust
from hubaoti.progress import report_nothing
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

TAGS = ("v1.0.0", "v1.2.0", "v1.10.0", "v2.0.0rc1", "0.9", "stable")


@pytest.fixture
def hub(endpoint: Endpoint) -> HfApi:
    """The publisher's own client."""
    return HfApi(endpoint.url, token=endpoint.token)


@pytest.fixture
def tagged(hub: HfApi, repo: str) -> dict[str, str]:
    """A repo with a commit for each tag, in this order; the commits by their tags."""
    hub.create_repo(repo)
    return {tag: add_tag(hub, repo, tag) for tag in TAGS}


@pytest.fixture
def revisions(settings: Settings) -> Iterator[Revisions]:
    with Mirror.open(settings.mirror) as mirror:
        yield Revisions(HubClient(settings), mirror, report_nothing)


def add_tag(hub: HfApi, repo: str, tag: str) -> str:
    made = hub.upload_file(path_or_fileobj=tag.encode(), path_in_repo="file", repo_id=repo).oid
    hub.create_tag(repo, tag=tag, revision=made)
    return str(made)


# The grammar


@pytest.mark.parametrize("revision", ["~=1.2", "~=1.2.3", "~=v1.2", f"sha256:{'a' * 64}"])
def test_versions_and_digests_are_read_as_they_are_written(revision: str) -> None:
    assert str(RepoRef.parse(f"a/b@{revision}")) == f"a/b@{revision}"


@pytest.mark.parametrize(
    "revision",
    ["~=1", "~=", "~1.2", "=1.2", "==1.2", ">=1", "~=1.2,<2", "sha256:", "sha256:abc",
     f"sha256:{'A' * 64}", f"sha1:{'a' * 64}", f"sha256:{'a' * 64}\n", "a:b"],
)  # fmt: skip
def test_what_is_neither_is_refused(revision: str) -> None:
    with pytest.raises(BadRequest, match="malformed revision") as why:
        RepoRef.parse(f"a/b@{revision}")
    assert "sha256" in why.value.hint


def test_only_a_short_version_can_mean_several() -> None:
    means = {"v1": "==1.*", "1": "==1.*", "v1.2": "==1.2.*", "~=1.2": "~=1.2", "~=v1.2": "~=1.2"}
    for revision, specifier in means.items():
        assert RepoRef("a/b", revision).specifier == specifier
    for revision in (None, "v1.2.0", "main", "v1.x", "vv1", "1234567", "c" * 40):
        assert RepoRef("a/b", revision).specifier is None


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), unique=True))
def test_releases_are_listed_by_their_numbers_and_not_by_their_letters(
    numbers: list[tuple[int, int]],
) -> None:
    tags = {f"v{major}.{minor}": "c" * 40 for major, minor in numbers}
    found = [each.version for each in list_releases({**tags, "latest": "c" * 40})]
    assert found == sorted((Version(f"{a}.{b}") for a, b in numbers), reverse=True)


# Which commit


@pytest.mark.parametrize(
    ("revision", "tag"),
    [
        ("v1", "v1.10.0"),
        ("1", "v1.10.0"),
        ("v1.2", "v1.2.0"),
        ("~=1.2", "v1.10.0"),
        ("~=1.2.0", "v1.2.0"),
        ("v2", "v2.0.0rc1"),  # what is no final one, where nothing else is
        ("v1.0.0", "v1.0.0"),
        ("0.9", "0.9"),
        ("stable", "stable"),
    ],
)
def test_a_version_is_the_newest_tag_that_it_allows(
    repo: str, tagged: dict[str, str], revisions: Revisions, revision: str, tag: str
) -> None:
    assert revisions.pin(RepoRef(repo, revision)) == tagged[tag]


def test_a_tag_and_a_branch_of_that_very_name_win(
    hub: HfApi, repo: str, tagged: dict[str, str], revisions: Revisions
) -> None:
    hub.create_tag(repo, tag="v1", revision=tagged["v1.0.0"])
    hub.create_branch(repo, branch="v1.2", revision=tagged["0.9"])
    assert revisions.pin(RepoRef(repo, "v1")) == tagged["v1.0.0"]
    assert revisions.pin(RepoRef(repo, "v1.2")) == tagged["0.9"]


def test_a_version_that_is_not_there_tells_those_that_are(
    repo: str, tagged: dict[str, str], revisions: Revisions
) -> None:
    with pytest.raises(NoVersion, match=f"{repo} has no version v3") as why:
        revisions.pin(RepoRef(repo, "v3"))
    assert "v2.0.0rc1, v1.10.0, v1.2.0" in why.value.hint
    with pytest.raises(RepoNotFound):
        revisions.pin(RepoRef(repo, "v3.0.0"))


def test_newer_versions_are_taken_and_older_ones_are_not(
    hub: HfApi, repo: str, tagged: dict[str, str], revisions: Revisions
) -> None:
    assert revisions.pin(RepoRef(repo, "v1")) == tagged["v1.10.0"]
    newer = add_tag(hub, repo, "v1.11.0")
    assert revisions.pin(RepoRef(repo, "v1")) == newer
    hub.delete_tag(repo, tag="v1.11.0")
    for _ in range(2):  # asking again is no consent
        with pytest.raises(RolledBack, match=r"is v1\.10\.0 now, and was v1\.11\.0") as why:
            revisions.pin(RepoRef(repo, "v1"))
        assert "--allow-rollback" in why.value.hint
    assert replace(revisions, allow_rollback=True).pin(RepoRef(repo, "v1")) == tagged["v1.10.0"]
    assert revisions.pin(RepoRef(repo, "v1")) == tagged["v1.10.0"], "it is so from now on"


def test_a_version_whose_tag_moved_is_refused(
    hub: HfApi, repo: str, tagged: dict[str, str], revisions: Revisions
) -> None:
    revisions.pin(RepoRef(repo, "v1"))
    hub.delete_tag(repo, tag="v1.10.0")
    hub.create_tag(repo, tag="v1.10.0", revision=tagged["0.9"])
    with pytest.raises(RolledBack, match=r"the tag v1\.10\.0 of .* was moved"):
        revisions.pin(RepoRef(repo, "v1"))


def test_an_exact_version_costs_no_list_of_them(
    repo: str, tagged: dict[str, str], revisions: Revisions, proxy: Proxy
) -> None:
    proxy.requests.clear()
    revisions.pin(RepoRef(repo, "v1.2.0"))
    assert len(proxy.requests) == 1
    revisions.pin(RepoRef(repo, "v1.2"))
    assert len(proxy.requests) == 2  # the list, which says where each of them is


# By digest


@pytest.fixture
def two(tmp_path: Path, repo: str, settings: Settings) -> list[Bundle]:
    """Two builds of one key: the first only under the tag v1.0.0, the second on main."""
    first = make_bundle(tmp_path / "first")
    second = make_bundle(tmp_path / "second", members={"model/other.so": b"other"})
    for bundle, tag in ((first, "v1.0.0"), (second, "v2.0.0")):
        push_bundles([bundle], Destination(RepoRef(repo), tag=tag), settings)
    return [first, second]


def by_digest(repo: str, bundle: Bundle) -> RepoRef:
    return RepoRef(repo, f"sha256:{bundle.manifest.digest}")


def test_an_artifact_is_found_by_its_digest_wherever_a_tag_has_it(
    repo: str, settings: Settings, two: list[Bundle], proxy: Proxy
) -> None:
    for bundle in two:
        found = pull_artifact(by_digest(repo, bundle), settings, make_host(), trust=True)
        assert found.artifact.digest == bundle.manifest.digest
        assert not found.from_mirror
    proxy.requests.clear()
    again = pull_artifact(by_digest(repo, two[0]), settings, make_host())
    assert again.from_mirror and again.artifact.digest == two[0].manifest.digest
    assert proxy.requests == []


def test_to_trust_what_a_blocked_owner_publishes_writes_nothing(
    tmp_path: Path, repo: str, settings: Settings, two: list[Bundle]
) -> None:
    trust = Trust(settings.trust)
    trust.block(settings.endpoint, "acme")
    with pytest.raises(Blocked):
        pull_artifact(by_digest(repo, two[1]), settings, make_host(), trust=True)
    with Mirror.open(settings.mirror) as mirror:
        origin = PullOrigin(settings.endpoint, repo, "c" * 40, "path")
        put(mirror, two[0], origin)
    with pytest.raises(Blocked):
        get_artifact(two[0].path, True, settings, report_nothing)
    trust.remove(settings.endpoint, "acme")
    assert trust.read().artifacts == ()


def test_a_proposal_is_taken_by_digest_and_is_nobody_s(
    tmp_path: Path, repo: str, settings: Settings, two: list[Bundle], hub: HfApi, proxy: Proxy
) -> None:
    """Whoever proposed it is not the repo's owner, who is trusted."""
    proposed = make_bundle(tmp_path / "proposed", members={"model/x.so": b"proposed"})
    hub.create_branch(repo, branch="draft")
    made = hub.upload_folder(
        folder_path=proposed.path,
        path_in_repo=f"float32-sdpa/{proposed.manifest.variant}",
        repo_id=repo,
        revision="draft",
    ).oid
    hub.delete_branch(repo, branch="draft")
    pr = {"name": "refs/pr/1", "ref": "refs/pr/1", "targetCommit": made}
    proxy.mutate = lambda told: told | {"pullRequests": [pr]} if "converts" in told else told
    Trust(settings.trust).add(settings.endpoint, "acme")
    with pytest.raises(Untrusted, match="was not built on this machine"):
        pull_artifact(by_digest(repo, proposed), settings, make_host())
    pulled = pull_artifact(by_digest(repo, proposed), settings, make_host(), trust=True)
    assert pulled.commit == made and not pulled.from_mirror
    assert pull_artifact(by_digest(repo, proposed), settings, make_host()).from_mirror
    Trust(settings.trust).remove_artifact(proposed.manifest.digest)
    with Mirror.open(settings.mirror) as mirror:
        assert not mirror.decide(proposed.manifest.digest).allowed, "nobody published it"


def test_a_digest_that_nothing_has_is_said(
    repo: str, settings: Settings, two: list[Bundle]
) -> None:
    with pytest.raises(NoArtifact, match=f"holds the artifact {'0' * 64}"):
        pull_artifact(RepoRef(repo, f"sha256:{'0' * 64}"), settings, make_host())


def test_who_trusts_a_digest_trusts_nobody_and_nothing_else(
    repo: str, settings: Settings, two: list[Bundle]
) -> None:
    first, second = two
    with pytest.raises(Untrusted):
        pull_artifact(by_digest(repo, first), settings, make_host())
    pull_artifact(by_digest(repo, first), settings, make_host(), trust=True)
    said = Trust(settings.trust).read()
    assert [each.digest for each in said.artifacts] == [first.manifest.digest]
    assert said.publishers == ()
    with pytest.raises(Untrusted):
        pull_artifact(by_digest(repo, second), settings, make_host())
    Trust(settings.trust).block_artifact(second.manifest.digest)
    with pytest.raises(Blocked):
        pull_artifact(by_digest(repo, second), settings, make_host(), trust=True)


def test_what_is_named_by_digest_has_to_fit_all_the_same(
    tmp_path: Path, repo: str, settings: Settings
) -> None:
    other = make_bundle(tmp_path / "other", target={**CPU, "torch": "2.11.0+cpu"})
    push_bundles([other], Destination(RepoRef(repo)), settings)
    with pytest.raises(NoMatch, match=r"does not fit this host:\n.*\n.*needs torch 2\.11\.0"):
        pull_artifact(by_digest(repo, other), settings, make_host(), trust=True)


def test_a_digest_is_no_commit(repo: str, revisions: Revisions) -> None:
    with pytest.raises(BadRequest, match="names an artifact, and no commit"):
        revisions.pin(RepoRef(repo, f"sha256:{'0' * 64}"))
