"""`hubaoti serve gc|token|backup|restore`: the folder, looked after, also while it is served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from hubaoti.artifact.sizes import format_size
from hubaoti.cli.groups import Group
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.cli.paths import GivenPath
from hubaoti.settings import Settings

ROOT = click.option("--root", type=GivenPath(), help="where the repos are stored")
_DAY = 86400


def choose_root(root: Path | None) -> Path:
    """The folder that is served, also where `serve` was told of it; by default below our home."""
    context = click.get_current_context().parent
    while root is None and context is not None:
        root, context = context.params.get("root"), context.parent
    return root or Settings.from_env().home / "hub"


@click.command("gc")
@ROOT
@click.option(
    "--keep",
    default=30.0,
    show_default=True,
    metavar="DAYS",
    type=click.FloatRange(0),
    help="how long files stay that a commit replaced or removed",
)
@click.option("--dry-run", is_flag=True, help="only say what would be removed")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def gc_command(root: Path | None, keep: float, dry_run: bool, as_json: bool) -> None:
    """Remove the files that no branch and no tag reaches, also while the endpoint runs.

    A commit that another one followed more than --keep DAYS ago loses what only it had: tag what is
    to stay. What was sent within the last hour stays. Copies of upstream's repos that nobody asked
    for as long are forgotten.
    """
    from hubaoti.server.gc import collect

    found = collect(choose_root(root), keep * _DAY, dry_run=dry_run)
    if as_json:
        print_json(asdict(found))
        return
    verb = "would be removed" if dry_run else "were removed"
    for name in found.copies:
        print_line(f"not asked for: the copy of {name}")
    print_line(f"{len(found.files)} files {verb} ({format_size(found.bytes)})")


@click.group("token", cls=Group)
def token_command() -> None:
    """Tokens beside the one that serve prints: for who may read, or write, and of whose repos."""


@token_command.command("add")
@click.argument("name")
@ROOT
@click.option(
    "--role",
    type=click.Choice(["read", "write"]),
    default="read",
    show_default=True,
    help="read private repos, or make and change repos too",
)
@click.option("--owner", multiple=True, help="only this one's repos; may be given more than once")
def add_token_command(name: str, root: Path | None, role: str, owner: tuple[str, ...]) -> None:
    """Make a token, and print it this once: only its hash is kept."""
    from hubaoti.server.hub import open_root
    from hubaoti.server.tokens import add_token

    with open_root(choose_root(root)) as database, database.writing() as db:
        token = add_token(db, name, role, owner)
    print_line(token)


@token_command.command("ls")
@ROOT
@click.option("--json", "as_json", is_flag=True, help="print it as JSON")
def ls_token_command(root: Path | None, as_json: bool) -> None:
    """List the tokens by their names: what each may do, and since when."""
    from hubaoti.server.hub import open_root
    from hubaoti.server.tokens import list_tokens

    with open_root(choose_root(root)) as database, database.reading() as db:
        found = list_tokens(db)
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        rows = [(e.name, e.role, ", ".join(e.owners) or "all", e.created) for e in found]
        print_table(["name", "role", "owners", "since"], rows)


@token_command.command("rm")
@click.argument("name")
@ROOT
def rm_token_command(name: str, root: Path | None) -> None:
    """Have a token open nothing any more, at once."""
    from hubaoti.server.hub import open_root
    from hubaoti.server.tokens import remove_token

    with open_root(choose_root(root)) as database, database.writing() as db:
        remove_token(db, name)
    print_line(f"{name} opens nothing any more")


@click.command("backup")
@click.argument("folder", type=GivenPath())
@ROOT
def backup_command(folder: Path, root: Path | None) -> None:
    """Copy all that is served to FOLDER, also while the endpoint runs.

    FOLDER is new, or an older backup, of which the files stay that it has already. It is no folder
    that is or was served, and neither in that one nor above it.
    """
    from hubaoti.server.backup import back_up

    found = back_up(choose_root(root), folder)
    print_line(
        f"{found.files} files ({format_size(found.bytes)}) are in {folder}, {found.new} of them new"
    )


@click.command("restore")
@click.argument("folder", type=GivenPath())
@ROOT
def restore_command(folder: Path, root: Path | None) -> None:
    """Make a folder that can be served of the backup FOLDER; it has to be new, or empty."""
    from hubaoti.server.backup import restore

    root = choose_root(root)
    found = restore(folder, root)
    print_line(f"{found.files} files ({format_size(found.bytes)}) can be served from {root}")
