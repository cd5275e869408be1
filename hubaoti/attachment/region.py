"""A region that is attached: a module's `forward` that its graphs answer, or else the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hubaoti.attachment.binding import ConstantBinding
from hubaoti.attachment.dispatch import Dispatcher
from hubaoti.attachment.first_call import Beside, FirstCallCheck
from hubaoti.attachment.forward_patch import CountMiss, GraphPatch
from hubaoti.attachment.module_guard import ModuleGuard
from hubaoti.attachment.route import Route
from hubaoti.attachment.torch_modes import refuse_modes, refuse_watchers, wants_gradient
from hubaoti.errors import BadInput, KernelFailed, MissingConstant
from hubaoti.runtime.capturing import is_capturing, is_recording, is_rehearsing
from hubaoti.runtime.fallback import CannotServe, explain_failure
from hubaoti.runtime.golden import find_tolerance
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.kv_cache import CacheSlot, CacheState, slide_window


class Region(GraphPatch):
    """A module's `forward` that graphs answer by what their manifest says."""

    __slots__ = ("bindings", "dispatcher", "inside", "_slot", "_guard", "_trials")

    def __init__(
        self, path: str, dispatcher: Dispatcher, graphs: Sequence[Graph], inside: ConstantBinding
    ) -> None:
        super().__init__(path, inside.module, graphs, (entry.id for entry in dispatcher.entries))
        self.bindings = 0  # how often its graphs were bound
        self.dispatcher = dispatcher
        self.inside = inside
        self._slot = CacheSlot(inside.module, dispatcher.entries) if dispatcher.has_cache else None
        self._guard: ModuleGuard | None = None  # nothing is bound
        self._trials = FirstCallCheck(())

    def put(self, count_miss: CountMiss, trials: FirstCallCheck) -> None:
        """Answer from here on; `count_miss` is told of each call that the module answers itself."""
        self._count_miss, self._trials = count_miss, trials
        self._note_tracing = _make_tracing_note(count_miss, self.path)
        self.install()

    def remove(self) -> None:
        """Give the module its own `forward` back, and its tensors."""
        super().remove()
        with self._lock:
            self._guard = None
            graphs, self.graphs = self.graphs, []
            for graph in graphs:
                graph.release()

    def bind(self, *, anew: bool = False) -> None:
        """As every patch of graphs does; where it cannot, nothing stays bound."""
        with self._lock:
            if not anew and self.is_bound():  # another thread was faster
                return
            self._guard = None
            if anew:
                self.inside.forget()
            try:
                guard = self._give()
            except (CannotServe, MissingConstant) as error:
                self.inside.forget()
                for graph in self.graphs:
                    graph.release()
                if isinstance(error, CannotServe):
                    raise
                raise CannotServe("weights", f"{error}") from error
            if self.inside.more:  # what no graph reads may be another by now
                self._trials.restart()
            self._guard = guard
            self.bindings += 1

    def _give(self) -> ModuleGuard:
        """Bind the graphs to the tensors that the module has now."""
        if _is_patched(self._own):
            raise CannotServe("changed", "it had a forward of its own when it was attached")
        tensors, guard = self.inside.find_constants()
        for graph in self.graphs:
            graph.bind(tensors)
        return guard

    def is_bound(self) -> bool:
        """Whether the graphs have the module's tensors as they are now."""
        guard, graphs = self._guard, self.graphs
        return guard is not None and guard.is_same() and not (graphs and graphs[0].is_moved)

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a graph answers to a call that it was compiled for; all others are refused."""
        refuse_watchers()
        guard, graphs = self._guard, self.graphs
        # What a call that is captured uses of others would not be made again at a replay.
        who = None if is_capturing(self.dispatcher.device) else self.path
        if guard is None or not guard.is_same() or graphs[0].is_moved:
            if who is None and not is_rehearsing():  # what is made of weights would not be made now
                raise CannotServe("capture", "its tensors were changed since it was called")
            refuse_modes(self.dispatcher.device)
            self.bind()
            guard, graphs = self._guard, self.graphs
        if guard is None or not graphs:
            raise CannotServe("changed", "it is bound anew, or detached, in another thread")
        guard.refuse_collecting()
        if torch.is_grad_enabled() and guard.wants_gradients():
            raise CannotServe("gradients", "the region's parameters are trained")
        dispatcher = self.dispatcher
        found = dispatcher.plan.flatten(args, kwargs)
        if torch.is_grad_enabled() and any(map(wants_gradient, found)):
            raise CannotServe("gradients", "gradients are wanted of an input")
        if self._slot is None:
            return self._dispatch(graphs, found, None, (args, kwargs), who)
        rows, seq = dispatcher.read_sizes(found)
        held = self._slot.get_state(found[dispatcher.plan.count], rows, seq, dispatcher.device)
        try:
            held.require_room()
            dispatcher.add_cache(found, held)
            return self._dispatch(graphs, found, held, (args, kwargs), who)
        except CannotServe:
            held.undo()
            raise

    def _dispatch(
        self,
        graphs: Sequence[Graph],
        found: list[Any],
        held: CacheState | None,
        call: tuple[Sequence[Any], Mapping[str, Any]],
        who: str | None,
    ) -> Any:
        """The answer of the graph to which a call's tensors find their route.

        `who` asks is None in a call that is captured.
        """
        dispatcher, (args, kwargs) = self.dispatcher, call
        count = dispatcher.plan.count
        inputs, numbers = found[:count], found[count + 1 :]
        if held is not None and held.slides:
            inputs.pop()  # a full window has no position
        route = dispatcher.find_route(inputs, numbers, held, who)
        inputs = dispatcher.follow(route, inputs, held, who)
        graph, answers = graphs[route.graph], dispatcher.answers[route.graph]
        filling = (
            answers.find(dispatcher.plan.name_arguments(args, kwargs)) if answers.writes else None
        )
        is_new = self._trials.wants(graph.entry.id)
        if who is None and not is_rehearsing():
            _require_called(graph, is_new)
            if not is_recording():
                graph.hold_for_ever()
        if is_new:
            eager = partial(self.eager, *args, **kwargs)
            slide = partial(slide_window, graph.entry.cache, held)
            arguments = dispatcher.plan.name_arguments(args, kwargs)
            coarsest = find_tolerance(graph.entry)
            beside = Beside(eager, arguments, answers, filling, slide, coarsest)
            answer = self._trials.compare(graph, inputs, route.small, beside)
            next(self._compared[graph.entry.id])
            return answer
        outputs = self._run(route, graph, inputs, held)
        return answers.make(outputs) if filling is None else answers.fill(filling, outputs)

    def _run(
        self, route: Route, graph: Graph, inputs: list[torch.Tensor], held: CacheState | None
    ) -> list[torch.Tensor]:
        """Have a graph answer, and count it."""
        slide_window(graph.entry.cache, held, inputs)
        try:
            outputs = graph.run(inputs, route.small)
        except (BadInput, KernelFailed) as error:
            if _may_have_written(graph, held):
                raise  # nobody could answer now
            raise explain_failure(error) from error
        if held is not None:
            held.count_written()
        next(self._counts[graph.entry.id])
        return outputs


def _require_called(graph: Graph, is_new: bool) -> None:
    """Refuse to have a graph captured that was not called before.

    Raises:
        CannotServe: it has not loaded its kernels yet.
    """
    if is_new or not graph.is_called:
        raise CannotServe("capture", f"graph {graph.entry.id} has not been called before")


def _may_have_written(graph: Graph, held: CacheState | None) -> bool:
    """Whether a graph that failed may have left its inputs otherwise than a module would mind.

    A window has moved on already. What goes into the places of any other cache goes there again.
    """
    if held is not None and held.slides:
        return True
    cache = graph.entry.cache
    again = set() if cache is None else {cache.keys, cache.values}
    return any(item.mutated and n not in again for n, item in enumerate(graph.entry.inputs))


def _is_patched(own: Any) -> bool:
    """Whether a module has a `forward` that is not its class's; a copy may have that as its own."""
    function, of = getattr(own, "__func__", None), type(getattr(own, "__self__", None))
    return own is not None and (function is None or function is not getattr(of, "forward", None))


def _make_tracing_note(count_miss: CountMiss, path: str) -> Callable[[], None]:
    """What tells that a module is compiled or exported by somebody else: once, while it is."""

    def count_tracing() -> None:
        count_miss(path, CannotServe("tracing", "the module is compiled or exported"))

    note: Callable[[], None] = torch.compiler.assume_constant_result(count_tracing)  # type: ignore[no-untyped-call]
    return note
