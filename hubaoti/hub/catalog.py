"""What a commit of a repo holds: the tree is the index, each manifest in it an artifact."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import TypeVar

from hubaoti.artifact.manifest import FILENAME, LARGEST_MANIFEST, Manifest, parse_manifest
from hubaoti.artifact.statement import SIGNATURE
from hubaoti.errors import (
    BadManifest,
    BadRequest,
    BadSignature,
    DigestMismatch,
    HubUnreachable,
    OtherProgram,
    Unsigned,
)
from hubaoti.escape import escape_line
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import silence_hub
from hubaoti.hub.layout import ArtifactPath, require_agreement
from hubaoti.hub.records import Entry
from hubaoti.hub.signatures import CommitSignatures, RequiredSigners
from hubaoti.hub.signing import read_claim
from hubaoti.mirror.signer import Signer

_READERS = 8  # manifests that are fetched at once
_SECONDS = 300.0  # for all that is read of a repo
_MOST = 1000  # manifests
_TOGETHER = 64 << 20  # bytes of them

Unreadable = BadManifest | DigestMismatch | Unsigned | BadSignature | OtherProgram
_Name = TypeVar("_Name", bound=Hashable)
_Found = TypeVar("_Found")


@dataclass(slots=True)
class Allowance:
    """What is read of a repo, in all its branches, before its publisher is known to be trusted."""

    manifests: int = _MOST
    bytes: int = _TOGETHER
    end: float = field(default_factory=lambda: time.monotonic() + _SECONDS)

    def take(self, where: str, sizes: Sequence[int]) -> None:
        """Count manifests of these sizes.

        Raises:
            BadManifest: they are too many.
        """
        most, together = self.manifests, self.bytes
        self.manifests -= len(sizes)
        self.bytes -= sum(min(size, LARGEST_MANIFEST) for size in sizes)
        if self.manifests < 0 or self.bytes < 0:
            raise BadManifest(
                f"{where} has more manifests than are read: {most} of them, and "
                f"{together >> 20} MiB, were left",
                hint="name a revision that has fewer, or ask its publisher for one",
            )


@dataclass(frozen=True, slots=True)
class Catalog:
    """A commit's files by path, and its artifacts: each a manifest, or why it cannot be read.

    `notes` say which manifests were ignored, because their path is no artifact's; `places` are all
    artifacts, where not all were read. `required` have to sign; `signers` are who did.
    """

    repo: str
    commit: str
    files: dict[str, Entry]
    artifacts: dict[ArtifactPath, Manifest | Unreadable]
    notes: tuple[str, ...]
    places: tuple[ArtifactPath, ...] = ()
    required: RequiredSigners | None = None
    signers: Mapping[ArtifactPath, Signer] = field(default_factory=dict)

    @property
    def readable(self) -> dict[ArtifactPath, Manifest]:
        """The artifacts whose manifests are good, by their places."""
        found = self.artifacts.items()
        return {place: each for place, each in found if isinstance(each, Manifest)}


def read_catalog(
    client: HubClient,
    repo: str,
    commit: str,
    allowance: Allowance | None = None,
    only: ArtifactPath | None = None,
    required: RequiredSigners | None = None,
) -> Catalog:
    """Read every manifest of a commit, or the one of a place; a bad one hides no other.

    Where somebody is required to sign, what he did not is bad, and is not parsed.

    Raises:
        BadManifest: there are more than the allowance, by default one of its own, has left.
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    left = allowance or Allowance()
    listed = list_catalog(client, repo, commit, left, required)
    places = [place for place in listed.places if only in (None, place)]
    return read_manifests(client, listed, places, left)


def list_catalog(
    client: HubClient,
    repo: str,
    commit: str,
    left: Allowance,
    required: RequiredSigners | None = None,
) -> Catalog:
    """List a commit's files, and the paths of its artifacts; no manifest is read.

    Raises:
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    with silence_hub():
        listed = _read_all(lambda commit: client.files(repo, commit), [commit], left.end)[commit]
    files = {entry.path: entry for entry in listed}
    places, notes = find_artifact_paths(files)
    return Catalog(repo, commit, files, {}, notes, tuple(places), required)


def read_manifests(
    client: HubClient, catalog: Catalog, places: Iterable[ArtifactPath], left: Allowance
) -> Catalog:
    """A catalog with the manifests of these places beside those that were read before.

    Raises:
        BadManifest: they are more than the allowance has left.
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    repo, commit, files = catalog.repo, catalog.commit, catalog.files
    missing = [place for place in places if place not in catalog.artifacts]
    left.take(f"{repo} at {commit}", [files[place.manifest].size for place in missing])
    signatures = CommitSignatures(client, repo, commit, files)
    with silence_hub():
        found = _read_all(
            lambda place: _read_manifest(
                signatures, files[place.manifest], place, catalog.required
            ),
            missing,
            left.end,
        )
    there = catalog.artifacts | {place: artifact for place, (artifact, _) in found.items()}
    signers = {place: signer for place, (_, signer) in found.items() if signer}
    return replace(
        catalog,
        artifacts={place: there[place] for place in catalog.places if place in there},
        signers={**catalog.signers, **signers},
    )


def read_claims(
    client: HubClient, catalog: Catalog, sent: Mapping[ArtifactPath, bytes | None]
) -> dict[ArtifactPath, str]:
    """Who says to have signed each artifact of a commit that has a signature; nobody verified it.

    What is `sent` to it now comes in place of what is there: a signature, or none.

    Raises:
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    there = CommitSignatures(client, catalog.repo, catalog.commit, catalog.files)
    signed = [
        place
        for place in catalog.places
        if place not in sent and place.file(SIGNATURE) in catalog.files
    ]
    with silence_hub():
        found = _read_all(there.read_claim, signed, Allowance().end)
    return found | {place: read_claim(text) for place, text in sent.items() if text is not None}


def find_artifact_paths(paths: Iterable[str]) -> tuple[list[ArtifactPath], tuple[str, ...]]:
    """The artifacts' folders among the paths, and notes on what only looks like one."""
    places, notes = [], []
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        if name == FILENAME:
            try:
                places.append(ArtifactPath.parse(folder))
            except BadRequest as error:
                notes.append(f"{escape_line(path)} is ignored: {error}")
    return places, tuple(notes)


def _read_all(
    read: Callable[[_Name], _Found], names: Sequence[_Name], end: float
) -> dict[_Name, _Found]:
    """What `read` gives for each name, several at once.

    Until the clock is at `end`. An interrupt or an error waits for nobody who still reads, not even
    at the process's end, as a pool's would: of a slow endpoint that takes minutes.
    """
    from concurrent.futures import Future  # not for a warm pull, which counts ms

    answers: dict[_Name, Future[_Found]] = {name: Future() for name in names}
    waiting = deque(names)

    def work() -> None:
        with suppress(IndexError):  # of a deque that is empty
            while True:
                name = waiting.popleft()
                try:
                    answers[name].set_result(read(name))
                except Exception as error:
                    answers[name].set_exception(error)

    for _ in range(min(_READERS, len(names))):
        Thread(target=work, daemon=True).start()
    try:
        return {name: each.result(end - time.monotonic()) for name, each in answers.items()}
    except TimeoutError as error:
        raise HubUnreachable(
            f"the endpoint takes more than {_SECONDS:.0f} s to show what the repo holds",
            hint="try again when it is faster",
        ) from error
    finally:
        waiting.clear()


def _read_manifest(
    commit: CommitSignatures, entry: Entry, place: ArtifactPath, required: RequiredSigners | None
) -> tuple[Manifest | Unreadable, Signer | None]:
    """One manifest, compared with its path, and who signed it; or why it cannot be used."""
    signer, statement = None, b""
    try:
        if entry.size > LARGEST_MANIFEST:
            raise BadManifest(f"{entry.path} is larger than {LARGEST_MANIFEST >> 20} MiB")
        text = commit.client.fetch(commit.repo, commit.commit, entry)
        if required is not None:
            signer, statement = commit.verify(place, text, required)
        manifest = parse_manifest(text, f"{commit.repo}/{entry.path}")
        require_agreement(place, manifest)
        if signer is not None:
            commit.require_statement(place, manifest, statement)
    except (BadManifest, DigestMismatch, Unsigned, BadSignature) as error:
        return error, None
    return manifest, signer
