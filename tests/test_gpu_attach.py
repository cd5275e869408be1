"""`scripts/gpu_attach`: attached models on a CPU, and what its checks would see."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import gpu_attach
from gpu_attached import FORK, MODEL, NEW
from gpu_road import Line, Road, run_all, run_one, wanted

STEPS = ("compile", "attach", "answer", "generate", "step")
ON_A_GPU = {
    "streams": "a CPU has no streams",
    "replay": "a CPU has no CUDA graphs",
    "second": "there is no second GPU",
}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """What the checks share."""
    return Road("cpu", tmp_path_factory.mktemp("road"), ExitStack())


@pytest.fixture(scope="module")
def lines(road: Road) -> dict[str, Line]:
    """How the checks end here, but for the quantized ones; the blocks are compiled once."""
    asked = wanted([*gpu_attach.checks_of_attached()], f"{MODEL},{FORK}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_attach, "FORKS", 2)
        return {line.name: line for line in run_all(asked, road)}


@pytest.mark.slow
def test_an_attached_model_passes_on_a_cpu_and_what_needs_a_gpu_says_so(
    lines: dict[str, Line],
) -> None:
    ends = {name: (line.result, line.why) for name, line in lines.items()}
    expected = {f"{MODEL} {step}": ("passed", "") for step in (*STEPS, "detach")}
    expected |= {f"{MODEL} {step}": ("skipped", why) for step, why in ON_A_GPU.items()}
    assert ends == expected | {f"{FORK} {step}": ("passed", "") for step in ("compile", "children")}
    facts = lines[f"{MODEL} answer"].facts
    assert facts["same_words"] == 1 and facts["stats"]["eager"] == 0
    assert facts["stats"]["compiled"] == 4 * (NEW + 1)
    assert 0 < facts["attached"] < 1e-5 and 0 < facts["eager"] < 1e-5
    assert {*lines[f"{MODEL} step"].facts["times"]} == {"attached", "eager"}


@pytest.mark.slow
def test_children_answer_and_one_of_them_is_killed(lines: dict[str, Line]) -> None:
    children = lines[f"{FORK} children"].facts["children"]
    assert [each.get("signal") for each in children] == [None, 9, None]
    answered = [each for each in children if "off" in each]
    assert all(each["off"] < 1e-4 and each["compiled"] > 0 for each in answered)


@pytest.mark.slow
def test_other_answers_fail(
    road: Road, lines: dict[str, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = {each.name: each for each in gpu_attach.checks_of_attached()}
    assert run_one(checks[f"{MODEL} attach"], road).result == "passed"
    told, sides = gpu_attach.told, []

    def off(model: object, ids: torch.Tensor) -> torch.Tensor:
        sides.append(model)
        return told(model, ids) + (len(sides) == 1)  # the attached side is asked first

    monkeypatch.setattr(gpu_attach, "told", off)
    line = run_one(checks[f"{MODEL} answer"], road)
    assert line.result == "failed" and "off, eager" in line.why


def test_forks_of_no_bundle_say_why(tmp_path: Path) -> None:
    script = Path(gpu_attach.__file__).with_name("gpu_forks.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "cpu", tmp_path / "no", tmp_path, "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "is not a bundle" in done.stderr
    assert json.dumps("off") not in done.stdout
