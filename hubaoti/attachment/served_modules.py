"""Whether a module has what graphs need, wherever its tensors lie now; nothing is opened or made.

A process that only plans may have no GPU, and tensors that are not on the device they will be on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.manifest import Constant, Manifest
from hubaoti.attachment.attach import TEXTS, list_served_paths, select_graphs
from hubaoti.attachment.binding import collect_constants
from hubaoti.errors import BadRequest, MissingConstant
from hubaoti.runtime.input_checks import parse_dtype


@dataclass(frozen=True, slots=True)
class Spot:
    """A module that will be served, and its path in the one that was given."""

    path: str
    module: nn.Module


def find_served_modules(module: nn.Module, manifest: Manifest) -> list[Spot]:
    """The modules that an artifact's graphs serve, each with all the tensors that they need.

    Raises:
        MissingConstant: one is not there, or has other tensors; all of them are named.
        BadRequest: the artifact answers texts.
    """
    if manifest.is_whole and manifest.program.task in TEXTS:
        raise BadRequest(
            f"the artifact answers texts ({manifest.program.task}), not calls of a module",
            hint="compile with --task forward",
        )
    spots, problems = [], []
    for path in list_served_paths(manifest):
        try:
            part = module.get_submodule(path)
        except AttributeError:
            problems.append(f"{path} is not there")
            continue
        spots.append(Spot(path, part))
        found = (
            _describe_problem(part, each)
            for each in collect_constants(select_graphs(manifest, path))
        )
        problems += [f"{path}: {problem}" if path else problem for problem in found if problem]
    if problems:
        raise MissingConstant(
            f"{type(module).__name__} is not the model that was compiled: {'; '.join(problems)}",
            hint="load the artifact of this very model; nothing was changed",
        )
    return spots


def _describe_problem(part: nn.Module, constant: Constant) -> str | None:
    """What is wrong with a constant in a module; None where it fits, or comes along."""
    tensor, origin = _find_tensor(part, constant.fqn), constant.origin
    if tensor is not None and not _is_made(constant):
        found = (tensor.dtype, tuple(tensor.shape))
        wanted = (parse_dtype(constant.dtype), constant.shape)
        message = f"{constant.fqn} is {found[0]} {list(found[1])}; expected is {wanted[0]} "
        return None if found == wanted else f"{message}{list(wanted[1])}"
    source = origin.module if origin.transform else None
    if origin.file or (source and _find_tensor(part, source) is not None):
        return None
    return f"{source or constant.fqn} is not there"


def _is_made(constant: Constant) -> bool:
    """Whether a constant is made of another tensor, as a quantized weight is."""
    return constant.origin.transform is not None and constant.origin.module is not None


def _find_tensor(part: nn.Module, fqn: str) -> torch.Tensor | None:
    """A parameter or buffer by its name; None where there is none."""
    path, _, name = fqn.rpartition(".")
    try:
        found: Any = getattr(part.get_submodule(path), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def device_kind(module: nn.Module) -> str | None:
    """The kind of device that a module's tensors are on; None of one without tensors."""
    return next(_list_device_kinds(module), None)


def _list_device_kinds(module: nn.Module) -> Iterator[str]:
    """The kinds of device of a module's tensors that have values."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            yield tensor.device.type
