"""How long opening a graph takes, ours and torch's own way, each in a process of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.children import ask_module


def time_our_opening(mirror: Path, digest: str, inductor: Path) -> float:
    """Seconds that a graph of a mirror takes, its digests included."""
    return float(ask_module("opening", mirror, digest, inductor=inductor))


def time_public_opening(package: Path, inductor: Path) -> float:
    """Seconds that `aoti_load_package` takes, with inductor's cache in a folder."""
    return float(ask_module("opening", package, inductor=inductor))


def _open_ours(mirror: Path, digest: str) -> float:
    """The whole of what hubaoti does to a graph that is in the mirror."""
    import torch

    from hubaoti.mirror import Mirror
    from hubaoti.runtime.graph import open_graph

    with Mirror.open(mirror) as opened:
        artifact = opened.artifact(digest)
        assert artifact is not None
        entry = artifact.manifest.graphs[0]
        start = time.perf_counter()
        opened.verify_graph(entry)
        open_graph(artifact.graph_folder(entry), entry, torch.device("cpu"))
        return time.perf_counter() - start


def _open_publicly(package: str) -> float:
    """Torch's own loader."""
    from torch._inductor import aoti_load_package

    start = time.perf_counter()
    aoti_load_package(package)
    return time.perf_counter() - start


def main() -> None:
    """Open what the command line names, and say how long it took."""
    first, *digest = sys.argv[1:]
    spent = _open_ours(Path(first), digest[0]) if digest else _open_publicly(first)
    sys.stdout.write(f"{spent}\n")


if __name__ == "__main__":
    main()
