"""The command line as a stranger uses it, in a process of its own; or in this one, where equal."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from hubaoti.cli import dispatch
from hubaoti.settings import Settings, override_environment

HUBAOTI = Path(sys.executable).with_name("hubaoti")


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment that gives a process these settings."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    token = {"HF_TOKEN": settings.token} if settings.token else {}
    return kept | token | {"HUBAOTI_HOME": str(settings.home), "HF_ENDPOINT": settings.endpoint}


def hubaoti(settings: Settings, *words: object, cwd: Path | None = None) -> Done:
    """Run a command to its end; neither a traceback nor what nobody foresaw is ever an answer."""
    done = subprocess.run(
        [HUBAOTI, *map(str, words)],
        env=environment_of(settings),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    for word in ("Traceback", "error: unexpected"):
        assert word not in done.stdout + done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def inside(settings: Settings, *words: object) -> Done:
    """Run a command in this process: start-up is not what is tested."""
    out, err = io.StringIO(), io.StringIO()
    values = environment_of(settings) | {"HF_TOKEN": settings.token or ""}
    with override_environment(**values), redirect_stdout(out), redirect_stderr(err):
        code = dispatch([str(word) for word in words])
    assert "error: unexpected" not in err.getvalue(), err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())
