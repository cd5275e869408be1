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
from hubaoti.attachment.module_guard import ModuleGuard
from hubaoti.attachment.region import Region
from hubaoti.attachment.torch_modes import refuse_modes, refuse_watchers
from hubaoti.errors import first_line
from hubaoti.program.adapters import separate_adapters
from hubaoti.runtime.capturing import is_capturing, record, rehearse
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.input_checks import address
from hubaoti.runtime.kv_cache import list_static_tensors

MOST = 8  # steps that are kept; a step has memory of its own for what it computes

_LITERALS = (bool, int, float, str, type(None))
_PLAIN = (torch.Tensor, nn.Parameter)

_FLAGS = ("output_attentions", "output_hidden_states", "return_dict")  # of a config
# Tables of positions that are made anew where a text is long, which is asked of each step.
_READ_POSITIONS = {"dynamic", "longrope"}
_ALONE = threading.Lock()  # one capture at a time: what a process synchronizes meanwhile ends it
_CACHE = object()  # stands in a kept answer for the caller's own

_Place = tuple[str | int, ...]
_Look = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """A step as it is called: its tensors by their places, its cache, and what must be equal."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: dict[_Place, torch.Tensor]
    cache: Any
    look: _Look

    def replace(self, tensors: Mapping[_Place, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with other tensors in their places."""
        args, kwargs = [*self.args], {**self.kwargs}
        for (name, *within), tensor in tensors.items():
            arguments: Any = args if isinstance(name, int) else kwargs
            if within:
                arguments[name] = {**arguments[name], within[0]: tensor}
            else:
                arguments[name] = tensor
        return args, kwargs


@dataclass(slots=True)
class _Arguments:
    """What a call is given, sorted: tensors by their places, caches, and what must be equal."""

    tensors: dict[_Place, torch.Tensor] = field(default_factory=dict)
    caches: list[Any] = field(default_factory=list)
    look: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many there are of each row; none where they do not stand where they should."""
        ids = self.tensors.get(("input_ids",), self.tensors.get((0,)))
        return ids.shape[1] if ids is not None and ids.dim() == 2 else 0


@dataclass(slots=True)
class _Step:
    """A captured step: what is written before a replay, and what is read after it."""

    graph: Any
    stream: Any
    given: dict[_Place, torch.Tensor]
    answer: Any
    held: list[Any]  # the kernels and constants that are used, which a CUDA graph does not keep
    lock: threading.Lock = field(default_factory=threading.Lock)

    def replay(self, call: _Call) -> Any:
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
        *("_device", "_regions", "_registered", "_replayed"),
        *("_guard", "_addresses", "_bindings", "_caches", "_steps", "_met", "_refused"),
    )

    def __init__(self, module: nn.Module, regions: Sequence[Region], device: torch.device) -> None:
        super().__init__("", module)
        self._device, self._regions = device, [*regions]
        # The first graph of a generator takes memory for it, and one for which there is none ends
        # the process (`~CUDAGraph`, torch 2.11 to 2.15): so it is taken here, and not in a capture.
        self._registered = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[device.index or 0]
        self._registered.register_generator_state(generator)
        self._replayed = itertools.count()
        self._guard: ModuleGuard | None = None
        self._addresses: list[tuple[torch.Tensor, int]] = []
        self._bindings: list[int] = []
        self._caches: weakref.WeakKeyDictionary[Any, _Look] = weakref.WeakKeyDictionary()
        self._steps: dict[_Look, _Step] = {}
        self._met: dict[_Look, None] = {}
        self._refused: dict[_Look, None] = {}

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
            return self._rehearse(call)
        # A block whose tensors were changed is bound anew by the model's own step.
        if is_refused or not self._are_bound():
            return self.eager(*args, **kwargs)
        if step is None:
            with _ALONE:
                step = self._capture(call)
        next(self._replayed)
        return step.replay(call)

    def _read_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
        """A call as a step, if it is one."""
        if torch.is_grad_enabled() or self.module.training or is_capturing(self._device):
            return None
        found = _sort_arguments(args, kwargs)
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
        return _Call(args, kwargs, found.tensors, cache, (*flags, *found.look, where))

    def _rehearse(self, call: _Call) -> Any:
        """What the model answers to the first step of its look, as if it were captured."""
        with rehearse():
            answer = self.eager(*call.args, **call.kwargs)
        self._bindings = [region.bindings for region in self._regions]
        if self._are_bound():
            _remember(self._met, call.look)
        else:
            _remember(self._refused, call.look)
            problem = CannotServe("capture", "a step: some of its blocks have no graph now")
            self._count_miss(self.path, problem)
        return answer

    def _capture(self, call: _Call) -> _Step:
        """Capture a step.

        Raises:
            CannotServe: it cannot be captured; it is not tried again.
        """
        given = {place: tensor.clone() for place, tensor in call.tensors.items()}
        args, kwargs = call.replace(given)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        while len(self._steps) >= MOST:
            _drop_oldest(self._steps)
        held = [graph.hold() for region in self._regions for graph in region.graphs]
        answer, problem = None, self._find_obstacle()
        try:
            if not problem:
                with record(), _capture_into(graph, self._device):
                    answer = self.eager(*args, **kwargs)
                # Whoever has the cache has the step, and not the other way round.
                answer = _map_answer(_return_same, {call.cache: _CACHE}, answer)
        except Exception as error:  # of the module, of the driver, or no memory
            problem = first_line(error)
        if problem:  # with the error goes what its frames hold, which the module needs now
            del graph, given, args, kwargs, answer, held
            gc.collect()
            _remember(self._refused, call.look)
            _settle(self._device)
            raise CannotServe("capture", f"a step: {problem}")
        step = _Step(graph, current, given, answer, held)
        self._steps[call.look] = step
        weakref.finalize(call.cache, self._steps.pop, call.look, None).atexit = False
        return step

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
        return all(address(tensor) == place for tensor, place in self._addresses)

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

    def forget(self) -> None:
        """Nothing is captured any more: what was, is of another model."""
        self._guard, self._addresses, self._bindings = None, [], []
        for known in (self._steps, self._met, self._refused):
            known.clear()


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


def _sort_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Arguments | None:
    """What a call is given; None where there is something that nobody knows how to compare."""
    found = _Arguments()
    for place, value in _walk_arguments(args, kwargs):
        if type(value) in _PLAIN:
            found.tensors[place] = value
            found.look.append((place, value.dtype, value.device, *value.shape))
        elif isinstance(value, _LITERALS):
            found.look.append((place, value))
        elif hasattr(value, "layers"):
            found.caches.append(value)
            found.look.append(place)
        else:
            return None
    return found


def _walk_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[_Place, Any]]:
    """What a call is given, by its places: arguments, and what is in dictionaries of them."""
    given: list[tuple[str | int, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in given:
        if type(value) is dict:
            yield from (((name, key), each) for key, each in value.items())
        else:
            yield (name,), value


def _map_answer(
    change: Callable[[torch.Tensor], torch.Tensor], others: Mapping[Any, Any], answer: Any
) -> Any:
    """An answer with other tensors, and others in the place of some things."""

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if leaf is _CACHE or hasattr(leaf, "layers"):
            return others[leaf]
        if not isinstance(leaf, _LITERALS):  # which the next replay would change
            raise TypeError(f"it answers a {type(leaf).__name__}")
        return leaf

    return pytree.tree_map(replace, answer, is_leaf=lambda leaf: hasattr(leaf, "layers"))


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _return_same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _remember(known: dict[_Look, None], look: _Look) -> None:
    """Note a look of steps; the oldest are forgotten."""
    while len(known) >= 8 * MOST:
        _drop_oldest(known)
    known[look] = None


def _drop_oldest(known: dict[_Look, Any]) -> None:
    """Forget the first that was noted, unless another thread was faster."""
    with suppress(KeyError, RuntimeError, StopIteration):
        del known[next(iter(known))]


def _count_pool_bytes(pool: Any) -> int:
    """The bytes that a captured step holds of the device."""
    segments: Any = torch.cuda.memory_snapshot(pool)  # type: ignore[no-untyped-call]
    return sum(int(segment["total_size"]) for segment in segments)
