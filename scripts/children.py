"""Calls in a forked child: what crashes there is seen here, and nothing is imported twice."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Died(Exception):
    """A child ended without an answer; the message says how."""


def in_child(call: Callable[[Path], Any]) -> Any:
    """What `call` answers (as JSON can say it) to an empty folder, which is gone afterwards.

    Before torch's threads have run here: a child that is forked later waits for them for ever.

    Raises:
        Died: it raised, which stands on standard error, or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="hubaoti-bench-") as folder:
        answer = Path(folder) / "answer.json"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            answered(call, Path(folder), answer)
        _, status = os.waitpid(child, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise Died(f"killed by signal {-code}" if code < 0 else "raised an error")
        return json.loads(answer.read_text())


def answered(call: Callable[[Path], Any], folder: Path, answer: Path) -> None:
    """The child: write the answer, and end without what the parent does at its end."""
    code = 1
    try:
        answer.write_text(json.dumps(call(folder)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
