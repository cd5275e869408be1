"""`hubaoti mirror export|import|rebuild`: artifacts without a Hub, and without their index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from hubaoti.artifact.sizes import format_count
from hubaoti.cli.output import print_json, print_line
from hubaoti.cli.paths import GivenPath
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

_PATH = GivenPath()


@click.command("export")
@click.argument("what", nargs=-1, required=True, metavar="REPO|DIGEST...")
@click.argument("output", type=_PATH, metavar="DIR|FILE.tar")
def export_command(what: tuple[str, ...], output: Path) -> None:
    """Write artifacts into a folder or one file, for mirror import on another machine.

    They are no bundles: their packages lie unpacked, so push and verify refuse them. Kernels that
    graphs call are not taken along: that machine fetches them.
    """
    from hubaoti.api.mirroring import find_artifacts
    from hubaoti.mirror.exchange import export

    settings = Settings.from_env()
    with Mirror.open(settings.mirror) as mirror:
        artifacts = find_artifacts(what, mirror, settings)
        export(mirror, artifacts, output)
    print_line(f"in {output}: {format_count(len(artifacts), 'artifact')}")
    for artifact in artifacts:
        for pin in artifact.manifest.requires.kernels:
            print_line(f"  {artifact.digest[:12]} calls the kernel {pin}, which is fetched there")


@click.command("import")
@click.argument("source", type=_PATH, metavar="DIR|FILE.tar")
@click.option("--json", "as_json", is_flag=True, help="print the digests as JSON")
def import_command(source: Path, as_json: bool) -> None:
    """Store what was exported elsewhere. That trusts nothing: each is a stranger's until you do."""
    from hubaoti.mirror.exchange import import_artifacts

    with Mirror.open(Settings.from_env().mirror) as mirror:
        digests = [each.digest for each in import_artifacts(mirror, source)]
        strangers = [each for each in digests if not mirror.decide(each).allowed]
    if as_json:
        print_json({"artifacts": digests, "not_trusted": strangers})
        return
    print_line(f"in the mirror: {format_count(len(digests), 'artifact')}")
    _print_strangers(strangers)


@click.command("rebuild")
def rebuild_command() -> None:
    """Make a lost or damaged index again, from the files: end other processes before.

    Who published an artifact is not in its files, nor that it was built here.
    """
    from hubaoti.mirror.rebuild import rebuild

    rebuilt = rebuild(Settings.from_env().mirror)
    if rebuilt.apart is not None:
        print_line(f"the damaged index is in {rebuilt.apart}")
    print_line(f"in the index again: {format_count(len(rebuilt.rows), 'artifact')}")
    _print_strangers(rebuilt.not_trusted)


def _print_strangers(digests: Sequence[str]) -> None:
    """How to have opened what nobody knows the origin of."""
    if digests:
        print_line(
            "not opened here until you say so, as nobody knows who made them (or pull them again):"
        )
    for digest in digests:
        print_line(f"  hubaoti trust add {digest}")
