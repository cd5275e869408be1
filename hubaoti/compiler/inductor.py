"""AOTInductor: an exported program becomes a package of native code without weights.

Host code is made for a named CPU level, never for the machine that happens to build it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch.export import ExportedProgram

from hubaoti.artifact.package import hash_file, pack_folder, unpack_all
from hubaoti.artifact.schema import Target
from hubaoti.compiler.build_folder import hold_build_folder
from hubaoti.compiler.callspec import CallSpec, write_call_spec
from hubaoti.compiler.cubins import KERNELS, describe_kernels, require_sound_cubins
from hubaoti.compiler.elf import refuse_executable_stack, refuse_paths
from hubaoti.compiler.host_code import (
    LEVELS,
    compile_wrapper_concurrently,
    list_paths,
    target_cpu_level,
)
from hubaoti.compiler.op_shims import write_shims
from hubaoti.compiler.passes import UnfuseBias
from hubaoti.compiler.reproducible import build_same_bytes, take_first_configs
from hubaoti.disk import TEMPORARY, are_on_one_disk, find_full_disk
from hubaoti.errors import CompileFailed, DiskFull, HubaotiError, first_line
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

# Loops are laid out for so many cores, whatever the builder has. How many work is the host's
# choice: code for a few would leave those of a server idle, one batch at a time.
_CORES = 16

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
        # A router's mask of whole numbers would become one of floats (torch 2.11: DeepSeek V3).
        options["optimize_scatter_upon_const_tensor"] = False
    return options


def lower(  # noqa: PLR0913 - all that a package is made of
    program: ExportedProgram,
    level: str,
    options: dict[str, Any],
    package: Path,
    where: str,
    spec: CallSpec | None,
    root: str,
    keep: Path | None = None,
) -> None:
    """Compile a program into `package`, a `.pt2` without weights, sources or paths.

    The same program gives the same bytes, wherever and by whomever it is lowered, with the same
    torch, triton and C++ compiler. `spec` is how loaders without a manifest flatten calls, by
    default as the program does, and `root` the one folder of the package. `where` names the folder
    of the build: no two builds of one name go on at once. What is not published and yet tells of
    the kernels goes into the folder `keep`: the sources, and `kernels.json` (see
    `cubins.describe_kernels`).

    For a GPU the process finds CUDA's headers by `CUDA_HOME`.

    Raises:
        CompileFailed: inductor or the C++ compiler failed, or what they made cannot be published.
    """
    settings = ALONE | {name: _PASSES.get(str(value), value) for name, value in options.items()}
    # What a GPU's graph does on the host is small, and its threads are not the host's choice.
    settings["cpp.threads"] = _CORES if options.get("cpp.dynamic_threads") else 1
    if shims := write_shims(program):
        settings["aot_inductor.custom_ops_to_c_shims"] = shims
    with (
        hold_build_folder(where) as folder,
        target_cpu_level(level, folder),
        _use_fresh_cache(folder),
        build_same_bytes(),
        take_first_configs(),
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
        if keep is not None:
            _keep_sources(clean, keep)
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
        hint="hubaoti doctor --build says whether something is missing; else try --dtype float32",
    )


def _keep_sources(folder: Path, keep: Path) -> None:
    """Copy a package's sources, and write what is known of their kernels, into `keep`."""
    keep.mkdir(parents=True, exist_ok=True)
    for source in folder.rglob("*.cpp"):
        shutil.copy(source, keep / source.name)
    kernels = json.dumps(describe_kernels(), indent=1, sort_keys=True, default=str)
    (keep / KERNELS).write_text(f"{kernels}\n")


def _clean_package(folder: Path, building: Path) -> None:
    """Drop the sources, and make sure that the libraries can be published."""
    for source in folder.rglob("*.cpp"):
        source.unlink()
        # Torch's own loader of 2.11 finds the metadata by this name; that of 2.13 does not need it.
        if source.name.endswith(".wrapper.cpp") and Version(torch.__version__) < Version("2.13"):
            source.touch()
    secret = [*list_paths(building), Path(torch.__file__).parents[1], Path.home()]
    for file in filter(Path.is_file, folder.rglob("*")):
        refuse_paths(file, [path for path in secret if len(path.parts) > 2])
    for library in folder.rglob("*.so"):
        refuse_executable_stack(library)
        require_sound_cubins(library)
    _renew_serialization_id(folder)


def _renew_serialization_id(folder: Path) -> None:
    """Let a package's id be of what is in it now; torch's is of the sources, which hold paths."""
    for old in folder.glob("*/.data/serialization_id"):
        old.unlink()
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        content = "".join(f"{file.relative_to(folder)}\0{hash_file(file)}\0" for file in files)
        number = int.from_bytes(hashlib.sha256(content.encode()).digest())
        old.write_text(str(number)[:40])  # as many digits as torch writes


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
