"""The constants of a graph: mapped from a model's checkpoint, or from the artifact's own file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from hubaoti.artifact.schema import Constant
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime.input_checks import parse_dtype, tensor_alignment

INDEX = "model.safetensors.index.json"


class _WeightIndex(msgspec.Struct):
    """What is read of `model.safetensors.index.json`: each tensor's file."""

    weight_map: dict[str, str]


# Here, not at its first use: threads may meet there.
_INDEX_DECODER = msgspec.json.Decoder(_WeightIndex)


class Checkpoint:
    """A folder's safetensors files by tensor name; a tensor is mapped, not read, on a CPU."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Look at the headers.

        Raises:
            MissingConstant: the folder has no safetensors file, or a damaged one.
        """
        self.folder = folder
        self._device = device
        self._files: dict[str, Any] = {}
        for file in find_checkpoint_files(folder):
            try:
                opened: Any = safe_open(file, framework="pt", device=str(device))
            except (SafetensorError, OSError) as error:
                raise MissingConstant(
                    f"{file} is not a whole safetensors file: {error}", hint="download it again"
                ) from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def find_checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index or its only name says.

    Raises:
        MissingConstant: there is none, or the index is not one.
    """
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = {*_INDEX_DECODER.decode(index.read_bytes()).weight_map.values()}
        except msgspec.MsgspecError as error:
            message = f"{index} is no index: {error}"
            raise MissingConstant(message, hint="download it again") from error
    # Names from outside: only files of this very folder are taken.
    files = [folder / name for name in sorted(names) if Path(name).name == name]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise MissingConstant(
            f"{folder} has no {', '.join(missing) or 'safetensors file'}",
            hint="--model takes a folder or a Hub id with the weights as safetensors",
        )
    return files


def load_constants(
    entry: Entry, artifact: Path, checkpoint: Checkpoint, device: torch.device
) -> dict[str, torch.Tensor]:
    """Every constant of a graph by fqn; mapped where the file's bytes can be used as they are.

    Raises:
        MissingConstant: the checkpoint has none of a constant's names, or another shape of it; or
            the artifact lacks one that should have come with it.
    """
    found = dict(load_shipped_tensors(entry, artifact, device))
    for constant in entry.constants:
        if not constant.origin.file:
            found[constant.fqn] = load_from_checkpoint(constant, checkpoint, device)
        elif constant.fqn not in found:
            raise MissingConstant(
                f"{constant.origin.file} of the artifact has no {constant.fqn}",
                hint="its publisher must compile it again",
            )
    return found


def load_shipped_tensors(
    entry: Entry, artifact: Path, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The constants that came with the artifact."""
    for file in sorted({c.origin.file for c in entry.constants if c.origin.file}):
        try:
            with safe_open(artifact / file, framework="pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, align_tensor(opened.get_tensor(name), device)
        except SafetensorError as error:
            hint = "its publisher must compile it again"
            raise MissingConstant(f"{file} of the artifact: {error}", hint=hint) from error


def load_from_checkpoint(
    constant: Constant, checkpoint: Checkpoint, device: torch.device
) -> torch.Tensor:
    """One constant, by the first of its names that the checkpoint has."""
    origin = constant.origin
    name = next((name for name in origin.checkpoint if name in checkpoint), None)
    if name is None or origin.transform:
        reason = f"transformers makes it ({origin.transform})" if origin.transform else "not there"
        raise MissingConstant(
            f"{checkpoint.folder} has no tensor for {constant.fqn}: looked for "
            f"{', '.join(origin.checkpoint) or 'none'}; {reason}",
            hint="use a checkpoint whose names are the manifest's, or --eager",
        )
    tensor = checkpoint[name]
    if tuple(tensor.shape) != constant.shape:
        raise MissingConstant(
            f"{name} has shape {list(tensor.shape)} in {checkpoint.folder}; the graph was compiled "
            f"for {list(constant.shape)}",
            hint="this checkpoint belongs to another model than the artifact",
        )
    return align_tensor(cast_weight(name, tensor, parse_dtype(constant.dtype)), device)


def cast_weight(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `from_pretrained(dtype=…)` does: a floating tensor in the graph's floating dtype."""
    if tensor.dtype == dtype:
        return tensor
    if not (tensor.is_floating_point() and dtype.is_floating_point):
        raise BadInput(
            f"{name} is {tensor.dtype} in the checkpoint; the graph was compiled for {dtype}",
            hint="use a checkpoint of the dtype that the recipe names",
        )
    return tensor.to(dtype)


def align_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor, or a copy where a file's layout put it at an address that cannot be used."""
    return tensor.clone() if tensor.data_ptr() % tensor_alignment(tensor.dtype, device) else tensor
