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

from hubaoti.artifact.manifest import Graph as Entry
from hubaoti.errors import HubaotiError, MissingDependency, first_line
from hubaoti.host.memory import is_limited
from hubaoti.host.processes import collect_output, list_search_path
from hubaoti.runtime import custom_ops as of_caller
from hubaoti.runtime.first_open_child import (
    OPEN_SECONDS,
    OpenVerdict,
    Said,
    describe_failure,
    describe_unready,
    read_verdicts,
    start_child,
    write_line,
)
from hubaoti.spaces.unsigned.region import find_library, open_package


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


def open_package_in_child(
    folder: Path,
    entry: Entry,
    device: torch.device,
    kernels: Sequence[Mapping[str, Any]],
    ops: Sequence[str] = (),
) -> OpenVerdict:
    """Open a package in a child, which imports the modules `ops` first; what came of it."""
    request = Asked(
        parent=os.getpid(),
        id=entry.id,
        folder=os.fsencode(folder),
        library=find_library(entry),
        device=str(device),
        kernels=[dict(each) for each in kernels],
        ops=[*ops],
        search=list_search_path(),
    )
    output = collect_output(
        "hubaoti.spaces.unsigned.first_open", msgspec.json.encode(request), OPEN_SECONDS
    )
    return next(read_verdicts(output, [entry.id]))


def main() -> None:
    """The child: what to open comes on standard input, lines go out."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    out = start_child(request.parent)
    try:
        of_caller.register_ops(request.ops, request.search)
    except HubaotiError as error:
        write_line(out, describe_unready(request.id, error))
        return
    try:
        register_kernels(request.kernels)
        write_line(out, Said(request.id, is_limited=is_limited()))
        runner = open_package(
            Path(os.fsdecode(request.folder)),
            request.library,
            request.id,
            torch.device(request.device),
        )
        runner.get_constant_names_to_original_fqns()
        runner.get_call_spec()
    except HubaotiError as error:
        write_line(out, describe_failure(request.id, error))
    else:
        write_line(out, Said(request.id, ""))


def register_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
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


def fetch_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
    """Bring kernels to this machine without running them, once for all that are forked from here.

    Whoever opens packages asks for them again, and says what is wrong with them.
    """
    if kernels:
        with suppress(Exception):
            from kernels import install_kernel

            for each in kernels:
                install_kernel(**each)
