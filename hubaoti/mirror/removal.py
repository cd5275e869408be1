"""How an artifact leaves the mirror: its row first, then its files, whatever ends us in between."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.disk import explain_disk_errors
from hubaoti.errors import ArtifactHeld
from hubaoti.mirror.folders import make_workspace

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror


def remove(mirror: Mirror, digest: str) -> None:
    """Remove an artifact that is promised, and the graphs that no other holds.

    Raises:
        ArtifactHeld: it is pinned, or open in a process that lives; nothing was removed.
        HubaotiError: the mirror may not be written.
    """
    mirror.index.require_writable()
    if holders := mirror.usage.list_pins().get(digest):
        files = " and ".join(filter(None, holders))
        raise ArtifactHeld(
            f"artifact {digest[:12]} is pinned{f' by {files}' if files else ''}",
            hint=f"remove it from {files} first"
            if files
            else f"first: hubaoti mirror unpin {digest[:12]}",
        )
    with mirror.leases.changing_files(), mirror.leases.removing(digest):
        _remove(mirror, [digest])


def remove_unheld(mirror: Mirror, digests: Iterable[str]) -> list[str]:
    """Remove those that no living process has open, whoever pinned them; which are gone.

    It is for who changes files already.
    """
    with ExitStack() as leases:
        taken = []
        for digest in digests:
            with suppress(ArtifactHeld):
                leases.enter_context(mirror.leases.removing(digest))
                taken.append(digest)
        _remove(mirror, taken)
    return taken


def _remove(mirror: Mirror, digests: list[str]) -> None:
    """Rows first, then files."""
    graphs = [mirror.root / "graphs" / graph for graph in mirror.index.remove(*digests)]
    artifacts = [mirror.root / "artifacts" / digest for digest in digests]
    delete_folders(mirror.root / "tmp", artifacts + graphs)


def delete_folders(tmp: Path, folders: Iterable[Path]) -> None:
    """Delete folders, or files, each of which is gone at once: what is left of it is swept."""
    with explain_disk_errors(tmp), make_workspace(tmp) as work:
        for at, folder in enumerate(folders):
            if folder.exists() or folder.is_symlink():
                gone = folder.rename(work / f"{at}")
                if gone.is_dir() and not gone.is_symlink():
                    shutil.rmtree(gone, ignore_errors=True)
