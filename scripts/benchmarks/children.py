"""Other processes: a fork of this one, and one of a module of this package."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

_SCRIPTS = Path(__file__).resolve().parent.parent

Answer = TypeVar("Answer")


class Died(Exception):
    """A child ended without an answer; the message says how."""


def call_in_fork(call: Callable[[Path], Answer]) -> Answer:
    """What `call` answers, in a fork, to an empty folder, which is gone afterwards.

    What crashes there is seen here, and nothing is imported twice. Before torch's threads have run
    here: a child that is forked later waits for them for ever.

    Raises:
        Died: it raised, which stands on standard error, or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="hubaoti-bench-") as folder:
        sys.stdout.flush()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _answer(partial(call, Path(folder)), writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise Died(f"killed by signal {-code}" if code < 0 else "raised an error")
    return cast(Answer, pickle.loads(answer))


def _answer(call: Callable[[], object], writing: int) -> NoReturn:
    """The child: write the answer, and end without what the parent does at its end."""
    code = 1
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(call()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ask_module(name: str, *words: object, inductor: Path | None = None) -> Any:
    """What a module of this package says last, as JSON, in a process of its own.

    With inductor's cache in a folder; by default in an empty one, that is gone afterwards.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="hubaoti-bench-") as empty:
        path = os.pathsep.join(filter(None, (str(_SCRIPTS), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(inductor or empty)}
        command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", *map(str, words)]
        done = subprocess.run(
            command, env=os.environ | own, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
