"""The scripts of this repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import pytest
@pytest.mark.cuda
@pytest.mark.slow
def test_slow_cuda(): pass
@pytest.mark.slow
def test_slow(): pass
def test_plain(): pass
"""


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ([], {"plain"}),
        (["--slow"], {"slow", "plain"}),
        (["--slow", "-m", "slow"], {"slow"}),
        (["--slow", "-mslow"], {"slow"}),
        (["--slow", "-m=slow"], {"slow"}),
        (["--slow", "-qm", "slow or cuda"], {"slow"}),
        (["-m", "cuda"], set()),
        (["-k", "plain", "-n", "1"], {"plain"}),
    ],
)
def test_marks_that_are_asked_for_are_asked_besides_those_of_scripts_test(
    asked: list[str], left: set[str], tmp_path: Path
) -> None:
    (tmp_path / "test_marks.py").write_text(FILE)
    hooks = "pytest_addoption, pytest_collection_modifyitems, pytest_configure"
    (tmp_path / "conftest.py").write_text(f"from tests_conftest import {hooks}\n")
    (tmp_path / "tests_conftest.py").symlink_to(Path(__file__).with_name("conftest.py"))
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *asked]
    command += ["--strict-markers", "-o", "markers=cuda\nslow", str(tmp_path)]
    paths = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    environment = {**os.environ, "TESTS_MARKED": "not cuda", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    passed = {
        line.rpartition("::test_")[2] for line in done.stdout.splitlines() if "PASSED" in line
    }
    assert (passed, done.returncode) == (left, 0 if left else 5), done.stdout + done.stderr
