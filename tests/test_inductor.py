"""Lowering: the same bytes everywhere, and what g++ does beside what."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError

from hubaoti.artifact.package import unpack_all
from hubaoti.compiler import cubins
from hubaoti.compiler.host_code import compile_wrapper_concurrently
from hubaoti.compiler.reproducible import build_same_bytes
from hubaoti.host.probe import find_torch

LOWERED_HERE = Path(__file__).with_name("lowered_here.py")


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


BUILDER = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_inductor import compiling
from hubaoti.compiler.host_code import compile_wrapper_concurrently
with compile_wrapper_concurrently():
    for source in sys.argv[1:3]:
        compiling(Path(source)).build()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_compiler_outlives_a_builder_that_is_killed(
    number: signal.Signals, sources: tuple[Path, Path]
) -> None:
    """Neither g++ nor what it started: each waits for a source that nobody writes."""
    for source in sources:
        source.unlink()
        os.mkfifo(source)
    words = [sys.executable, "-c", BUILDER, *map(str, sources), str(Path(__file__).parent)]
    builder = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: all(len(compilers(source)) > 1 for source in sources))
    finally:
        builder.send_signal(number)
        builder.wait(20)
    wait_until(lambda: not any(map(running, sources)))


def test_what_a_compiler_does_meanwhile_is_in_its_folder_and_nobody_is_left(
    sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each that is killed leaves a file where temporary ones are."""
    elsewhere = sources[0].parent / "tmp"
    elsewhere.mkdir()
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    elsewhere.chmod(0o500)
    before = elsewhere.stat().st_mtime_ns
    with compile_wrapper_concurrently():
        for source in sources:
            compiling(source).build()
        linking(*sources).build()
    assert elsewhere.stat().st_mtime_ns == before
    assert not any(map(running, sources))


def compilers(source: Path) -> list[str]:
    """What compiles a source: g++, and cc1plus."""
    names = [Path(f"/proc/{process}/comm").read_text().strip() for process in running(source)]
    return [name for name in names if name in {"g++", "cc1plus"}]


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for as long as importing torch may take on a busy machine."""
    end = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


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
    wait_until(lambda: not running(caller))


def lower_twice(folder: Path, device: str, environment: Mapping[str, str]) -> list[Path]:
    """Two packages of one program, of processes that share nothing but torch and the compiler.

    What they keep lies beside each, as `keep`.
    """
    found = []
    for name, seed, cores in (("one", "1", "1"), ("another", "77", "5")):
        place = folder / name
        home, temporary, prefix = (place / part for part in ("home", "tmp", "python"))
        home.mkdir(parents=True)
        temporary.mkdir()
        prefix.symlink_to(sys.prefix)
        told = {"PYTHONHASHSEED": seed, "HOME": str(home), "TMPDIR": str(temporary)}
        told |= {"OMP_NUM_THREADS": cores, "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")}
        if name == "another":
            told["ATEN_CPU_CAPABILITY"] = "default"  # as if this CPU had no vectors
            # What a user's shell has for builds of another kind.
            flags = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
            told |= dict.fromkeys(flags, "-O0 -DNDEBUG -Wl,-rpath,/nowhere")
            told |= {"LD_RUN_PATH": "/nowhere", "CXX": str(shutil.which("g++")), "LC_ALL": "C"}
        command = [str(prefix / "bin" / "python"), str(LOWERED_HERE), device]
        command += [str(place / "block.pt2"), str(place / "keep"), str(place)]
        paths = filter(None, (str(LOWERED_HERE.parents[1]), os.environ.get("PYTHONPATH")))
        told["PYTHONPATH"] = os.pathsep.join(paths)
        done = subprocess.run(
            command,
            env={**os.environ, **environment, **told},
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(place / "block.pt2")
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One program, lowered twice for the CPU."""
    return lower_twice(tmp_path_factory.mktemp("cpu"), "cpu", {})


@pytest.mark.slow
def test_a_program_gives_the_same_bytes_wherever_it_is_lowered(packages: list[Path]) -> None:
    one, another = packages
    assert one.read_bytes() == another.read_bytes()


@pytest.mark.slow
def test_no_file_is_named_by_where_a_python_keeps_its_packages(
    packages: list[Path], tmp_path: Path
) -> None:
    unpack_all(packages[0], tmp_path)
    (library,) = tmp_path.rglob("*.so")
    assert b"torch/include/" in library.read_bytes()  # torch's headers name themselves
    assert not re.search(rb"lib\w*/python\d|-packages/", library.read_bytes())


@pytest.mark.slow
def test_sources_stay_where_they_are_kept_and_out_of_the_package(
    packages: list[Path], tmp_path: Path
) -> None:
    keep = packages[0].with_name("keep")
    assert "AOTInductorModel" in (keep / "graph.wrapper.cpp").read_text()
    assert json.loads((keep / cubins.KERNELS).read_text()) == {}
    unpack_all(packages[0], tmp_path)
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.cpp"))
    assert cubins.read_device_code(keep, tmp_path) is None


@pytest.fixture(scope="module")
def cuda_packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One program, lowered twice for sm 90, under the stand-in."""
    from hubaoti.compiler.stand_in import build_stand_in

    found = find_torch([])
    assert found is not None
    stand_in = build_stand_in(found, tmp_path_factory.mktemp("home"))
    environment = stand_in.environment([90], reads=False)
    return lower_twice(tmp_path_factory.mktemp("cuda"), "cuda", environment)


@pytest.mark.cuda
@pytest.mark.slow
def test_a_program_for_a_gpu_gives_the_same_bytes_too(cuda_packages: list[Path]) -> None:
    one, another = cuda_packages
    assert one.read_bytes() == another.read_bytes()


@pytest.mark.cuda
def test_what_kernels_take_is_read_from_the_package(
    cuda_packages: list[Path], tmp_path: Path
) -> None:
    keep = cuda_packages[0].with_name("keep")
    unpack_all(cuda_packages[0], tmp_path)
    code = cubins.read_device_code(keep, tmp_path)
    assert code is not None
    assert (code.capability, code.local_bytes) == (90, 0)
    assert code.kernels == len(json.loads((keep / cubins.KERNELS).read_text())) > 2
    assert 8 < code.registers <= 255
    launches = re.findall(r"loadKernel\((.*?)\);", (keep / "graph.wrapper.cpp").read_text())
    asked = [int(number) for each in launches for number in re.findall(r", (\d+)[,)]", f"{each})")]
    assert code.shared_memory == max(asked) > 0


@pytest.mark.cuda
def test_cubins_are_aligned_and_the_driver_is_needed_by_name(
    cuda_packages: list[Path], tmp_path: Path
) -> None:
    unpack_all(cuda_packages[0], tmp_path)
    (library,) = tmp_path.rglob("*.so")
    found = cubins.read_cubins(library)
    assert found
    assert not any(each.address % 64 for each in found)
    cubins.require_sound_cubins(library)
    said = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True)
    assert "libcuda.so.1" in said.stdout


@pytest.mark.skipif(torch.version.hip is not None, reason="of CUDA")
def test_cubins_are_embedded_at_multiples_of_64_by_every_torch(tmp_path: Path) -> None:
    """Two of odd sizes after each other, through each of the functions that torch has for it."""
    from torch._inductor import codecache

    files = [tmp_path / f"c{size}.cubin" for size in (101, 67)]
    for size, file in zip((101, 67), files, strict=True):
        file.write_bytes(bytes(range(size)))
    with build_same_bytes():
        objects = [codecache.convert_cubin_to_obj(str(f), f.stem, "ld", "objcopy") for f in files]
        if hasattr(codecache, "batch_convert_cubins_to_obj"):
            pairs = [(str(file), f"both_{file.stem}") for file in files]
            objects.append(codecache.batch_convert_cubins_to_obj(pairs, str(tmp_path)))
    library = tmp_path / "all.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    starts = [int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith("_start")]
    assert len(starts) >= 2
    assert not any(start % 64 for start in starts)
