"""Does a bundle that was made without a GPU open on one? Each in a process, its first crash named.

This goes first on a machine that nobody has seen: where opening ends a process, nothing else that
opens can be looked at, and the line says at which step, and where in native code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpu import openings
from gpu.conftest import Found
from gpu.place import Place, find_bundle

_SECONDS = 40  # of one process; of the debugger, too
_TRACE = 12_000  # characters of what a crash prints


@dataclass(frozen=True, slots=True)
class Opening:
    """A bundle of those that were made beforehand."""

    name: str

    @property
    def bundle(self) -> str:
        """Its name there."""
        return self.name.removeprefix("opening-")


def list_cases(every: bool) -> tuple[Opening, ...]:
    """From the simplest on; `plain` is a package of torch's own, of which hubaoti made nothing."""
    names = ("plain", "encoder", "block-plain", "block-cache", "block-fa3", "flux")
    return tuple(Opening(f"opening-{name}") for name in names)


@pytest.fixture
def package(place: Place, case: Opening) -> Path:
    """The bundle, or the folder of the package."""
    if place.made is None:
        pytest.skip("nothing was made beforehand: see scripts/gpu_build")
    plain = place.made / "plain"
    if case.bundle == "plain" and plain.is_dir():
        return plain
    folder = find_bundle(place.made, case.bundle)
    if folder is None:
        pytest.skip(f"{case.bundle} is not among what was made beforehand")
    return folder


def test_open(package: Path, case: Opening, place: Place, found: Found) -> None:
    """Every graph is opened, bound and called once."""
    done = run_opening(place, package)
    steps = [line.removeprefix("step ") for line in done.stdout.splitlines() if "step " in line]
    facts: dict[str, Any] = {"steps": steps, "exit": done.returncode}
    facts["mapped"] = [line[7:] for line in done.stdout.splitlines() if line.startswith("mapped ")]
    ended = done.returncode == 0 and steps and steps[-1].endswith("done")
    if not ended:
        facts["printed"] = done.stderr[-_TRACE:]
        facts["debugger"] = debug(place, package) if done.returncode < 0 else None
    last = steps[-1] if steps else "nothing"
    found(f"{last}, {len(steps)} steps", **facts)
    assert ended, f"it ended with {done.returncode} after: {last}; {find_frame(facts['printed'])}"


def find_frame(trace: str) -> str:
    """A crash's first frame outside the handlers, or else the last line that is no advice."""
    frames = [line.strip() for line in trace.splitlines() if line.startswith("frame #")]
    handlers = ("Signal", "libc.so", "libpthread")
    own = [line for line in frames if not any(word in line for word in handlers)]
    said = [line for line in trace.strip().splitlines() if not line.startswith("hint: ")]
    lines = own or said[-1:]
    return lines[0][:200] if lines else "it said nothing"


def run_opening(
    place: Place, package: Path, *before: str, seconds: float = _SECONDS
) -> subprocess.CompletedProcess[str]:
    """The process that opens it, perhaps below a debugger."""
    environment = os.environ | place.settings.to_env()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [*before, sys.executable, "-P", "-W", "ignore", openings.__file__]
    command += [str(place.device), str(package)]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = [
            each.decode() if isinstance(each, bytes) else each or ""
            for each in (error.stdout, error.stderr)
        ]
        said[1] += f"\nit took longer than {seconds} s"
        return subprocess.CompletedProcess(command, -9, *said)


def debug(place: Place, package: Path) -> str | None:
    """A native trace with registers and what is mapped where, if a debugger is here."""
    debugger = shutil.which("cuda-gdb") or shutil.which("gdb")
    if debugger is None:
        return None
    words = [debugger, "-batch", "-ex", "set pagination off", "-ex", "handle SIGSEGV stop nopass"]
    words += ["-ex", "run", "-ex", "bt 25", "-ex", "info registers rip rdi rsi rdx"]
    words += ["-ex", "x/3i $pc", "-ex", "info sharedlibrary", "--args"]
    done = run_opening(place, package, *words)
    return (done.stdout + done.stderr)[-_TRACE:]


# What the check would see


CRASH = """
import ctypes, faulthandler, sys, torch
torch._C._set_print_stack_traces_on_fatal_signal(True)
sys.stdout.write("step 1 ms the device is there\\n")
sys.stdout.flush()
ctypes.string_at(1)
"""


@pytest.mark.slow
def test_a_crash_is_told_with_its_step_and_a_native_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place_on_cpu: Place
) -> None:
    program = tmp_path / "crash.py"
    program.write_text(CRASH)
    monkeypatch.setattr(openings, "__file__", str(program))
    found: list[dict[str, Any]] = []
    with pytest.raises(AssertionError, match=r"ended with -11 after: 1 ms the device is there; "):
        test_open(
            tmp_path,
            Opening("opening-plain"),
            place_on_cpu,
            lambda said, **facts: found.append(facts),
        )
    assert "frame #" in found[0]["printed"]


def test_an_error_is_told_in_its_own_words_and_not_by_its_advice() -> None:
    trace = "Traceback (most recent call last):\nMissingOps: no such op\nhint: compile it again\n"
    assert find_frame(trace) == "MissingOps: no such op"
    assert find_frame("hint: alone") == find_frame("") == "it said nothing"
