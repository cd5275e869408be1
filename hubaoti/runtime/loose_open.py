"""The first open of a package without a manifest, in a process of its own; and its kernels.

There is no golden answer to compare: all that is seen is whether it can be loaded at all.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch

from hubaoti.children import program, told_by
from hubaoti.errors import HubaotiError, MissingDependency, ended, first_line
from hubaoti.manifest import Graph as Entry
from hubaoti.runtime.loose import library_of, open_package
from hubaoti.runtime.selftest import SECONDS, Verdict, end_with


class Asked(msgspec.Struct):
    """What the child is to open, and who asks."""

    parent: int
    folder: str
    library: str
    device: str
    kernels: list[dict[str, Any]]


def first_open(
    folder: Path, entry: Entry, device: torch.device, kernels: Sequence[Mapping[str, Any]]
) -> Verdict:
    """Open a package in a child; what came of it."""
    asked = Asked(
        parent=os.getpid(),
        folder=str(folder),
        library=library_of(entry),
        device=str(device),
        kernels=[dict(each) for each in kernels],
    )
    child = subprocess.Popen(
        program("hubaoti.runtime.loose_open"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    out = told_by(child, msgspec.json.encode(asked), SECONDS)
    if child.returncode == 0 and out:
        problem = out.decode(errors="replace").strip()
        return Verdict(entry.id, "" if problem == "good" else problem, opened=problem == "good")
    code = child.returncode
    crashed = code < 0 and code != -signal.SIGKILL
    return Verdict(entry.id, ended(code), lasting=crashed, opened=crashed)


def main() -> None:
    """The child: what to open comes on standard input, one line goes out."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    end_with(asked.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no line of ours
    told = "good"
    try:
        register(asked.kernels)
        runner = open_package(
            Path(asked.folder), asked.library, "of the package", torch.device(asked.device)
        )
        runner.get_constant_names_to_original_fqns()
        runner.get_call_spec()
    except HubaotiError as why:
        told = first_line(why)
    out.write(told.encode() + b"\n")
    out.flush()


def register(kernels: Sequence[Mapping[str, Any]]) -> None:
    """Load the kernels that packages call, as their publisher's config names them.

    Raises:
        MissingDependency: the kernels library is not here.
        HubaotiError: one cannot be had.
    """
    if not kernels:
        return
    try:
        from kernels import get_kernel
    except ImportError as why:
        hint = "install it: pip install kernels"
        raise MissingDependency("the packages need the kernels library", hint=hint) from why
    for each in kernels:
        try:
            get_kernel(**each)
        except Exception as why:  # of the Hub, of the disk, of native code
            raise HubaotiError(
                f"kernel {each.get('repo_id')} cannot be had: {first_line(why)}",
                hint="see that it is published for this torch and this GPU",
            ) from why


def fetch(kernels: Sequence[Mapping[str, Any]]) -> None:
    """Bring kernels to this machine without running them, once for all that are forked from here.

    Whoever opens packages asks for them again, and says what is wrong with them.
    """
    if kernels:
        with suppress(Exception):
            from kernels import install_kernel

            for each in kernels:
                install_kernel(**each)
