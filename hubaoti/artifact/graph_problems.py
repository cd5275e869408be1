"""What one graph's entry of a manifest says that cannot be true together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Graph


def find_graph_problems(graph: Graph) -> list[str]:
    """All of it, in words, each with the graph's name; of a good one nothing."""
    found = [] if graph.modules else [f"{graph.id}: it serves no module"]
    found += _find_unknown_dims(graph)
    found += _find_impossible_steps(graph)
    found += _find_repeated_constants(graph)
    found += _find_misplaced_cache(graph)
    found += _find_missing_mask(graph)
    found += _find_bad_outputs(graph)
    return found


def _find_unknown_dims(graph: Graph) -> list[str]:
    """Dims that a shape names and the bounds do not, and bounds that are empty."""
    extents = {size for entry in graph.inputs for size in entry.shape if isinstance(size, str)}
    named = {dim for extent in extents for dim in DimExpr.parse(extent).dims}
    found = [f"{graph.id}: dim {dim} has no bounds" for dim in sorted(named - {*graph.bounds})]
    for dim, (low, high) in graph.bounds.items():
        if not 0 <= low <= high or high == 0:
            found.append(f"{graph.id}: dim {dim} is bounded by [{low}, {high}]")
    for dim in sorted(graph.steps.keys() - graph.bounds.keys()):
        found.append(f"{graph.id}: dim {dim} has a step and no bounds")
    return found


def _find_impossible_steps(graph: Graph) -> list[str]:
    """Steps that are none, or of which no multiple lies within the bounds."""
    return [
        f"{graph.id}: dim {dim} has steps of {step}, of which none is in its bounds"
        for dim, step in graph.steps.items()
        if dim in graph.bounds
        and (step < 1 or graph.bounds[dim][1] // step * step < max(graph.bounds[dim][0], 1))
    ]


def _find_repeated_constants(graph: Graph) -> list[str]:
    """Constants of one name, and other names of a constant that are another one's own."""
    counted = Counter(constant.fqn for constant in graph.constants)
    found = [
        f"{graph.id}: constant {n} is listed twice" for n, times in counted.items() if times > 1
    ]
    for constant in graph.constants:
        found += [
            f"{graph.id}: {alias} is another name of constant {constant.fqn}, and a constant itself"
            for alias in constant.aliases
            if alias in counted
        ]
    return found


def _find_bad_outputs(graph: Graph) -> list[str]:
    """Templates of answers, and of what is left in a call, that nothing can be made of."""
    outputs = graph.outputs
    writes = () if isinstance(outputs.writes, msgspec.UnsetType) else outputs.writes
    templates = [outputs.template, *(item for write in writes for _, item in write.items)]
    fine = all(_is_made_of(each, len(outputs.tensors), bool(writes)) for each in templates)
    found = [] if fine else [f"{graph.id}: its answer is made of what is not there"]
    if not all(write.into for write in writes):
        found.append(f"{graph.id}: it leaves something nowhere")
    return found


def _is_made_of(template: Any, tensors: int, given: bool) -> bool:
    """Whether a template is made of so many tensors and literals, or of what a call gives."""
    if isinstance(template, list):
        return all(_is_made_of(item, tensors, given) for item in template)
    if not isinstance(template, dict):
        return True
    words = [word for word in template if word not in {"class", "order"}]
    word = words[0] if len(words) == 1 else ""
    inner = template.get(word)
    if word == "tensor":
        return type(inner) is int and 0 <= inner < tensors
    if word == "given":
        return given and isinstance(inner, list)
    if word in {"dict", "fields"} and isinstance(inner, dict):
        named = template.get("order", [*inner])
        same = isinstance(named, list) and sorted(map(str, named)) == sorted(inner)
        return same and all(_is_made_of(item, tensors, given) for item in inner.values())
    if word == "items" and isinstance(inner, list):
        pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in inner)
        return pairs and all(_is_made_of(item, tensors, given) for _, item in inner)
    if word == "tuple":
        return isinstance(inner, list) and _is_made_of(inner, tensors, given)
    return word in {"float", "dtype", "device"} and isinstance(inner, str)


def _find_misplaced_cache(graph: Graph) -> list[str]:
    """Places of a cache where no such input is, or one that the graph would not write."""
    if graph.cache is None:
        return []
    places = [graph.cache.keys, graph.cache.values]
    if not all(index < len(graph.inputs) and graph.inputs[index].mutated for index in places):
        return [f"{graph.id}: its cache is not among its mutated inputs"]
    position = graph.cache.position
    if position is not None and not position < len(graph.inputs):
        return [f"{graph.id}: its cache has no position"]
    return []


def _find_missing_mask(graph: Graph) -> list[str]:
    """What masks may say, of a graph that does not take one with rows and places."""
    masks = [item for item in graph.inputs if item.values == "mask"]
    if graph.masks is msgspec.UNSET or [len(mask.shape) for mask in masks] == [4]:
        return []
    return [f"{graph.id}: it serves masks that are {graph.masks}, and takes none of four axes"]
