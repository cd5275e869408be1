"""`hubaoti compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubaoti.cli.output import Steps, human_size, print_json


@click.command("compile")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="the bundle")
@click.option("--task", help="embed, classify or logits; by default what the model's files say")
@click.option("--dim", "dims", multiple=True, metavar="NAME=MIN:MAX", help="as batch=1:32")
@click.option("--dtype", help="float32, bfloat16 or float16; by default the config's")
@click.option("--level", help="CPU level of the host code, as x86_64_v3")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:0")
@click.option("--revision", help="of the model: a branch, tag or commit")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.option("-q", "--quiet", is_flag=True, help="print nothing while it runs")
def compile_command(
    model: str, output: Path, dims: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Compile MODEL (a Hub id or a folder) from its config; its weights are never read."""
    from hubaoti import api

    with Steps(quiet) as say:
        bundle = api.compile(model, output, dims=dims, say=say, **options)
    manifest = bundle.manifest
    if as_json:
        facts = {"path": str(bundle.path), "key": manifest.key, "digest": manifest.digest}
        print_json(facts | {"recipe": str(manifest.recipe), "variant": str(manifest.variant)})
    elif not quiet:
        worst = max(check.max_relative for check in manifest.checks)
        memory, seconds = human_size(manifest.built.peak_bytes), manifest.built.seconds
        click.echo(f"{bundle.path}: {manifest.recipe} for {manifest.variant}")
        click.echo(f"  {human_size(manifest.size)}, in {seconds:.0f} s with {memory} at most")
        click.echo(f"  {len(manifest.checks)} checks against eager, largest error {worst:.1e}")
