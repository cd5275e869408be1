"""What recipes of quantization take, on each kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import torch

from hubaoti.errors import BadRequest, CompileFailed

RECIPES = ("int8wo", "int4wo", "float8dq")
GROUP = 128  # weights of a row that share a scale, in int4wo


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What a recipe takes on one kind of device; sizes are multiples of (out, in).

    `sm` is the least compute capability, 89 for 8.9.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    sizes: tuple[int, int] = (1, 1)
    sm: int = 0


FITS: dict[str, dict[str, LayerFit]] = {
    "int8wo": {"cpu": LayerFit(), "cuda": LayerFit()},
    "int4wo": {"cpu": LayerFit(sizes=(16, GROUP))},
    "float8dq": {"cuda": LayerFit((torch.bfloat16,), sizes=(16, 16), sm=89)},
}
# Why a recipe is for no device of a kind, where that can be said.
_REASONS = {("int4wo", "cuda"): ", since a GPU packs such weights by a kernel of its own"}


def check_recipe(recipe: str, device: str, sm: int = 0) -> LayerFit:
    """What the recipe takes on a kind of device; asked before a model is built.

    `device` is cpu or cuda, and `sm` the compute capability of a GPU that need not be here.

    Raises:
        BadRequest: there is no such recipe.
        CompileFailed: such a device cannot run it.
    """
    if recipe not in FITS:
        near = get_close_matches(recipe, RECIPES, 1)
        raise BadRequest(
            f"unknown quantization: {recipe!r:.60}",
            hint=f"did you mean {near[0]}?" if near else f"there are {', '.join(RECIPES)}",
        )
    fit = FITS[recipe].get(device)
    if fit is None or sm < fit.sm:
        needs = (_describe_device(kind, each.sm) for kind, each in FITS[recipe].items())
        raise CompileFailed(
            f"quantize: {recipe} is for {' or '.join(needs)}, not for "
            f"{_describe_device(device, sm)}{_REASONS.get((recipe, device), '')}",
            hint=f"try --quantize {_list_recipes(device, sm)}",
        )
    return fit


def _describe_device(kind: str, sm: int) -> str:
    """A kind of device, and its compute capability where that counts: `cuda sm89`."""
    return f"{kind} sm{sm}" if sm else kind


def _list_recipes(device: str, sm: int) -> str:
    """The recipes that a device can run."""
    fitting = ((name, fits[device]) for name, fits in FITS.items() if device in fits)
    return " or ".join(name for name, fit in fitting if sm >= fit.sm)
