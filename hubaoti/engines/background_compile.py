"""A compile in a process of its own, beside an engine that answers meanwhile.

What it builds is stored in the mirror, by its key, and pushed where that was asked for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.errors import BadRequest, CompileFailed, HubaotiError
from hubaoti.host.processes import Child, describe_exit, exit_on_terminate, join_parent
from hubaoti.host.wire import ErrorRecord, Gone
from hubaoti.progress import report_nothing

_KINDER = 10  # who waits for an answer comes first (nice(2))
_MOST = 1 << 20  # bytes of what it is asked, and of what it says
_PATIENCE = 10.0  # seconds for a compile to take its temporary files along


class Work(msgspec.Struct, frozen=True):
    """What is to be built: a model, what is asked of `hubaoti.compile`, and where it is pushed."""

    model: str
    options: dict[str, Any]
    push: str | None
    env: dict[str, str]


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """The digest of what was built, and the error of a push."""

    digest: str
    push: str | None = None


class Building:
    """A compile in a process of its own, started with the object; `stop` ends it."""

    def __init__(self, work: Work) -> None:
        """Start it.

        Raises:
            BadRequest: what is asked cannot be said to another process, as a module's calls.
        """
        try:
            content = msgspec.msgpack.encode(work)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadRequest(
                f"an engine cannot compile with what was asked: {error}",
                hint="give dims, buckets, dtype, level, quantize, mode, inductor; else compile it "
                "with hubaoti.compile",
            ) from error
        self._child = Child(__name__, most=_MOST, printed=subprocess.DEVNULL)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._child.pid, _KINDER)
        try:
            with suppress(Gone):  # which `wait` meets as well
                self._child.channel.send(msgspec.Raw(content))
        except BaseException:
            self.stop()
            raise

    def is_done(self) -> bool:
        """Whether its process has ended, well or not, or has said what came of it."""
        return self._child.has_ended() or self._child.channel.is_readable()

    def wait(self) -> Outcome:
        """Wait for it, and say what came of it.

        Raises:
            CompileFailed: its process ended without saying why, in words of ours; and whatever the
                compile raised.
        """
        try:
            outcome: Outcome = self._child.channel.receive(Outcome | ErrorRecord)
        except Gone:
            code = self._child.end(_PATIENCE)
            raise CompileFailed(
                f"the compile ended: {describe_exit(code)}",
                hint="see that there is memory for it, or run hubaoti compile by hand",
            ) from None
        except HubaotiError:
            self.stop()
            raise
        self.stop()
        return outcome

    def stop(self) -> None:
        """End its process, and wait until it is gone; nothing half-built is left."""
        self._child.end(_PATIENCE)


def main() -> None:
    """The child: it is asked for some work, and says what came of it."""
    # Being stopped lets every step take its temporary files along.
    exit_on_terminate()
    channel = join_parent(partial(os.kill, os.getpid(), signal.SIGTERM))
    channel.send(_run_work(channel.receive(Work)))


def _run_work(work: Work) -> Outcome | ErrorRecord:
    """Compile, store and push; an error of ours becomes the outcome."""
    from hubaoti.api.building import Means
    from hubaoti.api.compiling import build_model
    from hubaoti.settings import Settings

    settings = Settings.from_env(work.env)
    means = Means(settings, report_nothing, own=work.push is not None)
    try:
        with tempfile.TemporaryDirectory(prefix="hubaoti-bundle-") as folder:
            place = Path(folder) / "bundle"
            bundle = build_model(work.model, place, means, **work.options)
            return Outcome(bundle.manifest.digest, push=_try_push(bundle, work.push, settings))
    except HubaotiError as error:
        return ErrorRecord.of(error)


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
