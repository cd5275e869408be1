"""Which artifact of a commit fits a host best, with as few manifests read as that takes.

A path says for which kind of host an artifact is, and its manifest is refused where it says
otherwise. So the path rules most of them out, and bounds how well the others can fit: they are read
in the order of their paths, until none that is left could be better. Only where nothing fits are
all of them read, so that the refusal has every reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from packaging.version import Version

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.requirements import Requirements, read_version, series
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.errors import BadSignature, HubaotiError, NoArtifact, NoMatch, Unsigned
from hubaoti.host.match import MatchResult, Verdict, judge
from hubaoti.host.probe import Host
from hubaoti.host.rank import Candidate, rank
from hubaoti.hub.catalog import Catalog, Unreadable
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.mirror import Artifact

_ANY_SM = 10  # the lowest that PTX can be for
_TOGETHER = 8  # manifests that are read at a time, once the first was not the best there could be

Read = Callable[[Iterable[ArtifactPath]], Catalog]
Look = Callable[["Considered"], "Considered"]


@dataclass(frozen=True, slots=True)
class Considered:
    """An artifact that was looked at: its verdict, or why its manifest cannot be used.

    One whose path rules it out has a verdict and no manifest.
    """

    place: ArtifactPath
    manifest: Manifest | None = field(repr=False)
    verdict: Verdict | None
    error: Unreadable | None = None

    @property
    def fits(self) -> bool:
        """Whether it can run here."""
        return self.verdict is not None and not self.verdict.refusals

    @property
    def is_refused(self) -> bool:
        """Whether it is not used for want of a signature, and not because it is broken."""
        return isinstance(self.error, Unsigned | BadSignature)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull chose, why, and among what; `from_mirror` says that nothing was fetched.

    It was `compiled` here where the repo had nothing that fits, and `is_kept_back` where it was to
    be pushed, and was not; a note says why.
    """

    artifact: Artifact
    ref: RepoRef
    commit: str
    place: ArtifactPath
    verdict: Verdict
    considered: tuple[Considered, ...] = field(repr=False)
    notes: tuple[str, ...]
    from_mirror: bool
    compiled: bool = False
    is_kept_back: bool = False


def choose_artifact(
    places: Iterable[ArtifactPath],
    read: Read,
    host: Host,
    recipe: Recipe | None,
    look: Look | None = None,
) -> tuple[Considered | None, tuple[Considered, ...]]:
    """The artifact that fits a host best, and all that were looked at; None where none fits.

    `read` reads the manifests of some places, and has them in its catalog, beside those before.
    The best one has the last word said of it by `look`; where that refuses it, the next best has.
    """
    places = [*places]
    bounds = {variant: judge_path(variant, host) for variant in {each.variant for each in places}}
    verdicts = {place: bounds[place.variant] for place in places}
    looked = {
        place: Considered(place, None, verdict)
        for place, verdict in verdicts.items()
        if verdict.fit is MatchResult.INCOMPATIBLE
    }
    waiting = rank([make_candidate(place, each) for place, each in verdicts.items()], recipe)
    chosen: Considered | None = None
    count = 1
    while chosen is None:
        best = next(iter(rank(_list_candidates(looked.values()), recipe)), None)
        if best is not None and not (waiting and rank([waiting[0], best], recipe)[0] is not best):
            found = looked[ArtifactPath.parse(best.id)]
            looked[found.place] = said = found if look is None else look(found)
            chosen = said if said.fits else None
        elif waiting:
            batch, waiting, count = waiting[:count], waiting[count:], _TOGETHER
            catalog = read([ArtifactPath.parse(each.id) for each in batch])
            read_now = judge_catalog(catalog, lambda requires: judge(requires, host))
            looked = {each.place: each for each in read_now} | looked
        else:
            break
    return chosen, tuple(looked[place] for place in verdicts if place in looked)


def judge_path(variant: Variant, host: Host) -> Verdict:
    """How well an artifact can fit at most, by its path: where it is refused, so is the manifest.

    What a path does not say is taken for the best that there is: a release of torch within its
    series, PTX for any GPU.
    """
    here = read_version(host.torch.version if host.torch else None)
    same = here is not None and series(here) == series(Version(variant.torch))
    best = Requirements(
        device=variant.device,
        os=variant.os,
        level=variant.level,
        torch=str(here) if same else f"{variant.torch}.0",
        cuda=variant.cuda,
        sm=variant.sm,
        ptx=None if variant.sm is None else _ANY_SM,
    )
    return judge(best, host)


def make_candidate(place: ArtifactPath, verdict: Verdict) -> Candidate:
    """An artifact as it is ranked."""
    return Candidate(place.recipe, place.variant, verdict, str(place))


def _list_candidates(considered: Iterable[Considered]) -> list[Candidate]:
    return [make_candidate(each.place, each.verdict) for each in considered if each.verdict]


def judge_catalog(
    catalog: Catalog, judge_requirements: Callable[[Requirements], Verdict]
) -> tuple[Considered, ...]:
    """Each artifact of a catalog that was read with its verdict, or why it has none."""
    return tuple(
        Considered(place, found, judge_requirements(found.requires))
        if isinstance(found, Manifest)
        else Considered(place, None, None, found)
        for place, found in catalog.artifacts.items()
    )


def rank_considered(considered: Iterable[Considered], recipe: Recipe | None) -> list[Considered]:
    """Those that fit, the best first."""
    by_path = {str(each.place): each for each in considered}
    return [by_path[each.id] for each in rank(_list_candidates(by_path.values()), recipe)]


def describe_refusals(
    catalog: Catalog, considered: tuple[Considered, ...], recipe: Recipe | None
) -> HubaotiError:
    """Why nothing was chosen, of everything that was looked at."""
    where = f"{catalog.repo} at {catalog.commit}"
    if not considered:
        return NoArtifact(
            "\n".join((f"{where} holds no artifact", *catalog.notes)),
            hint=f"compile one and push it: hubaoti push DIR {catalog.repo}",
        )
    lines = [line for each in considered for line in format_considered(each, recipe)]
    errors = [each.error for each in considered if each.error is not None]
    if len(errors) == len(considered):
        is_refused = all(each.is_refused for each in considered)
        said = f"all of {where} is refused" if is_refused else f"no manifest of {where} can be used"
        message = "\n".join((f"{said}:", *lines))
        return type(errors[0])(message, hint=errors[0].hint)
    return NoMatch(
        "\n".join((f"no artifact of {where} fits this host:", *lines)),
        hint="follow one of the advices above, or compile an artifact here: hubaoti compile",
    )


def format_considered(each: Considered, recipe: Recipe | None) -> list[str]:
    """An artifact and every reason against it."""
    if each.verdict is None:
        return [f"  {each.place}", f"    {'refused: ' * each.is_refused}{each.error}"]
    reasons = [
        f"    needs {refusal.need}; here is {refusal.have}: {refusal.advice}"
        for refusal in each.verdict.refusals
    ]
    if recipe is not None and each.place.recipe != recipe:
        reasons.append(f"    is not of the recipe {recipe}: ask for --recipe {each.place.recipe}")
    if recipe is None and each.place.recipe.quantization is not None:
        reasons.append(f"    is quantized: ask for it with --recipe {each.place.recipe}")
    return [f"  {each.place}", *reasons]
