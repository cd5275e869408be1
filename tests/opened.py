"""Graphs of a bundle, opened over the tensors of a module that is here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.compiler.verify import share_constants
from hubaoti.runtime.graph import Graph, open_graph


def unpacked(bundle: Bundle, folder: Path) -> dict[str, Path]:
    """Each graph's package of a bundle, unpacked below a folder, by the graph's id."""
    for entry in bundle.manifest.graphs:
        unpack_all(bundle.path / entry.file, folder / entry.id)
    return {entry.id: folder / entry.id for entry in bundle.manifest.graphs}


def opened(bundle: Bundle, entry: Entry, folder: Path, module: nn.Module) -> Graph:
    """A graph that is bound to a module's own parameters and buffers."""
    graph = open_graph(folder, entry, torch.device("cpu"))
    graph.bind(share_constants(module, entry, bundle.path))
    return graph
