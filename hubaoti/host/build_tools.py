"""What compiling takes besides torch: compilers, and CUDA's headers, by the names that pip has.

Nothing here imports torch. Headers are those beside torch, in the packages of NVIDIA: a CUDA
toolkit that the machine may have is not looked at, so that a build is the same everywhere.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from hubaoti.errors import MissingDependency
from hubaoti.host.extras import EXTRAS, join_names, require
from hubaoti.host.match import Refusal
from hubaoti.host.probe import Torch, probe_glibc
from hubaoti.settings import read_compilers

# In each of the header's packages, one header that only it has.
_CRT, _CCCL = "crt/host_defines.h", "nv/target"
_TOOLS = {
    "g++": "compiles the host code of graphs",
    "gcc": "compiles triton's launchers and the stand-in of a GPU",
    "ld": "links them",
    "objcopy": "puts kernels into libraries",
}
_VERSION = re.compile(r"#define\s+CUDA_VERSION\s+(\d+)")
_PIN = re.compile(r"cuda-toolkit\[[^]]*\]\s*==\s*([\w.]+)")


def find_missing_build_tools(torch: Torch | None) -> list[Refusal]:
    """What this machine lacks to compile for a GPU, and so for a CPU; empty where nothing is.

    Each says what needs it, what was found instead, and the command that brings it. A GPU or its
    driver is not among them.
    """
    return [*_find_missing_tools(), *_find_missing_cuda(torch)]


def find_missing_for_cpu() -> list[Refusal]:
    """What this machine lacks to compile for its CPU: packages, and a compiler of the host code."""
    found = []
    try:
        require("compiling", "compile")
    except MissingDependency as error:
        found.append(Refusal(join_names([*EXTRAS["compile"]]), str(error), error.hint))
    compiler = ("g++,", "the compiler that CXX names")
    return found + [each for each in _find_missing_tools() if each.need.startswith(compiler)]


def find_cuda_includes(torch: Torch) -> list[Path]:
    """The folders of CUDA's headers beside a torch that was built with CUDA; cuDNN's come last.

    CUDA 13 has one folder for all of them (`nvidia/cu13`), CUDA 12 one for each package.
    """
    nvidia = torch.path.parent / "nvidia"
    major = (torch.cuda or "").partition(".")[0]
    found = [nvidia / f"cu{major}" / "include", *sorted(nvidia.glob("cu*/include"))]
    others = [path for path in found[1:] if not re.fullmatch(r"cu\d+", path.parent.name)]
    return [path for path in (found[0], *others) if path.is_dir()]


def _find_missing_tools() -> Iterator[Refusal]:
    named = read_compilers()
    for variable, compiler in named.items():
        # Torch and triton start it as one program: nothing takes "ccache gcc" apart.
        if shutil.which(compiler) is None:
            yield Refusal(
                f"the compiler that {variable} names",
                f"no program {compiler!r}",
                f"unset {variable}, or set it to the path of a compiler, without arguments",
            )
    for tool, use in _TOOLS.items():
        if shutil.which(tool) is None and not (tool == "g++" and "CXX" in named):
            package = "binutils" if tool in ("ld", "objcopy") else "g++"
            yield Refusal(
                f"{tool}, which {use}",
                "none on the PATH",
                f"install {package} (apt install {package}, or dnf install "
                f"{'gcc-c++' if package == 'g++' else package})",
            )
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        yield Refusal(
            "Python's headers, which triton's launchers are compiled with",
            f"no {include / 'Python.h'}",
            "install them (apt install python3-dev), or use a Python that has them",
        )
    if probe_glibc() is None:
        yield Refusal(
            "glibc, which torch's builds for CUDA are linked against",
            "another C library, such as musl",
            "compile on a system with glibc, such as Debian, Ubuntu or Fedora",
        )


def _find_missing_cuda(torch: Torch | None) -> Iterator[Refusal]:
    if torch is None or torch.cuda is None:
        yield Refusal(
            "a torch that is built with CUDA, to compile for a GPU",
            f"torch {torch.version}, without CUDA" if torch else "no torch",
            _suggest_torch(torch),
        )
        return
    includes, wanted = find_cuda_includes(torch), _read_cuda(torch.cuda)
    lacking = [name for name in ("cuda.h", _CRT, _CCCL) if _find_header(name, includes) is None]
    if lacking:
        yield Refusal(
            f"CUDA {torch.cuda}'s headers {', '.join(lacking)}",
            f"none of that name beside torch, in {torch.path.parent / 'nvidia'}",
            _suggest_headers(torch),
        )
    header = _find_header("cuda.h", includes)
    found = _VERSION.search(header.read_text(errors="replace")) if header else None
    version = (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else None
    if header and version != wanted:
        have = f"CUDA {version[0]}.{version[1]}" if version else "of no version"
        yield Refusal(
            f"the headers of CUDA {torch.cuda}, with which torch {torch.version} was built",
            f"{header} is {have}",
            _suggest_headers(torch),
        )


def _find_header(name: str, includes: list[Path]) -> Path | None:
    return next((path / name for path in includes if (path / name).is_file()), None)


def _read_cuda(version: str) -> tuple[int, int]:
    major, minor = (re.findall(r"\d+", version) + ["0", "0"])[:2]
    return int(major), int(minor)


def _suggest_headers(torch: Torch) -> str:
    """The command that brings the headers of a torch's CUDA, in the version that torch pins."""
    major, minor = _read_cuda(torch.cuda or "")
    if major < 13:
        names = ("nvcc", "cccl", "runtime")
        packages = (f'"nvidia-cuda-{name}-cu{major}=={major}.{minor}.*"' for name in names)
        return f"pip install {' '.join(packages)}"
    pinned = _read_pin(torch) or f"{major}.{minor}.*"
    return f'pip install "cuda-toolkit[crt,cccl]=={pinned}"'


def _read_pin(torch: Torch) -> str | None:
    """The version of `cuda-toolkit` that the metadata beside a torch asks for."""
    for found in distributions(name="torch", path=[str(torch.path.parent)]):
        for requirement in found.requires or ():
            if match := _PIN.match(requirement):
                return match[1]
    return None


def _suggest_torch(torch: Torch | None) -> str:
    """A torch of the same release: the one that pip finds for Linux is built with CUDA."""
    release = torch.version.partition("+")[0] if torch else ""
    wanted = f'"torch=={release}"' if release else "torch"
    return f"pip install --force-reinstall {wanted}, which for Linux is built with CUDA"
