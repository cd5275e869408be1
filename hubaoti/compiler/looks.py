"""Calls of a whole model at the sizes at which its blocks are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hubaoti.compiler import cache as caches
from hubaoti.compiler.calls import arguments
from hubaoti.compiler.observe import Given
from hubaoti.compiler.source import Source
from hubaoti.extents import Extent
from hubaoti.runtime.checks import dtype_of

ROOT = "root"


def runs_of(source: Source) -> int:
    """How many times a model is looked at: once for each size that its dims had."""
    return len(source.calls) or len(next(iter(source.looks.values()), (1,)))


def look(source: Source, at: int, blocks: Mapping[str, nn.Module], device: torch.device) -> Any:
    """A call of a whole model at the sizes of look number `at`, made where it is used."""

    def again() -> Given:
        call = source.calls[at]
        tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in call.tensors
        ]
        args, kwargs = arguments(call.template, tensors, {})
        return Given(tuple(args), kwargs)

    def given() -> Given:
        sizes = {name: series[at] for name, series in source.looks.items()}
        tensors = [
            torch.empty(
                [n if isinstance(n, int) else Extent.parse(n).at(sizes) for n in entry.shape],
                dtype=dtype_of(entry.dtype),
                device=device,
            )
            for entry in source.face.inputs
        ]
        layers = caches.layers_of(source.model)
        seen = caches.seen(sizes.get("filled", 1), sizes.get("seq", 1), layers)
        known = {"size": lambda text: Extent.parse(text).at(sizes), "cache": seen}
        args, kwargs = arguments(source.face.template, tensors, known)
        return Given(tuple(args), kwargs)

    return again if source.calls else given
