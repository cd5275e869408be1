"""Models that are measured, whose every parameter matters, their graphs, how far answers are apart.

Nothing here is shared with the compiler's own checks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import Graph as Entry
from hubaoti.artifact.package import unpack_all
from hubaoti.runtime.graph import Graph, open_graph
from hubaoti.runtime.weights import load_shipped_tensors
from hubaoti.settings import Settings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Asked:
    """A model by its config, which names its class, and what is asked of its graphs."""

    config: Any
    words: Mapping[str, Any]  # of `api.compile`

    def compiled(self, folder: Path, settings: Settings) -> Bundle:
        """Its bundle, from a folder with its config alone; what the mirror has is taken from it."""
        self.config.save_pretrained(folder)
        output = folder.with_name(f"{folder.name}-bundle")
        return api.compile(folder, output, settings=settings, **self.words)

    def model(self) -> Any:
        """The model itself."""
        kind = getattr(transformers, self.config.architectures[0])
        return shaken(kind(copy.deepcopy(self.config)))


def alone(scratch: Path) -> Settings:
    """Settings of a home below a folder, without a Hub."""
    return Settings(home=scratch / "home", endpoint="http://127.0.0.1:9")


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
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


def opened(bundle: Bundle, entry: Entry, scratch: Path, model: nn.Module) -> Iterator[Graph]:
    """The graph, opened and bound anew for each module that it serves, by reference."""
    folder = scratch / entry.id
    if not folder.exists():
        unpack_all(bundle.path / entry.file, folder)
    for path in entry.modules:
        graph = open_graph(folder, entry, CPU)
        module = model.get_submodule(path)
        own: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        own |= dict(module.named_buffers(remove_duplicate=False))
        graph.bind(own | dict(load_shipped_tensors(entry, bundle.path, CPU)))
        yield graph


def apart(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """The largest difference, as a part of the largest value of its tensor; inf for other shapes.

    Raises:
        ValueError: one of them has more tensors.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return float("inf")
        difference = (ours - theirs).abs()
        difference[(ours == theirs) | (ours.isnan() & theirs.isnan())] = 0.0  # equal infinities
        scale = theirs[theirs.isfinite()].abs().max().clamp(min=1e-30)
        worst = max(worst, (difference.max() / scale).nan_to_num(nan=float("inf")).item())
    return worst


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two sides that are measured must answer alike."""
    if apart([found], [expected]) > 1e-4:
        raise SystemExit("the sides answer differently")
