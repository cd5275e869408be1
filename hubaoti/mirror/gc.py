"""The mirror keeps itself within its budget: what may leave, in which order, and what is left over.

What is pinned, open in a living process, or built here and nowhere else never leaves.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.requirements import read_version, series
from hubaoti.artifact.sizes import format_count, format_size
from hubaoti.artifact.variant import Variant
from hubaoti.errors import Blocked, MirrorFull
from hubaoti.host.probe import find_torch
from hubaoti.mirror.eviction import Candidate, estimate_cost, order
from hubaoti.mirror.facts import read_facts
from hubaoti.mirror.orphans import find_gone, find_orphans
from hubaoti.mirror.removal import Stuck, delete_folders, remove_unheld
from hubaoti.mirror.rows import Row
from hubaoti.mirror.usage import Use, name_holders

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_SHARE, _LEAST, _MOST = 0.2, 10**9, 50 * 10**9  # of the disk, and bytes
_LOW = 0.9  # of the budget: down to there, once it is reached
_AT_ONCE = 100  # artifacts that leave by one transaction, each with its lock held
_DAY = 24 * 3600
_RECENT = 30 * _DAY  # who was opened since is run by some torch, wherever that is installed
BUDGET = "budget"
_BUILT = "built here, and not pushed"
_HOLDERS = {  # what does not leave, and how its user lets go of it
    "pinned": "pinned, or in a lockfile (hubaoti mirror unpin; or the lockfile says others)",
    _BUILT: f"{_BUILT} (hubaoti push, or hubaoti mirror rm)",
    "open": "open in a process",
}


@dataclass(frozen=True, slots=True)
class Leaving:
    """An artifact that leaves, or would, and why."""

    digest: str
    recipe: str
    variant: str
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would; bytes of artifacts before and after, and the budget.

    `orphans` are what no row promises, by their paths below the mirror. `blocked` are artifacts
    that are blocked here, and stay all the same, with what keeps them. `stuck` is what the system
    did not let go, of orphans and of artifacts.
    """

    artifacts: tuple[Leaving, ...]
    orphans: tuple[str, ...]
    before: int
    after: int
    budget: int
    blocked: tuple[Leaving, ...] = ()
    stuck: tuple[Stuck, ...] = ()


def read_budget(mirror: Mirror) -> int:
    """The most bytes of artifacts: as was said, else 20 % of the disk, from 1 to 50 GB."""
    said = mirror.usage.read_number(BUDGET)
    if said is None:
        share = shutil.disk_usage(mirror.root).total * _SHARE
        return int(min(max(share, _LEAST), _MOST))
    return int(said)


def collect(
    mirror: Mirror,
    *,
    older_than: float | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> Collected:
    """Remove orphans, what may not be opened here, what was not opened for `older_than` seconds,
    and, where there is more than `max_bytes` (by default the budget), what is worth least.

    What is promised and gone is forgotten.

    Raises:
        HubaotiError: the mirror may not be written.
    """
    mirror.index.require_writable()
    with mirror.leases.changing_files():
        collection = _Collection(mirror, dry_run)
        budget = read_budget(mirror) if max_bytes is None else max_bytes
        collection.drop_gone()
        collection.drop_refused()
        if older_than is not None:
            collection.drop_unused(older_than)
        before = collection.used
        if before > budget:
            collection.evict(int(budget * _LOW))
        known = {mirror.root / each.path for each in collection.stuck}
        orphans = [each for each in find_orphans(mirror) if each not in known]
        if not dry_run:
            collection.stuck += delete_folders(mirror.root, orphans)
            mirror.leases.forget_unheld()
    names = tuple(sorted(each.relative_to(mirror.root).as_posix() for each in orphans))
    gone = tuple(collection.gone)
    blocked, stuck = tuple(_list_blocked(mirror)), tuple(collection.stuck)
    return Collected(gone, names, collection.started, collection.used, budget, blocked, stuck)


def make_room(mirror: Mirror, size: int, is_pulled: bool) -> None:
    """Have artifacts leave so that one of `size` bytes comes within the budget.

    Who calls it changes files already. What was built here comes, however little room there is.

    Raises:
        MirrorFull: there is too little that may leave for what `is_pulled`.
    """
    budget = read_budget(mirror)
    used = mirror.usage.count_bytes()
    if used + size <= budget:
        return
    if size <= budget:
        collection = _Collection(mirror, dry_run=False)
        collection.drop_gone()
        collection.evict(max(int(budget * _LOW) - size, 0))
        used = collection.used
    if is_pulled and used + size > budget:
        raise _describe_full(mirror, budget, size)


def _describe_full(mirror: Mirror, budget: int, size: int) -> MirrorFull:
    """The error that says why so many bytes do not go in: by themselves, or beside what stays."""
    large = f"the artifact has {format_size(size)} unpacked, and the budget of {mirror.root}"
    more = "say another budget: hubaoti mirror budget 100GB"
    if size > budget:
        message = f"{large} is {format_size(budget)}: it does not go in, whatever leaves for it"
        return MirrorFull(message, hint=more)
    held = "; ".join(f"{format_size(n)} {why}" for why, n in count_held(mirror).items())
    held = held or "others opened it meanwhile"
    return MirrorFull(
        f"{large} is {format_size(budget)}, of which too much stays: {held}",
        hint=f"see hubaoti mirror ls; unpin, push or remove something, or {more}",
    )


class _Collection:
    """One collection: what is here, what of it may leave, and what has left."""

    def __init__(self, mirror: Mirror, dry_run: bool) -> None:
        self.gone: list[Leaving] = []
        self.stuck: list[Stuck] = []
        self._mirror, self._dry_run = mirror, dry_run
        usage = mirror.usage
        self._uses, self._elsewhere = usage.read(), usage.list_elsewhere()
        rows = mirror.index.rows()
        stays = {*usage.list_pins(), *(usage.list_built() - self._elsewhere)}
        self._rows = {row.digest: row for row in rows if row.digest not in stays}
        self._decisions = mirror.decide_each(self._rows)
        self.started = self.used = sum(row.size for row in rows)

    def drop_gone(self) -> None:
        """Drop what is promised and not there: somebody removed it."""
        gone = find_gone(self._mirror)
        self._drop({each: "its files are gone" for each in self._rows if each in gone})

    def drop_refused(self) -> None:
        """Drop what may not be opened here."""
        self._drop({e: self._decisions[e].reason for e in self._rows if self._is_refused(e)})

    def drop_unused(self, seconds: float) -> None:
        """Drop what was not opened for so long, and did not come since."""
        now = time.time()
        idle = {e: now - max(row.added, self._find_use(e).last) for e, row in self._rows.items()}
        unused = {e: since for e, since in idle.items() if since > seconds}
        self._drop({e: f"not opened for {since / _DAY:.1f} days" for e, since in unused.items()})

    def evict(self, most: int) -> None:
        """Have artifacts leave until the others have at most so many bytes together."""
        age, candidates = 0.0, order(self._make_candidates()) if self.used > most else []
        while self.used > most and candidates:
            first, excess = dict[str, Candidate](), self.used - most
            while excess > 0 and candidates:
                candidate = candidates.pop(0)
                first[candidate.digest] = candidate
                excess -= candidate.size
            gone = self._drop({digest: _explain(each) for digest, each in first.items()})
            worths = (first[digest].worth for digest in gone if first[digest].is_runnable)
            age = max(age, *worths, 0.0)
        if not self._dry_run:
            self._mirror.usage.record_age(age)

    def _make_candidates(self) -> Iterator[Candidate]:
        torch = find_torch([])
        here = read_version(torch.version) if torch else None
        only_here = read_facts(self._mirror, self._rows.keys() - self._elsewhere)
        for row in self._rows.values():
            use, facts = self._find_use(row.digest), only_here.get(row.digest)
            opened = use.opens > 0 and time.time() - use.last < _RECENT
            yield Candidate(
                digest=row.digest,
                size=row.size,
                opens=use.opens,
                cost=estimate_cost(row.size, use.seconds, facts.seconds if facts else None),
                age=use.age,
                is_allowed=not self._is_refused(row.digest),
                is_runnable=opened or here is None or _is_of(row, series(here)),
            )

    def _is_refused(self, digest: str) -> bool:
        """Whether an artifact may not be opened here, and is no loss.

        Of what nobody knows the origin of, as after an import or a lost index, nobody has said
        anything yet, and it may be nowhere else.
        """
        decision = self._decisions[digest]
        is_blocked = isinstance(decision.refusal, Blocked)
        return is_blocked or (not decision.allowed and digest in self._elsewhere)

    def _find_use(self, digest: str) -> Use:
        return self._uses.get(digest, Use())

    def _drop(self, whys: Mapping[str, str]) -> list[str]:
        """Remove artifacts, or see which could be; those that are, or would be, gone, and why."""
        leaving, gone = [*whys], list[str]()
        for at in range(0, len(leaving), _AT_ONCE):
            batch = leaving[at : at + _AT_ONCE]
            if self._dry_run:
                gone += [each for each in batch if not self._mirror.leases.is_held(each)]
            else:
                removed, stuck = remove_unheld(self._mirror, batch)
                gone += removed
                self.stuck += stuck
        for digest in gone:
            row = self._rows.pop(digest)
            self.used -= row.size
            self.gone.append(Leaving(digest, row.recipe, row.variant, row.size, whys[digest]))
        return gone


def _is_of(row: Row, torch: str) -> bool:
    """Whether an artifact is for a torch, by its label."""
    return Variant.parse(row.variant).torch == torch


def _explain(candidate: Candidate) -> str:
    """Why something leaves that might have stayed, had there been room."""
    if not candidate.is_allowed:
        return "may not be opened here"
    if not candidate.is_runnable:
        return "no torch here can run it"
    return f"opened {format_count(candidate.opens, 'time')}, {candidate.cost:.0f} s to get it back"


def list_kept(mirror: Mirror) -> dict[str, str]:
    """The artifacts that never leave, and why, but for those that are open somewhere."""
    alone = mirror.usage.list_built() - mirror.usage.list_elsewhere()
    built = dict.fromkeys(alone, _BUILT)
    return built | dict.fromkeys(mirror.usage.list_pins(), "pinned")


def _list_blocked(mirror: Mirror) -> Iterator[Leaving]:
    """What is blocked and does not leave all the same, and why it does not."""
    kept, pins = list_kept(mirror), mirror.usage.list_pins()
    decisions = mirror.decide_each(kept)
    for row in mirror.index.rows():
        decision = decisions.get(row.digest)
        if decision is None or not isinstance(decision.refusal, Blocked):
            continue
        holders = " and ".join(name_holders(pins.get(row.digest, ())))
        by = f" by {holders}" * bool(holders)
        why = f"{decision.reason}, and {kept[row.digest]}{by}"
        yield Leaving(row.digest, row.recipe, row.variant, row.size, why)


def count_held(mirror: Mirror) -> dict[str, int]:
    """The bytes of all that does not leave now, by what holds it, the most first."""
    kept, held = list_kept(mirror), dict[str, int]()
    for row in mirror.index.rows():
        why = kept.get(row.digest) or ("open" if mirror.leases.is_held(row.digest) else "")
        if why:
            held[_HOLDERS[why]] = held.get(_HOLDERS[why], 0) + row.size
    return dict(sorted(held.items(), key=lambda each: -each[1]))
