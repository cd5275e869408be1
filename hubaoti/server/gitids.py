"""git's own SHA-1 names: clients compare blob ids with local files, so ours are the real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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


def hash_commit(
    tree: str, parent: str | None, user: str, seconds: int, title: str, message: str
) -> str:
    """The id of a commit that its user made, at a time in Unix seconds."""
    author = f"{user} <{user}@localhost> {seconds} +0000"
    ancestor = f"parent {parent}\n" if parent else ""
    words = f"{title}\n" + (f"\n{message}\n" if message else "")
    head = f"tree {tree}\n{ancestor}author {author}\ncommitter {author}\n\n"
    return _hash_object(b"commit", (head + words).encode())


def _hash_object(kind: bytes, content: bytes) -> str:
    head = b"%s %d\0" % (kind, len(content))
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()
