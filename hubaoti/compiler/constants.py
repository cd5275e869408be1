"""The constants of a graph: what they are in the model, and where a runtime finds their values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.export import ExportedProgram

from hubaoti.artifact.schema import Constant, ConstantOrigin
from hubaoti.errors import CompileFailed
from hubaoti.runtime.input_checks import name_dtype
from hubaoti.runtime.quantize import Made, make_lowering_constant

BUFFERS = "buffers.safetensors"


@dataclass(frozen=True, slots=True)
class ConstantsFile:
    """A compiled module, where it lies in its model, and what of it was quantized.

    The model's own path is empty. `module` may be a copy of what lies there.
    """

    model: nn.Module
    path: str
    module: nn.Module
    file: str = BUFFERS
    made: Mapping[str, Made] = field(default_factory=dict)
    recipe: str | None = None

    def find_lowered(self, fqn: str) -> torch.Tensor | None:
        """A constant that only the lowering of a quantized product makes."""
        if self.recipe is None:
            return None
        return make_lowering_constant(self.recipe, next(self.module.parameters()).device, fqn)


def describe_constants(
    fqns: Iterable[str], place: ConstantsFile, program: ExportedProgram
) -> tuple[tuple[Constant, ...], dict[str, torch.Tensor]]:
    """The constants that a compiled graph reads, and the values of those in no checkpoint.

    Raises:
        CompileFailed: the graph reads something that neither the module nor the program has.
    """
    named = collect_named_tensors(place.module)
    aliases = find_tied(named)
    constants, shipped = [], {}
    for fqn in sorted(fqns):
        tensor = named.get(fqn, program.constants.get(fqn, place.find_lowered(fqn)))
        if not isinstance(tensor, torch.Tensor):
            raise CompileFailed(
                f"build: the graph reads {fqn}, which the model does not have",
                hint="report it with the model's config",
            )
        origin = _find_origin(place, fqn, tensor, aliases.get(fqn, ()))
        if origin.file:
            shipped[fqn] = tensor.detach().contiguous().cpu().clone()
        constants.append(
            Constant(
                fqn=fqn,
                aliases=tuple(aliases.get(fqn, ())),
                dtype=name_dtype(tensor.dtype),
                shape=tuple(tensor.shape),
                stride=tuple(tensor.stride()),
                origin=origin,
                shared_by_all_modules=fqn not in named,
            )
        )
    return tuple(constants), shipped


def _find_origin(
    place: ConstantsFile, fqn: str, tensor: torch.Tensor, aliases: Iterable[str]
) -> ConstantOrigin:
    """Where a constant's values come from: a whole model's from its checkpoint, or a file of ours.

    A region's come from the module that it serves. Its buffers are in the file, too, as those of
    the module that was compiled: who checks the graph without a model needs good ones.
    """
    made = place.made.get(fqn)
    if made is not None:
        names = _find_checkpoint_names(place, made.source, torch.empty(made.shape, device="meta"))
        module = made.source if place.path else None
        return ConstantOrigin(
            checkpoint=names, transform=made.transform, dtype=made.dtype, module=module
        )
    if fqn not in collect_named_tensors(place.module):
        return ConstantOrigin(file=place.file)
    saved = fqn in place.module.state_dict(keep_vars=True)
    if not place.path:
        if not saved:
            return ConstantOrigin(file=place.file)
        return find_checkpoint_origin(place.model, fqn, tensor, aliases)
    if not isinstance(tensor, nn.Parameter):
        return ConstantOrigin(file=place.file, module=fqn)
    _, transform = _revert_checkpoint_names(place.model, f"{place.path}.{fqn}", tensor)
    names = _find_checkpoint_names(place, fqn, tensor)
    return ConstantOrigin(checkpoint=names, transform=transform, module=fqn)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors into a file that whoever may read the bundle may read, too."""
    save_file(dict(tensors), path)
    path.chmod(0o644)


def _find_checkpoint_names(place: ConstantsFile, fqn: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """The names of a tensor in a checkpoint, those of a region relative to its module."""
    if not place.path:
        return find_checkpoint_origin(place.model, fqn, tensor, ()).checkpoint
    start = f"{place.path}."
    names, _ = _revert_checkpoint_names(place.model, start + fqn, tensor)
    return tuple(name.removeprefix(start) for name in names if name.startswith(start))


def collect_named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have; non-persistent buffers too."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def find_tied(named: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The other names of each tensor, as of an embedding that is the output layer too."""
    names = defaultdict[int, list[str]](list)
    for name, tensor in named.items():
        names[id(tensor)].append(name)
    return {name: [each for each in names[id(t)] if each != name] for name, t in named.items()}


def find_checkpoint_origin(
    model: nn.Module, fqn: str, tensor: torch.Tensor, aliases: Iterable[str]
) -> ConstantOrigin:
    """The names to look for in a checkpoint: the model's own first, then with and without a head.

    A checkpoint saved from a model with another head has the base model's prefix, or lacks it.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names: list[str] = []
    transform = None
    for name in (fqn, *aliases):
        saved, transform = _revert_checkpoint_names(model, name, tensor)
        names += saved
        for each in (name, *saved):
            names.append(each)
            if prefix:
                short = each.removeprefix(f"{prefix}.")
                names.append(short if short != each else f"{prefix}.{each}")
    return ConstantOrigin(checkpoint=tuple(dict.fromkeys(names)), transform=transform)


def _revert_checkpoint_names(
    model: nn.Module, fqn: str, tensor: torch.Tensor
) -> tuple[list[str], str | None]:
    """What transformers would call this tensor in a checkpoint, and how it is changed if at all.

    Private, checked on transformers 5.15 to 5.24: `core_model_loading.revert_weight_conversion`.
    Where it is gone, the model's own name is the only one.
    """
    if not hasattr(model, "base_model_prefix"):
        return [fqn], None  # no model of transformers
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return [fqn], None
    fake = torch.empty_like(tensor, device="meta")
    try:
        saved = revert_weight_conversion(model, {fqn: fake})  # type: ignore[arg-type]
    except Exception:  # a tensor that is saved together with others cannot be reverted alone
        return [fqn], "merged with other tensors"
    if len(saved) == 1 and next(iter(saved.values())).shape == tensor.shape:
        return list(saved), None
    return list(saved), "made of several tensors"
