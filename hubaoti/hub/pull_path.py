"""An artifact that is asked for by its path: judged here, whether its torch is installed or not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from hubaoti.artifact.requirements import Requirements
from hubaoti.errors import NoArtifact, NoMatch
from hubaoti.host.match import Compromise, Verdict, judge
from hubaoti.host.probe import Host, Torch
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.layout import ArtifactPath, RepoRef

# What torch's wheels, and the nvidia wheels that it needs, bring along; libcuda is the driver's.
_OF_TORCH = re.compile(r"lib(torch|c10|gomp|gfortran|shm|caffe2|nv|nccl|cu(?!da\.))")


def judge_named(requires: Requirements, host: Host) -> Verdict:
    """Whether an artifact runs here, or would with its torch: where there is none, a note says so.

    So a machine that only fetches, as for an image, needs no torch.
    """
    if host.torch is not None:
        return judge(requires, host)
    brought = frozenset(filter(_OF_TORCH.match, requires.libraries))
    torch = Torch(requires.torch, requires.cuda, None, Path())
    verdict = judge(requires, replace(host, torch=torch, libraries=host.libraries | brought))
    release = Version(requires.torch).public
    missing = Compromise(
        need=f"torch {requires.torch}",
        have="no torch",
        advice=f'install it before the artifact is opened: pip install "torch=={release}"',
    )
    return replace(verdict, notes=(missing, *verdict.notes))


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
    return NoMatch(
        f"{error}\nno torch is installed here, which decides on what fits",
        hint='install one: pip install "hubaoti[run]"; or fetch an artifact for it beforehand: '
        f"hubaoti pull {ref} --path {place}",
    )
