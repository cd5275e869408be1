"""What is built already, by its key: at the output, or in the mirror."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from hubaoti.artifact.bundle import Bundle, tidy, write_bundle, write_manifest
from hubaoti.artifact.package import pack_folder
from hubaoti.errors import BadManifest, DigestMismatch
from hubaoti.hub.trust import Trust
from hubaoti.mirror import Artifact, Mirror, Row
from hubaoti.progress import Progress


def find_built(
    key: str, output: Path, mirror: Mirror, trust: Trust, progress: Progress
) -> Bundle | None:
    """The bundle of a key where it is already: at the output, or in the mirror.

    Anybody can claim a key. So of the mirror only what was built here, or comes from a publisher
    who is trusted now.
    """
    tidy(output)  # else one that a kill moved aside is not found
    if bundle := find_whole(output, key):
        progress(f"found {key[:12]} in {output}")
        return bundle
    for artifact in list_trusted(mirror, mirror.index.rows(key), trust):
        try:
            mirror.verify_own(artifact)
            bundle = _copy_from_mirror(artifact, output)
        except DigestMismatch:
            continue
        progress(f"found {key[:12]} in the mirror")
        return bundle
    return None


def list_trusted(mirror: Mirror, rows: Iterable[Row], trust: Trust) -> Iterator[Artifact]:
    """Of some rows the artifacts that were built here, or come from a trusted publisher."""
    for row in rows:
        origin = row.origin
        is_ours = mirror.index.is_built(row.digest)
        may_run = is_ours or trust.holds(origin.endpoint, origin.publisher)
        if may_run and (artifact := mirror.artifact(row.digest)):
            yield artifact


def _copy_from_mirror(artifact: Artifact, output: Path) -> Bundle:
    """A bundle from the mirror, its graphs packed again."""
    with write_bundle(output) as scratch:
        for file in artifact.manifest.files:
            target = scratch / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(file.path), target)
        for graph in artifact.manifest.graphs:
            package = scratch / graph.file
            package.parent.mkdir(parents=True, exist_ok=True)
            pack_folder(artifact.graph_folder(graph), package)
        write_manifest(scratch, artifact.manifest)
        Bundle.read(scratch).check()
    return Bundle.read(output)


def find_whole(output: Path, key: str) -> Bundle | None:
    """The bundle of a key that lies in a folder; None where it is not there, or damaged."""
    try:
        bundle = Bundle.read(output)
        if bundle.manifest.key != key:
            return None
        bundle.check()
    except (BadManifest, DigestMismatch):
        return None
    return bundle
