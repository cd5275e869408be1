"""What is built already, by its key: at the output, or in the mirror."""

from __future__ import annotations

import shutil
from pathlib import Path

from hubaoti.artifact.bundle import Bundle, tidy, write_bundle, write_manifest
from hubaoti.artifact.package import pack_folder
from hubaoti.errors import BadManifest, DigestMismatch
from hubaoti.mirror import Artifact, Mirror
from hubaoti.progress import Progress


def find_built(key: str, output: Path, mirror: Mirror, progress: Progress) -> Bundle | None:
    """The bundle of a key where it is already: at the output, or in the mirror."""
    tidy(output)  # else one that a kill moved aside is not found
    if bundle := find_whole(output, key):
        progress(f"found {key[:12]} in {output}")
        return bundle
    for artifact in mirror.by_key(key):
        try:
            mirror.verify(artifact)
            bundle = _copy_from_mirror(artifact, output)
        except DigestMismatch:
            continue
        progress(f"found {key[:12]} in the mirror")
        return bundle
    return None


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
