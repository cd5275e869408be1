"""An artifact as it lies in the mirror, and whether all of it is there, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubaoti import manifest as manifests
from hubaoti.errors import DigestMismatch
from hubaoti.manifest import Graph, Manifest
from hubaoti.package import sha256_of


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact of the mirror: `path` has its manifest and small tensors."""

    digest: str
    path: Path
    graphs: Path
    manifest: Manifest

    def graph_folder(self, graph: Graph) -> Path:
        """Where a graph's package lies unpacked."""
        return self.graphs / graph.sha256

    def file(self, path: str) -> Path:
        """Where one of the small tensors' files lies."""
        return self.path / path


def has_sizes(artifact: Artifact) -> bool:
    """Whether every file is there, of the right size; their bytes are for `verify`."""
    sizes = {artifact.file(file.path): file.size for file in artifact.manifest.files}
    for graph in artifact.manifest.graphs:
        folder = artifact.graph_folder(graph)
        sizes |= {folder / member.path: member.size for member in graph.members}
    return all(has_size(path, size) for path, size in sizes.items())


def has_size(path: Path, size: int) -> bool:
    """Whether a file is there, of this size."""
    try:
        return path.lstat().st_size == size
    except OSError:
        return False


def holds_members(folder: Path, graph: Graph) -> bool:
    """Whether an unpacked graph is there, byte for byte."""
    members = graph.members
    return folder.is_dir() and all(has_bytes(folder / each.path, each.sha256) for each in members)


def holds_small(artifact: Artifact) -> bool:
    """Whether the manifest and the small tensors are there, byte for byte."""
    files = artifact.manifest.files
    return has_bytes(artifact.path / manifests.FILENAME, artifact.digest) and all(
        has_bytes(artifact.file(file.path), file.sha256) for file in files
    )


def has_bytes(path: Path, sha256: str) -> bool:
    """Whether a file is there, and no link, with these bytes; one that cannot be read has none."""
    try:
        return path.is_file() and not path.is_symlink() and sha256_of(path) == sha256
    except OSError:
        return False


def changed(path: Path) -> DigestMismatch:
    return DigestMismatch(
        f"{path} has other bytes than its manifest lists",
        hint="pull it again, into a HUBAOTI_HOME that you may write; a broken copy is kept in the "
        "mirror's quarantine, never opened",
    )


def is_whole(artifact: Artifact) -> bool:
    """Whether all of an artifact is there, byte for byte."""
    graphs = artifact.manifest.graphs
    return holds_small(artifact) and all(
        holds_members(artifact.graph_folder(graph), graph) for graph in graphs
    )
