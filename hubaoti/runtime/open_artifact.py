"""The child that opens graphs of an artifact, and compares their golden answers."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hubaoti.artifact.manifest import FILENAME, parse_manifest
from hubaoti.artifact.schema import Graph
from hubaoti.errors import NotEnoughMemory, NotTried, first_line
from hubaoti.host.processes import join_parent
from hubaoti.mirror import Artifact
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.kernels import open_kernels
from hubaoti.runtime.open_child import ArtifactRequest, OpenReport
from hubaoti.runtime.open_fork import Attempt, FirstOpen

_BESIDE = 1 << 16  # bytes of answers beside the golden ones: a header for their names


def main() -> None:
    """Read what is asked, and try the graphs."""
    channel = join_parent(is_awaited=True, is_watched=False)
    request: ArtifactRequest = channel.receive(ArtifactRequest)
    path, graphs = (Path(os.fsdecode(each)) for each in (request.path, request.graphs))
    manifest = parse_manifest((path / FILENAME).read_bytes(), str(path))
    artifact = Artifact(manifest.digest, path, graphs, manifest)
    pins = manifest.requires.kernels
    kernels = [artifact.kernels / pin.build.digest for pin in pins if pin.build is not None]
    expected = path / golden.GOLDEN
    FirstOpen(
        try_graph=partial(_try_graph, artifact, torch.device(request.device)),
        judge=partial(_judge, artifact, computes=request.computes),
        readable=(path, *map(artifact.graph_folder, manifest.graphs), *kernels),
        most=_BESIDE + (expected.stat().st_size if expected.is_file() else 0),
        compiles=bool(kernels),
    ).report(channel, request)


def _try_graph(artifact: Artifact, device: torch.device, attempt: Attempt) -> bytes:
    """Open a graph of an artifact: what it says to its golden questions, as samples."""
    entry = _find_entry(artifact, attempt.graph)
    if kernels := artifact.manifest.requires.kernels:
        attempt.begin(of_kernel=True)
        open_kernels(kernels, artifact.kernels, device)
    attempt.begin()
    try:
        graph = open_graph(artifact.graph_folder(entry), entry, device)
        if entry.golden is None:
            attempt.opened = True
            return b""
        expected = golden.load_expected(entry, artifact.path)
        attempt.note_opened()
        return _pack(golden.ask_golden(graph, artifact.path), expected)
    except torch.OutOfMemoryError as error:  # of a GPU: others have the rest of it
        hint = "free some of the GPU's memory: a graph is not opened before it was tried"
        raise NotEnoughMemory(f"graph {entry.id}: {first_line(error)}", hint=hint) from error


def _pack(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bytes:
    """Of each answer that is expected as many elements as are, as safetensors writes them."""
    samples = {
        name: golden.sample_tensor(found[name], theirs.numel())
        for name, theirs in expected.items()
        if name in found
    }
    # Each of its own: answers may share memory.
    whole = {
        name: sample.clone(memory_format=torch.contiguous_format)
        for name, sample in samples.items()
    }
    return save(whole)


def _judge(artifact: Artifact, graph: str, answers: bytes, *, computes: bool) -> OpenReport:
    """Compare a graph's answers with the golden ones.

    Raises:
        MissingConstant: there are none. NotTried: what was given is no answers.
    """
    entry = _find_entry(artifact, graph)
    if entry.golden is None or not computes:
        return OpenReport(graph, "", opened=True)
    expected = golden.load_expected(entry, artifact.path)
    try:
        found = load(answers)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise NotTried(
            f"what graph {graph} answered is no tensors: {first_line(error)}", hint="try again"
        ) from error
    reasons = golden.compare_golden_answers(found, expected, entry.golden.tolerances)
    return OpenReport(graph, "; ".join(reasons), opened=True, compared=True)


def _find_entry(artifact: Artifact, graph: str) -> Graph:
    return next(each for each in artifact.manifest.graphs if each.id == graph)
