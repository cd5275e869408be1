"""ELF: what a library needs, and what must not be in one that is published."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hubaoti.compiler.elf import (
    Needs,
    find_newest_version,
    merge_needs,
    read_needs,
    refuse_executable_stack,
    refuse_paths,
)
from hubaoti.errors import CompileFailed

SOURCE = """
#include <cmath>
#include <string>
#include <stdexcept>
extern "C" double answer(double x) {
    if (x < 0) throw std::runtime_error(std::string("negative in ") + __FILE__);
    return std::pow(x, 0.5);
}
"""


def build(folder: Path, *flags: str, source: str = SOURCE) -> Path:
    """A small shared library, made by g++."""
    code, library = folder / "code.cpp", folder / "code.so"
    code.write_text(source)
    words = ["g++", "-shared", "-fPIC", *flags, str(code), "-o", str(library)]
    subprocess.run(words, check=True, capture_output=True)
    return library


def test_the_needs_are_those_that_objdump_sees(tmp_path: Path) -> None:
    library = build(tmp_path)
    needs = read_needs(library)
    said = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True)
    libraries = {line.split()[1] for line in said.stdout.splitlines() if "NEEDED" in line}
    versions = [word for word in said.stdout.split() if word.startswith(("GLIBC", "CXXABI_"))]
    assert {*needs.libraries} == libraries >= {"libstdc++.so.6"}
    for prefix, found in (
        ("GLIBC_", needs.glibc),
        ("GLIBCXX_", needs.glibcxx),
        ("CXXABI_", needs.cxxabi),
    ):
        assert found == find_newest_version(versions, prefix) is not None


def test_a_library_of_nothing_needs_nothing(tmp_path: Path) -> None:
    source = 'extern "C" int one() { return 1; }'
    needs = read_needs(build(tmp_path, "-nostdlib", source=source))
    assert (needs.libraries, needs.glibc, needs.glibcxx, needs.cxxabi) == ((), None, None, None)


def test_several_libraries_need_the_newest_of_each_runtime() -> None:
    first = Needs(("libc.so.6", "libm.so.6"), "2.34", "3.4.9", "1.3.9")
    other = Needs(("libc.so.6", "libtorch.so"), "2.4", "3.4.30", None)
    merged = merge_needs([first, other, Needs((), None, None, None)])
    assert merged == Needs(("libc.so.6", "libm.so.6", "libtorch.so"), "2.34", "3.4.30", "1.3.9")
    assert merge_needs([]) == Needs((), None, None, None)


def test_versions_are_numbers_and_not_text() -> None:
    versions = ["GLIBC_2.4", "GLIBC_2.34", "GLIBC_2.9", "GLIBC_PRIVATE", "GLIBCXX_3.4.30"]
    assert find_newest_version(versions, "GLIBC_") == "2.34"
    assert find_newest_version(versions, "CXXABI_") is None


def test_an_executable_stack_is_refused(tmp_path: Path) -> None:
    refuse_executable_stack(build(tmp_path, "-Wl,-z,noexecstack"))
    with pytest.raises(CompileFailed, match="executable stack") as caught:
        refuse_executable_stack(build(tmp_path, "-Wl,-z,execstack"))
    assert caught.value.hint


def test_a_path_of_this_machine_is_refused(tmp_path: Path) -> None:
    refuse_paths(build(tmp_path, f"-ffile-prefix-map={tmp_path}=code"), [tmp_path])
    with pytest.raises(CompileFailed, match=f"holds the path {tmp_path}"):
        refuse_paths(build(tmp_path), [tmp_path])
