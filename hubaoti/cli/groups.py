"""Groups of commands whose help has the whole first sentence of each, where click cuts it."""

from __future__ import annotations

import click

_LONGEST = 400  # characters of a sentence


class Group(click.Group):
    """A group that lists its commands with a sentence each."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list that `--help` shows."""
        rows = [
            (name, command.get_short_help_str(_LONGEST))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
