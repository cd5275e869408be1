"""A model's decoding steps as CUDA graphs: what a step launches is captured once, and replayed.

A step is a call of one token for each row over a static cache. The first one over a cache is
rehearsed, so that all kernels are loaded; the second is captured; all others are replayed, as long
as the cache, the weights and the parts of the model are those that were captured. Python sees
nothing of a replay.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hubaoti.attachment.forward_patch import CountMiss, ForwardPatch
from hubaoti.attachment.masks import Says, find_step_mask, read_step_mask, show_unfilled
from hubaoti.attachment.module_guard import ModuleGuard
from hubaoti.attachment.region import Region
from hubaoti.attachment.step_call import LITERALS, Call, Look, Place, sort_arguments
from hubaoti.attachment.torch_modes import refuse_modes, refuse_watchers
from hubaoti.errors import first_line
from hubaoti.program.adapters import separate_adapters
from hubaoti.runtime.capturing import is_capturing, record, rehearse, tell
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.input_checks import address
from hubaoti.runtime.kv_cache import list_static_tensors
from hubaoti.runtime.locks import ForkSafeLock

MOST = 8  # steps that are kept; a step has memory of its own for what it computes

# Of a config.
_FLAGS = ("output_attentions", "output_hidden_states", "return_dict", "_attn_implementation")
_UNASKED = {"forward", "_cache"}  # of the model's own attributes: ours, and what is given anyway
# Tables of positions that are made anew where a text is long, which is asked of each step.
_READ_POSITIONS = {"dynamic", "longrope"}
_ALONE = ForkSafeLock()  # one capture at a time: what a process synchronizes meanwhile ends it
_CACHE = object()  # stands in a kept answer for the caller's own


@dataclass(slots=True)
class _Step:
    """A captured step: what is written before a replay, and what is read after it."""

    graph: Any
    stream: Any
    given: dict[Place, torch.Tensor]
    answer: Any
    held: list[Any]  # the kernels and constants that are used, which a CUDA graph does not keep
    lock: threading.Lock = field(default_factory=threading.Lock)

    def replay(self, call: Call) -> Any:
        """The answer to the tensors of a call, in memory of its own."""
        with self.lock:
            stream = torch.cuda.current_stream(self.stream.device)
            if stream != self.stream:  # what is under way there reads what is written here
                stream.wait_stream(self.stream)
                self.stream = stream
                for tensor in self.given.values():
                    tensor.record_stream(stream)
            for place, tensor in self.given.items():
                tensor.copy_(call.tensors[place], non_blocking=True)
            self.graph.replay()
            return _map_answer(_copy_tensor, {_CACHE: call.cache}, self.answer)


class StepReplays(ForwardPatch):
    """A model's `forward` of which decoding steps are replayed; all other calls are its own."""

    __slots__ = (
        *("_device", "_regions", "_takes_lengths", "_registered", "_replayed"),
        *("_guard", "_addresses", "_inner", "_attributes", "_forgotten", "_bindings", "_looks"),
        "_rehearsed",
        *("_caches", "_steps", "_met", "_refused"),
    )

    def __init__(self, module: nn.Module, regions: Sequence[Region], device: torch.device) -> None:
        super().__init__("", module)
        self._device, self._regions = device, [*regions]
        self._takes_lengths = any(each.dispatcher.takes_lengths for each in regions)
        # The first graph of a generator takes memory for it, and one for which there is none ends
        # the process (`~CUDAGraph`, torch 2.11 to 2.15): so it is taken here, and not in a capture.
        self._registered = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[device.index or 0]
        self._registered.register_generator_state(generator)
        self._replayed = itertools.count()
        self._guard: ModuleGuard | None = None
        self._addresses: list[tuple[torch.Tensor, int]] = []
        self._inner: list[dict[str, Any]] = []
        self._attributes: list[dict[str, Any]] = []
        self._forgotten = 0  # how often
        self._bindings: list[int] = []
        self._rehearsed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._looks: weakref.WeakKeyDictionary[Any, set[Look]] = weakref.WeakKeyDictionary()
        self._caches: weakref.WeakKeyDictionary[Any, Look] = weakref.WeakKeyDictionary()
        self._steps: dict[Look, _Step] = {}
        self._met: dict[Look, None] = {}
        self._refused: dict[Look, None] = {}

    def put(self, count_miss: CountMiss) -> None:
        """Answer from here on."""
        self._count_miss = count_miss
        self.install()

    def remove(self) -> None:
        """Give the module its own `forward` back, and all memory of its steps."""
        super().remove()
        self.forget()

    def stats(self) -> dict[str, int]:
        """How many steps are captured, the bytes that all of them hold, and replays so far."""
        steps = [*self._steps.values()]
        pools = {step.graph.pool() for step in steps}
        return {
            "captured": len(steps),
            "bytes": sum(map(_count_pool_bytes, pools)),
            "replayed": int(repr(self._replayed)[6:-1]),
        }

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a replay answers to a step; the module itself answers what is none."""
        call = self._read_step(args, kwargs)
        if call is None:
            return self.eager(*args, **kwargs)
        if not self._is_same():
            self.forget()
            self._look_at_module()
        step = self._steps.get(call.look)
        is_refused = step is None and call.look in self._refused
        if step is None and not is_refused and call.look not in self._met:
            if self._rehearsed.get(call.cache, 0) < MOST:
                return self._rehearse(call)
            raise CannotServe(
                "capture",
                f"{MOST} steps over a cache and none like one before: a mask of all its places, as "
                "generate gives it, has one shape",
            )
        # A block whose tensors were changed is bound anew by the model's own step.
        if is_refused or not self._are_bound():
            return self.eager(*args, **kwargs)
        if step is None:
            with _ALONE:
                step = self._capture(call)
        next(self._replayed)
        return step.replay(call)

    def _read_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """A call as a step, if it is one."""
        if torch.is_grad_enabled() or self.module.training or is_capturing(self._device):
            return None
        found = sort_arguments(args, kwargs)
        if found is None or found.tokens != 1 or len(found.caches) != 1:
            return None
        (cache,) = found.caches
        held = list_static_tensors(cache, self._device)
        if held is None or any(each.device != self._device for each in found.tensors.values()):
            return None
        try:  # autocast drops the weights that it casts; a watcher sees nothing of a replay
            refuse_watchers()
            refuse_modes(self._device)
        except CannotServe:
            return None
        where = tuple((address(each), each.shape) for each in held)
        if self._caches.setdefault(cache, where) != where:  # as beams do at each step
            self._caches[cache] = where
            return None
        config = getattr(self.module, "config", None)
        flags = [torch.is_inference_mode_enabled(), *(getattr(config, flag, 0) for flag in _FLAGS)]
        told = self._find_told(found.tensors, cache)
        look = (*flags, *found.look, where, told)
        return Call(args, kwargs, found.tensors, cache, told, look)

    def _find_told(self, tensors: Mapping[Place, torch.Tensor], cache: Any) -> Place | None:
        """Where the mask of a step stands, if graphs may be told lengths in its place."""
        if not self._takes_lengths:
            return None
        rows, _, places, _ = cache.layers[0].keys.shape
        place = find_step_mask(tensors, rows, places)
        if place is None or read_step_mask(tensors[place], _list_counts(cache)) is not Says.PADDED:
            return None
        return place

    def _run(self, call: Call, tensors: Mapping[Place, torch.Tensor]) -> Any:
        """What the model answers to a step, with these tensors in their places."""
        args, kwargs = call.replace(tensors)
        if call.told is None:
            return self.eager(*args, **kwargs)
        mask, count = tensors[call.told], _list_counts(call.cache)[0]
        with tell(mask, show_unfilled(mask, count)):
            return self.eager(*args, **kwargs)

    def _rehearse(self, call: Call) -> Any:
        """What the model answers to the first step of its look, as if it were captured."""
        self._rehearsed[call.cache] = self._rehearsed.get(call.cache, 0) + 1
        with rehearse():
            answer = self._run(call, call.tensors)
        self._bindings = [region.bindings for region in self._regions]
        if self._are_bound():
            _remember(self._met, call.look)
        else:
            _remember(self._refused, call.look)
            problem = CannotServe("capture", "a step: some of its blocks have no graph now")
            self._count_miss(self.path, problem)
        return answer

    def _capture(self, call: Call) -> _Step:
        """Capture a step.

        Raises:
            CannotServe: it cannot be captured; it is not tried again.
        """
        given = {place: tensor.clone() for place, tensor in call.tensors.items()}
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        while len(self._steps) >= MOST:
            _drop_oldest(self._steps)
        held = [graph.hold() for region in self._regions for graph in region.graphs]
        before = self._forgotten
        answer, problem = None, self._find_obstacle()
        try:
            if not problem:
                with record(), _capture_into(graph, self._device):
                    answer = self._run(call, given)
                # Whoever has the cache has the step, and not the other way round.
                answer = _map_answer(_return_same, {call.cache: _CACHE}, answer)
        except Exception as error:  # of the module, of the driver, or no memory
            problem = first_line(error)
        if problem:  # with the error goes what its frames hold, which the module needs now
            del graph, given, answer, held
            gc.collect()
            _remember(self._refused, call.look)
            _settle(self._device)
            raise CannotServe("capture", f"a step: {problem}")
        if self._forgotten != before:  # by another thread: of which weights it is nobody knows
            raise CannotServe("capture", "the model was changed while a step was captured")
        step = _Step(graph, current, given, answer, held)
        self._keep(step, call)
        return step

    def _keep(self, step: _Step, call: Call) -> None:
        """Keep a step for as long as its cache is there."""
        looks = self._looks.get(call.cache)
        if looks is None:
            looks = self._looks[call.cache] = set()
            weakref.finalize(call.cache, _drop, self._steps, looks).atexit = False
        looks.add(call.look)
        self._rehearsed.pop(call.cache, None)
        self._steps[call.look] = step

    def _find_obstacle(self) -> str:
        """What of the model is known to look at numbers of a step in Python; else nothing."""
        for part in self.module.modules():
            if (kind := getattr(part, "rope_type", None)) in _READ_POSITIONS:
                return f"{type(part).__name__} ({kind}) reads positions in Python"
        return ""

    def _is_same(self) -> bool:
        """Whether the model has the parts and tensors that were captured."""
        if self._guard is None or not self._guard.is_same():
            return False
        if self._bindings and self._bindings != [region.bindings for region in self._regions]:
            return False
        if not all(address(tensor) == place for tensor, place in self._addresses):
            return False
        try:
            return self._read_attributes() == self._attributes
        except Exception:  # of two values that cannot be compared, as of other tensors
            return False

    def _read_attributes(self) -> list[dict[str, Any]]:
        """What all parts have as plain attributes: a replay has what a step made of them.

        The same things are equal at once; it is they that a replay reads, so whoever has the list
        keeps them.
        """
        own = {name: each for name, each in vars(self.module).items() if name not in _UNASKED}
        return [own, *self._inner]

    def _are_bound(self) -> bool:
        """Whether all blocks have graphs that read their tensors as they are now."""
        return all(region.is_bound() for region in self._regions)

    def _look_at_module(self) -> None:
        """Note what the model is now.

        Raises:
            CannotServe: it has what a replay would leave out.
        """
        module = self.module
        adapters = [(each, each.state()) for each in separate_adapters(module)[1]]
        guard = ModuleGuard(module, (), adapters)
        if not guard.is_same():
            raise CannotServe("hooks", "a part of the model has a hook, or is trained")
        tensors = [*module.parameters(), *module.buffers()]
        self._guard, self._addresses = guard, [(each, address(each)) for each in tensors]
        self._inner = [vars(part) for part in [*module.modules()][1:]]
        self._attributes = [dict(each) for each in self._read_attributes()]

    def forget(self) -> None:
        """Nothing is captured any more: what was, is of another model."""
        self._forgotten += 1
        self._guard, self._addresses, self._bindings = None, [], []
        self._inner, self._attributes = [], []
        for known in (self._steps, self._met, self._refused):
            known.clear()


def _drop(steps: dict[Look, _Step], looks: set[Look]) -> None:
    """Let go of the steps of a cache that is gone."""
    for look in looks:
        steps.pop(look, None)


def _list_counts(cache: Any) -> list[torch.Tensor]:
    """How many places each layer of a static cache has filled, on its device."""
    return [layer.cumulative_length for layer in cache.layers]


@contextmanager
def _capture_into(graph: Any, device: torch.device) -> Iterator[None]:
    """Capture what is launched, in a stream of its own, which is left whatever happens.

    Where a capture fails, torch 2.11 leaves it the current one.
    """
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    captured = torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local")
    with torch.cuda.stream(side), captured:
        yield


def _settle(device: torch.device) -> None:
    """Have torch's generator know that nothing is captured: one that failed never told it."""
    place = torch.empty(1, device=device)
    with suppress(RuntimeError), _capture_into(torch.cuda.CUDAGraph(), device):
        place.zero_()


def _map_answer(
    change: Callable[[torch.Tensor], torch.Tensor], others: Mapping[Any, Any], answer: Any
) -> Any:
    """An answer with other tensors, and others in the place of some things."""

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if leaf is _CACHE or hasattr(leaf, "layers"):
            return others[leaf]
        if not isinstance(leaf, LITERALS):  # which the next replay would change
            raise TypeError(f"it answers a {type(leaf).__name__}")
        return leaf

    return pytree.tree_map(replace, answer, is_leaf=lambda leaf: hasattr(leaf, "layers"))


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _return_same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _remember(known: dict[Look, None], look: Look) -> None:
    """Note a look of steps; the oldest are forgotten."""
    while len(known) >= 8 * MOST:
        _drop_oldest(known)
    known[look] = None


def _drop_oldest(known: dict[Look, Any]) -> None:
    """Forget the first that was noted, unless another thread was faster."""
    with suppress(KeyError, RuntimeError, StopIteration):
        del known[next(iter(known))]


def _count_pool_bytes(pool: Any) -> int:
    """The bytes that a captured step holds of the device."""
    segments: Any = torch.cuda.memory_snapshot(pool)  # type: ignore[no-untyped-call]
    return sum(int(segment["total_size"]) for segment in segments)
