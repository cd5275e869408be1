"""How long work tells its caller where it is: by a function, called with each step's name."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str], None]


def silent(step: str) -> None:
    """Say nothing."""
