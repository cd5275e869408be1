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

from hubaoti.errors import BadRequest, CompileFailed, HubaotiError, describe_exit, rebuild_error
from hubaoti.host.processes import build_command

_KINDER = 10  # who waits for an answer comes first (nice(2))
_STOPPED = 143
_MOST = 1 << 20  # bytes of what it says that are read, the last ones
_PATIENCE = 10.0  # seconds for a compile to take its temporary files along


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
    """A compile in a process of its own, started with the object; `stop` ends it."""

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
            build_command("hubaoti.engines.background_compile"),
            stdin=subprocess.PIPE,
            stdout=self._answer,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._child.pid, _KINDER)
        assert self._child.stdin is not None
        with suppress(BrokenPipeError), self._child.stdin as pipe:
            pipe.write(said)

    def is_done(self) -> bool:
        """Whether its process has ended, well or not."""
        return self._child.poll() is not None

    def outcome(self) -> Outcome:
        """Wait for it, and say what came of it.

        Raises:
            CompileFailed: its process ended without saying why, in words of ours; and whatever the
                compile raised.
        """
        code = self._child.wait()
        with self._answer as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST))
            lines = file.read(_MOST).splitlines()
        outcome = Outcome()
        with suppress(msgspec.DecodeError):
            outcome = msgspec.json.decode(lines[-1] if lines else b"", type=Outcome)
        if outcome.digest is None and not outcome.kind:
            raise CompileFailed(
                f"the compile ended: {describe_exit(code)}",
                hint="see that there is memory for it, or run hubaoti compile by hand",
            )
        if outcome.digest is None:
            raise rebuild_error(outcome.kind, outcome.message, outcome.hint)
        return outcome

    def stop(self) -> None:
        """End its process, and wait until it is gone; nothing half-built is left."""
        self._child.terminate()
        try:
            self._child.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # it leads those that it started
            self._child.wait()
        self._answer.close()


def main() -> None:
    """The child: its work on standard input, what came of it on standard output."""
    # Being stopped lets every step take its temporary files along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work = msgspec.json.decode(sys.stdin.buffer.read(), type=Work)
    out.write(msgspec.json.encode(_run_work(work)) + b"\n")
    out.flush()


def _run_work(work: Work) -> Outcome:
    """Compile, store and push; an error of ours becomes the outcome."""
    from hubaoti import api
    from hubaoti.settings import Settings

    settings = Settings.from_env(work.env)
    try:
        with tempfile.TemporaryDirectory(prefix="hubaoti-bundle-") as folder:
            bundle = api.compile(
                work.model, Path(folder) / "bundle", settings=settings, **work.asked
            )
            return Outcome(bundle.manifest.digest, push=_try_push(bundle, work.push, settings))
    except HubaotiError as error:
        return Outcome(None, type(error).__name__, str(error), error.hint)


def _try_push(bundle: Any, repo: str | None, settings: Any) -> str | None:
    """Publish a bundle where that was asked for; why it could not be, else None."""
    from hubaoti import api

    if repo is None:
        return None
    try:
        api.push(bundle, repo, settings=settings)
    except HubaotiError as error:
        return f"{error}"
    return None
