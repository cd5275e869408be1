"""What cannot be true together in a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubaoti.errors import BadRequest
from hubaoti.extents import Extent

if TYPE_CHECKING:
    from hubaoti.manifest import Graph, Manifest

MANIFEST = "hubaoti.json"


def contradictions(manifest: Manifest) -> list[str]:
    """What cannot be true together; a good manifest has none."""
    found = []
    if not manifest.graphs:
        found.append("it lists no graph")
    found += unspeakable_labels(manifest)
    found += clashing_files(manifest)
    found += requirement_clashes(manifest)
    for graph in manifest.graphs:
        found += unknown_dims(graph)
        found += misplaced_cache(graph)
    return found


def unspeakable_labels(manifest: Manifest) -> list[str]:
    """A recipe or a variant that has no name, and so no path in a repo."""
    found = []
    for name in ("recipe", "variant"):
        try:
            getattr(manifest, name)
        except BadRequest as why:
            found.append(f"its {name}: {why}")
    return found


def clashing_files(manifest: Manifest) -> list[str]:
    """Paths that two files share, and constants from files that are not listed."""
    paths = [file.path for file in manifest.all_files()]
    ids = [graph.id for graph in manifest.graphs]
    found = [f"{path} is listed twice" for path in repeated([*paths, MANIFEST])]
    found += [f"graph {name} is listed twice" for name in repeated(ids)]
    for graph in manifest.graphs:
        members = [member.path for member in graph.members]
        found += [f"{graph.id}: member {path} is listed twice" for path in repeated(members)]
        files = {c.origin.file for c in graph.constants if c.origin.file}
        found += [f"{graph.id}: constants from {f}, not listed" for f in sorted(files - {*paths})]
    return found


def requirement_clashes(manifest: Manifest) -> list[str]:
    """`requires` and `target` describe one host; where both speak they must agree."""
    target, needs = manifest.target, manifest.requires
    return [
        f"target.{name} is {getattr(target, name)}, requires.{name} is {getattr(needs, name)}"
        for name in ("device", "os", "level", "torch", "cuda", "sm")
        if getattr(target, name) != getattr(needs, name)
    ]


def unknown_dims(graph: Graph) -> list[str]:
    """Dims that a shape names and the bounds do not, and bounds that are empty."""
    extents = [size for entry in graph.inputs for size in entry.shape if isinstance(size, str)]
    named = {dim for extent in extents for dim in Extent.parse(extent).dims}
    found = [f"{graph.id}: dim {dim} has no bounds" for dim in sorted(named - {*graph.bounds})]
    for dim, (low, high) in graph.bounds.items():
        if not 0 <= low <= high or high == 0:
            found.append(f"{graph.id}: dim {dim} is bounded by [{low}, {high}]")
    for dim in sorted(graph.steps.keys() - graph.bounds.keys()):
        found.append(f"{graph.id}: dim {dim} has a step and no bounds")
    return found


def misplaced_cache(graph: Graph) -> list[str]:
    """Places of a cache where no such input is, or one that the graph would not write."""
    if graph.cache is None:
        return []
    places = [graph.cache.keys, graph.cache.values]
    if not all(at < len(graph.inputs) and graph.inputs[at].mutated for at in places):
        return [f"{graph.id}: its cache is not among its mutated inputs"]
    position = graph.cache.position
    if position is not None and not position < len(graph.inputs):
        return [f"{graph.id}: its cache has no position"]
    return []


def repeated(names: list[str]) -> list[str]:
    """The names that stand more than once, compared as a case-folding disk would."""
    folded = [name.casefold() for name in names]
    return sorted({name for name in folded if folded.count(name) > 1})
