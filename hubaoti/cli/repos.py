"""`hubaoti versions`, `hubaoti explain` and `hubaoti lock`: what repos hold; nothing is fetched."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubaoti.artifact.sizes import format_count
from hubaoti.cli.output import Steps, print_json, print_line, print_some, print_table
from hubaoti.cli.paths import GivenPath

if TYPE_CHECKING:
    from hubaoti.hub.choice import Considered
    from hubaoti.hub.lockfile import Lock

_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
_QUIET = click.option("-q", "--quiet", is_flag=True, help="print the result alone, and no steps")


@click.command("versions")
@click.argument("repo")
@_JSON
@_QUIET
def versions_command(repo: str, as_json: bool, quiet: bool) -> None:
    """List the tags of REPO (owner/name) that are versions, the newest first."""
    from hubaoti import api

    with Steps(quiet or as_json) as progress:
        found = api.versions(repo, progress=progress)
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        (each.tag, "" if each.artifacts is None else each.artifacts, each.commit) for each in found
    ]
    print_table(["version", "artifacts", "commit"], rows)


@click.command("explain")
@click.argument("repo")
@click.option("--recipe", help="only this one, as bfloat16-sdpa")
@click.option("--host", type=GivenPath(), help="for the host that this file describes")
@_JSON
@_QUIET
def explain_command(repo: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say of every artifact of REPO (owner/name[@revision]) whether it fits this host, and why.

    The best one, which pull takes, comes first. What would be compiled of a model is said by:
    hubaoti compile MODEL --explain.
    """
    from hubaoti import api

    with Steps(quiet or as_json) as progress:
        found = api.explain_repo(repo, progress=progress, **options)
    if as_json:
        artifacts = [_serialize(each) for each in found.considered]
        facts = {"repo": found.repo, "commit": found.commit, "artifacts": artifacts}
        print_json(facts | {"notes": list(found.notes)})
        return
    print_line(f"{found.repo} at {found.commit}")
    for each in found.considered:
        _print_considered(each)
    print_some([f"  {note}" for note in found.notes])


def _serialize(each: Considered) -> dict[str, object]:
    """An artifact and its verdict as plain values."""
    return {
        "path": str(each.place),
        "digest": each.manifest.digest if each.manifest else None,
        "verdict": each.verdict.to_dict() if each.verdict else None,
        "kernels": [str(pin) for pin in each.manifest.requires.kernels] if each.manifest else [],
        "error": str(each.error) if each.error else None,
    }


def _print_considered(each: Considered) -> None:
    """An artifact, how well it fits, and every reason: of one that is refused, those against it."""
    if each.verdict is None:
        word = "refused" if each.is_refused else "unreadable"
        print_line(f"{word:<13} {each.place}: {each.error}")
        return
    word = "refused" if each.verdict.refusals else str(each.verdict.fit)
    print_line(f"{word:<13} {each.place}")
    for reason in each.verdict.refusals or each.verdict.notes:
        print_line(f"    needs {reason.need}; here is {reason.have}: {reason.advice}")
    for pin in each.manifest.requires.kernels if each.manifest else ():
        owner = pin.repo.partition("/")[0]
        print_line(f"    calls the kernel {pin}: {owner} has to be trusted, too")


@click.command("lock")
@click.argument("repos", metavar="REPO...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=GivenPath(),
    default=Path("hubaoti.lock"),
    help="the lockfile; by default hubaoti.lock",
)
@click.option("--add", is_flag=True, help="all else that the lockfile has stays as it is")
@click.option("-q", "--quiet", is_flag=True, help="print nothing but errors")
def lock_command(repos: tuple[str, ...], output: Path, add: bool, quiet: bool) -> None:
    """Write down what each REPO (owner/name[@revision]) holds now, by commit and digest."""
    from hubaoti import api
    from hubaoti.hub.layout import RepoRef
    from hubaoti.hub.lockfile import Lock

    before = Lock.read_before(output, [RepoRef.parse(each) for each in repos], add)
    with Steps(quiet) as progress:
        lock = api.lock(*repos, progress=progress)
        written = lock.keep(before) if add else lock
        written.write(output)
    if not quiet:
        _print_locked(lock, before, written)


def _print_locked(lock: Lock, before: Lock, written: Lock) -> None:
    """What is locked now, where it was, and what is locked no more."""
    commits = {each.ref: each.commit for each in before.repos}
    for each in lock.repos:
        was = commits.get(each.ref, each.commit)
        moved = f", was {was}" if was != each.commit else ""
        count = format_count(len(each.artifacts), "artifact")
        print_line(f"{each.ref}: {count} at {each.commit}{moved}")
    stay = {each.ref for each in written.repos}
    for ref in commits:
        if ref not in stay:
            print_line(f"{ref} is locked no more")
