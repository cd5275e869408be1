"""What a process may still do that runs native code of somebody else; and what a host cannot keep
it from.

A graph needs torch, a folder or two, and a pipe. Each guard is a plain system call, asked of the
process itself before that code is loaded; none can be taken back, and what it starts has them all.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hubaoti.host.landlock import probe_landlock, restrict_files
from hubaoti.host.seccomp import probe_seccomp, refuse_calls, refuse_foreign_calls
from hubaoti.settings import read_library_paths

ROOM = 16 << 30  # bytes of addresses, as torch maps its libraries, beside what a graph needs
_FILE = 256 << 20  # bytes of a file
_PROCESSES = 64  # more than the user has now
_THREADS = 16  # for each core, of torch's and others' pools, which are counted as processes
_ARENAS = 128 << 20  # bytes of addresses that malloc keeps for a core's threads, and their stacks
_LANDLOCK = 3  # the version that knows of files that are made shorter
_SIGNALS = 6  # the one that knows of signals
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
_CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_DAC_OVERRIDE = 1 << 1  # root reads its user's files, as before; landlock says which
_FIRST_TO_GO = "1000"  # the system ends it for memory before all others (proc(5))
# What loaders, C libraries, torch and CUDA's driver read; each where it is there.
_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/run/opengl-driver"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/alternatives"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/devices", "/sys"),
    *("/proc/version", "/proc/modules", "/proc/driver", "/proc/sys/vm", "/proc/sys/kernel"),
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_GPUS = ("nvidia*", "nvhost*", "nvmap", "dxg", "shm")


@dataclass(frozen=True, slots=True)
class Confinement:
    """What a process may do: read some folders beside Python's and the system's, and write one.

    `memory` are the bytes that its graphs say they need, `seconds` how long it may compute on one
    core. For a GPU (`uses_gpu`) it has the driver's devices, shared memory and local sockets, and
    no limits of addresses and of files: a driver maps all that a card has. `processes` may be
    started where a caller's ops or a kernel may need a compiler.
    """

    readable: tuple[Path, ...]
    scratch: Path
    memory: int = 0
    seconds: float = 300.0
    uses_gpu: bool = False
    processes: bool = False

    def enter(self) -> None:
        """Confine this thread and what it starts; best before there is a second one.

        What this host cannot do is left out (`list_gaps`).
        """
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
        gain_no_privileges()
        cores = os.cpu_count() or 1
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, int(self.seconds * cores) + 1)
        if self.processes:
            _limit(resource.RLIMIT_NPROC, _count_own_threads() + _PROCESSES + _THREADS * cores)
        if not self.uses_gpu:
            _limit(resource.RLIMIT_FSIZE, _FILE)
            _limit(resource.RLIMIT_AS, self.memory + ROOM + _ARENAS * cores)
        folders = [*_list_python_folders(), *self.readable]
        is_apart = restrict_files(folders, self._list_writable()) and probe_landlock() >= _SIGNALS
        drop_capabilities()
        refuse_calls(
            os.getpid(),
            local_sockets=self.uses_gpu,
            processes=self.processes,
            signals=self.processes and is_apart,  # then they reach what it started, and no other
        )

    def _list_writable(self) -> Iterator[Path]:
        """Its folder, and devices: none of them keeps anything, but for shared memory."""
        yield self.scratch
        dev = Path("/dev")
        yield from (dev / name for name in _DEVICES)
        for pattern in _GPUS if self.uses_gpu else ():
            yield from dev.glob(pattern)


def guard_worker(protected: Path, *, network: bool) -> None:
    """Have this process look into no other, open no sockets of a network, and not write one file.

    All else is as it was: it loads a model, whose code reads and caches where it likes, and ends
    what it started. What this host cannot do is left out (`list_worker_gaps`).
    """
    gain_no_privileges()
    restrict_files(None, list_beside(protected), may_connect=network)
    refuse_foreign_calls(network=network)


def gain_no_privileges() -> None:
    """Have no program that this process starts give it more than it has, as a setuid one would."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """Have this thread keep nothing of what root may do, but to open files."""
    kept = os.geteuid() == 0 and _DAC_OVERRIDE
    masks = struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).capset(struct.pack("=Ii", _CAPABILITIES, 0), masks)


def list_gaps() -> list[str]:
    """What this host cannot keep a first open from, in words; nothing where it can all."""
    version = probe_landlock()
    gaps = []
    if not version:
        gaps.append("files are not guarded: this kernel lets nobody use landlock")
    elif version < _LANDLOCK:
        gaps.append(f"files can be cut short: landlock is of version {version}, not {_LANDLOCK}")
    if not probe_seccomp():
        gaps.append("network and other processes are not guarded: there is no seccomp")
    return [f"first opens: {gap}" for gap in gaps]


def list_worker_gaps() -> list[str]:
    """What this host cannot keep an engine's process of a model from, in words."""
    version = probe_landlock()
    if version >= _SIGNALS:
        return []
    can = "can signal others" if version else "can write trust.toml, and signal others"
    return [f"engines: a model's own process {can}: landlock is of version {version}, not 6"]


def list_beside(file: Path) -> list[Path]:
    """All that is there beside a file and beside each folder above it, so not what holds it."""
    found = []
    file = file.absolute()
    for path, folder in zip((file, *file.parents), file.parents, strict=False):
        with suppress(OSError):
            beside = [each for each in folder.iterdir() if each != path]
            found += [each for each in beside if not file.is_relative_to(each.resolve())]
    return found


def _list_python_folders() -> Iterator[Path]:
    """Where Python, torch and the loader find what they load, later on, too.

    Not all of a home, or what it lies in, where somebody has modules there.
    """
    loaded, _ = read_library_paths()
    home = Path.home()
    packages = [each for name, each in [*sys.modules.items()] if "." not in name]
    found = (folder for each in packages for folder in getattr(each, "__path__", ()))
    python = (sys.prefix, sys.base_prefix, *sys.path, *map(str, found))
    for name in (*python, *loaded, *_list_mapped_folders()):
        if name and not home.is_relative_to(folder := Path(name).absolute()):
            yield folder
    yield from map(Path, _SYSTEM)


def _list_mapped_folders() -> set[str]:
    """The folders of the libraries that this process has."""
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
        paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines())
        return {os.path.dirname(path) for path in paths if path.startswith("/") and ".so" in path}  # noqa: PTH120
    return set()


def _count_own_threads() -> int:
    """The threads of all processes of this user, which is what the system counts."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += sum(1 for _ in (process / "task").iterdir())
    return count


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process, for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most, most))
