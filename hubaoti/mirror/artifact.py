"""An artifact as it lies in the mirror."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubaoti.artifact.manifest import Graph, Manifest
from hubaoti.errors import DigestMismatch


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact of the mirror: `path` has its manifest and small tensors."""

    digest: str
    path: Path
    graphs: Path
    manifest: Manifest

    def graph_folder(self, graph: Graph) -> Path:
        """The folder in which a graph's package lies unpacked, read-only."""
        return self.graphs / graph.sha256

    def file(self, path: str) -> Path:
        """Where one of the small tensors' files lies."""
        return self.path / path


def describe_changed(path: Path) -> DigestMismatch:
    return DigestMismatch(
        f"{path} has other bytes than its manifest lists",
        hint="pull it again, into a HUBAOTI_HOME that you may write; a broken copy is kept in the "
        "mirror's quarantine, never opened",
    )
