"""`hubaoti compile`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hubaoti.artifact.misses import explain_shapes, propose_command, propose_dims, read_misses
from hubaoti.artifact.sizes import format_count, format_size
from hubaoti.cli.matrix import fill_matrix
from hubaoti.cli.output import Steps, print_json, print_line, print_text
from hubaoti.cli.paths import GivenPath
from hubaoti.errors import BadRequest

if TYPE_CHECKING:
    from hubaoti.api import Explanation
    from hubaoti.artifact.bundle import Bundle
    from hubaoti.artifact.manifest import Manifest

# Who reads a file and no other option, and what to do instead.
_BY_MISSES = (
    "--from-misses only proposes dims",
    "leave it out, and give it to the command that is proposed",
)
# What only --matrix takes, and what to do without it.
_SIGNED_LATER = "a bundle is signed by hubaoti push."
_OF_MATRIX = {
    "dry_run": "--dry-run is of --matrix; of a model it is --explain.",
    "sign": f"--sign is of --matrix; {_SIGNED_LATER}",
    "certificates": f"--certificates is of --matrix; {_SIGNED_LATER}",
    "trust_config": f"--trust-config is of --matrix; {_SIGNED_LATER}",
}
_BY_MATRIX = ("--matrix goes by its file", "write it into a [[build]] of the file, by its name")


@click.command("compile")
@click.argument("model", required=False)
@click.option("-o", "--output", type=GivenPath(), help="the bundle")
@click.option(
    "--task", help="embed, classify, logits, generate or forward; default: from the model's files"
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    metavar="NAME=MIN:MAX[:STEP]",
    help="as batch=1:32, or seq=20:20 for one size",
)
@click.option(
    "--bucket", "buckets", multiple=True, metavar="NAME=MIN:MAX", help="a graph of its own: seq=1:1"
)
@click.option("--regions", help="auto (repeated blocks), none (the whole model) or a module's path")
@click.option("--dtype", help="float32, bfloat16 or float16; by default the config's")
@click.option("--quantize", help="int8wo, int4wo or float8dq, through torchao")
@click.option("--attention", help="sdpa, or fa3 (sm90, bfloat16); with --for fa3,sdpa for both")
@click.option(
    "--kernel", metavar="OWNER/NAME[@VERSION]", help="of fa3; kernels-community's if none"
)
@click.option("--mode", default="default", help="default, max-autotune or reduce-overhead")
@click.option("--inductor", multiple=True, metavar="KEY=VALUE", help="an option of torch.inductor")
@click.option("--level", help="CPU level of the host code, as x86_64_v3")
@click.option("--device", help="cpu, cuda or cuda:0; by default the CPU")
@click.option(
    "--for", "capabilities", metavar="sm80,sm90", help="GPUs that need not be here; -o is a folder"
)
@click.option("--layout", help="zerogpu: for spaces.aoti_load and aokit, which know no manifest")
@click.option("--revision", help="of the model: a branch, tag or commit")
@click.option("--trust-remote-code", is_flag=True, help="run the code that the model brings")
@click.option("--jobs", type=int, help="graphs compiled at a time; by default what memory allows")
@click.option("--force", is_flag=True, help="compile again what is built already")
@click.option("--explain", is_flag=True, help="only say what would be compiled, and how")
@click.option(
    "--from-misses",
    type=GivenPath(),
    metavar="FILE",
    help="only propose dims for the calls that no graph served",
)
@click.option(
    "--matrix",
    type=GivenPath(),
    metavar="FILE",
    help="compile and push each [[build]] of a TOML file that its repo lacks",
)
@click.option("--dry-run", is_flag=True, help="of --matrix: only say what is missing")
@click.option("--sign", metavar="KEY.pem|sigstore", help="of --matrix: as push --sign has it")
@click.option("--certificates", metavar="FILE", help="of --matrix: as push has it")
@click.option("--trust-config", metavar="FILE", help="of --matrix: as push has it")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
@click.option(
    "-q",
    "--quiet",
    is_flag=True,
    help="print nothing but errors; --json and --explain are printed all the same",
)
def compile_command(  # noqa: PLR0913 - its options
    model: str | None,
    output: Path | None,
    explain: bool,
    from_misses: Path | None,
    matrix: Path | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compile MODEL (a Hub id or a folder) from its config; its weights are never read."""
    of_matrix = {name: options.pop(name) for name in _OF_MATRIX}
    others = {"output": output, "explain": explain, **options}
    if matrix is not None:
        of_matrix["jobs"] = others.pop("jobs")
        _refuse_unread({"model": model, "from_misses": from_misses, **others}, *_BY_MATRIX)
        fill_matrix(matrix, as_json, quiet, of_matrix)
    elif from_misses is not None:
        _refuse_unread({**of_matrix, **others}, *_BY_MISSES)
        _propose(from_misses, model, as_json)
    elif given := [name for name, said in of_matrix.items() if said]:
        raise click.UsageError(_OF_MATRIX[given[0]])
    elif model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    elif explain:
        _explain_model(model, output, as_json, quiet, options)
    else:
        _print_compiled(model, output, as_json, quiet, options)


def _print_compiled(
    model: str, output: Path | None, as_json: bool, quiet: bool, options: dict[str, Any]
) -> None:
    """Compile a model, and print what came of it."""
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    bundles = _compile_model(model, output, quiet, options)
    if as_json:
        facts = [_describe_bundle(bundle) for bundle in bundles]
        print_json(facts[0] if options["capabilities"] is None else facts)
    for bundle in [] if as_json or quiet else bundles:
        _print_bundle(bundle)


def _refuse_unread(given: dict[str, Any], reader: str, hint: str) -> None:
    """See that an option that reads a file comes with nothing that it would not read.

    Raises:
        BadRequest: it does, with the options.
    """
    given = given | {"mode": None if given["mode"] == "default" else given["mode"]}
    found = [
        max(param.opts, key=len).replace("model", "MODEL")
        for param in click.get_current_context().command.params
        if given.get(param.name or "")
    ]
    if found:
        raise BadRequest(f"{reader}, and reads nothing of {', '.join(found)}", hint=hint)


def _compile_model(
    model: str, output: Path, quiet: bool, options: dict[str, Any]
) -> tuple[Bundle, ...]:
    """What is compiled of a model: a bundle, or one for each capability."""
    from hubaoti import api

    others, capabilities = dict(options), options["capabilities"]
    del others["capabilities"]
    with Steps(quiet) as progress:
        if capabilities is None:
            return (api.compile(model, output, progress=progress, **others),)
        return api.compile_for(model, capabilities, output, progress=progress, **others)


def _describe_bundle(bundle: Bundle) -> dict[str, str]:
    """A bundle as JSON has it."""
    manifest = bundle.manifest
    facts = {"path": str(bundle.path), "key": manifest.key, "digest": manifest.digest}
    return facts | {"recipe": str(manifest.recipe), "variant": str(manifest.variant)}


def _print_bundle(bundle: Bundle) -> None:
    """What was compiled, in words."""
    manifest = bundle.manifest
    memory, seconds = format_size(manifest.built.peak_bytes), manifest.built.seconds
    print_line(f"{bundle.path}: {manifest.recipe} for {manifest.variant}")
    for graph in manifest.graphs:
        print_line(f"  {graph.id} serves {format_count(len(graph.modules), 'module')}")
    print_line(f"  {format_size(manifest.size)} packed, in {seconds:.0f} s with {memory} at most")
    _print_checks(manifest)


def _print_checks(manifest: Manifest) -> None:
    """How what was compiled was checked, and what of it could not be."""
    for interpreted, what in ((False, "against eager"), (True, "of its kernels, interpreted")):
        errors = [
            check.max_relative
            for check in manifest.checks
            if (check.where == "interpreted") == interpreted
        ]
        if errors:
            count = format_count(len(errors), "check")
            print_line(f"  {count} {what}, largest relative error {max(errors):.1e}")
    for graph in manifest.graphs:
        for reason in graph.not_interpreted or ():
            print_line(f"  not interpreted, of {graph.id}: {reason}")


def _propose(path: Path, model: str | None, as_json: bool) -> None:
    """Print what would have served the calls that a file tells of."""
    misses = read_misses(path)
    proposal = propose_dims(misses)
    if as_json:
        facts = dataclasses.asdict(proposal) if proposal else {"dims": {}, "buckets": []}
        print_json(facts | {"reasons": misses.reasons})
        return
    for reason, calls in misses.reasons.items():
        print_line(f"{format_count(calls, 'call')} not served ({reason})")
    for missed in misses.missed:
        sizes = ", ".join(f"{name}={size}" for name, size in missed.sizes.items())
        print_line(
            f"  {missed.region} ({missed.reason}): {sizes}; {format_count(missed.calls, 'call')}"
        )
    if proposal is None:
        print_line("no call was missed for its sizes: no other dims would have served it")
        return
    print_text(f"proposed: {propose_command(misses, proposal, model)}")
    if shapes := explain_shapes(misses, model):
        print_text(f"  {shapes}")


def _explain_model(
    model: str, output: Path | None, as_json: bool, quiet: bool, options: dict[str, Any]
) -> None:
    """Print what would be compiled, and whether it is built already; nothing is compiled."""
    from hubaoti import api

    capabilities, how = options["capabilities"], {"force", "jobs", "capabilities"}
    others = {name: value for name, value in options.items() if name not in how}
    with Steps(quiet) as progress:
        if capabilities is None:
            found = [api.explain(model, output, progress=progress, **others)]
        else:
            found = [*api.explain_for(model, capabilities, output, progress=progress, **others)]
    if as_json:
        facts = [dataclasses.asdict(each) for each in found]
        print_json(facts[0] if capabilities is None else facts)
    for each in [] if as_json else found:
        _print_explanation(each)


def _print_explanation(found: Explanation) -> None:
    """What would be compiled, in words."""
    print_line(f"{found.recipe} for {found.variant}, regions {found.regions}")
    print_line(f"  key {found.key[:12]}, {'in ' + found.built if found.built else 'not built yet'}")
    for graph in found.graphs:
        served = format_count(len(graph["modules"]), "module")
        print_line(f"  {graph['id']}: {served}, from {graph['modules'][0] or 'the model itself'}")
        bounds = ", ".join(f"{name}={sizes}" for name, sizes in graph["dims"].items())
        print_line(
            f"    dims {bounds or 'none'}" + (f"; {graph['cache']} cache" * bool(graph["cache"]))
        )
        for name, shape in graph["inputs"].items():
            print_line(f"    {name} ({', '.join(map(str, shape))})")
    if found.kernel:
        print_line(f"  calls a kernel of {found.kernel}, which is asked for its build then")
    for reason in found.left_out:
        print_line(f"  stays eager: {reason}")
