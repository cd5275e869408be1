"""Pull: the artifact of a repo that fits this host best, verified and unpacked into the mirror.

The order is the promise: the commit is pinned before anything is read, every manifest is judged
before one is chosen, its publisher is known before a graph is fetched, and each byte is compared
with the manifest before it has a name in the mirror.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.package import hash_file
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.variant import Recipe
from hubaoti.disk import require_disk_room
from hubaoti.errors import (
    BadPackage,
    BadRequest,
    Blocked,
    DigestMismatch,
    HubaotiError,
    NoArtifact,
    NoMatch,
)
from hubaoti.host.match import Candidate, MatchResult, Verdict, judge, rank
from hubaoti.host.probe import Host
from hubaoti.hub.catalog import Catalog, Unreadable, read_catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import bring_kernels
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.pull_path import describe_no_artifact, describe_no_torch, judge_named
from hubaoti.hub.revisions import Revisions
from hubaoti.hub.signatures import RequiredSigners
from hubaoti.hub.zerogpu import suggest_loader
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.rows import Pin, Signed
from hubaoti.mirror.store import compute_unpacked_size
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Considered:
    """An artifact that was looked at: its verdict, or why its manifest cannot be used."""

    place: ArtifactPath
    manifest: Manifest | None = field(repr=False)
    verdict: Verdict | None
    error: Unreadable | None = None


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull chose, why, and among what; `from_mirror` says that nothing was fetched."""

    artifact: Artifact
    ref: RepoRef
    commit: str
    place: ArtifactPath
    verdict: Verdict
    considered: tuple[Considered, ...] = field(repr=False)
    notes: tuple[str, ...]
    from_mirror: bool


def pull_artifact(  # noqa: PLR0913 - a face of keywords
    ref: RepoRef,
    settings: Settings,
    host: Host,
    *,
    recipe: Recipe | None = None,
    place: ArtifactPath | None = None,
    trust: bool = False,
    allow_rollback: bool = False,
    progress: Progress = report_nothing,
) -> Pulled:
    """Choose, fetch, verify and store the artifact of `ref` that fits `host` best.

    An asked `recipe` is a condition. With `place` no other artifact is looked at, and it is fetched
    where no torch is installed, too, with a note of the one that it needs. `trust` trusts the
    publisher, from now on. `allow_rollback` takes a tag that was moved, or a branch that went back,
    and remembers where it is now. `progress` is called with the name of each step as it starts.

    A second pull of the same commit asks the Hub nothing; of a revision, only its commit.

    Raises:
        NoArtifact: the repo holds none, or none at `place`.
        NoMatch: none fits; the message has every variant with every reason.
        Untrusted: the publisher is not trusted, and this machine did not build the artifact; or no
            branch and no tag has the commit. Blocked: it may not run here.
        RepoMoved: the repo has another name now. RolledBack: its revision went back.
        Unsigned, BadSignature: its publisher has to sign here, and signed nothing of it.
        BadManifest, NewerSchema: no manifest of the repo can be read.
        DigestMismatch, BadPackage: a file is not the one that the manifest lists.
        KernelMissing, KernelDigestMismatch: of a kernel that it calls, as `bring_kernels`.
        DiskFull: there is no room; nothing half-written stays.
        RepoNotFound, AuthFailed, HubUnreachable: from the Hub.
        BadRequest: a recipe is asked for beside a place.
    """
    if recipe is not None and place is not None:
        raise BadRequest("a recipe is asked for, and a path", hint="the path names its recipe")
    with Mirror.open(settings.mirror) as mirror:
        return Puller(
            mirror,
            settings,
            host,
            recipe=recipe,
            place=place,
            trust=trust,
            allow_rollback=allow_rollback,
            progress=progress,
        ).pull(ref)


@dataclass(frozen=True)
class Puller:
    """One pull; its steps share all this."""

    mirror: Mirror
    settings: Settings
    host: Host
    _: KW_ONLY
    recipe: Recipe | None = None
    place: ArtifactPath | None = None
    trust: bool = False
    allow_rollback: bool = False
    progress: Progress = report_nothing

    @cached_property
    def client(self) -> HubClient:
        """The endpoint that is pulled from."""
        return HubClient(self.settings, self.progress)

    def pull(self, ref: RepoRef) -> Pulled:
        """Pin the commit, then take what the mirror has of it, else what the Hub has."""
        commit = self.pin_commit(ref)
        return self._from_mirror(ref, commit) or self._from_hub(ref, commit)

    def pin_commit(self, ref: RepoRef) -> str:
        """The commit of a revision, which is its owner's, and none from before."""
        return self.revisions.pin(ref)

    @property
    def revisions(self) -> Revisions:
        """Where the revisions of repos are, and were."""
        return Revisions(self.client, self.mirror.index, self.progress, self.allow_rollback)

    def _from_mirror(self, ref: RepoRef, commit: str) -> Pulled | None:
        """What an earlier pull of this commit chose, if it still may run here."""
        found = self.mirror.find_pull(self.pin(ref, commit))
        if found is None:
            return None
        artifact, path = found
        if self.client.is_offline:
            self.bring_kernels(artifact.manifest)  # or it says which are missing
        verdict = self._judge(artifact.manifest.requires)
        if verdict.fit is MatchResult.INCOMPATIBLE:
            return None
        place, known = ArtifactPath.parse(path), self.mirror.index.list_signed(artifact.digest)
        required = self.find_required(ref)
        if required and not required.find_known(known, self.client, ref.repo, path):
            return None  # nobody had to sign when it was pulled
        self.require_trust(ref, commit, place, artifact.manifest)
        self.bring_kernels(artifact.manifest)
        considered = (Considered(place, artifact.manifest, verdict),)
        return Pulled(artifact, ref, commit, place, verdict, considered, (), True)

    def find_required(self, ref: RepoRef) -> RequiredSigners | None:
        """Who has to sign what a repo's owner publishes; None where a name is enough."""
        return RequiredSigners.of(Trust(self.settings.trust), self.client.endpoint, ref.owner)

    def _from_hub(self, ref: RepoRef, commit: str) -> Pulled:
        self.mirror.index.require_writable()
        self.progress(f"reading the manifests of {ref.repo} at {commit}")
        required = self.find_required(ref)
        catalog = read_catalog(self.client, ref.repo, commit, only=self.place, required=required)
        considered = judge_catalog(catalog, self._judge)
        chosen = self._choose(ref, catalog, considered)
        artifact = self.take(ref, catalog, chosen, self.pin(ref, commit))
        verdict = chosen.verdict
        assert verdict is not None
        return Pulled(
            artifact, ref, commit, chosen.place, verdict, considered, catalog.notes, False
        )

    def take(self, ref: RepoRef, catalog: Catalog, chosen: Considered, pin: Pin) -> Artifact:
        """An artifact that was chosen: of a trusted publisher, verified, in the mirror."""
        manifest = chosen.manifest
        assert manifest is not None  # only judged ones are chosen
        if signer := catalog.signers.get(chosen.place):
            signed = Signed(pin.endpoint, catalog.repo, str(chosen.place), str(signer))
            self.mirror.index.record_signed(manifest.digest, signed)
        self.require_trust(ref, catalog.commit, chosen.place, manifest)
        self.bring_kernels(manifest)
        # Another commit, or another repo, may have brought the same artifact before.
        mirrored = self.mirror.artifact(manifest.digest)
        artifact = mirrored or self._fetch(catalog, chosen.place, manifest)
        self.mirror.index.record_pull(pin, artifact.digest, str(chosen.place))
        return artifact

    def bring_kernels(self, manifest: Manifest) -> None:
        """See that the kernels that an artifact calls are in the mirror, by `bring_kernels`."""
        trust = Trust(self.settings.trust)
        bring_kernels(manifest, self.mirror, self.client, trust, self.progress)

    def _judge(self, requires: Requirements) -> Verdict:
        """Whether an artifact fits; one that is named may wait for its torch."""
        return (judge if self.place is None else judge_named)(requires, self.host)

    def _choose(
        self, ref: RepoRef, catalog: Catalog, considered: tuple[Considered, ...]
    ) -> Considered:
        """The one that is named, or the best of those that fit."""
        if self.place is not None and not considered:
            raise describe_no_artifact(self.place, catalog)
        recipe = self.recipe if self.place is None else self.place.recipe
        if ranked := rank_considered(considered, recipe):
            return ranked[0]
        error = describe_no_choice(catalog, considered, recipe)
        if not considered:
            with suppress(HubaotiError):
                branches = self.client.branches(ref.repo) if ref.revision is None else ()
                error.hint = suggest_loader(ref, catalog.files, branches) or error.hint
        if isinstance(error, NoMatch) and self.place is None and self.host.torch is None:
            raise describe_no_torch(error, ref, catalog)
        raise error

    def require_trust(
        self, ref: RepoRef, commit: str, place: ArtifactPath, manifest: Manifest
    ) -> None:
        """See that an artifact of this publisher may run here.

        Raises:
            Untrusted: it was not built here, and of nobody who published it anybody ever said so.
            Blocked: somebody said that it may not.
        """
        origin = PullOrigin(self.client.endpoint, ref.repo, commit, str(place))
        decision = self.mirror.decide(manifest.digest, origin)
        if isinstance(decision.refusal, Blocked):
            raise decision.refusal
        wanted = self.trust and self.mirror.index.is_writable  # and remembered
        if wanted or not decision.allowed:
            what = f"{place} in {ref.repo}", f"commit {commit}, artifact {manifest.digest}"
            self.require_publisher(ref, *what, self.mirror.index.list_signed(manifest.digest))

    def require_publisher(
        self, ref: RepoRef, what: str, which: str, signed: Iterable[Signed] = ()
    ) -> None:
        """See that code of this publisher may run here; `--trust` says so once for all.

        Raises:
            Untrusted: nobody ever said so. Unsigned: nobody of these signed it who has to.
        """
        endpoint, trusted = self.client.endpoint, Trust(self.settings.trust)
        if self.trust:
            trusted.add(endpoint, ref.owner)
        advice = "say so once with --trust"
        trusted.require(endpoint, ref.owner, f"{what} at {endpoint} ({which})", advice, signed)

    def _fetch(self, catalog: Catalog, place: ArtifactPath, manifest: Manifest) -> Artifact:
        """Download, verify, unpack; what was downloaded is not kept twice."""
        origin = PullOrigin(self.client.endpoint, catalog.repo, catalog.commit, str(place))
        _require_listed(catalog, place, manifest)
        self.client.sweep()
        for _ in range(_ATTEMPTS):
            # The zips, and what is unpacked from them, lie on the disk together for a while.
            require_disk_room(self.mirror.root, manifest.size + compute_unpacked_size(manifest))
            try:
                with self._download(catalog, place, manifest) as files:
                    self.progress(f"unpacking {place}")
                    return self.mirror.put(manifest, files, origin, place.recipe)
            except FileNotFoundError:
                # Another pull of the same artifact stored it, and removed what we shared.
                self.progress(f"downloading {place} again: another pull removed it")
            except BadPackage as error:
                raise BadPackage(f"{place} of {catalog.repo}: {error}", hint=error.hint) from error
        raise HubaotiError(
            f"the downloads of {place} were removed {_ATTEMPTS} times",
            hint=f"see who else works in {self.mirror.root}, then pull again",
        )

    @contextmanager
    def _download(
        self, catalog: Catalog, place: ArtifactPath, manifest: Manifest
    ) -> Iterator[dict[str, Path]]:
        """The artifact's files, verified; they leave the cache folder once they are stored.

        After an error those that are whole stay, so that the next pull need not fetch them again.
        """
        files: dict[str, Path] = {}
        for file in manifest.all_files():
            path = place.file(file.path)
            self.progress(f"downloading {path} ({file.size / 1e6:.1f} MB)")
            found = files[file.path] = self.client.download(catalog.repo, catalog.commit, path)
            if found.stat().st_size != file.size or hash_file(found) != file.sha256:
                self.client.drop(found)
                raise DigestMismatch(
                    f"{path} from {self.client.endpoint} is not the file that its manifest lists",
                    hint="pull again; if it stays so, ask the publisher to push it again",
                )
        yield files
        for downloaded in files.values():
            self.client.drop(downloaded)

    def pin(self, ref: RepoRef, commit: str, request: str | None = None) -> Pin:
        """What is remembered of a pull: of which commit, of what was asked for, on which host."""
        if request is None:
            request = str(self.place or self.recipe or "")
        return Pin(self.client.endpoint, ref.repo, commit, request, fingerprint(self.host))


def judge_catalog(
    catalog: Catalog, judge_requirements: Callable[[Requirements], Verdict]
) -> tuple[Considered, ...]:
    """Each artifact of a catalog with its verdict, or why it has none."""
    return tuple(
        Considered(place, found, judge_requirements(found.requires))
        if isinstance(found, Manifest)
        else Considered(place, None, None, found)
        for place, found in catalog.artifacts.items()
    )


def rank_considered(considered: Iterable[Considered], recipe: Recipe | None) -> list[Considered]:
    """Those that fit, the best first."""
    by_path = {str(each.place): each for each in considered}
    candidates = [
        Candidate(each.place.recipe, each.place.variant, each.verdict, path)
        for path, each in by_path.items()
        if each.verdict is not None
    ]
    return [by_path[each.id] for each in rank(candidates, recipe)]


def describe_no_choice(
    catalog: Catalog, considered: tuple[Considered, ...], recipe: Recipe | None
) -> HubaotiError:
    """Why nothing was chosen, of everything that was looked at."""
    where = f"{catalog.repo} at {catalog.commit}"
    if not considered:
        return NoArtifact(
            "\n".join((f"{where} holds no artifact", *catalog.notes)),
            hint=f"compile one and push it: hubaoti push DIR {catalog.repo}",
        )
    lines = [line for each in considered for line in _format_considered(each, recipe)]
    errors = [each.error for each in considered if each.error is not None]
    if len(errors) == len(considered):
        message = "\n".join((f"no manifest of {where} can be used:", *lines))
        return type(errors[0])(message, hint=errors[0].hint)
    return NoMatch(
        "\n".join((f"no artifact of {where} fits this host:", *lines)),
        hint="follow one of the advices above, or compile an artifact here: hubaoti compile",
    )


def _format_considered(each: Considered, recipe: Recipe | None) -> list[str]:
    """An artifact and every reason against it."""
    if each.verdict is None:
        return [f"  {each.place}", f"    {each.error}"]
    reasons = [
        f"    needs {refusal.need}; here is {refusal.have}: {refusal.advice}"
        for refusal in each.verdict.refusals
    ]
    if recipe is not None and each.place.recipe != recipe:
        reasons.append(f"    is not of the recipe {recipe}: ask for --recipe {each.place.recipe}")
    if recipe is None and each.place.recipe.quantization is not None:
        reasons.append(f"    is quantized: ask for it with --recipe {each.place.recipe}")
    return [f"  {each.place}", *reasons]


def _require_listed(catalog: Catalog, place: ArtifactPath, manifest: Manifest) -> None:
    """See that the commit has the manifest's files, of their sizes, before one is fetched."""
    for file in manifest.all_files():
        entry = catalog.files.get(place.file(file.path))
        if entry is None or entry.size != file.size:
            found = "is missing" if entry is None else f"has {entry.size} bytes"
            raise DigestMismatch(
                f"{place.file(file.path)} {found} in {catalog.repo}; its manifest lists "
                f"{file.size} bytes",
                hint="ask the publisher to push it again",
            )


def fingerprint(host: Host) -> str:
    """The facts by which artifacts are ranked, in one short word: another host chooses anew."""
    torch = None if host.torch is None else (host.torch.version, host.torch.cuda)
    gpus = [(gpu.name, gpu.sm) for gpu in host.gpus]
    libraries = (host.glibc, host.glibcxx, host.cxxabi)
    facts = (host.os, host.level, torch, gpus, host.driver_cuda, libraries)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
