"""The publishers whose native code may run on this machine: `$HUBAOTI_HOME/trust.toml`.

[[publisher]]
endpoint = "https://huggingface.co"
owner = "acme"
since = 2026-01-31
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path

import tomli_w

from hubaoti.disk import explain_disk_errors
from hubaoti.errors import HubaotiError, UnsafeFolder, Untrusted
from hubaoti.mirror.folders import make_private, refuse_shared
from hubaoti.settings import split_login


@dataclass(frozen=True, slots=True)
class Publisher:
    """An owner of repos at an endpoint, trusted since a date."""

    endpoint: str
    owner: str
    since: date


@dataclass(frozen=True, slots=True)
class Trust:
    """The file at `path`, read anew at each question: another process may have changed it."""

    path: Path

    def publishers(self) -> tuple[Publisher, ...]:
        """Everyone who is trusted, in the order of their being added.

        Raises:
            UnsafeFolder: others may write the file, so it says nothing.
            HubaotiError: it cannot be read.
        """
        try:
            refuse_shared(self.path.parent)
            refuse_shared(self.path)
            return _parse_publishers(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return ()
        except UnsafeFolder:
            raise
        except (OSError, ValueError, TypeError, AttributeError) as error:
            hint = "correct it or remove it; each publisher is asked about again"
            raise HubaotiError(f"{self.path} cannot be read: {error}", hint=hint) from error

    def holds(self, endpoint: str, owner: str) -> bool:
        """Whether code of this publisher may run here."""
        return any((each.endpoint, each.owner) == (endpoint, owner) for each in self.publishers())

    def require(self, endpoint: str, owner: str, what: str, advice: str) -> None:
        """See that code of this publisher, `what` is named, may run here.

        Raises:
            Untrusted: nobody ever said so.
        """
        if not self.holds(endpoint, owner):
            raise Untrusted(
                f"{owner} publishes {what}. Opening it runs their native code on this machine, and "
                f"{owner} is not trusted here",
                hint=f"if you trust {owner}, {advice}",
            )

    def add(self, endpoint: str, owner: str) -> None:
        """Trust a publisher from now on; one that is trusted keeps the date."""
        if self.holds(endpoint, owner):
            return
        with self._alone():
            if not self.holds(endpoint, owner):
                today = datetime.now(UTC).date()
                self._write((*self.publishers(), Publisher(endpoint, owner, today)))

    def remove(self, endpoint: str, owner: str) -> bool:
        """Trust a publisher no longer; whether there was anything to take back."""
        if not self.holds(endpoint, owner):
            return False
        gone = (endpoint, owner)
        with self._alone():
            before = self.publishers()
            self._write(tuple(each for each in before if (each.endpoint, each.owner) != gone))
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process changes the file, so that no change of it is lost."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        with explain_disk_errors(self.path.parent):
            make_private(self.path.parent)
            refuse_shared(lock)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, publishers: tuple[Publisher, ...]) -> None:
        text = tomli_w.dumps({"publisher": [asdict(each) for each in publishers]})
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


def _parse_publishers(text: str) -> tuple[Publisher, ...]:
    """Read the file's text; ValueError, TypeError or AttributeError where it is not one of ours."""
    found = tuple(Publisher(**entry) for entry in tomllib.loads(text).get("publisher", ()))
    for each in found:
        strings = isinstance(each.endpoint, str) and isinstance(each.owner, str)
        if not strings or not isinstance(each.since, date):
            raise ValueError(f"malformed publisher {each.owner!r:.80}")
    # An older hubaoti kept the password of an endpoint that has one in its URL.
    return tuple(replace(each, endpoint=split_login(each.endpoint)[0]) for each in found)
