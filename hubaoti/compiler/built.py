"""What building a unit comes to, and the golden answers that it ships with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from torch import nn

from hubaoti.artifact.schema import Check, File, Golden, Graph
from hubaoti.compiler import elf
from hubaoti.compiler.constants import collect_named_tensors
from hubaoti.host.wire import ErrorRecord
from hubaoti.runtime import golden
from hubaoti.runtime.synthetic import fill_synthetic


class BuiltGraph(msgspec.Struct, frozen=True, tag=True):
    """A graph as the manifest has it, what its library needs, and how it was checked.

    `ops` are those of ours that it calls, which a kernel has to answer.
    """

    graph: Graph
    needs: elf.Needs
    files: tuple[File, ...] = ()
    checks: tuple[Check, ...] = ()
    ops: tuple[str, ...] = ()


class BuiltUnit(msgspec.Struct, frozen=True, tag=True):
    """The graphs of a unit, one for each kind of host, and the golden answers of all of them.

    For a GPU there may be the error instead that its graph met.
    """

    graphs: tuple[BuiltGraph | ErrorRecord, ...]
    golden: dict[str, torch.Tensor] = {}


def fill_tied_constants(entry: Graph, module: nn.Module) -> None:
    """Give tied constants the values of the name that the graph has for them, of their several.

    Who opens the graph knows no other; the module's parameters got theirs by its own first name.
    """
    named = collect_named_tensors(module)
    for constant in entry.constants:
        if constant.aliases and isinstance(named.get(constant.fqn), nn.Parameter):
            fill_synthetic(named[constant.fqn], constant.fqn)


def record_golden(
    graph: golden.Answering, folder: Path, by_rule: bool
) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The golden answers of a graph, and its entry that tells of them.

    A graph that is bound to the rule's constants already is asked as it is. A decoder is asked with
    two places filled, since attention over one place says nothing about keys.

    Raises:
        CheckFailed: the answers would prove nothing.
    """
    entry = graph.entry
    sizes = golden.choose_smallest_dims(entry)
    if "filled" in sizes and entry.bounds["filled"][1] > 1:
        sizes |= {"filled": max(2, sizes["filled"]), "cache": max(2, sizes["cache"])}
    blank = Golden(dims=sizes, tolerances={}, memory=0)
    graph.entry = msgspec.structs.replace(entry, golden=blank)
    answers = golden.answer_golden_inputs(graph) if by_rule else golden.ask_golden(graph, folder)
    if not all(tensor.isfinite().all() for tensor in answers.values()):
        graph.entry = entry
        return entry, {}
    return msgspec.structs.replace(
        entry, golden=golden.describe_golden(graph.entry, answers)
    ), answers
