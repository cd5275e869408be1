"""A region that is attached: a module's `forward` that its graphs answer, or else the module."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hubaoti.errors import BadInput
from hubaoti.manifest import Constant
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.inside import Inside
from hubaoti.runtime.kv import Held, Place
from hubaoti.runtime.modes import refuse_watchers
from hubaoti.runtime.reasons import Unserved
from hubaoti.runtime.trial import Trials
from hubaoti.runtime.ways import Ways

Missed = Callable[[str, Unserved], None]


class Region:
    """What answers in the place of a module's `forward`.

    It is an attribute of the module and of nothing else: whoever copies, pickles or exports the
    module gets the module as it was.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        ways: Ways,
        graphs: Sequence[Graph],
        shipped: Mapping[str, torch.Tensor],
    ) -> None:
        self.path = path
        self.ways = ways
        self.graphs = list(graphs)
        self.inside = Inside(module, constants_of(graphs), shipped)
        self._own = vars(module).get("forward")
        self._class_s = type(module).forward
        self._place = Place(module, ways.entries) if ways.has_cache else None
        self._counts = [itertools.count() for _ in graphs]
        self._missed: Missed = ignore
        self._trials = Trials(())
        self._note_tracing = noting(ignore, path)

    def counts(self) -> dict[str, int]:
        """How many calls each graph answered."""
        # A count tells its next number to whoever copies it; counting by `next` is safe in threads.
        pairs = zip(self.ways.entries, self._counts, strict=True)
        return {entry.id: int(count.__reduce__()[1][0]) for entry, count in pairs}

    def put(self, missed: Missed, trials: Trials) -> None:
        """Answer from here on; `missed` is told of each call that the module answers itself."""
        self._missed, self._trials = missed, trials
        self._note_tracing = noting(missed, self.path)
        self.inside.module.forward = self

    def take_away(self) -> None:
        """Give the module its own `forward` back.

        Where somebody else has put theirs over it meanwhile, it stays, and only calls the module's.
        """
        module = self.inside.module
        if vars(module).get("forward") is self:
            del module.forward
            if self._own is not None:
                module.forward = self._own
        self.graphs = []
        self.ways.adapted.clear()

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself answers."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        return self._class_s(self.inside.module, *args, **kwargs)

    def bind(self) -> None:
        """Give the graphs the module's tensors as they are now.

        Raises:
            Unserved: the module is not what it was, or a tensor does not fit.
        """
        tensors = self.inside.tensors(self.ways.device)
        for graph in self.graphs:
            graph.bind(tensors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self._note_tracing()
            return self.eager(*args, **kwargs)
        if not self.graphs:
            return self.eager(*args, **kwargs)
        try:
            return self._answer(args, kwargs)
        except Unserved as why:
            self._missed(self.path, why)
        return self.eager(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as the module's own `forward`."""
        if self._own is not None:
            return copy.copy, (self._own,)
        return getattr, (self.inside.module, "forward")

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a graph answers.

        Raises:
            Unserved: none can, with the reason.
        """
        refuse_watchers()
        if not self.inside.is_same() or self.graphs[0].is_moved:
            self.bind()
        if torch.is_grad_enabled() and self.inside.wants_gradients():
            raise Unserved("gradients", "the region's parameters are trained")
        ways = self.ways
        found = ways.plan.flat(args, kwargs)
        if self._place is None:
            return self._through(found, None, args, kwargs)
        rows, seq = ways.sizes_of(found)
        held = self._place.held(found[ways.plan.count], rows, seq, ways.device)
        try:
            held.require_room()
            ways.with_cache(found, held)
            return self._through(found, held, args, kwargs)
        except Unserved:
            held.undo()
            raise

    def _through(
        self, found: list[Any], held: Held | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The answer of the graph to which a call's tensors find their way."""
        ways = self.ways
        count = ways.plan.count
        inputs, numbers = found[:count], found[count + 1 :]
        if held is not None and held.is_full:
            inputs.pop()  # a full window has no position
        way = ways.of(inputs, numbers, held)
        return self._run(way.graph, ways.follow(way, inputs, held), held, args, kwargs)

    def _run(
        self,
        at: int,
        inputs: list[torch.Tensor],
        held: Held | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Have a graph answer, or try it beside the module where it was never tried."""
        graph, answer = self.graphs[at], self.ways.answers[at]
        if self._trials.wants(graph.entry.id):
            return self._trials.hold(graph, inputs, lambda: self.eager(*args, **kwargs))
        try:
            outputs = graph.run(inputs)
        except BadInput as why:
            if held is not None and held.is_full:
                raise  # the window has moved on already: nobody could answer now
            raise Unserved("failed", f"{why}") from why
        if held is not None:
            held.wrote()
        next(self._counts[at])
        return answer(outputs)


def ignore(path: str, why: Unserved) -> None:
    """Nobody is told."""


def noting(missed: Missed, path: str) -> Callable[[], None]:
    """What tells that a module is compiled or exported by somebody else: once, while it is."""

    def traced() -> None:
        missed(path, Unserved("tracing", "the module is compiled or exported"))

    told: Callable[[], None] = torch.compiler.assume_constant_result(traced)  # type: ignore[no-untyped-call]
    return told


def constants_of(graphs: Sequence[Graph]) -> list[Constant]:
    """The constants of all graphs of a module, each once."""
    return [*{each.fqn: each for graph in graphs for each in graph.entry.constants}.values()]
