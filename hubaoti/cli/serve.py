"""`hubaoti serve`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from hubaoti.cli.groups import Group
from hubaoti.cli.mirror_space import parse_size
from hubaoti.cli.output import print_line
from hubaoti.cli.paths import GivenPath
from hubaoti.cli.serve_root import (
    ROOT,
    backup_command,
    choose_root,
    gc_command,
    restore_command,
    token_command,
)
from hubaoti.errors import BadRequest
from hubaoti.host.extras import require
from hubaoti.settings import read_serve_token, read_upstream_token

if TYPE_CHECKING:
    from hubaoti.server import Service

_LONGEST = 4096  # bytes of a token's file


@click.group("serve", cls=Group, invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 takes a free one",
)
@click.option("--allow-host", multiple=True, help="another name or address that clients use")
@ROOT
@click.option("--upstream", help="an endpoint; what is not here is fetched there once, and kept")
@click.option("--max-bytes", type=parse_size, metavar="50GB", help="what may be stored at most")
@click.option(
    "--token-file",
    type=GivenPath(),
    help="a file with the token for writing; or set HUBAOTI_SERVE_TOKEN; else one is made up",
)
@click.option("--token", help="the token itself, which every user of this machine can then read")
@click.pass_context
def serve_command(
    context: click.Context, /, host: str, port: int, root: Path | None, **options: Any
) -> None:
    """Serve the Hub protocol from a folder, until interrupted."""
    if context.invoked_subcommand is not None:
        return
    require("serving", "serve")
    from hubaoti.server import serve

    def ready(url: str, token: str) -> None:
        print_line(f"serving {folder} at {url}")
        print_line(f"  export HF_ENDPOINT={url} HF_TOKEN={shown or token}")
        if not given:
            print_line("  this token is of this start alone: --token-file FILE keeps one of yours")
        if upstream := service.upstream:
            how = "with" if upstream.token else "without"
            print_line(f"  what is not here comes from {upstream.url}, asked {how} a token")

    given, shown = _choose_token(options["token"], options["token_file"])
    folder = choose_root(root)
    service = _describe_service(**options)
    serve(folder, host, port, given, ready, service)


for _command in (gc_command, token_command, backup_command, restore_command):
    serve_command.add_command(_command)


def _describe_service(
    allow_host: tuple[str, ...], upstream: str | None, max_bytes: int | None, **_: Any
) -> Service:
    from hubaoti.server import Service, Upstream

    through = None if upstream is None else Upstream(upstream, read_upstream_token(upstream))
    return Service(allow_host, through, max_bytes)


def _choose_token(token: str | None, file: Path | None) -> tuple[str | None, str]:
    """The token that was given in one of three ways, and how a shell has what was kept apart.

    None where it was given in none.
    """
    if token is not None and file is not None:
        raise BadRequest("--token and --token-file say two tokens", hint="give one of them")
    if file is not None:
        return _read_token(file), f'"$(cat {quote(str(file))})"'
    if token is None and (kept := read_serve_token()):
        return kept, '"$HUBAOTI_SERVE_TOKEN"'
    return token, ""


def _read_token(file: Path) -> str:
    """The token in a file, which may end in a newline."""
    try:
        with file.open("rb") as opened:
            return opened.read(_LONGEST).decode().strip()
    except (OSError, ValueError) as error:
        hint = "put the token into it, and nothing else"
        raise BadRequest(f"the token's file {file} cannot be read: {error}", hint=hint) from error
