"""Whose code may run on this machine, and what may not: `$HUBAOTI_HOME/trust.toml`.

[[publisher]]
endpoint = "https://huggingface.co"
owner = "acme"
since = 2026-01-31
key = "5e…"                         # has to sign; or identity and issuer, or root: see signer.py

[[artifact]]                        # whoever brings it: by the sha256 of its manifest
digest = "3f…"
since = 2026-02-01

[[block]]                           # beats all of the above; or the endpoint and owner of somebody
digest = "9a…"
since = 2026-02-02

[limits]                            # what manifests of others may claim: see limits.py
tolerance = 0.15

People may write into it, too: what they wrote beside these tables stays.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from hubaoti.disk import explain_disk_errors, read_small
from hubaoti.errors import Blocked, HubaotiError, UnsafeFolder, Unsigned, Untrusted
from hubaoti.mirror.folders import make_private, refuse_shared
from hubaoti.mirror.limits import Limits
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.signer import Keys, Signer
from hubaoti.mirror.trust_text import append_entry, drop_entries, find_entries, format_command
from hubaoti.settings import split_login

DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 16 << 20  # bytes; an entry takes a hundred


@dataclass(frozen=True, slots=True)
class Publisher:
    """An owner of repos at an endpoint, since a date; with a `signer` a name is not enough."""

    endpoint: str
    owner: str
    since: date
    signer: Signer | None = None

    def __post_init__(self) -> None:
        # People, and an older hubaoti, spell an endpoint in several ways, its password included.
        object.__setattr__(self, "endpoint", split_login(self.endpoint)[0])

    def __str__(self) -> str:
        return f"{self.owner} at {self.endpoint}"


@dataclass(frozen=True, slots=True)
class Named:
    """An artifact by the sha256 of its manifest, since a date."""

    digest: str
    since: date

    def __post_init__(self) -> None:
        if not DIGEST.fullmatch(self.digest):
            raise ValueError(f"malformed digest {self.digest!r:.80}")

    def __str__(self) -> str:
        return f"artifact {self.digest}"


Subject = Publisher | Named


@dataclass(frozen=True, slots=True)
class TrustList:
    """All that the file says, each in the order of their being added."""

    publishers: tuple[Publisher, ...] = ()
    artifacts: tuple[Named, ...] = ()
    blocked: tuple[Subject, ...] = ()
    limits: Limits = Limits()

    def trusts(self, endpoint: str, owner: str, signed: Iterable[Signed] = ()) -> bool:
        """Whether code of this publisher may run here, whose signatures were seen to be good."""
        wanted = {str(each) for each in self.list_signers(endpoint, owner)}
        found = {each.signer for each in signed if each.publisher == (endpoint, owner)}
        is_signed = not wanted or wanted & found
        return self.lists(endpoint, owner) and bool(is_signed) and not self.blocks(endpoint, owner)

    def lists(self, endpoint: str, owner: str) -> bool:
        """Whether a publisher is named, which is enough where no signer is."""
        return any((each.endpoint, each.owner) == (endpoint, owner) for each in self.publishers)

    def list_signers(self, endpoint: str, owner: str) -> tuple[Signer, ...]:
        """Of whom one has to sign what a publisher publishes; nobody where a name is enough."""
        entries = (e for e in self.publishers if (e.endpoint, e.owner) == (endpoint, owner))
        return tuple(each.signer for each in entries if each.signer is not None)

    def blocks(self, endpoint: str, owner: str) -> bool:
        """Whether no code of this publisher may run here, whoever else is trusted.

        In whichever letters he was named: the Hub makes no difference between them. Trust does, so
        that who is not called so is refused.
        """
        who = (endpoint, owner.casefold())
        publishers = (each for each in self.blocked if isinstance(each, Publisher))
        return any((each.endpoint, each.owner.casefold()) == who for each in publishers)

    def names(self, digest: str) -> bool:
        """Whether an artifact may run here, whoever published it."""
        return any(each.digest == digest for each in self.artifacts)

    def blocks_artifact(self, digest: str) -> bool:
        """Whether an artifact may not run here, whoever published it."""
        artifacts = (each for each in self.blocked if isinstance(each, Named))
        return any(each.digest == digest for each in artifacts)


@dataclass(frozen=True, slots=True)
class Trust:
    """The file at `path`, read anew at each question: another process may have changed it."""

    path: Path

    def read(self) -> TrustList:
        """What the file says; nothing where there is none.

        Raises:
            UnsafeFolder: others may write the file, so it says nothing.
            HubaotiError: it cannot be read.
        """
        try:
            refuse_shared(self.path.parent)
            refuse_shared(self.path)
            return _parse(self._read_text())
        except FileNotFoundError:
            return TrustList()
        except UnsafeFolder:
            raise
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            hint = "correct it; without it nobody is trusted, but nobody is blocked either, and a "
            hint += "name is enough where somebody had to sign"
            raise HubaotiError(f"{self.path} cannot be read: {error}", hint=hint) from error

    def _read_text(self) -> str:
        """The file's text, whose lines end as ours do."""
        return read_small(self.path, _LARGEST).decode("utf-8").replace("\r\n", "\n")

    def publishers(self) -> tuple[Publisher, ...]:
        """Everyone who is trusted."""
        return self.read().publishers

    @property
    def keys(self) -> Keys:
        """The public keys and roots that the file names, beside it."""
        return Keys(self.path.with_name("keys"))

    def holds(self, endpoint: str, owner: str) -> bool:
        """Whether code of this publisher may run here."""
        return self.read().trusts(endpoint, owner)

    def require(
        self, endpoint: str, owner: str, what: str, advice: str, signed: Iterable[Signed] = ()
    ) -> None:
        """See that code of this publisher, `what` is named, may run here.

        `signed` are the signatures of it that were verified.

        Raises:
            Blocked: somebody said that it may not. Untrusted: nobody ever said so.
            Unsigned: a name is not enough, and nobody signed it who has to.
        """
        said = self.read()
        if said.blocks(endpoint, owner):
            who = {"endpoint": endpoint, "owner": owner}
            raise refuse_blocked(f"{owner} publishes {what}, and {owner}", who)
        if said.lists(endpoint, owner) and not said.trusts(endpoint, owner, signed):
            signers = said.list_signers(endpoint, owner)
            raise refuse_unsigned(f"{what}, which {owner} publishes,", owner, signers)
        if not said.trusts(endpoint, owner, signed):
            raise Untrusted(
                f"{owner} publishes {what}. Opening it runs their native code on this machine, and "
                f"{owner} is not trusted here",
                hint=f"if you trust {owner}, {advice}",
            )

    def add(self, endpoint: str, owner: str, signer: Signer | None = None) -> None:
        """Trust a publisher from now on; one that is trusted keeps the date.

        With a signer only what that one signed, or another one who was named before. Without, one
        that was named stays required: that is taken back with `remove`.

        Raises:
            Blocked: somebody said that his code may not run here.
        """
        who, name = {"endpoint": endpoint, "owner": owner}, f"{owner} at {endpoint}"
        if signer is None:
            self._add("publisher", who, name)
            return
        with self._editing() as document:
            _refuse_where_blocked(document, who, name)
            for at in find_entries(document, "publisher", who, exactly=True):
                entry = document["publisher"][at]
                if Signer.take_from(dict(entry)) in {None, signer}:
                    entry.update(signer.to_entry())  # a name is not enough any more
                    break
            else:
                append_entry(document, "publisher", who | signer.to_entry())

    def add_artifact(self, digest: str) -> None:
        """Trust an artifact from now on, whoever published it.

        Raises:
            Blocked: somebody said that it may not run here.
        """
        self._add("artifact", {"digest": digest}, f"artifact {digest[:12]}")

    def block(self, endpoint: str, owner: str) -> None:
        """Have no code of a publisher run here from now on, whoever else is trusted."""
        self._block("publisher", {"endpoint": endpoint, "owner": owner})

    def block_artifact(self, digest: str) -> None:
        """Have an artifact not run here from now on, whoever published or built it."""
        self._block("artifact", {"digest": digest})

    def remove(self, endpoint: str, owner: str) -> bool:
        """Forget what was said of a publisher; whether there was anything."""
        return self._remove("publisher", {"endpoint": endpoint, "owner": owner})

    def remove_artifact(self, digest: str) -> bool:
        """Forget what was said of an artifact; whether there was anything."""
        return self._remove("artifact", {"digest": digest})

    def _add(self, table: str, who: Mapping[str, str], name: str) -> None:
        if self._has(table, who, exactly=True) and not self._has("block", who):
            return
        with self._editing() as document:
            _refuse_where_blocked(document, who, name)
            if not find_entries(document, table, who, exactly=True):
                append_entry(document, table, who)

    def _block(self, table: str, who: Mapping[str, str]) -> None:
        with self._editing(who, table) as document:
            if not find_entries(document, "block", who):
                append_entry(document, "block", who)

    def _remove(self, table: str, who: Mapping[str, str]) -> bool:
        if not (self._has(table, who) or self._has("block", who)):
            return False
        with self._editing(who, table, "block"):
            return True

    def _has(self, table: str, who: Mapping[str, str], exactly: bool = False) -> bool:
        """Whether a table has an entry of somebody, without changing anything."""
        self.read()  # what cannot be believed, nobody goes by
        with explain_disk_errors(self.path), suppress(FileNotFoundError):
            document = tomllib.loads(self._read_text())
            return bool(find_entries(document, table, who, exactly))
        return False

    @contextmanager
    def _editing(self, who: Mapping[str, str] | None = None, *tables: str) -> Iterator[Any]:
        """The file's document, to be changed, while no other process changes it.

        What some tables have of somebody is not in it any more.
        """
        import tomlkit

        with self._alone():
            self.read()
            text = self._read_text() if self.path.exists() else ""
            for table in tables:
                text = drop_entries(text, table, who or {})
            document = tomlkit.parse(text)
            yield document
            self._write(tomlkit.dumps(document))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process changes the file, so that no change of it is lost."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        with explain_disk_errors(self.path.parent):
            make_private(self.path.parent)
            refuse_shared(lock)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with explain_disk_errors(lock):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, text: str) -> None:
        with explain_disk_errors(self.path.parent):
            handle, name = tempfile.mkstemp(prefix=".trust.", dir=self.path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)


def refuse_blocked(what: str, who: Mapping[str, str]) -> Blocked:
    """Why what is blocked is not opened, and how that is taken back of whom, or of which digest."""
    back = format_command("rm", who)
    return Blocked(
        f"{what} is blocked on this machine",
        hint=f"see: hubaoti trust ls; who blocked it takes that back with: {back}",
    )


def refuse_unsigned(what: str, owner: str, wanted: Collection[Signer], hint: str = "") -> Unsigned:
    """Why a trusted name is not enough, and what would be; `what` is "" beside its name.

    Without another hint it is of what is here, and may have a signature that nobody looked at.
    """
    names = " or ".join(each.describe() for each in wanted)
    subject = f"{what} is refused: " if what else ""
    again = "pull it again, so that its signature is looked at; where it has none, "
    return Unsigned(
        f"{subject}not signed by {names}, as is asked of {owner} here",
        hint=hint or again + ask_to_sign(owner),
    )


def ask_to_sign(owner: str) -> str:
    """What to do about what has no signature."""
    return f"ask {owner} to push it with --sign"


def _refuse_where_blocked(document: Mapping[str, Any], who: Mapping[str, str], name: str) -> None:
    if find_entries(document, "block", who):
        raise refuse_blocked(name, who)


_T = TypeVar("_T")


def _parse(text: str) -> TrustList:
    """Read the file's text; ValueError, TypeError or AttributeError where it is not one of ours."""
    found = tomllib.loads(text)
    if unknown := found.keys() - {"publisher", "artifact", "block", "limits"}:
        raise ValueError(f"unknown tables {', '.join(sorted(unknown)):.80}")

    def read(table: str, make: Callable[[Mapping[str, Any]], _T]) -> tuple[_T, ...]:
        entries = found.get(table, ())
        if isinstance(entries, dict):
            raise ValueError(f"it has one [{table}], and is to have a list: write [[{table}]]")
        return tuple(make(each) for each in entries)

    return TrustList(
        publishers=read("publisher", _make_publisher),
        artifacts=read("artifact", _make_named),
        blocked=read("block", lambda e: _make_named(e) if "digest" in e else _make_publisher(e)),
        limits=Limits(**found.get("limits", {})),
    )


def _make_publisher(entry: Mapping[str, Any]) -> Publisher:
    fields = dict(entry)
    signer = Signer.take_from(fields)
    found = Publisher(**fields, signer=signer)
    strings = isinstance(found.endpoint, str) and isinstance(found.owner, str)
    if not strings or not isinstance(found.since, date):
        raise ValueError(f"malformed publisher {found.owner!r:.80}")
    return found


def _make_named(entry: Mapping[str, Any]) -> Named:
    found = Named(**entry)
    if not isinstance(found.since, date):
        raise ValueError(f"malformed artifact {found.digest!r:.80}")
    return found
