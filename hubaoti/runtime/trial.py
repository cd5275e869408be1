"""The first call of a graph beside the module's own, where no config says that they are one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hubaoti.errors import BadInput
from hubaoti.runtime import golden
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.reasons import Unserved


class Trials:
    """Graphs of a region that were not tried yet, and those that answered otherwise than it."""

    def __init__(self, graphs: Iterable[str]) -> None:
        self._all = frozenset(graphs)
        self._waiting = {*self._all}
        self._refused: dict[str, str] = {}

    def again(self) -> None:
        """Try all of them once more."""
        self._refused = {}
        self._waiting = {*self._all}

    def wants(self, graph: str) -> bool:
        """Whether a graph has to be tried first.

        Raises:
            Unserved: it was tried, and answered otherwise.
        """
        if graph in self._waiting:  # it leaves here last: who comes in between tries it, too
            return True
        if graph in self._refused:
            raise Unserved("differs", self._refused[graph])
        return False

    def hold(self, graph: Graph, inputs: list[torch.Tensor], eager: Callable[[], Any]) -> Any:
        """What the module answers, after the graph was asked the same.

        What is written in place is written by the module; the graph has copies of it.

        Raises:
            Unserved: the graph fails. Where it answers otherwise, it is not asked again.
        """
        written = [at for at, item in enumerate(graph.entry.inputs) if item.mutated]
        given = [each.clone() if at in written else each for at, each in enumerate(inputs)]
        try:
            ours = graph.run(given)
        except BadInput as why:
            raise Unserved("failed", f"{why}") from why
        ours += [given[at] for at in written]
        answer = eager()
        theirs = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        theirs += [inputs[at] for at in written]
        if problem := difference(ours, theirs):
            self._refused[graph.entry.id] = f"graph {graph.entry.id}: {problem}"
        self._waiting.discard(graph.entry.id)
        return answer


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str | None:
    """How a graph's answers differ from the module's, in words; None where they do not."""
    if len(ours) != len(theirs):
        return f"it gives {len(ours)} tensors, the module {len(theirs)}"
    told = (
        golden.difference(f"answer {at}", our, their, golden.TOLERANCE.get(dtype_in(our), 0.0))
        for at, (our, their) in enumerate(zip(ours, theirs, strict=True))
    )
    return next(filter(None, told), None)


def dtype_in(tensor: torch.Tensor) -> str:
    """A tensor's dtype as a manifest names it."""
    return str(tensor.dtype).removeprefix("torch.")
