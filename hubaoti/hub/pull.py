"""Pull: the artifact of a repo that fits this host best, verified and unpacked into the mirror.

The order is the promise: the commit is pinned before anything is read, every manifest is judged
before one is chosen, its publisher is known before a graph is fetched, and each byte is compared
with the manifest before it has a name in the mirror.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path

from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import (
    BadLock,
    BadRequest,
    Blocked,
    HubaotiError,
    NoMatch,
)
from hubaoti.host.match import Verdict, judge
from hubaoti.host.probe import Host
from hubaoti.hub.catalog import Allowance, Catalog, list_catalog, read_manifests
from hubaoti.hub.choice import (
    Considered,
    Pulled,
    Read,
    choose_artifact,
    describe_refusals,
    judge_catalog,
    rank_considered,
)
from hubaoti.hub.client import HubClient
from hubaoti.hub.fetch import fetch_artifact
from hubaoti.hub.kernel_choice import KernelTrial, list_left_out
from hubaoti.hub.kernels import bring_kernels
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.lockfile import Lock, find_lock
from hubaoti.hub.pull_digest import pull_digest
from hubaoti.hub.pull_locked import pull_locked, require_owned
from hubaoti.hub.pull_mirrored import find_pulled_before
from hubaoti.hub.pull_path import describe_no_artifact, describe_no_torch, judge_named
from hubaoti.hub.revisions import Revisions
from hubaoti.hub.signatures import RequiredSigners
from hubaoti.hub.zerogpu import suggest_loader
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.answers import HUB, MIRROR
from hubaoti.mirror.policy import trust_artifact
from hubaoti.mirror.rows import LOCKED, Pin, Signed
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings


def pull_artifact(  # noqa: PLR0913 - a face of keywords
    ref: RepoRef,
    settings: Settings,
    host: Host,
    *,
    recipe: Recipe | None = None,
    place: ArtifactPath | None = None,
    trust: bool = False,
    allow_rollback: bool = False,
    locked: bool | str | Path = False,
    progress: Progress = report_nothing,
) -> Pulled:
    """Choose, fetch, verify and store the artifact of `ref` that fits `host` best.

    An asked `recipe` is a condition. With `place` no other artifact is looked at, and it is fetched
    where no torch is installed, too, with a note of the one that it needs. `trust` trusts the
    publisher, from now on. `allow_rollback` takes a tag that was moved, or a branch that went back,
    and remembers where it is now. With `locked`, or where the settings name a lockfile, nothing is
    taken but what it says. `progress` is called with the name of each step as it starts.

    A second pull of the same commit asks the Hub nothing; of a revision, only its commit.

    Raises:
        NoArtifact: the repo holds none, or none at `place`.
        NoMatch: none fits; the message has every variant with every reason.
        Untrusted: the publisher is not trusted, and this machine did not build the artifact; or no
            branch and no tag has the commit. Blocked: it may not run here.
        RepoMoved: the repo has another name now. RolledBack: its revision went back.
        Unsigned, BadSignature: its publisher has to sign here, and signed nothing of it.
        NotLocked, LockMismatch, BadLock: the lockfile does not say so, or cannot be read.
        NoVersion: the repo has no version such as is asked for.
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
            lock=find_lock(locked, settings),
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
    lock: Lock | None = field(default=None, repr=False)
    progress: Progress = report_nothing

    def __post_init__(self) -> None:
        path = "" if self.lock is None else str(self.lock.path)
        if path.encode(errors="replace").decode() != path:
            raise BadLock(  # before anything is fetched that would stay by it
                f"{path} has a byte in its path that is no UTF-8, so nothing can stay by it",
                hint="rename the file, or the folder that it is in",
            )

    @cached_property
    def client(self) -> HubClient:
        """The endpoint that is pulled from."""
        return HubClient(self.settings, self.progress)

    def pull(self, ref: RepoRef) -> Pulled:
        """Pin the commit, then take what the mirror has of it, else what the Hub has."""
        if self.lock is not None:
            return pull_locked(self, ref, self.lock.find(ref))
        if ref.digest is not None:
            return pull_digest(self, ref)
        commit = self.pin_commit(ref)
        with self.mirror.answers.counting_misses(ref.repo, self.host):
            return find_pulled_before(self, ref, commit) or self._from_hub(ref, commit)

    def pin_commit(self, ref: RepoRef) -> str:
        """The commit of a revision, which is its owner's, and none from before; or the locked."""
        if self.lock is not None:
            locked = self.lock.find(ref)
            require_owned(self, locked)
            return locked.commit
        return self.revisions.pin(ref)

    @property
    def is_free(self) -> bool:
        """Whether the next best will do: no recipe, no path and no lock says which one is meant."""
        return self.recipe is None and self.place is None and self.lock is None

    @property
    def revisions(self) -> Revisions:
        """Where the revisions of repos are, and were."""
        return Revisions(self.client, self.mirror, self.progress, self.allow_rollback)

    def find_required(self, ref: RepoRef) -> RequiredSigners | None:
        """Who has to sign what a repo's owner publishes; None where a name or digest is enough."""
        trust = Trust(self.settings.trust)
        if ref.digest is not None and (self.trust or trust.read().names(ref.digest)):
            return None
        return RequiredSigners.of(trust, self.client.endpoint, ref.owner)

    def is_signed(self, ref: RepoRef, place: ArtifactPath, manifest: Manifest) -> bool:
        """Whether what is here is known to be signed by whom it has to be, if anybody has to.

        Raises:
            Unsigned: it is not, and offline no signature can be asked for.
        """
        required, known = self.find_required(ref), self.mirror.seen.list_signed(manifest.digest)
        where = ref.repo, str(place)
        return required is None or required.find_known(known, self.client, *where)

    def _from_hub(self, ref: RepoRef, commit: str) -> Pulled:
        self.mirror.index.require_writable()
        self.progress(f"reading the manifests of {ref.repo} at {commit}")
        left = Allowance()
        catalog = list_catalog(self.client, ref.repo, commit, left, self.find_required(ref))
        if self.place is not None and self.place not in catalog.places:
            raise describe_no_artifact(self.place, catalog)

        def read(places: Iterable[ArtifactPath]) -> Catalog:
            nonlocal catalog
            catalog = read_manifests(self.client, catalog, places, left)
            return catalog

        trial = self.make_trial(lambda each: self.admit(ref, catalog, each))
        chosen, considered = self.choose(catalog.places, read, trial)
        if chosen is None:
            raise self.describe_no_choice(ref, catalog, considered)
        # Another kernel may come tomorrow: then what was left out is chosen after all.
        request = str(chosen.place.recipe) if trial.errors else None
        artifact = self.take(ref, catalog, chosen, self.pin(ref, commit, request))
        verdict, notes = chosen.verdict, (*list_left_out(considered, chosen), *catalog.notes)
        assert verdict is not None
        return Pulled(artifact, ref, commit, chosen.place, verdict, considered, notes, False)

    def take(self, ref: RepoRef, catalog: Catalog, chosen: Considered, pin: Pin) -> Artifact:
        """An artifact that was chosen: of a trusted publisher, verified, in the mirror."""
        manifest = chosen.manifest
        assert manifest is not None  # only judged ones are chosen
        self.admit(ref, catalog, chosen)
        self.bring_kernels(manifest)
        origin = PullOrigin(self.client.endpoint, ref.repo, catalog.commit, str(chosen.place))
        artifact = self._find_or_fetch(catalog, chosen.place, manifest, origin)
        if self.mirror.index.is_writable:
            self.mirror.index.record_pull(pin, artifact.digest, str(chosen.place))
        return artifact

    def admit(self, ref: RepoRef, catalog: Catalog, chosen: Considered) -> None:
        """See that an artifact of a catalog may run here; who signed it is remembered.

        Raises:
            Untrusted, Unsigned, Blocked, NotLocked, LockMismatch: as `require_trust`.
        """
        manifest = chosen.manifest
        assert manifest is not None  # only judged ones are chosen
        if signer := catalog.signers.get(chosen.place):
            where = self.client.endpoint, catalog.repo, str(chosen.place)
            self.mirror.seen.record_signed(manifest.digest, Signed(*where, str(signer)))
        self.require_trust(ref, catalog.commit, chosen.place, manifest)

    def take_proposed(self, catalog: Catalog, chosen: Considered) -> Artifact:
        """An artifact that anybody may have proposed to a repo: of nobody, trusted by its digest.

        Raises:
            Untrusted: it is not. Blocked: it may not run here.
        """
        manifest = chosen.manifest
        assert manifest is not None
        if self.trust:
            trust_artifact(self.mirror, manifest.digest)
        return self.take_known(catalog, chosen)

    def take_known(self, catalog: Catalog, chosen: Considered) -> Artifact:
        """An artifact that may run here by what is known of it: who published it now says nothing.

        Raises:
            Untrusted, Blocked: it may not.
        """
        manifest = chosen.manifest
        assert manifest is not None
        self.mirror.require_allowed(manifest.digest)
        self.bring_kernels(manifest)
        return self._find_or_fetch(catalog, chosen.place, manifest, PullOrigin())

    def _find_or_fetch(
        self, catalog: Catalog, place: ArtifactPath, manifest: Manifest, origin: PullOrigin
    ) -> Artifact:
        """An artifact in the mirror, which it does not leave while this process has it.

        Another commit, repo or process may have brought it before; of several that want it now, one
        fetches it.
        """
        leases, digest = self.mirror.leases, manifest.digest
        with leases.holding(digest), leases.alone(digest, self.progress):
            mirrored, began = self.mirror.artifact(manifest.digest), time.monotonic()
            artifact = mirrored or fetch_artifact(
                self.client, self.mirror, catalog, place, origin, self.progress
            )
        self.mirror.answers.record(MIRROR if mirrored else HUB, manifest)
        if not mirrored:
            self.mirror.usage.record_download(manifest.digest, time.monotonic() - began)
        return artifact

    def bring_kernels(self, manifest: Manifest) -> None:
        """See that the kernels that an artifact calls are in the mirror, by `bring_kernels`."""
        trust = Trust(self.settings.trust)
        bring_kernels(manifest, self.mirror, self.client, trust, self.progress)

    def make_trial(self, admit: Callable[[Considered], None]) -> KernelTrial:
        """Of artifacts that `admit` lets in, whether their kernels come: by bringing them."""
        how = self.bring_kernels, admit, self.is_free, self.client.is_offline
        return KernelTrial(*how, self.progress)

    def judge(self, requires: Requirements) -> Verdict:
        """Whether an artifact fits; one whose path is named may wait for its torch."""
        return (judge if self.place is None else judge_named)(requires, self.host)

    def choose(
        self, places: Iterable[ArtifactPath], read: Read, trial: KernelTrial | None = None
    ) -> tuple[Considered | None, tuple[Considered, ...]]:
        """The one that is named, or the best of those that fit; all that were looked at.

        All are, where none fits. What a `trial` finds no kernel for is left out.

        Raises:
            HubaotiError: of the best that was, where nothing else is left.
        """
        if self.place is not None:
            considered = judge_catalog(read([self.place]), self.judge)
            ranked = rank_considered(considered, self.place.recipe)
            return (ranked[0] if ranked else None), considered
        look = None if trial is None else trial.look
        chosen, considered = choose_artifact(places, read, self.host, self.recipe, look)
        if chosen is None and trial is not None:
            trial.require_something()
        if chosen is None:
            considered = judge_catalog(read(places), self.judge)
        return chosen, considered

    def describe_no_choice(
        self, ref: RepoRef, catalog: Catalog, considered: tuple[Considered, ...]
    ) -> HubaotiError:
        """Why nothing was chosen, and what to do instead."""
        recipe = self.recipe if self.place is None else self.place.recipe
        error = describe_refusals(catalog, considered, recipe)
        if not considered:
            with suppress(HubaotiError):
                branches = self.client.branches(ref.repo) if ref.revision is None else ()
                error.hint = suggest_loader(ref, catalog.files, branches) or error.hint
        if isinstance(error, NoMatch) and self.place is None and self.host.torch is None:
            return describe_no_torch(error, ref, catalog)
        return error

    def require_trust(
        self, ref: RepoRef, commit: str, place: ArtifactPath, manifest: Manifest
    ) -> None:
        """See that an artifact of this publisher may run here, and is the one that is locked.

        Raises:
            NotLocked, LockMismatch: there is a lock, and it is not.
            Untrusted: it was not built here, and of nobody who published it anybody ever said so.
            Blocked: somebody said that it may not.
        """
        if self.lock is not None:
            self.lock.find(ref).require(place, manifest.digest)
        origin = PullOrigin(self.client.endpoint, ref.repo, commit, str(place))
        if self.trust and ref.digest is not None:  # of what is named, and of nothing else
            trust_artifact(self.mirror, ref.digest, origin)
            return
        decision = self.mirror.decide(manifest.digest, origin)
        if isinstance(decision.refusal, Blocked):
            raise decision.refusal
        wanted = self.trust and self.mirror.index.is_writable  # and remembered
        if wanted or not decision.allowed:
            what = f"{place} in {ref.repo}", f"commit {commit}, artifact {manifest.digest}"
            self.require_publisher(ref, *what, self.mirror.seen.list_signed(manifest.digest))

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

    def pin(self, ref: RepoRef, commit: str, request: str | None = None) -> Pin:
        """What is remembered of a pull: of which commit, of what was asked for, on which host."""
        if self.lock is not None:
            request = LOCKED
        elif request is None:
            request = str(self.place or self.recipe or "")
        return Pin(self.client.endpoint, ref.repo, commit, request, fingerprint(self.host))


def fingerprint(host: Host) -> str:
    """The facts by which artifacts are ranked, in one short word: another host chooses anew."""
    torch = None if host.torch is None else (host.torch.version, host.torch.cuda)
    gpus = [(gpu.name, gpu.sm) for gpu in host.gpus]
    libraries = (host.glibc, host.glibcxx, host.cxxabi)
    facts = (host.os, host.level, torch, gpus, host.driver_cuda, libraries)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
