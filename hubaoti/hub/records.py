"""What the Hub says of commits, files and refs, as plain records of checked types."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec

Text = Annotated[str, msgspec.Meta(min_length=1)]
CommitId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")]
Refs = list[tuple[Text, CommitId]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: its git blob id, or the sha256 of what git only points to."""

    path: Text
    size: Annotated[int, msgspec.Meta(ge=0)]
    blob: Text
    sha256: str | None

    def is_of(self, content: bytes) -> bool:
        """Whether these are the file's bytes: by its sha256, else by git's blob id."""
        if self.sha256 is not None:
            return hashlib.sha256(content).hexdigest() == self.sha256
        head = b"blob %d\0" % len(content)
        return hashlib.sha1(head + content, usedforsecurity=False).hexdigest() == self.blob


@dataclass(frozen=True, slots=True)
class Pushed:
    """A commit that was made, and where people see it."""

    commit: CommitId
    url: Text


@dataclass(frozen=True, slots=True)
class Created:
    """A repo that is there; its `first` commit where it was made just now, by us."""

    private: bool
    first: CommitId | None


# msgspec learns a type when it is first used, and two threads that meet there end the process.
for _kind in (Text, CommitId, Refs, tuple[Entry, ...], Pushed, bool | None):
    msgspec.json.Decoder(_kind)
