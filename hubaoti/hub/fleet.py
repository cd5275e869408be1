"""Every artifact of a commit that could run here, for a machine whose GPU is not seen yet.

In a ZeroGPU Space the process that pulls has no GPU, and the one that runs may be given one of
several kinds. So whatever fits in everything else is pulled, and judged again where the GPU is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hubaoti.errors import HubaotiError, NoArtifact
from hubaoti.host import Gpu, Host
from hubaoti.hub.catalog import Allowance, Catalog, read_catalog
from hubaoti.hub.layout import Place, RepoRef
from hubaoti.hub.pull import Considered, Puller, no_choice
from hubaoti.hub.zerogpu import LAYOUT
from hubaoti.match import Candidate, Verdict, judge, rank
from hubaoti.mirror import Artifact
from hubaoti.requirements import Requirements
from hubaoti.variant import Recipe


@dataclass(frozen=True, slots=True)
class Offer:
    """An artifact in the mirror, and where in its repo it lies."""

    place: Place
    artifact: Artifact


def judge_without_gpu(requires: Requirements, host: Host) -> Verdict:
    """Whether an artifact would run on a host if it had the GPU, and the driver, that is needed."""
    if requires.device != "cuda":
        return judge(requires, host)
    wanted = Gpu("the one that it is for", requires.sm or 0, None)
    return judge(requires, replace(host, gpus=(wanted,), driver_cuda=requires.driver))


def best_first(
    offers: tuple[Offer, ...], judged: Callable[[Requirements], Verdict], recipe: Recipe | None
) -> tuple[list[Offer], dict[Place, Verdict]]:
    """Those that fit, the best first; and every verdict."""
    by_id = {f"{at} {offer.place}": offer for at, offer in enumerate(offers)}
    verdicts = {name: judged(each.artifact.manifest.requires) for name, each in by_id.items()}
    candidates = [
        Candidate(each.place.recipe, each.place.variant, verdicts[name], name)
        for name, each in by_id.items()
    ]
    found = [by_id[each.id] for each in rank(candidates, recipe)]
    return found, {by_id[name].place: verdict for name, verdict in verdicts.items()}


def pull_fleet(
    puller: Puller, ref: RepoRef, catalogs: Sequence[Catalog], kinds: frozenset[str]
) -> tuple[Offer, ...]:
    """The artifacts for these kinds of device ("cpu", "cuda"): every CUDA one, the best CPU one.

    Raises:
        NoArtifact, NoMatch: there is none, or none fits; with every reason.
        HubaotiError: as `pull` raises.
    """
    chosen: dict[Place, tuple[Catalog, Considered]] = {}
    for catalog in catalogs:
        for each in chosen_of(puller, catalog, kinds):
            chosen.setdefault(each.place, (catalog, each))  # the default branch comes first
    if not chosen:
        catalog = next((each for each in catalogs if each.artifacts), catalogs[0])
        raise no_choice(catalog, considered_of(puller, catalog), puller.recipe)
    return tuple(taken(puller, ref, catalog, each) for catalog, each in chosen.values())


def pulled_before(puller: Puller, ref: RepoRef) -> tuple[Offer, ...]:
    """What earlier pulls brought of a repo, for a machine without a network.

    Raises:
        NoArtifact: nothing is here, or nobody can say where a branch is.
        Untrusted: its publisher is trusted no more.
    """
    if ref.revision is not None and ref.commit is None:
        raise NoArtifact(
            f"which commit {ref} is cannot be asked: HF_HUB_OFFLINE is set",
            hint="name the full commit id, or no revision for all that was pulled before",
        )
    index = puller.mirror.index
    digests = index.pulled_from(puller.client.endpoint, ref.repo, ref.commit)
    offers: dict[Place, Offer] = {}
    for digest in dict.fromkeys(digests):
        artifact, row = puller.mirror.artifact(digest), index.row(digest)
        if artifact is not None and row is not None:
            place = Place(Recipe.parse(row.recipe), artifact.manifest.variant)
            puller.require_trust(ref, row.origin.commit, place, artifact.manifest)
            offers.setdefault(place, Offer(place, artifact))  # the newest of each place
    if not offers:
        raise NoArtifact(
            f"nothing of {ref} is in the mirror, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE once",
        )
    return tuple(offers.values())


def first_catalog(puller: Puller, ref: RepoRef) -> Catalog:
    """What the revision holds."""
    client, repo = puller.client, ref.repo
    puller.say(f"reading the manifests of {ref}")
    return read_catalog(client, repo, ref.commit or client.resolve(repo, ref.revision))


def branch_catalogs(puller: Puller, ref: RepoRef) -> Iterator[Catalog]:
    """What the branches of the zerogpu layout hold: one artifact each."""
    client, allowance = puller.client, Allowance()
    for branch, commit in sorted(client.branches(ref.repo).items()):
        if branch.startswith(f"{LAYOUT}/"):
            allowance.take(f"{ref.repo} in its branches", [0])  # of an empty one the list is read
            yield read_catalog(client, ref.repo, commit, allowance)


def considered_of(puller: Puller, catalog: Catalog) -> tuple[Considered, ...]:
    """Each artifact of a catalog with its verdict, for a host that has its GPU."""
    return tuple(
        Considered(place, None, None, found)
        if isinstance(found, HubaotiError)
        else Considered(place, found, judge_without_gpu(found.requires, puller.host))
        for place, found in catalog.artifacts.items()
    )


def chosen_of(puller: Puller, catalog: Catalog, kinds: frozenset[str]) -> Iterator[Considered]:
    """The artifacts of a catalog that are worth having: any of a GPU, the best of a CPU."""
    by_path = {str(each.place): each for each in considered_of(puller, catalog)}
    candidates = [
        Candidate(each.place.recipe, each.place.variant, each.verdict, path)
        for path, each in by_path.items()
        if each.verdict is not None and device_in(each) in kinds
    ]
    found = [by_path[each.id] for each in rank(candidates, puller.recipe)]
    yield from (each for each in found if device_in(each) == "cuda")
    yield from [each for each in found if device_in(each) == "cpu"][:1]


def device_in(considered: Considered) -> str | None:
    """The kind of device that an artifact is for."""
    return considered.manifest.target.device if considered.manifest else None


def taken(puller: Puller, ref: RepoRef, catalog: Catalog, chosen: Considered) -> Offer:
    """An artifact in the mirror; the pull is remembered beside that of the best one."""
    pin = puller.pin(ref, catalog.commit, f"zerogpu {chosen.place}")
    artifact = puller.taken(ref, catalog, chosen, pin)
    puller.mirror.verify(artifact)
    return Offer(chosen.place, artifact)
