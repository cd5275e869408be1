"""The device code in a graph's library: where it lies, and what it needs of a GPU.

A cubin is an ELF file of machine code for one capability; a library holds one for each kernel.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from hubaoti.artifact.schema import DeviceCode
from hubaoti.errors import CompileFailed

ALIGNMENT = 64  # of an image in a library, so that no driver minds where it starts
KERNELS = "kernels.json"  # beside the sources: what inductor knows of each kernel

_MACHINE = 190  # EM_CUDA
_MAGIC = re.compile(rb"\x7fELF\x02\x01.{10}..\xbe\x00", re.DOTALL)  # 64 bits, that machine
# In `.nv.info`: the format of attributes that have a size, and those of a function and a number.
_SIZED, _FRAME_SIZE, _MIN_STACK_SIZE, _REGISTERS = 4, 0x11, 0x12, 0x2F
_CONSTANTS = ".nv.constant0."  # sections, each of one kernel
_RESERVED = 1024  # of `.nv.shared` from sm 90 on, which is not of what a block can have
_DRIVER = "libcuda.so.1"
_HINT = "report it with your torch and triton versions"


@dataclass(frozen=True, slots=True)
class Cubin:
    """One image: where it starts, what it is for, and what the largest of its kernels takes.

    One for `capability` 90 serves that `only` where it was made for `sm_90a`. `shared_memory` is
    what it has without being asked for more.
    """

    address: int
    capability: int
    only: bool
    kernels: tuple[str, ...]
    registers: int
    local_bytes: int
    shared_memory: int


def read_device_code(keep: Path, folder: Path) -> DeviceCode | None:
    """What the kernels of an unpacked package take; None where it has none of its own.

    `keep` is what `inductor.lower` kept of the same build: only there does the shared memory stand
    that a launch asks for, which is beyond what a cubin has of itself.

    Raises:
        CompileFailed: the cubins are for several capabilities, or a kernel is one that nobody
            knows.
    """
    cubins = [each for library in sorted(folder.rglob("*.so")) for each in read_cubins(library)]
    if not cubins:
        return None
    if len({(each.capability, each.only) for each in cubins}) > 1:
        names = sorted({f"sm_{each.capability}{'a' * each.only}" for each in cubins})
        raise CompileFailed(f"build: kernels for {' and '.join(names)} in one graph", hint=_HINT)
    asked = _read_launches(keep)
    if lost := sorted({name for each in cubins for name in each.kernels} - asked.keys()):
        raise CompileFailed(f"build: nobody knows how {', '.join(lost)} is launched", hint=_HINT)
    return DeviceCode(
        capability=cubins[0].capability,
        kernels=sum(len(each.kernels) for each in cubins),
        registers=max(each.registers for each in cubins),
        local_bytes=max(each.local_bytes for each in cubins),
        shared_memory=max(
            each.shared_memory + max((asked[name] for name in each.kernels), default=0)
            for each in cubins
        ),
    )


def read_cubins(library: Path) -> list[Cubin]:
    """The cubins in the constants of a library, in order of their addresses."""
    with library.open("rb") as file:
        found = []
        for section in ELFFile(file).iter_sections("SHT_PROGBITS"):
            if section["sh_flags"] & 0x2 and not section["sh_flags"] & 0x4:  # loaded, not run
                content = section.data()
                for match in _MAGIC.finditer(content):
                    image = content[match.start() :]
                    found.append(_read_cubin(image, section["sh_addr"] + match.start()))
        return sorted(found, key=lambda each: each.address)


def require_sound_cubins(library: Path) -> None:
    """Refuse a library whose cubins a driver could refuse for where they lie.

    Raises:
        CompileFailed: one starts at no multiple of 64, or the driver is used and not named.
    """
    for cubin in read_cubins(library):
        if cubin.address % ALIGNMENT:
            raise CompileFailed(
                f"build: the code of {', '.join(cubin.kernels)} in {library.name} lies at "
                f"{cubin.address:#x}, no multiple of {ALIGNMENT}",
                hint=_HINT,
            )
    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic: Any = elf.get_section_by_name(".dynamic")
        symbols: Any = elf.get_section_by_name(".dynsym")
        needed = {tag.needed for tag in dynamic.iter_tags("DT_NEEDED")} if dynamic else set()
        undefined = [
            symbol.name
            for symbol in (symbols.iter_symbols() if symbols else ())
            if symbol["st_shndx"] == "SHN_UNDEF" and re.match(r"cu[A-Z]", symbol.name)
        ]
    if undefined and _DRIVER not in needed:
        raise CompileFailed(
            f"build: {library.name} calls {undefined[0]} and does not name {_DRIVER}, so that it "
            "opens in no process of its own",
            hint="the libcuda.so that it was linked against has no such function: remove empty "
            "ones from LIBRARY_PATH",
        )


def describe_kernels() -> dict[str, dict[str, Any]]:
    """What inductor knows of the kernels that were compiled since its caches were cleared.

    By the name in the wrapper: `mangled_name` (in the cubin), `num_warps`, `shared_mem` in bytes,
    `config` (block sizes), `signature` and `constants` (of Triton's arguments), `def_args`,
    `call_args`. Private, checked on torch 2.11 to 2.15: `codecache.CudaKernelParamCache`.
    """
    from torch._inductor.codecache import CudaKernelParamCache

    copied = ("mangled_name", "num_warps", "shared_mem", "config", "def_args", "call_args")
    return {
        name: {key: params.get(key) for key in copied}
        | {key: params.get("triton_meta", {}).get(key) for key in ("signature", "constants")}
        for name, params in CudaKernelParamCache.cache.items()
    }


def _read_launches(keep: Path) -> dict[str, int]:
    """The bytes of shared memory that launches of each kernel ask for, by its name in the cubin."""
    asked: dict[str, int] = {}
    for params in json.loads((keep / KERNELS).read_bytes()).values():
        name = params["mangled_name"]
        asked[name] = max(asked.get(name, 0), params["shared_mem"])
    return asked


def _read_cubin(image: bytes, address: int) -> Cubin:
    """Read one image, which may be followed by others."""
    elf = ELFFile(io.BytesIO(image))
    sizes = {each.name: each["sh_size"] for each in elf.iter_sections()}
    # Each kernel has constants of its own, its parameters; what it calls has none.
    kernels = tuple(name.removeprefix(_CONSTANTS) for name in sizes if name.startswith(_CONSTANTS))
    capability, only = _read_capability(elf)
    reserved = _RESERVED if capability >= 90 else 0
    shared = (sizes.get(f".nv.shared.{kernel}", 0) - reserved for kernel in kernels)
    return Cubin(
        address=address,
        capability=capability,
        only=only,
        kernels=kernels,
        registers=max(_list_attributes(elf, _REGISTERS), default=0),
        local_bytes=max(_list_attributes(elf, _FRAME_SIZE, _MIN_STACK_SIZE), default=0),
        shared_memory=max(0, *shared),
    )


def _read_capability(elf: ELFFile) -> tuple[int, bool]:
    """The capability that a cubin is for, and whether its code serves that one only.

    Where it stands in the flags hangs on the ABI, of which 8 came with CUDA 12.8: `EF_CUDA_SM` and
    `EF_CUDA_ACCELERATORS` of LLVM's `BinaryFormat/ELF.h`. That of CUDA 13 leaves the second out
    and notes how it was called, as `-arch sm_90a`.
    """
    flags = elf["e_flags"]
    old = elf["e_ident"]["EI_ABIVERSION"] < 8
    note = elf.get_section_by_name(".note.nv.tkinfo")
    said = note is not None and re.search(rb"-arch sm_\d+a\b", note.data()) is not None
    only = said or bool(flags & (0x800 if old else 0x8))
    return flags & 0xFF if old else flags >> 8 & 0xFF, only


def _list_attributes(elf: ELFFile, *wanted: int) -> Iterator[int]:
    """The numbers that a cubin notes of its functions: registers, or bytes of their stack."""
    section = elf.get_section_by_name(".nv.info")
    content, at = section.data() if section else b"", 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == _SIZED:
            if attribute in wanted and at + 8 <= len(content):
                yield struct.unpack_from("<I", content, at + 4)[0]
            at += size
