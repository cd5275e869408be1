"""What fits a host best in each of several repos, within bounds, and which of them is best.

Anybody may tag a repo with a program, so a manifest's own program counts; nothing but lists and
manifests is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import HubaotiError, OtherProgram
from hubaoti.host.rank import Candidate, rank
from hubaoti.hub.catalog import Allowance, Catalog, list_catalog, read_manifests
from hubaoti.hub.choice import Considered, choose_artifact
from hubaoti.hub.kernel_choice import make_asking_trial
from hubaoti.hub.layout import ArtifactPath, RepoRef

if TYPE_CHECKING:
    from hubaoti.artifact.schema import Program
    from hubaoti.hub.pull import Puller

MOST_LOOKED_INTO = 20  # repos
_MANIFESTS, _BYTES = 200, 16 << 20  # of one repo, so that none uses up what is for all
_SECONDS = 300.0  # for all of them


@dataclass(frozen=True, slots=True)
class Look:
    """What of a repo fits a host best, and what was looked at; or why nothing of it could be."""

    ref: RepoRef
    catalog: Catalog | None = field(default=None, repr=False)
    best: Considered | None = None
    considered: tuple[Considered, ...] = field(default=(), repr=False)
    error: HubaotiError | None = None


def survey(
    puller: Puller, refs: Sequence[RepoRef], program: Program | None, pin: Callable[[RepoRef], str]
) -> list[Look]:
    """What fits best of each of the first `MOST_LOOKED_INTO` repos; one that fails hides no other.

    `pin` gives the commit that is looked at.
    """
    looks, end = [], time.monotonic() + _SECONDS
    for ref in refs[:MOST_LOOKED_INTO]:
        puller.progress(f"looking into {ref}")
        try:
            looks.append(_look_into(puller, ref, pin(ref), program, end))
        except HubaotiError as error:
            looks.append(Look(ref, error=error))
    return looks


def _look_into(
    puller: Puller, ref: RepoRef, commit: str, program: Program | None, end: float
) -> Look:
    left = Allowance(_MANIFESTS, _BYTES, end)
    catalog = list_catalog(puller.client, ref.repo, commit, left, puller.find_required(ref))
    digest = None if program is None else program.digest

    def read(places: Iterable[ArtifactPath]) -> Catalog:
        nonlocal catalog
        catalog = _keep_program(read_manifests(puller.client, catalog, places, left), digest)
        return catalog

    trial = make_asking_trial(puller, lambda: catalog) if puller.is_free else None
    look = None if trial is None else trial.look
    best, considered = choose_artifact(catalog.places, read, puller.host, puller.recipe, look)
    if best is None and trial is not None:
        trial.require_something()
    return Look(ref, catalog, best, considered)


def _keep_program(catalog: Catalog, digest: str | None) -> Catalog:
    """A catalog whose artifacts of another program cannot be used; all can where none is asked."""
    artifacts = {
        place: OtherProgram(
            f"it is of the program {each.program.digest[:12]}, not of {digest[:12]}",
            hint="compile one of this program and push it",
        )
        if isinstance(each, Manifest) and digest not in {None, each.program.digest}
        else each
        for place, each in catalog.artifacts.items()
    }
    return replace(catalog, artifacts=artifacts)


def rank_looks(looks: Iterable[Look], recipe: Recipe | None) -> list[Look]:
    """Those that found something that fits, the best first; of equals the one that is newest."""
    newest = sorted(looks, key=_read_age, reverse=True)
    fitting = {f"{at:06}": each for at, each in enumerate(newest) if each.best is not None}
    candidates = [_make_candidate(each, name) for name, each in fitting.items()]
    return [fitting[each.id] for each in rank(candidates, recipe)]


def _read_age(look: Look) -> str:
    """When its best was built, as its manifest says."""
    return look.best.manifest.built.at if look.best and look.best.manifest else ""


def _make_candidate(look: Look, name: str) -> Candidate:
    best = look.best
    assert best is not None and best.verdict is not None
    return Candidate(best.place.recipe, best.place.variant, best.verdict, name)


def explain_rank(ranked: Sequence[Look], recipe: Recipe | None) -> str:
    """Why the first of them is the first."""
    best, *others = ranked
    if not others:
        return "the only one that fits"
    first, second = (_make_candidate(each, "") for each in (best, others[0]))
    there = f"{others[0].ref} has {second.recipe}/{second.variant}"
    if first.verdict.fit is not second.verdict.fit:
        return f"{first.verdict.fit}, and what {there} is {second.verdict.fit}"
    # Equals are told apart by their names alone.
    other_way = [replace(first, id="1"), replace(second, id="0")]
    if rank(other_way, recipe)[0] is other_way[1]:
        return f"built last of those that fit as well; {there}, too"
    return f"it comes before others that fit; {there}"
