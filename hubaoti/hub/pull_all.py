"""Every artifact of a commit that could run here, for a machine whose GPU is not seen yet.

In a ZeroGPU Space the process that pulls has no GPU, and the one that runs may be given one of
several kinds. So whatever fits in everything else is pulled, and judged again where the GPU is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import HubaotiError, NoArtifact
from hubaoti.host.match import Verdict, judge
from hubaoti.host.probe import Gpu, Host
from hubaoti.host.rank import Candidate, rank
from hubaoti.hub.catalog import Allowance, Catalog, read_catalog
from hubaoti.hub.choice import Considered, describe_refusals, judge_catalog, rank_considered
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.pull import Puller
from hubaoti.hub.zerogpu import LAYOUT
from hubaoti.mirror import Artifact


@dataclass(frozen=True, slots=True)
class Offer:
    """An artifact in the mirror, and where in its repo it lies."""

    place: ArtifactPath
    artifact: Artifact


def judge_without_gpu(requires: Requirements, host: Host) -> Verdict:
    """Whether an artifact would run on a host if it had the GPU, and the driver, that is needed."""
    if requires.device != "cuda":
        return judge(requires, host)
    wanted = Gpu("the one that it is for", requires.sm or 0, None)
    return judge(requires, replace(host, gpus=(wanted,), driver_cuda=requires.driver))


def rank_offers(
    offers: tuple[Offer, ...], judged: Callable[[Requirements], Verdict], recipe: Recipe | None
) -> tuple[list[Offer], dict[ArtifactPath, Verdict]]:
    """Those that fit, the best first; and every verdict."""
    by_id = {f"{index} {offer.place}": offer for index, offer in enumerate(offers)}
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

    One whose kernel cannot be had is left out, where there are others.

    Raises:
        NoArtifact, NoMatch: there is none, or none fits; with every reason.
        HubaotiError: as `pull` raises.
    """
    chosen: dict[ArtifactPath, tuple[Catalog, Considered]] = {}
    for catalog in catalogs:
        for each in choose_artifacts(puller, catalog, kinds):
            chosen.setdefault(each.place, (catalog, each))  # the default branch comes first
    if not chosen:
        catalog = next((each for each in catalogs if each.artifacts), catalogs[0])
        considered = judge_catalog(catalog, partial(judge_without_gpu, host=puller.host))
        raise describe_refusals(catalog, considered, puller.recipe)
    offers, errors = [], list[HubaotiError]()
    for catalog, each in chosen.values():
        trial = puller.make_trial(partial(puller.admit, ref, catalog))
        if trial.look(each).fits:
            offers.append(_pull_offer(puller, ref, catalog, each))
        errors += trial.errors
    if not offers:
        raise errors[0]
    return tuple(offers)


def find_pulled(puller: Puller, ref: RepoRef) -> tuple[Offer, ...]:
    """What earlier pulls brought of a repo, for a machine without a network.

    Raises:
        NoArtifact: nothing is here, or nobody can say where a branch is.
        Untrusted: its publisher is trusted no more. KernelMissing: all call kernels that lack.
    """
    lock = puller.lock
    if lock is None and ref.revision is not None and ref.commit is None:
        raise NoArtifact(
            f"which commit {ref} is cannot be asked: HF_HUB_OFFLINE is set",
            hint="name the full commit id, or no revision for all that was pulled before",
        )
    index = puller.mirror.index
    digests = index.list_pulls(puller.client.endpoint, ref.repo, ref.commit)
    if lock is not None:
        digests = [*lock.find(ref).artifacts.values()]
    offers: dict[ArtifactPath, Offer] = {}
    trial = puller.make_trial(lambda _: None)
    for digest in dict.fromkeys(digests):
        artifact, row = puller.mirror.artifact(digest), index.row(digest)
        if artifact is not None and row is not None:
            place = ArtifactPath(Recipe.parse(row.recipe), artifact.manifest.variant)
            if lock is None:
                puller.require_trust(ref, row.origin.commit, place, artifact.manifest)
            else:  # which says nothing of whose it is
                puller.mirror.require_allowed(digest)
            if trial.look(Considered(place, artifact.manifest, Verdict())).fits:
                offers.setdefault(place, Offer(place, artifact))  # the newest of each place
    if not offers:
        trial.require_something()
        raise NoArtifact(
            f"nothing of {ref} is in the mirror, and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE once",
        )
    return tuple(offers.values())


def read_revision_catalog(puller: Puller, ref: RepoRef) -> Catalog:
    """Read what the revision, by default the default branch, holds now."""
    client, repo = puller.client, ref.repo
    puller.progress(f"reading the manifests of {ref}")
    required = puller.find_required(ref)
    return read_catalog(client, repo, puller.pin_commit(ref), required=required)


def read_branch_catalogs(puller: Puller, ref: RepoRef) -> Iterator[Catalog]:
    """Read what the branches of the zerogpu layout hold: one artifact each."""
    client, allowance, required = puller.client, Allowance(), puller.find_required(ref)
    for branch, commit in sorted(client.branches(ref.repo).items()):
        if branch.startswith(f"{LAYOUT}/"):
            puller.revisions.require_forward(ref.repo, branch, commit)
            allowance.take(f"{ref.repo} in its branches", [0])  # of an empty one the list is read
            yield read_catalog(client, ref.repo, commit, allowance, required=required)


def choose_artifacts(
    puller: Puller, catalog: Catalog, kinds: frozenset[str]
) -> Iterator[Considered]:
    """The artifacts of a catalog that are worth having: any of a GPU, the best of a CPU."""
    judged = judge_catalog(catalog, partial(judge_without_gpu, host=puller.host))
    fitting = (each for each in judged if artifact_device(each) in kinds)
    found = rank_considered(fitting, puller.recipe)
    yield from (each for each in found if artifact_device(each) == "cuda")
    yield from [each for each in found if artifact_device(each) == "cpu"][:1]


def artifact_device(considered: Considered) -> str | None:
    """The kind of device that an artifact is for."""
    return considered.manifest.target.device if considered.manifest else None


def _pull_offer(puller: Puller, ref: RepoRef, catalog: Catalog, chosen: Considered) -> Offer:
    """An artifact in the mirror; the pull is remembered beside that of the best one."""
    pin = puller.pin(ref, catalog.commit, f"zerogpu {chosen.place}")
    artifact = puller.take(ref, catalog, chosen, pin)
    puller.mirror.verify(artifact)
    return Offer(chosen.place, artifact)
