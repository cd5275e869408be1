"""The verbs that look for repos: who has graphs of a program, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti.api.repos import find_host
from hubaoti.artifact.schema import Program
from hubaoti.artifact.variant import Recipe
from hubaoti.compiler.request import CompileRequest
from hubaoti.errors import NotLocked, first_line
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.host.probe import Host
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.model_download import COMPILE_FILES, fetch_model_files
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.hub.choice import Considered, Pulled
    from hubaoti.hub.survey import Look


@dataclass(frozen=True, slots=True)
class RepoFound:
    """A repo that says that it holds graphs, and what of it fits best, if that was asked for.

    `owner` is trusted, trusted if signed, blocked or not trusted. `tags` are what its card claims.
    `best` is None where nothing fits, or was looked at; then `reason` says why.
    """

    repo: str
    updated: datetime | None
    tags: tuple[str, ...]
    owner: str
    best: Considered | None = None
    reason: str = ""


def search(
    *words: str,
    program: str | Path | None = None,
    task: str | None = None,
    fits: bool = False,
    host: Host | str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> tuple[RepoFound, ...]:
    """The repos of the endpoint that say that they hold graphs, the last changed first.

    Args:
        words: which their names have.
        program: a model, as `compile` takes it: only repos of the program of its config.
        task: of that program: embed, classify, logits, generate or forward; by default as the
            model's files say.
        fits: read the manifests of the first 20, and put what fits this host best first.
        host: another one, as a file such as `hubaoti doctor --json` writes there.

    Raises:
        ModelNotFound, UnknownTask: of the model. BadRequest: the file describes no host.
        AuthFailed, HubUnreachable: of the Hub.
    """
    from hubaoti.hub.pull_any_of import describe_owner
    from hubaoti.hub.search import RepoFinder

    require_flags(fits=fits)
    settings = settings or Settings.from_env()
    wanted = None if program is None else identify(program, task, settings, progress)
    finder = RepoFinder(settings, progress)
    progress(f"asking {finder.endpoint} for repos{f' of {wanted.tag}' if wanted else ''}")
    listed = finder.find(wanted.tag if wanted else None, words)
    said = Trust(settings.trust).read()
    found = tuple(
        RepoFound(
            each.ref.repo,
            each.updated,
            each.tags,
            describe_owner(said, finder.endpoint, each.ref.owner),
        )
        for each in listed
    )
    if not fits:
        return found
    return _look_into(found, wanted, find_host(host, settings), settings, progress)


def _look_into(
    found: tuple[RepoFound, ...],
    program: Program | None,
    host: Host,
    settings: Settings,
    progress: Progress,
) -> tuple[RepoFound, ...]:
    """The repos that were found with what of each fits a host best, the best first."""
    from hubaoti.hub.pull import Puller
    from hubaoti.hub.survey import rank_looks, survey

    repos = {each.repo: each for each in found}
    with Mirror.open(settings.mirror) as mirror:
        puller = Puller(mirror, settings, host, progress=progress)
        refs = [RepoRef(repo) for repo in repos]
        looks = survey(puller, refs, program, lambda ref: puller.client.resolve(ref.repo))
    best = {each.ref.repo: each.best for each in rank_looks(looks, None)}
    reasons = {
        each.ref.repo: first_line(each.error) if each.error else _describe_misfit(each)
        for each in looks
    }
    fitting = [replace(repos[repo], best=one) for repo, one in best.items()]
    others = [
        replace(each, reason=reasons.get(repo, "not looked into"))
        for repo, each in repos.items()
        if repo not in best
    ]
    return (*fitting, *others)


def _describe_misfit(look: Look) -> str:
    """Why nothing of a repo is the best: it does not fit, or what could is not signed."""
    refused = [each.error for each in look.considered if each.is_refused]
    return f"refused: {refused[0]}" if refused else "nothing of it fits"


def pull_any_of(
    model: str | Path,
    *,
    task: str | None = None,
    recipe: str | None = None,
    host: Host | str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Pulled:
    """The artifact of a model's program that fits this host best, of whichever repo has it.

    Only repos of owners who are trusted now are looked into, and what they have is verified as
    `pull` does it; what exactly fits comes before what is compatible, and of equals what was built
    last. The notes of what is pulled say why it was that one, and name the repos of others.
    `model`, `task` and `host` are as `search` has them.

    Raises:
        NoRepo: no repo says that it has graphs of this program. Untrusted: only others' do.
        NoMatch: none of theirs fits, with every reason.
        NotLocked: a lockfile says what is taken, and this is a choice.
        HubaotiError: as of `pull`, for what was chosen.
    """
    from hubaoti.hub.pull import Puller
    from hubaoti.hub.pull_any_of import choose_and_pull

    settings = settings or Settings.from_env()
    if settings.lock is not None:
        raise NotLocked(
            f"{settings.lock} says what is taken here, and no choice among repos does",
            hint="pull what is locked, or unset HUBAOTI_LOCK and lock what is chosen",
        )
    program = identify(model, task, settings, progress)
    chosen = None if recipe is None else Recipe.parse(recipe)
    with Mirror.open(settings.mirror) as mirror:
        found = find_host(host, settings)
        puller = Puller(mirror, settings, found, recipe=chosen, progress=progress)
        return choose_and_pull(puller, program)


def identify(
    model: str | Path, task: str | None, settings: Settings, progress: Progress
) -> Program:
    """The program of a model's config and a task, as a compile of them has it; nothing is built.

    Raises:
        MissingDependency: the extra `compile` is not installed. ModelNotFound, UnknownTask.
        BadRequest: the model brings its own code, which is not run for this.
    """
    require("the program of a model", "compile")
    request = CompileRequest.parse({"task": task})
    progress("files")
    folder, _ = fetch_model_files(model, None, COMPILE_FILES, settings, progress)
    progress("torch")  # importing it takes longer than most steps
    from hubaoti.compiler.fake_gpu import CPU
    from hubaoti.compiler.from_config import load_source

    return load_source(folder, request, CPU).program
