"""Processes under the stand-in of GPUs: code that runs in one, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubaoti.compiler.stand_in import StandIn, build_stand_in
from hubaoti.host.probe import find_torch
from hubaoti.settings import merge_environment

_TESTS = Path(__file__).parent
# What the code has: what CUDA has not got back, by kind, and a way to say what it found.
_PRELUDE = f"""
import ctypes, json, sys
sys.path.insert(0, {str(_TESTS)!r})
_driver = ctypes.CDLL(None)
def count_live():
    kinds = "memory pinned stream event graph module".split()
    return {{kind: _driver.stand_in_live(kind.encode()) for kind in kinds}}
def say(**found): print("\\n" + json.dumps(found))
"""


def make_stand_in(home: Path) -> StandIn:
    """The stand-in for this torch, which has to be a CUDA build, kept in a home."""
    torch = find_torch([])
    assert torch is not None
    return build_stand_in(torch, home)


def run_under(
    stand_in: StandIn,
    code: str,
    *capabilities: int,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run code where there is a GPU of each capability; how it ended, and what it printed.

    `options` are those of `StandIn.environment`, and `env` goes over what that says.
    """
    around = {**stand_in.environment(capabilities, **options), **(env or {})}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PRELUDE + textwrap.dedent(code)],
        env=merge_environment(around),
        cwd=os.environ.get("TMPDIR", "/tmp"),
        capture_output=True,
        text=True,
        timeout=900,
    )


def ask(stand_in: StandIn, code: str, *capabilities: int, **options: Any) -> dict[str, Any]:
    """The facts that code says last, as `run_under` runs it."""
    done = run_under(stand_in, code, *capabilities, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
