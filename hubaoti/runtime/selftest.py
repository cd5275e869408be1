"""The first open of a graph, in a process of its own: what crashes there crashes nobody else.

The child asks the graph its golden questions, for which no weights are needed, and says what came
of each. Who opens the graph afterwards knows that it runs on this machine, and answers as it did
where it was built.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from hubaoti.children import program, told_by
from hubaoti.errors import CannotOpen, HubaotiError, MissingOps, NotEnoughMemory, ended
from hubaoti.manifest import FILENAME, Manifest, parse
from hubaoti.manifest import Graph as Entry
from hubaoti.memory import available
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph

BASE = 600 << 20  # bytes of a process that has torch
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SECONDS = 300.0  # for one graph, the start of a process included


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a graph's first open; `problem` is empty where it answers as it should.

    A problem is `lasting` unless it may have been this moment's: a process that was ended from
    outside, for memory or for taking too long. What the system does not even load, as on a disk
    from which no code may run, was not `opened`: whoever opens it is told the same.
    """

    graph: str
    problem: str = ""
    lasting: bool = True
    opened: bool = True


class Said(msgspec.Struct):
    """A line of the child: a graph that it begins with, or what came of it."""

    graph: str
    problem: str | None = None
    opened: bool = True


DECODER = msgspec.json.Decoder(Said)


def selftest(
    path: Path,
    graphs: Path,
    entries: Sequence[Entry],
    device: torch.device,
    patience: float = SECONDS,
) -> list[Verdict]:
    """Open each graph of the artifact at `path` in a child, and compare its golden answers.

    `graphs` has the unpacked packages by their sha256; the caller has verified both. A graph for
    which nothing is told within `patience` seconds is ended, and counts as one that crashed.

    Raises:
        NotEnoughMemory: a graph's answers take more than is free here.
    """
    for entry in entries:
        require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[Verdict] = []
    while waiting:
        said = asked(path, graphs, waiting, device, patience)
        # Native code of a graph may write into the child's answers; of others nothing is believed.
        told = [verdict for verdict in said if verdict.graph in waiting]
        verdicts += told
        done = {verdict.graph for verdict in told}
        waiting = [graph for graph in waiting if graph not in done]
    return verdicts


def require_room(entry: Entry) -> None:
    """See that a graph's golden answers can be asked for here.

    Raises:
        NotEnoughMemory: with what they take and what is free.
    """
    needed = BASE + (entry.golden.memory if entry.golden else 0)
    if (have := available()) < needed:
        raise NotEnoughMemory(
            f"the first open of graph {entry.id} takes {needed / 1e9:.1f} GB of memory; "
            f"{have / 1e9:.1f} GB are free",
            hint="free some: a graph is not opened before it was tried",
        )


def asked(
    path: Path, graphs: Path, waiting: Sequence[str], device: torch.device, patience: float
) -> Iterator[Verdict]:
    """What one child says, until it has ended; the graph at which it died has a verdict too."""
    words = [*program("hubaoti.runtime.selftest"), os.getpid(), path, graphs, device, *waiting]
    child = subprocess.Popen(
        [*map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun = waiting[0]
    out = told_by(child, None, patience * len(waiting))
    finished = set()
    for said in map(DECODER.decode, out.splitlines()):
        begun = said.graph
        if said.problem is not None:
            finished.add(said.graph)
            yield Verdict(said.graph, said.problem, said.opened, said.opened)
    left = [graph for graph in waiting if graph not in finished]
    if left:
        code = child.returncode
        at = begun if begun in left else left[0]
        yield Verdict(at, ended(code), lasting=code != -signal.SIGKILL)


def main() -> None:
    """The child: its parent, artifact, unpacked graphs, device, and the graphs' ids are given."""
    parent, path, graphs, device, *ids = sys.argv[1:]
    end_with(int(parent))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no line of ours
    manifest = parse((Path(path) / FILENAME).read_bytes(), path)
    for entry in chosen(manifest, ids):
        say(out, Said(entry.id))
        say(out, tried(entry, Path(path), Path(graphs), torch.device(device)))


def end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, which may be killed at any moment.

    Where a system has no such word, a child whose parent is gone ends when it has answered.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def say(out: Any, said: Said) -> None:
    """One line, at once: the next graph may end this process."""
    out.write(msgspec.json.encode(said) + b"\n")
    out.flush()


def chosen(manifest: Manifest, ids: Sequence[str]) -> list[Entry]:
    """The graphs of these ids, in their order."""
    return [entry for name in ids for entry in manifest.graphs if entry.id == name]


def tried(entry: Entry, path: Path, graphs: Path, device: torch.device) -> Said:
    """Open one graph and compare its answers; what is wrong with it in words, else nothing."""
    try:
        graph = open_graph(graphs / entry.sha256, entry, device)
    except (CannotOpen, MissingOps) as why:
        return Said(entry.id, f"{why}", opened=False)
    if entry.golden is None:
        return Said(entry.id, "")
    try:
        expected = golden.expected(entry, path)
        found = golden.answer(graph, path)
    except HubaotiError as why:
        return Said(entry.id, f"{why}")
    problems = golden.differences(found, expected, entry.golden.tolerances)
    return Said(entry.id, "; ".join(problems))


def kind_of_host(device: torch.device) -> str:
    """What a verdict holds for: this torch, and this kind of processor."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"{name} {torch.cuda.get_device_capability(device)}"
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {platform.machine()} {kind} torch {torch.__version__}"
