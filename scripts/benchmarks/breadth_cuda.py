"""Every architecture of a list for a GPU that is not here: lowered, interpreted and launched.

Each is compiled as a tiny model for one capability: its program is compared with eager, lowered
under the stand-in, and its package answered by interpretation at several sizes, none of which the
program was traced with. Then its graphs are opened and launched under the stand-in, so that the
host code of attention says what it refuses. Each one in a child of its own, and each line is kept
at once: what was measured before is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import transformers

from benchmarks.breadth import GOAL, Case, explain_left_out, list_blocks, list_cases
from benchmarks.children import Died, call_in_fork
from benchmarks.figures import Figure, make_figure, write_figures
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import Manifest
from hubaoti.cli.output import print_table
from hubaoti.compiler.request import parse_capabilities
from hubaoti.compiler.stand_in import build_stand_in
from hubaoti.errors import CheckFailed, HubaotiError
from hubaoti.host.probe import find_torch
from hubaoti.settings import merge_environment

_LARGEST_ERROR = 1e-5  # of float32, as a part of the largest value
_POINTS = 3  # sizes at which each graph is to be answered by interpretation, at least
_VERDICTS = ("pass", "refuse", "wrong", "fail")


@dataclass(frozen=True)
class Outcome:
    """How an architecture fared on the road: pass, refuse, wrong (other answers) or fail, and why.

    `points` are the fewest sizes at which a graph was interpreted, `error` the largest of all of
    them, as a part of the largest value; `launched` counts the graphs that a device took.
    """

    name: str
    form: str
    verdict: str
    reason: str = ""
    graphs: int = 0
    blocks: str = ""
    points: int = 0
    launched: int = 0
    error: float = 0.0
    seconds: float = 0.0


def bench_breadth_for(
    gpu: str, names: Sequence[str], forms: Sequence[str], file: Path | None
) -> list[Figure]:
    """Take each through the road for a GPU, as sm90; a table and the counts are printed.

    `file` keeps each line as it comes; a case of which it has a line is not measured again.
    """
    (capability,) = parse_capabilities(gpu)
    cases, key = list_cases(names, forms), f"breadth_sm{capability}"
    kept = json.loads(file.read_text()) if file and file.exists() else {}
    found = {(each["name"], each["form"]): Outcome(**each) for each in kept.get(key, [])}
    for index, case in enumerate(cases):
        if (case.name, case.form) in found:
            continue
        outcome = found[case.name, case.form] = _judge_apart(case, capability)
        click.echo(
            f"{index + 1}/{len(cases)} {case.name} {case.form}: {outcome.verdict} "
            f"{outcome.reason} ({outcome.seconds:.0f} s)",
            err=True,
        )
        if file:
            write_figures(file, [], {key: [asdict(each) for each in found.values()]})
    figures = _sum_up([found[case.name, case.form] for case in cases], capability)
    if file:
        write_figures(file, figures, {key: [asdict(each) for each in found.values()]})
    return figures


def _sum_up(found: Sequence[Outcome], capability: int) -> list[Figure]:
    """Print the table and the counts; the figures of both."""
    head = ["architecture", "form", "", "graphs", "blocks", "points", "launched", "seconds"]
    head += ["largest error", "reason"]
    rows = [
        (o.name, o.form, o.verdict, o.graphs, o.blocks, o.points, o.launched, f"{o.seconds:.0f}")
        + (f"{o.error:.1e}", o.reason)
        for o in found
    ]
    print_table(head, [[str(cell) for cell in row] for row in rows])
    counts = Counter(outcome.verdict for outcome in found)
    share = counts["pass"] / len(found)
    words = ", ".join(f"{counts[word]} {word}" for word in _VERDICTS)
    click.echo(f"{words}: {share:.1%} of {len(found)} pass for sm{capability}, {GOAL:.0%} wanted")
    bad, worst = counts["wrong"] + counts["fail"], max(outcome.error for outcome in found)
    name = f"sm{capability}: "
    return [
        make_figure(
            "breadth", f"{name}share of {len(found)} that pass", [share], "", ("at least", GOAL)
        ),
        make_figure("breadth", f"{name}wrong or failed", [bad], "", ("at most", 0)),
        make_figure("breadth", f"{name}largest error", [worst], "", ("at most", _LARGEST_ERROR)),
        make_figure("breadth", f"{name}time of one", [o.seconds for o in found], "s"),
    ]


def _judge_apart(case: Case, capability: int) -> Outcome:
    """The outcome of one architecture, found in a child."""
    start = time.perf_counter()
    try:
        outcome = call_in_fork(partial(_judge_case, case, capability))
    except Died as error:
        outcome = Outcome(case.name, case.form, "fail", f"the process {error}")
    return replace(outcome, seconds=round(time.perf_counter() - start, 1))


def _judge_case(case: Case, capability: int, scratch: Path) -> Outcome:
    """Compile one architecture, and launch what came of it."""
    case.architecture.config.save_pretrained(scratch / case.name)
    try:
        (bundle,) = api.compile_for(
            scratch / case.name,
            [f"sm{capability}"],
            scratch / "bundles",
            task=case.form,
            regions=case.architecture.regions,
            dims=case.dims,
            settings=case.choose_settings(scratch),
        )
        return _judge_bundle(case, bundle, scratch)
    except CheckFailed as error:
        return Outcome(case.name, case.form, "wrong", f"{error}")
    except HubaotiError as error:
        return Outcome(case.name, case.form, "refuse", f"{error}")
    except Exception as error:  # nobody knows what
        traceback.print_exc()
        return Outcome(case.name, case.form, "fail", f"{type(error).__name__}: {error}")


def _judge_bundle(case: Case, bundle: Bundle, scratch: Path) -> Outcome:
    """What its manifest says of the answers, and what a device says of its host code."""
    manifest = bundle.manifest
    interpreted = [check for check in manifest.checks if check.where == "interpreted"]
    points = Counter(check.graph for check in interpreted)
    fewest = min(points[graph.id] for graph in manifest.graphs)
    worst = max((check.max_relative for check in interpreted), default=0.0)
    missing, blocks = _count_blocks(case, manifest)
    launches = _launch(bundle, scratch / "home")
    refused = [each["problem"] for each in launches if each["problem"] or not each["opened"]]
    untold = [f"{graph.id}: {each}" for graph in manifest.graphs for each in _list_untold(graph)]
    verdict, reason = "pass", ""
    if refused:
        verdict, reason = "fail", f"its launch: {'; '.join(refused)}"
    elif fewest < _POINTS:
        verdict, reason = "fail", f"{fewest} points: {'; '.join(untold)}"
    elif missing:
        verdict, reason = "refuse", explain_left_out(case, scratch) or ", ".join(missing)
    launched = len(launches) - len(refused)
    graphs = len(manifest.graphs)
    return Outcome(case.name, case.form, verdict, reason, graphs, blocks, fewest, launched, worst)


def _list_untold(graph: Any) -> Sequence[str]:
    """What of a graph could not be interpreted, in words."""
    return graph.not_interpreted or ()


def _count_blocks(case: Case, manifest: Manifest) -> tuple[list[str], str]:
    """The paths of repeated blocks that no graph serves, and how many are served of how many."""
    auto: Any = transformers.AutoModel
    if case.form == "generate":
        auto = transformers.AutoModelForCausalLM
    model = auto.from_config(case.architecture.config)
    served = {path for entry in manifest.graphs for path in entry.modules}
    every = [*list_blocks(model, case.architecture.regions)]
    missing = [path for path in every if path not in served]
    return missing, f"{len(every) - len(missing)} of {len(every)}"


def _launch(bundle: Bundle, home: Path) -> list[dict[str, Any]]:
    """Open and launch each graph under the stand-in, where nothing is computed; the verdicts.

    Raises:
        HubaotiError: the stand-in cannot be built.
    """
    torch = find_torch([])
    assert torch is not None
    around = build_stand_in(torch, home).environment((bundle.manifest.target.sm or 0,))
    command = [sys.executable, "-m", "hubaoti.cli", "verify", str(bundle.path), "--open", "--json"]
    environment = merge_environment({**around, "HUBAOTI_HOME": str(home)})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        (verified,) = json.loads(done.stdout)
    except ValueError:
        words = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return [{"problem": words[-1], "opened": False}]
    return verified["graphs"] or [{"problem": verified["problem"], "opened": False}]
