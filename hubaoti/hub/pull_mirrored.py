"""What earlier pulls of a commit brought: taken again, and all that there is to take offline."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hubaoti.host.match import MatchResult
from hubaoti.hub.catalog import Catalog, read_catalog
from hubaoti.hub.choice import Considered, Pulled
from hubaoti.hub.kernel_choice import list_left_out
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.mirror import Artifact
from hubaoti.mirror.answers import MIRROR

if TYPE_CHECKING:
    from hubaoti.hub.pull import Puller


def find_pulled_before(puller: Puller, ref: RepoRef, commit: str) -> Pulled | None:
    """What the same pull chose before, if it still may run here; offline, the best that is here.

    Raises:
        HubaotiError: as `pull_artifact`, of what is here.
    """
    found = puller.mirror.find_pull(puller.pin(ref, commit))
    if found is not None:
        artifact, path = found
        if pulled := _take_again(puller, ref, commit, artifact, ArtifactPath.parse(path)):
            return pulled
    return _choose_mirrored(puller, ref, commit) if puller.client.is_offline else None


def _take_again(
    puller: Puller, ref: RepoRef, commit: str, artifact: Artifact, place: ArtifactPath
) -> Pulled | None:
    """An artifact that was chosen before; None where it fits no more, or another one may do."""
    manifest = artifact.manifest
    verdict = puller.judge(manifest.requires)
    if verdict.fit is MatchResult.INCOMPATIBLE:
        return None
    puller.mirror.leases.hold(artifact.digest)
    if not puller.is_signed(ref, place, manifest):
        return None  # nobody had to sign when it was pulled
    puller.require_trust(ref, commit, place, manifest)
    considered = Considered(place, manifest, verdict)
    if not puller.make_trial(lambda _: None).brings(manifest):
        return None
    puller.mirror.answers.record(MIRROR, manifest)
    return Pulled(artifact, ref, commit, place, verdict, (considered,), (), True)


def _choose_mirrored(puller: Puller, ref: RepoRef, commit: str) -> Pulled | None:
    """The best of what is here of a commit; None where none of it fits."""
    here = list_mirrored(puller, ref, commit)
    if puller.place is not None:
        here = {place: each for place, each in here.items() if place == puller.place}
    catalog = _make_catalog(ref.repo, commit, here)
    # Which kernels lack is said by who brings them, as online.
    online = replace(puller, host=replace(puller.host, offline=False))

    def admit(each: Considered) -> None:
        manifest = here[each.place].manifest
        puller.is_signed(ref, each.place, manifest)  # or it says that nobody knows
        puller.require_trust(ref, commit, each.place, manifest)

    trial = puller.make_trial(admit)
    chosen, considered = online.choose(here, lambda _: catalog, trial)
    if chosen is None or chosen.verdict is None:
        return None
    artifact = here[chosen.place]
    puller.mirror.leases.hold(artifact.digest)
    admit(chosen)
    puller.bring_kernels(artifact.manifest)
    puller.mirror.answers.record(MIRROR, artifact.manifest)
    notes = tuple(list_left_out(considered, chosen))
    return Pulled(artifact, ref, commit, chosen.place, chosen.verdict, considered, notes, True)


def list_mirrored(puller: Puller, ref: RepoRef, commit: str) -> dict[ArtifactPath, Artifact]:
    """What pulls of a commit brought, by its path there."""
    endpoint, index, found = puller.client.endpoint, puller.mirror.index, {}
    for digest in dict.fromkeys(index.list_pulls(endpoint, ref.repo, commit)):
        artifact = puller.mirror.artifact(digest)
        for origin in index.list_origins(digest) if artifact else ():
            if (origin.endpoint, origin.repo, origin.commit) == (endpoint, ref.repo, commit):
                found[ArtifactPath.parse(origin.path)] = artifact
    return {place: each for place, each in found.items() if each is not None}


def read_here_or_there(puller: Puller, ref: RepoRef, commit: str) -> Catalog:
    """What a commit holds; offline, what is here of it.

    Raises:
        HubUnreachable: nothing is; else as `read_catalog`.
    """
    if puller.client.is_offline and (here := list_mirrored(puller, ref, commit)):
        note = "HF_HUB_OFFLINE is set: these are what was pulled before, and there may be others"
        return _make_catalog(ref.repo, commit, here, note)
    required = puller.find_required(ref)
    return read_catalog(puller.client, ref.repo, commit, required=required)


def _make_catalog(
    repo: str, commit: str, here: dict[ArtifactPath, Artifact], *notes: str
) -> Catalog:
    """A catalog of what is here, where the Hub's cannot be asked for."""
    manifests = {place: each.manifest for place, each in here.items()}
    return Catalog(repo, commit, {}, {**manifests}, notes, tuple(here))
