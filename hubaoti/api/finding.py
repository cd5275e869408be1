"""What is built already, by its key: at the output, or in the mirror."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubaoti.artifact.bundle import Bundle, tidy, write_bundle, write_manifest
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import pack_folder
from hubaoti.errors import BadManifest, DigestMismatch, HubaotiError
from hubaoti.mirror import Artifact, Mirror, Row
from hubaoti.mirror.answers import MIRROR
from hubaoti.progress import Progress


def find_built(
    key: str, output: Path, mirror: Mirror, progress: Progress, own: bool = False
) -> Bundle | None:
    """The bundle of a key where it is already: at the output, or in the mirror.

    Anybody can claim a key, and put a bundle into a folder that others write, too. So only what may
    be opened here is found; with `own` only what this machine built, as it is to be published.
    """
    tidy(output)  # else one that a kill moved aside is not found
    if bundle := find_whole(output, key):
        decision = mirror.decide(bundle.manifest.digest)
        if decision.allowed and (not own or mirror.index.is_built(bundle.manifest.digest)):
            progress(f"found {key[:12]} in {output}, {decision.reason}")
            return bundle
        progress(f"{output} holds {key[:12]}, {decision.reason}: it is not taken")
    for artifact in list_allowed(mirror, mirror.index.rows(key), own):
        try:
            mirror.verify_own(artifact)
            bundle = _copy_from_mirror(artifact, output)
        except DigestMismatch:
            continue
        mirror.answers.record(MIRROR, artifact.manifest)
        progress(f"found {key[:12]} in the mirror, {mirror.decide(artifact.digest).reason}")
        return bundle
    return None


@contextmanager
def telling_replaced(places: Iterable[Path], mirror: Mirror, progress: Progress) -> Iterator[None]:
    """Around work that may put other bundles where some lie: which are gone from there, is told."""
    before = {place: manifest for place in places if (manifest := _read_manifest(place))}
    try:
        yield
    finally:
        for place, old in before.items():
            now = _read_manifest(place)
            if now is None or now.key == old.key:
                continue
            kept = ", which stays in the mirror" if mirror.index.row(old.digest) else ""
            was = f"{old.source.model or 'a model'} (key {old.key[:12]})"
            progress(f"replaced in {place}: the bundle of {was}{kept}")


def _read_manifest(place: Path) -> Manifest | None:
    """The manifest of the bundle at a place; None where there is none that can be read."""
    with suppress(HubaotiError):
        return Bundle.read(place).manifest
    return None


def list_allowed(mirror: Mirror, rows: Iterable[Row], own: bool = False) -> Iterator[Artifact]:
    """Of some rows the artifacts that may be opened here, or of them only this machine's `own`."""
    for row in rows:
        is_meant = mirror.decide(row.digest).allowed
        is_meant = is_meant and (not own or mirror.index.is_built(row.digest))
        if is_meant and (artifact := mirror.artifact(row.digest)):
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
