"""Which modules of a model an artifact's graphs serve; nothing is opened and nothing is touched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Constant, Graph
from hubaoti.errors import BadRequest, MissingConstant
from hubaoti.runtime.input_checks import advise_on_dtypes, name_dtype, parse_dtype

# Tasks whose whole graph answers something else than the model's own `forward`.
_TEXTS = {"embed", "classify", "logits"}
_NAMED = 3  # of what is wrong; a model may have thousands of tensors


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


@dataclass(frozen=True, slots=True)
class Misfit:
    """What is wrong with a module or one of its tensors, in words.

    `dtypes` are those that a tensor has and should have, where nothing else is wrong with it.
    """

    text: str
    dtypes: tuple[torch.dtype, torch.dtype] | None = None


def explain_misfits(
    who: str, misfits: Sequence[Misfit]
) -> tuple[str, tuple[torch.dtype, torch.dtype] | None]:
    """What is wrong, in few words however many tensors there are; the dtypes, if that is all.

    A model in another dtype has every tensor wrong, and that is said once.
    """
    kinds = {each.dtypes for each in misfits}
    dtypes = kinds.pop() if len(kinds) == 1 else None
    if dtypes is None or len(misfits) <= _NAMED:
        return name_first([each.text for each in misfits]), dtypes
    found, wanted = map(name_dtype, dtypes)
    counted = f"{len(misfits)} tensors, which fit otherwise"
    return f"{who} has weights in {found}, the graphs have {wanted}: {counted}", dtypes


def name_first(problems: Sequence[str]) -> str:
    """The first of some problems, and how many more there are."""
    more = len(problems) - _NAMED
    return "; ".join([*problems[:_NAMED], *([f"and {more} more"] if more > 0 else [])])


def find_served_modules(
    module: nn.Module,
    manifest: Manifest,
    verb: str,
    list_misfits: Callable[[ServedModule], Iterable[Misfit]],
) -> list[ServedModule]:
    """The modules that an artifact's graphs serve, each with all the tensors that they need.

    `list_misfits` says what is wrong with a module's tensors; `verb` is what is done with the
    artifact, in the hint.

    Raises:
        MissingConstant: one is not there, or has other tensors; the first of them are named. Or the
            module is a part of the model that was compiled.
        BadRequest: the artifact answers texts, or serves no module.
    """
    _refuse_other_artifacts(manifest)
    paths = [*dict.fromkeys(path for graph in manifest.graphs for path in graph.modules)]
    _refuse_part(module, paths, manifest, verb)
    found: list[ServedModule] = []
    absent: list[Misfit] = []
    misfits: list[Misfit] = []
    for path in paths:
        if (part := _find_part(module, path)) is None:
            absent.append(Misfit(f"{path} is not there"))
            continue
        graphs = tuple(graph for graph in manifest.graphs if path in graph.modules)
        served = ServedModule(path, part, graphs)
        found.append(served)
        where = f"{path}: " if path else ""
        misfits += [replace(each, text=f"{where}{each.text}") for each in list_misfits(served)]
    if absent or misfits:
        raise _explain_refusal(module, [*absent, *misfits], verb)
    return found


def _find_part(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None where there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _refuse_part(module: nn.Module, paths: Sequence[str], manifest: Manifest, verb: str) -> None:
    """Refuse a module that stands within the model that was compiled, as its body without a head.

    Raises:
        MissingConstant: all that graphs serve is there, by paths that begin later.
    """
    if any(_find_part(module, path) is not None for path in paths):
        return
    for start in range(1, paths[0].count(".") + 1 if paths else 0):
        ends = [path.split(".", start)[-1] for path in paths]
        if all(_find_part(module, end) is not None for end in ends):
            own = ".".join(paths[0].split(".")[:start])
            name, whole = type(module).__name__, _name_whole(module, manifest)
            raise MissingConstant(
                f"{name} is a part of the model that was compiled{whole}: it is {own} there, and "
                f"{paths[0]} is {ends[0]} here",
                hint=f"{verb} the artifact to the whole model; nothing was changed",
            )


def _name_whole(module: nn.Module, manifest: Manifest) -> str:
    """The class of the model that was compiled, as far as anybody says it."""
    named = getattr(getattr(module, "config", None), "architectures", None) or ()
    name = manifest.program.config.get("class") or next(iter(named), None)
    return f", a {name}" if isinstance(name, str) and name != type(module).__name__ else ""


def _explain_refusal(module: nn.Module, misfits: Sequence[Misfit], verb: str) -> MissingConstant:
    """The error of a model that an artifact's graphs do not serve."""
    name = type(module).__name__
    message, dtypes = explain_misfits(name, misfits)
    if dtypes is None or len(misfits) <= _NAMED:
        message = f"{name} is not the model that was compiled: {message}"
    advice = advise_on_dtypes(*dtypes) if dtypes else f"{verb} the artifact of this very model"
    return MissingConstant(message, hint=f"{advice}; nothing was changed")


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


def list_misfits_anywhere(served: ServedModule) -> Iterator[Misfit]:
    """What is wrong with a module's tensors, wherever they lie.

    A process that only plans may have no GPU, and tensors that are not on the device they will be
    on.
    """
    return filter(None, (_find_misfit(served.module, each) for each in served.constants))


def _find_misfit(part: nn.Module, constant: Constant) -> Misfit | None:
    """What is wrong with a constant in a module; None where it fits, or comes along."""
    tensor, origin = _find_tensor(part, constant.fqn), constant.origin
    is_made = origin.transform is not None and origin.module is not None
    if tensor is not None and not is_made:
        found = (tensor.dtype, tuple(tensor.shape))
        wanted = (parse_dtype(constant.dtype), constant.shape)
        message = f"{constant.fqn} is {found[0]} {list(found[1])}; expected is {wanted[0]} "
        if found == wanted:
            return None
        only_dtype = (found[0], wanted[0]) if found[1] == wanted[1] else None
        return Misfit(f"{message}{list(wanted[1])}", only_dtype)
    source = origin.module if origin.transform else None
    if origin.file or (source and _find_tensor(part, source) is not None):
        return None
    return Misfit(f"{source or constant.fqn} is not there")


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
