"""Fetch: an artifact's files from the Hub, each compared with its manifest, into the mirror."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import hash_file
from hubaoti.artifact.sizes import format_size
from hubaoti.disk import require_disk_room
from hubaoti.errors import BadPackage, DigestMismatch, HubaotiError
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import ArtifactPath
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.artifact import compute_unpacked_size
from hubaoti.progress import Progress

_ATTEMPTS = 3


def fetch_artifact(
    client: HubClient,
    mirror: Mirror,
    catalog: Catalog,
    place: ArtifactPath,
    origin: PullOrigin,
    progress: Progress,
) -> Artifact:
    """Download, verify and unpack what a catalog has at a place; nothing is kept twice.

    Raises:
        DigestMismatch, BadPackage: a file is not the one that the manifest lists.
        DiskFull: there is no room; nothing half-written stays.
        RepoNotFound, AuthFailed, HubUnreachable: of the Hub.
    """
    manifest = catalog.readable[place]
    _require_listed(catalog, place, manifest)
    client.sweep()
    for _ in range(_ATTEMPTS):
        # The zips, and what is unpacked from them, lie on the disk together for a while.
        require_disk_room(mirror.root, manifest.size + compute_unpacked_size(manifest))
        try:
            with _download(client, catalog, place, manifest, progress) as files:
                progress(f"unpacking {place}")
                return mirror.put(manifest, files, origin, place.recipe)
        except FileNotFoundError:
            # Another pull of the same artifact stored it, and removed what we shared.
            progress(f"downloading {place} again: another pull removed it")
        except BadPackage as error:
            raise BadPackage(f"{place} of {catalog.repo}: {error}", hint=error.hint) from error
    raise HubaotiError(
        f"the downloads of {place} were removed {_ATTEMPTS} times",
        hint=f"see who else works in {mirror.root}, then pull again",
    )


def _require_listed(catalog: Catalog, place: ArtifactPath, manifest: Manifest) -> None:
    """See that the commit has the manifest's files, of their sizes, before one is fetched."""
    for file in manifest.all_files():
        entry = catalog.files.get(place.file(file.path))
        if entry is None or entry.size != file.size:
            found = "is missing" if entry is None else f"has {entry.size} bytes"
            raise DigestMismatch(
                f"{place.file(file.path)} {found} in {catalog.repo}; its manifest lists "
                f"{file.size} bytes",
                hint="ask the publisher to push it again",
            )


@contextmanager
def _download(
    client: HubClient,
    catalog: Catalog,
    place: ArtifactPath,
    manifest: Manifest,
    progress: Progress,
) -> Iterator[dict[str, Path]]:
    """The artifact's files, verified; they leave the cache folder once they are stored.

    After an error those that are whole stay, so that the next pull need not fetch them again.
    """
    files: dict[str, Path] = {}
    for file in manifest.all_files():
        path = place.file(file.path)
        progress(f"downloading {path} ({format_size(file.size)})")
        found = files[file.path] = client.download(catalog.repo, catalog.commit, path)
        if found.stat().st_size != file.size or hash_file(found) != file.sha256:
            client.drop(found)
            raise DigestMismatch(
                f"{path} from {client.endpoint} is not the file that its manifest lists",
                hint="pull again; if it stays so, ask the publisher to push it again",
            )
    yield files
    for downloaded in files.values():
        client.drop(downloaded)
