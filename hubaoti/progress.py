"""How long work tells its caller where it is: by a function, called with each step's name."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]


def report_nothing(step: str) -> None:
    """Ignore a step: the `progress` of those who want none."""
