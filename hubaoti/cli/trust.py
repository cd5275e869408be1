"""`hubaoti trust`: the publishers whose code may run on this machine."""

from __future__ import annotations

from dataclasses import asdict

import click

from hubaoti.artifact.repo_name import is_name
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.errors import BadRequest
from hubaoti.hub.trust import Trust
from hubaoti.settings import Settings


@click.group("trust")
def trust_command() -> None:
    """The publishers whose code may run on this machine."""


@trust_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print the publishers as JSON")
def ls_command(as_json: bool) -> None:
    """List who is trusted, at which endpoint, since when."""
    publishers = Trust(Settings.from_env().trust).publishers()
    if as_json:
        print_json([asdict(publisher) for publisher in publishers])
    else:
        rows = [(each.owner, each.endpoint, each.since) for each in publishers]
        print_table(["publisher", "endpoint", "since"], rows)


@trust_command.command("add")
@click.argument("owner")
def add_command(owner: str) -> None:
    """Trust OWNER at this endpoint: what it publishes may run on this machine."""
    settings = Settings.from_env()
    if not is_name(owner):
        raise BadRequest(
            f"{owner!r:.120} is no owner of repos", hint="name the first part of a repo's name"
        )
    Trust(settings.trust).add(settings.endpoint, owner)
    print_line(f"{owner} at {settings.endpoint} is trusted")


@trust_command.command("rm")
@click.argument("owner")
def rm_command(owner: str) -> None:
    """Trust OWNER at this endpoint no longer; what it published is not opened again."""
    settings = Settings.from_env()
    if not Trust(settings.trust).remove(settings.endpoint, owner):
        raise BadRequest(
            f"{owner} at {settings.endpoint} is not trusted", hint="see: hubaoti trust ls"
        )
    print_line(f"{owner} at {settings.endpoint} is no longer trusted")
