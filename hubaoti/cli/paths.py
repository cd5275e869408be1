"""Paths as commands take them: the empty one, which a shell makes of an unset variable, is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class GivenPath(click.Path):
    """A path that somebody named; Python would take an empty one for the folder that we are in."""

    def __init__(self, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; bad usage where there is none."""
        if value == "":
            self.fail("an empty text names no file; . is the folder that you are in", param, ctx)
        return super().convert(value, param, ctx)
