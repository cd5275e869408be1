"""An artifact that is asked for by its manifest's digest: in the mirror, or somewhere in a repo.

Who names a digest names every byte. So it is taken of whichever branch or tag has it, or of a
proposal to the repo; whether its code may run is asked as ever. A proposal is of nobody: the
artifact itself has to be trusted then, and not the repo's owner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import LARGEST_MANIFEST
from hubaoti.errors import HubaotiError, NoArtifact, NoMatch
from hubaoti.host.match import MatchResult
from hubaoti.hub.catalog import Allowance, Catalog, Unreadable, list_catalog, read_manifests
from hubaoti.hub.choice import Considered, Pulled, format_considered
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.versions import list_releases
from hubaoti.mirror import Artifact

if TYPE_CHECKING:
    from hubaoti.hub.client import HubClient
    from hubaoti.hub.pull import Puller


def pull_digest(puller: Puller, ref: RepoRef) -> Pulled:
    """The artifact of a digest: from the mirror, else of the commit that has it."""
    if found := _find_mirrored(puller, ref):
        artifact, commit, place = found
        considered = Considered(place, artifact.manifest, puller.judge(artifact.manifest.requires))
        _require_fit(ref, considered)
        puller.require_trust(ref, commit, place, artifact.manifest)
        puller.bring_kernels(artifact.manifest)
    else:
        puller.mirror.index.require_writable()
        catalog, considered, is_owned = _find_published(puller, ref)
        _require_fit(ref, considered)
        commit, place = catalog.commit, considered.place
        if is_owned:
            artifact = puller.take(ref, catalog, considered, puller.pin(ref, commit, str(place)))
        else:
            artifact = puller.take_proposed(catalog, considered)
    verdict = considered.verdict
    assert verdict is not None
    return Pulled(artifact, ref, commit, place, verdict, (considered,), (), bool(found))


def _require_fit(ref: RepoRef, considered: Considered) -> None:
    """See that an artifact that was named fits this host.

    Raises:
        NoMatch: it does not, with every reason.
    """
    verdict = considered.verdict
    if verdict is not None and verdict.fit is MatchResult.INCOMPATIBLE:
        lines = "\n".join(format_considered(considered, considered.place.recipe))
        hint = f"take another of its artifacts: hubaoti explain {ref.repo}"
        raise NoMatch(f"{ref} does not fit this host:\n{lines}", hint=hint)


def _find_mirrored(puller: Puller, ref: RepoRef) -> tuple[Artifact, str, ArtifactPath] | None:
    """The artifact of a digest that is trusted, or came from this repo; its commit and path."""
    digest = str(ref.digest)
    artifact = puller.mirror.artifact(digest)
    if artifact is None:
        return None
    row = puller.mirror.index.row(digest)
    if row is not None and puller.mirror.trust.read().names(digest):
        return artifact, row.origin.commit, ArtifactPath.parse(f"{row.recipe}/{row.variant}")
    for origin in puller.mirror.index.list_origins(digest):
        if (origin.endpoint, origin.repo) == (puller.client.endpoint, ref.repo):
            place = ArtifactPath.parse(origin.path)
            if puller.is_signed(ref, place, artifact.manifest):
                return artifact, origin.commit, place
    return None


def _find_published(puller: Puller, ref: RepoRef) -> tuple[Catalog, Considered, bool]:
    """The artifact of a digest in a repo: where it is, and whether the repo's owner put it there.

    Raises:
        NoArtifact: none of them has it. BadManifest: they have more manifests than are read; and
            whatever is wrong with what they have at this digest, as BadSignature.
    """
    client, left, seen = puller.client, Allowance(), set[str]()
    unreadable = list[tuple[Catalog, ArtifactPath, Unreadable]]()
    for commit, is_owned in _list_commits(client, ref.repo):
        puller.progress(f"looking for {ref.revision} in {ref.repo} at {commit}")
        required = puller.find_required(ref) if is_owned else None
        catalog = list_catalog(client, ref.repo, commit, left, required)
        blobs = {place: catalog.files[place.manifest].blob for place in catalog.places}
        fresh = [place for place, blob in blobs.items() if blob not in seen]
        seen |= {*blobs.values()}
        catalog = read_manifests(client, catalog, fresh, left)
        for place, manifest in catalog.readable.items():
            if manifest.digest == ref.digest:
                found = Considered(place, manifest, puller.judge(manifest.requires))
                return catalog, found, is_owned
        bad = ((place, catalog.artifacts.get(place)) for place in fresh)
        unreadable += [(catalog, place, e) for place, e in bad if isinstance(e, Unreadable)]
    _explain_unreadable(puller, ref, unreadable)
    raise NoArtifact(
        f"no branch, no tag and no proposal of {ref.repo} holds the artifact {ref.digest}",
        hint="see what there is with: hubaoti versions " + ref.repo,
    )


def _explain_unreadable(
    puller: Puller, ref: RepoRef, found: Iterable[tuple[Catalog, ArtifactPath, Unreadable]]
) -> None:
    """Of what cannot be used, see that none is the artifact that is asked for.

    Raises:
        BadSignature, Unsigned, BadManifest: why it cannot be, where one is.
    """
    for catalog, place, error in found:
        entry = catalog.files[place.manifest]
        with suppress(HubaotiError):
            text = b""
            if entry.size <= LARGEST_MANIFEST:
                text = puller.client.fetch(catalog.repo, catalog.commit, entry)
        if hashlib.sha256(text).hexdigest() == ref.digest:
            raise error


def _list_commits(client: HubClient, repo: str) -> Iterator[tuple[str, bool]]:
    """The commits of a repo's heads, each once, and whether they are its owner's.

    The default branch, versions, all other branches and tags; what anybody proposed comes last.
    """
    default = client.resolve(repo)
    branches, tags = client.list_heads(repo)
    versions = (release.commit for release in list_releases(tags))
    owned = dict.fromkeys((default, *versions, *tags.values(), *branches.values()))
    yield from ((commit, True) for commit in owned)
    proposed = dict.fromkeys(client.list_proposals(repo).values())
    yield from ((commit, False) for commit in proposed if commit not in owned)
