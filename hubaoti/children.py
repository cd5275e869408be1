"""Processes of our own that run one of our modules: how they are started, and waited for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hubaoti


def program(module: str) -> list[str]:
    """The command line that runs the `main` of a module, with this very hubaoti.

    With `-P`: the folder that somebody is in is nobody's code.
    """
    home = str(Path(hubaoti.__file__).parent.parent)
    code = f"import sys; sys.path[:0] = [{home!r}]; from {module} import main; main()"
    return [sys.executable, "-P", "-c", code]


def told_by(child: subprocess.Popen[bytes], said: bytes | None, patience: float) -> bytes:
    """What a child writes until it has ended; after `patience` seconds it is."""
    try:
        out, _ = child.communicate(said, timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
    except BaseException:
        child.kill()
        child.wait()
        raise
    return out
