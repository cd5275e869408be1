"""What a graph's library needs of a host, read from the ELF file itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from packaging.version import Version

from hubaoti.errors import CompileFailed

_EXECUTABLE = 1  # PF_X
_RUNTIMES = {"glibc": "GLIBC_", "glibcxx": "GLIBCXX_", "cxxabi": "CXXABI_"}


@dataclass(frozen=True, slots=True)
class Needs:
    """Libraries by soname, and the newest symbol versions of the C and C++ runtimes."""

    libraries: tuple[str, ...]
    glibc: str | None
    glibcxx: str | None
    cxxabi: str | None


def read_needs(library: Path) -> Needs:
    """Read DT_NEEDED and the version needs of a shared library."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic: Any = elf.get_section_by_name(".dynamic")
        tags = dynamic.iter_tags() if dynamic else ()
        libraries = sorted(tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED")
        section: Any = elf.get_section_by_name(".gnu.version_r")
        needs = section.iter_versions() if section else ()
        versions = [each.name for _, needed in needs for each in needed]  # as GLIBC_2.34
    newest = {name: find_newest_version(versions, start) for name, start in _RUNTIMES.items()}
    return Needs(tuple(libraries), **newest)


def merge_needs(needs: Sequence[Needs]) -> Needs:
    """What several libraries need of one host."""
    libraries = sorted({library for each in needs for library in each.libraries})
    found = {name: [v for each in needs if (v := getattr(each, name))] for name in _RUNTIMES}
    newest = {name: max(each, key=Version, default=None) for name, each in found.items()}
    return Needs(tuple(libraries), **newest)


def find_newest_version(versions: list[str], prefix: str) -> str | None:
    """The highest version of one runtime, without its prefix."""
    found = [v.removeprefix(prefix) for v in versions if v.startswith(prefix)]
    numbers = [text for text in found if text.replace(".", "").isdigit()]
    return max(numbers, key=Version, default=None)


def refuse_executable_stack(library: Path) -> None:
    """glibc 2.41 and newer refuse to load a library that wants its stack executable.

    Raises:
        CompileFailed: this one does.
    """
    with library.open("rb") as file:
        for segment in ELFFile(file).iter_segments("PT_GNU_STACK"):
            if segment["p_flags"] & _EXECUTABLE:
                raise CompileFailed(
                    f"build: {library.name} has an executable stack, which new systems refuse",
                    hint="use a linker that knows -z noexecstack",
                )


def refuse_paths(library: Path, paths: list[Path]) -> None:
    """No path of this machine may stay in what is published.

    Raises:
        CompileFailed: one of `paths` stands in the library.
    """
    content = library.read_bytes()
    for path in paths:
        if str(path).encode() + b"/" in content:
            raise CompileFailed(
                f"build: {library.name} holds the path {path}",
                hint="report it with your torch and compiler versions",
            )
