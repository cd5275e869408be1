"""hubaoti.lock: which artifacts a project runs, each by commit and digest.

version = 1

[[repo]]
name = "acme/minilm-compiled"
revision = "v1"                     # as it was asked for; none is the default branch
commit = "3f…"
kernels = ["kernels-community/flash-attn3@8a… sha256:77…"]

[repo.artifacts]
"float32-sdpa/torch2.13-cpu-x86_64_v3-linux" = "sha256:9a…"

It is sorted, so that the same pins are the same bytes. A digest is that of a manifest, which has
those of all files and kernels; the kernels stand in it so that people see when one changes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
import tomllib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from hubaoti.artifact.manifest import Manifest
from hubaoti.disk import explain_disk_errors, read_small
from hubaoti.errors import BadLock, BadRequest, LockMismatch, NotLocked
from hubaoti.host.match import Verdict
from hubaoti.hub.catalog import read_catalog
from hubaoti.hub.choice import describe_refusals, judge_catalog
from hubaoti.hub.client import HubClient
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.signatures import RequiredSigners
from hubaoti.settings import Settings

FILENAME = "hubaoti.lock"
_VERSION = 1
_ELSEWHERE = "name another file with -o"
_LARGEST = 16 << 20  # bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:(?P<digest>[0-9a-f]{64})")
_HEAD = (
    "# Written by `hubaoti lock`. `hubaoti pull --locked` takes what stands here, nothing else.\n"
)


class _Repo(msgspec.Struct, forbid_unknown_fields=True):
    """A repo as the file has it."""

    name: str
    commit: str
    artifacts: dict[str, str]
    revision: str | None = None
    kernels: tuple[str, ...] = ()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The file as it is."""

    version: int
    repo: tuple[_Repo, ...] = ()


@dataclass(frozen=True, slots=True)
class LockedRepo:
    """What a repo held at a commit: the digest of each artifact, and the kernels that they call."""

    ref: RepoRef
    commit: str
    artifacts: dict[ArtifactPath, str]
    kernels: tuple[str, ...] = ()
    path: Path | None = field(default=None, compare=False)  # of the lock that has it

    def require(self, place: ArtifactPath, digest: str) -> None:
        """See that an artifact is the one that is locked.

        Raises:
            NotLocked: none is, at this path. LockMismatch: another one is.
        """
        locked = self.artifacts.get(place)
        if locked is None:
            raise NotLocked(
                f"the lock has no {place} of {self.ref}",
                hint=f"lock it as it is now: {_format_command(self.ref, self.path)}",
            )
        if locked != digest:
            raise LockMismatch(
                f"{place} of {self.ref} at {self.commit} is locked as sha256:{locked}, and is "
                f"sha256:{digest}",
                hint="its history was changed, or something on the way changes it: ask its "
                "publisher before you lock it again",
            )

    def __str__(self) -> str:
        lines = ["[[repo]]", f"name = {json.dumps(self.ref.repo)}"]
        if self.ref.revision is not None:
            lines.append(f"revision = {json.dumps(self.ref.revision)}")
        lines.append(f"commit = {json.dumps(self.commit)}")
        if self.kernels:
            lines += ["kernels = [", *(f"    {json.dumps(each)}," for each in self.kernels), "]"]
        pins = sorted((str(place), digest) for place, digest in self.artifacts.items())
        lines += ["", "[repo.artifacts]"]
        lines += [f'{json.dumps(place)} = "sha256:{digest}"' for place, digest in pins]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Lock:
    """The pins of a project; `str` and `parse` are inverses. `path` is the file it was read of."""

    repos: tuple[LockedRepo, ...]
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str, where: str = FILENAME) -> Lock:
        """Read what `str` writes, and whatever else says the same in TOML.

        Raises:
            BadLock: it is no lock, or one of a newer hubaoti.
        """
        try:
            found = tomllib.loads(text)
            version = found.get("version")
            if isinstance(version, int) and version > _VERSION:
                raise BadLock(f"{where} was written by a newer hubaoti", hint="upgrade hubaoti")
            read = msgspec.convert(found, _File)
            if read.version != _VERSION:
                raise ValueError(f"there is no version {read.version}")
            return cls(_refuse_twice([_read_repo(each) for each in read.repo]))
        except (ValueError, RecursionError, BadRequest) as error:
            hint = "correct it; or remove it, and write it anew: hubaoti lock REPO…"
            raise BadLock(f"{where} is no lockfile: {error}", hint=hint) from error

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lockfile.

        Raises:
            BadLock: there is none, it cannot be read, or is none.
        """
        try:
            content, where = read_small(path, _LARGEST), path.absolute()
            found = cls.parse(content.decode(), str(path))
            return cls(tuple(replace(each, path=where) for each in found.repos), where)
        except (OSError, UnicodeDecodeError) as error:
            hint = "write one: hubaoti lock REPO…; HUBAOTI_LOCK names another"
            raise BadLock(f"{path} cannot be read: {error}", hint=hint) from error

    @classmethod
    def read_before(cls, path: Path, refs: Collection[RepoRef], add: bool) -> Lock:
        """The lockfile that is to be written anew, of these repos; an empty one if there is none.

        With `add` what it has of others stays.

        Raises:
            BadRequest: it has others, which would be lost; or there is no such folder.
            BadLock: what is there is no lockfile.
        """
        if not path.parent.is_dir():
            raise BadRequest(f"there is no folder {path.parent}", hint=_ELSEWHERE)
        if not os.path.lexists(path):
            return cls(())
        try:
            before = cls.read(path)
        except BadLock as error:
            message = f"what is there is not written over: {error}"
            raise BadLock(message, hint=f"remove it, or {_ELSEWHERE}") from error
        named = {each.repo for each in refs}
        if others := [each.ref for each in before.repos if each.ref.repo not in named and not add]:
            raise BadRequest(
                f"{path} locks {', '.join(map(str, others))}, too, which would be locked no more",
                hint="keep what it has: hubaoti lock --add REPO…; or name all of them, or remove "
                "the file",
            )
        return before

    def keep(self, before: Lock) -> Lock:
        """These repos, and all that a lock had beside them."""
        refs = {each.ref for each in self.repos}
        return Lock((*self.repos, *(each for each in before.repos if each.ref not in refs)))

    def write(self, path: Path) -> None:
        """Write the lockfile, whole or not at all."""
        with explain_disk_errors(path.parent, remedy=_ELSEWHERE):
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(str(self))
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).chmod(0o644)  # for whoever builds the project
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)

    def find(self, ref: RepoRef) -> LockedRepo:
        """What is locked of a repo: at the revision as it was asked for, or at this very commit.

        Where no revision is asked for, and one is locked, it is that one.

        Raises:
            NotLocked: nothing is.
        """
        of_repo = [each for each in self.repos if each.ref.repo == ref.repo]
        for each in of_repo:
            if each.ref == ref or each.commit == ref.revision:
                return each
            if ref.digest is not None and ref.digest in each.artifacts.values():
                return each
        if ref.revision is None and len(of_repo) == 1:
            return of_repo[0]
        there = ", ".join(str(each.ref) for each in of_repo)
        wanted = ref if ref.digest is None else RepoRef(ref.repo)  # which has it, or had
        raise NotLocked(
            f"the lock has no {ref}" + (f"; it has {there}" if there else ""),
            hint=f"lock it with the others: {_format_command(wanted, self.path)}",
        )

    def holds(self, digest: str) -> bool:
        """Whether an artifact is locked, of whichever repo."""
        return any(digest in each.artifacts.values() for each in self.repos)

    def require(self, digest: str) -> None:
        """See that an artifact is locked, of whichever repo.

        Raises:
            NotLocked: it is not.
        """
        if not self.holds(digest):
            raise NotLocked(
                f"{self.path or 'the lock'} has no artifact {digest[:12]}",
                hint="lock the repo that it is of (hubaoti lock --add REPO); or ask without "
                "locked, and without HUBAOTI_LOCK",
            )

    def __str__(self) -> str:
        ordered = sorted(self.repos, key=lambda each: str(each.ref))
        return "\n".join((f"{_HEAD}version = {_VERSION}\n", *map(str, ordered)))


def _format_command(ref: RepoRef, path: Path | None) -> str:
    """The command that locks a repo, beside all that the lock at a path has."""
    is_default = path is None or path == Path(FILENAME).absolute()
    return f"hubaoti lock --add {ref}" + ("" if is_default else f" -o {shlex.quote(str(path))}")


def find_lock(locked: bool | str | Path, settings: Settings) -> Lock | None:
    """The lock to go by: the file that is named, else that of the settings, or of this folder.

    Where nothing is asked for, only that of the settings.

    Raises:
        BadLock: it cannot be read, or is none. BadRequest: what is named is no file's name.
    """
    if not isinstance(locked, bool | str | Path):
        raise BadRequest(f"locked={locked!r:.80} names no lockfile", hint="say True, or its path")
    if isinstance(locked, bool):
        path = settings.lock or (Path(FILENAME) if locked else None)
        return None if path is None else Lock.read(path)
    return Lock.read(Path(locked))


def _list_kernels(manifest: Manifest) -> set[str]:
    """The kernels that an artifact calls, as a lock names them."""
    pins = manifest.requires.kernels
    return {f"{pin.repo}@{pin.commit} sha256:{pin.build.digest}" for pin in pins if pin.build}


def lock_repo(
    client: HubClient, ref: RepoRef, commit: str, required: RequiredSigners | None = None
) -> LockedRepo:
    """What a repo holds at a commit; what cannot be read, or is not signed, is left out.

    Raises:
        NoArtifact, BadManifest: it holds nothing that can be locked.
    """
    catalog = read_catalog(client, ref.repo, commit, required=required)
    if not catalog.readable:
        raise describe_refusals(catalog, judge_catalog(catalog, lambda _: Verdict()), None)
    artifacts = {place: manifest.digest for place, manifest in catalog.readable.items()}
    kernels = set().union(*(_list_kernels(each) for each in catalog.readable.values()))
    return LockedRepo(ref, commit, artifacts, tuple(sorted(kernels)))


def _refuse_twice(repos: Sequence[LockedRepo]) -> tuple[LockedRepo, ...]:
    """Repos of which none is locked twice, as a merge of two lockfiles may leave it."""
    counts = Counter(each.ref for each in repos)
    if twice := [str(ref) for ref, count in counts.items() if count > 1]:
        raise ValueError(f"it has {', '.join(twice)} twice")
    return tuple(repos)


def _read_repo(found: _Repo) -> LockedRepo:
    """A repo of the file; ValueError or BadRequest where it is none."""
    if not _COMMIT.fullmatch(found.commit):
        raise ValueError(f"malformed commit {found.commit!r:.80}")
    artifacts = {}
    if not found.artifacts:
        raise ValueError(f"it has no artifact of {found.name!r:.120}")
    for path, pin in found.artifacts.items():
        digest = _DIGEST.fullmatch(pin)
        if digest is None:
            raise ValueError(f"malformed digest {pin!r:.80}")
        artifacts[ArtifactPath.parse(path)] = digest["digest"]
    return LockedRepo(
        RepoRef(found.name, found.revision), found.commit, artifacts, tuple(found.kernels)
    )
