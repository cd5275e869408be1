"""git's own SHA-1 names: clients compare blob ids with local files, so ours are the real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

_Folder: TypeAlias = "dict[str, str | _Folder]"


def hash_blob(content: bytes) -> str:
    """The id of a file stored in git itself."""
    return _hash_object(b"blob", content)


def format_pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in place of an LFS file (git-lfs/docs/spec.md)."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def hash_trees(blobs: Mapping[str, str]) -> dict[str, str]:
    """From each file's path and blob id, each folder's path and tree id; the root's path is ""."""
    root: _Folder = {}
    for path, blob in blobs.items():
        *folders, name = path.split("/")
        folder = root
        for step in folders:
            inner = folder.setdefault(step, {})
            assert isinstance(inner, dict), "a path is a file and a folder"
            folder = inner
        folder[name] = blob
    ids: dict[str, str] = {}
    _hash_folder(root, "", ids)
    return ids


def _hash_folder(folder: _Folder, path: str, ids: dict[str, str]) -> str:
    rows = []
    for name, held in folder.items():
        if isinstance(held, dict):
            inner = _hash_folder(held, f"{path}/{name}".removeprefix("/"), ids)
            # git sorts a folder as if its name ended in a slash
            rows.append((f"{name}/".encode(), b"40000 %s\0" % name.encode(), inner))
        else:
            rows.append((name.encode(), b"100644 %s\0" % name.encode(), held))
    content = b"".join(head + bytes.fromhex(oid) for _, head, oid in sorted(rows))
    ids[path] = _hash_object(b"tree", content)
    return ids[path]


@dataclass(frozen=True, slots=True)
class CommitText:
    """What a commit's id is made of."""

    tree: str
    parent: str | None
    user: str
    seconds: int
    title: str
    message: str

    @property
    def oid(self) -> str:
        """The commit's id, as git computes it: a SHA-1 in hex."""
        who = f"{self.user} <{self.user}@localhost> {self.seconds} +0000"
        parent = f"parent {self.parent}\n" if self.parent else ""
        words = f"{self.title}\n" + (f"\n{self.message}\n" if self.message else "")
        head = f"tree {self.tree}\n{parent}author {who}\ncommitter {who}\n\n"
        return _hash_object(b"commit", (head + words).encode())


def _hash_object(kind: bytes, content: bytes) -> str:
    head = b"%s %d\0" % (kind, len(content))
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()
