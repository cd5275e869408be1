"""`scripts/gpu_check`: all of it on a CPU, and its list with checks that fail, and that crash."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_models  # noqa: E402
import gpu_wheels  # noqa: E402
from gpu_road import Check, Failed, Finding, Road, Skipped, apart, median, run_one  # noqa: E402

STEPS = ("compile", "push", "pull", "open", "answer", "run", "time")
FORMS = ("block-plain", "block-cache", "block-int8wo", "block-float8dq", "block-autotune")
ATTACHED = ("attach-model", "attach-int8wo", "attach-fork")


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


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module; it has no suffix, so the loader is named."""
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def road(tmp_path: Path) -> Road:
    """What the checks share, empty."""
    return Road("cpu", tmp_path, ExitStack())


def fails(road: Road) -> Finding:
    raise Failed("the sky fell", {"height": 0})


def passes(road: Road) -> Finding:
    return Finding("all well")


@pytest.mark.slow
def test_the_road_of_every_model_passes_on_a_cpu(tmp_path: Path) -> None:
    asked = ("--only", "machine,encoder,causal-lm", "--json", "found.json")
    done = check(tmp_path, "--device", "cpu", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "found.json").read_text())["checks"]
    names = [f"{model} {step}" for model in ("encoder", "causal-lm") for step in STEPS]
    assert [line["name"] for line in lines] == ["machine", "serve", *names]
    assert {line["result"] for line in lines} == {"passed"}
    printed = [line for line in done.stdout.splitlines() if line.endswith("passed")]
    assert [line.startswith(each["name"]) for line, each in zip(printed, lines, strict=True)]
    facts = {line["name"]: line["facts"] for line in lines}
    assert facts["machine"]["host"]["torch"]["version"] == torch.__version__
    assert facts["encoder open"]["runner"] == "AOTIModelContainerRunnerCpu"
    (times,) = facts["causal-lm time"].values()
    assert {"eager", "torch.compile dynamic", "hubaoti"} == {*times}
    assert not (tmp_path / "home").exists()  # its mirror is in a folder that is gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_nothing_failed(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sees no NVIDIA GPU" in done.stdout
    lines = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert {line["result"] for line in lines} == {"skipped"}
    assert all("no NVIDIA GPU" in line["why"] for line in lines)
    assert {line["name"].split()[0] for line in lines} >= {*FORMS, *ATTACHED}


def test_a_failure_is_the_exit_code_and_the_reason_of_what_needs_it(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = (
        Check("one", fails),
        Check("two", passes, ("one",)),
        Check("three", passes, ("two",)),
        Check("four", passes),
    )
    monkeypatch.setattr(script, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--json", f"{tmp_path}/j"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert script.main() == 1
    ends = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    results = {name: end[-40:].strip() for name, end in ends}
    assert results["one"].endswith("failed: the sky fell")
    assert results["two"].endswith("skipped: one failed")
    assert results["three"].endswith("skipped: one failed")
    assert results["four"].endswith("passed")
    lines = json.loads((tmp_path / "j").read_text())["checks"]
    assert "the sky fell" in lines[0]["trace"]
    assert lines[0]["facts"] == {"height": 0}  # what was measured until then is not lost


# A process that ends, and one whose GPU is in an error: on a machine that only says it has a GPU.
CRASHING = """
import os, sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from gpu_road import Check, Failed, Finding

loader = SourceFileLoader("gpu_check", {script!r})
module = module_from_spec(spec_from_loader("gpu_check", loader))
sys.modules["gpu_check"] = module
loader.exec_module(module)

def crashes(road):
    os.kill(os.getpid(), 11)

def breaks(road):
    raise Failed("an illegal memory access was encountered")

def passes(road):
    return Finding(str(os.getpid()))

module.no_gpu = lambda device: None
module.lost = lambda device: True
module.CHECKS = (
    Check("first", passes),
    Check("crash compile", passes, ("first",)),
    Check("crash call", crashes, ("crash compile",)),
    Check("crash time", passes, ("crash call",)),
    Check("broken call", breaks),
    Check("broken memory", passes, ("broken call",)),
    Check("last", passes),
)
sys.exit(module.main())
"""


def test_a_check_that_kills_its_process_takes_no_other_with_it(tmp_path: Path) -> None:
    program = tmp_path / "crashing.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        + CRASHING.format(script=str(SCRIPT))
    )
    done = check(tmp_path, "--device", "cuda:0", "--json", "found.json", script=program)
    assert done.returncode == 1, done.stderr
    lines = json.loads((tmp_path / "found.json").read_text())["checks"]
    ends = {line["name"]: (line["result"], line["why"]) for line in lines}
    assert ends == {
        "first": ("passed", ""),
        "crash compile": ("passed", ""),
        "crash call": ("failed", "its process ended with signal 11"),
        "crash time": ("skipped", "crash call failed"),
        "broken call": ("failed", "an illegal memory access was encountered"),
        "broken memory": ("skipped", "broken call failed"),
        "last": ("passed", ""),
    }
    processes = [line["found"] for line in lines if line["result"] == "passed"]
    assert processes[0] == processes[1] != processes[2]
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [*ends]


def test_an_error_that_nobody_expected_is_a_failure_too(road: Road) -> None:
    def breaks(road: Road) -> Finding:
        raise ZeroDivisionError("in native code\nand more")

    line = run_one(Check("one", breaks), road)
    assert (line.result, line.why) == ("failed", "ZeroDivisionError: in native code")
    assert line.trace is not None and "and more" in line.trace


def test_a_skipped_check_gives_its_reason(road: Road) -> None:
    def skips(road: Road) -> Finding:
        raise Skipped("needs two GPUs")

    line = run_one(Check("one", skips), road)
    assert (line.result, line.why) == ("skipped", "needs two GPUs")


def test_only_takes_along_what_a_check_needs(script: ModuleType) -> None:
    names = [check.name for check in script.wanted(script.CHECKS, "encoder open")]
    assert names == ["serve", "encoder compile", "encoder push", "encoder pull", "encoder open"]


def test_only_takes_several_names(script: ModuleType) -> None:
    names = [check.name for check in script.wanted(script.CHECKS, "machine,block-cache time,")]
    block = ["compile", "open", "time"]
    assert names == ["machine", *(f"block-cache {step}" for step in block)]
    assert script.wanted(script.CHECKS, None) == [*script.CHECKS]


def test_what_shares_nothing_is_apart(script: ModuleType) -> None:
    parts = [{each.name.split()[0] for each in part} for part in apart(script.CHECKS)]
    assert parts[:2] == [{"machine"}, {"serve", "encoder", "causal-lm"}]
    assert parts[2:] == [{name} for name in (*FORMS, *ATTACHED)]
    assert sum(len(part) for part in apart(script.CHECKS)) == len(script.CHECKS)


def test_what_joins_two_parts_makes_them_one() -> None:
    checks = [Check("a", passes), Check("b", passes), Check("c", passes, ("b", "a"))]
    assert [[each.name for each in part] for part in apart(checks)] == [["a", "b", "c"]]


def test_answers_that_are_no_numbers_are_not_near() -> None:
    nothing, one = torch.full((2,), float("nan")), torch.ones(2)
    with pytest.raises(Failed):
        gpu_models.require(gpu_models.distance(nothing, one), 1e-4, "float32")


def test_padded_positions_do_not_count() -> None:
    expected, found = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    found[0, 1] = 7
    assert gpu_models.distance(found, expected, torch.tensor([[1, 0]])) == 0
    assert gpu_models.distance(found, expected, torch.tensor([[1, 1]])) == 6


def test_the_median_lies_in_its_interval() -> None:
    found = median([float(at) for at in range(101)])
    assert (found["median"], found["low"], found["high"]) == (50, 40, 60)


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
    monkeypatch.setattr(gpu_wheels, "requirements", lambda: [Requirement(need) for need in needs])
    wheel(tmp_path, "aa", "bb", 'cc; extra == "more"', 'dd; extra == "less"')
    wheel(tmp_path, "bb", 'ee; python_version < "3.10"', "torch")
    wheel(tmp_path, "torch")
    return tmp_path


def test_what_a_folder_lacks_is_named_and_torch_is_never_taken(wheels: Path) -> None:
    taken, lacking = gpu_wheels.unmet(lambda need: False, wheels, "3.12")
    assert taken == ["aa", "bb"]
    assert lacking == ["cc", "torch"]  # `dd` and `ee` are for others


def test_what_is_here_is_not_taken(wheels: Path) -> None:
    taken, lacking = gpu_wheels.unmet(
        lambda need: need.name in {"torch", "bb", "cc"}, wheels, "3.9"
    )
    assert (taken, lacking) == (["aa"], [])


def test_a_version_that_is_too_old_is_not_here() -> None:
    assert gpu_wheels.installed(Requirement("torch>=2.11"))
    assert not gpu_wheels.installed(Requirement("torch>=999"))
    assert not gpu_wheels.installed(Requirement("no-such-package-anywhere"))


def test_the_wheels_hold_what_quantizes_and_what_serves() -> None:
    names = {need.name for need in gpu_wheels.requirements()}
    assert {"torchao", "starlette", "msgspec"} <= names


def test_only_what_every_check_wants_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_wheels, "installed", lambda need: need.name != "torchao")
    gpu_wheels.install(tmp_path, tmp_path / "target")
    monkeypatch.setattr(gpu_wheels, "installed", lambda need: need.name != "msgspec")
    with pytest.raises(SystemExit, match="missing: msgspec"):
        gpu_wheels.install(tmp_path, tmp_path / "target")
