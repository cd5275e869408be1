"""Tags that are versions: which a repo has, and which of them v1 or ~=1.2 means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from hubaoti.errors import NoVersion
from hubaoti.escape import escape_line
from hubaoti.hub.layout import RepoRef

_SHOWN = 10  # versions, to who asks for one that there is not


@dataclass(frozen=True, slots=True)
class Release:
    """A tag that is a version, and the commit that it names."""

    version: Version
    tag: str
    commit: str


def list_releases(tags: Mapping[str, str]) -> list[Release]:
    """The tags (with their commits) that are versions, the newest first."""
    found = [
        Release(version, tag, commit)
        for tag, commit in tags.items()
        if (version := read_tag(tag)) is not None
    ]
    return sorted(found, key=lambda each: (each.version, each.tag), reverse=True)


def read_tag(tag: str) -> Version | None:
    """The version that a tag says, as v1.2.0 or 1.2.0; None where it says none."""
    try:
        return Version(tag)
    except InvalidVersion:
        return None


def find_release(ref: RepoRef, tags: Mapping[str, str]) -> Release:
    """The newest version that a revision allows; what is no final one only where nothing else is.

    Raises:
        NoVersion: there is none; the hint has those that there are.
    """
    releases = list_releases(tags)
    allowed = SpecifierSet(ref.specifier or "")
    for version in sorted(allowed.filter(each.version for each in releases), reverse=True):
        return next(each for each in releases if each.version == version)
    shown = ", ".join(escape_line(each.tag, 80) for each in releases[:_SHOWN])
    raise NoVersion(
        f"{ref.repo} has no version {ref.revision}",
        hint=f"its newest versions are {shown}"
        if shown
        else "it has none: name a branch, another tag, or no revision",
    )
