"""What is kept apart: broken copies, and graphs that must not be opened, each with a note.

The note says what the index promised of it, so that what has the right bytes can come back.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from hubaoti.artifact.schema import Graph
from hubaoti.disk import explain_disk_errors, open_plain, sync_folder
from hubaoti.folder_trees import remove_tree
from hubaoti.mirror.folders import keep_newest
from hubaoti.mirror.rows import Promise

_KEPT = 5, 1 << 30  # what stays to be looked at, and the most bytes of it
NOTE = ".hubaoti-withdrawn.json"
BESIDE = "~"  # ends the name of a folder that has a note, and nothing else
_LARGEST = 16 << 20  # bytes of a note


class Note(msgspec.Struct, frozen=True):
    """What was withdrawn with a folder: a graph, and what the index promised of it."""

    graph: Graph | None = None
    promises: tuple[Promise, ...] = ()


def set_apart(
    folder: Path,
    apart: Path,
    note: Note | None = None,
    remove: Callable[[], object] = lambda: None,
) -> None:
    """Have `remove` end what is promised of a folder, and move it below `apart`, with its note.

    The note is there before anything is removed, so that all of it can come back, whatever ends us
    or fails in between. A folder that is gone is not moved, and has none.

    Raises:
        HubaotiError: the disk does not let it be noted, and then nothing is removed; or moved.
    """
    target = apart / f"{folder.name}~{secrets.token_hex(4)}"
    beside = target.with_name(f"{target.name}{BESIDE}")
    if note is not None:
        _write_note(beside, note)
    remove()
    with suppress(FileNotFoundError), explain_disk_errors(apart):
        folder.rename(target)
        if not target.is_symlink():
            with suppress(OSError):  # a file in the place of a folder: it stays beside
                (beside / NOTE).rename(target / NOTE)
                beside.rmdir()
        with suppress(OSError):
            os.utime(target)  # else it has the time at which it was unpacked
        keep_newest(apart, *_KEPT)
        return
    remove_tree(beside, ignore_errors=True)


def _write_note(folder: Path, note: Note) -> None:
    """Write a note into a new folder, so that it survives a power cut; or leave nothing of it."""
    try:
        with explain_disk_errors(folder):
            folder.mkdir(mode=0o700)
            with (folder / NOTE).open("xb") as sink:
                sink.write(msgspec.json.encode(note))
                sink.flush()
                os.fsync(sink.fileno())
            sync_folder(folder)
            sync_folder(folder.parent)
    except BaseException:
        remove_tree(folder, ignore_errors=True)
        raise


def read_note(folder: Path) -> Note:
    """The note of a folder that is apart; an empty one where it has none, or none that is one.

    Raises:
        HubaotiError: the disk does not let it be read.
    """
    with suppress(FileNotFoundError, msgspec.DecodeError), open_plain(folder / NOTE) as file:
        content = file.read(_LARGEST + 1)
        if len(content) <= _LARGEST:
            return msgspec.json.decode(content, type=Note)
    return Note()
