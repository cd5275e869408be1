"""The stand-in is built: C of ours and of CUDA's headers, by gcc, once for each torch.

gcc and the headers beside torch are all that it takes: a CUDA toolkit of the machine is not looked
at.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hubaoti.compiler.stand_in.aten import SHIMS, write_shims
from hubaoti.compiler.stand_in.environment import StandIn
from hubaoti.compiler.stand_in.fallbacks import HEADERS, write_fallbacks
from hubaoti.disk import describe_no_room, explain_disk_errors, find_full_disk, require_code
from hubaoti.errors import (
    BadRequest,
    CannotOpen,
    CompileFailed,
    MissingDependency,
    UnsafeFolder,
    first_line,
)
from hubaoti.folder_trees import remove_tree
from hubaoti.host.build_tools import find_cuda_includes, find_missing_build_tools
from hubaoti.host.probe import Torch
from hubaoti.settings import merge_environment

_SOURCE = Path(__file__).parent
_DRIVER, _NVML, _LINKED = "libcuda.so.1", "libnvidia-ml.so.1", "libcuda.so"
_CUDA = "cuda"  # a folder of the stand-in, where CUDA's headers lie in several
_FLAGS = ("-shared", "-fPIC", "-O0", "-w", "-Wl,-z,noexecstack")
_APART = ("nvml.c", "aten.c")  # another library, and a part of what aten.py writes
_LONGEST_BUILD = 3600  # seconds after which a half-built one is nobody's any more


def build_stand_in(torch: Torch, home: Path) -> StandIn:
    """The stand-in for a torch, from the home or built into it; takes about two seconds once.

    Its folder is named by what it is made of, is this user's alone, and is whole or absent.

    Raises:
        MissingDependency: gcc, CUDA's headers or another tool is missing, or torch is a CPU build;
            all that is missing is named.
        UnsafeFolder: others own or may write the folder.
        CompileFailed: gcc does not take the source or the headers.
        CannotOpen: the home's disk is noexec, or the system does not load what was built.
        BadRequest: the home's path is one that the system's loader would take for several.
    """
    missing = find_missing_build_tools(torch)
    if missing:
        raise MissingDependency(
            "a build for CUDA needs " + "; ".join(f"{m.need} ({m.have})" for m in missing),
            hint="; ".join(dict.fromkeys(m.advice for m in missing)),
        )
    includes = find_cuda_includes(torch)
    if ":" in str(home) or ";" in str(home):
        raise BadRequest(
            f"{home} has a colon or a semicolon in its path, where the loader ends a folder's name",
            hint="set HUBAOTI_HOME to a folder without one",
        )
    require_code(home, "set HUBAOTI_HOME to")
    root = home / "stand-in"
    folder = root / _digest(torch, includes)
    with explain_disk_errors(root):
        _make_private(root)
        if folder.is_dir() and not _is_whole(folder):  # as where caches of old files are tidied
            remove_tree(folder)
        if not folder.exists():
            _build(torch, includes, folder)
    _refuse_shared(folder)
    return StandIn(folder, folder / _CUDA if (folder / _CUDA).is_dir() else includes[0].parent)


def _digest(torch: Torch, includes: Sequence[Path]) -> str:
    """What it is made of, as 16 hex digits; where headers lie, too, since it may link to them."""
    digest = hashlib.sha256(f"{torch.version} {torch.git}".encode())
    for folder in includes:
        digest.update(hashlib.sha256(os.fsencode(folder)).digest())
    ours = sorted(path for path in _SOURCE.iterdir() if path.suffix in (".c", ".h", ".py"))
    theirs = [folder / name for name in HEADERS for folder in includes]
    theirs.append(torch.path / "include" / SHIMS)
    for path in [*ours, *filter(Path.is_file, theirs)]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (_DRIVER, _NVML, _LINKED))


def _build(torch: Torch, includes: Sequence[Path], folder: Path) -> None:
    """Build into a folder of a temporary name, and rename it; who comes second keeps the first."""
    _sweep(folder.parent)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.mkdir(mode=0o700)
    try:
        _compile(torch, includes, temporary)
        _try_loading(temporary / _DRIVER)
        with suppress(OSError):  # another process was faster
            temporary.rename(folder)
    finally:
        remove_tree(temporary, ignore_errors=True)
    if not folder.is_dir():
        raise CompileFailed(f"stand-in: {folder} could not be made", hint="build it again")


def _compile(torch: Torch, includes: Sequence[Path], folder: Path) -> None:
    try:
        sources = folder / "sources"
        sources.mkdir()
        (sources / "fallbacks.c").write_text(write_fallbacks(includes))
        (sources / "aten.c").write_text(write_shims(torch.path / "include"))
        ours = (path for path in _SOURCE.glob("*.c") if path.name not in _APART)
        flags = [f"-I{path}" for path in (_SOURCE, *includes)]
        _run_gcc([*flags, *map(str, sorted([*ours, *sources.iterdir()]))], folder / _DRIVER)
        assert torch.cuda is not None
        major, minor = map(int, torch.cuda.split(".")[:2])
        version = f"-DCUDA_VERSION={1000 * major + 10 * minor}"
        _run_gcc(["-D_GNU_SOURCE", version, str(_SOURCE / "nvml.c")], folder / _NVML)
    except subprocess.CalledProcessError as error:
        if "No space left on device" in str(error.stderr):
            raise describe_no_room(find_full_disk(str(error.stderr), folder), 0) from error
        causes = (line for line in str(error.stderr).splitlines() if "error" in line)
        raise CompileFailed(
            f"stand-in: gcc: {first_line(next(causes, str(error.stderr)))}",
            hint="is gcc 9 or newer, and are CUDA's headers those of this torch?"
            " hubaoti doctor --build says what is missing",
        ) from error
    remove_tree(sources)
    (folder / _LINKED).symlink_to(_DRIVER)
    if not (includes[0] / "crt").is_dir():
        _merge_headers(includes, folder / _CUDA / "include")


def _merge_headers(includes: Sequence[Path], merged: Path) -> None:
    """One folder of headers, as CUDA 13 has; CUDA 12 has one for each of its packages."""
    merged.mkdir(parents=True)
    for path in (path for include in includes for path in include.iterdir()):
        with suppress(FileExistsError):
            (merged / path.name).symlink_to(path)


def _run_gcc(arguments: list[str], library: Path) -> None:
    command = ["gcc", *_FLAGS, f"-Wl,-soname,{library.name}", *arguments, "-o", str(library)]
    # What it says is looked into, whatever language this user speaks.
    subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        env=merge_environment({"LC_ALL": "C"}),
    )


def _try_loading(library: Path) -> None:
    """A loader that cannot preload a library says so on a line, and goes on without it.

    Raises:
        CannotOpen: another process of this Python cannot load it.
    """
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-I", "-S", "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CannotOpen(
            f"the system does not load {library}: {first_line(said[-1] if said else 'it crashed')}",
            hint="is this Python's C library another one than gcc's? set HUBAOTI_HOME to a folder "
            "on another disk",
        )


def _make_private(root: Path) -> None:
    """The folder of all stand-ins, for this user alone: what lies in it is loaded and linked."""
    root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    # A home may be a link of this user's, as to a larger disk.
    _refuse_shared(root.parent.resolve(), stat.S_IWGRP | stat.S_IWOTH)
    _refuse_shared(root)


def _refuse_shared(folder: Path, rights: int = stat.S_IRWXG | stat.S_IRWXO) -> None:
    """Refuse a folder on which others have rights.

    Raises:
        UnsafeFolder: it belongs to somebody else, is a link, or others have such rights.
    """
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not ours or found.st_mode & rights:
        raise UnsafeFolder(
            f"{folder} belongs to somebody else, or others may write it",
            hint=f"chmod {'go-w' if rights != 0o077 else '700'} {folder}; where that changes "
            "nothing, set HUBAOTI_HOME to a folder that is yours alone",
        )


def _sweep(root: Path) -> None:
    """Remove what builds left that were killed."""
    for path in root.glob("*.*.*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _LONGEST_BUILD:
                remove_tree(path)
