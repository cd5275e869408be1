"""Calls of a whole model at the sizes at which its blocks are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.compiler import kv_inputs as caches
from hubaoti.compiler.capture import thaw_arguments
from hubaoti.compiler.fake_run import Arguments
from hubaoti.compiler.from_config import Source

_ROOT = "root"


def count_runs(source: Source) -> int:
    """How many times a model is looked at: once for each size that its dims had."""
    return len(source.calls) or len(next(iter(source.looks.values()), (1,)))


def prepare_sample_call(
    source: Source, index: int, blocks: Mapping[str, nn.Module], device: torch.device
) -> Any:
    """A call of a whole model at the sizes of look number `index`, made where it is used."""

    def repeat() -> Arguments:
        call = source.calls[index]
        tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in call.tensors
        ]
        args, kwargs = thaw_arguments(call.template, tensors, {})
        return tuple(args), kwargs

    def make() -> Arguments:
        sizes = {name: series[index] for name, series in source.looks.items()}
        tensors = source.face.make_empty_inputs(sizes, device)
        layers = caches.count_layers(source.model)
        seen = caches.make_recording_cache(sizes.get("filled", 1), sizes.get("seq", 1), layers)
        known = {"size": lambda text: DimExpr.parse(text).at(sizes), "cache": seen}
        args, kwargs = thaw_arguments(source.face.template, tensors, known)
        return tuple(args), kwargs

    return repeat if source.calls else make
