"""What a commit of a repo holds: the tree is the index, each manifest in it an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from hubaoti.errors import BadManifest, BadRequest, DigestMismatch
from hubaoti.escape import one_line
from hubaoti.hub.client import Entry, HubClient
from hubaoti.hub.layout import Place, require_agreement
from hubaoti.hub.words import quiet
from hubaoti.manifest import FILENAME, LARGEST, Manifest, parse

READERS = 8  # manifests that are fetched at once

Unreadable = BadManifest | DigestMismatch


@dataclass(frozen=True, slots=True)
class Catalog:
    """A commit's files by path, and its artifacts: each a manifest, or why it cannot be read.

    `notes` say which manifests were ignored, because their path is no artifact's.
    """

    repo: str
    commit: str
    files: dict[str, Entry]
    artifacts: dict[Place, Manifest | Unreadable]
    notes: tuple[str, ...]

    @property
    def readable(self) -> dict[Place, Manifest]:
        """The artifacts whose manifests are good."""
        found = self.artifacts.items()
        return {place: each for place, each in found if isinstance(each, Manifest)}


def read_catalog(client: HubClient, repo: str, commit: str) -> Catalog:
    """Read every manifest of a commit; a bad one hides no other.

    Raises:
        RepoNotFound, AuthFailed, HubUnreachable: from the client.
    """
    files = {entry.path: entry for entry in client.files(repo, commit)}
    places, notes = places_in(files)
    with quiet():
        artifacts = read_all(
            lambda place: read_manifest(client, repo, commit, files[place.manifest]), places
        )
    return Catalog(repo, commit, files, artifacts, notes)


def places_in(paths: Iterable[str]) -> tuple[list[Place], tuple[str, ...]]:
    """The artifacts' folders among the paths, and notes on what only looks like one."""
    places, notes = [], []
    for path in sorted(paths):
        folder, _, name = path.rpartition("/")
        if name == FILENAME:
            try:
                places.append(Place.parse(folder))
            except BadRequest as why:
                notes.append(f"{one_line(path)} is ignored: {why}")
    return places, tuple(notes)


def read_all(
    read: Callable[[Place], Manifest | Unreadable], places: Sequence[Place]
) -> dict[Place, Manifest | Unreadable]:
    """What `read` gives for each place, several at once.

    An interrupt or an error waits for nobody who still reads, not even at the process's end, as a
    pool's would: of a slow endpoint that takes minutes.
    """
    from concurrent.futures import Future  # not for a warm pull, which counts ms

    answers: dict[Place, Future[Manifest | Unreadable]] = {place: Future() for place in places}
    waiting: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        waiting.put(place)

    def work() -> None:
        for place in emptied(waiting):
            try:
                answers[place].set_result(read(place))
            except Exception as why:
                answers[place].set_exception(why)

    for _ in range(min(READERS, len(places))):
        Thread(target=work, daemon=True).start()
    try:
        return {place: answer.result() for place, answer in answers.items()}
    finally:
        list(emptied(waiting))


def emptied(queue: SimpleQueue[Place]) -> Iterator[Place]:
    """What waits in a queue, until nothing does."""
    with suppress(Empty):
        while True:
            yield queue.get_nowait()


def read_manifest(client: HubClient, repo: str, commit: str, entry: Entry) -> Manifest | Unreadable:
    """One manifest, compared with its path; or the reason that it cannot be used."""
    try:
        if entry.size > LARGEST:
            raise BadManifest(f"{entry.path} is larger than {LARGEST >> 20} MiB")
        manifest = parse(client.read(repo, commit, entry), f"{repo}/{entry.path}")
        require_agreement(Place.parse(entry.path.rpartition("/")[0]), manifest)
    except (BadManifest, DigestMismatch) as why:
        return why
    return manifest
