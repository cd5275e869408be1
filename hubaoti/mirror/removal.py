"""How an artifact leaves the mirror: its row first, then its files, whatever ends us in between."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.artifact.sizes import format_count
from hubaoti.disk import explain_disk_errors
from hubaoti.errors import ArtifactHeld, HubaotiError, first_line
from hubaoti.folder_trees import remove_tree
from hubaoti.mirror.folders import make_workspace

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_SHOWN = 5  # of what could not be deleted


def remove(mirror: Mirror, digest: str) -> None:
    """Remove an artifact that is promised, and the graphs that no other holds.

    Raises:
        ArtifactHeld: it is pinned, or open in a process that lives; nothing was removed.
        HubaotiError: the mirror may not be written; or it is promised no more, and files of it
            stay, which the system does not let go.
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
        stuck = _remove(mirror, [digest])
    refuse_stuck(stuck, f"artifact {digest[:12]} is not in the mirror any more, but ")


@dataclass(frozen=True, slots=True)
class Stuck:
    """What could not be deleted, or not all of it: where it lay, and why."""

    path: str
    why: str


def refuse_stuck(stuck: Sequence[Stuck], what: str = "") -> None:
    """See that all could be deleted that was to be; `what` begins the message of what could not.

    Raises:
        HubaotiError: something stays.
    """
    if stuck:
        some = "; ".join(f"{each.path}: {each.why}" for each in stuck[:_SHOWN])
        more = f"; and {len(stuck) - _SHOWN} more" if len(stuck) > _SHOWN else ""
        raise HubaotiError(
            f"{what}{format_count(len(stuck), 'folder')} could not be removed: {some}{more}",
            hint="nothing opens what is left there; see what holds it (lsattr, mount, lsof), and "
            "then run: hubaoti mirror gc",
        )


def remove_unheld(mirror: Mirror, digests: Iterable[str]) -> tuple[list[str], list[Stuck]]:
    """Remove those that no living process has open, whoever pinned them; which are gone.

    And what could not be deleted of them. It is for who changes files already.
    """
    with ExitStack() as leases:
        taken = []
        for digest in digests:
            with suppress(ArtifactHeld):
                leases.enter_context(mirror.leases.removing(digest))
                taken.append(digest)
        return taken, _remove(mirror, taken)


def _remove(mirror: Mirror, digests: list[str]) -> list[Stuck]:
    """Rows first, then files; what could not be deleted."""
    graphs = [mirror.root / "graphs" / graph for graph in mirror.index.remove(*digests)]
    artifacts = [mirror.root / "artifacts" / digest for digest in digests]
    return delete_folders(mirror.root, artifacts + graphs)


def delete_folders(root: Path, folders: Iterable[Path]) -> list[Stuck]:
    """Delete folders, or files, of a mirror, each of which is gone at once; which are not.

    What cannot be deleted keeps none of the others. What is left of it is swept, or found again.

    Raises:
        HubaotiError: nothing can be.
    """
    tmp, stuck = root / "tmp", list[Stuck]()
    with explain_disk_errors(tmp), make_workspace(tmp) as work:
        for at, folder in enumerate(folders):
            try:
                if os.path.lexists(folder):
                    gone = folder.rename(work / f"{at}")
                    if gone.is_dir() and not gone.is_symlink():
                        remove_tree(gone)
            except OSError as error:
                path, why = folder.relative_to(root).as_posix(), error.strerror or first_line(error)
                stuck.append(Stuck(path, why))
    return stuck
