"""Which modules of a model an artifact's graphs serve; nothing is opened and nothing is touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Constant, Graph
from hubaoti.errors import BadRequest, MissingConstant
from hubaoti.runtime.input_checks import parse_dtype

# Tasks whose whole graph answers something else than the model's own `forward`.
_TEXTS = {"embed", "classify", "logits"}


@dataclass(frozen=True, slots=True)
class ServedModule:
    """A module that graphs serve, in the manifest's order, and its path in the one given."""

    path: str
    module: nn.Module
    graphs: tuple[Graph, ...]

    @property
    def constants(self) -> list[Constant]:
        """The constants of all its graphs, each once."""
        return [*{each.fqn: each for graph in self.graphs for each in graph.constants}.values()]


def find_served_modules(
    module: nn.Module,
    manifest: Manifest,
    verb: str,
    list_misfits: Callable[[ServedModule], Iterable[str]],
) -> list[ServedModule]:
    """The modules that an artifact's graphs serve, each with all the tensors that they need.

    `list_misfits` says what is wrong with a module's tensors; `verb` is what is done with the
    artifact, in the hint.

    Raises:
        MissingConstant: one is not there, or has other tensors; all of them are named.
        BadRequest: the artifact answers texts, or serves no module.
    """
    _refuse_other_artifacts(manifest)
    found, problems = [], []
    for path in dict.fromkeys(path for graph in manifest.graphs for path in graph.modules):
        try:
            part = module.get_submodule(path)
        except AttributeError:
            problems.append(f"{path} is not there")
            continue
        graphs = tuple(graph for graph in manifest.graphs if path in graph.modules)
        served = ServedModule(path, part, graphs)
        found.append(served)
        problems += [f"{path}: {each}" if path else each for each in list_misfits(served)]
    if problems:
        raise MissingConstant(
            f"{type(module).__name__} is not the model that was compiled: {'; '.join(problems)}",
            hint=f"{verb} the artifact of this very model; nothing was changed",
        )
    return found


def _refuse_other_artifacts(manifest: Manifest) -> None:
    """Refuse artifacts of which graphs serve no module."""
    if manifest.is_whole and manifest.program.task in _TEXTS:
        raise BadRequest(
            f"the artifact answers texts ({manifest.program.task}), not calls of a module",
            hint="open it with hubaoti.load, or compile with --task forward",
        )
    if idle := [graph.id for graph in manifest.graphs if not graph.modules]:
        raise BadRequest(
            f"graphs {', '.join(idle)} serve no module", hint="its publisher must compile it again"
        )


def list_misfits_anywhere(served: ServedModule) -> Iterator[str]:
    """What is wrong with a module's tensors, wherever they lie.

    A process that only plans may have no GPU, and tensors that are not on the device they will be
    on.
    """
    return filter(None, (_describe_problem(served.module, each) for each in served.constants))


def _describe_problem(part: nn.Module, constant: Constant) -> str | None:
    """What is wrong with a constant in a module; None where it fits, or comes along."""
    tensor, origin = _find_tensor(part, constant.fqn), constant.origin
    is_made = origin.transform is not None and origin.module is not None
    if tensor is not None and not is_made:
        found = (tensor.dtype, tuple(tensor.shape))
        wanted = (parse_dtype(constant.dtype), constant.shape)
        message = f"{constant.fqn} is {found[0]} {list(found[1])}; expected is {wanted[0]} "
        return None if found == wanted else f"{message}{list(wanted[1])}"
    source = origin.module if origin.transform else None
    if origin.file or (source and _find_tensor(part, source) is not None):
        return None
    return f"{source or constant.fqn} is not there"


def _find_tensor(part: nn.Module, fqn: str) -> torch.Tensor | None:
    """A parameter or buffer by its name; None where there is none."""
    path, _, name = fqn.rpartition(".")
    try:
        found: Any = getattr(part.get_submodule(path), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def find_device(module: nn.Module) -> torch.device | None:
    """The device of a module's tensors that have values; None of one without."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((each.device for each in tensors if not each.is_meta), None)


def find_module_device(module: nn.Module, target: str) -> torch.device:
    """The device of a module's tensors; of one without tensors the first of its kind.

    Raises:
        BadRequest: it is of another kind than the artifact was built for.
    """
    device = find_device(module)
    if device is None:
        return torch.device(target, 0) if target == "cuda" else torch.device(target)
    if device.type != target:
        raise BadRequest(
            f"the artifact was built for {target}, the module is on {device}",
            hint=f"move the model first: model.to({target!r})"
            if target == "cpu" or torch.cuda.is_available()
            else "there is no GPU here that torch sees: attach an artifact for this CPU",
        )
    return device


def find_device_kind(module: nn.Module) -> str | None:
    """The kind of device that a module's tensors are on; None of one without tensors."""
    device = find_device(module)
    return device.type if device else None
