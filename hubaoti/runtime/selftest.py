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
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch

from hubaoti.children import Told, search_path, told_by
from hubaoti.errors import (
    CRASHES,
    CannotOpen,
    HubaotiError,
    MissingDependency,
    MissingOps,
    NotEnoughMemory,
    NotTried,
    ended,
)
from hubaoti.manifest import FILENAME, Manifest, parse
from hubaoti.manifest import Graph as Entry
from hubaoti.memory import available, is_limited
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.ops import register

BASE = 600 << 20  # bytes of a process that has torch
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LONGEST = 2000  # characters of what is wrong with a graph
SECONDS = 300.0  # for one graph, the start of a process included


# Of the system, or of what a process has registered or installed.
UNOPENED = (CannotOpen, MissingOps, MissingDependency)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a graph's first open; `problem` is empty where it answers as it should.

    Only a crash and a wrong answer are `lasting`: all else may have been this moment's, as a
    process that was ended from outside, or too little memory. What the system does not even load,
    as on a disk from which no code may run, or whose ops are not registered, was not `opened`.
    `kind` is the error's class, and `hint` its hint, where there was no answer but one.
    """

    graph: str
    problem: str = ""
    lasting: bool = True
    opened: bool = True
    kind: str = ""
    hint: str = ""


class Asked(msgspec.Struct):
    """What a child is to open, and who asks, with the modules that register the caller's ops."""

    parent: int
    path: bytes
    graphs: bytes
    device: str
    ids: list[str]
    ops: list[str]
    search: list[bytes]


class Said(msgspec.Struct):
    """A line of the child: a graph that it begins with, or what came of it."""

    graph: str
    problem: str | None = None
    kind: str = ""
    hint: str = ""
    is_limited: bool = False


DECODER = msgspec.json.Decoder(Said)


def selftest(
    path: Path,
    graphs: Path,
    entries: Sequence[Entry],
    device: torch.device,
    patience: float = SECONDS,
    ops: Sequence[str] = (),
) -> list[Verdict]:
    """Open each graph of the artifact at `path` in a child, and compare its golden answers.

    `graphs` has the unpacked packages by their sha256; the caller has verified both. A child that
    tells nothing within `patience` seconds for each graph is ended. The child imports the modules
    `ops` first. After a verdict that does not last, the graphs behind it have none.

    Raises:
        NotEnoughMemory: a graph's answers take more than is free here.
    """
    for entry in entries:
        require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[Verdict] = []
    while waiting and all(each.lasting or not each.opened for each in verdicts):
        places = os.fsencode(path), os.fsencode(graphs)
        asked = Asked(os.getpid(), *places, str(device), waiting, [*ops], search_path())
        said = msgspec.json.encode(asked)
        told = told_by("hubaoti.runtime.selftest", said, patience * len(waiting))
        verdicts += heard(told, waiting)
        done = {verdict.graph for verdict in verdicts}
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


def heard(told: Told, waiting: Sequence[str]) -> Iterator[Verdict]:
    """What a child said of graphs; the one at which it ended has a verdict, too."""
    left, begun = [*waiting], None
    for line in told.out.splitlines():
        if not left:
            return
        try:
            said = DECODER.decode(line)
        except msgspec.DecodeError:
            said = None
        if said is None or said.graph not in left:
            problem = "its process said what is no answer of ours"
            yield Verdict(begun.graph if begun else left[0], problem, lasting=False)
            return
        begun = said
        if said.problem is not None:
            left.remove(said.graph)
            begun = None
            yield judged(said)
    if left:
        yield unsaid(told, begun or Said(left[0]), has_begun=begun is not None)


def judged(said: Said) -> Verdict:
    """What a child has said of a graph: an answer that is right or wrong, or an error instead."""
    opened = said.kind not in [kind.__name__ for kind in UNOPENED]
    problem = (said.problem or "")[:LONGEST]
    return Verdict(said.graph, problem, opened and not said.kind, opened, said.kind, said.hint)


def unsaid(told: Told, said: Said, has_begun: bool) -> Verdict:
    """What a child's end says of a graph: nothing, unless it crashed there, and not for memory."""
    if not has_begun:
        last = f": {told.last}" if told.last else ""
        problem = f"before it was opened, {ended(told.code)}{last}"
        return Verdict(said.graph, problem, lasting=False)
    lasting = -told.code in CRASHES and not said.is_limited
    return Verdict(said.graph, ended(told.code), lasting)


def main() -> None:
    """The child: what to open comes on standard input, lines go out."""
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    out = begin(asked.parent)
    path, graphs = (Path(os.fsdecode(each)) for each in (asked.path, asked.graphs))
    try:
        register(asked.ops, asked.search)
    except HubaotiError as why:
        for name in asked.ids:
            say(out, unready(name, why))
        return
    for entry in chosen(parse((path / FILENAME).read_bytes(), str(path)), asked.ids):
        say(out, Said(entry.id, is_limited=is_limited()))
        say(out, tried(entry, path, graphs, torch.device(asked.device)))


def begin(parent: int) -> BinaryIO:
    """Begin as a child that opens what nobody knows; where its lines go out."""
    end_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no line of ours
    return out


def end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, which may be killed at any moment.

    Where a system has no such word, a child whose parent is gone ends when it has answered.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def say(out: BinaryIO, said: Said) -> None:
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
        if entry.golden is None:
            return Said(entry.id, "")
        expected = golden.expected(entry, path)
        found = golden.answer(graph, path)
    except HubaotiError as why:
        return failed(entry.id, why)
    problems = golden.differences(found, expected, entry.golden.tolerances)
    return Said(entry.id, "; ".join(problems))


def failed(graph: str, why: HubaotiError) -> Said:
    """An error in the place of an answer."""
    return Said(graph, f"{why}", type(why).__name__, why.hint)


def unready(graph: str, why: HubaotiError) -> Said:
    """What kept a child from opening a graph at all, which says nothing of the graph."""
    return Said(graph, f"{why}", NotTried.__name__)


def kind_of_host(device: torch.device) -> str:
    """What a verdict holds for: this torch, and this kind of processor."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"{name} {torch.cuda.get_device_capability(device)}"
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {platform.machine()} {kind} torch {torch.__version__}"
