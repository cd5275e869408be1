"""What lies in the mirror and no row promises: of killed processes, and of downloads given up.

And the other way round: what a row promises, and somebody has removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.disk import explain_unread
from hubaoti.mirror.facts import read_facts
from hubaoti.mirror.kernel import KERNELS
from hubaoti.mirror.quarantine import read_note

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_DAY = 24 * 3600  # seconds in which a download that is whole may still be asked for
_HOUR = 3600  # seconds in which a download that is not whole was written to
_SMALL = 1 << 20  # bytes of a download that may stay, as manifests do


def find_orphans(mirror: Mirror) -> list[Path]:
    """The folders and files that nobody will ask for, for who changes files already.

    What a living process has open stays, and what is in quarantine may come back to.
    """
    rows = {row.digest for row in mirror.index.rows()}
    notes = [read_note(folder) for folder in (mirror.root / "quarantine").iterdir()]
    waiting = {promise.row.digest for note in notes for promise in note.promises}
    kept, orphans = {*rows}, list[Path]()
    for folder in (mirror.root / "artifacts").iterdir():
        if folder.name in rows:
            continue
        if folder.name in waiting or mirror.leases.is_held(folder.name):
            kept.add(folder.name)
        else:
            orphans.append(folder)
    graphs, kernels = _list_parts(mirror, kept - rows, rows)
    for name, known in (("graphs", graphs), (KERNELS, kernels)):
        found = (each for each in (mirror.root / name).iterdir() if each.name not in known)
        orphans += [each for each in found if not mirror.leases.is_held(each.name)]
    return [*orphans, *_find_downloads(mirror.root / "hub"), *_find_dangling(mirror.root / "hub")]


def find_gone(mirror: Mirror) -> set[str]:
    """The artifacts that are promised, and of which a folder is not there any more.

    Raises:
        HubaotiError: the mirror's folders cannot be listed.
    """
    rows = mirror.index.select("select digest from artifacts")
    holds = mirror.index.select("select digest, graph from holds")
    artifacts, graphs = (_list_names(mirror.root / each) for each in ("artifacts", "graphs"))
    gone = {str(digest) for (digest,) in rows if digest not in artifacts}
    gone |= {str(digest) for digest, graph in holds if graph not in graphs}
    # Rows leave before their files: those of now are not among what leaves just then.
    return {digest for digest in gone if mirror.index.row(digest)}


def _list_names(folder: Path) -> set[str]:
    """What lies in a folder: ten thousand names are many paths."""
    with suppress(FileNotFoundError), explain_unread(folder):  # an image may lack an empty one
        return set(os.listdir(folder))  # noqa: PTH208
    return set()


def _list_parts(mirror: Mirror, kept: set[str], rows: set[str]) -> tuple[set[str], set[str]]:
    """The graphs and the kernels of artifacts, by their names: of `rows` the index has the graphs.

    Only where a kernel lies here is it asked which of them calls it.
    """
    found = mirror.index.select("select distinct graph from holds")
    graphs, kernels = {str(graph) for (graph,) in found}, set[str]()
    if any((mirror.root / KERNELS).iterdir()):
        for facts in read_facts(mirror, rows).values():
            kernels.update(facts.kernels.split())
    for digest in kept:
        if artifact := mirror.read(digest):
            graphs.update(graph.sha256 for graph in artifact.manifest.graphs)
            kernels.update(pin.id for pin in artifact.manifest.requires.kernels)
    return graphs, kernels


def _find_downloads(hub: Path) -> Iterator[Path]:
    """Files of huggingface_hub's cache that no download writes, and none has come for."""
    now = time.time()
    for blob in hub.glob("*/*/blobs/*"):
        status = blob.stat()
        longest = _HOUR if blob.name.endswith(".incomplete") else _DAY
        if now - status.st_mtime > longest and (longest == _HOUR or status.st_size > _SMALL):
            yield blob


def _find_dangling(hub: Path) -> Iterator[Path]:
    """Names there of files that are gone."""
    for path in hub.glob("*/*/snapshots/*/**/*"):
        if path.is_symlink() and not path.exists():
            yield path
