"""A commit's files: path to entry, changed by a list of changes, kept as one compressed row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from hubaoti.server.errors import entry_not_found, malformed_request
from hubaoti.server.gitids import format_pointer, hash_blob, hash_trees

_LARGE = 1_000_000
"""From this size on (bytes) a file is large, whatever it is."""

_SUFFIXES = """
    .arrow .bin .ckpt .gguf .gz .h5 .jpeg .jpg .msgpack .npy .npz .onnx .ot .parquet .pb .pickle
    .pkl .png .pt .pt2 .pth .safetensors .so .tar .tgz .tflite .webp .xz .zip .zst
"""

LFS_SUFFIXES = frozenset(_SUFFIXES.split())
"""Always large: formats that no one reads as text. New repos name them in `.gitattributes`."""


@dataclass(frozen=True, slots=True)
class TreeEntry:
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


Tree = Mapping[str, TreeEntry]


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether this file goes by LFS (or Xet); empty ones never do."""
    if size == 0:
        return False
    return size >= _LARGE or b"\0" in sample or PurePosixPath(path).suffix.lower() in LFS_SUFFIXES


def make_regular_entry(content: bytes, sha256: str) -> TreeEntry:
    """A file that git itself would keep."""
    return TreeEntry(hash_blob(content), len(content), sha256, lfs=False)


def make_lfs_entry(sha256: str, size: int) -> TreeEntry:
    """A file that git would keep a pointer of."""
    return TreeEntry(hash_blob(format_pointer(sha256, size)), size, sha256, lfs=True)


@dataclass(frozen=True, slots=True)
class Put:
    """A change that adds a file, or replaces the one at its path."""

    path: str
    entry: TreeEntry


@dataclass(frozen=True, slots=True)
class Delete:
    """A change that removes a file, or a folder with all in it."""

    path: str
    folder: bool = False


TreeChange = Put | Delete


def apply_changes(tree: Tree, changes: Iterable[TreeChange], commit: str) -> dict[str, TreeEntry]:
    """The tree after the changes, in their order; `commit` is the one that they change.

    Raises:
        Problem: 404, a file or folder to delete is not there; 400, a path is a file and a folder.
    """
    after = dict(tree)
    for change in changes:
        if isinstance(change, Put):
            old, new = tree.get(change.path), change.entry
            after[change.path] = old if old and (old.blob, old.lfs) == (new.blob, new.lfs) else new
        else:
            _delete_path(after, tree, change, commit)
    for folder in list_parent_folders(after):
        if folder in after:
            raise malformed_request(f"{folder!r} cannot be both a file and a folder")
    return after


def _delete_path(after: dict[str, TreeEntry], before: Tree, change: Delete, commit: str) -> None:
    doomed = _list_deleted_files(after, change)
    if not doomed and not _list_deleted_files(before, change):
        raise entry_not_found(change.path, commit)
    for path in doomed:
        del after[path]


def _list_deleted_files(tree: Tree, change: Delete) -> list[str]:
    """The paths that a deletion removes; none where nothing is there."""
    if change.folder:
        return [path for path in tree if path.startswith(f"{change.path}/")]
    return [change.path] if change.path in tree else []


def list_parent_folders(paths: Iterable[str]) -> set[str]:
    """Every folder that these files lie in."""
    found: set[str] = set()
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def hash_folders(tree: Tree) -> dict[str, str]:
    """Each folder's git tree id; the root's path is ""."""
    return hash_trees({path: entry.blob for path, entry in tree.items()})


def dump_tree(tree: Tree, commit: str) -> bytes:
    """Write a tree as a row; entries that no commit has yet are this commit's."""
    rows = {p: [e.blob, e.size, e.sha256, e.lfs, e.since or commit] for p, e in tree.items()}
    return zlib.compress(json.dumps(rows).encode(), 1)


def load_tree(row: bytes) -> Tree:
    """Read a tree from its row, as `dump_tree` wrote it."""
    return {path: TreeEntry(*fields) for path, fields in json.loads(zlib.decompress(row)).items()}
