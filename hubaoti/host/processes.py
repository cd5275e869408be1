"""Processes of our own: how they start, what they tell, how they are waited for, and their end."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hubaoti
from hubaoti.host.wire import LARGEST_RECORD, Channel, Garbled, Gone

# What only the code that ran can be blamed for; any other signal came from outside.
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
PRINTED = 4096  # bytes of what a child printed that are kept, the last ones
_MOST = 1 << 20  # bytes that a child may say
_LINE = 300  # characters of its last line that a person is shown
_GLANCE = 0.02  # seconds between two looks whether it has ended
_PATIENCE = 5.0  # seconds for one that is told to end, or has hung up
_FORK_PATIENCE = 15.0  # seconds for a fork that is told to end, which tidies up
_STDERR = 2
_STOPPED = 143
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


class Child:
    """A process that runs the `main` of one of our modules, which calls `join_parent` first.

    Records go to it and come back over `channel`. What it prints goes to the descriptor `printed`,
    by default this process's standard error. It leads a session of its own, and whatever it started
    ends with it.
    """

    def __init__(
        self,
        module: str,
        *,
        most: int = LARGEST_RECORD,
        printed: int = _STDERR,
        descriptors: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; records have at most `most` bytes, and it gets the `descriptors` as arguments.

        They stand behind those that `join_parent` reads, from `sys.argv[3]` on. Its
        `environment` is this process's where none is given.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            passed = (theirs.fileno(), *descriptors)
            self._process = subprocess.Popen(
                [*build_command(module), *map(str, (os.getpid(), *passed))],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=passed,
                start_new_session=True,
                env=environment,
            )
        self.pid = self._process.pid
        self.channel = Channel(ours, most, self.has_ended)

    def has_ended(self) -> bool:
        """Whether it has ended; where the system can say so, without giving its number away."""
        if self._process.returncode is None and hasattr(os, "waitid"):
            with suppress(ChildProcessError):  # another thread has waited for it
                how = os.WEXITED | os.WNOHANG | os.WNOWAIT
                return os.waitid(os.P_PID, self.pid, how) is not None
        return self._process.poll() is not None

    def end(self, patience: float = 0.0) -> int:
        """Have it end by itself within `patience` seconds, else end it; as `subprocess` has it."""
        if self._process.returncode is None:
            if patience > 0.0:
                self.channel.hang_up()
            until = time.monotonic() + patience
            while not self.has_ended() and time.monotonic() < until:
                time.sleep(_GLANCE)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads all that it started
        code = self._process.wait()
        self.channel.close()
        return code


def describe_exit(code: int) -> str:
    """How a process ended before it had said what it should, in words."""
    if code >= 0:
        return f"its process ended with code {code}"
    if -code == signal.SIGKILL:
        return "its process was ended (SIGKILL: it took too much memory, or too long)"
    # Signals of real time have no name.
    name = signal.Signals(-code).name if -code in [*signal.Signals] else f"signal {-code}"
    did = "it crashed its process" if -code in CRASHES else "its process was ended"
    return f"{did} ({name})"


def join_parent(
    end: Callable[[], object] = lambda: os._exit(0),
    *,
    is_awaited: bool = False,
    is_watched: bool = True,
) -> Channel:
    """Begin as a child: the channel to the process that started this one.

    `end` is called in a thread as soon as that one is gone or hangs up; who has to be alone for a
    while is not `is_watched`, and calls `end_with_parent` later. Where the thread that started this
    one waits for it (`is_awaited`), it ends even amid native code that lets no other thread run.
    Nothing that crashes here writes a core dump.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if is_awaited:
        die_with_parent(int(sys.argv[1]))
    channel = Channel(socket.socket(fileno=int(sys.argv[2])))
    if is_watched:
        end_with_parent(channel, end)
    return channel


def end_with_parent(channel: Channel, end: Callable[[], object] = lambda: os._exit(0)) -> None:
    """From now on `end` is called in a thread as soon as the parent is gone or hangs up."""

    def watch() -> None:
        channel.wait_for_hangup()
        end()

    threading.Thread(target=watch, daemon=True).start()


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the system end this process when the thread that started it ends, as by a kill.

    Where a system has no such word, a child whose parent is gone ends when it has answered.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def exit_on_terminate() -> None:
    """Have SIGTERM end this process as `sys.exit` does: steps take their temporary files along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))


@dataclass(frozen=True, slots=True)
class ChildOutput:
    """What a child said until it ended, and how it ended (as `subprocess` has it).

    `is_garbled`: it went on with what is no record. `last` is the last line that it printed.
    """

    records: list[Any]
    code: int
    last: str = ""
    is_garbled: bool = False


def collect_records(
    module: str,
    request: object,
    kind: Any,
    patience: float,
    most: int = _MOST,
    environment: Mapping[str, str] | None = None,
) -> ChildOutput:
    """Ask one of our modules something in a process of its own; the records that it answers.

    It is ended where it takes more than `patience` seconds, says more than `most` bytes, or what is
    no record of the kind.
    """
    until = time.monotonic() + patience
    printed, write = os.pipe()
    last = bytearray()
    reader = threading.Thread(target=_keep_last, args=(printed, last), daemon=True)
    reader.start()
    try:
        child = Child(module, most=most, printed=write, environment=environment)
    finally:
        os.close(write)
    records, is_garbled = [], False
    try:
        child.channel.send(request, patience)
        while time.monotonic() < until and child.channel.received <= most:
            records.append(child.channel.receive(kind, until))
    except Gone as error:
        is_garbled = isinstance(error, Garbled)
        child.end(min(_PATIENCE, until - time.monotonic()))
    finally:
        code = child.end()
    reader.join(1.0)  # others may hold the pipe open for longer
    return ChildOutput(records, code, _last_line(bytes(last)), is_garbled)


def _keep_last(printed: int, last: bytearray) -> None:
    """Read a pipe to its end, and keep the last of it."""
    with open(printed, "rb", buffering=0) as pipe:
        while part := pipe.read(1 << 16):
            last += part
            del last[:-PRINTED]


def _last_line(printed: bytes) -> str:
    """The last line that says something, as plain text."""
    lines = printed.decode(errors="replace").split("\n")
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "".join(each for each in line if each.isprintable())[:_LINE]


def fork_child(work: Callable[[], None], log: Path) -> int:
    """Fork a process that does some work and ends; its pid.

    It has all that this process has, ends with it, and takes its temporary files along. What it and
    those that it starts print goes to a file, so that lines of several never mix.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if process := _fork():
        return process
    status = 1
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_on_terminate()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        die_with_parent(parent, signal.SIGTERM)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        work()
        status = 0
    finally:  # a fork that went on would do the parent's work again
        with suppress(OSError, ValueError):
            sys.stdout.flush()  # an ended process has no other chance
        os._exit(status)


def _fork() -> int:
    """Fork, as `os.fork` does, and lose no interrupt that comes meanwhile.

    Python drops what a handler raises amid a fork. In the fork both signals stay without effect
    until it says what they do.
    """
    if threading.current_thread() is not threading.main_thread():
        return os.fork()  # handlers run elsewhere
    came, handlers, process = list[int](), dict[int, Any](), -1
    try:
        _set_aside(handlers, came)
        process = os.fork()
        if process:
            _set_handlers(handlers)
            for number in came:
                signal.raise_signal(number)
    except BaseException:
        if process > 0:
            os.kill(process, signal.SIGKILL)  # it has hardly begun
        _set_handlers(handlers)  # of which one may have raised before all were there again
        if process > 0:
            os.waitpid(process, 0)
        raise
    return process


def _set_aside(handlers: dict[int, Any], came: list[int]) -> None:
    """Have interrupts only noted among those that `came`; what they did goes into `handlers`."""
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(interrupt)):
            handlers[interrupt] = handler
            signal.signal(interrupt, lambda number, _: came.append(number))


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    """Have signals do again what they did."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait_for_one(forks: Iterable[int]) -> tuple[int, int]:
    """Wait for one of some forks, and for no other process; its pid and exit code."""
    while True:
        for process in forks:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return process, os.waitstatus_to_exitcode(status)
        time.sleep(_GLANCE)


def stop_forks(forks: Iterable[int]) -> None:
    """End forks; each takes its temporary files and its own processes along."""
    for process in forks:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    until = time.monotonic() + _FORK_PATIENCE
    for process in forks:
        with suppress(ChildProcessError):
            while os.waitpid(process, os.WNOHANG) == (0, 0):
                if time.monotonic() > until:  # it is in native code, which hears no signal
                    os.kill(process, signal.SIGKILL)
                time.sleep(_GLANCE)
