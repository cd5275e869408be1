"""`hubaoti mirror`: what is stored on this machine."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from hubaoti.cli.output import human_size, print_json, print_table
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings


@click.group("mirror")
def mirror_command() -> None:
    """What is stored on this machine."""


@mirror_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def ls_command(as_json: bool) -> None:
    """List the artifacts, the newest first."""
    with Mirror.open(Settings.from_env().mirror) as mirror:
        rows = mirror.ls()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    cells = [
        (
            row.origin.repo or "built here",
            row.origin.commit or "",
            row.recipe,
            row.variant,
            human_size(row.size),
            datetime.fromtimestamp(row.added, UTC).strftime("%Y-%m-%d %H:%M"),
            row.digest[:12],
        )
        for row in rows
    ]
    print_table(["repo", "commit", "recipe", "variant", "size", "added", "digest"], cells)
