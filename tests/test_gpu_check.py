"""`scripts/gpu_check`: on a CPU, without a GPU, and over checks that fail, crash and hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from gpu import wheels as wheels_module
from gpu.conftest import open_place
from gpu.place import KERNEL
from gpu.results import RUNNING, WAITING, Line, Results
from hubaoti.errors import Untrusted
from hubaoti.hub.kernels import require_kernel_publisher
from hubaoti.mirror.trust import Trust

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check"
BUILD = SCRIPT.with_name("gpu_build")
STEPS = ("built", "push", "pull", "open", "answer", "run")
MODELS = ("encoder", "causal-lm")


def check(folder: Path, *words: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder of its own; nothing is written to the home folder."""
    environment = {**os.environ, "HUBAOTI_HOME": str(folder / "home"), "GOMP_SPINCOUNT": "0"}
    return subprocess.run(
        [sys.executable, script, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file, by their names."""
    return {line["name"]: line for line in json.loads(file.read_text())["checks"]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module; it has no suffix, so the loader is named."""
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        loader.exec_module(module)
    return module


def test_a_part_passes_on_a_cpu_and_stands_in_the_file(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--only", "machine", "--json", "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    ((name, line),) = read_lines(tmp_path / "found.json").items()
    assert (name, line["result"]) == ("machine host", "passed")
    assert line["facts"]["host"]["torch"]["version"] == torch.__version__
    assert [each.split("  ")[0] for each in done.stdout.splitlines()] == [name]
    assert done.stdout.rstrip().endswith("passed")
    assert not (tmp_path / "home").exists()  # its mirror is in a folder that is gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_nothing_failed(tmp_path: Path, script: ModuleType) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sees no NVIDIA GPU" in done.stdout
    lines = read_lines(tmp_path / "gpu_check.json")
    assert {line["result"] for line in lines.values()} == {"skipped"}
    assert all("no NVIDIA GPU" in line["why"] for line in lines.values())
    assert {f"{model} {step}" for model in MODELS for step in STEPS} <= {*lines}
    parts = {name: [part for part in script.PARTS if name.startswith(part)] for name in lines}
    assert all(len(found) == 1 for found in parts.values()), parts
    assert {part for found in parts.values() for part in found} == {*script.PARTS}


# Checks that fail, crash and leave a GPU in an error, on a machine that only says so


CHECKS = {
    "first": """
def test_one(device, found):
    found(str(os.getpid()))

def test_two(device, found):
    found(str(os.getpid()))
""",
    "crash": """
def test_compile(device, found):
    found("well")

def test_call(device, found):
    os.kill(os.getpid(), 11)

def test_time(device, found):
    found("well")
""",
    "broken": """
def test_call(device, found):
    gpu.conftest.is_lost = lambda device: True
    raise AssertionError("an illegal memory access was encountered")

def test_memory(device, found):
    found("well")
""",
    "failing": """
@pytest.fixture(scope="module")
def made(device):
    raise ValueError("nothing was made")

@pytest.fixture(scope="module")
def other(device):
    return "made"

def test_facts(device, found):
    found("so far", height=0)
    assert not device, "the sky fell"

def test_made(device, made, found):
    found("well")

def test_of_made(device, made, found):
    found("well")

def test_native(device, found):
    raise ZeroDivisionError("in native code\\nand more")

def test_skips(device, found):
    pytest.skip("needs two GPUs")

def test_of_other(device, other, found):
    found(other)

def test_that_is_no_check(device):
    raise AssertionError("it is not run")
""",
    "closing": """
@pytest.fixture
def made(device):
    yield
    os.kill(os.getpid(), 11)

def test_one(device, made, found):
    found("well")

def test_two(device, found):
    found("well")
""",
    "leaving": """
def test_one(device, found):
    atexit.register(os.kill, os.getpid(), 11)
    found("well")
""",
    "last": """
def test_one(device, found):
    found(str(os.getpid()))
""",
}
RUNNER = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

loader = SourceFileLoader("gpu_check", {script!r})
module = module_from_spec(spec_from_loader("gpu_check", loader))
loader.exec_module(module)
module.TESTS = Path({tests!r})
module.PARTS = {parts!r}
sys.exit(module.main())
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Any]], int]:
    """What is printed of those checks, their lines, and the exit code."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "conftest.py").write_text("from gpu.conftest import *\n")
    for name, source in CHECKS.items():
        (folder / f"test_{name}.py").write_text(
            f"import atexit, os, pytest, gpu.conftest\n{source}"
        )
    program = folder / "run.py"
    words = {"script": str(SCRIPT), "tests": str(folder), "parts": (*CHECKS,)}
    program.write_text(RUNNER.format(**words))
    done = check(folder, "--device", "cpu", "--json", "found.json", script=program)
    return done.stdout, read_lines(folder / "found.json"), done.returncode


def test_a_check_that_kills_its_process_takes_no_other_with_it(
    ended: tuple[str, dict[str, dict[str, Any]], int],
) -> None:
    printed, lines, code = ended
    assert code == 1
    ends = {name: (line["result"], line["why"]) for name, line in lines.items()}
    assert ends == {
        "first one": ("passed", ""),
        "first two": ("passed", ""),
        "crash compile": ("passed", ""),
        "crash call": ("failed", "its process ended with signal 11"),
        "crash time": ("skipped", "crash call failed"),
        "broken call": ("failed", "an illegal memory access was encountered"),
        "broken memory": ("skipped", "broken call failed"),
        "failing facts": ("failed", "the sky fell"),
        "failing made": ("failed", "ValueError: nothing was made"),
        "failing of-made": ("skipped", "failing made failed"),
        "failing native": ("failed", "ZeroDivisionError: in native code"),
        "failing skips": ("skipped", "needs two GPUs"),
        "failing of-other": ("passed", ""),
        "closing one": ("passed", ""),
        "closing two": ("skipped", "its process failed"),
        "closing": ("failed", "its process ended with signal 11"),
        "leaving one": ("passed", ""),
        "leaving": ("failed", "its process ended with signal 11"),
        "last one": ("passed", ""),
    }
    assert lines["first one"]["found"] == lines["first two"]["found"] != lines["last one"]["found"]
    assert [line.split("  ")[0] for line in printed.splitlines()] == [*ends]


def test_a_failure_keeps_what_was_measured_until_then(
    ended: tuple[str, dict[str, dict[str, Any]], int],
) -> None:
    printed, lines, _ = ended
    assert lines["failing facts"]["facts"] == {"height": 0}
    assert "the sky fell" in lines["failing facts"]["trace"]
    assert "and more" in lines["failing native"]["trace"]
    (line,) = (each for each in printed.splitlines() if each.startswith("failing made"))
    assert line.endswith("failed: ValueError: nothing was made")


def test_a_part_that_takes_too_long_has_failed(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results("cpu", tmp_path / "found.json")
    script.run_part("machine", results, 0.1)
    ((name, line),) = results.lines.items()
    assert (name, line.result, line.why) == ("machine", "failed", "it took longer than 0 s")
    assert "it took longer" in capsys.readouterr().out


def test_what_a_process_was_at_has_failed_and_the_rest_of_its_part_is_skipped(
    tmp_path: Path,
) -> None:
    results = Results("cpu", tmp_path / "found.json")
    ends = {"one": "passed", "two": RUNNING, "three": WAITING}
    results.put(*(Line(name, result) for name, result in ends.items()))
    results.close_part("it took longer than 9 s")
    again = Results("cpu", tmp_path / "found.json")
    again.read()
    assert [(line.result, line.why) for line in again.lines.values()] == [
        ("passed", ""),
        ("failed", "it took longer than 9 s"),
        ("skipped", "two failed"),
    ]


def test_when_the_seconds_are_over_the_parts_that_are_left_are_skipped(tmp_path: Path) -> None:
    words = ("--device", "cpu", "--only", "machine,encoder", "--seconds", "0")
    done = check(tmp_path, *words, "--json", "found.json")
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "found.json")
    assert {name: line["why"] for name, line in lines.items()} == {
        "machine": "0 s were over",
        "encoder": "0 s were over",
    }


@pytest.mark.slow
def test_what_was_made_beforehand_is_opened_and_answers(tmp_path: Path) -> None:
    done = check(tmp_path, "made", "--for", "cpu", "--only", "encoder", script=BUILD)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ("--device", "cpu", "--only", "opening-encoder,encoder", "--json", "found.json")
    done = check(tmp_path, "--bundles", "made.tar.xz", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_lines(tmp_path / "found.json")
    assert {*lines} == {"opening-encoder open", *(f"encoder {step}" for step in STEPS)}
    assert {line["result"] for line in lines.values()} == {"passed"}
    steps = [each.split(" ms ")[1] for each in lines["opening-encoder open"]["facts"]["steps"]]
    assert steps == ["the device is there", "root opened", "root bound", "root called", "done"]
    # It was not compiled again: that it was made elsewhere is all that this part has of it.
    assert lines["encoder built"]["seconds"] < lines["encoder built"]["facts"]["seconds"]


def test_the_kernels_that_came_along_may_be_opened(tmp_path: Path) -> None:
    (tmp_path / "made/hub").mkdir(parents=True)
    with open_place(torch.device("cpu"), tmp_path, tmp_path / "made") as place:
        trust, endpoint = Trust(place.settings.trust), place.settings.endpoint
        require_kernel_publisher(trust, endpoint, KERNEL, "as it came")
        with pytest.raises(Untrusted):
            require_kernel_publisher(trust, endpoint, "stranger/kernel", "as it came")


def test_a_name_of_no_check_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--only", "machine,nosuch")
    assert done.returncode == 2
    assert "names no check; they are: machine, opening-plain, " in done.stdout


def test_what_is_no_bundles_is_refused(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--only", "machine", "--bundles", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("is not what scripts/gpu_build makes: it has no made.json")


def test_kernels_that_were_packed_can_be_served(script: ModuleType, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "hub").mkdir(parents=True)
    (made / "made.json").write_text(json.dumps({"torch": torch.__version__}))
    with tarfile.open(tmp_path / "made.tar.xz", "w:xz") as archive:
        archive.add(made, "")
    found = script.take_bundles(tmp_path / "made.tar.xz", tmp_path / "there")
    with open_place(torch.device("cpu"), tmp_path, found) as place:
        assert place.settings.endpoint.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("kept", [0, 40, -100], ids=["nothing", "its beginning", "all but its end"])
def test_bundles_of_which_a_part_came_are_refused(
    script: ModuleType, tmp_path: Path, kept: int
) -> None:
    (tmp_path / "made.json").write_bytes(os.urandom(1 << 16))
    packed = tmp_path / "made.tar.xz"
    with tarfile.open(packed, "w:xz") as archive:
        archive.add(tmp_path / "made.json", "made.json")
    packed.write_bytes(packed.read_bytes()[:kept])
    with pytest.raises(SystemExit, match="is not what scripts/gpu_build makes, or not all of it"):
        script.take_bundles(packed, tmp_path / "made")


@pytest.mark.parametrize(
    "part, only, narrowed",
    [
        ("encoder", "", "encoder"),
        ("encoder", "encoder open", "encoder open"),
        ("machine", "machine,block-cache time,", "machine"),
        ("block-cache", "machine,block-cache time,", "block-cache time"),
        ("encoder", "machine,block-cache time,", ""),
        ("block-plain", "block,attach", "block-plain"),
    ],
)
def test_only_takes_several_names(script: ModuleType, part: str, only: str, narrowed: str) -> None:
    assert script.narrow(part, only) == narrowed


def wheel(folder: Path, name: str, *needs: str) -> None:
    """A wheel with nothing but its metadata."""
    words = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{words}"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels; the project needs `aa[more]` and torch."""
    needs = ["aa[more]", "torch"]
    monkeypatch.setattr(
        wheels_module, "list_requirements", lambda: [Requirement(need) for need in needs]
    )
    wheel(tmp_path, "aa", "bb", 'cc; extra == "more"', 'dd; extra == "less"')
    wheel(tmp_path, "bb", 'ee; python_version < "3.10"', "torch")
    wheel(tmp_path, "torch")
    return tmp_path


def test_what_a_folder_lacks_is_named_and_torch_is_never_taken(wheels: Path) -> None:
    taken, lacking = wheels_module.find_unmet(lambda need: False, wheels, "3.12")
    assert taken == ["aa", "bb"]
    assert lacking == ["cc", "torch"]  # `dd` and `ee` are for others


def test_what_is_here_is_not_taken(wheels: Path) -> None:
    taken, lacking = wheels_module.find_unmet(
        lambda need: need.name in {"torch", "bb", "cc"}, wheels, "3.9"
    )
    assert (taken, lacking) == (["aa"], [])


def test_a_version_that_is_too_old_is_not_here() -> None:
    assert wheels_module.is_installed(Requirement("torch>=2.11"))
    assert not wheels_module.is_installed(Requirement("torch>=999"))
    assert not wheels_module.is_installed(Requirement("no-such-package-anywhere"))


def test_the_wheels_hold_what_quantizes_what_serves_and_what_tests() -> None:
    names = {need.name for need in wheels_module.list_requirements()}
    assert {"torchao", "starlette", "msgspec", "pytest", "diffusers"} <= names


def test_only_what_every_check_wants_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels_module, "is_installed", lambda need: need.name != "torchao")
    wheels_module.install(tmp_path, tmp_path / "target")
    monkeypatch.setattr(wheels_module, "is_installed", lambda need: need.name != "msgspec")
    with pytest.raises(SystemExit, match="lacks msgspec"):
        wheels_module.install(tmp_path, tmp_path / "target")
