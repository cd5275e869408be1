"""The command line: a command parses, calls one verb, prints. Errors become words in one place."""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import click

from hubaoti import __version__
from hubaoti.cli.output import print_line, print_lines
from hubaoti.errors import BadRequest, DiskFull, HubaotiError, first_line

# Each command's module, loaded when the command is named, and the line that help shows for it.
COMMANDS = {
    "doctor": ("doctor", "This host, as facts that artifacts are judged by."),
    "compile": ("compile", "Compile a model from its config into a bundle."),
    "push": ("hub", "Publish a bundle as a commit of a Hub repo."),
    "pull": ("hub", "Fetch the artifact that fits this host best, verified."),
    "search": ("search", "The repos that have graphs, of a model's program or of any."),
    "versions": ("repos", "The versions of a repo, the newest first."),
    "explain": ("repos", "How every artifact of a repo fits this host, and why."),
    "lock": ("repos", "Write down what repos hold, for pull --locked."),
    "run": ("run", "Answer texts with a pulled graph and a model's weights."),
    "serve": ("serve", "An endpoint that speaks the Hub protocol, on this machine."),
    "verify": ("verify", "Hash again what is stored, and open it again."),
    "mirror": ("mirror", "What is stored on this machine."),
    "trust": ("trust", "The publishers whose code may run here."),
}
_INTERRUPTED, _STOPPED = 130, 143
_SHOWN = 80  # characters of a name that is too long


class Commands(click.Group):
    """Commands that are imported when they are used: `--help` costs nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of the road."""
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, its module imported for it; None where there is none of this name."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"hubaoti.cli.{COMMANDS[name][0]}")
        # What was imported stays until the end: of ten thousand rows, a fifth of the time went into
        # looking through it again.
        gc.freeze()
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; of a name that is nearly one of ours, that one is told."""
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        if near and args[0] not in COMMANDS and not ctx.resilient_parsing:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{near[0]}'?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list that `--help` shows, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hubaoti")
def group() -> None:
    """hubaoti: the package manager for compiled PyTorch graphs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; its exit code is the error's, 2 for bad usage, 130 for an interrupt.

    Where the reader of our output left, as `head` does, click ends the process with 1, in silence.
    """
    if sys.stdout is None:  # closed, and nothing that is asked for could be printed
        print_line("error: standard output is closed, and what is printed goes there", err=True)
        print_line("hint: nothing was done; for no output at all, send it to /dev/null", err=True)
        sys.exit(HubaotiError.exit_code)
    # As an interrupt does, being stopped lets every step take its temporary files along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    sys.exit(dispatch(arguments))


def dispatch(arguments: Sequence[str] | None) -> int:
    """The one boundary where errors become words."""
    try:
        group.main(arguments, prog_name="hubaoti", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        print_line("interrupted; nothing half-written was left", err=True)
        return _INTERRUPTED
    except HubaotiError as error:
        print_lines(f"error: {error}", err=True)
        if error.hint:
            print_lines(f"hint: {error.hint}", err=True)
        return error.exit_code
    except Exception as error:
        from hubaoti.disk import DISK_FULL  # for no command that goes well

        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print_line(f"error: what is printed has no room: {first_line(error)}", err=True)
            return DiskFull.exit_code
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = first_line(f"{error.filename}")[:_SHOWN]
            print_line(f"error: no disk takes a name as long as {name}…", err=True)
            print_line("hint: give a name of at most 255 bytes, in a path of 4095", err=True)
            return BadRequest.exit_code
        return _report_unexpected(error)
    return 0


def _report_unexpected(error: Exception) -> int:
    """Say in words that something failed which nobody foresaw; the traceback goes to a file."""
    import tempfile  # for no command that goes well
    import traceback

    from hubaoti.settings import hide_secrets

    kind, message = type(error).__name__, hide_secrets(str(error))  # before it is cut
    print_line(f"error: unexpected {kind}: {first_line(message or 'without a word')}", err=True)
    try:
        file, name = tempfile.mkstemp(prefix="hubaoti-error-", suffix=".txt")
        with os.fdopen(file, "w", errors="backslashreplace") as report:
            report.write(hide_secrets("".join(traceback.format_exception(error))))
    except OSError as why:
        print_line(f"hint: its traceback could not be written: {first_line(why)}", err=True)
    else:
        hint = "please report it, with that, where nothing on this machine explains it"
        print_line(f"hint: the whole of it is in {name}; {hint}", err=True)
    return HubaotiError.exit_code
