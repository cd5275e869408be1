"""A compile in a process of its own, beside an engine that answers meanwhile.

What it builds is stored in the mirror, by its key, and pushed where that was asked for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.children import program
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, again, ended

KINDER = 10  # who waits for an answer comes first (nice(2))
STOPPED = 143
MOST = 1 << 20  # bytes of what it says that are read, the last ones
PATIENCE = 10.0  # seconds for a compile to take its temporary files along


class Work(msgspec.Struct, frozen=True):
    """What is to be built: a model, what is asked of `hubaoti.compile`, and where it is pushed."""

    model: str
    asked: dict[str, Any]
    push: str | None
    env: dict[str, str]


class Outcome(msgspec.Struct, frozen=True):
    """The digest of what was built, or the error; and the error of a push."""

    digest: str | None = None
    kind: str = ""
    message: str = ""
    hint: str = ""
    push: str | None = None


class Building:
    """A compile that has been started."""

    def __init__(self, work: Work) -> None:
        """Start it.

        Raises:
            BadRequest: what is asked cannot be said to another process, as a module's calls.
        """
        try:
            said = msgspec.json.encode(work)
        except (TypeError, ValueError) as why:
            raise BadRequest(
                f"an engine cannot compile with what was asked: {why}",
                hint="give dims, buckets, dtype, level, quantize, mode, inductor; else compile it "
                "with hubaoti.compile",
            ) from why
        self._answer = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._child = subprocess.Popen(
            program("hubaoti.engines.building"),
            stdin=subprocess.PIPE,
            stdout=self._answer,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._child.pid, KINDER)
        assert self._child.stdin is not None
        with suppress(BrokenPipeError), self._child.stdin as pipe:
            pipe.write(said)

    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._child.poll() is not None

    def outcome(self) -> Outcome:
        """Wait for it, and say what came of it.

        Raises:
            CompileFailed: its process ended without saying why, in words of ours; and whatever the
                compile raised.
        """
        code = self._child.wait()
        with self._answer as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST))
            lines = file.read(MOST).splitlines()
        outcome = Outcome()
        with suppress(msgspec.DecodeError):
            outcome = msgspec.json.decode(lines[-1] if lines else b"", type=Outcome)
        if outcome.digest is None and not outcome.kind:
            raise CompileFailed(
                f"the compile ended: {ended(code)}",
                hint="see that there is memory for it, or run hubaoti compile by hand",
            )
        if outcome.digest is None:
            raise again(outcome.kind, outcome.message, outcome.hint)
        return outcome

    def stop(self) -> None:
        """End it; nothing half-built is left."""
        self._child.terminate()
        try:
            self._child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # it leads those that it started
            self._child.wait()
        self._answer.close()


def main() -> None:
    """The child: its work on standard input, what came of it on standard output."""
    # Being stopped lets every step take its temporary files along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = msgspec.json.decode(sys.stdin.buffer.read(), type=Work)
    out.write(msgspec.json.encode(built(work)) + b"\n")
    out.flush()


def built(work: Work) -> Outcome:
    """Compile, store and push."""
    from hubaoti import api
    from hubaoti.settings import Settings

    settings = Settings.from_env(work.env)
    try:
        with tempfile.TemporaryDirectory(prefix="hubaoti-bundle-") as folder:
            bundle = api.compile(
                work.model, Path(folder) / "bundle", settings=settings, **work.asked
            )
            return Outcome(bundle.manifest.digest, push=pushed(bundle, work.push, settings))
    except HubaotiError as why:
        return Outcome(None, type(why).__name__, str(why), why.hint)


def pushed(bundle: Any, repo: str | None, settings: Any) -> str | None:
    """Publish a bundle where that was asked for; why it could not be, else None."""
    from hubaoti import api

    if repo is None:
        return None
    try:
        api.push(bundle, repo, settings=settings)
    except HubaotiError as why:
        return f"{why}"
    return None
