"""A pull of a program, of whichever repo has the artifact that fits best.

Only repos of owners who are trusted now are looked into: whoever may tag a repo is heard, and no
more than named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hubaoti.artifact.schema import Program
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import HubaotiError, NoMatch, NoRepo, Untrusted, first_line
from hubaoti.hub.choice import Pulled, format_considered
from hubaoti.hub.kernel_choice import list_left_out
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import Puller
from hubaoti.hub.search import MOST_LISTED, FoundRepo, RepoFinder
from hubaoti.hub.survey import MOST_LOOKED_INTO, Look, explain_rank, rank_looks, survey
from hubaoti.mirror.trust import Trust, TrustList

_NAMED = 10  # repos in a message
TRUSTED, SIGNED, BLOCKED, NOT_TRUSTED = "trusted", "trusted if signed", "blocked", "not trusted"


def choose_and_pull(puller: Puller, program: Program) -> Pulled:
    """The artifact of a program that fits best, of all repos whose owners are trusted now.

    Its notes say why that one, and name the repos that were left out; where nothing fits, that is
    counted among what was missed.

    Raises:
        NoRepo: no repo says that it has any. Untrusted: those that do are of nobody trusted.
        NoMatch: none fits, with every reason; where no repo could be looked into, its error.
        BadPackage, DigestMismatch, DiskFull, and of kernels: as `pull_artifact`.
    """
    with puller.mirror.answers.counting_misses(program.tag, puller.host):
        return _pull_best(puller, program)


def _pull_best(puller: Puller, program: Program) -> Pulled:
    said = Trust(puller.settings.trust).read()
    finder = RepoFinder(puller.settings, puller.progress)
    puller.progress(f"asking {finder.endpoint} for repos of {program.tag}")
    found = _list_repos(finder, said, program.tag)
    whose = {each.ref: describe_owner(said, finder.endpoint, each.ref.owner) for each in found}
    mine = [ref for ref, word in whose.items() if word in {TRUSTED, SIGNED}]
    if not mine:
        raise _describe_nobody(program, finder.endpoint, whose)
    looks = survey(puller, mine, program, puller.pin_commit)
    ranked = rank_looks(looks, puller.recipe)
    if not ranked:
        raise _describe_no_fit(looks, puller.recipe)
    chosen, best, catalog = ranked[0], ranked[0].best, ranked[0].catalog
    assert best is not None and best.verdict is not None and catalog is not None
    puller.progress(f"taking {best.place} of {chosen.ref}: {explain_rank(ranked, puller.recipe)}")
    known = best.manifest and puller.mirror.artifact(best.manifest.digest)
    pin = puller.pin(chosen.ref, catalog.commit, f"{program.tag} {puller.recipe or ''}".strip())
    artifact = puller.take(chosen.ref, catalog, best, pin)
    notes = (
        *_list_notes(ranked, looks, puller.recipe),
        *list_left_out(chosen.considered, best),
        *_list_unseen(whose, mine),
    )
    return Pulled(
        artifact,
        chosen.ref,
        catalog.commit,
        best.place,
        best.verdict,
        chosen.considered,
        (*notes, *catalog.notes),
        bool(known),
    )


def describe_owner(said: TrustList, endpoint: str, owner: str) -> str:
    """Whether an owner's code may run here, in one of four words."""
    if said.blocks(endpoint, owner):
        return BLOCKED
    if not said.lists(endpoint, owner):
        return NOT_TRUSTED
    return SIGNED if said.list_signers(endpoint, owner) else TRUSTED


def _list_repos(finder: RepoFinder, said: TrustList, tag: str) -> tuple[FoundRepo, ...]:
    """The repos of a program; where they are too many, strangers' hide none of who is trusted."""
    found = finder.find(tag)
    if len(found) < MOST_LISTED:
        return found
    owners = dict.fromkeys(e.owner for e in said.publishers if e.endpoint == finder.endpoint)
    trusted = (each for owner in owners for each in finder.find(tag, owner=owner))
    return tuple({each.ref: each for each in (*found, *trusted)}.values())


def _describe_nobody(program: Program, endpoint: str, whose: dict[RepoRef, str]) -> HubaotiError:
    """Why nothing is looked into: there is nothing, or of nobody who is trusted."""
    if not whose:
        return NoRepo(
            f"no repo of {endpoint} says that it has graphs of {program.tag}, to {program.task}",
            hint="compile and push one: hubaoti compile MODEL; for another task, name it with "
            "--task",
        )
    return Untrusted(
        f"{_join_names(whose)} say that they have graphs of {program.tag}, and none of their "
        "owners is trusted here",
        hint="see what they have: hubaoti search --program MODEL --fits; if you trust one of them, "
        "say so once: hubaoti trust add OWNER",
    )


def _join_names(repos: Iterable[RepoRef]) -> str:
    names = [str(each) for each in repos]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _describe_no_fit(looks: Sequence[Look], recipe: Recipe | None) -> HubaotiError:
    """Why nothing is chosen, with every reason of every repo."""
    lines = []
    for each in looks:
        lines.append(f"{each.ref}:{f' {each.error}' if each.error else ''}")
        lines += [line for one in each.considered for line in format_considered(one, recipe)]
    errors = [each.error for each in looks if each.error is not None]
    if len(errors) == len(looks):
        message = "\n".join(("no repo can be looked into:", *lines))
        return type(errors[0])(message, hint=errors[0].hint)
    return NoMatch(
        "\n".join(("no artifact of these repos fits this host:", *lines)),
        hint="follow one of the advices above, or compile an artifact here: hubaoti compile",
    )


def _list_notes(ranked: Sequence[Look], looks: Sequence[Look], recipe: Recipe | None) -> list[str]:
    """Why what was taken was, and what of trusted owners was not."""
    notes = [f"of {ranked[0].ref}: {explain_rank(ranked, recipe)}"]
    for each in looks:
        if each.error is not None:
            notes.append(f"{each.ref} was left out: {first_line(each.error)}")
    return notes


def _list_unseen(whose: dict[RepoRef, str], mine: Sequence[RepoRef]) -> list[str]:
    """The repos that were not looked into, and what to do about it."""
    strangers = [ref for ref, word in whose.items() if word == NOT_TRUSTED]
    notes = [
        f"{ref} says that it has some, too; if you trust {ref.owner}: hubaoti trust add {ref.owner}"
        for ref in strangers[:_NAMED]
    ]
    if more := len(strangers[_NAMED:]):
        notes.append(f"and {more} more repos of nobody who is trusted here")
    if more := len(mine[MOST_LOOKED_INTO:]):
        notes.append(f"{more} more repos were not looked into: name one of them")
    return notes
