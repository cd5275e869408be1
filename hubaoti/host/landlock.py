"""Which files a process may still read and write: landlock(7), asked by its three system calls.

Numbers are those of linux/landlock.h, the same on every kind of machine. A kernel that has an older
landlock guards less; what it lacks is left out.
"""

from __future__ import annotations

import ctypes
import os
import platform
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH
# LANDLOCK_ACCESS_FS_*: execute, read_file, read_dir.
_READ = 1 << 0 | 1 << 2 | 1 << 3
# write_file; remove_dir to make_sym; refer (of version 2), truncate (3), ioctl_dev (5).
_WRITE = 1 << 1 | 0b1_1111_1111 << 4 | 1 << 13 | 1 << 14 | 1 << 15
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # of what is no folder
_SINCE = ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
# Of version 4, to bind and to connect TCP; of 6, sockets without a file, and signals, outside.
_TCP, _OUTSIDE = 0b11, 0b11


def probe_landlock() -> int:
    """The version of this kernel's landlock; 0 where it has none, or does not let it be used."""
    return max(0, _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))


def restrict_files(
    readable: Iterable[Path] | None, writable: Iterable[Path], *, may_connect: bool = False
) -> bool:
    """Let this thread, and what it starts, read and write below these paths alone; whether it does.

    Where `readable` is None all can be read, as before. What is writable is readable, too. Paths
    that are not there say nothing. Other threads go on as they were.
    """
    version = probe_landlock()
    if not version:
        return False
    known = _WRITE if readable is None else _READ | _WRITE
    for since, right in _SINCE:
        known &= ~right if version < since else ~0
    tcp = _TCP if version >= 4 and not may_connect else 0
    ruleset = struct.pack("=QQQ", known, tcp, _OUTSIDE if version >= 6 else 0)
    rules = _call(_CREATE_RULESET, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    if rules < 0:
        return False
    try:
        for path in readable or ():
            _allow(rules, path, known & _READ)
        for path in writable:
            _allow(rules, path, known)
        return _call(_RESTRICT_SELF, rules, 0) == 0
    finally:
        os.close(rules)


def _allow(rules: int, path: Path, rights: int) -> None:
    """Add a path with all that lies below it; one that cannot be looked at is left out."""
    with suppress(OSError):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(place).st_mode):
                rights &= _OF_FILES
            _call(_ADD_RULE, rules, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
        finally:
            os.close(place)


def _call(number: int, *arguments: object) -> int:
    """A system call's answer; -1 where it is refused, or this system has no such thing."""
    if platform.system() != "Linux":
        return -1
    try:
        return int(ctypes.CDLL(None).syscall(number, *arguments))
    except (AttributeError, OSError):
        return -1
