"""A region that is attached: a module's `forward` that its graphs answer, or else the module."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.inside import Inside
from hubaoti.runtime.kv import Held, Place, captured, is_capturing, slide_in
from hubaoti.runtime.modes import refuse_modes, refuse_watchers
from hubaoti.runtime.reasons import Unserved
from hubaoti.runtime.trial import Beside, Trials
from hubaoti.runtime.watch import Watch
from hubaoti.runtime.ways import Way, Ways

Missed = Callable[[str, Unserved], None]


class Region:
    """What answers in the place of a module's `forward`.

    It is an attribute of the module and of nothing else: whoever copies, pickles or exports the
    module gets the module as it was. Only a shallow copy shares it, and answers as the original.
    """

    def __init__(
        self,
        path: str,
        ways: Ways,
        graphs: Sequence[Graph],
        inside: Inside,
    ) -> None:
        self.path = path
        self.ways = ways
        self.graphs = list(graphs)
        self.inside = inside
        module = inside.module
        self._own = vars(module).get("forward")
        self._place = Place(module, ways.entries) if ways.has_cache else None
        self._watch: Watch | None = None  # nothing is bound
        self._lock = threading.Lock()
        self._counts = [itertools.count() for _ in graphs]
        self._missed: Missed = ignore
        self._trials = Trials(())
        self._note_tracing = noting(ignore, path)

    def counts(self) -> dict[str, int]:
        """How many calls each graph answered."""
        # `count(7)`: counting by `next` is safe in threads, and so one asks without counting.
        pairs = zip(self.ways.entries, self._counts, strict=True)
        return {entry.id: int(repr(count)[6:-1]) for entry, count in pairs}

    def put(self, missed: Missed, trials: Trials) -> None:
        """Answer from here on; `missed` is told of each call that the module answers itself."""
        self._missed, self._trials = missed, trials
        self._note_tracing = noting(missed, self.path)
        self.inside.module.forward = self

    def take_away(self) -> None:
        """Give the module its own `forward` back.

        Where somebody else has put theirs over it meanwhile, it stays, and only calls the module's.
        """
        if not self.inside.is_gone:
            module = self.inside.module
            if vars(module).get("forward") is self:
                del module.forward
                if self._own is not None:
                    module.forward = self._own
        with self._lock:
            self._watch = None
            graphs, self.graphs = self.graphs, []
            for graph in graphs:
                graph.release()

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself answers."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        module = self.inside.module
        return type(module).forward(module, *args, **kwargs)

    def bind(self, *, anew: bool = False) -> None:
        """Give the graphs the module's tensors as they are now; what is made of them, if need be.

        Raises:
            Unserved: the module is not what it was, or a tensor does not fit. Nothing stays bound.
        """
        with self._lock:
            if not anew and self._is_bound():  # another thread was faster
                return
            self._watch = None
            if anew:
                self.inside.forget()
            try:
                watch = self._give()
            except (Unserved, MissingConstant) as why:
                self.inside.forget()
                for graph in self.graphs:
                    graph.release()
                if isinstance(why, Unserved):
                    raise
                raise Unserved("weights", f"{why}") from why
            if self.inside.more:  # what no graph reads may be another by now
                self._trials.again()
            self._watch = watch

    def _give(self) -> Watch:
        """Bind what the module has now."""
        if is_patched(self._own):
            raise Unserved("changed", "it had a forward of its own when it was attached")
        tensors, watch = self.inside.look(self.ways.device)
        for graph in self.graphs:
            graph.bind(tensors)
        return watch

    def _is_bound(self) -> bool:
        """Whether the graphs have the module's tensors as they are now."""
        watch, graphs = self._watch, self.graphs
        return watch is not None and watch.is_same() and not (graphs and graphs[0].is_moved)

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
        watch, graphs = self._watch, self.graphs
        if watch is None or not watch.is_same() or graphs[0].is_moved:
            refuse_modes(self.ways.device)
            self.bind()
            watch, graphs = self._watch, self.graphs
        if watch is None or not graphs:
            raise Unserved("changed", "it is bound anew, or detached, in another thread")
        watch.refuse_collecting()
        if torch.is_grad_enabled() and watch.wants_gradients():
            raise Unserved("gradients", "the region's parameters are trained")
        ways = self.ways
        found = ways.plan.flat(args, kwargs)
        if torch.is_grad_enabled() and any(map(wants_gradient, found)):
            raise Unserved("gradients", "gradients are wanted of an input")
        if self._place is None:
            if is_capturing(ways.device):
                raise captured()
            return self._through(graphs, found, None, args, kwargs)
        rows, seq = ways.sizes_of(found)
        held = self._place.held(found[ways.plan.count], rows, seq, ways.device)
        try:
            held.require_room()
            ways.with_cache(found, held)
            return self._through(graphs, found, held, args, kwargs)
        except Unserved:
            held.undo()
            raise

    def _through(
        self,
        graphs: Sequence[Graph],
        found: list[Any],
        held: Held | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The answer of the graph to which a call's tensors find their way."""
        ways = self.ways
        count = ways.plan.count
        inputs, numbers = found[:count], found[count + 1 :]
        if held is not None and held.slides:
            inputs.pop()  # a full window has no position
        way = ways.of(inputs, numbers, held)
        inputs = ways.follow(way, inputs, held, self.path)
        graph, answers = graphs[way.graph], ways.answers[way.graph]
        filling = answers.find(ways.plan.named(args, kwargs)) if answers.writes else None
        if self._trials.wants(graph.entry.id):
            eager = partial(self.eager, *args, **kwargs)
            slide = partial(slide_in, graph.entry.cache, held)
            call = Beside(eager, ways.plan.named(args, kwargs), answers, filling, slide)
            return self._trials.hold(graph, inputs, way.small, call)
        outputs = self._run(way, graph, inputs, held)
        return answers.make(outputs) if filling is None else answers.fill(filling, outputs)

    def _run(
        self, way: Way, graph: Graph, inputs: list[torch.Tensor], held: Held | None
    ) -> list[torch.Tensor]:
        """Have a graph answer, and count it."""
        slide_in(graph.entry.cache, held, inputs)
        try:
            outputs = graph.run(inputs, way.small)
        except BadInput as why:
            if held is not None and held.slides:
                raise  # the window has moved on already: nobody could answer now
            raise Unserved("failed", f"{why}") from why
        if held is not None:
            held.wrote()
        next(self._counts[way.graph])
        return outputs


def is_patched(own: Any) -> bool:
    """Whether a module has a `forward` that is not its class's; a copy may have that as its own."""
    function, of = getattr(own, "__func__", None), type(getattr(own, "__self__", None))
    return own is not None and (function is None or function is not getattr(of, "forward", None))


def wants_gradient(item: Any) -> bool:
    """Whether gradients are wanted of what a call gives."""
    return isinstance(item, torch.Tensor) and item.requires_grad


def ignore(path: str, why: Unserved) -> None:
    """Nobody is told."""


def noting(missed: Missed, path: str) -> Callable[[], None]:
    """What tells that a module is compiled or exported by somebody else: once, while it is."""

    def traced() -> None:
        missed(path, Unserved("tracing", "the module is compiled or exported"))

    told: Callable[[], None] = torch.compiler.assume_constant_result(traced)  # type: ignore[no-untyped-call]
    return told
