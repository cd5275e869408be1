"""This machine, as facts: what `doctor` prints and `match` judges against.

Nothing here imports torch or creates a CUDA context. A fact that cannot be had is None, and
`notes` says why; a broken driver or an odd C library is something to report, never a crash.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from packaging.version import Version

from hubaoti.host.confinement import list_gaps, list_worker_gaps
from hubaoti.host.visible_gpus import hide_gpus
from hubaoti.settings import Settings

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
LIBSTDCXX = "libstdc++.so.6"
STAND_IN = "(stand-in)"  # how the name of a device ends that computes nothing
_RTLD_DI_SERINFO, _RTLD_DI_SERINFOSIZE = 4, 5


@dataclass(frozen=True, slots=True)
class Torch:
    """The torch that `import torch` would load, as its `version.py` says.

    `version` has the local tag ("2.13.0+cu130"), `cuda` is the toolkit's ("13.0", None for a CPU
    or ROCm build), `git` the commit it was built from, `path` the package's folder.
    """

    version: str
    cuda: str | None
    git: str | None
    path: Path


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `sm` is its compute capability without the dot (90 for 9.0), `memory` in bytes.

    A GPU that does not answer keeps its place, with `sm` 0, so that the others keep their index.
    """

    name: str
    sm: int
    memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """This machine. Sizes are in bytes; a fact that could not be had is None.

    `level` is archspec's generic CPU level (x86_64_v3), `cpu` its own name for it (icelake).
    `gpus` are those of NVML's that CUDA shows this process, as far as that can be told without it.
    `driver_cuda` is the newest CUDA that the driver serves. `glibcxx` and `cxxabi` are the highest
    versions that this process's libstdc++ defines. `libraries` are sonames that can be loaded;
    `kernels` need no network: the digests of those in the mirror.
    """

    os: str
    machine: str
    python: str
    level: str
    cpu: str
    cores: int
    memory: int | None = None
    torch: Torch | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    glibc: str | None = None
    glibcxx: str | None = None
    cxxabi: str | None = None
    libraries: frozenset[str] | None = frozenset()
    kernels: frozenset[str] = frozenset()
    offline: bool = False
    disk_free: int | None = None
    endpoint: str
    mirror: Path
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON has them: sets sorted, paths as strings."""
        facts = msgspec.to_builtins(self, order="deterministic", enc_hook=str)
        return {name: [*fact] if isinstance(fact, tuple) else fact for name, fact in facts.items()}


def probe_host(settings: Settings) -> Host:
    """Ask this machine for its facts; takes some 100 ms and changes nothing."""
    notes: list[str] = [*list_gaps(), *list_worker_gaps()]
    level, cpu = _probe_cpu(notes)
    torch = find_torch(notes)
    driver, driver_cuda, gpus = _probe_nvidia(settings, notes)
    glibcxx, cxxabi = _probe_libstdcxx(notes)
    return Host(
        os=platform.system().lower(),
        machine=_MACHINES.get(platform.machine().lower(), platform.machine().lower()),
        python=platform.python_version(),
        level=level,
        cpu=cpu,
        cores=count_cores(),
        memory=_probe_memory(),
        torch=torch,
        gpus=gpus,
        driver=driver,
        driver_cuda=driver_cuda,
        glibc=probe_glibc(),
        glibcxx=glibcxx,
        cxxabi=cxxabi,
        libraries=_list_libraries(torch),
        kernels=_list_kernels(settings.mirror),
        offline=settings.offline,
        disk_free=_measure_free_disk(settings.mirror),
        endpoint=settings.endpoint,
        mirror=settings.mirror,
        notes=tuple(notes),
    )


def _probe_cpu(notes: list[str]) -> tuple[str, str]:
    """The generic level and the name of the processor, both as archspec names them.

    Only x86-64 has levels that archspec can detect; elsewhere the level is the family, `aarch64`.
    """
    import archspec.cpu

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cpu = archspec.cpu.host()
    notes.extend(f"processor: {each.message}" for each in caught)
    family = str(cpu.family)
    return (str(cpu.generic) if family == "x86_64" else family), str(cpu.name)


def count_cores() -> int:
    """The cores that a container, or `taskset`, leaves to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _probe_memory() -> int | None:
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def find_torch(notes: list[str]) -> Torch | None:
    """The torch that `import torch` would load, without importing it; None, and a note, if none."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError) as error:
        notes.append(f"torch: {error}")
        return None
    if spec is None or not spec.submodule_search_locations:
        notes.append("torch: not installed")
        return None
    return read_torch(Path(next(iter(spec.submodule_search_locations))), notes)


def read_torch(folder: Path, notes: list[str]) -> Torch | None:
    """What `version.py` of torch's folder says; None, and a note, if it cannot be read.

    The wheel's metadata will not do: that of the CUDA wheels carries no local tag.
    """
    try:
        literals = _read_literals((folder / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        notes.append(f"torch: version.py cannot be read: {error}")
        return None
    version, cuda, git = (literals.get(name) for name in ("__version__", "cuda", "git_version"))
    if not isinstance(version, str):
        notes.append(f"torch: {folder / 'version.py'} names no version")
        return None
    cuda, git = (each if isinstance(each, str) else None for each in (cuda, git))
    return Torch(version, cuda, git, folder)


def _read_literals(source: str) -> dict[str, object]:
    """The names that a module gives literal values, annotated or not; nothing is executed."""
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ):
                found[name] = value
    return found


def _probe_nvidia(
    settings: Settings, notes: list[str]
) -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    """Driver, the CUDA it serves, and the GPUs, through NVML; no CUDA context is made."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            driver = str(pynvml.nvmlSystemGetDriverVersion())
            # An integer, 1000 * major + 10 * minor.
            serves = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
            found = [_probe_gpu(pynvml, i, notes) for i in range(pynvml.nvmlDeviceGetCount())]
            gpus = hide_gpus(found, settings, partial(_read_uuid, pynvml), notes)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        notes.append(f"NVML: {error}")
        return None, None, ()
    return driver, f"{serves // 1000}.{serves % 1000 // 10}", gpus


def _read_uuid(nvml: Any, index: int) -> str:
    """The UUID of a GPU; empty where it does not answer, so that no name is its beginning."""
    with suppress(nvml.NVMLError):
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index)))
    return ""


def _probe_gpu(nvml: Any, index: int, notes: list[str]) -> Gpu:
    """One GPU; one that does not answer is noted and keeps its place."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        name = str(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError as error:
        notes.append(f"NVML: GPU {index} does not answer: {error}")
        return Gpu(name="does not answer", sm=0, memory=None)
    if name.endswith(STAND_IN):
        notes.append(f"GPU {index} computes nothing: it stands in for one, to build and try graphs")
    try:
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        # A GPU that shares the host's memory has none of its own to report.
        memory = None
    return Gpu(name=name, sm=10 * major + minor, memory=memory)


def probe_glibc() -> str | None:
    """Such as "2.36"; None on musl, macOS and Windows, which have no such name."""
    with suppress(AttributeError, OSError, ValueError):
        found = re.match(r"glibc ([0-9]+\.[0-9]+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
        return found[1] if found else None
    return None


def _probe_libstdcxx(notes: list[str]) -> tuple[str | None, str | None]:
    """The highest GLIBCXX and CXXABI that the libstdc++ of this process defines."""
    try:
        # Only the loader knows which file it takes, so it is asked to take it.
        ctypes.CDLL(LIBSTDCXX)
        path = find_mapped(LIBSTDCXX)
        versions = _list_symbol_versions(path) if path else []
    except (OSError, ValueError) as error:
        notes.append(f"{LIBSTDCXX}: {error}")
        return None, None
    return _find_highest_version("GLIBCXX", versions), _find_highest_version("CXXABI", versions)


def find_mapped(soname: str) -> Path | None:
    """The file of a library that is loaded in this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    for line in maps.splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(soname):
            return path
    return None


def _list_symbol_versions(library: Path) -> list[str]:
    """The symbol versions that a C++ runtime defines: GLIBCXX_3.4.30, …

    Each is a string of its own in the file. Who parses it as ELF loads a library for that, which
    would be a tenth of a warm pull.

    Raises:
        ValueError: it names none, so it is no such library.
    """
    names = re.findall(rb"\0((?:GLIBCXX|CXXABI)_[0-9.]+)(?=\0)", library.read_bytes())
    if not names:
        raise ValueError(f"{library} names no versions of symbols")
    return [name.decode() for name in names]


def _find_highest_version(prefix: str, versions: Iterable[str]) -> str | None:
    """The highest version of a prefix; names such as CXXABI_TM_1 are no versions of it."""
    pattern = re.compile(rf"{prefix}_([0-9]+(?:\.[0-9]+)+)")
    found = [match[1] for match in map(pattern.fullmatch, versions) if match]
    return max(found, key=Version, default=None)


def _list_libraries(torch: Torch | None) -> frozenset[str]:
    """The sonames that a graph opened in this process finds.

    torch's own libraries and those of the nvidia wheels count: torch has loaded them by then.
    """
    folders = [*map(Path, _list_loader_folders()), Path(sys.prefix) / "lib"]
    if torch is not None:
        folders.append(torch.path / "lib")
        folders.extend((torch.path.parent / "nvidia").glob("*/lib"))
    return frozenset(_read_loader_cache()).union(*map(_list_sonames, folders))


def _list_sonames(folder: Path) -> list[str]:
    with suppress(OSError):
        return [entry.name for entry in os.scandir(folder) if ".so" in entry.name]
    return []


def _read_loader_cache() -> list[str]:
    """The sonames in the loader's cache; empty where there is no ldconfig."""
    ldconfig = shutil.which("ldconfig", path="/sbin:/usr/sbin:/bin:/usr/bin")
    if ldconfig is None:
        return []
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=10)
        return re.findall(r"^\t(\S+) \(", listed.stdout, flags=re.MULTILINE)
    return []


class _SearchPaths(ctypes.Structure):
    """The head of glibc's `Dl_serinfo`; `count` pairs of (name, flags) follow it."""

    _fields_ = [("size", ctypes.c_size_t), ("count", ctypes.c_uint)]


class _SearchPath(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("flags", ctypes.c_uint)]


def _list_loader_folders() -> list[str]:
    """Where the loader of this process looks, in its own words (dlinfo(3)); empty without glibc.

    So a search path that was set before this process started counts, and its standard folders are
    this system's.
    """
    if probe_glibc() is None:
        return []
    process = ctypes.CDLL(None)
    handle, head = ctypes.c_void_p(process._handle), _SearchPaths()
    if process.dlinfo(handle, _RTLD_DI_SERINFOSIZE, ctypes.byref(head)) != 0:
        return []
    buffer = ctypes.create_string_buffer(head.size)
    ctypes.memmove(buffer, ctypes.byref(head), ctypes.sizeof(head))
    if process.dlinfo(handle, _RTLD_DI_SERINFO, buffer) != 0:
        return []
    paths = (_SearchPath * head.count).from_buffer(buffer, ctypes.sizeof(head))
    return [path.name.decode(errors="surrogateescape") for path in paths]


def _list_kernels(mirror: Path) -> frozenset[str]:
    """The digests of the kernels that lie in the mirror; what cannot be read has none."""
    with suppress(OSError):
        return frozenset(folder.name for folder in (mirror / "kernels").iterdir())
    return frozenset()


def _measure_free_disk(folder: Path) -> int | None:
    """The free bytes of the disk on which a folder is, or would be made."""
    for existing in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return None
