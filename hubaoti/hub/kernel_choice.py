"""Artifacts whose kernel cannot be had here: the next best one is taken, and a line says why.

A kernel cannot be had where its commit is gone, or nobody's who is trusted, or where there is no
network. Who names a recipe, a path or a lock has that as the error, and so has everybody where
nothing else fits. Bytes that are not the pinned ones are no such lack, but an error for everybody:
somebody or something changed them, and that is to be looked at, and not to be gone around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import Manifest
from hubaoti.errors import (
    AuthFailed,
    Blocked,
    HubaotiError,
    HubUnreachable,
    KernelMissing,
    RepoMoved,
    Unsigned,
    Untrusted,
    first_line,
)
from hubaoti.host.match import NO_KERNEL, NoKernel
from hubaoti.host.rank import rank
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.choice import Considered, make_candidate
from hubaoti.hub.kernels import (
    PULL_OTHER,
    require_build,
    require_kernel_publishers,
    require_owner_of,
)
from hubaoti.hub.layout import ArtifactPath
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing

if TYPE_CHECKING:
    from hubaoti.artifact.kernel_pin import KernelPin
    from hubaoti.hub.client import HubClient
    from hubaoti.hub.pull import Puller

# Its commit, repo or build is gone; who publishes it is not trusted, blocked, or did not sign.
_LACKS = (KernelMissing, Untrusted, Unsigned, Blocked, RepoMoved, AuthFailed)


@dataclass(frozen=True)
class KernelTrial:
    """Which artifacts' kernels can be had here, by trying; `errors` say of which they could not.

    `bring` raises where they cannot. `admit` is called before: what it raises is no kernel's.
    Unless it `is_free` which artifact is taken, none is tried, and who takes it meets the error.
    `progress` is told of each that is left out.
    """

    bring: Callable[[Manifest], None]
    admit: Callable[[Considered], None]
    is_free: bool
    is_offline: bool
    progress: Progress = report_nothing
    errors: list[HubaotiError] = field(default_factory=list)

    def look(self, each: Considered) -> Considered:
        """An artifact that fits; refused, where a kernel that it calls cannot be had here.

        Raises:
            KernelMissing: that cannot be asked. KernelDigestMismatch: as `bring_kernels`.
        """
        manifest, verdict = each.manifest, each.verdict
        if not self.is_free or manifest is None or verdict is None or verdict.refusals:
            return each
        if manifest.requires.kernels:
            self.admit(each)
            if not self.brings(manifest):
                lack = _describe_lack(manifest, self.errors[-1])
                self.progress(_describe_left_out(each.place, lack))
                return replace(each, verdict=replace(verdict, refusals=(lack,), device=None))
        return each

    def brings(self, manifest: Manifest) -> bool:
        """Whether the kernels that an artifact calls can be had; True where it calls none.

        Raises:
            HubaotiError: they cannot, and no other will do; else as `look`.
        """
        try:
            self.bring(manifest)
        except _LACKS as error:
            is_known = self.is_offline or not isinstance(error.__cause__, HubUnreachable)
            if not self.is_free or not is_known:
                raise
            self.errors.append(error)
            return False
        return True

    def require_something(self) -> None:
        """See that nothing was left out, as nothing else was found.

        Raises:
            HubaotiError: why the best one was.
        """
        if self.errors:
            raise self.errors[0]


def _describe_lack(manifest: Manifest, error: HubaotiError) -> NoKernel:
    """An error of kernels as a reason."""
    reason = error.__cause__ if isinstance(error.__cause__, HubaotiError) else error
    return NoKernel(
        need=f"the kernel {', '.join(map(str, manifest.requires.kernels))}",
        have=f"none that may be used: {first_line(reason)}",
        advice=error.hint,
    )


def list_left_out(considered: Sequence[Considered], chosen: Considered) -> Iterator[str]:
    """Of each artifact that would have been chosen but for its kernel a line: why it was not."""
    assert chosen.verdict is not None
    best = make_candidate(chosen.place, chosen.verdict)
    for each in considered:
        if each.verdict is None or not each.verdict.refusals:
            continue
        lacks = [lack for lack in each.verdict.refusals if isinstance(lack, NoKernel)]
        wanted = make_candidate(each.place, replace(each.verdict, refusals=()))
        if len(lacks) == len(each.verdict.refusals) and rank([wanted, best])[0] is wanted:
            yield _describe_left_out(each.place, lacks[0])


def _describe_left_out(place: ArtifactPath, lack: NoKernel) -> str:
    """What lacks, what would bring it, and how to insist; sdpa was taken, and need not be named."""
    advice = lack.advice.removesuffix(PULL_OTHER).rstrip("; ")
    advice = f": {advice}" if advice and advice != NO_KERNEL else ""
    return (
        f"{place} was left out: it needs {lack.need}, and here is {lack.have}{advice}; "
        f"to take it or nothing: --recipe {place.recipe}"
    )


def make_asking_trial(puller: Puller, read_now: Callable[[], Catalog]) -> KernelTrial:
    """A trial that fetches nothing: of a kernel that is not here it is asked whose its commit is.

    `read_now` gives the catalog of what is looked at.
    """
    client, mirror, trust = puller.client, puller.mirror, Trust(puller.settings.trust)
    known: dict[str, HubaotiError | None] = {}

    def ask(manifest: Manifest) -> None:
        seen = mirror.seen.list_signed(manifest.digest)
        signed = (*seen, *_list_signed(client.endpoint, read_now(), manifest))
        require_kernel_publishers(manifest, client.endpoint, trust, signed)
        for pin in manifest.requires.kernels:
            if not mirror.has_kernel(pin):
                require_build(pin)
                _ask_once(client, pin, known)

    return KernelTrial(ask, lambda _: None, is_free=True, is_offline=client.is_offline)


def _list_signed(endpoint: str, catalog: Catalog, manifest: Manifest) -> Iterator[Signed]:
    """Whose signatures of an artifact were seen to be good as its catalog was read."""
    for place, signer in catalog.signers.items():
        if catalog.readable[place].digest == manifest.digest:
            yield Signed(endpoint, catalog.repo, str(place), str(signer))


def _ask_once(client: HubClient, pin: KernelPin, known: dict[str, HubaotiError | None]) -> None:
    """As `require_owner_of`; what was answered of a commit is not asked again."""
    name = str(pin)
    if name not in known:
        known[name] = None
        try:
            require_owner_of(client, pin)
        except HubaotiError as error:
            known[name] = error
    if (found := known[name]) is not None:
        raise found
