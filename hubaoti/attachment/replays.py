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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hubaoti.attachment.forward_patch import CountMiss, ForwardPatch
from hubaoti.attachment.module_guard import ModuleGuard
from hubaoti.attachment.torch_modes import refuse_watchers
from hubaoti.errors import first_line
from hubaoti.program.adapters import separate_adapters
from hubaoti.runtime.capturing import is_capturing, rehearse
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.input_checks import address
from hubaoti.runtime.kv_cache import list_static_tensors

MOST = 8  # steps that are kept; a step has memory of its own for what it computes

_LITERALS = (bool, int, float, str, type(None))
_PLAIN = (torch.Tensor, nn.Parameter)

_CACHE = object()  # stands in a kept answer for the caller's own

_Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """A step as it is called: its tensors by their places, its cache, and what must be equal."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: dict[_Place, torch.Tensor]
    cache: Any
    look: tuple[Any, ...]

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
class _Step:
    """A captured step: what is written before a replay, and what is read after it."""

    graph: Any
    stream: Any
    given: dict[_Place, torch.Tensor]
    answer: Any
    lock: threading.Lock = field(default_factory=threading.Lock)

    def replay(self, call: _Call) -> Any:
        """The answer to the tensors of a call, in memory of its own."""
        with self.lock:
            stream = torch.cuda.current_stream()
            if stream != self.stream:  # what is under way there reads what is written here
                stream.wait_stream(self.stream)
                self.stream = stream
            for place, tensor in self.given.items():
                tensor.copy_(call.tensors[place], non_blocking=True)
            self.graph.replay()
            return _map_answer(_copy_tensor, {_CACHE: call.cache}, self.answer)


class StepReplays(ForwardPatch):
    """A model's `forward` of which decoding steps are replayed; all other calls are its own."""

    __slots__ = (
        *("_device", "_guard", "_addresses", "_steps", "_met", "_refused", "_replayed"),
        "_registered",
    )

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__("", module)
        self._device = device
        # The first graph of a generator takes memory for it, and one for which there is none ends
        # the process (`~CUDAGraph`, torch 2.11 to 2.15): so it is taken here, and not in a capture.
        self._registered = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[device.index or 0]
        self._registered.register_generator_state(generator)
        self._replayed = itertools.count()
        self._guard: ModuleGuard | None = None
        self._addresses: list[tuple[torch.Tensor, int]] = []
        self._steps: dict[tuple[Any, ...], _Step] = {}
        self._met: dict[tuple[Any, ...], None] = {}
        self._refused: dict[tuple[Any, ...], None] = {}

    def put(self, count_miss: CountMiss) -> None:
        """Answer from here on."""
        self._count_miss = count_miss
        self.install()

    def remove(self) -> None:
        """Give the module its own `forward` back, and all memory of its steps."""
        super().remove()
        self._forget()

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
        if call is None or call.look in self._refused:
            return self.eager(*args, **kwargs)
        if not self._is_same():
            self._forget()
            self._guard, self._addresses = self._look_at_module()
        step = self._steps.get(call.look)
        if step is None and call.look not in self._met:
            _remember(self._met, call.look)
            with rehearse():
                return self.eager(*args, **kwargs)
        if step is None:
            step = self._capture(call)
        next(self._replayed)
        return step.replay(call)

    def _read_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
        """A call as a step, if it is one."""
        if torch.is_grad_enabled() or self.module.training or is_capturing(self._device):
            return None
        tensors: dict[_Place, torch.Tensor] = {}
        look: list[Any] = [torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda")]
        caches: list[Any] = []
        for place, value in _walk_arguments(args, kwargs):
            if type(value) in _PLAIN:
                tensors[place] = value
                look.append((place, value.dtype, value.device, *value.shape))
            elif isinstance(value, _LITERALS):
                look.append((place, value))
            elif hasattr(value, "layers"):
                caches.append(value)
                look.append(place)
            else:
                return None
        ids = tensors.get(("input_ids",), tensors.get((0,)))
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or len(caches) != 1:
            return None
        held = list_static_tensors(caches[0], self._device)
        if held is None or any(each.device != self._device for each in tensors.values()):
            return None
        refuse_watchers()
        look += [(address(each), each.shape) for each in held]
        return _Call(args, kwargs, tensors, caches[0], tuple(look))

    def _capture(self, call: _Call) -> _Step:
        """Capture a step.

        Raises:
            CannotServe: it cannot be captured; it is not tried again.
        """
        given = {place: tensor.clone() for place, tensor in call.tensors.items()}
        args, kwargs = call.replace(given)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        while len(self._steps) >= MOST:
            self._steps.pop(next(iter(self._steps)))
        problem = ""
        try:
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                answer = self.eager(*args, **kwargs)
        except Exception as error:  # of the module, of the driver, or no memory
            problem = first_line(error)
        if problem:  # with the error goes what its frames hold, which the module needs now
            del graph, given, args, kwargs
            gc.collect()
            _remember(self._refused, call.look)
            raise CannotServe("capture", f"a step: {problem}")
        # Whoever has the cache has the step, and not the other way round.
        answer = _map_answer(_return_same, {call.cache: _CACHE}, answer)
        step = _Step(graph, current, given, answer)
        self._steps[call.look] = step
        weakref.finalize(call.cache, self._steps.pop, call.look, None).atexit = False
        return step

    def _is_same(self) -> bool:
        """Whether the model has the parts and tensors that were captured."""
        if self._guard is None or not self._guard.is_same():
            return False
        return all(address(tensor) == place for tensor, place in self._addresses)

    def _look_at_module(self) -> tuple[ModuleGuard, list[tuple[torch.Tensor, int]]]:
        module = self.module
        adapters = [(each, each.state()) for each in separate_adapters(module)[1]]
        tensors = [*module.parameters(), *module.buffers()]
        return ModuleGuard(module, (), adapters), [(each, address(each)) for each in tensors]

    def _forget(self) -> None:
        """Nothing is captured any more: what was, is of another model."""
        self._guard, self._addresses = None, []
        self._steps, self._met, self._refused = {}, {}, {}


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
        return others[leaf] if leaf is _CACHE or hasattr(leaf, "layers") else leaf

    return pytree.tree_map(replace, answer, is_leaf=lambda leaf: hasattr(leaf, "layers"))


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone()


def _return_same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _remember(known: dict[tuple[Any, ...], None], look: tuple[Any, ...]) -> None:
    """Note a look of steps; the oldest are forgotten."""
    while len(known) >= 8 * MOST:
        known.pop(next(iter(known)))
    known[look] = None


def _count_pool_bytes(pool: Any) -> int:
    """The bytes that a captured step holds of the device."""
    segments: Any = torch.cuda.memory_snapshot(pool)  # type: ignore[no-untyped-call]
    return sum(int(segment["total_size"]) for segment in segments)
