"""`hubaoti mirror`: what is stored on this machine."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

import click

from hubaoti.cli.output import format_size, print_json, print_line, print_table
from hubaoti.mirror import Mirror, Row
from hubaoti.settings import Settings


@click.group("mirror")
def mirror_command() -> None:
    """What is stored on this machine."""


@mirror_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def ls_command(as_json: bool) -> None:
    """List the artifacts, the newest first, and the graphs that are not opened here."""
    with Mirror.open(Settings.from_env().mirror) as mirror:
        rows, problems = mirror.ls(), mirror.index.problems()
        origins = [_name_origin(mirror, row) for row in rows]
        programs = [_read_program(mirror, row) for row in rows]
    if as_json:
        print_json([asdict(row) | found for row, found in zip(rows, programs, strict=True)])
        return
    cells = [
        (
            found["model"] or "unknown",
            found["task"] or "unknown",
            origin,
            row.origin.commit or "",
            row.recipe,
            row.variant,
            format_size(row.size),
            datetime.fromtimestamp(row.added, UTC).strftime("%Y-%m-%d %H:%M"),
            row.digest[:12],
        )
        for row, found, origin in zip(rows, programs, origins, strict=True)
    ]
    columns = ["model", "task", "repo", "commit", "recipe", "variant", "size", "added", "digest"]
    print_table(columns, cells)
    for graph, problem in problems:
        print_line(f"not opened: graph {graph[:12]}: {problem}")
    if problems:
        print_line("to have them tried again: hubaoti mirror retry")


@mirror_command.command("retry")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def retry_command(as_json: bool) -> None:
    """Forget why graphs are not opened here, and bring back from quarantine what is whole."""
    from hubaoti.mirror.retry import retry

    with Mirror.open(Settings.from_env().mirror) as mirror:
        retried = retry(mirror)
        origins = [_name_origin(mirror, row) for row in retried.artifacts]
    if as_json:
        print_json(asdict(retried))
        return
    print_line(f"{retried.verdicts} verdicts are forgotten")
    for graph in retried.graphs:
        print_line(f"graph {graph[:12]} is back")
    for row, origin in zip(retried.artifacts, origins, strict=True):
        print_line(f"artifact {row.digest[:12]} is back: {origin} {row.recipe}/{row.variant}")


def _name_origin(mirror: Mirror, row: Row) -> str:
    """Where an artifact came from, in words."""
    if row.origin.repo:
        return row.origin.repo
    return "built here" if mirror.index.is_built(row.digest) else "from a folder"


def _read_program(mirror: Mirror, row: Row) -> dict[str, str | None]:
    """What an artifact was compiled from, and for: None where its manifest is not whole."""
    artifact = mirror.read(row.digest)
    if artifact is None:
        return {"model": None, "task": None}
    manifest = artifact.manifest
    return {"model": manifest.source.model, "task": manifest.program.task}
