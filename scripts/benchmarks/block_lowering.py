"""What lowering one block takes, beside torch's own call with the same options."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from benchmarks.children import call_in_fork
from benchmarks.decode_step import GROUPED
from benchmarks.figures import Cost, Figure, compare_costs, make_figure, measure_cost
from benchmarks.models import ModelCase
from hubaoti.compiler import (
    from_config,
    inductor,
    job,
    materialize,
    plan,
    request,
    targets,
    traced,
)
from hubaoti.host.probe import probe_host
from hubaoti.settings import Settings

_CPU = torch.device("cpu")


def bench_block(
    scratch: Path, settings: Settings, rounds: int, case: ModelCase = GROUPED
) -> list[Figure]:
    """One exported block lowered by us, and by torch's own call with the same three options.

    Each in a child, with an empty folder for inductor: what a user's first compile costs.
    """
    folder = scratch / "block"
    case.config.save_pretrained(folder)
    spent: dict[str, list[Cost]] = {"ours": [], "torch": []}
    for index in range(rounds + 1):
        for side, costs in sorted(spent.items(), reverse=index % 2 == 1):
            costs.append(call_in_fork(partial(_lower, side, folder, case)))
    seconds = {side: [each.seconds for each in costs] for side, costs in spent.items()}
    name = "aoti_compile_and_package"
    over = ("at least", 1.0)
    return [
        make_figure("block", "lower", seconds["ours"], "s"),
        make_figure("block", name, seconds["torch"], "s"),
        *compare_costs("block", f"{name} over lower", spent["torch"], spent["ours"], over),
    ]


def _lower(side: str, folder: Path, case: ModelCase, scratch: Path) -> Cost:
    """Export the block that decodes, and what one side takes to lower it."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    dims = request.make_ranges(case.options["dims"])
    asked = request.CompileRequest(task=case.options["task"], dims=dims)
    planned = plan.make_plan(from_config.load_source(folder, asked, _CPU), asked, _CPU)
    (target,) = targets.choose_targets(probe_host(Settings.from_env()), asked)
    (block,) = planned.units
    module = planned.source.model.get_submodule(block.region)
    with materialize.lend_memory([module], _CPU, planned.source.live):
        program = traced.trace_unit(planned.source, block, module, True).program
    options = job.describe_build(planned, asked, target).options
    package = scratch / "block.pt2"
    with measure_cost() as cost:
        if side == "ours":
            inductor.lower(program, target.level, options, package, "bench", None, "bench")
        else:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=inductor.WEIGHTLESS
            )
    return cost
