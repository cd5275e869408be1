"""`hubaoti trust`: whose code may run on this machine, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.repo_name import is_name
from hubaoti.cli.groups import Group
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.errors import BadRequest
from hubaoti.hub.keys import make_key_pair, read_public_key, read_root
from hubaoti.mirror.signer import Signer, digest
from hubaoti.mirror.trust import DIGEST, Publisher, Subject, Trust
from hubaoti.settings import Settings

_T = TypeVar("_T")
_FILE = click.Path(path_type=Path)
_WHO = click.argument("who", metavar="OWNER|DIGEST|BUNDLE")


@click.group("trust", cls=Group)
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
        if not rows:
            hint = "nobody is trusted yet: hubaoti trust add OWNER, or hubaoti pull --trust"
            print_line(hint, err=True)


def _describe(subject: Subject) -> tuple[str, str, object]:
    if isinstance(subject, Publisher):
        signed = f", signed by {subject.signer}" if subject.signer else ""
        return f"{subject.owner}{signed}", subject.endpoint, subject.since
    return subject.digest, "", subject.since


@trust_command.command("add")
@_WHO
@click.option("--key", type=_FILE, help="only what the holder of this public key signed")
@click.option("--identity", help="only what who has a certificate of this name signed")
@click.option(
    "--root", type=_FILE, help="what that hangs on: certificates, sigstore's trust config"
)
@click.option("--issuer", help="who logged that identity in, where sigstore gave the certificate")
def add_command(who: str, **options: Any) -> None:
    """Trust an OWNER at this endpoint, or one artifact by the DIGEST of its manifest."""
    given = {name: each for name, each in options.items() if each is not None}
    if not given:
        _say(who, Trust.add, Trust.add_artifact)
        print_line(f"{_name(who)} is trusted{_list_others(who)}")
        return
    signer = _keep_signer(Trust(Settings.from_env().trust), **given)
    _say(who, partial(Trust.add, signer=signer), _refuse_signer)
    print_line(f"{_name(who)} is trusted for what is signed by {signer}{_list_others(who, signer)}")


def _list_others(owner: str, signer: Signer | None = None) -> str:
    """Who else may have signed what an owner is trusted for, as was said before and stays so."""
    settings = Settings.from_env()
    asked = Trust(settings.trust).read().list_signers(settings.endpoint, owner)
    others = " or ".join(each.describe() for each in asked if each != signer)
    if not others or signer is not None:
        return f", or by {others}, who was named before" if others else ""
    first = f"for a name to be enough: hubaoti trust rm {owner} first, then add"
    return f", still only for what is signed by {others}; {first}"


def _keep_signer(
    trust: Trust, key: Path | None = None, root: Path | None = None, **identity: str
) -> Signer:
    """Who has to sign, whose key or root is kept beside what is said of him."""
    files = {"key": read_public_key(key)} if key else {}
    files |= {"root": read_root(root)} if root else {}
    digests = {name: digest(content) for name, content in files.items()}
    try:
        signer = Signer(**identity, **digests)
    except ValueError as error:
        hint = "give --key, or --identity with --root, with --issuer, or with both"
        raise BadRequest(f"nobody can be asked to sign so: {error}", hint=hint) from error
    for content in files.values():
        trust.keys.keep(content)
    return signer


def _refuse_signer(trust: Trust, artifact: str) -> None:
    raise BadRequest(
        f"artifact {artifact} is trusted by its digest, whoever signs it",
        hint="name the owner of the repos that are signed",
    )


@trust_command.command("keygen")
@click.argument("name", type=click.Path(path_type=Path))
def keygen_command(name: Path) -> None:
    """Make an EC key: NAME.pem, with which push --sign signs, and NAME.pub for who is to trust."""
    private = name if name.suffix == ".pem" else name.with_name(f"{name.name}.pem")
    public, sha256 = make_key_pair(private)
    print_line(f"{private} signs (keep it secret), {public} is for those who are to trust it")
    print_line(f"  its sha256 is {sha256}")


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
