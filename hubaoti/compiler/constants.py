"""The constants of a graph: what they are in the model, and where a runtime finds their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.export import ExportedProgram

from hubaoti.errors import CompileFailed
from hubaoti.manifest import Constant, Origin

BUFFERS = "buffers.safetensors"


def describe(
    fqns: Iterable[str], model: nn.Module, program: ExportedProgram
) -> tuple[tuple[Constant, ...], dict[str, torch.Tensor]]:
    """The constants that a compiled graph reads, and the values of those in no checkpoint.

    Raises:
        CompileFailed: the graph reads something that neither the model nor the program has.
    """
    saved = set(model.state_dict(keep_vars=True))
    named = tensors_of(model)
    aliases = tied(named)
    constants, shipped = [], {}
    for fqn in sorted(fqns):
        tensor = named.get(fqn, program.constants.get(fqn))
        if not isinstance(tensor, torch.Tensor):
            raise CompileFailed(
                f"build: the graph reads {fqn}, which the model does not have",
                hint="report it with the model's config",
            )
        if fqn in saved:
            origin = checkpoint_origin(model, fqn, tensor, aliases[fqn])
        else:
            origin = Origin(file=BUFFERS)
            shipped[fqn] = tensor.detach().contiguous().cpu().clone()
        constants.append(
            Constant(
                fqn=fqn,
                aliases=tuple(aliases.get(fqn, ())),
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                stride=tuple(tensor.stride()),
                origin=origin,
            )
        )
    return tuple(constants), shipped


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have; non-persistent buffers too."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def tied(named: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The other names of each tensor, as of an embedding that is the output layer too."""
    names: dict[int, list[str]] = {}
    for name, tensor in named.items():
        names.setdefault(id(tensor), []).append(name)
    return {
        name: [other for other in names[id(tensor)] if other != name]
        for name, tensor in named.items()
    }


def checkpoint_origin(
    model: nn.Module, fqn: str, tensor: torch.Tensor, aliases: Iterable[str]
) -> Origin:
    """The names to look for in a checkpoint: the model's own first, then with and without a head.

    A checkpoint saved from a model with another head has the base model's prefix, or lacks it.
    """
    prefix = getattr(model, "base_model_prefix", "")
    names: list[str] = []
    transform = None
    for name in (fqn, *aliases):
        saved, transform = saved_names(model, name, tensor)
        names += saved
        for each in (name, *saved):
            names.append(each)
            if prefix:
                short = each.removeprefix(f"{prefix}.")
                names.append(short if short != each else f"{prefix}.{each}")
    return Origin(checkpoint=tuple(dict.fromkeys(names)), transform=transform)


def saved_names(model: nn.Module, fqn: str, tensor: torch.Tensor) -> tuple[list[str], str | None]:
    """What transformers would call this tensor in a checkpoint, and how it is changed if at all.

    Private, checked on transformers 5.17 to 5.22: `core_model_loading.revert_weight_conversion`.
    Where it is gone, the model's own name is the only one.
    """
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
