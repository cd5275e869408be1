"""The first open of a package without a manifest, in a process of its own; and its kernels.

There is no golden answer to compare: all that is seen is whether it can be loaded at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch

from hubaoti.children import search_path, told_by
from hubaoti.errors import HubaotiError, MissingDependency, first_line
from hubaoti.manifest import Graph as Entry
from hubaoti.memory import is_limited
from hubaoti.runtime import ops as of_caller
from hubaoti.runtime.loose import library_of, open_package
from hubaoti.runtime.selftest import SECONDS, Said, Verdict, begin, failed, heard, say, unready


class Asked(msgspec.Struct):
    """What the child is to open, and who asks, with the modules that register the caller's ops."""

    parent: int
    id: str
    folder: bytes
    library: str
    device: str
    kernels: list[dict[str, Any]]
    ops: list[str]
    search: list[bytes]


def first_open(
    folder: Path,
    entry: Entry,
    device: torch.device,
    kernels: Sequence[Mapping[str, Any]],
    ops: Sequence[str] = (),
) -> Verdict:
    """Open a package in a child, which imports the modules `ops` first; what came of it."""
    asked = Asked(
        parent=os.getpid(),
        id=entry.id,
        folder=os.fsencode(folder),
        library=library_of(entry),
        device=str(device),
        kernels=[dict(each) for each in kernels],
        ops=[*ops],
        search=search_path(),
    )
    told = told_by("hubaoti.runtime.loose_open", msgspec.json.encode(asked), SECONDS)
    return next(heard(told, [entry.id]))


def main() -> None:
    """The child: what to open comes on standard input, lines go out."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    out = begin(asked.parent)
    try:
        of_caller.register(asked.ops, asked.search)
    except HubaotiError as why:
        say(out, unready(asked.id, why))
        return
    try:
        register(asked.kernels)
        say(out, Said(asked.id, is_limited=is_limited()))
        runner = open_package(
            Path(os.fsdecode(asked.folder)), asked.library, asked.id, torch.device(asked.device)
        )
        runner.get_constant_names_to_original_fqns()
        runner.get_call_spec()
    except HubaotiError as why:
        say(out, failed(asked.id, why))
    else:
        say(out, Said(asked.id, ""))


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
