"""The models that are measured: made so that every parameter matters, and compiled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings


@dataclass(frozen=True)
class ModelCase:
    """A model by its config, which names its class, and the options that it is compiled with."""

    config: Any
    options: Mapping[str, Any]  # of `api.compile`

    def compile(self, folder: Path, settings: Settings) -> Bundle:
        """Its bundle, from a folder with its config alone; what the mirror has is taken from it."""
        self.config.save_pretrained(folder)
        output = folder.with_name(f"{folder.name}-bundle")
        return api.compile(folder, output, settings=settings, **self.options)

    def make_model(self) -> Any:
        """The model itself, of the same weights each time."""
        kind = getattr(transformers, self.config.architectures[0])
        return randomize_parameters(kind(copy.deepcopy(self.config)))


def make_settings(home: Path) -> Settings:
    """Settings of a home without a Hub."""
    return Settings(home=home, endpoint="http://127.0.0.1:9")


def randomize_parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model whose every parameter matters: matrices that keep sizes, norms and biases off rest.

    As transformers would begin a training, attention looks everywhere alike and biases are zero,
    and a graph that left them out would pass.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in model.named_parameters():
            noise = torch.randn(each.shape, generator=draw)
            if each.dim() > 1:
                each.copy_(noise * each.shape[-1] ** -0.5)
            else:
                each.add_(noise * 0.1) if name.endswith("weight") else each.copy_(noise * 0.1)
    return model.eval()
