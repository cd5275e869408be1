"""A pull by a lockfile: no list is asked for, and nothing is taken but the bytes that are locked.

What is here already is found by its digest, so a machine that pulled it before needs no network;
and it stays here while the lockfile does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import LARGEST_MANIFEST, Manifest, parse_manifest
from hubaoti.errors import (
    BadManifest,
    Blocked,
    NoArtifact,
    NotLocked,
    RepoNotFound,
    Untrusted,
)
from hubaoti.hub.bounds import TooLong
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.choice import Considered, Pulled
from hubaoti.hub.layout import ArtifactPath, RepoRef, require_agreement
from hubaoti.hub.lockfile import Lock, LockedRepo
from hubaoti.hub.records import Entry
from hubaoti.hub.revisions import resolve_owned
from hubaoti.hub.signatures import CommitSignatures
from hubaoti.mirror import Mirror, PullOrigin

if TYPE_CHECKING:
    from hubaoti.hub.pull import Puller


def pull_locked(puller: Puller, ref: RepoRef, locked: LockedRepo) -> Pulled:
    """The artifact of a lock that fits best; no list and no revision is asked for."""
    catalog = _begin_catalog(puller, locked)
    if ref.digest is not None:
        places = tuple(p for p, digest in locked.artifacts.items() if digest == ref.digest)
        catalog = replace(catalog, places=places)

    def read(places: Iterable[ArtifactPath]) -> Catalog:
        nonlocal catalog
        catalog = _read_locked(puller, locked, catalog, places)
        return catalog

    chosen, considered = puller.choose(catalog.places, read)
    if chosen is None and not considered and puller.client.is_offline:
        raise _describe_nothing_here(locked)
    if chosen is None:
        raise puller.describe_no_choice(ref, catalog, considered)
    known = chosen.manifest and puller.mirror.artifact(chosen.manifest.digest)
    catalog = _verify_signature(puller, ref, catalog, chosen)
    if catalog.signers or _is_of_owner(puller, locked, chosen):
        artifact = puller.take(ref, catalog, chosen, puller.pin(ref, locked.commit))
    else:
        artifact = puller.take_known(catalog, chosen)
    keep_locked(puller.mirror, puller.lock, artifact.digest)
    verdict = chosen.verdict
    assert verdict is not None
    return Pulled(artifact, ref, locked.commit, chosen.place, verdict, considered, (), bool(known))


def require_owned(puller: Puller, locked: LockedRepo) -> None:
    """See that a lock's commit is its repo's owner's: a lock is a file that may be anybody's.

    Raises:
        Untrusted: no branch and no tag has it. RepoMoved: the repo has another name now.
        RepoNotFound, AuthFailed, HubUnreachable: that cannot be asked.
    """
    client, repo = puller.client, locked.ref.repo
    if not puller.mirror.index.is_known(client.endpoint, repo, locked.commit):
        puller.progress(f"asking {client.endpoint} whose {locked.commit} of {repo} is")
        resolve_owned(client, repo, locked.commit)


def _is_of_owner(puller: Puller, locked: LockedRepo, chosen: Considered) -> bool:
    """Whether what was chosen is the owner's of the locked repo; False where nobody has to know.

    That is of an artifact that may run here by what is known of it without the lock. What lies here
    already came from anywhere: the owner's it is where that commit holds it, and not for the lock.

    Raises:
        Blocked: it may not, or the repo's owner is blocked.
        Untrusted: it may not, and the commit is nobody's; else as `require_owned`.
        LockMismatch, RepoNotFound: the commit has another one at this path, or none.
    """
    assert chosen.manifest is not None  # only judged ones are chosen
    digest = chosen.manifest.digest
    origin = PullOrigin(puller.client.endpoint, locked.ref.repo, locked.commit, str(chosen.place))
    blocked = puller.mirror.decide(digest, origin).refusal
    if isinstance(blocked, Blocked):
        raise blocked
    if puller.mirror.decide(digest).allowed:
        return False
    try:
        require_owned(puller, locked)
    except Untrusted as error:
        error.hint += f"; if you trust this artifact: hubaoti trust add {digest}"
        raise
    if origin not in puller.mirror.index.list_origins(digest):
        _fetch_manifest(puller, locked, chosen.place)
    return True


def keep_locked(mirror: Mirror, lock: Lock | None, digest: str) -> None:
    """Have an artifact stay in the mirror while the lockfile that names it is there.

    What the same file named before, and does not any more, may leave.
    """
    if lock is None or lock.path is None or not mirror.index.is_writable:
        return
    holder = str(lock.path)
    held = {each for each, holders in mirror.usage.list_pins().items() if holder in holders}
    if digest not in held:
        mirror.usage.pin(digest, holder)
    for each in held:
        if not lock.holds(each):
            mirror.usage.unpin(each, holder)


def _begin_catalog(puller: Puller, locked: LockedRepo) -> Catalog:
    """What a lock says that a commit holds; no manifest is read.

    Raises:
        NotLocked: there is nothing at the path that is asked for.
    """
    places = tuple(sorted(locked.artifacts, key=str))
    if puller.place is not None and puller.place not in places:
        raise NotLocked(
            f"the lock has no {puller.place} of {locked.ref}",
            hint=f"it has {', '.join(map(str, places)) or 'none'}",
        )
    return Catalog(locked.ref.repo, locked.commit, {}, {}, (), places)


def _read_locked(
    puller: Puller, locked: LockedRepo, catalog: Catalog, places: Iterable[ArtifactPath]
) -> Catalog:
    """A catalog with the manifests of these places: of the mirror, else of the Hub, as locked.

    Offline, what is not in the mirror is left out.

    Raises:
        LockMismatch: one is not the one that is locked.
        NoArtifact: offline, and none of the lock is in the mirror.
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    found, files = dict(catalog.artifacts), dict(catalog.files)
    for place in places:
        manifest = _read_manifest(puller, locked, place)
        if manifest is None:
            continue
        found[place] = manifest
        for file in manifest.all_files():
            path = place.file(file.path)
            files[path] = Entry(path, file.size, file.sha256, file.sha256)
    ordered = {place: found[place] for place in catalog.places if place in found}
    return Catalog(catalog.repo, catalog.commit, files, ordered, (), catalog.places)


def _verify_signature(
    puller: Puller, ref: RepoRef, catalog: Catalog, chosen: Considered
) -> Catalog:
    """A catalog that says who signed what was chosen, where somebody has to.

    Raises:
        Unsigned, BadSignature: nobody of them did.
    """
    place, manifest, required = chosen.place, chosen.manifest, puller.find_required(ref)
    assert manifest is not None  # only judged ones are chosen
    if required is None or puller.is_signed(ref, place, manifest):
        return catalog
    signatures = CommitSignatures(puller.client, catalog.repo, catalog.commit, None)
    text, what = manifest.to_json(), f"{place} of {catalog.repo}"
    signer, statement = signatures.verify(place, text, required, what)
    signatures.require_statement(place, manifest, statement)
    return replace(catalog, signers={place: signer})


def _describe_nothing_here(locked: LockedRepo) -> NoArtifact:
    """Why nothing is chosen of a lock, offline, where the mirror has none of it."""
    return NoArtifact(
        f"nothing that is locked of {locked.ref} is in the mirror, and HF_HUB_OFFLINE is set",
        hint=f"unset HF_HUB_OFFLINE once: hubaoti pull {locked.ref} --locked",
    )


def _read_manifest(puller: Puller, locked: LockedRepo, place: ArtifactPath) -> Manifest | None:
    """The manifest that is locked at a path; None offline, where it is not in the mirror."""
    if artifact := puller.mirror.artifact(locked.artifacts[place]):
        manifest = artifact.manifest
    elif puller.client.is_offline:
        return None
    else:
        content = _fetch_manifest(puller, locked, place)
        manifest = parse_manifest(content, f"{locked.ref.repo}/{place.manifest}")
    require_agreement(place, manifest)
    return manifest


def _fetch_manifest(puller: Puller, locked: LockedRepo, place: ArtifactPath) -> bytes:
    """The bytes that the locked commit has of the manifest at a path, which are those locked.

    Raises:
        LockMismatch: they are others. RepoNotFound: it has none there. HubUnreachable: offline.
    """
    digest = locked.artifacts[place]
    repo, commit, path = locked.ref.repo, locked.commit, place.manifest
    puller.progress(f"reading {path}")
    try:
        file = puller.client.download(repo, commit, path, LARGEST_MANIFEST)
    except TooLong:
        raise BadManifest(f"{path} is larger than {LARGEST_MANIFEST >> 20} MiB") from None
    except RepoNotFound as error:
        error.hint = f"the lockfile says that {commit} has it: ask who wrote it; {error.hint}"
        raise
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        puller.client.drop(file)  # perhaps it was changed here
    locked.require(place, found)
    return content
