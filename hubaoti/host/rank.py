"""Which of some artifacts is the best one for a host, of those that can run on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.host.match import MatchResult, Verdict, parse_cuda_version, rank_verdict

_ATTENTIONS = ("fa3", "sdpa")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An artifact that could be pulled; `id` (its path, its digest) is its own among candidates."""

    recipe: Recipe
    variant: Variant
    verdict: Verdict
    id: str


def rank(candidates: Iterable[Candidate], recipe: Recipe | None = None) -> list[Candidate]:
    """The candidates that can run here, best first: a total order, whatever order they come in.

    An asked recipe is a condition: only artifacts of exactly it, label included, are offered. With
    none asked every recipe is, except the quantized ones, which answer something else.
    """
    offered = [
        each
        for each in candidates
        if each.verdict.fit is not MatchResult.INCOMPATIBLE
        and (each.recipe.quantization is None if recipe is None else each.recipe == recipe)
    ]
    return sorted(offered, key=_rank_candidate)


def _rank_candidate(candidate: Candidate) -> tuple[Any, ...]:
    """Exact, fa3, unlabelled, GPU; then the higher CPU level and the nearer CUDA and sm; then id.

    Among those that fit, the nearer CUDA is the higher one: none is above the host's. A labelled
    recipe was built for a special use, and a CPU artifact leaves the GPU idle.
    """
    recipe, variant = candidate.recipe, candidate.variant
    known = recipe.attention in _ATTENTIONS
    return (
        rank_verdict(candidate.verdict),
        _ATTENTIONS.index(recipe.attention) if known else len(_ATTENTIONS),
        recipe.label is not None,
        variant.cuda is None,
        -_rank_level(variant.level),
        tuple(-number for number in parse_cuda_version(variant.cuda) or ()),
        -(variant.sm or 0),
        candidate.id,
    )


def _rank_level(level: str) -> int:
    """How far a CPU level stands above its family; -1 for one that archspec does not know."""
    from archspec.cpu import TARGETS

    return len(TARGETS[level].ancestors) if level in TARGETS else -1
