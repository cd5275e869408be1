"""The verbs over what this machine stores: found by the beginning of a digest, or by a repo."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hubaoti.errors import BadRequest, DigestMismatch, NoArtifact
from hubaoti.hub.layout import RepoRef
from hubaoti.mirror import Artifact, Mirror, Row
from hubaoti.mirror.usage import Use, name_holders
from hubaoti.settings import Settings

_DIGEST = re.compile(r"[0-9a-f]{6,64}")


def is_digest(what: str) -> bool:
    """Whether a name reads as the beginning of a digest, from six digits on."""
    return _DIGEST.fullmatch(_read_digits(what)) is not None


def _read_digits(what: str) -> str:
    """The digits of a digest, which people may write in capitals."""
    return what.removeprefix("sha256:").lower()


def find_rows(what: str, mirror: Mirror, settings: Settings) -> list[Row]:
    """The artifacts whose digest begins so, or that were pulled from a repo, at a full commit id
    if one is named.

    Raises:
        NoArtifact: there is none. BadRequest: what is asked for is neither, or begins several.
    """
    if is_digest(what):
        what = _read_digits(what)
        found = [row for row in mirror.ls() if row.digest.startswith(what)]
        if len(found) > 1:
            names = ", ".join(row.digest[: len(what) + 6] for row in found[:5])
            raise BadRequest(
                f"{what} begins {len(found)} digests: {names}", hint="name one of them"
            )
        hint = "see what it has with: hubaoti mirror ls"
    else:
        ref = RepoRef.parse(what)
        if ref.revision != ref.commit:
            raise BadRequest(
                f"{what} names no commit, and the mirror knows no other revisions",
                hint="name the full commit id, as hubaoti mirror ls has it, or none",
            )
        pulled = mirror.index.list_pulls(settings.endpoint, ref.repo, ref.commit)
        found = [row for row in mirror.ls() if row.digest in pulled]
        hint = f"fetch it with: hubaoti pull {what}; no folder has that name here, either"
    if not found:
        raise NoArtifact(f"the mirror has no artifact of {what}", hint=hint)
    return found


def find_artifacts(names: Iterable[str], mirror: Mirror, settings: Settings) -> list[Artifact]:
    """The artifacts that are called so, each once, whole as far as their sizes say.

    Raises:
        NoArtifact, BadRequest: as `find_rows`. DigestMismatch: one has not all of its files.
    """
    rows = {row.digest: row for name in names for row in find_rows(name, mirror, settings)}
    found = [mirror.artifact(digest) for digest in rows]
    if missing := [digest for digest, each in zip(rows, found, strict=True) if each is None]:
        raise DigestMismatch(
            f"artifact {missing[0][:12]} has not all of its files any more",
            hint="get it again as it came: pull, compile or import it",
        )
    return [each for each in found if each is not None]


@dataclass(frozen=True, slots=True)
class Shown:
    """All that is known of an artifact of the mirror; `artifact` is None where it is not whole."""

    row: Row
    artifact: Artifact | None
    origins: tuple[str, ...]
    built_here: bool
    may_run: bool
    why: str
    pinned: bool
    pinned_by: tuple[str, ...]
    open_now: bool
    opens: int
    last_opened: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = asdict(self) | {"row": asdict(self.row)}
        artifact = found.pop("artifact") and self.artifact
        if artifact is None:
            return found | {"path": None}
        manifest = artifact.manifest
        return found | {
            "path": str(artifact.path),
            "graphs": {each.id: str(artifact.graph_folder(each)) for each in manifest.graphs},
            "kernels": [str(pin) for pin in manifest.requires.kernels],
            "model": manifest.source.model,
            "task": manifest.program.task,
            "compile_seconds": manifest.built.seconds,
        }


def show(what: str, mirror: Mirror, settings: Settings) -> list[Shown]:
    """What is known of each artifact that is called so.

    Raises:
        NoArtifact, BadRequest: as `find_rows`.
    """
    use, pins = mirror.usage.read(), mirror.usage.list_pins()
    return [
        _describe(row, mirror, use.get(row.digest, Use()), pins.get(row.digest, []))
        for row in find_rows(what, mirror, settings)
    ]


def _describe(row: Row, mirror: Mirror, use: Use, holders: list[str]) -> Shown:
    decision = mirror.decide(row.digest)
    origins = mirror.index.list_origins(row.digest)
    return Shown(
        row=row,
        artifact=mirror.artifact(row.digest),
        origins=tuple(f"{each.repo}@{each.commit}/{each.path}" for each in origins),
        built_here=mirror.index.is_built(row.digest),
        may_run=decision.allowed,
        why=decision.reason,
        pinned=bool(holders),
        pinned_by=name_holders(holders),
        open_now=mirror.index.is_writable and mirror.leases.is_held(row.digest),
        opens=use.opens,
        last_opened=use.last,
    )
