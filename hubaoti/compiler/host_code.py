"""Host code of a graph: C++ for a named CPU level, compiled in two parts at a time.

It is never made for the machine that happens to build it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import CppCompileError

from hubaoti.compiler.patched import patch_attribute
from hubaoti.host.probe import find_mapped
from hubaoti.settings import merge_environment, override_environment

# A level's name for g++, and the width of its vectors; 1 turns inductor's own vectors off.
LEVELS = {
    "x86_64_v2": ("x86-64-v2", 1),
    "x86_64_v3": ("x86-64-v3", 256),
    "x86_64_v4": ("x86-64-v4", 512),
    "aarch64": ("armv8-a", 128),
}
_DRIVER = "driver"  # a folder of the build


@contextmanager
def target_cpu_level(level: str, folder: Path) -> Iterator[None]:
    """Make inductor's C++ for a CPU level, with a stack that is not executable and no paths.

    Private, checked on torch 2.11 to 2.15: `cpp_builder._get_optimization_cflags` (its flags have
    no public door; `cpp.march` came with 2.13) and `cpu_vec_isa.valid_vec_isa_list` (which would
    add what this very CPU has beyond the level, as avx512_bf16). Where they are gone, the checks of
    the clean package refuse what would not be fit to publish.
    """
    from torch._inductor import cpp_builder, cpu_vec_isa

    _link_driver(folder)
    with ExitStack() as patches:
        # The linker would write its folders into the library, which would load from them anywhere.
        patches.enter_context(override_environment(LD_RUN_PATH=None))
        if hasattr(cpp_builder, "_get_optimization_cflags"):
            flags = _wrap_cflags(cpp_builder._get_optimization_cflags, LEVELS[level][0], folder)
            patches.enter_context(patch_attribute(cpp_builder, "_get_optimization_cflags", flags))
        if hasattr(cpu_vec_isa, "valid_vec_isa_list"):
            isas = choose_vector_isas(cpu_vec_isa, level)
            patches.enter_context(patch_attribute(cpu_vec_isa, "valid_vec_isa_list", lambda: isas))
        yield


def _link_driver(folder: Path) -> None:
    """Let the linker find the driver that this process has by the name under which it is linked.

    Only some toolkits' stubs have a `libcuda.so`, and they are often not where a linker looks.
    """
    (folder / _DRIVER).mkdir()
    if torch.version.cuda and (driver := find_mapped("libcuda.so.1")):
        (folder / _DRIVER / "libcuda.so").symlink_to(driver)


def _wrap_cflags(
    original: Callable[..., tuple[list[str], list[str]]], march: str, folder: Path
) -> Callable[..., tuple[list[str], list[str]]]:
    """The compiler's flags with another `-march`, no debug lines, and neutral file names."""
    maps = list_paths(folder)

    def get_cflags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        cflags, ldflags = original(*args, **kwargs)
        kept = [f for f in cflags if not f.startswith(("march=", "mcpu=")) and f != "g1"]
        kept += [f"march={march}", *(f"ffile-prefix-map={a}={b}" for a, b in maps.items())]
        return kept, [*ldflags, "Wl,-z,noexecstack", f"L{folder / _DRIVER}"]

    return get_cflags


def list_paths(folder: Path) -> dict[Path, str]:
    """The folders of this machine that files of a build lie in, and what libraries call them.

    The last that holds a file names it: torch lies below Python, in a folder that each Python and
    each system calls by another name.
    """
    from torch.utils import cpp_extension

    names = {Path(sys.prefix): "python"}
    if torch.version.cuda and cpp_extension.CUDA_HOME:
        names[Path(cpp_extension.CUDA_HOME)] = "cuda"
    names |= {Path(torch.__file__).parent: "torch", folder: "build"}
    return {path: name for path, name in names.items() if len(path.parts) > 2}  # not /usr


@contextmanager
def compile_wrapper_concurrently() -> Iterator[None]:
    """Compile what calls the kernels beside the kernels; torch does one after the other.

    No compiler outlives this process, however it ends.

    Private, checked on torch 2.11 to 2.15: `cpp_builder.CppBuilder`, whose first build is that of
    `*.wrapper.o`. Where it has another name they are compiled one after the other. It runs other
    compilers by `cpp_builder.run_compile_cmd`; where that is gone, as torch does.
    """
    from torch._inductor import cpp_builder

    build, started = cpp_builder.CppBuilder.build, list[_Compiler]()

    def start_or_build(self: Any) -> None:
        target = Path(self.get_target_file_path())
        if target.name.endswith(".wrapper.o"):
            log = target.with_suffix(".log")
            started.append(_Compiler(self.get_command_line(), target.parent, log))
            return
        if target.suffix == ".so":
            for each in started:
                each.wait()
        build(self)

    with ExitStack() as patches:
        patches.enter_context(patch_attribute(cpp_builder.CppBuilder, "build", start_or_build))
        if hasattr(cpp_builder, "run_compile_cmd"):
            patches.enter_context(patch_attribute(cpp_builder, "run_compile_cmd", _run_compiler))
        try:
            yield
        finally:
            for each in started:
                each.stop()


def _run_compiler(command: str, cwd: str) -> None:
    """Run a compiler to its end, as torch does, but in a group that ends with this process."""
    compiler = _Compiler(command, Path(cwd), Path(cwd) / "compiler.log")
    try:
        compiler.wait()
    finally:
        compiler.stop()


# Beside a compiler, in one group with it, something waits for the end of whoever started both, who
# alone holds the other end of their input; then it ends the group. A shell waits for both of them.
_WATCHED = """exec 3<&0 </dev/null
(read _ <&3; kill -KILL 0) &
"$@" 3<&-; code=$?
kill -KILL $!; wait $! 2>/dev/null; exit $code"""


class _Compiler:
    """A compiler that was started, and what it says; it ends with this process."""

    def __init__(self, command: str, folder: Path, log: Path) -> None:
        self.command, self.log = shlex.split(command), log
        with log.open("w") as file:
            # A group of its own, so that what g++ starts ends with it.
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _WATCHED, "sh", *self.command],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                process_group=0,
                # What it leaves when it is killed is removed with the folder.
                env=merge_environment({"TMPDIR": str(folder)}),
            )

    def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            CppCompileError: it failed; as torch raises it.
        """
        code = self.process.wait()
        self._close()
        if code:
            raise CppCompileError(self.command, self.log.read_text(errors="replace"))
        self.log.unlink()

    def stop(self) -> None:
        """Kill it and what it started, where something else failed; nothing if it has ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._close()

    def _close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def choose_vector_isas(cpu_vec_isa: Any, level: str) -> list[Any]:
    """The one vector ISA of a level, without asking g++ what this CPU has besides."""
    name = {"x86_64_v3": "VecAVX2", "x86_64_v4": "VecAVX512", "aarch64": "VecNEON"}.get(level)
    if name is None:
        return []
    base = getattr(cpu_vec_isa, name)
    return [type(name, (base,), {"__bool__": lambda self: True, "__hash__": base.__hash__})()]
