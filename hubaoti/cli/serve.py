"""`hubaoti serve`."""

from __future__ import annotations

from pathlib import Path

import click

from hubaoti.cli.output import print_line
from hubaoti.settings import Settings


@click.command("serve")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, help="0 takes a free one")
@click.option("--root", type=click.Path(path_type=Path), help="where the repos are stored")
@click.option("--token", help="for writing; made up and printed when none is given")
def serve_command(host: str, port: int, root: Path | None, token: str | None) -> None:
    """Serve the Hub protocol from a folder, until interrupted."""
    from hubaoti.server import serve

    def ready(url: str, token: str) -> None:
        print_line(f"serving {folder} at {url}")
        print_line(f"  export HF_ENDPOINT={url} HF_TOKEN={token}")

    folder = root or Settings.from_env().home / "hub"
    serve(folder, host, port, token, ready)
