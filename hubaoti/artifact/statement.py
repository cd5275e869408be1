"""What is signed of an artifact beside its manifest: that it belongs at one path of one repo.

A signature covers two files, the manifest and this statement; the manifest's digests cover the
rest, the kernels that graphs call among it. So what was signed for one place is nothing elsewhere.
"""

from __future__ import annotations

import msgspec

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Record, Sha256
from hubaoti.escape import escape_line

FILENAME = "statement.json"
SIGNATURE = "hubaoti.json.sigstore"  # of both files; beside them, too
LARGEST_STATEMENT = 16 << 10  # bytes
LARGEST_SIGNATURE = 64 << 10  # an entry of a transparency log and a chain of certificates have 12


class Statement(Record, frozen=True, kw_only=True):
    """An artifact at a path of a repo; `program` and `manifest` are digests of what they name.

    `recipe` and `variant` are the manifest's own, without the user's label in the path.
    """

    schema: int = 1
    repo: str
    path: str
    key: Sha256
    program: Sha256
    recipe: str
    variant: str
    manifest: Sha256

    @classmethod
    def of(cls, repo: str, path: str, manifest: Manifest) -> Statement:
        """What has to be said of an artifact that lies there."""
        return cls(
            repo=repo,
            path=path,
            key=manifest.key,
            program=manifest.program.digest,
            recipe=str(manifest.recipe),
            variant=str(manifest.variant),
            manifest=manifest.digest,
        )

    def to_json(self) -> bytes:
        """The canonical form: there is one statement of an artifact at a place, byte for byte."""
        return encode_canonical(msgspec.to_builtins(self))

    def describe_other(self, text: bytes) -> str | None:
        """How what was signed differs from this, in words; None where it is this."""
        if text == self.to_json():
            return None
        try:
            found = msgspec.json.decode(text, type=Statement)
        except (msgspec.MsgspecError, UnicodeError) as error:
            return f"it is no statement of this hubaoti's: {escape_line(str(error))}"
        pairs = (
            (name, getattr(found, name), getattr(self, name)) for name in self.__struct_fields__
        )
        others = [
            f"its {name} is {theirs!r:.80}, not {ours!r:.80}"
            for name, theirs, ours in pairs
            if theirs != ours
        ]
        return "; ".join(others) or "it is not in canonical form"


# msgspec learns a type when it is first used, and two threads that meet there end the process.
msgspec.json.Decoder(Statement)
