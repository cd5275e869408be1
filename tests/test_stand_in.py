"""The stand-in of a GPU: how it is built, what torch finds under it, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from hubaoti.compiler import stand_in as package
from hubaoti.compiler.stand_in import CAPABILITIES, StandIn, build_stand_in, require_stand_in
from hubaoti.errors import (
    BadRequest,
    CannotOpen,
    CompileFailed,
    DiskFull,
    MissingDependency,
    UnsafeFolder,
)
from hubaoti.host import build_tools, match
from hubaoti.host.build_tools import find_missing_build_tools
from hubaoti.host.gpu_limits import count_shared_memory
from hubaoti.host.probe import STAND_IN, Torch, find_torch
from hubaoti.settings import merge_environment

SOURCE = Path(package.__file__).parent
TORCH = find_torch([])
HAS_CUDA = TORCH is not None and TORCH.cuda is not None
NOT_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="torch is a CPU build")


def cuda(test):
    return pytest.mark.cuda(NOT_CUDA(test))


# What every child has: the stand-in's functions by ctypes, and a way to say what it found.
PRELUDE = """
import ctypes, json, os, sys
lib = ctypes.CDLL(None)
lib.stand_in_live.restype = ctypes.c_long
lib.stand_in_left.restype = ctypes.c_size_t
lib.cudaGetErrorString.restype = ctypes.c_char_p
KINDS = "memory pinned stream event graph module handle".split()
def live(): return {kind: lib.stand_in_live(kind.encode()) for kind in KINDS}
def call(name, *arguments): return getattr(lib, name)(*arguments)
def make(name, *arguments):
    made = ctypes.c_void_p()
    error = call(name, ctypes.byref(made), *arguments)
    return made if not error else error
def words(error):
    text = ctypes.c_char_p()
    lib.cuGetErrorString(error, ctypes.byref(text))
    return text.value.decode()
def say(**found): print("\\n" + json.dumps(found))
"""


def start(stand_in: StandIn, code: str, *capabilities: int, env=(), **options):
    """A process that runs Python under the stand-in."""
    environment = merge_environment({**stand_in.environment(capabilities, **options), **dict(env)})
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def read(child) -> tuple[dict, str]:
    """The facts that it said last, and what it printed as errors."""
    printed, errors = child.communicate()
    assert child.returncode == 0, errors[-3000:]
    return json.loads(printed.strip().splitlines()[-1]), errors


def ask(stand_in: StandIn, code: str, *capabilities: int, env=(), **options):
    """Run Python under the stand-in: the facts that it said last."""
    return read(start(stand_in, code, *capabilities, env=env, **options))[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stand-in") / "home"


@pytest.fixture(scope="module")
def stand_in(home: Path) -> StandIn:
    assert TORCH is not None
    return build_stand_in(TORCH, home)


# What it knows


def test_the_chips_have_the_shared_memory_that_artifacts_are_judged_by() -> None:
    rows = re.findall(
        r"^    \{(\d+), \d+, \d+, (\d+) << 10,", (SOURCE / "chips.h").read_text(), re.M
    )
    chips = {int(sm): int(kilobytes) << 10 for sm, kilobytes in rows}
    assert tuple(chips) == CAPABILITIES
    assert chips == {sm: count_shared_memory(sm) for sm in CAPABILITIES}


def test_the_mark_of_its_devices_is_the_one_that_others_look_for() -> None:
    assert f'#define STAND_IN_MARK "{STAND_IN}"' in (SOURCE / "chips.h").read_text()


@pytest.mark.parametrize("capabilities", [(37,), (90, 91), (), (80,) * 17])
def test_a_device_that_it_does_not_know_is_refused_by_name(capabilities) -> None:
    with pytest.raises(BadRequest, match="no stand-in for (sm|0|17)"):
        StandIn(Path("/a"), Path("/b")).environment(capabilities)


def test_the_libraries_that_a_user_needs_are_still_found(monkeypatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/theirs:")
    monkeypatch.setenv("LIBRARY_PATH", "/opt/linked")
    told = StandIn(Path("/a"), Path("/b")).environment([80, 90])
    assert (told["LD_LIBRARY_PATH"], told["LIBRARY_PATH"]) == ("/a:/opt/theirs", "/a:/opt/linked")
    assert (told["CUDA_VISIBLE_DEVICES"], told["LD_PRELOAD"]) == ("0,1", "/a/libcuda.so.1")


def test_its_source_is_shipped(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=SOURCE.parents[2], capture_output=True, check=True)
    (wheel,) = tmp_path.iterdir()
    shipped = {name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist()}
    assert {path.name for path in SOURCE.iterdir() if path.suffix in (".c", ".h")} <= shipped


# What is missing


def fake_torch(folder: Path, cuda: str | None = "13.0", header: int | None = 13000) -> Torch:
    """A torch of a CUDA, with headers of one beside it."""
    include = folder / "nvidia" / f"cu{(cuda or '13').split('.')[0]}" / "include"
    for name in ("crt/host_defines.h", "nv/target") if header else ():
        (include / name).parent.mkdir(parents=True)
        (include / name).touch()
    if header:
        (include / "cuda.h").write_text(f"#define CUDA_VERSION {header}\n")
    metadata = folder / "torch-2.13.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    pin = 'Requires-Dist: cuda-toolkit[cublas,nvtx]==13.0.2; platform_system == "Linux"\n'
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n{pin}")
    return Torch("2.13.0+cu130" if cuda else "2.13.0+cpu", cuda, "abc", folder / "torch")


def lacking(torch: Torch | None) -> list[match.Refusal]:
    """What is missing of CUDA; a machine of the tests has its tools."""
    return [each for each in find_missing_build_tools(torch) if "CUDA" in each.need]


def test_a_torch_with_its_headers_lacks_nothing(tmp_path: Path) -> None:
    assert lacking(fake_torch(tmp_path)) == []


def test_missing_headers_are_asked_for_in_the_version_that_torch_pins(tmp_path: Path) -> None:
    (found,) = lacking(fake_torch(tmp_path, header=None))
    assert "crt/host_defines.h, nv/target" in found.need
    assert found.advice == 'pip install "cuda-toolkit[crt,cccl]==13.0.2"'


def test_the_packages_of_cuda_12_are_named(tmp_path: Path) -> None:
    (found,) = lacking(fake_torch(tmp_path, cuda="12.8", header=None))
    assert '"nvidia-cuda-nvcc-cu12==12.8.*" "nvidia-cuda-cccl-cu12==12.8.*"' in found.advice


def test_headers_of_another_cuda_are_refused(tmp_path: Path) -> None:
    (found,) = lacking(fake_torch(tmp_path, header=13020))
    assert "with which torch 2.13.0+cu130 was built" in found.need
    assert "is CUDA 13.2" in found.have


def test_a_cpu_torch_is_told_which_one_to_install(tmp_path: Path) -> None:
    (found,) = lacking(fake_torch(tmp_path, cuda=None))
    assert 'pip install --force-reinstall "torch==2.13.0"' in found.advice
    assert lacking(None)[0].have == "no torch"


def test_each_missing_tool_is_named_with_its_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_tools, "probe_glibc", lambda: None)
    found = find_missing_build_tools(fake_torch(tmp_path))
    assert [each.need.partition(",")[0] for each in found] == [*build_tools._TOOLS, "glibc"]
    assert "apt install binutils" in found[2].advice


def test_a_compiler_that_a_user_names_has_to_be_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "clang++-of-nobody")
    monkeypatch.setenv("CC", "ccache gcc")
    needed = {each.need: each.have for each in find_missing_build_tools(fake_torch(tmp_path))}
    assert needed == {
        "the compiler that CC names": "no program 'ccache gcc'",
        "the compiler that CXX names": "no program 'clang++-of-nobody'",
    }
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setenv("CXX", sys.executable)
    assert find_missing_build_tools(fake_torch(tmp_path / "other")) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_missing_build_tools(fake_torch(tmp_path / "third"))
    assert [each.need.partition(",")[0] for each in found] == ["gcc", "ld", "objcopy"]


def test_a_build_without_what_it_takes_is_refused_with_all_that_is_missing(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"gcc.*crt/host_defines\.h") as caught:
        build_stand_in(fake_torch(tmp_path, header=None), tmp_path / "home")
    assert "cuda-toolkit[crt,cccl]==13.0.2" in caught.value.hint
    assert not (tmp_path / "home").exists()


# How it is built


@cuda
def test_two_builds_at_once_make_one_stand_in(tmp_path: Path) -> None:
    code = """
        from pathlib import Path
        from hubaoti.compiler.stand_in import build_stand_in
        from hubaoti.host.probe import find_torch
        print(build_stand_in(find_torch([]), Path({home!r})).folder)
    """
    program = textwrap.dedent(code).format(home=str(tmp_path))
    start = [sys.executable, "-c", program]
    builds = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {build.communicate()[0].strip() for build in builds}
    assert [build.returncode for build in builds] == [0, 0]
    assert [*map(str, (tmp_path / "stand-in").iterdir())] == [*folders]
    assert {path.name for path in Path(*folders).iterdir()} == {
        "libcuda.so",
        "libcuda.so.1",
        "libnvidia-ml.so.1",
    }


@cuda
def test_a_stand_in_that_is_there_is_taken(stand_in: StandIn, home: Path, monkeypatch) -> None:
    monkeypatch.setattr(package.build, "_compile", None)
    assert build_stand_in(TORCH, home) == stand_in
    assert (stand_in.folder.stat().st_mode & 0o777, stand_in.folder.parent) == (
        0o700,
        home / "stand-in",
    )


@cuda
def test_a_build_that_was_killed_is_never_used_and_swept_away(tmp_path: Path) -> None:
    abandoned = tmp_path / "stand-in" / "0123456789abcdef.99.aa"
    abandoned.mkdir(parents=True, mode=0o700)
    abandoned.parent.chmod(0o700)
    os.utime(abandoned, (1, 1))
    built = build_stand_in(TORCH, tmp_path)
    assert [*(tmp_path / "stand-in").iterdir()] == [built.folder]


@cuda
def test_a_stand_in_that_lost_a_library_is_built_again(stand_in: StandIn, tmp_path: Path) -> None:
    shutil.copytree(stand_in.folder.parent, tmp_path / "stand-in", symlinks=True)
    built = tmp_path / "stand-in" / stand_in.folder.name
    (built / "libnvidia-ml.so.1").unlink()
    assert build_stand_in(TORCH, tmp_path).folder == built
    assert (built / "libnvidia-ml.so.1").is_file()


@cuda
@pytest.mark.parametrize("name", [b"two words", b"caf\xe9", "\u5bb6".encode()])
def test_a_home_may_have_any_name_that_a_loader_reads(tmp_path: Path, name: bytes) -> None:
    home = tmp_path / os.fsdecode(name)
    code = """
        from hubaoti.compiler.stand_in import require_stand_in
        from hubaoti.host.probe import find_mapped
        require_stand_in()
        say(found=os.fsencode(find_mapped("libcuda.so.1")).hex())
    """
    found = ask(build_stand_in(TORCH, home), code, 90)["found"]
    assert bytes.fromhex(found).startswith(os.fsencode(home))


@cuda
def test_a_home_whose_name_a_loader_takes_for_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="colon or a semicolon"):
        build_stand_in(TORCH, tmp_path / "a:b")
    assert not (tmp_path / "a:b").exists()


@cuda
def test_a_home_may_be_a_link_and_what_is_made_of_it_is_ours_alone(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("disk")
    before = os.umask(0o002)
    try:
        build_stand_in(TORCH, tmp_path / "link" / "home")
        build_stand_in(TORCH, tmp_path / "link")
    finally:
        os.umask(before)
    assert (tmp_path / "disk" / "home").stat().st_mode & 0o777 == 0o700


def test_headers_that_lie_elsewhere_make_another_stand_in(tmp_path: Path) -> None:
    """That of CUDA 12 has links to them, which end with the environment that they lie in."""
    torch = fake_torch(tmp_path)
    header = tmp_path / "torch" / "include" / package.build.SHIMS
    header.parent.mkdir(parents=True)
    header.touch()
    names = {package.build._digest(torch, [tmp_path / name]) for name in ("one", "two", "one")}
    assert len(names) == 2


@cuda
@pytest.mark.parametrize("what", ["stand-in", "its folder", "home", "a link"])
def test_a_folder_that_others_may_write_is_refused(
    stand_in: StandIn, tmp_path: Path, what: str
) -> None:
    home = tmp_path / "home"
    shutil.copytree(stand_in.folder.parent, home / "stand-in", symlinks=True)
    folder = home / "stand-in" / stand_in.folder.name
    home.chmod(0o700)
    if what == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        {"stand-in": folder.parent, "its folder": folder, "home": home}[what].chmod(0o777)
    with pytest.raises(UnsafeFolder, match="others may write it"):
        build_stand_in(TORCH, home)


FAILURES = {
    "x.c:1: error: no": (CompileFailed, "stand-in: gcc: x.c:1: error: no"),
    "/tmp/x.s: No space left on device": (DiskFull, "no room on the disk of /tmp"),
}


@cuda
@pytest.mark.parametrize("words", [*FAILURES])
def test_a_compiler_that_fails_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    gcc = tmp_path / "bin" / "gcc"
    gcc.parent.mkdir()
    real = shutil.which("gcc")
    fails = f'case "$*" in *-shared*) echo "{words}" >&2; exit 1;; esac'
    gcc.write_text(f'#!/bin/sh\n{fails}\nexec {real} "$@"\n')
    gcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gcc.parent}:{os.environ['PATH']}")
    kind, message = FAILURES[words]
    with pytest.raises(kind, match=message):
        build_stand_in(TORCH, tmp_path / "home")
    assert [*(tmp_path / "home" / "stand-in").iterdir()] == []


@cuda
def test_a_process_knows_whether_it_runs_under_it(stand_in: StandIn) -> None:
    code = "from hubaoti.compiler.stand_in import require_stand_in as r; say(there=r() is None)"
    assert ask(stand_in, code, 90) == {"there": True}


def test_a_process_that_should_run_under_it_and_does_not_is_refused() -> None:
    with pytest.raises(CannotOpen, match="was not loaded"):
        require_stand_in()


# Devices


@cuda
def test_torch_finds_devices_of_every_capability(stand_in: StandIn) -> None:
    code = """
        import torch
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        x = torch.ones(3, device="cuda:7")
        with torch.cuda.device(1): y = torch.empty(1 << 20, device="cuda")
        say(names=[p.name for p in found], sms=[10 * p.major + p.minor for p in found],
            shared=[p.shared_memory_per_block_optin for p in found],
            l2=min(p.L2_cache_size for p in found), warp=found[0].warp_size,
            places=[str(x.device), str(y.device)],
            used=[lib.stand_in_used(1), lib.stand_in_used(2)],
            current=torch.cuda.current_device())
    """
    found = ask(stand_in, code, *CAPABILITIES)
    assert found["sms"] == [*CAPABILITIES]
    assert all(name.startswith("NVIDIA ") and name.endswith(STAND_IN) for name in found["names"])
    assert found["shared"] == [count_shared_memory(sm) for sm in CAPABILITIES]
    assert found["places"] == ["cuda:7", "cuda:1"]
    assert found["used"][0] >= 4 << 20 and found["used"][1] == 0
    assert (found["current"], found["warp"], found["l2"]) == (0, 32, 4 << 20)


GPU = "GPU-57a4d110-0000-4000-8000-00000000000"
VISIBLE = {
    "0,1": [90, 80],
    "1": [80],
    "1,0": [80, 90],
    "": [],
    "-1": [],
    "0,-1,1": [90],
    "0,7,1": [90],
    "0,0": [],
    "0,7,7": [],
    " 1 ,0x": [80, 90],
    "1abc": [80],
    f"{GPU}1": [80],
    f"{GPU}1,{GPU}0": [80, 90],
    f"{GPU}1,{GPU}1": [],
    f"{GPU}1,GPU-9,GPU-9": [],
    f"{GPU}1,0": [80],
    f"0,{GPU}1": [90],
    f" {GPU}1": [],
    "GPU-57a4d110": [],  # which begins both
    "nonsense": [],
}


@cuda
def test_the_devices_that_a_user_hides_are_hidden_as_torch_counts_them(stand_in: StandIn) -> None:
    code = """
        import subprocess, torch
        shows = "import ctypes; lib = ctypes.CDLL(None); n = ctypes.c_int(); " \\
            "lib.cudaGetDeviceCount(ctypes.byref(n)); sm = ctypes.c_int(); " \\
            "print([lib.cudaDeviceGetAttribute(ctypes.byref(sm), 75, i) or sm.value * 10 " \\
            "for i in range(n.value)])"
        found = {}
        for visible in json.loads(os.environ["VISIBLE"]):
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
            shown = subprocess.run([sys.executable, "-c", shows], capture_output=True, check=True)
            found[visible] = json.loads(shown.stdout), torch.cuda._device_count_nvml()
        count = ctypes.c_int()
        import pynvml
        pynvml.nvmlInit()
        say(found=found, nvml=pynvml.nvmlDeviceGetCount(),
            error=lib.cudaGetDeviceCount(ctypes.byref(count)))
    """
    env = {"CUDA_VISIBLE_DEVICES": "", "VISIBLE": json.dumps([*VISIBLE])}
    answer = ask(stand_in, code, 90, 80, env=env)
    assert answer["found"] == {name: [sms, len(sms)] for name, sms in VISIBLE.items()}
    assert (answer["nvml"], answer["error"]) == (2, 100)


@cuda
def test_torch_without_a_visible_device_has_none(stand_in: StandIn) -> None:
    code = "import torch; say(there=torch.cuda.is_available(), count=torch.cuda.device_count())"
    found = ask(stand_in, code, 90, env={"CUDA_VISIBLE_DEVICES": ""})
    assert found == {"there": False, "count": 0}


@cuda
def test_the_host_is_probed_as_one_with_these_gpus(stand_in: StandIn) -> None:
    code = """
        import pynvml
        from pathlib import Path
        from hubaoti.host.probe import probe_host
        from hubaoti.settings import Settings
        host = probe_host(Settings(home=Path("/nowhere")))
        block = make("cudaMalloc", ctypes.c_size_t(5 << 20))
        pynvml.nvmlInit()
        first = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(first)
        second = pynvml.nvmlDeviceGetMemoryInfo(first, version=pynvml.nvmlMemory_v2)
        uuid, pci = pynvml.nvmlDeviceGetUUID(first), pynvml.nvmlDeviceGetPciInfo(first).busId
        same = pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        try: pynvml.nvmlDeviceGetFanSpeed(first)
        except pynvml.NVMLError as error: unknown = str(error)
        say(gpus=[[g.name, g.sm, g.memory] for g in host.gpus], driver=host.driver,
            serves=host.driver_cuda, used=[memory.used, second.used], pci=pci, same=same,
            all=memory.total, unknown=unknown,
            processes=pynvml.nvmlDeviceGetComputeRunningProcesses(first))
    """
    found = ask(stand_in, code, 90, 120, memory=1 << 30)
    assert found["gpus"] == [
        [f"NVIDIA H100 80GB {STAND_IN}", 90, 1 << 30],
        [f"NVIDIA RTX PRO 6000 {STAND_IN}", 120, 1 << 30],
    ]
    assert TORCH is not None and found["serves"] == TORCH.cuda
    assert (found["used"], found["all"], found["same"]) == ([5 << 20, 5 << 20], 1 << 30, 0)
    assert (found["pci"], found["processes"]) == ("0000:01:00.0", [])
    assert found["unknown"] == "Function Not Found"


# Memory


@cuda
def test_memory_has_an_end_and_is_given_back(stand_in: StandIn) -> None:
    code = """
        import torch
        before, errors = live(), []
        try: torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error: errors.append(str(error))
        x = torch.arange(1000.0).pin_memory().cuda()
        free, total = torch.cuda.mem_get_info()
        y = x.cpu()
        pinned = x.cpu().pin_memory().is_pinned()
        del x
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        same = bool((y == torch.arange(1000.0)).all())
        left = {kind: live()[kind] for kind in ("memory", "pinned")}
        say(errors=errors, total=total, taken=total - free, same=same, pinned=pinned, left=left,
            used=lib.stand_in_used(0))
    """
    found = ask(stand_in, code, 90, memory=1 << 30)
    assert (
        "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1024.00 MiB"
        in found["errors"][0]
    )
    assert found["total"] == 1 << 30 and 0 < found["taken"] <= 32 << 20
    assert found["same"] and found["pinned"]
    assert found["left"] == {"memory": 0, "pinned": 0} and found["used"] == 0


@cuda
def test_pages_that_nobody_writes_cost_nothing(stand_in: StandIn) -> None:
    code = """
        size = 64 << 30
        block = make("cudaMalloc", ctypes.c_size_t(size))
        lib.cudaMemset(block, 0, ctypes.c_size_t(size))
        inside = ctypes.c_void_p(block.value + size - 8)
        lib.cudaMemcpy(inside, b"12345678", ctypes.c_size_t(8), 1)
        back = ctypes.create_string_buffer(8)
        lib.cudaMemcpy(back, inside, ctypes.c_size_t(8), 2)
        beyond = lib.cudaMemcpy(inside, b"x" * 9, ctypes.c_size_t(9), 1)
        # Of this program: what getrusage says begins with that of whoever started it.
        status = open("/proc/self/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0])
        say(peak=peak, back=back.raw.decode(),
            left=lib.stand_in_left(inside), beyond=beyond,
            twice=[lib.cudaFree(block), lib.cudaFree(block)])
    """
    found = ask(stand_in, code, 90)
    assert found["peak"] < 300_000
    assert (found["back"], found["left"], found["beyond"]) == ("12345678", 8, 1)
    assert found["twice"] == [0, 1]


@cuda
def test_host_code_that_reads_device_memory_dies(stand_in: StandIn) -> None:
    child = start(stand_in, 'ctypes.string_at(make("cudaMalloc", ctypes.c_size_t(64)), 1)', 90)
    child.communicate()
    assert child.returncode == -signal.SIGSEGV


READS = """
import torch
x = torch.ones(1 << 20, device="cuda")
def tried(read):
    try: return str(read())
    except Exception as error: return f"{type(error).__name__}: {error}"
def clone():
    kept = torch.empty(1 << 20, pin_memory=True)
    kept.copy_(x, non_blocking=True)
    x.copy_(kept, non_blocking=True)
    torch.cuda.synchronize()
    return "unread"
def send():
    x.to("cpu", non_blocking=True)
    torch.cuda.synchronize()
say(item=tried(lambda: x[5].item()), cpu=tried(lambda: x.cpu().shape), to=tried(send),
    bool=tried(lambda: bool((x == x).all())), clone=tried(clone), print=tried(lambda: repr(x)),
    write=tried(lambda: torch.ones(3).cuda().shape), move=tried(lambda: x.clone().shape),
    after=tried(lambda: torch.cuda.synchronize()))
"""


@cuda
def test_what_nobody_computed_is_not_read_back(stand_in: StandIn) -> None:
    found = ask(stand_in, READS, 90, reads=False)
    refused = (
        "AcceleratorError: CUDA error: {} bytes are read back from a device that computes nothing"
    )
    assert found.pop("item").startswith(refused.format(4))
    assert found.pop("bool").startswith(refused.format(1))
    for name in ("cpu", "to"):
        assert found.pop(name).startswith(refused.format(4 << 20))
    assert "are read back" in found.pop("print")
    assert found == {
        "clone": "unread",
        "write": "torch.Size([3])",
        "move": "torch.Size([1048576])",
        "after": "None",
    }


@cuda
def test_where_reads_are_let_be_what_was_written_is_read(stand_in: StandIn) -> None:
    code = "import torch; say(sum=torch.ones(7).cuda().cpu().sum().item())"
    assert ask(stand_in, code, 90) == {"sum": 7}


# Streams, events, graphs


@cuda
def test_a_graph_is_captured_and_everything_is_given_back(stand_in: StandIn) -> None:
    code = """
        import torch
        x, s = torch.ones(8, device="cuda"), torch.cuda.Stream()
        before, graph = live(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            with_branch = x + 1
            s.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(s):
                branch = torch.cuda.is_current_stream_capturing()
            torch.cuda.current_stream().wait_stream(s)
        graph.replay()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()): (x + 1).cpu()
        except Exception as error: read = type(error).__name__
        during = live()
        del graph, with_branch
        import gc; gc.collect(); torch.cuda.empty_cache()
        after = live()
        say(branch=branch, read=read, graphs=[during["graph"], after["graph"]],
            events=[before["event"], after["event"]],
            capturing=torch.cuda.is_current_stream_capturing())
    """
    found = ask(stand_in, code, 90)
    assert found["branch"] and not found["capturing"]
    assert found["read"] in ("AcceleratorError", "RuntimeError")
    assert found["graphs"][0] > 0 and found["graphs"][1] == 0
    assert found["events"][0] == found["events"][1]


@cuda
def test_two_events_are_always_a_millisecond_apart(stand_in: StandIn) -> None:
    code = """
        events, ms = [make("cudaEventCreate") for _ in range(2)], ctypes.c_float()
        early = lib.cudaEventElapsedTime(ctypes.byref(ms), *events)
        for event in events: lib.cudaEventRecord(event, None)
        lib.cudaEventElapsedTime(ctypes.byref(ms), *events)
        for event in events: lib.cudaEventDestroy(event)
        say(ms=ms.value, early=early, left=live()["event"])
    """
    assert ask(stand_in, code, 80) == {"ms": 1.0, "early": 400, "left": 0}


# Functions that nobody wrote


@cuda
def test_a_function_that_would_give_what_nobody_wrote_is_an_error_by_name(
    stand_in: StandIn,
) -> None:
    code = """
        value, handle = ctypes.c_ulonglong(7), make("cublasCreate_v2")
        error = lib.cudaDeviceGetGraphMemAttribute(0, 0, ctypes.byref(value))
        kept = [words(error), lib.cudaGetLastError(), lib.cudaGetLastError()]
        driver = lib.cuMemAddressReserve(ctypes.byref(value), 0, 0, 0, 0)
        refused = [driver, words(driver), lib.cudaGetLastError()]
        found = ctypes.c_void_p()
        def find(name):
            return lib.cuGetProcAddress_v2(name, ctypes.byref(found), 13000, 0, None)
        known, unknown = find(b"cuMemGetInfo"), find(b"cuFromTomorrow")
        plain, handles = lib.cublasSetStream_v2(handle, None), [live()["handle"]]
        lib.cublasDestroy_v2(handle)
        say(kept=kept, driver=refused, value=value.value, known=known, unknown=unknown,
            plain=plain, handles=[*handles, live()["handle"]])
    """
    found, errors = read(start(stand_in, code, 90))
    message = "cudaDeviceGetGraphMemAttribute would give a value, and the stand-in has none"
    assert found["kept"] == [message, 801, 0]
    assert found["driver"][0] == 801 and found["driver"][1].startswith("cuMemAddressReserve would")
    assert found["driver"][2] == 0  # the runtime's errors are its own
    assert (found["value"], found["known"], found["unknown"], found["plain"]) == (7, 0, 500, 0)
    assert found["handles"] == [1, 0]
    assert f"stand-in: {message}" in errors


@cuda
def test_every_function_that_torch_imports_of_cuda_is_there(stand_in: StandIn) -> None:
    """But for those of libraries that need no device, which the libraries themselves have."""
    from elftools.elf.elffile import ELFFile

    assert TORCH is not None
    wanted = set()
    for name in ("libtorch_cuda.so", "libc10_cuda.so", "libcaffe2_nvrtc.so"):
        with (TORCH.path / "lib" / name).open("rb") as file:
            symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
            wanted |= {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF"}
    wanted = {
        n for n in wanted if re.match(r"(__cuda|cuda|cublas|cusolver|cusparse|cudnn|cu)[A-Z]", n)
    }
    wanted -= {n for n in wanted if n.startswith("cuFile") or n.startswith("cusparseLt")}
    with stand_in.library.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        there = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF"}
    own = r"\w+(?:ErrorString|Version|Property|CudartVersion)"
    assert len(wanted) > 200
    assert {name for name in wanted - there if not re.fullmatch(own, name)} == set()


# Kernels


KERNEL = """.version 8.3
.target {arch}
.address_size 64
.visible .entry fill(.param .u64 p) .reqntid {threads}, 1, 1
{{ .shared .align 4 .b8 kept[1024]; ret; }}
"""


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel that does nothing, for several capabilities, by the assembler that triton has."""
    folder = tmp_path_factory.mktemp("cubins")
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    ptxas = Path(spec.origin).parent / "backends/nvidia/bin/ptxas"
    for arch in ("sm_80", "sm_86", "sm_90", "sm_90a"):
        source = folder / f"{arch}.ptx"
        source.write_text(KERNEL.format(arch=arch, threads=128))
        target = str(folder / f"{arch}.cubin")
        subprocess.run([str(ptxas), f"-arch={arch}", str(source), "-o", target], check=True)
    return folder


FITS = {80: {"sm_80"}, 86: {"sm_80", "sm_86"}, 90: {"sm_90", "sm_90a"}, 100: set(), 120: set()}


@cuda
@pytest.mark.parametrize("sm", [*FITS])
def test_a_cubin_is_loaded_where_its_capability_runs(
    stand_in: StandIn, cubins: Path, sm: int
) -> None:
    code = f"""
        from pathlib import Path
        found = {{}}
        for path in Path({str(cubins)!r}).glob("*.cubin"):
            made = make("cuModuleLoad", str(path).encode())
            found[path.stem] = words(made) if isinstance(made, int) else ""
            if not found[path.stem]: lib.cuModuleUnload(made)
        say(found=found, left=live()["module"])
    """
    answer = ask(stand_in, code, sm)
    assert {arch for arch, error in answer["found"].items() if not error} == FITS[sm]
    assert answer["left"] == 0
    for arch, error in answer["found"].items():
        assert error in (
            "",
            "no kernel image is available for execution on the device: "
            f"it is for {arch}, and this is sm_{sm}",
        )


@cuda
def test_a_launch_that_a_gpu_would_refuse_is_refused(stand_in: StandIn, cubins: Path) -> None:
    code = f"""
        U = ctypes.c_uint
        module = make("cuModuleLoad", {str(cubins / "sm_80.cubin")!r}.encode())
        function = make("cuModuleGetFunction", module, b"fill")
        missing = words(make("cuModuleGetFunction", module, b"fell"))
        facts = []
        for name in (0, 1, 4):
            value = ctypes.c_int()
            lib.cuFuncGetAttribute(ctypes.byref(value), name, function)
            facts.append(value.value)
        def launch(grid=(1, 1, 1), block=(128, 1, 1), shared=0):
            error = lib.cuLaunchKernel(function, *map(U, (*grid, *block, shared)), None, None, None)
            return words(error) if error else ""
        calls = []
        @ctypes.CFUNCTYPE(None, ctypes.c_char_p, U, U, U, ctypes.POINTER(ctypes.c_void_p))
        def compute(name, x, y, z, parameters):
            calls.append([name.decode(), x, y, z])
        lib.stand_in_compute(compute)
        most = launch((2147483647, 65535, 65535))
        say(good=most, y=launch((1, 65536, 1)), empty=launch((0, 1, 1)),
            threads=launch(block=(64, 1, 1)), many=launch(block=(1025, 1, 1)),
            shared=launch(shared=64 << 10),
            allowed=lib.cuFuncSetAttribute(function, 8, 100 << 10), more=launch(shared=64 << 10),
            toomuch=words(lib.cuFuncSetAttribute(function, 8, 163 << 10)),
            missing=missing, facts=facts, calls=calls)
    """
    found = ask(stand_in, code, 80)
    assert found["good"] == "" and found["more"] == "" and found["allowed"] == 0
    for name in ("y", "empty", "many"):
        assert found[name].startswith("invalid argument: fill with a grid of")
    assert found["threads"] == "invalid argument: fill with 64 threads, and it was made for 128"
    assert (
        found["shared"]
        == "invalid argument: fill with 65536 bytes of shared memory, and it may have 49152"
    )
    assert found["toomuch"].endswith(
        f"{164 << 10} bytes of shared memory, and a block of sm_80 has {163 << 10}"
    )
    assert found["missing"] == "named symbol not found: fell"
    assert found["facts"][:2] == [128, 1024] and 0 < found["facts"][2] < 256
    assert found["calls"] == [["fill", 2147483647, 65535, 65535], ["fill", 1, 1, 1]]


@cuda
@pytest.mark.parametrize("offset", [0, 1, 8, 64])
def test_an_image_in_a_library_has_to_be_aligned(
    stand_in: StandIn, cubins: Path, tmp_path: Path, offset: int
) -> None:
    source, library = tmp_path / "image.S", tmp_path / "image.so"
    source.write_text(
        f".section .rodata\n.balign 64\n.skip {offset}\n.globl image\n"
        f'image: .incbin "{cubins / "sm_90.cubin"}"\n'
        '.section .note.GNU-stack,"",%progbits\n'
    )
    subprocess.run(["gcc", "-shared", "-nostdlib", str(source), "-o", str(library)], check=True)
    code = f"""
        image = ctypes.c_char.in_dll(ctypes.CDLL({str(library)!r}), "image")
        made = make("cuModuleLoadData", ctypes.byref(image))
        say(error=words(made) if isinstance(made, int) else "")
    """
    error = ask(stand_in, code, 90)["error"]
    assert error == "" if offset % 64 == 0 else f"in {library} it begins at no multiple" in error


# What torch makes and opens


COMPILE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return torch.softmax(self.down(torch.relu(self.up(x))), -1)

with torch.no_grad():
    inputs, batch = (torch.ones(4, 32, device="cuda"),), torch.export.Dim("batch", max=64)
    program = torch.export.export(Net().cuda(), inputs, dynamic_shapes=({0: batch},))
    options = {
        "compile_threads": 1,
        "aot_inductor.precompile_headers": False,
        "aot_inductor.package_constants_in_so": False,  # else they are read back
        "always_keep_tensor_constants": True,
        "joint_graph_constant_folding": False,
    }
    path = os.environ["TARGET"]
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
say(path=path)
"""


@pytest.fixture(scope="module")
def packages(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same module, compiled for two capabilities with nothing of ours but the stand-in."""
    folder = tmp_path_factory.mktemp("packages")
    found = {sm: folder / f"sm{sm}.pt2" for sm in (80, 90)}
    builds = []
    for sm, path in found.items():
        env = {"TARGET": str(path), "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache{sm}")}
        builds.append(start(stand_in, COMPILE, sm, env=env, reads=False))
    for build in builds:
        read(build)
    return found


@cuda
@pytest.mark.slow
def test_what_torch_compiles_opens_on_its_capability_alone(
    stand_in: StandIn, packages: dict[int, Path]
) -> None:
    code = """
        import torch
        from torch._C import _aoti
        found, device = [], int(os.environ["DEVICE"])
        sizes = {"up.weight": (64, 32), "up.bias": 64, "down.weight": (32, 64), "down.bias": 32}
        for path in json.loads(os.environ["PACKAGES"]):
            before = live()
            loader = _aoti.AOTIModelPackageLoader(path, "model", True, 1, device)
            x = torch.ones(7, 32, device=f"cuda:{device}")
            held = {name: torch.empty(size, device=x.device) for name, size in sizes.items()}
            try:
                loader.load_constants(held, False, True, True)
                answer = str(tuple(loader.run([x])[0].shape))
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(x.device), torch.cuda.graph(graph): loader.run([x])
                graph.replay()
                del graph
            except RuntimeError as error: answer = str(error)
            del loader, x, held
            torch.cuda.empty_cache()
            left = {kind: live()[kind] - before[kind] for kind in ("memory", "graph", "module")}
            found.append([answer, left])
        say(found=found)
    """
    unloads = TORCH is not None and not TORCH.version.startswith(("2.11", "2.12"))
    for device, sm, other in ((0, 90, 80), (1, 80, 90)):
        paths = [str(packages[each]) for each in (sm, sm, other)]
        env = {"PACKAGES": json.dumps(paths), "DEVICE": str(device)}
        found, errors = read(start(stand_in, code, 90, 80, env=env))
        (first, _), (second, left), (refused, _) = found["found"]
        assert first == second == "(7, 32)"
        # torch 2.11 prints the driver's words and raises others
        assert f"it is for sm_{other}, and this is sm_{sm}" in refused + errors
        assert (left["memory"], left["graph"]) == (0, 0)
        assert left["module"] == 0 or not unloads


@cuda
@pytest.mark.slow
def test_a_library_that_is_linked_against_it_needs_the_driver_by_name(
    packages: dict[int, Path], tmp_path: Path
) -> None:
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(packages[90]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extract(name, tmp_path)
    with (tmp_path / name).open("rb") as file:
        tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags()
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    assert "libcuda.so.1" in needed
