"""Torch's container runners: the native side of an open graph, and the public way to one.

A container never gives back what it was bound to (`update_constant_buffer` with `user_managed`,
torch 2.11 to 2.15): each tensor stays for as long as the process, and so would the weights of every
model that was attached. So it is given aliases, tensors without memory of their own, which whoever
binds keeps alive; and they are used again, since they are never given back either.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hubaoti.artifact.package import pack_folder
from hubaoti.runtime.container import Container, call_on_device, has_interface
from hubaoti.runtime.library import Library
from hubaoti.runtime.locks import ForkSafeLock

# By dtype and device; nobody has them now. Appending and popping are safe in threads.
FREE: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}


# On a GPU: such a run neither records nor asks events, so that a CUDA graph can capture it.
_SINGLE_THREADED = True


class Runner(Protocol):
    """The native side of an open graph, as torch's container runners have it."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...

    def get_call_spec(self) -> list[str]: ...

    def get_constant_names_to_original_fqns(self) -> dict[str, str]: ...

    def update_constant_buffer(
        self, tensors: dict[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None: ...


def open_native_runner(folder: Path, library: Library, device: torch.device) -> Runner:
    """The library's own interface, a container runner of torch, or else torch's public loader.

    Private, checked on torch 2.11 to 2.15: `torch._C._aoti.AOTIModelContainerRunner{Cpu,Cuda}`
    (torch/csrc/inductor/aoti_runner/pybind.cpp). It opens in under a millisecond what the public
    loader opens in seconds, because that one runs g++ to look at the CPU first.
    """
    if device.type == "cuda" and has_interface(library):
        return Container(library, device)
    try:
        from torch._C import _aoti
    except ImportError:
        return open_public_runner(folder, device)
    if device.type == "cpu" and hasattr(_aoti, "AOTIModelContainerRunnerCpu"):
        with library.beside_notes() as path:
            runner: Runner = _aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        return OnCpu(runner, library) if has_interface(library) else runner
    if device.type == "cuda" and hasattr(_aoti, "AOTIModelContainerRunnerCuda"):
        with library.beside_notes() as path:
            place = str(path), 1, str(device), str(library.place.parent), _SINGLE_THREADED
            on_gpu: Any = _aoti.AOTIModelContainerRunnerCuda  # whose stub lacks the last of these
            return OnDevice(on_gpu(*place), device)
    return open_public_runner(folder, device)


def open_public_runner(folder: Path, device: torch.device) -> Runner:
    """A runner by `torch._inductor.aoti_load_package`, which wants a zip and takes seconds."""
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory(prefix="hubaoti-") as scratch:
        package = Path(scratch) / f"{next(folder.iterdir()).name}.pt2"
        pack_folder(folder, package)
        index = -1 if device.index is None else device.index
        alone = device.type == "cuda" and _SINGLE_THREADED
        loaded = aoti_load_package(str(package), run_single_threaded=alone, device_index=index)
    runner = PublicRunner(loaded)
    return OnDevice(runner, device) if device.type == "cuda" else runner


class OnCpu:
    """A runner of a CPU whose long calls go to the library itself, which lets the GIL go meanwhile.

    Torch's runner holds it, so that no other thread of Python goes on; to call it takes some
    microseconds less, which is what counts in a `run_short` one.
    """

    def __init__(self, runner: Runner, library: Library) -> None:
        self.run_short = runner.run
        self._runner, self._library = runner, library
        self._container: Container | None = None
        self._bound: Mapping[str, torch.Tensor] = {}
        self._lock = ForkSafeLock()

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """A long call; the first one opens the library once more, over the same constants."""
        return (self._container or self._open()).run(inputs)

    def update_constant_buffer(
        self, tensors: dict[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None:
        with self._lock:
            self._runner.update_constant_buffer(tensors, inactive, validate, managed)
            if self._container is not None:
                self._container.update_constant_buffer(tensors, inactive, validate, managed)
            self._bound = tensors

    def _open(self) -> Container:
        with self._lock:
            if self._container is None:
                container = Container(self._library, torch.device("cpu"))
                container.update_constant_buffer(self._bound, False, True, True)
                self._container = container
            return self._container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class OnDevice:
    """A single-threaded runner of a GPU, called with that GPU as the current one, by one at a time.

    Torch's asks for the stream of whichever device is current, not of its own (run_impl in
    torch/csrc/inductor/aoti_runner/model_container_runner_cuda.cpp): where another is, it would
    not wait for what computes its inputs. An op in Python lets other threads go on meanwhile.
    """

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner, self._device, self._lock = runner, device, ForkSafeLock()

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with self._lock:
            return call_on_device(self._device, self._runner.run, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class PublicRunner:
    """`AOTICompiledModel` with the face of a container runner."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.run = model.loader.run
        self.get_call_spec = model.loader.get_call_spec

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {fqn: fqn for fqn in self._model.get_constant_fqns()}

    def update_constant_buffer(
        self, tensors: dict[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None:
        self._model.load_constants(tensors, check_full_update=validate, user_managed=managed)


class Bound(dict[str, torch.Tensor]):
    """What a container is bound to, by its own names; `aliases` is what it is given instead.

    Whoever calls the container holds this until the call has ended. Then its aliases are free, so
    a container is bound anew, or never called again, before this is let go.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__({name: tensor.detach() for name, tensor in tensors.items()})
        with torch.inference_mode(False), torch.no_grad():  # in which one is made says nothing
            self.aliases = {name: _alias_tensor(tensor) for name, tensor in self.items()}
        weakref.finalize(self, _recycle_aliases, [*self.aliases.values()]).atexit = False


def _recycle_aliases(lent: Sequence[torch.Tensor]) -> None:
    """Have aliases used again; whatever they point to may be gone, and nobody looks."""
    for alias in lent:
        FREE.setdefault((alias.dtype, alias.device), []).append(alias)


def _alias_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the place of another, which it does not keep.

    Private, checked on torch 2.11 to 2.15: `torch._C._construct_storage_from_data_pointer`, which
    CUDA graphs of inductor are made with. Without it the tensor itself is given, and kept.
    """
    if not hasattr(torch._C, "_construct_storage_from_data_pointer"):
        return tensor.detach()
    size = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    place = tensor.data_ptr(), tensor.device, int(size)
    storage = torch._C._construct_storage_from_data_pointer(*place)
    try:
        alias = FREE[tensor.dtype, tensor.device].pop()
    except (KeyError, IndexError):  # nobody has let go of one
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(storage, 0, tensor.shape, tensor.stride())
