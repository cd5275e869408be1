"""`hubaoti search`: repos that have graphs; nothing is fetched but lists and manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hubaoti.cli.output import Steps, print_json, print_line, print_table
from hubaoti.cli.paths import GivenPath

if TYPE_CHECKING:
    from hubaoti.api.searching import RepoFound


@click.command("search")
@click.argument("words", nargs=-1)
@click.option("--program", metavar="MODEL", help="only of its program: a Hub id or a folder")
@click.option("--task", help="of that program, as compile has it; by default as the model says")
@click.option("--fits", is_flag=True, help="read manifests, and put what fits this host best first")
@click.option("--host", type=GivenPath(), help="for the host that this file describes")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.option("-q", "--quiet", is_flag=True, help="print the result alone, and no steps")
def search_command(
    words: tuple[str, ...], fits: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """List the repos that say that they have graphs, and WORDS in their names.

    With --program MODEL those that serve every model of its config, whatever the weights; pull
    --any-of MODEL takes the best of them. What a repo says of itself is a claim: --fits reads the
    manifests of the first 20, and shows the best artifact of each, exact or compatible. Whose code
    runs here is said by: hubaoti trust add OWNER.
    """
    from hubaoti import api

    with Steps(quiet or as_json) as progress:
        found = api.search(*words, fits=fits, progress=progress, **options)
    if as_json:
        print_json([_serialize(each) for each in found])
    elif not found:
        print_line("no repo was found")
    elif fits:
        rows = [(each.repo, each.owner, *_describe_best(each)) for each in found]
        print_table(["repo", "owner", "fit", "artifact"], rows)
    else:
        rows = [(each.repo, each.owner, *_describe_claims(each)) for each in found]
        print_table(["repo", "owner", "changed", "for"], rows)


def _describe_best(found: RepoFound) -> tuple[str, str]:
    """How well the best artifact of a repo fits, and which that is; or why none does."""
    if found.best is None or found.best.verdict is None:
        return "", found.reason
    return str(found.best.verdict.fit), str(found.best.place)


def _describe_claims(found: RepoFound) -> tuple[str, str]:
    """The day on which a repo changed last, and for which hosts it says that it has graphs."""
    kinds = (tag for tag in found.tags if not tag.startswith("hubaoti"))
    return (f"{found.updated:%Y-%m-%d}" if found.updated else ""), " ".join(sorted(kinds))


def _serialize(found: RepoFound) -> dict[str, object]:
    """A repo as plain values."""
    best = found.best
    return {
        "repo": found.repo,
        "owner": found.owner,
        "updated": found.updated.isoformat() if found.updated else None,
        "tags": list(found.tags),
        "best": best
        and {
            "path": str(best.place),
            "digest": best.manifest.digest if best.manifest else None,
            "verdict": best.verdict.to_dict() if best.verdict else None,
        },
        "reason": found.reason,
    }
