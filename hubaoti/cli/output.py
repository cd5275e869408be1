"""What a person reads: steps with their times, tables; and the same facts as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import click
import msgspec

from hubaoti.escape import LONGEST, bound_message, escape, escape_line

_SOME = 20  # lines of a list whose length is somebody else's
_COLUMN = 60  # where times stand


class Steps:
    """Prints each step with its time, as a context manager that is called with each step.

    On standard error, unless told otherwise: standard output is for what was asked for.
    """

    def __init__(self, quiet: bool = False, err: bool = True) -> None:
        self._quiet = quiet
        self._err = err
        self._current = ""
        self._since = 0.0

    def __call__(self, step: str) -> None:
        """The next step starts; the one before has ended."""
        self.end()
        self._current, self._since = step, time.perf_counter()
        if not self._quiet:
            click.echo(f"  {escape_line(step, LONGEST):<{_COLUMN}}", nl=False, err=self._err)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        elif self._current and not self._quiet:
            click.echo(" stopped", err=self._err)

    def end(self) -> None:
        """The current step has ended, and no other starts."""
        if self._current and not self._quiet:
            spent = format_time(time.perf_counter() - self._since)
            click.echo(f" {spent:>9}", err=self._err)
        self._current = ""


def print_line(text: str, err: bool = False) -> None:
    """Print text as one line: what a terminal would obey is spelled out, and it is cut."""
    click.echo(escape_line(text, LONGEST), err=err)


def print_some(lines: Sequence[str]) -> None:
    """The first lines of a list that somebody else made, and how many there are more."""
    for line in lines[:_SOME]:
        print_line(line)
    if len(lines) > _SOME:
        print_line(f"  and {len(lines) - _SOME} more (--json)")


def print_lines(text: str, err: bool = False) -> None:
    """A message of some lines, as errors have them."""
    click.echo(bound_message(text), err=err)


def print_text(text: str) -> None:
    """A text that was asked for, all of it, and nothing that a terminal would obey."""
    click.echo(escape(text))


def print_json(value: Any) -> None:
    """A value as indented JSON on standard output."""
    try:
        # Both are in C, as json is not where it indents by itself.
        text = msgspec.json.format(json.dumps(value, default=str), indent=2)
    except msgspec.DecodeError:  # half a character, which a name of somebody else's may have
        text = json.dumps(value, indent=2, default=str)
    click.echo(text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table as wide as its words; a pipe gets it unbroken."""
    cells = [[escape_line(str(cell), LONGEST) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_folded(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    line = "  ".join(f"{{:<{width}}}" for width in widths)
    click.echo("\n".join(line.format(*row).rstrip() for row in (columns, *cells)))


def _print_folded(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    """A table for a terminal: what is wider than it goes on below, within its column."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def format_time(seconds: float) -> str:
    """A time in the unit that a person would say."""
    return f"{seconds:.1f} s" if seconds >= 0.5 else f"{seconds * 1000:.1f} ms"
