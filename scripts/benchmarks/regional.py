"""What a model of many layers costs by its blocks, beside the whole: to compile, and to call."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import hubaoti
from benchmarks.answers import require_same
from benchmarks.figures import (
    Cost,
    Figure,
    compare_costs,
    divide_pairs,
    make_figure,
    measure_cost,
    time_in_turn,
)
from benchmarks.models import ModelCase
from hubaoti.artifact.bundle import Bundle
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings


def _make_llama(layers: int) -> ModelCase:
    """A small Llama's own `forward`, which is built even where it was built before."""
    config = transformers.LlamaConfig(
        architectures=["LlamaModel"],
        hidden_size=256,
        intermediate_size=704,
        max_position_embeddings=512,
        num_attention_heads=8,
        num_hidden_layers=layers,
        num_key_value_heads=4,
        vocab_size=2048,
    )
    dims = {"batch": (1, 8), "seq": (2, 256)}
    return ModelCase(config, {"task": "forward", "dims": dims, "force": True})


@dataclass(frozen=True)
class Layers:
    """Models that differ in their number of layers alone, and the sizes of calls of one of them."""

    few: ModelCase
    some: ModelCase  # this one is compiled whole, too
    many: ModelCase
    shapes: Sequence[tuple[int, int]] = ((2, 32), (4, 128))


_LAYERS = Layers(_make_llama(2), _make_llama(24), _make_llama(80))


def bench_regional(
    scratch: Path, settings: Settings, rounds: int, layers: Layers = _LAYERS
) -> list[Figure]:
    """A model of many layers by its blocks, and whole: compile time, and the time of a call."""
    build = partial(_build, scratch, settings)
    build("few", layers.few)  # imports and first uses
    pairs: dict[str, list[Cost]] = {"few": [], "many": []}
    for index in range(rounds + 1):  # of six, the ends hold the median in 97 of 100 runs
        for which, costs in sorted(pairs.items(), reverse=index % 2 == 1):
            costs.append(build(which, getattr(layers, which))[1])
    regional, by_regions = build("some", layers.some)
    options = {**layers.some.options, "regions": "none"}
    whole, at_once = build("whole", ModelCase(layers.some.config, options))
    few, some, many = (
        each.config.num_hidden_layers for each in (layers.few, layers.some, layers.many)
    )
    name = f"{many} layers to {few}"
    found = [
        make_figure("regional", f"{some} layers, compiled by regions", [by_regions.seconds], "s"),
        make_figure("regional", f"{some} layers, compiled whole", [at_once.seconds], "s"),
        *compare_costs("regional", "regions to whole", [by_regions], [at_once], ("at most", 0.2)),
        *compare_costs("regional", name, pairs["many"], pairs["few"], ("at most", 1.1)),
    ]
    return found + _measure_calls(layers, regional, whole, settings, rounds)


def _build(scratch: Path, settings: Settings, name: str, case: ModelCase) -> tuple[Bundle, Cost]:
    """A bundle of a model's own `forward`, and what it took."""
    shutil.rmtree(scratch / f"{name}-bundle", ignore_errors=True)
    with measure_cost() as cost:
        bundle = case.compile(scratch / name, settings)
    return bundle, cost


def _measure_calls(
    layers: Layers, regional: Bundle, whole: Bundle, settings: Settings, rounds: int
) -> list[Figure]:
    """Calls of several sizes, by regions to whole."""
    models = [layers.some.make_model() for _ in range(2)]
    for model in models:
        model.config.use_cache = False
    attach = partial(hubaoti.attach, strict=True, settings=settings)
    with attach(models[0], regional), attach(models[1], whole) as attachment, torch.no_grad():
        (graph,) = attachment.graphs
        return [_measure_call(models[0], graph, shape, rounds) for shape in layers.shapes]


def _measure_call(model: Any, graph: Graph, shape: tuple[int, int], rounds: int) -> Figure:
    """One call through the graphs of regions and eager between them, to one of the whole graph."""
    batch, seq = shape
    ids = torch.randint(1, model.config.vocab_size, shape)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # else transformers leaves the blocks' masks out
    position = torch.arange(seq).expand(batch, seq).contiguous()
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    inputs = [tensors[item.name] for item in graph.entry.inputs]
    sides: dict[str, Callable[[], Any]] = {
        "regional": partial(model, **tensors),
        "whole": partial(graph, *inputs),
    }
    name = "regional: the whole graph and the regions"
    require_same([sides["regional"]()[0]], [sides["whole"]()[0]], name)
    time_in_turn(sides, 3)
    spent = time_in_turn(sides, 20 * rounds)
    over = divide_pairs(spent["regional"], spent["whole"])
    name = f"({batch}, {seq}) a call by regions to whole"
    return make_figure("regional", name, over, "times", ("includes", 1.05))
