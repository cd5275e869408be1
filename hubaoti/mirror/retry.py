"""The way back: verdicts are forgotten, and what has the right bytes comes out of quarantine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubaoti.artifact.package import holds_members
from hubaoti.artifact.schema import Graph
from hubaoti.disk import explain_disk_errors
from hubaoti.folder_trees import remove_tree
from hubaoti.mirror.artifact import holds_small, is_whole
from hubaoti.mirror.quarantine import BESIDE, NOTE, read_note
from hubaoti.mirror.rows import Row
from hubaoti.mirror.store import Mirror


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to: verdicts that were forgotten, graphs and artifacts that are back."""

    verdicts: int
    graphs: tuple[str, ...]
    artifacts: tuple[Row, ...]


def retry(mirror: Mirror) -> Retried:
    """Forget what first opens held against graphs, and bring back what is apart and whole.

    A graph that really crashes is found out once more, by a process of its own. What has other
    bytes than its manifest lists stays where it is.

    Raises:
        HubaotiError: the mirror may not be written.
    """
    mirror.index.require_writable()
    promises = [p for folder in _list_quarantined(mirror) for p in read_note(folder).promises]
    known = _find_known_graphs(mirror)
    with explain_disk_errors(mirror.root):
        for folder in _list_quarantined(mirror):
            _keep_note(folder)
    graphs = [
        name
        for folder in _list_quarantined(mirror)
        if (name := _restore_folder(folder, mirror, known))
    ]
    rows = []
    for promise in promises:
        artifact = mirror.read(promise.row.digest)
        if artifact and is_whole(artifact):
            if mirror.index.row(promise.row.digest) is None:
                rows.append(promise.row)
            mirror.index.keep(promise)  # all of it, where some was kept before we were ended
    _drop_kept_notes(mirror)
    return Retried(mirror.index.forget_problems(), tuple(graphs), tuple(rows))


def _list_quarantined(mirror: Mirror) -> list[Path]:
    """What is in quarantine, the newest last."""
    return sorted((mirror.root / "quarantine").iterdir(), key=lambda each: each.lstat().st_mtime)


def _keep_note(folder: Path) -> None:
    """Have a note beside its folder, too, until all is back: whatever ends us, it can be again."""
    kept = folder.with_name(f"{folder.name}{BESIDE}")
    if read_note(folder).promises and not folder.name.endswith(BESIDE):
        with suppress(FileExistsError):  # of who was ended
            kept.mkdir(mode=0o700, exist_ok=True)
            (kept / NOTE).hardlink_to(folder / NOTE)


def _drop_kept_notes(mirror: Mirror) -> None:
    """Drop the notes beside folders that have theirs, and those of which all is promised again."""
    for kept in _list_quarantined(mirror):
        if kept.name.endswith(BESIDE):
            folder, promises = kept.with_name(kept.name[: -len(BESIDE)]), read_note(kept).promises
            is_promised = all(mirror.index.row(promise.row.digest) for promise in promises)
            if is_promised or (folder / NOTE).exists():
                remove_tree(kept, ignore_errors=True)


def _restore_folder(folder: Path, mirror: Mirror, known: dict[str, Graph]) -> str | None:
    """Give a folder that is apart its place again, if its bytes are right; the graph's name."""
    name = folder.name.partition("~")[0]
    graph = known.get(name) or read_note(folder).graph
    if graph is not None and graph.sha256 == name and holds_members(folder, graph):
        return name if _move_into_place(folder, mirror.root / "graphs" / name) else None
    artifact = mirror.read(name, folder)
    if artifact is not None and holds_small(artifact):
        _move_into_place(folder, mirror.root / "artifacts" / name)
    return None


def _move_into_place(folder: Path, target: Path) -> bool:
    """Give a folder its place, unless there is another by now."""
    try:
        (folder / NOTE).unlink(missing_ok=True)
        folder.rename(target)
    except OSError:
        return False
    return True


def _find_known_graphs(mirror: Mirror) -> dict[str, Graph]:
    """The graphs of all artifacts whose manifests are here, promised or not, by their sha256."""
    artifacts = [mirror.read(folder.name) for folder in (mirror.root / "artifacts").iterdir()]
    return {graph.sha256: graph for each in artifacts if each for graph in each.manifest.graphs}
