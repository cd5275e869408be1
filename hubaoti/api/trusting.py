"""Who or what is meant where trust is spoken of: an owner of repos, or an artifact by its digest.

What could be read as either is refused: nobody is to be trusted, or not blocked, by mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.repo_name import is_name
from hubaoti.artifact.sizes import format_count
from hubaoti.errors import BadRequest
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import DIGEST, Named, Trust
from hubaoti.mirror.trust_text import LOOKS_LIKE_DIGEST
from hubaoti.settings import Settings, require_url, split_login

_OWNER, _SHA256 = "owner:", "sha256:"
_PRINTED = 12  # digits of a digest, wherever one is printed


@dataclass(frozen=True, slots=True)
class Owner:
    """Who publishes at an endpoint."""

    endpoint: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} at {self.endpoint}"


@dataclass(frozen=True, slots=True)
class NamedArtifact:
    """An artifact by the sha256 of its manifest, whoever publishes it."""

    digest: str

    def __str__(self) -> str:
        return f"artifact {self.digest}"


def find_subject(who: str, settings: Settings, endpoint: str | None) -> Owner | NamedArtifact:
    """Who or what is meant by a name, `owner:` and a name, a digest, or a bundle's path.

    An owner is one of `endpoint`, by default that of the settings. A digest may be cut, where it is
    that of one artifact that is known here, to no less than is printed of it.

    Raises:
        BadRequest: it is none of these, or could be two of them.
    """
    found = _find_artifact(who, settings)
    if found is not None:
        if endpoint is not None:
            hint = "leave --endpoint out"
            raise BadRequest(f"{found} is the same one at every endpoint", hint=hint)
        return found
    name = who.removeprefix(_OWNER)
    if not is_name(name):
        raise BadRequest(
            f"{who!r:.120} is no owner of repos, no digest and no bundle",
            hint="name the first part of a repo's name, an artifact's digest as hubaoti mirror ls "
            "has it, or a bundle's folder as ./NAME",
        )
    if name == who and (Path(who) / FILENAME).is_file():
        raise BadRequest(
            f"{who} could be an owner of repos, and here is a bundle of that name",
            hint=f"say which: {_OWNER}{who}, or ./{who}",
        )
    return Owner(_read_endpoint(endpoint) or settings.endpoint, name)


def _find_artifact(who: str, settings: Settings) -> NamedArtifact | None:
    """The artifact that is meant, if one is: by its digest, or by a path, which no owner has."""
    digits = who.removeprefix(_SHA256).lower()
    if DIGEST.fullmatch(digits):
        return NamedArtifact(digits)
    if LOOKS_LIKE_DIGEST.fullmatch(digits) or who.startswith(_SHA256):
        return NamedArtifact(_find_digest(who, digits, settings))
    if not is_name(who) and (Path(who) / FILENAME).is_file():
        return NamedArtifact(Bundle.read(Path(who)).manifest.digest)
    return None


def _find_digest(who: str, digits: str, settings: Settings) -> str:
    """The one digest of all that are known here that begins so.

    Raises:
        BadRequest: none does, several do, or it is so short that an owner may be called so.
    """
    with Mirror.open(settings.mirror) as mirror:
        known = {row.digest for row in mirror.ls()} | mirror.index.list_all_origins().keys()
    said = Trust(settings.trust).read()
    known |= {each.digest for each in (*said.artifacts, *said.blocked) if isinstance(each, Named)}
    found = sorted(each for each in known if digits and each.startswith(digits))
    if len(found) == 1 and len(digits) >= _PRINTED:
        return found[0]
    owner = f", or the owner as {_OWNER}{who}" if is_name(who) else ""
    begins = (
        f"begins {format_count(len(found), 'digest')} here"
        if found
        else "begins no digest that is known here"
    )
    raise BadRequest(
        f"{who!r:.80} {begins}{', and an owner may be called so' if owner else ''}",
        hint=f"name all 64 digits{''.join(f', as {each}' for each in found[:3])}{owner}",
    )


def _read_endpoint(endpoint: str | None) -> str | None:
    """An endpoint that was named, as it is kept.

    Raises:
        BadRequest: it is no URL.
    """
    if endpoint is None:
        return None
    if endpoint.partition("://")[0].lower() not in {"http", "https"}:
        hint = "write it as https://huggingface.co"
        raise BadRequest(f"{endpoint!r:.120} is no endpoint of http or https", hint=hint)
    require_url(endpoint, "the endpoint")
    return split_login(endpoint.rstrip("/"))[0]
