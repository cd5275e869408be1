"""`hubaoti trust`: whose code may run on this machine, and what may not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hubaoti.api.trusting import NamedArtifact, Owner, find_subject
from hubaoti.cli.groups import Group
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.cli.paths import GivenPath
from hubaoti.errors import BadRequest
from hubaoti.hub.keys import make_key_pair, read_public_key, read_root
from hubaoti.mirror.signer import Signer, digest
from hubaoti.mirror.trust import Publisher, Subject, Trust
from hubaoti.settings import Settings

_FILE = GivenPath()
_WHO = click.argument("who", metavar="OWNER|DIGEST|./BUNDLE")
_WHERE = click.option("--endpoint", metavar="URL", help="of the owner; by default today's")


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
@_WHERE
@click.option("--key", type=_FILE, help="only what the holder of this public key signed")
@click.option("--identity", help="only what who has a certificate of this name signed")
@click.option(
    "--root", type=_FILE, help="what that hangs on: certificates, sigstore's trust config"
)
@click.option("--issuer", help="who logged that identity in, where sigstore gave the certificate")
def add_command(who: str, endpoint: str | None, **options: Any) -> None:
    """Trust an OWNER at an endpoint, or one artifact by the DIGEST of its manifest."""
    given = {name: each for name, each in options.items() if each is not None}
    trust, subject = _find(who, endpoint)
    if isinstance(subject, NamedArtifact):
        if given:
            _refuse_signer(subject)
        trust.add_artifact(subject.digest)
        print_line(f"{subject} is trusted")
    elif not given:
        trust.add(subject.endpoint, subject.name)
        print_line(f"{subject} is trusted{_list_others(trust, subject)}")
    else:
        signer = _keep_signer(trust, **given)
        trust.add(subject.endpoint, subject.name, signer)
        others = _list_others(trust, subject, signer)
        print_line(f"{subject} is trusted for what is signed by {signer}{others}")


def _find(who: str, endpoint: str | None) -> tuple[Trust, Owner | NamedArtifact]:
    """What was said of whom, and who or what is meant."""
    settings = Settings.from_env()
    return Trust(settings.trust), find_subject(who, settings, endpoint)


def _list_others(trust: Trust, owner: Owner, signer: Signer | None = None) -> str:
    """Who else may have signed what an owner is trusted for, as was said before and stays so."""
    asked = trust.read().list_signers(owner.endpoint, owner.name)
    others = " or ".join(each.describe() for each in asked if each != signer)
    if not others or signer is not None:
        return f", or by {others}, who was named before" if others else ""
    first = f"for a name to be enough: hubaoti trust rm {owner.name} first, then add"
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


def _refuse_signer(artifact: NamedArtifact) -> None:
    raise BadRequest(
        f"{artifact} is trusted by its digest, whoever signs it",
        hint="name the owner of the repos that are signed",
    )


@trust_command.command("keygen")
@click.argument("name", type=GivenPath())
def keygen_command(name: Path) -> None:
    """Make an EC key: NAME.pem, with which push --sign signs, and NAME.pub for who is to trust."""
    if name.name in {"", ".."}:
        raise BadRequest(f"{str(name)!r} names no file", hint="say, for example, keygen acme")
    private = name if name.suffix == ".pem" else name.with_name(f"{name.name}.pem")
    public, sha256 = make_key_pair(private)
    print_line(f"{private} signs (keep it secret), {public} is for those who are to trust it")
    print_line(f"  its sha256 is {sha256}")


@trust_command.command("rm")
@_WHO
@_WHERE
def rm_command(who: str, endpoint: str | None) -> None:
    """Forget what was said of somebody: what came from there alone is not opened again."""
    trust, subject = _find(who, endpoint)
    if isinstance(subject, NamedArtifact):
        was = trust.remove_artifact(subject.digest)
    else:
        was = trust.remove(subject.endpoint, subject.name)
    if not was:
        raise BadRequest(f"{subject} is not trusted, and not blocked", hint="see: hubaoti trust ls")
    print_line(f"{subject} is no longer trusted, nor blocked")


@trust_command.command("block")
@_WHO
@_WHERE
def block_command(who: str, endpoint: str | None) -> None:
    """Have nothing of an OWNER, or not this artifact, run here, whoever else is trusted."""
    trust, subject = _find(who, endpoint)
    if isinstance(subject, NamedArtifact):
        trust.block_artifact(subject.digest)
    else:
        trust.block(subject.endpoint, subject.name)
    print_line(f"{subject} is blocked")
