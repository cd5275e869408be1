"""What g++ does beside what: two parts of a library at a time, and none that outlives the build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError

from hubaoti.compiler.host_code import compile_wrapper_concurrently


def compiling(source: Path) -> cpp_builder.CppBuilder:
    """A build of one object file."""
    options = cpp_builder.CppOptions(compile_only=True)
    return cpp_builder.CppBuilder(source.stem, str(source), options, str(source.parent))


def linking(*sources: Path) -> cpp_builder.CppBuilder:
    """A build of the library that some object files make."""
    objects = [str(source.with_suffix(".o")) for source in sources]
    folder = str(sources[0].parent)
    return cpp_builder.CppBuilder("whole", objects, cpp_builder.CppOptions(), folder)


def running(file: Path) -> list[int]:
    """The processes that were given a file by its name, and have not ended."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words, state = line.read_bytes(), line.with_name("stat").read_text()
        except OSError:
            continue
        if os.fsencode(file) in words.split(b"\0") and state.rpartition(")")[2].split()[0] != "Z":
            found.append(int(line.parent.name))
    return found


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """What calls the kernels, and the kernels."""
    caller, kernels = tmp_path / "graph.wrapper.cpp", tmp_path / "graph.kernel.cpp"
    caller.write_text("int twice(int); int call() { return twice(21); }\n")
    kernels.write_text("int twice(int x) { return 2 * x; }\n")
    return caller, kernels


def test_both_parts_are_there_when_they_are_linked(sources: tuple[Path, Path]) -> None:
    caller, kernels = sources
    with compile_wrapper_concurrently():
        compiling(caller).build()
        compiling(kernels).build()
        linking(caller, kernels).build()
    assert (caller.parent / "whole.so").stat().st_size
    assert not list(caller.parent.glob("*.log"))


def test_the_first_does_not_wait_for_its_end(sources: tuple[Path, Path]) -> None:
    """It reads from a pipe that nobody has written to yet."""
    caller, kernels = sources
    text = caller.read_text()
    caller.unlink()
    os.mkfifo(caller)
    with compile_wrapper_concurrently():
        compiling(caller).build()
        compiling(kernels).build()
        assert kernels.with_suffix(".o").is_file()
        caller.write_text(text)
        linking(caller, kernels).build()
    assert (caller.parent / "whole.so").is_file()


def test_what_is_wrong_with_it_is_said_when_it_is_needed(sources: tuple[Path, Path]) -> None:
    caller, kernels = sources
    caller.write_text("int call() { return twice(21); }\n")
    with compile_wrapper_concurrently():
        compiling(caller).build()
        compiling(kernels).build()
        with pytest.raises(CppCompileError, match="error: .*twice.* not declared"):
            linking(caller, kernels).build()


def test_it_ends_with_what_else_fails(sources: tuple[Path, Path]) -> None:
    caller, kernels = sources
    caller.unlink()
    os.mkfifo(caller)
    kernels.write_text("int twice(int x) { return 2 * y; }\n")
    with (
        pytest.raises(CppCompileError, match="error: .*y.* not declared"),
        compile_wrapper_concurrently(),
    ):
        compiling(caller).build()
        assert running(caller)
        compiling(kernels).build()
    assert not running(caller)
