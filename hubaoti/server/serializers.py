"""The JSON that clients read: a repo, a file, a folder, a commit."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Set
from typing import Any

from hubaoti.server import card, trees
from hubaoti.server.gitids import format_pointer
from hubaoti.server.history import Revision
from hubaoti.server.repos import Repo
from hubaoti.server.trees import Tree, TreeEntry

Json = dict[str, Any]

_ALWAYS = frozenset({"_id", "id", "modelId"})
_FROM_CARD = ("library_name", "pipeline_tag", "sdk")
_ON_REQUEST = frozenset({"usedStorage"})
_NOT_IN_LISTS = frozenset({"siblings", "cardData", "sha", "lastModified", "author", "gated"})
_NOT_IN_LISTS |= {"disabled"}


def serialize_repo(of: Repo, head: Revision) -> Json:
    """All that there is to say about a repo at a commit, but for its files."""
    name = of.id.full_name
    fields: Json = {
        "_id": hashlib.sha256(f"{of.id.kind}/{of.row}".encode()).hexdigest()[:24],
        "id": name,
        "author": of.id.owner,
        "sha": head.oid,
        "lastModified": head.date,
        "createdAt": of.created,
        "private": of.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "downloadsAllTime": 0,
        "likes": 0,
        "trendingScore": 0,
        "tags": card.derive_tags(of.id.kind, of.card),
        "cardData": of.card,
    }
    fields |= {key: of.card[key] for key in _FROM_CARD if key in of.card}
    return fields | ({"modelId": name} if of.id.kind == "model" else {})


def serialize_files(tree: Tree, *, blobs: bool = False) -> Json:
    """What there is to say about a repo's files."""
    return {
        "siblings": [
            _serialize_sibling(path, entry, blobs) for path, entry in sorted(tree.items())
        ],
        "usedStorage": count_storage(tree),
    }


def count_storage(tree: Tree) -> int:
    """The bytes of all files, equal ones counted once."""
    return sum({entry.sha256 or entry.blob: entry.size for entry in tree.values()}.values())


def choose_properties(
    facts: Json, *, expand: Set[str], listed: bool = False, full: bool = False
) -> Json:
    """The properties that were asked for; without `expand`, the usual ones."""
    if expand:
        return {key: facts[key] for key in facts if key in expand | _ALWAYS}
    left_out = _ON_REQUEST | (_NOT_IN_LISTS if listed and not full else frozenset())
    return {key: facts[key] for key in facts if key not in left_out}


def _serialize_sibling(path: str, entry: TreeEntry, blobs: bool) -> Json:
    """A file, as a repo lists it."""
    if not blobs:
        return {"rfilename": path}
    fields: Json = {"rfilename": path, "size": entry.size, "blobId": entry.blob}
    if entry.lfs:
        fields["lfs"] = {"sha256": entry.sha256, **_serialize_lfs(entry)}
    return fields


def _serialize_file(path: str, entry: TreeEntry, last: Revision | None) -> Json:
    """A file, as a tree lists it; with the commit that last changed it, where that is asked for."""
    fields: Json = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
    if entry.lfs:
        fields["lfs"] = {"oid": entry.sha256, **_serialize_lfs(entry)}
    return fields | _serialize_last_commit(last)


def _serialize_lfs(entry: TreeEntry) -> Json:
    pointer = format_pointer(entry.sha256, entry.size)
    return {"size": entry.size, "pointerSize": len(pointer)}


def _serialize_last_commit(last: Revision | None) -> Json:
    if last is None:
        return {}
    return {"lastCommit": {"id": last.oid, "title": last.title, "date": last.date}}


def serialize_tree(tree: Tree, revisions: Mapping[str, Revision] | None = None) -> dict[str, Json]:
    """Every file and folder of a tree by its path; with last commits where these are given."""
    known = revisions or {}
    found = {
        path: _serialize_file(path, entry, known.get(entry.since)) for path, entry in tree.items()
    }
    newest: dict[str, Revision] = {}
    for path, entry in tree.items():
        if last := known.get(entry.since):
            for step in trees.list_parent_folders([path]):
                newest[step] = max(newest.get(step, last), last, key=lambda r: r.date)
    ids = {path: oid for path, oid in trees.hash_folders(tree).items() if path}
    for path, oid in ids.items():
        folder = {"type": "directory", "oid": oid, "size": 0, "path": path}
        found[path] = folder | _serialize_last_commit(newest.get(path))
    return found


def serialize_commit(of: Revision, user: str, *, formatted: bool = False) -> Json:
    """A commit, as a log lists it."""
    fields: Json = {
        "id": of.oid,
        "title": of.title,
        "message": of.message,
        "date": of.date,
        "authors": [{"user": user}],
    }
    if formatted:
        fields["formatted"] = {"title": html.escape(of.title), "message": html.escape(of.message)}
    return fields
