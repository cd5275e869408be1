"""May it be pulled? Every row of what is locked, seen, signed, blocked, built, and of whom it is.

What this machine opens is one table, `test_policy`; a pull asks of the repo beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bundles import make_bundle
from huggingface_hub import HfApi
from signers import Pair, make_pair
from test_signatures import HOST, push, require_signer

from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import Blocked, HubaotiError, LockMismatch, RolledBack, Unsigned, Untrusted
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.lockfile import Lock, LockedRepo
from hubaoti.hub.pull import pull_artifact
from hubaoti.mirror import Mirror
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

PUBLISHERS = ("a stranger", "trusted", "has to sign, and did", "has to sign, and did not")
BLOCKS = ("nothing", "the artifact", "the publisher")
# What is locked, and where main is since it was last seen.
ROADS = (
    ("nothing", "went on"),
    ("nothing", "went back"),
    ("nothing", "went back, which is allowed"),
    ("this artifact", "went back"),
    ("another artifact", "went on"),
)
ROWS = [*itertools.product(PUBLISHERS, (False, True), BLOCKS)]


@dataclass(frozen=True)
class Published:
    """An artifact of acme's in two repos, in one of them signed."""

    bundle: Bundle
    pair: Pair
    endpoint: Endpoint
    unsigned: RepoRef
    signed: RepoRef
    path: ArtifactPath

    def write_lock(self, ref: RepoRef, digest: str, folder: Path) -> Path:
        """A lockfile that names an artifact at the head of a repo."""
        commit = self.commits(ref)[0]
        Lock((LockedRepo(ref, commit, {self.path: digest}),)).write(folder / digest[:6])
        return folder / digest[:6]

    def commits(self, ref: RepoRef) -> list[str]:
        """Those of main, the newest first."""
        hub = HfApi(self.endpoint.url, token=self.endpoint.token)
        return [each.commit_id for each in hub.list_repo_commits(ref.repo)]


@pytest.fixture(scope="module")
def published(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    settings = Settings(home=folder / "home", endpoint=endpoint.url, token=endpoint.token)
    bundle, pair = make_bundle(folder / "bundle"), make_pair(folder, "acme")
    unsigned, signed = RepoRef(f"acme/{folder.name}"), RepoRef(f"acme/{folder.name}-signed")
    path = push(bundle, unsigned.repo, settings).path
    push(bundle, signed.repo, settings, pair)
    return Published(bundle, pair, endpoint, unsigned, signed, ArtifactPath.parse(path))


def find_answer(road: tuple[str, str], publisher: str, built: bool, block: str) -> object:
    """The reason for which a row is refused, the first that is found; None where it is not."""
    locked, head = road
    if locked == "another artifact":
        return LockMismatch
    if locked == "nothing" and head == "went back":
        return RolledBack
    if block == "the publisher":  # of whom no signature is asked any more
        return Blocked
    if publisher == "has to sign, and did not":
        return Unsigned
    if block == "the artifact":
        return Blocked
    return None if built or publisher != "a stranger" else Untrusted


def prepare(mirror: Mirror, given: Published, ref: RepoRef, row: tuple[str, bool, str]) -> None:
    """A machine on which all of a row was said, and seen."""
    publisher, built, block = row
    manifest = given.bundle.manifest
    settings = Settings(home=mirror.root.parent, endpoint=given.endpoint.url)
    if publisher.startswith("has to sign"):
        require_signer(settings, given.pair)
    elif publisher == "trusted":
        mirror.trust.add(settings.endpoint, "acme")
    if built:
        mirror.index.record_built(manifest)
    if block == "the artifact":
        mirror.trust.block_artifact(manifest.digest)
    elif block == "the publisher":
        mirror.trust.block(settings.endpoint, "acme")


@pytest.mark.parametrize("road", ROADS, ids=", main ".join)
def test_every_row(road: tuple[str, str], published: Published, tmp_path: Path) -> None:
    locked, head = road
    for at, row in enumerate(ROWS):
        ref = published.signed if row[0] == "has to sign, and did" else published.unsigned
        home = tmp_path / f"{at}"
        settings = Settings(home=home, endpoint=published.endpoint.url)
        digest = published.bundle.manifest.digest
        with Mirror.open(settings.mirror) as mirror:
            prepare(mirror, published, ref, row)
            before = published.commits(ref)[-1] if head == "went on" else "f" * 40
            mirror.seen.record_commit(settings.endpoint, ref.repo, "main", before)
        if locked != "nothing":
            named = digest if locked == "this artifact" else "e" * 64
            settings = replace(settings, lock=published.write_lock(ref, named, home))
        wanted, found = find_answer(road, *row), None
        try:
            pull_artifact(ref, settings, HOST, allow_rollback=head.endswith("allowed"))
        except HubaotiError as error:
            found = error
            assert error.hint, row
        assert (found and type(found)) == wanted, (row, found)
        with Mirror.open(settings.mirror) as mirror:
            assert (mirror.artifact(digest) is not None) == (wanted is None), row
            assert wanted is not None or mirror.decide(digest).allowed, row
