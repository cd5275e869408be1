"""An artifact that is asked for by its path: judged here, whether its torch is installed or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from hubaoti.artifact.requirements import Requirements, comes_with_torch
from hubaoti.errors import NoArtifact, NoMatch
from hubaoti.host.extras import format_install
from hubaoti.host.match import Compromise, Verdict, judge
from hubaoti.host.probe import Gpu, Host, Torch
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.layout import ArtifactPath, RepoRef

_DRIVER_LIBRARY = "libcuda.so.1"


def judge_named(requires: Requirements, host: Host) -> Verdict:
    """Whether an artifact runs here, or would with its torch and its GPU: notes say what lacks.

    So a machine that only fetches, as for an image, needs neither.
    """
    missing = []
    if host.torch is None:
        host = _add_torch(host, requires)
        release = Version(requires.torch).public
        advice = f'install it before the artifact is opened: pip install "torch=={release}"'
        missing.append(Compromise(f"torch {requires.torch}", "no torch", advice))
    if requires.sm is not None and not host.gpus:
        host = _add_gpu(host, requires)
        advice = "it opens only where there is one, with its driver"
        missing.append(Compromise(f"an NVIDIA GPU of sm_{requires.sm}", "none", advice))
    verdict = judge(requires, host)
    return replace(verdict, notes=(*missing, *verdict.notes))


def _add_torch(host: Host, requires: Requirements) -> Host:
    """The host as it would be with the torch of an artifact."""
    brought = frozenset(filter(comes_with_torch, requires.libraries))
    torch = Torch(requires.torch, requires.cuda, None, Path())
    return _add_libraries(replace(host, torch=torch), brought)


def _add_gpu(host: Host, requires: Requirements) -> Host:
    """The host as it would be with a GPU that an artifact is for, and a driver that serves it."""
    found = replace(
        host,
        gpus=(Gpu("a GPU", requires.sm or 0, None),),
        driver=host.driver or "any",
        driver_cuda=host.driver_cuda or requires.driver,
    )
    return _add_libraries(found, frozenset({_DRIVER_LIBRARY}))


def _add_libraries(host: Host, names: frozenset[str]) -> Host:
    """The host with more libraries, where it is known which it has."""
    return replace(host, libraries=None if host.libraries is None else host.libraries | names)


def describe_no_artifact(place: ArtifactPath, catalog: Catalog) -> NoArtifact:
    """The refusal of a path that holds no artifact."""
    there = ", ".join(map(str, catalog.places))
    return NoArtifact(
        f"{catalog.repo} at {catalog.commit} holds no artifact {place}",
        hint=f"it holds {there}" if there else "it holds none; see whether the revision is right",
    )


def describe_no_torch(error: NoMatch, ref: RepoRef, catalog: Catalog) -> NoMatch:
    """The refusal to choose where no torch is installed that could decide."""
    place = next(iter(catalog.readable))
    install = f'pip install "torch=={place.variant.torch}.*", then {format_install("run")}'
    return NoMatch(
        f"{error}\nno torch is installed here, which decides on what fits",
        hint=f"install the one that it was built for: {install}; or fetch the artifact "
        f"beforehand: hubaoti pull {ref} --path {place}",
    )
