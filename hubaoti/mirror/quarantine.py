"""What is kept apart: broken copies, and graphs that must not be opened, each with a note.

The note says what the index promised of it, so that what has the right bytes can come back.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

import msgspec

from hubaoti.artifact.schema import Graph
from hubaoti.disk import explain_disk_errors
from hubaoti.mirror.folders import keep_newest
from hubaoti.mirror.rows import Promise

_KEPT = 5, 1 << 30  # what stays to be looked at, and the most bytes of it
NOTE = ".hubaoti-withdrawn.json"
_LARGEST = 16 << 20  # bytes of a note
_NO_NOTE = (FileNotFoundError, NotADirectoryError, msgspec.DecodeError)


class Note(msgspec.Struct, frozen=True):
    """What was withdrawn with a folder: a graph, and what the index promised of it."""

    graph: Graph | None = None
    promises: tuple[Promise, ...] = ()


def set_apart(folder: Path, apart: Path, note: Note) -> None:
    """Move a folder below `apart`, with its note; one that is gone is not there.

    Raises:
        HubaotiError: the disk does not let it be moved.
    """
    with suppress(FileNotFoundError), explain_disk_errors(apart):
        broken = folder.rename(apart / f"{folder.name}~{secrets.token_hex(4)}")
        with suppress(OSError):  # a file in the place of a folder, or no room
            (broken / NOTE).write_bytes(msgspec.json.encode(note))
        with suppress(OSError):
            os.utime(broken)  # else it has the time at which it was unpacked
        keep_newest(apart, *_KEPT)


def read_note(folder: Path) -> Note:
    """The note of a folder that is apart; an empty one where it has none, or none that is one.

    Raises:
        HubaotiError: the disk does not let it be read.
    """
    with explain_disk_errors(folder), suppress(*_NO_NOTE):
        file = folder / NOTE
        if file.stat().st_size <= _LARGEST:
            return msgspec.json.decode(file.read_bytes(), type=Note)
    return Note()
