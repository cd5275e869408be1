"""An artifact as it lies in the mirror, and its files as they are written there.

They are for us alone, and survive a power cut.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import (
    OVERLONG,
    copy_hashed,
    copy_unpacked,
    has_bytes,
    holds_members,
    is_overlong,
    unpack,
)
from hubaoti.artifact.schema import Graph
from hubaoti.disk import explain_unread, open_plain, sync_folder
from hubaoti.errors import BadManifest, DigestMismatch
from hubaoti.mirror.kernel import KERNELS, holds_kernel


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact of the mirror: `path` has its manifest and small tensors."""

    digest: str
    path: Path
    graphs: Path
    manifest: Manifest = field(repr=False)

    def graph_folder(self, graph: Graph) -> Path:
        """The folder in which a graph's package lies unpacked, read-only."""
        return self.graphs / graph.sha256

    @property
    def kernels(self) -> Path:
        """The folder in which kernels lie, by the digests of their builds."""
        return self.graphs.with_name(KERNELS)

    def file(self, path: str) -> Path:
        """Where one of the small tensors' files lies."""
        return self.path / path


def read_artifact(
    root: Path, digest: str, folder: Path | None = None, is_known: bool = False
) -> Artifact | None:
    """The artifact of the mirror at `root`, promised or not, whose manifest lies in a folder, by
    default in its own.

    The manifest is believed by its digest, its form too where it `is_known`: where a row of the
    index promises it. None where there is none, or another.

    Raises:
        HubaotiError: it could not be read.
    """
    folder = folder or root / "artifacts" / digest
    path = folder / manifests.FILENAME
    with suppress(FileNotFoundError, BadManifest):
        with open_plain(path) as file:
            text = file.read()
        if hashlib.sha256(text).hexdigest() == digest:
            manifest = manifests.parse_manifest(text, str(path), is_known)
            return Artifact(digest, folder, root / "graphs", manifest)
    return None


def describe_changed(path: Path) -> DigestMismatch:
    """The error that says that a file is not the one that its manifest lists."""
    return DigestMismatch(
        f"{path} has other bytes than its manifest lists",
        hint="get it again as it came (pull, compile or import it), into a HUBAOTI_HOME that you "
        "may write; a broken copy is kept in the mirror's quarantine, never opened",
    )


def unpack_synced(package: Path, graph: Graph, folder: Path) -> None:
    """Unpack a graph's listed members, for us alone and so that they survive a power cut.

    The package may be a folder, in which they lie unpacked.

    Raises:
        BadManifest: it has another size than is said. BadPackage: as `unpack`.
    """
    folder.mkdir(mode=0o700)
    (copy_unpacked if package.is_dir() else unpack)(package, graph.members, folder)
    if package.is_file() and (size := package.stat().st_size) != graph.size:
        raise BadManifest(
            f"the manifest says that {graph.file} has {graph.size} bytes; {package} has {size}",
            hint="get it again as it came (pull, compile or import it), or ask its publisher",
        )
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


def require_short_names(manifest: Manifest) -> None:
    """See that no file of an artifact lies deeper, or has a longer name, than disks and tools take.

    Raises:
        BadManifest: one does.
    """
    members = (member.path for graph in manifest.graphs for member in graph.members)
    for path in (*(file.path for file in manifest.all_files()), *members):
        if is_overlong(path):
            raise BadManifest(
                f"artifact {manifest.digest[:12]} lists a file {OVERLONG}: {path!r:.120}",
                hint="it was made to harm, or by mistake: ask its publisher",
            )


def compute_unpacked_size(manifest: Manifest) -> int:
    """The bytes that an artifact takes in the mirror."""
    members = sum(member.size for graph in manifest.graphs for member in graph.members)
    return members + sum(file.size for file in manifest.files) + len(manifest.to_json())


def has_sizes(artifact: Artifact) -> bool:
    """Whether every file is there, of the right size; their bytes are for `verify`.

    Raises:
        HubaotiError: one could not be looked at.
    """
    sizes = {f"{artifact.path}/{file.path}": file.size for file in artifact.manifest.files}
    for graph in artifact.manifest.graphs:
        folder = artifact.graph_folder(graph)
        sizes |= {f"{folder}/{member.path}": member.size for member in graph.members}
    with suppress(FileNotFoundError), explain_unread(artifact.path):
        return all(os.lstat(path).st_size == size for path, size in sizes.items())
    return False


def holds_small(artifact: Artifact) -> bool:
    """Whether the manifest and the small tensors are there, byte for byte."""
    files = artifact.manifest.files
    return has_bytes(artifact.path / manifests.FILENAME, artifact.digest) and all(
        has_bytes(artifact.file(file.path), file.sha256) for file in files
    )


def is_whole(artifact: Artifact) -> bool:
    """Whether all of an artifact is there, byte for byte, the kernels that it calls left out."""
    graphs = artifact.manifest.graphs
    return holds_small(artifact) and all(
        holds_members(artifact.graph_folder(graph), graph) for graph in graphs
    )


def has_kernels(artifact: Artifact) -> bool:
    """Whether all kernels that an artifact calls are there, byte for byte."""
    builds = [pin.build for pin in artifact.manifest.requires.kernels]
    return all(each and holds_kernel(each, artifact.kernels / each.digest) for each in builds)
