"""Processes of our own that run one of our modules: how they are started, and waited for."""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import hubaoti

_MOST = 1 << 20  # bytes that a child may say
PRINTED = 4096  # bytes of what it printed that are kept, the last ones
_LINE = 300  # characters of its last line that a person is shown
_GLANCE = 0.02  # seconds between two looks whether it has ended


@dataclass(frozen=True, slots=True)
class ChildOutput:
    """What a child said until it ended, how it ended (as `subprocess` has it), and its last words.

    `last` is the last line that it printed on standard error.
    """

    out: bytes
    code: int
    last: str = ""


def build_command(module: str) -> list[str]:
    """The command line that runs the `main` of a module, with this very hubaoti.

    With `-P`: the folder that somebody is in is nobody's code.
    """
    home = str(Path(hubaoti.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{home!r}]; from {module} import main; main()"
    return [sys.executable, "-P", "-c", code]


def list_search_path() -> list[bytes]:
    """Where this process finds modules, as it is told to another one: each folder by its name."""
    return [os.fsencode(Path(each).absolute()) for each in sys.path if isinstance(each, str)]


def collect_output(module: str, said: bytes, patience: float, most: int = _MOST) -> ChildOutput:
    """Ask one of our modules something in a process of its own; what it says until it ends.

    Whatever it started ends with it. It is ended where it takes more than `patience` seconds, or
    says more than `most` bytes.
    """
    child = subprocess.Popen(
        build_command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with child:  # which closes its pipes
        try:
            out, printed = _talk(child, said, time.monotonic() + patience, most)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # it leads all that it started
            code = child.wait()
    return ChildOutput(out, code, _last_line(printed))


def _talk(
    child: subprocess.Popen[bytes], said: bytes, end: float, most: int
) -> tuple[bytes, bytes]:
    """What a child writes until it has ended, though others may hold its pipes open for longer."""
    heard = {child.stdout: bytearray(), child.stderr: bytearray()}
    out, printed = heard.values()
    with selectors.DefaultSelector() as pipes:
        for pipe in heard:
            pipes.register(pipe, selectors.EVENT_READ)  # type: ignore[arg-type]
        pipes.register(child.stdin, selectors.EVENT_WRITE)  # type: ignore[arg-type]
        while time.monotonic() < end and len(out) <= most:
            is_over = _has_ended(child)
            ready = [key for key, _ in pipes.select(0 if is_over else _GLANCE)]
            if is_over and all(key.fileobj is child.stdin for key in ready):
                break
            for key in ready:
                if key.fileobj is child.stdin:
                    said = _give(key.fd, said)
                    is_done = not said
                else:
                    part = os.read(key.fd, 1 << 16)
                    heard[key.fileobj] += part  # type: ignore[index]
                    is_done = not part
                if is_done:
                    pipes.unregister(key.fileobj).fileobj.close()  # type: ignore[union-attr]
            del printed[:-PRINTED]
    return bytes(out), bytes(printed)


def _give(pipe: int, said: bytes) -> bytes:
    """Write what a pipe takes at once, and what is left; nothing, if nobody listens any more."""
    try:
        return said[os.write(pipe, said[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return b""


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; where the system can say so, without giving its number away."""
    if not hasattr(os, "waitid"):
        return child.poll() is not None
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _last_line(printed: bytes) -> str:
    """The last line that says something, as plain text."""
    lines = printed.decode(errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(each for each in line if each.isprintable())[:_LINE]
