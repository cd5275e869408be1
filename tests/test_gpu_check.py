"""`scripts/gpu_check`: all of it on a CPU, and its list with checks that fail."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check"
STEPS = ("compile", "push", "pull", "open", "answer", "run", "time")


def check(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder of its own; nothing is written to the home folder."""
    environment = {**os.environ, "HUBAOTI_HOME": str(folder / "home"), "GOMP_SPINCOUNT": "0"}
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
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
def road(script: ModuleType, tmp_path: Path) -> object:
    """What the checks share, empty."""
    return script.Road("cpu", tmp_path, ExitStack())


@pytest.mark.slow
def test_every_check_passes_on_a_cpu(script: ModuleType, tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--json", "found.json")
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


def test_a_failure_is_the_exit_code_and_the_reason_of_what_needs_it(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(road: object) -> None:
        raise script.Failed("the sky fell")

    def passes(road: object) -> object:
        return script.Finding("all well")

    checks = (
        script.Check("one", fails),
        script.Check("two", passes, ("one",)),
        script.Check("three", passes, ("two",)),
        script.Check("four", passes),
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


def test_an_error_that_nobody_expected_is_a_failure_too(script: ModuleType, road: object) -> None:
    def breaks(road: object) -> None:
        raise ZeroDivisionError("in native code\nand more")

    line = script.run_one(script.Check("one", breaks), road)
    assert (line.result, line.why) == ("failed", "ZeroDivisionError: in native code")
    assert "and more" in line.trace


def test_a_skipped_check_gives_its_reason(script: ModuleType, road: object) -> None:
    def skips(road: object) -> None:
        raise script.Skipped("needs two GPUs")

    line = script.run_one(script.Check("one", skips), road)
    assert (line.result, line.why) == ("skipped", "needs two GPUs")


def test_only_takes_along_what_a_check_needs(script: ModuleType) -> None:
    names = [check.name for check in script.wanted(script.CHECKS, "encoder open")]
    assert names == ["serve", "encoder compile", "encoder push", "encoder pull", "encoder open"]


def test_answers_that_are_no_numbers_are_not_near(script: ModuleType) -> None:
    nothing, one = torch.full((2,), float("nan")), torch.ones(2)
    with pytest.raises(script.Failed):
        script.require(script.distance(nothing, one), 1e-4, "float32")


def test_padded_positions_do_not_count(script: ModuleType) -> None:
    expected, found = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    found[0, 1] = 7
    assert script.distance(found, expected, torch.tensor([[1, 0]])) == 0
    assert script.distance(found, expected, torch.tensor([[1, 1]])) == 6


def test_the_median_lies_in_its_interval(script: ModuleType) -> None:
    found = script.median([float(at) for at in range(101)])
    assert (found["median"], found["low"], found["high"]) == (50, 40, 60)


def wheel(folder: Path, name: str, *needs: str) -> None:
    """A wheel with nothing but its metadata."""
    import zipfile

    words = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{words}"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)


@pytest.fixture
def wheels(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels; the project needs `aa[more]` and torch."""
    from packaging.requirements import Requirement

    needs = ["aa[more]", "torch"]
    monkeypatch.setattr(script, "requirements", lambda: [Requirement(need) for need in needs])
    wheel(tmp_path, "aa", "bb", 'cc; extra == "more"', 'dd; extra == "less"')
    wheel(tmp_path, "bb", 'ee; python_version < "3.10"', "torch")
    wheel(tmp_path, "torch")
    return tmp_path


def test_what_a_folder_lacks_is_named_and_torch_is_never_taken(
    script: ModuleType, wheels: Path
) -> None:
    taken, lacking = script.unmet(lambda need: False, wheels, "3.12")
    assert taken == ["aa", "bb"]
    assert lacking == ["cc", "torch"]  # `dd` and `ee` are for others


def test_what_is_here_is_not_taken(script: ModuleType, wheels: Path) -> None:
    taken, lacking = script.unmet(lambda need: need.name in {"torch", "bb", "cc"}, wheels, "3.9")
    assert (taken, lacking) == (["aa"], [])


def test_a_version_that_is_too_old_is_not_here(script: ModuleType) -> None:
    from packaging.requirements import Requirement

    assert script.installed(Requirement("torch>=2.11"))
    assert not script.installed(Requirement("torch>=999"))
    assert not script.installed(Requirement("no-such-package-anywhere"))
