"""`hubaoti trust`: whose code may run on this machine, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.repo_name import is_name
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.errors import BadRequest
from hubaoti.mirror.trust import DIGEST, Publisher, Subject, Trust
from hubaoti.settings import Settings

_T = TypeVar("_T")
_WHO = click.argument("who", metavar="OWNER|DIGEST|BUNDLE")


@click.group("trust")
def trust_command() -> None:
    """Whose code may run on this machine, and what may not."""


@trust_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print it as JSON")
def ls_command(as_json: bool) -> None:
    """List who and what is trusted and blocked, since when."""
    said = Trust(Settings.from_env().trust).read()
    trusted: tuple[Subject, ...] = (*said.publishers, *said.artifacts)
    found = [("trusted", each) for each in trusted] + [("blocked", each) for each in said.blocked]
    if as_json:
        print_json([{"is": how, **asdict(each)} for how, each in found])
    else:
        rows = [(how, *_describe(each)) for how, each in found]
        print_table(["is", "who", "endpoint", "since"], rows)


def _describe(subject: Subject) -> tuple[str, str, object]:
    if isinstance(subject, Publisher):
        return subject.owner, subject.endpoint, subject.since
    return subject.digest, "", subject.since


@trust_command.command("add")
@_WHO
def add_command(who: str) -> None:
    """Trust an OWNER at this endpoint, or one artifact by the DIGEST of its manifest."""
    _say(who, Trust.add, Trust.add_artifact)
    print_line(f"{_name(who)} is trusted")


@trust_command.command("rm")
@_WHO
def rm_command(who: str) -> None:
    """Forget what was said of somebody: what came from there alone is not opened again."""
    if not _say(who, Trust.remove, Trust.remove_artifact):
        raise BadRequest(
            f"{_name(who)} is not trusted, and not blocked", hint="see: hubaoti trust ls"
        )
    print_line(f"{_name(who)} is no longer trusted, nor blocked")


@trust_command.command("block")
@_WHO
def block_command(who: str) -> None:
    """Have nothing of an OWNER, or not this artifact, run here, whoever else is trusted."""
    _say(who, Trust.block, Trust.block_artifact)
    print_line(f"{_name(who)} is blocked")


def _say(
    who: str,
    of_publisher: Callable[[Trust, str, str], _T],
    of_artifact: Callable[[Trust, str], _T],
) -> _T:
    """Say something of a publisher, or of an artifact."""
    settings, digest = Settings.from_env(), _read_digest(who)
    trust = Trust(settings.trust)
    if digest is not None:
        return of_artifact(trust, digest)
    if not is_name(who):
        raise BadRequest(
            f"{who!r:.120} is no owner of repos, no digest and no bundle",
            hint="name the first part of a repo's name, the 64 digits of an artifact's digest, as "
            "hubaoti mirror ls --json has them, or a bundle's folder",
        )
    return of_publisher(trust, settings.endpoint, who)


def _read_digest(who: str) -> str | None:
    """The digest that is meant, if one is; a folder is one only with a manifest in it."""
    if (Path(who) / FILENAME).is_file():
        return Bundle.read(Path(who)).manifest.digest
    digest = who.removeprefix("sha256:")
    return digest if DIGEST.fullmatch(digest) else None


def _name(who: str) -> str:
    """Who was meant, in words."""
    digest = _read_digest(who)
    return f"{who} at {Settings.from_env().endpoint}" if digest is None else f"artifact {digest}"
