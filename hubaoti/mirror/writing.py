"""An artifact's files as they are written: for us alone, and so that they survive a power cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.manifest import Graph, Manifest
from hubaoti.artifact.package import copy_hashed, unpack
from hubaoti.mirror.artifact import describe_changed
from hubaoti.mirror.folders import sync_folder


def unpack_synced(package: Path, graph: Graph, folder: Path) -> None:
    """Unpack a graph's listed members, for us alone and so that they survive a power cut."""
    folder.mkdir(mode=0o700)
    unpack(package, graph.members, folder)
    for each in folder.rglob("*"):
        if each.is_dir():
            each.chmod(0o700)
            sync_folder(each)


def write_small(manifest: Manifest, files: Mapping[str, Path], folder: Path) -> None:
    """Write the manifest and the small tensors, read-only."""
    folder.mkdir(mode=0o700)
    for file in manifest.files:
        target = folder / file.path
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files[file.path].open("rb") as source, target.open("xb") as sink:
            digest = copy_hashed(source, sink, file.size)
            sink.flush()
            os.fsync(sink.fileno())
        if digest != file.sha256:
            raise describe_changed(files[file.path])
        target.chmod(0o444)
    target = folder / manifests.FILENAME
    with target.open("xb") as sink:
        sink.write(manifest.to_json())
        sink.flush()
        os.fsync(sink.fileno())
    target.chmod(0o444)
