"""A commit's files: path to entry, changed by a list of changes, kept as one compressed row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hubaoti.server.gitids import blob_id, pointer, tree_ids
from hubaoti.server.problems import entry_not_found, malformed


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its git blob id, its size and digest, and the commit that last changed it."""

    blob: str
    size: int
    sha256: str
    lfs: bool
    since: str = ""

    @property
    def etag(self) -> str:
        """What the Hub calls the file's content by."""
        return self.sha256 if self.lfs else self.blob

    @property
    def pointer_size(self) -> int:
        """How long the text is that git keeps for it."""
        return len(pointer(self.sha256, self.size))


Tree = Mapping[str, Entry]


def regular(content: bytes, sha256: str) -> Entry:
    """A file that git itself would keep."""
    return Entry(blob_id(content), len(content), sha256, lfs=False)


def large(sha256: str, size: int) -> Entry:
    """A file that git would keep a pointer of."""
    return Entry(blob_id(pointer(sha256, size)), size, sha256, lfs=True)


@dataclass(frozen=True, slots=True)
class Put:
    """Add or replace a file."""

    path: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a file, or a folder with all in it."""

    path: str
    folder: bool = False


Change = Put | Delete


def changed(tree: Tree, changes: Iterable[Change], commit: str) -> dict[str, Entry]:
    """The tree after the changes, in their order; `commit` is the one that they change.

    Raises:
        Problem: 404, a file or folder to delete is not there; 400, a path is a file and a folder.
    """
    after = dict(tree)
    for change in changes:
        if isinstance(change, Put):
            after[change.path] = _kept(tree.get(change.path), change.entry)
        else:
            _delete(after, tree, change, commit)
    _refuse_clashes(after)
    return after


def _kept(old: Entry | None, new: Entry) -> Entry:
    same = old is not None and (old.blob, old.lfs) == (new.blob, new.lfs)
    return old if old is not None and same else new


def _delete(after: dict[str, Entry], before: Tree, change: Delete, commit: str) -> None:
    doomed = _files_of(after, change)
    if not doomed and not _files_of(before, change):
        raise entry_not_found(change.path, commit)
    for path in doomed:
        del after[path]


def _files_of(tree: Tree, change: Delete) -> list[str]:
    """The files that a deletion means."""
    if change.folder:
        return [path for path in tree if path.startswith(f"{change.path}/")]
    return [change.path] if change.path in tree else []


def _refuse_clashes(tree: Tree) -> None:
    for folder in folders_of(tree):
        if folder in tree:
            raise malformed(f"{folder!r} cannot be both a file and a folder")


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that these files lie in."""
    found: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def ids(tree: Tree) -> dict[str, str]:
    """Each folder's git tree id; the root's path is ""."""
    return tree_ids({path: entry.blob for path, entry in tree.items()})


def dump(tree: Tree, commit: str) -> bytes:
    """The tree as a row; entries that no commit has yet are this commit's."""
    rows = {p: [e.blob, e.size, e.sha256, e.lfs, e.since or commit] for p, e in tree.items()}
    return zlib.compress(json.dumps(rows).encode(), 1)


def load(row: bytes) -> Tree:
    """The inverse of `dump`."""
    return {path: Entry(*fields) for path, fields in json.loads(zlib.decompress(row)).items()}


def all_since(tree: Tree, commit: str) -> dict[str, Entry]:
    """The same files, as one commit's work."""
    return {path: replace(entry, since=commit) for path, entry in tree.items()}
