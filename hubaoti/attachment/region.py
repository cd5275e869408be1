"""A region that is attached: a module's `forward` that its graphs answer, or else the module."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from hubaoti.attachment.binding import ConstantBinding
from hubaoti.attachment.dispatch import Dispatcher, Route
from hubaoti.attachment.first_call import Beside, FirstCallCheck
from hubaoti.attachment.module_guard import ModuleGuard
from hubaoti.attachment.torch_modes import refuse_modes, refuse_watchers
from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.kv_cache import (
    CacheSlot,
    CacheState,
    explain_capture,
    is_capturing,
    slide_window,
)

Missed = Callable[[str, CannotServe], None]


class Located(Protocol):
    """Where a region's module is, while it is anywhere."""

    @property
    def is_gone(self) -> bool: ...

    @property
    def module(self) -> nn.Module: ...


class Answering(Protocol):
    """A module's `forward` that graphs answer: a region, or one of a package without a manifest."""

    @property
    def path(self) -> str: ...

    @property
    def graphs(self) -> Sequence[Any]: ...

    @property
    def inside(self) -> Located: ...

    def bind(self, *, anew: bool = False) -> None: ...

    def counts(self) -> Mapping[str, int]: ...

    def take_away(self) -> None: ...


class Region:
    """What answers in the place of a module's `forward`.

    It is an attribute of the module and of nothing else: whoever copies, pickles or exports the
    module gets the module as it was. Only a shallow copy shares it, and answers as the original.
    """

    def __init__(
        self,
        path: str,
        ways: Dispatcher,
        graphs: Sequence[Graph],
        inside: ConstantBinding,
    ) -> None:
        self.path = path
        self.ways = ways
        self.graphs = list(graphs)
        self.inside = inside
        module = inside.module
        self._own = vars(module).get("forward")
        self._place = CacheSlot(module, ways.entries) if ways.has_cache else None
        self._watch: ModuleGuard | None = None  # nothing is bound
        self._lock = threading.Lock()
        self._counts = [itertools.count() for _ in graphs]
        self._missed: Missed = ignore_miss
        self._trials = FirstCallCheck(())
        self._note_tracing = _make_tracing_note(ignore_miss, path)

    def counts(self) -> dict[str, int]:
        """How many calls each graph answered, by the ids of the graphs."""
        # `count(7)`: counting by `next` is safe in threads, and so one asks without counting.
        pairs = zip(self.ways.entries, self._counts, strict=True)
        return {entry.id: int(repr(count)[6:-1]) for entry, count in pairs}

    def put(self, missed: Missed, trials: FirstCallCheck) -> None:
        """Answer from here on; `missed` is told of each call that the module answers itself."""
        self._missed, self._trials = missed, trials
        self._note_tracing = _make_tracing_note(missed, self.path)
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
        """What the module itself answers to a call, by the `forward` that it had."""
        if self._own is not None:
            return self._own(*args, **kwargs)
        module = self.inside.module
        return type(module).forward(module, *args, **kwargs)

    def bind(self, *, anew: bool = False) -> None:
        """Give the graphs the module's tensors as they are now; what is made of them, if need be.

        Raises:
            CannotServe: the module is not what it was, or a tensor does not fit. Nothing stays
                bound.
        """
        with self._lock:
            if not anew and self._is_bound():  # another thread was faster
                return
            self._watch = None
            if anew:
                self.inside.forget()
            try:
                watch = self._give()
            except (CannotServe, MissingConstant) as error:
                self.inside.forget()
                for graph in self.graphs:
                    graph.release()
                if isinstance(error, CannotServe):
                    raise
                raise CannotServe("weights", f"{error}") from error
            if self.inside.more:  # what no graph reads may be another by now
                self._trials.again()
            self._watch = watch

    def _give(self) -> ModuleGuard:
        """Bind the graphs to the tensors that the module has now.

        Raises:
            CannotServe, MissingConstant: the module is not what it was, or a tensor does not fit.
        """
        if _is_patched(self._own):
            raise CannotServe("changed", "it had a forward of its own when it was attached")
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
        except CannotServe as why:
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
            CannotServe: none can, with the reason.
        """
        refuse_watchers()
        watch, graphs = self._watch, self.graphs
        if watch is None or not watch.is_same() or graphs[0].is_moved:
            refuse_modes(self.ways.device)
            self.bind()
            watch, graphs = self._watch, self.graphs
        if watch is None or not graphs:
            raise CannotServe("changed", "it is bound anew, or detached, in another thread")
        watch.refuse_collecting()
        if torch.is_grad_enabled() and watch.wants_gradients():
            raise CannotServe("gradients", "the region's parameters are trained")
        ways = self.ways
        found = ways.plan.flatten(args, kwargs)
        if torch.is_grad_enabled() and any(map(wants_gradient, found)):
            raise CannotServe("gradients", "gradients are wanted of an input")
        if self._place is None:
            if is_capturing(ways.device):
                raise explain_capture()
            return self._through(graphs, found, None, args, kwargs)
        rows, seq = ways.sizes_of(found)
        held = self._place.get_state(found[ways.plan.count], rows, seq, ways.device)
        try:
            held.require_room()
            ways.with_cache(found, held)
            return self._through(graphs, found, held, args, kwargs)
        except CannotServe:
            held.undo()
            raise

    def _through(
        self,
        graphs: Sequence[Graph],
        found: list[Any],
        held: CacheState | None,
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
        filling = answers.find(ways.plan.name_arguments(args, kwargs)) if answers.writes else None
        if self._trials.wants(graph.entry.id):
            eager = partial(self.eager, *args, **kwargs)
            slide = partial(slide_window, graph.entry.cache, held)
            call = Beside(eager, ways.plan.name_arguments(args, kwargs), answers, filling, slide)
            return self._trials.hold(graph, inputs, way.small, call)
        outputs = self._run(way, graph, inputs, held)
        return answers.make(outputs) if filling is None else answers.fill(filling, outputs)

    def _run(
        self, way: Route, graph: Graph, inputs: list[torch.Tensor], held: CacheState | None
    ) -> list[torch.Tensor]:
        """Have a graph answer, and count it."""
        slide_window(graph.entry.cache, held, inputs)
        try:
            outputs = graph.run(inputs, way.small)
        except BadInput as why:
            if held is not None and held.slides:
                raise  # the window has moved on already: nobody could answer now
            raise CannotServe("failed", f"{why}") from why
        if held is not None:
            held.count_written()
        next(self._counts[way.graph])
        return outputs


def _is_patched(own: Any) -> bool:
    """Whether a module has a `forward` that is not its class's; a copy may have that as its own."""
    function, of = getattr(own, "__func__", None), type(getattr(own, "__self__", None))
    return own is not None and (function is None or function is not getattr(of, "forward", None))


def wants_gradient(item: Any) -> bool:
    """Whether gradients are wanted of what a call gives."""
    return isinstance(item, torch.Tensor) and item.requires_grad


def ignore_miss(path: str, error: CannotServe) -> None:
    """Tell nobody that no graph answered a call; what regions do until they are put."""


def _make_tracing_note(missed: Missed, path: str) -> Callable[[], None]:
    """What tells that a module is compiled or exported by somebody else: once, while it is."""

    def count_tracing() -> None:
        missed(path, CannotServe("tracing", "the module is compiled or exported"))

    note: Callable[[], None] = torch.compiler.assume_constant_result(count_tracing)  # type: ignore[no-untyped-call]
    return note
