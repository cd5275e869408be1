"""What a commit of a repo holds: the tree is the index, each manifest in it an artifact."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import TypeVar

from hubaoti.artifact.manifest import FILENAME, LARGEST_MANIFEST, Manifest, parse_manifest
from hubaoti.errors import (
    BadManifest,
    BadRequest,
    BadSignature,
    DigestMismatch,
    HubUnreachable,
    Unsigned,
)
from hubaoti.escape import escape_line
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import silence_hub
from hubaoti.hub.layout import ArtifactPath, require_agreement
from hubaoti.hub.records import Entry
from hubaoti.hub.signatures import CommitSignatures, RequiredSigners
from hubaoti.mirror.signer import Signer

_READERS = 8  # manifests that are fetched at once
_SECONDS = 300.0  # for all that is read of a repo
_MOST = 1000  # manifests
_TOGETHER = 64 << 20  # bytes of them

Unreadable = BadManifest | DigestMismatch | Unsigned | BadSignature
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
        self.manifests -= len(sizes)
        self.bytes -= sum(min(size, LARGEST_MANIFEST) for size in sizes)
        if self.manifests < 0 or self.bytes < 0:
            raise BadManifest(
                f"{where} has more manifests than are read: {_MOST} of them, and "
                f"{_TOGETHER >> 20} MiB, are the most",
                hint="name a revision that has fewer, or ask its publisher for one",
            )


@dataclass(frozen=True, slots=True)
class Catalog:
    """A commit's files by path, and its artifacts: each a manifest, or why it cannot be read.

    `notes` say which manifests were ignored, because their path is no artifact's; `places` are all
    artifacts, where only one was read; `signers` are who signed them, where somebody has to.
    """

    repo: str
    commit: str
    files: dict[str, Entry]
    artifacts: dict[ArtifactPath, Manifest | Unreadable]
    notes: tuple[str, ...]
    places: tuple[ArtifactPath, ...] = ()
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
    with silence_hub():
        listed = _read_all(lambda commit: client.files(repo, commit), [commit], left.end)[commit]
        files = {entry.path: entry for entry in listed}
        there, notes = find_artifact_paths(files)
        places = [place for place in there if only in (None, place)]
        left.take(f"{repo} at {commit}", [files[place.manifest].size for place in places])
        signatures = CommitSignatures(client, repo, commit, files)
        found = _read_all(lambda p: _read_manifest(signatures, p, required), places, left.end)
    return Catalog(
        repo,
        commit,
        files,
        artifacts={place: artifact for place, (artifact, _) in found.items()},
        notes=notes,
        places=tuple(there),
        signers={place: signer for place, (_, signer) in found.items() if signer},
    )


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
    commit: CommitSignatures, place: ArtifactPath, required: RequiredSigners | None
) -> tuple[Manifest | Unreadable, Signer | None]:
    """One manifest, compared with its path, and who signed it; or why it cannot be used."""
    entry, signer, statement = commit.files[place.manifest], None, b""
    try:
        if entry.size > LARGEST_MANIFEST:
            raise BadManifest(f"{entry.path} is larger than {LARGEST_MANIFEST >> 20} MiB")
        text = commit.client.read(commit.repo, commit.commit, entry)
        if required is not None:
            signer, statement = commit.verify(place, text, required)
        manifest = parse_manifest(text, f"{commit.repo}/{entry.path}")
        require_agreement(place, manifest)
        if signer is not None:
            commit.require_statement(place, manifest, statement)
    except (BadManifest, DigestMismatch, Unsigned, BadSignature) as error:
        return error, None
    return manifest, signer
