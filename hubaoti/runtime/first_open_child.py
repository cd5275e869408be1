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

from hubaoti.artifact.manifest import FILENAME, Manifest, parse_manifest
from hubaoti.artifact.manifest import Graph as Entry
from hubaoti.errors import (
    CRASHES,
    CannotOpen,
    HubaotiError,
    MissingDependency,
    MissingOps,
    NotEnoughMemory,
    NotTried,
    describe_exit,
)
from hubaoti.host.memory import is_limited, read_available_memory
from hubaoti.host.processes import ChildOutput, collect_output, list_search_path
from hubaoti.runtime import golden
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.runtime.graph import open_graph

_BASE = 600 << 20  # bytes of a process that has torch
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST = 2000  # characters of what is wrong with a graph
OPEN_SECONDS = 300.0  # for one graph, the start of a process included


# Of the system, or of what a process has registered or installed.
_UNOPENED = (CannotOpen, MissingOps, MissingDependency)


@dataclass(frozen=True, slots=True)
class OpenVerdict:
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


_DECODER = msgspec.json.Decoder(Said)


def open_in_child(
    path: Path,
    graphs: Path,
    entries: Sequence[Entry],
    device: torch.device,
    patience: float = OPEN_SECONDS,
    ops: Sequence[str] = (),
) -> list[OpenVerdict]:
    """Open each graph of the artifact at `path` in a child, and compare its golden answers.

    `graphs` has the unpacked packages by their sha256; the caller has verified both. A child that
    tells nothing within `patience` seconds for each graph is ended. The child imports the modules
    `ops` first. After a verdict that does not last, the graphs behind it have none.

    Raises:
        NotEnoughMemory: a graph's answers take more than is free here.
    """
    for entry in entries:
        _require_room(entry)
    waiting = [entry.id for entry in entries]
    verdicts: list[OpenVerdict] = []
    while waiting and all(each.lasting or not each.opened for each in verdicts):
        places = os.fsencode(path), os.fsencode(graphs)
        request = msgspec.json.encode(
            Asked(os.getpid(), *places, str(device), waiting, [*ops], list_search_path())
        )
        seconds = patience * len(waiting)
        output = collect_output("hubaoti.runtime.first_open_child", request, seconds)
        verdicts += read_verdicts(output, waiting)
        done = {verdict.graph for verdict in verdicts}
        waiting = [graph for graph in waiting if graph not in done]
    return verdicts


def _require_room(entry: Entry) -> None:
    """See that a graph's golden answers can be asked for here.

    Raises:
        NotEnoughMemory: with what they take and what is free.
    """
    needed = _BASE + (entry.golden.memory if entry.golden else 0)
    if (have := read_available_memory()) < needed:
        raise NotEnoughMemory(
            f"the first open of graph {entry.id} takes {needed / 1e9:.1f} GB of memory; "
            f"{have / 1e9:.1f} GB are free",
            hint="free some: a graph is not opened before it was tried",
        )


def read_verdicts(output: ChildOutput, waiting: Sequence[str]) -> Iterator[OpenVerdict]:
    """What a child said of graphs; the one at which it ended has a verdict, too."""
    left, begun = [*waiting], None
    for each in output.out.splitlines():
        if not left:
            return
        try:
            line = _DECODER.decode(each)
        except msgspec.DecodeError:
            line = None
        if line is None or line.graph not in left:
            problem = "its process said what is no answer of ours"
            yield OpenVerdict(begun.graph if begun else left[0], problem, lasting=False)
            return
        begun = line
        if line.problem is not None:
            left.remove(line.graph)
            begun = None
            yield _judge_line(line)
    if left:
        yield _judge_exit(output, begun or Said(left[0]), has_begun=begun is not None)


def _judge_line(line: Said) -> OpenVerdict:
    """What a child has said of a graph: an answer that is right or wrong, or an error instead."""
    opened = line.kind not in [kind.__name__ for kind in _UNOPENED]
    problem = (line.problem or "")[:_LONGEST]
    return OpenVerdict(line.graph, problem, opened and not line.kind, opened, line.kind, line.hint)


def _judge_exit(output: ChildOutput, line: Said, has_begun: bool) -> OpenVerdict:
    """What a child's end says of a graph: nothing, unless it crashed there, and not for memory."""
    if not has_begun:
        last = f": {output.last}" if output.last else ""
        problem = f"before it was opened, {describe_exit(output.code)}{last}"
        return OpenVerdict(line.graph, problem, lasting=False)
    lasting = -output.code in CRASHES and not line.is_limited
    return OpenVerdict(line.graph, describe_exit(output.code), lasting)


def main() -> None:
    """The child: what to open comes on standard input, lines go out."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    out = start_child(request.parent)
    path, graphs = (Path(os.fsdecode(each)) for each in (request.path, request.graphs))
    try:
        register_ops(request.ops, request.search)
    except HubaotiError as error:
        for name in request.ids:
            write_line(out, describe_unready(name, error))
        return
    for entry in _select_entries(
        parse_manifest((path / FILENAME).read_bytes(), str(path)), request.ids
    ):
        write_line(out, Said(entry.id, is_limited=is_limited()))
        write_line(out, _try_graph(entry, path, graphs, torch.device(request.device)))


def start_child(parent: int) -> BinaryIO:
    """Begin as a child that opens what nobody knows; where its lines go out."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints is no line of ours
    return out


def die_with_parent(parent: int) -> None:
    """Have the system end this process when its parent ends, which may be killed at any moment.

    Where a system has no such word, a child whose parent is gone ends when it has answered.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def write_line(out: BinaryIO, line: Said) -> None:
    """One line, at once: the next graph may end this process."""
    out.write(msgspec.json.encode(line) + b"\n")
    out.flush()


def _select_entries(manifest: Manifest, ids: Sequence[str]) -> list[Entry]:
    """The graphs of these ids, in their order."""
    return [entry for name in ids for entry in manifest.graphs if entry.id == name]


def _try_graph(entry: Entry, path: Path, graphs: Path, device: torch.device) -> Said:
    """Open one graph and compare its answers; what is wrong with it in words, else nothing."""
    try:
        graph = open_graph(graphs / entry.sha256, entry, device)
        if entry.golden is None:
            return Said(entry.id, "")
        expected = golden.load_expected(entry, path)
        found = golden.ask_golden(graph, path)
    except HubaotiError as error:
        return describe_failure(entry.id, error)
    problems = golden.compare_golden_answers(found, expected, entry.golden.tolerances)
    return Said(entry.id, "; ".join(problems))


def describe_failure(graph: str, error: HubaotiError) -> Said:
    """An error in the place of an answer."""
    return Said(graph, f"{error}", type(error).__name__, error.hint)


def describe_unready(graph: str, error: HubaotiError) -> Said:
    """What kept a child from opening a graph at all, which says nothing of the graph."""
    return Said(graph, f"{error}", NotTried.__name__)


def name_host_kind(device: torch.device) -> str:
    """What a verdict holds for: this torch, and this kind of processor."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        kind = f"{name} {torch.cuda.get_device_capability(device)}"
    else:
        kind = torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {platform.machine()} {kind} torch {torch.__version__}"
