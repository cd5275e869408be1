"""The host: real facts of this machine, and a machine that lacks each of them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import archspec.cpu
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerDefSection

from hubaoti.host import probe as probe_of_host
from hubaoti.host.probe import STAND_IN, Gpu, Host, Torch, find_torch, probe_host, read_torch
from hubaoti.settings import Settings

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
has_driver = shutil.which("nvidia-smi") is not None


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", endpoint="https://hub.example")


@pytest.fixture
def here(settings: Settings) -> Host:
    return probe_host(settings)


def fake_version_py(folder: Path, source: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    source = source.encode() if isinstance(source, str) else source
    (folder / "version.py").write_bytes(source)
    return folder


# This machine


def test_probing_imports_neither_torch_nor_the_hub_client(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hubaoti.host.probe import probe_host\n"
        "from hubaoti.settings import Settings\n"
        "assert probe_host(Settings(home=Path(sys.argv[1]))).torch is not None\n"
        "sys.exit(bool({'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    asked = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(asked, cwd=Path(probe_of_host.__file__).parents[1]).returncode == 0


def test_torch_is_the_one_that_would_be_imported(here: Host) -> None:
    program = (
        "import torch, json\n"
        "print(json.dumps([torch.__version__, torch.version.cuda, torch.version.git_version,"
        " torch.__path__[0]]))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    version, cuda, git, path = json.loads(said)
    assert here.torch == Torch(version=version, cuda=cuda, git=git, path=Path(path))


def test_probing_changes_nothing_on_disk(here: Host, settings: Settings) -> None:
    assert here.mirror == settings.mirror
    assert not settings.home.exists()


def test_the_facts_are_json_with_sorted_sets(here: Host) -> None:
    facts = here.to_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["libraries"] == sorted(here.libraries)
    assert facts["mirror"] == str(here.mirror)
    assert facts["endpoint"] == "https://hub.example"


def test_the_processor_has_a_level_of_its_family(here: Host) -> None:
    level, cpu = archspec.cpu.TARGETS[here.level], archspec.cpu.TARGETS[here.cpu]
    assert level.vendor == "generic"
    assert level.family == cpu.family == here.machine
    assert cpu >= level
    assert here.cores >= 1
    assert here.memory is None or here.memory > 1 << 28


@linux
def test_libstdcxx_is_the_one_that_this_process_loads(here: Host) -> None:
    ctypes.CDLL("libstdc++.so.6")
    maps = Path("/proc/self/maps").read_text()
    path = re.search(r"/\S*libstdc\+\+\.so\.6\S*", maps)
    assert path is not None
    with Path(path[0]).open("rb") as file:
        section = ELFFile(file).get_section_by_name(".gnu.version_d")
        assert isinstance(section, GNUVerDefSection)
        defined = {each.name for _, names in section.iter_versions() for each in names}
    assert {f"GLIBCXX_{here.glibcxx}", f"CXXABI_{here.cxxabi}"} <= defined
    numbers = [name.removeprefix("GLIBCXX_3.4.") for name in defined]
    assert here.glibcxx == f"3.4.{max(int(each) for each in numbers if each.isdecimal())}"


@linux
def test_the_libraries_that_every_graph_names_are_found(here: Host) -> None:
    needed = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
    assert needed | {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= here.libraries
    assert "libno-such-thing.so.1" not in here.libraries


@linux
def test_a_search_path_of_the_process_counts(tmp_path: Path) -> None:
    (tmp_path / "libonly_here.so.1").touch()
    program = (
        "import sys; from pathlib import Path; from hubaoti.host.probe import probe_host\n"
        "from hubaoti.settings import Settings\n"
        "found = probe_host(Settings(home=Path('nowhere'))).libraries\n"
        "sys.exit('libonly_here.so.1' not in found)"
    )
    asked = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=Path(probe_of_host.__file__).parents[1],
    )
    assert asked.returncode == 0


def test_offline_and_free_disk_are_facts(tmp_path: Path) -> None:
    here = probe_host(Settings(home=tmp_path / "a" / "b", offline=True))
    assert here.offline
    assert here.disk_free is not None and here.disk_free > 0


def test_a_kernel_of_another_librarys_cache_is_none_that_needs_no_network(
    settings: Settings, tmp_path: Path
) -> None:
    cache, digest = tmp_path / "hub", "d" * 64
    (cache / f"kernels--someone--op/snapshots/{'1' * 40}/build").mkdir(parents=True)
    here = replace(settings, kernel_cache=cache)
    assert probe_host(here).kernels == set()  # a pull takes none from there
    (settings.mirror / "kernels" / digest).mkdir(parents=True)
    assert probe_host(here).kernels == {digest}


# torch, in fake folders


def test_version_py_is_read_with_and_without_annotations(tmp_path: Path) -> None:
    source = (
        "from typing import Optional\n__all__ = ['cuda']\n__version__ = '2.13.0+cu130'\n"
        "cuda: Optional[str] = '13.0'\ngit_version = 'abc'\nhip: Optional[str] = None\n"
    )
    folder = fake_version_py(tmp_path / "torch", source)
    assert read_torch(folder, []) == Torch("2.13.0+cu130", "13.0", "abc", folder)


def test_version_py_is_never_executed(tmp_path: Path) -> None:
    source = "raise SystemExit\n__version__ = '2.13.0'\ncuda = open('x').read()\n"
    folder = fake_version_py(tmp_path / "torch", source)
    assert read_torch(folder, []) == Torch("2.13.0", None, None, folder)


@pytest.mark.parametrize(
    "source",
    ["__version__ = ", b"\xff\xfe", b"\x00", "", "__version__ = 2.13", "x = " + "(" * 5000],
    ids=["cut off", "not text", "zero byte", "empty", "a number", "deep"],
)
def test_an_unreadable_version_py_is_a_note(tmp_path: Path, source: str | bytes) -> None:
    notes: list[str] = []
    assert read_torch(fake_version_py(tmp_path / "torch", source), notes) is None
    assert len(notes) == 1 and "version.py" in notes[0]


def test_a_missing_version_py_is_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    assert read_torch(tmp_path, notes) is None
    assert "version.py" in notes[0]


def test_the_first_torch_on_the_path_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake_version_py(tmp_path / "torch", "__version__ = '9.9.0'")
    (folder / "__init__.py").write_text("raise SystemExit")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_torch([]) == Torch("9.9.0", None, None, folder)


@pytest.mark.parametrize("fake_spec", [None, types.SimpleNamespace(submodule_search_locations=[])])
def test_no_torch_is_a_note(fake_spec: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake_spec)
    notes: list[str] = []
    assert find_torch(notes) is None
    assert notes == ["torch: not installed"]


def test_a_broken_torch_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch = types.ModuleType("torch")
    fake_torch.__spec__ = None
    monkeypatch.setitem(sys.modules, "torch", fake_torch)
    notes: list[str] = []
    assert find_torch(notes) is None
    assert "torch.__spec__" in notes[0]


# NVML


class FakeNvml(types.ModuleType):
    """A pynvml of GPUs that do not exist; a capability of None is a GPU that does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, sms: list[tuple[int, int] | None], broken: str = "") -> None:
        super().__init__("pynvml")
        self.sms, self.broken, self.shut_down = sms, broken, False

    def _progress(self, call: str, answer: Any) -> Any:
        if call == self.broken:
            raise self.NVMLError("Driver/library version mismatch")
        return answer

    def nvmlInit(self) -> None:
        self._progress("init", None)

    def nvmlShutdown(self) -> None:
        self.shut_down = True

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return int(self._progress("cuda", 12080))

    def nvmlDeviceGetCount(self) -> int:
        return len(self.sms)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        sm = self.sms[handle]
        if sm is None:
            raise self.NVMLError("GPU is lost")
        return sm

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Fake {handle}"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        if self.sms[handle] is None:
            raise self.NVMLError("GPU is lost")
        return f"GPU-{handle}{'ab' * 4}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return self._progress("memory", types.SimpleNamespace(total=80 << 30))


def probe_with(fake_nvml: FakeNvml, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml)
    return probe_host(settings)


@pytest.mark.skipif(has_driver, reason="there is a driver here")
def test_no_driver_is_a_note(here: Host) -> None:
    assert (here.driver, here.driver_cuda, here.gpus) == (None, None, ())
    assert any(note.startswith("NVML: ") for note in here.notes)


@pytest.mark.gpu
@pytest.mark.skipif(not has_driver, reason="there is no driver here")
def test_a_real_gpu_is_seen(here: Host) -> None:
    assert here.driver and here.driver_cuda and here.gpus
    assert all(gpu.sm >= 50 and gpu.memory for gpu in here.gpus)


def test_the_gpus_of_a_fake_driver(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml = FakeNvml([(9, 0), (12, 0)])
    here = probe_with(fake_nvml, settings, monkeypatch)
    assert here.gpus == (Gpu("Fake 0", 90, 80 << 30), Gpu("Fake 1", 120, 80 << 30))
    assert (here.driver, here.driver_cuda) == ("580.65.06", "12.8")
    assert fake_nvml.shut_down


@pytest.mark.parametrize(
    ("visible", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("1,-1,0", [1]),
        ("7", []),
        ("1,1", []),
        ("GPU-2ab", [2]),
        ("GPU-1abab,GPU-0", [1, 0]),
        ("GPU-", []),
        ("nonsense", []),
    ],
)
def test_gpus_that_cuda_does_not_show_are_not_there(
    visible: str | None, places: list[int], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, visible_gpus=visible, gpu_order="PCI_BUS_ID")
    here = probe_with(FakeNvml([(9, 0), (12, 0), (8, 0)]), settings, monkeypatch)
    assert [gpu.name for gpu in here.gpus] == [f"Fake {place}" for place in places]
    hides = f"CUDA_VISIBLE_DEVICES={visible} hides {3 - len(places)} of 3 GPUs"
    assert (hides in here.notes) == (len(places) < 3)


@pytest.mark.parametrize(
    "visible",
    [
        *("", " ", ",", "-1", "0", "1", "2", "3", "99", "0,0", "99,99", "0,99,99", "1,99,0"),
        *("1abc", "abc", " 0", "0 ,1", "0, 1 ,2", "0,-1,1", "0,,1", "+1", "1.5", "0x1", "0,00"),
        *("1gpu2,2ampere", "1-2", "1 0", "0,GPU-1", "0,MIG-1", "2;1", "-0", "1" * 30),
        *("GPU-", "GPU-0", "GPU-1a,GPU-2", "GPU-1a,GPU-1", "GPU-1,GPU-1", "GPU-9,GPU-9"),
        *("GPU-9,GPU-1", "GPU-1, GPU-2", " GPU-1", "GPU-1,0", "GPU-1,,GPU-2", "gpu-1"),
        "GPU-1,GPU-,GPU-2",
    ],
)
def test_gpus_are_those_that_torch_counts(
    visible: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    driver = FakeNvml([(9, 0), (12, 0), (8, 0)])
    uuids = [driver.nvmlDeviceGetUUID(place) for place in range(3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    named = torch.cuda._parse_visible_devices()
    if named and isinstance(named[0], str):
        named = torch.cuda._transform_uuid_to_ordinals(named, uuids)
    wanted = [*takewhile(lambda place: place < 3, named)]
    settings = replace(settings, visible_gpus=visible, gpu_order="PCI_BUS_ID")
    here = probe_with(driver, settings, monkeypatch)
    assert [gpu.name for gpu in here.gpus] == [f"Fake {place}" for place in wanted]


@pytest.mark.parametrize("visible", ["0", "1,2", "1gpu", "MIG-1234"])
def test_where_only_cuda_knows_which_are_meant_all_are_listed(
    visible: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the fastest first, and these are of three kinds."""
    settings = replace(settings, visible_gpus=visible)
    here = probe_with(FakeNvml([(9, 0), (12, 0), (8, 0)]), settings, monkeypatch)
    assert len(here.gpus) == 3
    assert any("only CUDA knows" in note for note in here.notes)


def test_all_that_are_named_by_number_are_all(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, visible_gpus="0,1")
    here = probe_with(FakeNvml([(9, 0), (12, 0)]), settings, monkeypatch)
    assert len(here.gpus) == 2
    assert not [note for note in here.notes if "CUDA_VISIBLE" in note]


def test_a_gpu_that_stands_in_for_one_is_noted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetName", lambda *_: f"Fake {STAND_IN}")
    here = probe_with(FakeNvml([(9, 0)]), settings, monkeypatch)
    assert any(note.startswith("GPU 0 computes nothing") for note in here.notes)


@pytest.mark.parametrize("broken", ["init", "cuda"])
def test_a_driver_mismatch_is_a_note(
    broken: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = probe_with(FakeNvml([(9, 0)], broken), settings, monkeypatch)
    assert (here.driver, here.gpus) == (None, ())
    assert "NVML: Driver/library version mismatch" in here.notes


def test_a_lost_gpu_keeps_its_place(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    here = probe_with(FakeNvml([None, (9, 0)]), settings, monkeypatch)
    assert [gpu.sm for gpu in here.gpus] == [0, 90]
    assert "NVML: GPU 0 does not answer: GPU is lost" in here.notes


def test_a_gpu_without_memory_of_its_own_is_still_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = probe_with(FakeNvml([(12, 1)], "memory"), settings, monkeypatch)
    assert here.gpus == (Gpu("Fake 0", 121, None),)


# Machines that lack something


def raises(error: Exception) -> Any:
    def call(*args: object, **kwargs: object) -> Any:
        raise error

    return call


def test_a_machine_without_glibc_answers_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "confstr", raises(ValueError("unrecognized configuration name")))
    here = probe_host(settings)
    assert here.glibc is None


def test_a_machine_without_libstdcxx_answers_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_of_host, "LIBSTDCXX", "libno-such-thing.so.6")
    here = probe_host(settings)
    assert (here.glibcxx, here.cxxabi) == (None, None)
    assert any(note.startswith("libno-such-thing.so.6: ") for note in here.notes)


def test_a_libstdcxx_that_is_no_library_is_a_note(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "libstdc++.so.6"
    text.write_text("INPUT(-lstdc++)")
    monkeypatch.setattr(probe_of_host, "find_mapped", lambda soname: text)
    here = probe_host(settings)
    assert here.glibcxx is None
    assert any("names no versions of symbols" in note for note in here.notes)


def test_a_library_that_is_mapped_under_no_name_answers_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(probe_of_host, "LIBSTDCXX", "libno-such-thing.so.6")
    monkeypatch.setattr(probe_of_host, "_list_loader_folders", list)
    assert probe_host(settings).glibcxx is None


@pytest.mark.parametrize("fake_ldconfig", [None, "/no/such/ldconfig"])
def test_a_machine_without_ldconfig_still_lists_folders(
    fake_ldconfig: str | None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: fake_ldconfig)
    assert "libtorch.so" in probe_host(settings).libraries


def test_a_folder_that_is_not_there_is_no_crash(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "absent"))
    assert "libtorch.so" in probe_host(settings).libraries


@pytest.mark.parametrize("failing", ["size", "paths"])
def test_a_loader_that_does_not_answer_is_no_crash(
    failing: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = {"size": "_RTLD_DI_SERINFOSIZE", "paths": "_RTLD_DI_SERINFO"}[failing]
    monkeypatch.setattr(probe_of_host, constant, 999)
    assert "libtorch.so" in probe_host(settings).libraries


def test_a_system_without_posix_calls_answers_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", raises(ValueError("unrecognized configuration name")))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    here = probe_host(settings)
    assert here.memory is None
    assert here.cores >= 1


def test_a_disk_that_does_not_answer_is_none(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", raises(PermissionError()))
    assert probe_host(settings).disk_free is None


def test_an_arm_host_has_its_family_as_level(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cpu = archspec.cpu.TARGETS["neoverse_v2"]
    monkeypatch.setattr(archspec.cpu, "host", lambda: fake_cpu)
    here = probe_host(settings)
    assert (here.level, here.cpu) == ("aarch64", "neoverse_v2")


def test_what_archspec_warns_of_is_a_note(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_host() -> object:
        warnings.warn("cpuid is not there", stacklevel=1)
        return archspec.cpu.TARGETS["x86_64"]

    monkeypatch.setattr(archspec.cpu, "host", fake_host)
    here = probe_host(settings)
    assert "processor: cpuid is not there" in here.notes
    assert here.level == "x86_64"
