"""May an artifact's code run on this machine? One question, asked wherever something is opened.

What is blocked may not. Else one of these is enough: this machine built it, it is trusted by its
own digest, or somebody who is trusted now published it, and signed it where that is asked of them.
Where its files lie says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.errors import Blocked, HubaotiError, Untrusted
from hubaoti.mirror.rows import PullOrigin, Signed
from hubaoti.mirror.trust import TrustList, refuse_blocked, refuse_unsigned
from hubaoti.mirror.trust_text import format_command

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of an artifact: whether it was built here, all places it came from, and whose
    signatures of it were verified."""

    digest: str
    built: bool = False
    origins: tuple[PullOrigin, ...] = ()
    signed: tuple[Signed, ...] = ()

    @property
    def publishers(self) -> tuple[tuple[str, str], ...]:
        """Everyone who published it, as endpoint and owner, each once."""
        return tuple(dict.fromkeys((each.endpoint, each.publisher) for each in self.origins))


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether it may run here, in words, and what to say where it may not."""

    reason: str
    refusal: HubaotiError | None = None

    @property
    def allowed(self) -> bool:
        """Whether it may."""
        return self.refusal is None


def decide(evidence: Evidence, said: TrustList) -> Decision:
    """Whether what is known of an artifact is enough, by what was said on this machine."""
    return _find_block(evidence, said) or _find_ground(evidence, said) or _refuse(evidence, said)


def trust_artifact(mirror: Mirror, digest: str, *origins: PullOrigin) -> None:
    """Trust an artifact from now on, of whatever origins, unless it is blocked.

    Raises:
        Blocked: it is, or somebody who published it; nothing is written.
    """
    decision = mirror.decide(digest, *origins)
    if isinstance(decision.refusal, Blocked):
        raise decision.refusal
    mirror.trust.add_artifact(digest)


def _find_block(evidence: Evidence, said: TrustList) -> Decision | None:
    """What of an artifact is blocked, if anything is."""
    name = f"artifact {evidence.digest[:12]}"
    if said.blocks_artifact(evidence.digest):
        return Decision("blocked", refuse_blocked(name, {"digest": evidence.digest}))
    for endpoint, owner in evidence.publishers:
        if said.blocks(endpoint, owner):
            who = {"endpoint": endpoint, "owner": owner}
            refusal = refuse_blocked(f"{name} was published by {owner} at {endpoint}, who", who)
            return Decision(f"published by {owner}, who is blocked", refusal)
    return None


def _find_ground(evidence: Evidence, said: TrustList) -> Decision | None:
    """What is enough, if anything is."""
    if evidence.built:
        return Decision("built here")
    if said.names(evidence.digest):
        return Decision("trusted by its digest")
    for endpoint, owner in evidence.publishers:
        if said.trusts(endpoint, owner, evidence.signed):
            signs = " and signed it" if said.list_signers(endpoint, owner) else ""
            return Decision(f"published by {owner}, who is trusted{signs}")
    return None


def _refuse(evidence: Evidence, said: TrustList) -> Decision:
    """Why what is known is not enough, and what would be."""
    name, owners = f"artifact {evidence.digest[:12]}", [owner for _, owner in evidence.publishers]
    if not owners:
        refusal = Untrusted(
            f"{name} was not built on this machine, and nobody knows who published it: opening it "
            "runs its native code here",
            hint="if you trust whoever gave it to you: trust=True where you open it, or once: "
            f"hubaoti trust add {evidence.digest}",
        )
        return Decision("not built here, and of nobody who is known", refusal)
    for endpoint, owner in evidence.publishers:
        if wanted := said.list_signers(endpoint, owner):
            published = f"{name}, which {owner} at {endpoint} published,"
            unsigned = refuse_unsigned(published, owner, wanted)
            return Decision(f"published by {owner}, not signed as is asked of them", unsigned)
    # By the endpoint, too: who is called so at today's may be somebody else.
    who = " and ".join(f"{owner} at {endpoint}" for endpoint, owner in evidence.publishers)
    endpoint, owner = evidence.publishers[0]
    command = format_command("add", {"endpoint": endpoint, "owner": owner})
    refusal = Untrusted(
        f"{name} was published by {who}, who {'is' if len(owners) == 1 else 'are'} not trusted "
        "here: opening it runs their native code on this machine",
        hint=f"if you trust {owner}, say so once with: {command}",
    )
    return Decision(f"published by {' and '.join(owners)}, not trusted", refusal)
