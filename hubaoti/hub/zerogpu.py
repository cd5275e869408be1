"""The layout that `spaces.aoti_load` and `aokit` read, on a branch of its own.

zerogpu/<recipe>/<variant>                     the branch
package/root/package.pt2                       the graph of the whole module
package/submodules/<dotted.name>/package.pt2   the graph of a module inside of it, or of each child
                                               of a list
<recipe>/<variant>/hubaoti.json                the artifact as everywhere, so that what it is and
                                               its digests can be seen there, too

Those loaders know no manifest: they call a package as its module is called, and bind what is in the
module's `state_dict`. So only graphs that are whole by themselves can lie there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Direct, Graph
from hubaoti.errors import BadRequest
from hubaoti.hub.layout import ArtifactPath, RepoRef, is_revision

LAYOUT = "zerogpu"
PACKAGE_ROOT = "package/root"
SUBMODULES = "package/submodules"
PACKAGE = "package.pt2"
_TEXTS = {"embed", "classify", "logits"}


def artifact_branch(place: ArtifactPath) -> str:
    """The branch that holds an artifact in this layout."""
    return f"{LAYOUT}/{place}"


def suggest_loader(ref: RepoRef, paths: Iterable[str], branches: Iterable[str]) -> str | None:
    """How to load what a repo holds for other loaders; None where it holds nothing of the kind."""
    load = f'in Python, hubaoti.spaces.load(module, "{ref.repo}"'
    for branch in sorted(branches):
        if branch.startswith(f"{LAYOUT}/") and is_revision(branch):
            return f"its graphs are on branches: hubaoti pull {ref.repo}@{branch}; or {load})"
    if any(path.rpartition("/")[2] == PACKAGE for path in paths):
        at = f', revision="{ref.revision}"' if ref.revision else ""
        return f"it holds packages for other loaders: {load}{at})"
    return None


def lay_out_packages(manifest: Manifest) -> Mapping[str, str]:
    """The bundle's file for each path of the layout.

    Raises:
        BadRequest: its graphs do not answer without hubaoti; with every reason.
    """
    reasons = [*_list_obstacles(manifest)]
    if reasons:
        raise BadRequest(
            f"the artifact cannot be read by spaces.aoti_load and aokit: {'; '.join(reasons)}",
            hint="compile it with --layout zerogpu; or push without --layout, and use "
            "hubaoti.spaces.load",
        )
    return {path: graph.file for graph in manifest.graphs for path in _list_package_paths(graph)}


def _list_package_paths(graph: Graph) -> Iterator[str]:
    """Where a graph's package lies: once for a list whose children it serves, all of them."""
    every = graph.direct.every if isinstance(graph.direct, Direct) else None
    for module in [every] if every else graph.modules:
        yield f"{SUBMODULES}/{module}/{PACKAGE}" if module else f"{PACKAGE_ROOT}/{PACKAGE}"


def _list_obstacles(manifest: Manifest) -> Iterator[str]:
    """Why loaders without a manifest cannot serve a module by these graphs."""
    if manifest.build.layout != LAYOUT:
        yield f"it was compiled without --layout {LAYOUT}"
    if manifest.is_whole and manifest.program.task in _TEXTS:
        yield f"it answers texts ({manifest.program.task}), not calls of the module"
    for graph in manifest.graphs:
        if obstacle := _find_obstacle(graph):
            yield f"graph {graph.id} {obstacle}"
    served = Counter(path for graph in manifest.graphs for path in graph.modules)
    for path, count in served.items():
        if count > 1:
            yield f"{path or 'the module'} has {count} graphs, and only hubaoti chooses by sizes"


def _find_obstacle(graph: Graph) -> str | None:
    """Why a graph does not answer by itself; None where it does."""
    if graph.cache is not None:
        return "takes the layers of a KV cache, which are no arguments of its module"
    if not isinstance(graph.direct, Direct):
        return (
            "is not called as its module is: calls give it what it was compiled without, or its "
            "module answers more than tensors, or it was compiled by an older hubaoti (--force)"
        )
    if graph.direct.absent:
        names = ", ".join(graph.direct.absent)
        return f"reads {names}, which the state_dict of its module does not have"
    return None
