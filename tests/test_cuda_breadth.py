"""`scripts/bench breadth --for`: architectures on the road of GPUs, line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import breadth_cuda
from benchmarks.breadth_cuda import Outcome, bench_breadth_for

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


def write_lines(file: Path, *lines: Outcome) -> None:
    """A file as an earlier run left it."""
    file.write_text(json.dumps({"breadth_sm90": [asdict(each) for each in lines]}))


def test_a_line_that_the_file_has_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.json"
    write_lines(file, Outcome("vit", "forward", "pass", error=1e-7, points=3))

    def judge(case: object, capability: int) -> Outcome:
        assert (getattr(case, "name", None), capability) == ("llama", 90)
        return Outcome("llama", "forward", "refuse", "it asks for the device")

    monkeypatch.setattr(breadth_cuda, "_judge_apart", judge)
    found = bench_breadth_for("sm90", ("vit", "llama"), ("forward",), file)
    assert [figure.median for figure in found[:3]] == [0.5, 0, 1e-7]
    assert [figure.reached for figure in found[:3]] == [False, True, True]
    kept = json.loads(file.read_text())
    assert [each["name"] for each in kept["breadth_sm90"]] == ["vit", "llama"]
    assert len(kept["figures"]) == len(found)
    assert "it asks for the device" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.slow
def test_an_architecture_is_built_answered_and_launched(tmp_path: Path) -> None:
    file = tmp_path / "lines.json"
    command = [sys.executable, BENCH, "breadth", "--for", "sm90", "--only", "vit", "--json", file]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert file.exists(), done.stderr[-2000:]
    (line,) = json.loads(file.read_text())["breadth_sm90"]
    assert (line["verdict"], line["reason"], line["blocks"]) == ("pass", "", "3 of 3")
    assert line["points"] >= 3 and line["launched"] == line["graphs"] == 1
    assert 0 < line["error"] <= 1e-5
    assert done.returncode == 0, done.stderr[-2000:]
