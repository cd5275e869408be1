"""A lost index, made again from the files: what is here, but not who published or built it."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.disk import explain_disk_errors
from hubaoti.mirror.artifact import compute_unpacked_size, has_sizes, read_artifact
from hubaoti.mirror.folders import make_private
from hubaoti.mirror.index import DAMAGED
from hubaoti.mirror.rows import Promise, PullOrigin, Row

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror


def restore_rows(mirror: Mirror) -> list[Row]:
    """Promise what lies in the mirror whole and no row promises; those rows.

    Its bytes are hashed before it is opened, as always. Nothing is known of its origin, so it is a
    stranger's until somebody says otherwise.

    Raises:
        HubaotiError: something could not be read; nothing is promised then.
    """
    promises = find_whole(mirror.root, {row.digest for row in mirror.index.rows()})
    for promise in promises:
        mirror.index.keep(promise)
    return [promise.row for promise in promises]


def find_whole(root: Path, known: Collection[str] = ()) -> list[Promise]:
    """What lies in the mirror at `root` whole, but for what is known, as it would be promised.

    Raises:
        HubaotiError: something could not be read.
    """
    found = []
    for folder in (root / "artifacts").iterdir():
        artifact = None if folder.name in known else read_artifact(root, folder.name)
        if artifact is None or not has_sizes(artifact):
            continue
        manifest = artifact.manifest
        row = Row(
            digest=artifact.digest,
            key=manifest.key,
            recipe=str(manifest.recipe),
            variant=str(manifest.variant),
            size=compute_unpacked_size(manifest),
            added=folder.stat().st_mtime,
            origin=PullOrigin(),
        )
        found.append(Promise(row, tuple({graph.sha256 for graph in manifest.graphs}), ()))
    return found


def set_index_apart(root: Path) -> Path:
    """Move a damaged index out of the way, with what belongs to it; where it is now.

    Raises:
        HubaotiError: the mirror may not be written.
    """
    apart = root / "quarantine" / f"index~{secrets.token_hex(4)}"
    with explain_disk_errors(root):
        make_private(apart)
        for file in root.glob("index.sqlite3*"):
            file.rename(apart / file.name)
    return apart


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What is promised again, and what of it may not be opened; where a damaged index lies now."""

    rows: tuple[Row, ...]
    not_trusted: tuple[str, ...]
    apart: Path | None


def rebuild(root: Path) -> Rebuilt:
    """Promise all that lies in a mirror whole; an index that is damaged is moved aside before.

    An index that is not keeps all that it knows.

    Raises:
        HubaotiError: the mirror may not be written, or is of a newer hubaoti.
    """
    from hubaoti.mirror.store import Mirror

    apart = set_index_apart(root) if _is_damaged(root / "index.sqlite3") else None
    with Mirror.open(root) as mirror:
        mirror.index.require_writable()
        new = restore_rows(mirror)
        rows = new if apart is None else mirror.index.rows()
        decisions = mirror.decide_each(row.digest for row in rows)
    strangers = [digest for digest, found in decisions.items() if not found.allowed]
    return Rebuilt(tuple(rows), tuple(strangers), apart)


def _is_damaged(index: Path) -> bool:
    """Whether an index cannot be read any more; one that is not there is not damaged."""
    if not index.is_file():
        return False
    try:
        with closing(sqlite3.connect(index)) as db:
            for table in ("artifacts", "holds", "pulls", "built") if _has_tables(db) else ():
                db.execute(f"select * from {table} limit 1")
            return bool(db.execute("pragma integrity_check").fetchone() != ("ok",))
    except sqlite3.Error as error:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED
    except UnicodeDecodeError:
        return True


def _has_tables(db: sqlite3.Connection) -> bool:
    return bool(db.execute("pragma user_version").fetchone()[0])
