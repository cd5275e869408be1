"""The verbs that only look at repos: their versions, how their artifacts fit, a lock of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.artifact.variant import Recipe
from hubaoti.errors import BadRequest
from hubaoti.host.described import read_host
from hubaoti.host.probe import Host, probe_host
from hubaoti.hub.layout import RepoRef
from hubaoti.mirror import Mirror
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.hub.choice import Considered
    from hubaoti.hub.lockfile import Lock

_COUNTED = 10  # versions whose artifacts are counted: each costs a request


@dataclass(frozen=True, slots=True)
class RepoVersion:
    """A version of a repo: its tag, its commit, and how many artifacts that has.

    `artifacts` is None of older versions, which are not looked into.
    """

    version: str
    tag: str
    commit: str
    artifacts: int | None


@dataclass(frozen=True, slots=True)
class RepoExplanation:
    """Every artifact of a commit, those that fit first, the best of them first."""

    repo: str
    commit: str
    considered: tuple[Considered, ...]
    notes: tuple[str, ...]


def versions(
    repo: str, *, settings: Settings | None = None, progress: Progress = report_nothing
) -> tuple[RepoVersion, ...]:
    """The tags of a repo that are versions, the newest first.

    Raises:
        RepoMoved: the repo has another name now.
        RepoNotFound, AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.catalog import Allowance, list_catalog
    from hubaoti.hub.client import HubClient
    from hubaoti.hub.versions import list_releases

    client = HubClient(settings or Settings.from_env(), progress)
    name = RepoRef.parse(repo).repo
    progress(f"asking {client.endpoint} for the tags of {name}")
    releases, left = list_releases(client.tags(name)), Allowance()
    counts = {
        commit: len(list_catalog(client, name, commit, left).places)
        for commit in dict.fromkeys(each.commit for each in releases[:_COUNTED])
    }
    return tuple(
        RepoVersion(str(each.version), each.tag, each.commit, counts.get(each.commit))
        for each in releases
    )


def explain_repo(
    repo: str,
    *,
    recipe: str | None = None,
    host: Host | str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> RepoExplanation:
    """Every artifact of `owner/name[@revision]`: how well it fits this host, and why.

    Or how well it fits another host, which a file describes as `hubaoti doctor --json` does. One
    whose kernel cannot be had here is refused, as `pull` leaves it out. Offline, of a commit that
    was pulled before, these are the artifacts that are here.

    Raises:
        NoArtifact: the repo holds none. BadRequest: the file describes no host.
        Untrusted, RepoMoved, RolledBack, NoVersion: of the revision, as `pull`.
    """
    from hubaoti.hub.choice import describe_refusals, judge_catalog, rank_considered
    from hubaoti.hub.kernel_choice import make_asking_trial
    from hubaoti.hub.pull import Puller
    from hubaoti.hub.pull_mirrored import read_here_or_there

    settings = settings or Settings.from_env()
    ref, wanted = RepoRef.parse(repo), None if recipe is None else Recipe.parse(recipe)
    with Mirror.open(settings.mirror) as mirror:
        found = find_host(host, settings)
        puller = Puller(mirror, settings, found, recipe=wanted, progress=progress)
        commit = puller.pin_commit(ref)
        progress(f"reading the manifests of {ref.repo} at {commit}")
        catalog = read_here_or_there(puller, ref, commit)
        trial = make_asking_trial(puller, lambda: catalog)
        considered = tuple(map(trial.look, judge_catalog(catalog, puller.judge)))
    if not considered:
        raise describe_refusals(catalog, (), wanted)
    fitting = rank_considered(considered, wanted)
    others = (each for each in considered if each not in fitting)
    return RepoExplanation(ref.repo, commit, (*fitting, *others), catalog.notes)


def lock(
    *repos: str, settings: Settings | None = None, progress: Progress = report_nothing
) -> Lock:
    """What repos hold now, as `owner/name[@revision]`: each artifact by commit and digest.

    Its `write(Path("hubaoti.lock"))` makes it the file that `pull(..., locked=True)` goes by.

    Raises:
        NoArtifact: a repo holds none.
        Untrusted, RepoMoved, RolledBack, NoVersion: of a revision, as `pull`.
    """
    from hubaoti.hub.lockfile import Lock, lock_repo
    from hubaoti.hub.pull import Puller

    settings = settings or Settings.from_env()
    refs = [RepoRef.parse(repo) for repo in dict.fromkeys(repos)]
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(mirror, settings, probe_host(settings), progress=progress)
        return Lock(
            tuple(
                lock_repo(puller.client, ref, puller.pin_commit(ref), puller.find_required(ref))
                for ref in refs
            )
        )


def find_host(host: Host | str | Path | None, settings: Settings) -> Host:
    """This machine, or the one that a file describes.

    Raises:
        BadRequest: the file describes none.
    """
    if isinstance(host, Host):
        return host
    if not isinstance(host, str | Path | None):
        hint = "give the path of what hubaoti doctor --json printed"
        raise BadRequest(f"a {type(host).__name__} describes no host", hint=hint)
    here = probe_host(settings)
    return here if host is None else read_host(Path(host), here)
