"""AOTInductor: an exported program becomes a package of native code without weights.

Host code is made for a named CPU level, never for the machine that happens to build it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch._inductor.exc import CppCompileError
from torch.export import ExportedProgram

from hubaoti.artifact.package import pack_folder, unpack_all
from hubaoti.artifact.schema import Target
from hubaoti.compiler.callspec import CallSpec, write_call_spec
from hubaoti.compiler.elf import refuse_executable_stack, refuse_paths
from hubaoti.compiler.passes import UnfuseBias
from hubaoti.compiler.patched import patch_attribute
from hubaoti.disk import TEMPORARY, are_on_one_disk, find_full_disk
from hubaoti.errors import CompileFailed, DiskFull, HubaotiError, UnsafeFolder, first_line
from hubaoti.host.probe import find_mapped
from hubaoti.settings import override_environment

# Weights stay outside, and nothing is computed from them while compiling, as packed copies are.
WEIGHTLESS = {
    "cpp.weight_prepack": False,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
}
# How a build is done, which changes nothing that is built. Headers that were precompiled lie in a
# folder that all builds share, and compile workers keep the environment that they started with.
ALONE = {"aot_inductor.precompile_headers": False, "compile_threads": 1}
# A level's name for g++, and the width of its vectors; 1 turns inductor's own vectors off.
LEVELS = {
    "x86_64_v2": ("x86-64-v2", 1),
    "x86_64_v3": ("x86-64-v3", 256),
    "x86_64_v4": ("x86-64-v4", 512),
    "aarch64": ("armv8-a", 128),
}
_DRIVER = "driver"  # a folder of the build

_UNFUSE = UnfuseBias()
_PASSES = {_UNFUSE.uuid(): _UNFUSE}  # by the names that manifests give them


def choose_inductor_options(target: Target) -> dict[str, Any]:
    """Every inductor option that is not at its default, as the manifest and the key have it."""
    options: dict[str, Any] = WEIGHTLESS | {"cpp.simdlen": LEVELS[target.level][1]}
    if target.device == "cpu":
        # Else sums are kept in arrays for as many threads as the builder has, and a host that has
        # more writes beyond them (measured: a crash).
        options["cpp.dynamic_threads"] = True
        options["post_grad_custom_post_pass"] = _UNFUSE.uuid()
    if target.device == "cuda":
        # Else the library holds the path of the build, under which each kernel is a file.
        options["aot_inductor.embed_kernel_binary"] = True
    return options


def lower(  # noqa: PLR0913 - all that a package is made of
    program: ExportedProgram,
    level: str,
    options: dict[str, Any],
    package: Path,
    where: str,
    spec: CallSpec | None,
    root: str,
) -> None:
    """Compile a program into `package`, a `.pt2` without weights, sources or paths.

    `spec` is how loaders without a manifest flatten calls, by default as the program does, and
    `root` the one folder of the package. `where` names the folder of the build, whose path is a
    part of what is built: the same name for the same program.

    Raises:
        CompileFailed: inductor or the C++ compiler failed.
    """
    settings = ALONE | {name: _PASSES.get(str(value), value) for name, value in options.items()}
    with (
        _hold_build_folder(where) as folder,
        _target_cpu_level(level, folder),
        _expose_cuda_toolkit(folder),
        _use_fresh_cache(folder),
        compile_wrapper_concurrently(),
        write_call_spec(spec),
    ):
        raw = folder / f"{root}.pt2"  # torch names the folder after it
        try:
            with warnings.catch_warnings(action="ignore"):  # of torch about torch
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(raw), inductor_configs=settings
                )
        except Exception as error:  # inductor, g++ and triton raise of many kinds
            raise find_cause(error, folder) from error
        clean = folder / "clean"
        unpack_all(raw, clean)
        _clean_package(clean, folder)
        pack_folder(clean, package)


def find_cause(error: Exception, folder: Path) -> HubaotiError:
    """Of the pages that inductor and g++ write, the line that names the cause."""
    text = str(error)
    if "No space left on device" in text:
        place = find_full_disk(text, folder)
        other = "" if are_on_one_disk(place, folder) else f", or {TEMPORARY}"
        return DiskFull(
            f"lower: no room on the disk of {place}", hint=f"free some space there{other}"
        )
    causes = (line for line in text.splitlines() if "error: " in line or "cannot find -l" in line)
    return CompileFailed(
        f"lower: {type(error).__name__}: {first_line(next(causes, error))}",
        hint="are g++ and, for a GPU, the CUDA toolkit installed? else try --dtype float32",
    )


def _clean_package(folder: Path, building: Path) -> None:
    """Drop the sources, and make sure that the libraries can be published."""
    for source in folder.rglob("*.cpp"):
        source.unlink()
        # Torch's own loader of 2.11 finds the metadata by this name; that of 2.13 does not need it.
        if source.name.endswith(".wrapper.cpp") and Version(torch.__version__) < Version("2.13"):
            source.touch()
    secret = [building, Path(torch.__file__).parents[1], Path(sys.prefix), Path.home()]
    for library in folder.rglob("*.so"):
        refuse_executable_stack(library)
        refuse_paths(library, [path for path in secret if len(path.parts) > 2])


@contextmanager
def _hold_build_folder(name: str) -> Iterator[Path]:
    """A folder of ours at a fixed, neutral path, empty, for one build of this name at a time.

    The path is part of what inductor hashes, so that equal builds need equal paths; and a folder
    that others could write to would let them plant code in what is built.

    Raises:
        UnsafeFolder: somebody else made a folder of that name.
    """
    root = Path(f"/tmp/hubaoti-build-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if root.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UnsafeFolder(
            f"{root} belongs to somebody else, or others may write it",
            hint=f"remove it, or: chmod 700 {root}",
        )
    _sweep(root)
    folder = root / hashlib.sha256(name.encode()).hexdigest()[:16]
    with _hold_lock(folder.with_suffix(".lock")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


@contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of this name; who held it before may have removed its file."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                yield
                return


def _sweep(root: Path) -> None:
    """Remove what builds left that were killed: folders whose lock nobody holds."""
    for path in root.glob("*.lock"):
        with suppress(OSError), path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()


@contextmanager
def _use_fresh_cache(folder: Path) -> Iterator[None]:
    """Let inductor write below `folder`, and forget what it compiled before at another path."""
    from torch._inductor.utils import clear_caches

    cache = str(folder / "cache")
    clear_caches()
    with override_environment(
        TORCHINDUCTOR_CACHE_DIR=cache,
        TRITON_CACHE_DIR=f"{cache}/triton",
        TRITON_DISABLE_LINE_INFO="1",  # else each kernel holds the paths of its Python files
    ):
        yield
    clear_caches()


@contextmanager
def _target_cpu_level(level: str, folder: Path) -> Iterator[None]:
    """Make inductor's C++ for a CPU level, with a stack that is not executable and no paths.

    Private, checked on torch 2.11 to 2.15: `cpp_builder._get_optimization_cflags` (its flags have
    no public door; `cpp.march` came with 2.13) and `cpu_vec_isa.valid_vec_isa_list` (which would
    add what this very CPU has beyond the level, as avx512_bf16). Where they are gone, the checks of
    `_clean_package` refuse what would not be fit to publish.
    """
    from torch._inductor import cpp_builder, cpu_vec_isa

    with ExitStack() as patches:
        if hasattr(cpp_builder, "_get_optimization_cflags"):
            flags = _wrap_cflags(cpp_builder._get_optimization_cflags, LEVELS[level][0], folder)
            patches.enter_context(patch_attribute(cpp_builder, "_get_optimization_cflags", flags))
        if hasattr(cpu_vec_isa, "valid_vec_isa_list"):
            isas = choose_vector_isas(cpu_vec_isa, level)
            patches.enter_context(patch_attribute(cpu_vec_isa, "valid_vec_isa_list", lambda: isas))
        yield


def _wrap_cflags(
    original: Callable[..., tuple[list[str], list[str]]], march: str, folder: Path
) -> Callable[..., tuple[list[str], list[str]]]:
    """The compiler's flags with another `-march`, no debug lines, and neutral file names."""
    maps = {Path(torch.__file__).parent: "torch", folder: "build", Path(sys.prefix): "python"}

    def get_cflags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        cflags, ldflags = original(*args, **kwargs)
        kept = [f for f in cflags if not f.startswith(("march=", "mcpu=")) and f != "g1"]
        kept += [f"march={march}", *(f"ffile-prefix-map={a}={b}" for a, b in maps.items())]
        return kept, [*ldflags, "Wl,-z,noexecstack", f"L{folder / _DRIVER}"]

    return get_cflags


@contextmanager
def compile_wrapper_concurrently() -> Iterator[None]:
    """Compile what calls the kernels beside the kernels; torch does one after the other.

    Private, checked on torch 2.11 to 2.15: `cpp_builder.CppBuilder`, whose first build is that of
    `*.wrapper.o`. Where it has another name they are compiled one after the other.
    """
    from torch._inductor import cpp_builder

    build, started = cpp_builder.CppBuilder.build, list[_Compiler]()

    def start_or_build(self: Any) -> None:
        target = Path(self.get_target_file_path())
        if target.name.endswith(".wrapper.o"):
            started.append(_Compiler(self.get_command_line(), target))
            return
        if target.suffix == ".so":
            for each in started:
                each.wait()
        build(self)

    with patch_attribute(cpp_builder.CppBuilder, "build", start_or_build):
        try:
            yield
        finally:
            for each in started:
                each.stop()


class _Compiler:
    """A compiler that was started, and what it says."""

    def __init__(self, command: str, target: Path) -> None:
        self.command = shlex.split(command)
        self.log = target.with_suffix(".log")
        with self.log.open("w") as log:
            # A group of its own, so that what g++ starts ends with it.
            self.process = subprocess.Popen(
                self.command, cwd=target.parent, stdout=log, stderr=log, process_group=0
            )

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            CppCompileError: it failed; as torch raises it.
        """
        if self.process.wait():
            raise CppCompileError(self.command, self.log.read_text(errors="replace"))
        self.log.unlink()

    def stop(self) -> None:
        """Kill it and what it started, where something else failed; nothing if it has ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def _expose_cuda_toolkit(folder: Path) -> Iterator[None]:
    """Let g++ find CUDA's headers, and the driver by the name under which it is linked.

    Private, checked on torch 2.11: `cpp_extension.CUDA_HOME`, the folder above the first `nvcc`,
    which may be a script far from the toolkit. `libcuda.so` is a name that only some toolkits'
    stubs have; the driver itself, `libcuda.so.1`, is in this process once there is a GPU.
    """
    if torch.version.cuda is None:
        yield
        return
    from torch.utils import cpp_extension

    if driver := find_mapped("libcuda.so.1"):
        (folder / _DRIVER).mkdir()
        (folder / _DRIVER / "libcuda.so").symlink_to(driver)
    usual = (f"/usr/local/cuda-{torch.version.cuda}", "/usr/local/cuda")
    homes = filter(None, (cpp_extension.CUDA_HOME, *usual))
    home = next((h for h in homes if Path(h, "include/crt/host_defines.h").is_file()), None)
    with patch_attribute(cpp_extension, "CUDA_HOME", home) if home else nullcontext():
        yield


def choose_vector_isas(cpu_vec_isa: Any, level: str) -> list[Any]:
    """The one vector ISA of a level, without asking g++ what this CPU has besides."""
    name = {"x86_64_v3": "VecAVX2", "x86_64_v4": "VecAVX512", "aarch64": "VecNEON"}.get(level)
    if name is None:
        return []
    base = getattr(cpu_vec_isa, name)
    return [type(name, (base,), {"__bool__": lambda self: True, "__hash__": base.__hash__})()]
