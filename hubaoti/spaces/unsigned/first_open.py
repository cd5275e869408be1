"""The first open of a package without a manifest, in a process of its own; and its kernels.

There is no golden answer to compare: all that is seen is whether it can be loaded at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Member
from hubaoti.errors import HubaotiError, MissingDependency, first_line
from hubaoti.host.processes import join_parent
from hubaoti.runtime.open_child import (
    OpenReport,
    OpenRequest,
    OpenVerdict,
    collect_verdicts,
)
from hubaoti.runtime.open_fork import Attempt, FirstOpen
from hubaoti.settings import Settings
from hubaoti.spaces.unsigned.region import find_library, open_package


class _PackageRequest(OpenRequest, frozen=True, kw_only=True):
    """A package that lies unpacked in `folder`, and the kernels that it calls."""

    folder: bytes
    members: list[Member]
    kernels: list[dict[str, Any]]


def open_package_in_child(
    folder: Path,
    entry: Entry,
    device: torch.device,
    kernels: Sequence[Mapping[str, Any]],
    ops: Sequence[str] = (),
) -> OpenVerdict:
    """Open a package in a child, which imports the modules `ops` first; what came of it."""
    find_library(entry.members, entry.id)  # or it says that there is none
    request = _PackageRequest(
        ids=[entry.id],
        device=str(device),
        ops=[*ops],
        folder=os.fsencode(folder),
        members=[*entry.members],
        kernels=[dict(each) for each in kernels],
    )
    return collect_verdicts(__name__, request)[0]


def main() -> None:
    """The child that opens a package."""
    channel = join_parent(is_awaited=True, is_watched=False)
    request: _PackageRequest = channel.receive(_PackageRequest)
    folder, device = Path(os.fsdecode(request.folder)), torch.device(request.device)
    kernels = Settings.from_env().kernel_cache if request.kernels else None

    def try_package(attempt: Attempt) -> bytes:
        register_kernels(request.kernels)
        attempt.begin()
        runner = open_package(folder, request.members, attempt.graph, device)
        attempt.opened = True
        runner.get_constant_names_to_original_fqns()
        runner.get_call_spec()
        return b""

    FirstOpen(
        try_graph=try_package,
        judge=lambda graph, _: OpenReport(graph, "", opened=True),
        readable=(folder, kernels) if kernels is not None else (folder,),
        compiles=bool(request.kernels),
    ).report(channel, request)


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
    except ImportError as error:
        hint = "install it: pip install kernels"
        raise MissingDependency("the packages need the kernels library", hint=hint) from error
    for each in kernels:
        try:
            get_kernel(**each)
        except Exception as error:  # of the Hub, of the disk, of native code
            raise HubaotiError(
                f"kernel {each.get('repo_id')} cannot be had: {first_line(error)}",
                hint="see that it is published for this torch and this GPU",
            ) from error


def fetch_kernels(kernels: Sequence[Mapping[str, Any]]) -> None:
    """Bring kernels to this machine without running them, once for all that are forked from here.

    Whoever opens packages asks for them again, and says what is wrong with them.
    """
    if kernels:
        with suppress(Exception):
            from kernels import install_kernel

            for each in kernels:
                install_kernel(**each)
