"""`hubaoti push` and `hubaoti pull`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubaoti.artifact.sizes import format_count, format_size
from hubaoti.cli.output import Steps, print_json, print_line, print_lines, print_some
from hubaoti.cli.paths import GivenPath
from hubaoti.errors import BadLock
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.hub.choice import Pulled
    from hubaoti.hub.push import Commit

_PUBLISHED = {True: "published", False: "was there already"}


@click.command("push")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=GivenPath())
@click.argument("repo")
@click.option("--tag", help="name the commit, as v1.2.0")
@click.option("--move-tag", is_flag=True, help="move an existing tag to this commit")
@click.option("--label", help="the user's own part of the recipe's path, of each bundle's")
@click.option("--replace", is_flag=True, help="overwrite the artifact at this path")
@click.option("--private", is_flag=True, help="when the repo has to be made")
@click.option(
    "--layout",
    type=click.Choice(["zerogpu"]),
    help="onto a branch that spaces.aoti_load and aokit read",
)
@click.option("--sign", metavar="KEY.pem|sigstore", help="with a private EC key, or by who you are")
@click.option("--certificates", metavar="FILE", help="the key's own in PEM, then those above it")
@click.option("--trust-config", metavar="FILE", help="of a sigstore that is not the public one")
@click.option("--as-is", is_flag=True, help="what this machine did not build, too")
@click.option("-q", "--quiet", is_flag=True, help="print nothing but errors")
def push_command(bundles: tuple[Path, ...], repo: str, quiet: bool, **options: Any) -> None:
    """Publish each BUNDLE, or all that a folder holds, to REPO (owner/name) in one commit."""
    from hubaoti import api

    with Steps(quiet) as progress:
        commit = api.push(bundles, repo, progress=progress, **options)
    if not quiet:
        _print_commit(commit)


def _print_commit(commit: Commit) -> None:
    """The commit, and what became of each bundle."""
    said = [
        f"{each.path} {_PUBLISHED[each.created]}{', signed now' if each.signed else ''}"
        for each in commit.artifacts
    ]
    first, *others = said if len(said) == 1 else [format_count(len(said), "artifact"), *said]
    print_line(f"{commit.repo}@{commit.commit}: {first}")
    for line in others:
        print_line(f"  {line}")
    if commit.branch is not None:
        print_line(f"  branch {commit.branch}")
    if commit.moved_from is not None:
        print_line(f"  moved {commit.tag} from {commit.moved_from} to {commit.commit}")
    print_line(f"  {commit.url}")


@click.command("pull")
@click.argument("repo", required=False)
@click.option("--recipe", help="only this one, as bfloat16-sdpa")
@click.option("--path", metavar="RECIPE/VARIANT", help="this artifact; it is fetched without torch")
@click.option("--trust", is_flag=True, help="trust the publisher, now and from now on")
@click.option("--allow-rollback", is_flag=True, help="a tag that moved, a branch that went back")
@click.option("--host", type=GivenPath(), help="for the host that this file describes")
@click.option("--any-of", metavar="MODEL", help="the best for this model, of all trusted owners")
@click.option("--task", help="of that model, as compile has it; by default as the model says")
@click.option("--locked", is_flag=True, help="only what hubaoti.lock, or HUBAOTI_LOCK's file, says")
@click.option("--lockfile", type=GivenPath(), help="only what this file says")
@click.option("--missing", metavar="compile", help="what does not fit this host is compiled here")
@click.option("--model", help="of which it is compiled, where the repo does not say")
@click.option("--push-back", is_flag=True, help="into REPO what was compiled, for other machines")
@click.option(
    "--sign", metavar="KEY.pem|sigstore", help="what is pushed back, as push --sign has it"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.option(
    "-q", "--quiet", is_flag=True, help="print nothing but errors; --json is printed all the same"
)
def pull_command(
    repo: str | None,
    any_of: str | None,
    locked: bool,
    lockfile: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fetch the artifact of REPO (owner/name[@revision]) that fits this host best.

    REPO may be named at a version (@v1, @~=1.2) or by an artifact's digest (@sha256:…). With
    --locked and no REPO, all that is locked is fetched. --any-of MODEL takes the artifact that fits
    best of all repos that hubaoti search --program MODEL finds of owners who are trusted.
    """
    from hubaoti import api

    by = lockfile or locked
    trusts = options["trust"] and not (as_json or quiet)
    before = _list_trusted() if trusts else set()
    with Steps(quiet or as_json) as progress:
        if any_of is not None:
            chosen = _choose_options(options, repo or by)
            found = [api.pull_any_of(any_of, progress=progress, **chosen)]
        else:
            _refuse_task(options.pop("task"))
            refs = [repo] if repo else _list_locked(by)
            found = [api.pull(ref, locked=by, progress=progress, **options) for ref in refs]
    if as_json:
        facts = [_serialize_pulled(pulled) for pulled in found]
        print_json(facts[0] if repo or any_of else facts)
    for pulled in [] if as_json or quiet else found:
        _print_pulled(pulled)
    for pulled in [each for each in found if quiet and each.is_kept_back and not as_json]:
        print_lines("\n".join(pulled.notes), err=True)  # it was asked for, and is no success
    for who in sorted(_list_trusted() - before) if trusts else ():
        print_line(f"  {who} is trusted from now on; hubaoti trust rm takes that back")


def _list_trusted() -> set[str]:
    """Who and what is trusted now, in words."""
    from hubaoti.mirror.trust import Trust

    said = Trust(Settings.from_env().trust).read()
    return {str(each) for each in (*said.publishers, *said.artifacts)}


def _choose_options(options: dict[str, Any], repo: object) -> dict[str, Any]:
    """What a pull of any repo takes of the options; the others name one, or whom to trust."""
    chosen = {name: options.pop(name) for name in ("task", "recipe", "host")}
    if others := ["REPO"] * bool(repo) + [f"--{name}" for name, said in options.items() if said]:
        others = [name.replace("_", "-") for name in others]
        raise click.UsageError(
            f"--any-of takes what fits best of all trusted owners, without {', '.join(others)}"
        )
    return chosen


def _refuse_task(task: str | None) -> None:
    if task is not None:
        raise click.UsageError("--task is of --any-of MODEL: a repo's artifacts say their own")


def _list_locked(locked: bool | Path) -> list[str]:
    """The repos of the lockfile, as they were asked for."""
    from hubaoti.hub.lockfile import find_lock

    lock = find_lock(locked, Settings.from_env())
    if lock is None:
        raise click.UsageError("Missing argument 'REPO'.")
    if not lock.repos:
        raise BadLock(f"{lock.path} names no repo", hint="lock some: hubaoti lock REPO…")
    return [str(each.ref) for each in lock.repos]


def _print_pulled(pulled: Pulled) -> None:
    """What was chosen, and where it is not made for this host."""
    source = "from the mirror" if pulled.from_mirror else "from the Hub"
    source = "compiled here" if pulled.compiled else source
    size = format_size(pulled.artifact.manifest.size)
    print_line(f"{pulled.place} ({pulled.verdict.fit}, {size} packed) {source}")
    print_line(f"  {pulled.ref.repo} at {pulled.commit}, digest {pulled.artifact.digest[:12]}")
    for reason in pulled.verdict.notes:
        print_line(f"  built for {reason.need}, here is {reason.have}: {reason.advice}")
    print_some(
        [
            f"  {each.place} {'is refused' if each.is_refused else 'cannot be used'}: {each.error}"
            for each in pulled.considered
            if each.error is not None
        ]
    )
    print_some([f"  {note}" for note in pulled.notes])


def _serialize_pulled(pulled: Pulled) -> dict[str, object]:
    """What was chosen, among what and why, as plain values."""
    considered = [
        {
            "path": str(each.place),
            "verdict": each.verdict.to_dict() if each.verdict else None,
            "error": str(each.error) if each.error else None,
        }
        for each in pulled.considered
    ]
    return {
        "repo": pulled.ref.repo,
        "path": str(pulled.place),
        "commit": pulled.commit,
        "digest": pulled.artifact.digest,
        "folder": str(pulled.artifact.path),
        "from_mirror": pulled.from_mirror,
        "compiled": pulled.compiled,
        "verdict": pulled.verdict.to_dict(),
        "considered": considered,
        "notes": list(pulled.notes),
    }
