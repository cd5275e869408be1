"""The same program gives the same bytes: what inductor takes from the machine is taken away.

All of it is private, checked on torch 2.11 to 2.15. Where a name is gone the build is as torch
makes it: other bytes of the same code, but for cubins that are not aligned, which are refused.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from hubaoti.compiler.cubins import ALIGNMENT
from hubaoti.compiler.patched import patch_attribute
from hubaoti.host.probe import STAND_IN

_SOURCES = ("wrapper.cpp", "kernel.cpp")
_NAME = "graph"  # of the library and its sources


@contextmanager
def build_same_bytes() -> Iterator[None]:
    """Keep paths, addresses and the order of objects in memory out of what inductor writes."""
    from torch._inductor import codecache
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    replacements: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
        (codecache, "write", _name_sources),
        (CppWrapperCpu, "codegen_int_array_var", _keep_writers),
        (codecache, "convert_cubin_to_obj", lambda _: _embed_cubin),
        (codecache, "batch_convert_cubins_to_obj", lambda _: _embed_cubins),  # of 2.15
    ]
    with ExitStack() as patches:
        for owner, name, replace in replacements:
            if name in vars(owner):
                value = replace(vars(owner)[name])
                patches.enter_context(patch_attribute(owner, name, value))
        yield


def _name_sources(write: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    """Sources with one name; torch hashes into it where Python, torch and CUDA lie.

    The library is called after its wrapper, and holds that name.
    """
    unused = set(_SOURCES)

    def write_named(content: Any, extension: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
        if extension in unused and kwargs.get("key") is None:  # else a name that torch may hash
            unused.remove(extension)
            kwargs["key"] = _NAME
        return write(content, extension, *args, **kwargs)

    return write_named


def _keep_writers(declare: Callable[..., str]) -> Callable[..., str]:
    """Arrays of sizes declared once for each place in the code, told by where it is in memory.

    Torch 2.11 looks at the address of a bound method, which is gone at once, and 2.13 at that of
    its object, which may be: whatever comes to lie there later is taken for it, so that an array
    is declared again or not as memory happens to be laid out. Here each place is one object, and
    is kept; 2.15 keeps it itself.
    """
    kept: dict[Callable[..., None], Callable[..., None]] = {}

    def declare_once(
        self: Any, int_array: str, writeline: Callable[..., None], *args: Any, **kwargs: Any
    ) -> str:
        return declare(self, int_array, kept.setdefault(writeline, writeline), *args, **kwargs)

    return declare_once


def _embed_cubin(cubin_file: str, kernel_name: str, *_: str) -> str:
    """As `codecache.convert_cubin_to_obj`, which embeds one at any address."""
    return _assemble([(cubin_file, kernel_name)], Path(f"{cubin_file}.o"))


def _embed_cubins(cubins: Sequence[tuple[str, str]], output_dir: str, **_: str) -> str:
    """As `codecache.batch_convert_cubins_to_obj`, which embeds all at multiples of 16."""
    return _assemble(cubins, Path(output_dir) / "cubins.o")


def _assemble(cubins: Sequence[tuple[str, str]], target: Path) -> str:
    """An object file that holds cubins, aligned, under the names by which host code knows them."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    lines = ['.section .note.GNU-stack,"",@progbits', ".section .rodata"]
    for file, name in cubins:
        start, end, size = (f"__{name}_{part}" for part in ("start", "end", "size"))
        lines += [f".balign {ALIGNMENT}", f".global {start}, {end}, {size}"]
        lines += [f"{start}:", f'.incbin "{file}"', f"{end}:", f".set {size}, {end} - {start}"]
    source = target.with_suffix(".s")
    source.write_text("\n".join(lines) + "\n")
    command = [get_cpp_compiler(), "-c", str(source), "-o", str(target)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return str(target)


@contextmanager
def take_first_configs() -> Iterator[None]:
    """Compile of a kernel's configs the first that can be, where a device computes nothing.

    Whatever is measured there is equal, so that the first is taken anyhow, and the others are
    compiled for nothing: minutes and gigabytes of ptxas for a reduction whose sizes are few when
    it is traced and many at most (measured on torch 2.15). Which is the first is not the machine's
    choice. Private, checked on torch 2.11 to 2.15: `CachingAutotuner.precompile`; where it has
    another name, all are compiled.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    precompile = vars(CachingAutotuner).get("precompile")
    if precompile is None or not _computes_nothing():
        yield
        return

    def precompile_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        configs = [] if self.compile_results else list(self.configs or ())
        for config in configs[:-1]:
            self.configs = [config]
            try:
                return precompile(self, *args, **kwargs)
            except RuntimeError as error:  # as it takes more shared memory than there is
                if "No valid triton configs" not in str(error):
                    raise
            self.compile_results, self.launchers = [], []
        self.configs = configs[-1:] or self.configs
        return precompile(self, *args, **kwargs)

    with patch_attribute(CachingAutotuner, "precompile", precompile_first):
        yield


def _computes_nothing() -> bool:
    """Whether this process has a GPU, and it is the stand-in's."""
    return torch.cuda.is_available() and torch.cuda.get_device_name().endswith(STAND_IN)
