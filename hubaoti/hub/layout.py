"""Where things lie in a Hub repo, and how a repo is named.

owner/name[@revision]                   a repo, at a branch, tag or commit
owner/name@v1, @~=1.2                   at its newest version of those
owner/name@sha256:<digest>              the artifact in it whose manifest this is
<recipe>/<variant>/hubaoti.json         an artifact's manifest; its other files beside it
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.artifact.repo_name import is_repo
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.errors import BadManifest, BadRequest

_REPO_HINT = (
    "write it as owner/name or owner/name@revision: a branch, tag, commit, v1, ~=1.2 or sha256:…"
)
_DIGEST_HINT = (
    "write sha256: and all 64 digits of a digest: hubaoti explain owner/name --json has them, and "
    "hubaoti mirror ls --json those of what is here"
)
_PATH_HINT = "write it as <recipe>/<variant>: float32-sdpa/torch2.13-cpu-x86_64_v3-linux"

_COMMIT = re.compile(r"[0-9a-f]{40}")
# What git forbids in a branch's or tag's name, and what a URL or a shell would trip over.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]{0,199}")
_VERSIONS = re.compile(r"~=v?[0-9]{1,9}(?:\.[0-9]{1,9}){1,4}")
_VERSION_PREFIX = re.compile(r"v?(?P<numbers>[0-9]{1,6}(?:\.[0-9]{1,9})?)")
_DIGEST = re.compile(r"sha256:(?P<digest>[0-9a-f]{64})")
_NOT_IN_REVISION = re.compile(r"\.\.|//|/\.|\./|/$|\.$|\.lock(?:/|$)")


@dataclass(frozen=True, slots=True)
class RepoRef:
    """A repo of the Hub, at a revision; only valid ones exist. No revision is the default branch.

    A revision is a branch, a tag, a commit's id, versions (`~=1.2`; `v1`, where no tag or branch
    has that name), or the digest of one artifact's manifest (`sha256:…`).

    Raises:
        BadRequest: a part is malformed.
    """

    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not is_repo(self.repo):
            raise BadRequest(f"malformed repo: {self.repo!r:.120}", hint=_REPO_HINT)
        if self.revision is not None and not (
            is_revision(self.revision) or self.digest or self.specifier
        ):
            is_digest = str(self.revision).startswith("sha256:")
            hint = _DIGEST_HINT if is_digest else _REPO_HINT
            raise BadRequest(f"malformed revision: {self.revision!r:.120}", hint=hint)

    @classmethod
    def parse(cls, text: str) -> RepoRef:
        """Read what `str` writes, and nothing else.

        Raises:
            BadRequest: the text names no repo.
        """
        repo, at, revision = text.partition("@") if isinstance(text, str) else (text, "", "")
        return cls(repo, revision if at else None)

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def owner(self) -> str:
        """Who publishes what is in it: what stands before the slash."""
        return self.repo.partition("/")[0]

    @property
    def commit(self) -> str | None:
        """The revision, if it is a full commit id, which nothing can move."""
        full = self.revision is not None and _COMMIT.fullmatch(self.revision)
        return self.revision if full else None

    @property
    def digest(self) -> str | None:
        """The digest of the artifact's manifest, if the revision is one."""
        found = _DIGEST.fullmatch(self.revision) if isinstance(self.revision, str) else None
        return found["digest"] if found else None

    @property
    def specifier(self) -> str | None:
        """Which versions are meant, as packaging writes it, if the revision can mean several."""
        if not isinstance(self.revision, str) or looks_like_commit(self.revision):
            return None
        if _VERSIONS.fullmatch(self.revision):
            return self.revision.replace("v", "")
        found = _VERSION_PREFIX.fullmatch(self.revision)
        return f"=={found['numbers']}.*" if found else None


def is_revision(text: str) -> bool:
    """Whether a branch, tag or commit may be called so."""
    is_text = isinstance(text, str) and _REVISION.fullmatch(text) is not None
    return is_text and _NOT_IN_REVISION.search(text) is None


def looks_like_commit(revision: str | None) -> bool:
    """Whether a revision reads as the beginning of a commit's id, which a branch may be called."""
    return revision is not None and re.fullmatch("[0-9a-f]{7,40}", revision) is not None


@dataclass(frozen=True, slots=True)
class ArtifactPath:
    """An artifact's folder in a repo; `str` and `parse` are inverses."""

    recipe: Recipe
    variant: Variant

    @classmethod
    def parse(cls, text: str) -> ArtifactPath:
        """Read what `str` writes, and nothing else.

        Raises:
            BadRequest: the text is no `<recipe>/<variant>`.
        """
        recipe, slash, variant = text.partition("/")
        if not slash:
            raise BadRequest(f"malformed artifact's path: {text!r:.120}", hint=_PATH_HINT)
        return cls(Recipe.parse(recipe), Variant.parse(variant))

    def __str__(self) -> str:
        return f"{self.recipe}/{self.variant}"

    @property
    def manifest(self) -> str:
        """The path of its manifest, from the repo's root."""
        return f"{self}/{FILENAME}"

    def file(self, path: str) -> str:
        """The path, in the repo, of one of the artifact's files."""
        return f"{self}/{path}"


def artifact_path(manifest: Manifest, label: str | None = None) -> ArtifactPath:
    """Where an artifact lies; `label` is the user's own part of the path.

    Raises:
        BadRequest: the label is malformed.
    """
    return ArtifactPath(replace(manifest.recipe, label=label), manifest.variant)


def require_agreement(place: ArtifactPath, manifest: Manifest) -> None:
    """See that a path says what its manifest says; the label is free.

    Raises:
        BadManifest: it does not.
    """
    own = artifact_path(manifest, place.recipe.label)
    if own != place:
        raise BadManifest(
            f"{place.manifest} describes {own}",
            hint="the artifact was moved or made to mislead: ask its publisher",
        )
