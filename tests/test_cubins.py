"""Device code in a library: told by its own ELF header, and refused where a driver could refuse."""

from __future__ import annotations

import json
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from hubaoti.artifact.schema import DeviceCode
from hubaoti.compiler.cubins import KERNELS, read_cubins, read_device_code, require_sound_cubins
from hubaoti.errors import CompileFailed

# What ptxas writes into the header for what it is called with: the ABI's version and the flags, of
# CUDA 12.8 and of 13.0, which leaves it to a note that the code is for one capability only.
HEADERS = {
    ("75", 7): 0x4B054B,
    ("80", 7): 0x500550,
    ("90", 7): 0x5A055A,
    ("90a", 7): 0x5A0D5A,
    ("100", 8): 0x6006402,
    ("100a", 8): 0x600640A,
    ("120a", 8): 0x600780A,
    ("80", 8): 0x6005004,
    ("90a", 8): 0x6005A04,
}


@dataclass(frozen=True)
class FakeCubin:
    """An ELF file with the sections of a cubin, and no code."""

    arch: str = "90a"
    abi: int = 8
    kernel: str = "triton_poi_fused_0"
    registers: int = 40
    frame: int = 16
    shared: int = 0

    def write(self, folder: Path) -> Path:
        """Assemble it; the header is the only thing that no assembler here writes."""
        reserved = 1024 if int(self.arch.rstrip("af")) >= 90 else 0
        attributes = "".join(
            f".byte 4, {kind}\n.short 8\n.long 1, {value}\n"
            for kind, value in ((0x2F, self.registers), (0x11, self.frame), (0x12, self.frame))
        )
        source = folder / f"{self.kernel}.s"
        source.write_text(
            f'.section .nv.info,"",@progbits\n.byte 3, 80\n.short 0\n{attributes}'
            f'.section .nv.constant0.{self.kernel},"a",@progbits\n.zero 64\n'
            f'.section .nv.shared.{self.kernel},"aw",@nobits\n.zero {reserved + self.shared}\n'
            f'.section .text.{self.kernel},"ax",@progbits\n.zero 128\n'
            f'.section .text.helper,"ax",@progbits\n.zero 128\n'
            f'.section .note.nv.tkinfo,"",@note\n.ascii "ptxas -v -arch sm_{self.arch} "\n'
        )
        cubin = source.with_suffix(".cubin")
        subprocess.run(["as", source, "-o", cubin], check=True)
        image = bytearray(cubin.read_bytes())
        image[8] = self.abi
        struct.pack_into("<H", image, 18, 190)
        struct.pack_into("<I", image, 48, HEADERS[self.arch, self.abi])
        cubin.write_bytes(image)
        return cubin


def embed(folder: Path, *cubins: FakeCubin, shift: int = 0, code: str = "", link: str = "") -> Path:
    """A library with cubins in its constants, each at a multiple of 64 and `shift` bytes."""
    lines = ['.section .note.GNU-stack,"",@progbits', ".section .rodata"]
    for each in cubins:
        lines += [".balign 64", f".zero {shift}", f'.incbin "{each.write(folder)}"']
    source, more, library = folder / "all.s", folder / "code.c", folder / "graph.wrapper.so"
    source.write_text("\n".join(lines) + "\n")
    more.write_text(code)
    command = ["gcc", "-shared", "-fPIC", str(source), str(more), *link.split(), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def keep(folder: Path, **shared: int) -> Path:
    """What a build kept: how many bytes of shared memory the launches of each kernel ask for."""
    folder.mkdir(exist_ok=True)
    kernels = {
        f"{name}_{number}": {"mangled_name": name, "shared_mem": number}
        for name, number in shared.items()
    }
    (folder / KERNELS).write_text(json.dumps(kernels))
    return folder


@pytest.mark.parametrize(("arch", "abi"), HEADERS)
def test_a_cubin_says_for_which_gpu_it_is(tmp_path: Path, arch: str, abi: int) -> None:
    (found,) = read_cubins(embed(tmp_path, FakeCubin(arch, abi)))
    assert (found.capability, found.only) == (int(arch.rstrip("a")), arch.endswith("a"))
    assert found.kernels == ("triton_poi_fused_0",)


def test_of_all_kernels_the_most_is_told(tmp_path: Path) -> None:
    cubins = (
        FakeCubin(kernel="first", registers=40, frame=16, shared=0),
        FakeCubin(kernel="second", registers=24, frame=96, shared=48),
        FakeCubin(kernel="third", registers=255, frame=0, shared=0),
    )
    embed(tmp_path, *cubins)
    kept = keep(tmp_path / "keep", first=2048, second=4096, third=0, of_no_graph=9999)
    assert read_device_code(kept, tmp_path) == DeviceCode(
        capability=90, kernels=3, registers=255, local_bytes=96, shared_memory=4096 + 48
    )


def test_a_library_of_a_cpu_has_no_device_code(tmp_path: Path) -> None:
    library = embed(tmp_path, code="int one(void) { return 1; }")
    require_sound_cubins(library)
    assert read_device_code(keep(tmp_path / "keep"), tmp_path) is None


def test_kernels_for_two_gpus_are_no_graph(tmp_path: Path) -> None:
    embed(tmp_path, FakeCubin("80", kernel="old"), FakeCubin("90a", kernel="new"))
    with pytest.raises(CompileFailed, match="sm_80 and sm_90a"):
        read_device_code(keep(tmp_path / "keep", old=0, new=0), tmp_path)


def test_a_kernel_of_which_nothing_was_kept_is_refused_by_name(tmp_path: Path) -> None:
    embed(tmp_path, FakeCubin(kernel="known"), FakeCubin(kernel="stray"))
    with pytest.raises(CompileFailed, match="nobody knows how stray is launched"):
        read_device_code(keep(tmp_path / "keep", known=0), tmp_path)


@pytest.mark.parametrize("shift", [1, 8, 16, 32])
def test_a_cubin_that_is_not_aligned_is_refused(tmp_path: Path, shift: int) -> None:
    require_sound_cubins(embed(tmp_path, FakeCubin()))
    with pytest.raises(CompileFailed, match="triton_poi_fused_0 .* no multiple of 64") as caught:
        require_sound_cubins(embed(tmp_path, FakeCubin(), shift=shift))
    assert caught.value.hint


def test_a_library_that_does_not_name_the_driver_it_calls_is_refused(tmp_path: Path) -> None:
    code = "int cuLaunchKernel(void); int call(void) { return cuLaunchKernel(); }"
    with pytest.raises(CompileFailed, match=r"cuLaunchKernel .* libcuda\.so\.1") as caught:
        require_sound_cubins(embed(tmp_path, FakeCubin(), code=code))
    assert "LIBRARY_PATH" in caught.value.hint
    (tmp_path / "driver.c").write_text("int cuLaunchKernel(void) { return 0; }")
    driver = tmp_path / "libcuda.so"
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", soname, driver.with_name("driver.c"), "-o", driver], check=True
    )
    require_sound_cubins(embed(tmp_path, FakeCubin(), code=code, link=f"-L{tmp_path} -lcuda"))
    # What serves every process that has the runtime, as cudaMalloc, is no driver's.
    require_sound_cubins(
        embed(tmp_path, code="int cudaMalloc(void); int f(void) { return cudaMalloc(); }")
    )
