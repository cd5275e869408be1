"""`hubaoti verify`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hubaoti.cli.output import Steps, print_json, print_line, print_text

if TYPE_CHECKING:
    from hubaoti.api import Verified


@click.command("verify")
@click.argument("what", required=False, metavar="[REPO|DIGEST|PATH]")
@click.option("--all", "everything", is_flag=True, help="all that the mirror has")
@click.option(
    "--open", "opens", is_flag=True, help="open each graph again, in a process of its own"
)
@click.option("--device", help="where: cpu or cuda:0; by default what the artifact is for")
@click.option("--ops", multiple=True, help="a module whose ops graphs call, as my.ops")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.option(
    "-q", "--quiet", is_flag=True, help="print nothing but errors; --json is printed all the same"
)
def verify_command(
    what: str | None, everything: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Hash again what was pulled from REPO, the artifact of a DIGEST, or the bundle at PATH.

    Without a name, all that the mirror has. With --open, each graph's verdict is printed as JSON,
    and remembered; the exit code is 0 only where all is well.
    """
    from hubaoti import api

    if not options["opens"] and (options["device"] or options["ops"]):
        raise click.UsageError("--device and --ops say how graphs are opened: add --open.")
    if everything and what is not None:
        raise click.UsageError("--all is for no name: leave one of them out.")
    with Steps(quiet or as_json) as progress:
        found = api.verify(what, progress=progress, **options)
    if as_json:
        print_json([_serialize(each) for each in found])
    elif not quiet:
        for each in found:
            _print_verified(each)
    for each in found:
        if each.error is not None:
            raise each.error


def _print_verified(verified: Verified) -> None:
    """A line of the artifact, and one of JSON for each graph that was to be opened."""
    what = f"{verified.digest[:12]} {verified.recipe}/{verified.variant}"
    print_line(f"{what}: {'whole' if verified.error is None else verified.error}")
    for graph in verified.graphs:
        print_text(json.dumps(asdict(graph)))  # which is not cut, so that it can be read


def _serialize(verified: Verified) -> dict[str, object]:
    return {
        "digest": verified.digest,
        "recipe": verified.recipe,
        "variant": verified.variant,
        "problem": "" if verified.error is None else f"{verified.error}",
        "graphs": [asdict(each) for each in verified.graphs],
    }
