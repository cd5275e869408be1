"""Torch's container runners: the native side of an open graph, and the public way to one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch

from hubaoti.artifact.package import pack_folder


class Runner(Protocol):
    """The native side of an open graph, as torch's container runners have it."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...

    def get_call_spec(self) -> list[str]: ...

    def get_constant_names_to_original_fqns(self) -> dict[str, str]: ...

    def update_constant_buffer(
        self, tensors: dict[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None: ...


def open_native_runner(folder: Path, library: Path, device: torch.device) -> Runner:
    """The container runner of torch, or its public loader where a torch has none.

    Private, checked on torch 2.11 to 2.15: `torch._C._aoti.AOTIModelContainerRunner{Cpu,Cuda}`
    (torch/csrc/inductor/aoti_runner/pybind.cpp). It opens in under a millisecond what the public
    loader opens in seconds, because that one runs g++ to look at the CPU first.
    """
    try:
        from torch._C import _aoti
    except ImportError:
        return open_public_runner(folder, device)
    if device.type == "cpu" and hasattr(_aoti, "AOTIModelContainerRunnerCpu"):
        return _aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    if device.type == "cuda" and hasattr(_aoti, "AOTIModelContainerRunnerCuda"):
        place = str(library), 1, str(device), str(library.parent)
        return OnDevice(_aoti.AOTIModelContainerRunnerCuda(*place), device)
    return open_public_runner(folder, device)


def open_public_runner(folder: Path, device: torch.device) -> Runner:
    """A runner by `torch._inductor.aoti_load_package`, which wants a zip and takes seconds."""
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory(prefix="hubaoti-") as scratch:
        package = Path(scratch) / f"{next(folder.iterdir()).name}.pt2"
        pack_folder(folder, package)
        index = -1 if device.index is None else device.index
        loaded = aoti_load_package(str(package), run_single_threaded=False, device_index=index)
    runner = PublicRunner(loaded)
    return OnDevice(runner, device) if device.type == "cuda" else runner


class OnDevice:
    """A runner of a GPU that is called with that GPU as the current one.

    Torch's asks for the stream of whichever device is current, not of its own (run_impl in
    torch/csrc/inductor/aoti_runner/model_container_runner_cuda.cpp): where another is, it would
    not wait for what computes its inputs.
    """

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner = runner
        self._index = device.index or 0

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if torch.cuda.current_device() == self._index:
            return self._runner.run(inputs)
        with torch.cuda.device(self._index):
            return self._runner.run(inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class PublicRunner:
    """`AOTICompiledModel` with the face of a container runner."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._model.loader.run(inputs)  # type: ignore[no-any-return]

    def get_call_spec(self) -> list[str]:
        return self._model.loader.get_call_spec()  # type: ignore[no-any-return]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {fqn: fqn for fqn in self._model.get_constant_fqns()}

    def update_constant_buffer(
        self, tensors: dict[str, torch.Tensor], inactive: bool, validate: bool, managed: bool
    ) -> None:
        self._model.load_constants(tensors, check_full_update=validate, user_managed=managed)
