"""Every architecture of a list, compiled as a tiny model and compared with eager, block by block.

Each one in a child of its own: a graph that crashes is a line of the table.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from children import Died, in_child
from figures import Figure, figure
from recording import Elsewhere, Recorded, Unlike, adapted, apart, opened, recording, shaken
from torch import nn
from transformers.cache_utils import StaticCache

from hubaoti import api
from hubaoti.bundle import Bundle
from hubaoti.cli.output import print_table
from hubaoti.errors import HubaotiError, first_line
from hubaoti.manifest import Graph as Entry
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from architectures import ARCHITECTURES, Architecture

GOAL = 0.95  # of the architectures pass
TOLERANCE = 1e-4  # of the largest value of a tensor
DIMS = {"forward": {"batch": (1, 4), "seq": (2, 40)},
        "generate": {"batch": (1, 4), "seq": (1, 40), "cache": (8, 64)}}  # fmt: skip
# Batch and seq of the calls, and the row that is padded; of generate, the seqs of its steps. The
# compiler checks at the ends of the dims; none of these is one.
CALLS = ((1, 9, None), (3, 14, 1), (2, 33, 0), (4, 39, None))
STEPS = ((1, (5, 1, 1, 3, 1), None), (3, (11, 1, 7, 1), 1), (2, (6, 26, 1, 1), 0))
PLACES = 48  # of the caches


@dataclass(frozen=True)
class Outcome:
    """How an architecture fared: pass, refuse, wrong (other answers) or fail, and why."""

    name: str
    form: str
    verdict: str
    reason: str = ""
    graphs: int = 0
    blocks: str = ""
    calls: int = 0
    error: float = 0.0
    seconds: float = 0.0


class EagerFails(Exception):
    """A model that transformers itself cannot run in a form."""


def bench_breadth(
    names: Sequence[str], forms: Sequence[str], outcomes: list[Outcome]
) -> list[Figure]:
    """Compile and compare each, print a table and the counts, and leave all in `outcomes`."""
    if unknown := {*names} - {*ARCHITECTURES}:
        raise SystemExit(f"no such architecture: {', '.join(unknown)}; {', '.join(ARCHITECTURES)}")
    asked = [(name, form) for name in names or ARCHITECTURES for form in forms]
    todo = [(n, f) for n, f in asked if f == "forward" or ARCHITECTURES[n].generates]
    for at, (name, form) in enumerate(todo):
        outcome = outcome_apart(name, form)
        outcomes.append(outcome)
        click.echo(
            f"{at + 1}/{len(todo)} {name} {form}: {outcome.verdict} {outcome.reason} "
            f"({outcome.seconds:.0f} s)",
            err=True,
        )
    return summed_up(outcomes)


def summed_up(found: Sequence[Outcome]) -> list[Figure]:
    """Print the table and the counts; the figures of both."""
    rows = [
        (o.name, o.form, o.verdict, o.graphs, o.blocks, o.calls, f"{o.error:.1e}", o.reason)
        for o in found
    ]
    head = ["architecture", "form", "", "graphs", "blocks", "calls", "largest error", "reason"]
    print_table(head, [[str(cell) for cell in row] for row in rows])
    counts = Counter(outcome.verdict for outcome in found)
    share = counts["pass"] / len(found)
    words = ", ".join(f"{counts[word]} {word}" for word in ("pass", "refuse", "wrong", "fail"))
    click.echo(f"{words}: {share:.1%} of {len(found)} pass, at least {GOAL:.0%} wanted")
    bad = counts["wrong"] + counts["fail"]
    return [
        figure("breadth", f"share of {len(found)} that pass", [share], "", ("at least", GOAL)),
        figure("breadth", "architectures wrong or failed", [bad], "", ("at most", 0)),
    ]


def outcome_apart(name: str, form: str) -> Outcome:
    """The outcome of one architecture, found in a child."""
    start = time.perf_counter()
    try:
        facts = in_child(lambda folder: asdict(outcome_of(name, form, folder)))
    except Died as why:
        facts = asdict(Outcome(name, form, "fail", f"the process {why}"))
    return Outcome(**facts | {"seconds": round(time.perf_counter() - start, 1)})


def outcome_of(name: str, form: str, scratch: Path) -> Outcome:
    """Compile one architecture, and compare what its graphs answer with what eager does."""
    architecture = ARCHITECTURES[name]
    folder = scratch / name
    architecture.config.save_pretrained(folder)
    try:
        bundle = compiled(folder, architecture, form, scratch)
    except HubaotiError as why:
        return Outcome(name, form, "refuse", str(why))
    try:
        return compared(name, architecture, form, bundle, scratch)
    except EagerFails as why:
        return Outcome(name, form, "refuse", str(why))
    except Unlike as why:
        return Outcome(name, form, "fail", f"another call: {why}")
    except Exception as why:  # nobody knows what
        traceback.print_exc()
        return Outcome(name, form, "fail", f"{type(why).__name__}: {why}")


def dims_of(architecture: Architecture, form: str) -> dict[str, tuple[int, int]]:
    """The bounds of the dims that an architecture has: images have no length."""
    config = architecture.config
    text = getattr(config.get_text_config(), "vocab_size", None) and architecture.kind != "Whisper"
    return DIMS[form] if text else {"batch": DIMS[form]["batch"]}


def compiled(folder: Path, architecture: Architecture, form: str, scratch: Path) -> Bundle:
    """The bundle of a tiny model."""
    return api.compile(
        folder,
        scratch / "bundle",
        task=form,
        regions=architecture.regions,
        dims=dims_of(architecture, form),
        settings=at(scratch),
    )


def compared(
    name: str, architecture: Architecture, form: str, bundle: Bundle, scratch: Path
) -> Outcome:
    """Every graph over every module that it serves, at every recorded call."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModel if form == "forward" else transformers.AutoModelForCausalLM
    config = architecture.config
    config.use_cache = form == "generate"
    model = shaken(auto.from_config(config))
    entries = bundle.manifest.graphs
    served = [path for entry in entries for path in entry.modules]
    calls = recorded(model, served, architecture, form)
    worst, count = 0.0, 0
    for entry in entries:
        for graph, path in zip(opened(bundle, entry, scratch, model), entry.modules, strict=True):
            for call in calls[path]:
                error = difference(graph, call)
                if error is not None:
                    worst, count = max(worst, error), count + 1
    all_blocks = [*lists_of(model, architecture.regions)]
    missing = [path for path in all_blocks if path not in served]
    blocks = f"{len(all_blocks) - len(missing)} of {len(all_blocks)}"
    verdict, reason = "pass", ""
    if worst > TOLERANCE:
        verdict, reason = "wrong", f"an answer differs by {worst:.1e} of the largest value"
    elif missing:
        verdict, reason = (
            "refuse",
            why_not(architecture, form, scratch / name) or ", ".join(missing),
        )
    elif not count:
        verdict, reason = "fail", "no recorded call was one that its graphs take"
    return Outcome(name, form, verdict, reason, len(entries), blocks, count, worst)


def recorded(
    model: nn.Module, served: Sequence[str], architecture: Architecture, form: str
) -> dict[str, list[Recorded]]:
    """What the blocks are called with as the model runs.

    Raises:
        EagerFails: it cannot run at all, as Bloom over a static cache (transformers 5.22).
    """
    with recording(model, served) as calls, torch.no_grad():
        try:
            run_whole(model, architecture, form)
        except Exception as why:
            raise EagerFails(f"eager itself fails: {first_line(why)}") from why
    return calls


def difference(graph: Graph, call: Recorded) -> float | None:
    """How far a graph's answer is from eager's; None for a call that it does not serve.

    Raises:
        Unlike: the graph should serve it, and has another call.
    """
    try:
        inputs = adapted(graph.entry, call)
    except Elsewhere:
        return None
    with torch.no_grad():
        found = graph(*inputs)
    worst = apart(found, as_filled(graph.entry, found, call.answer))
    if graph.entry.cache and call.after:
        written = (inputs[graph.entry.cache.keys], inputs[graph.entry.cache.values])
        worst = max(worst, apart(written, (call.after.keys, call.after.values)))
    return worst


def as_filled(
    entry: Entry, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Eager's answers, cut to the filled places where they are over the whole cache, as scores."""
    cut = list(expected)
    for at, (output, ours) in enumerate(zip(entry.outputs.tensors, found, strict=True)):
        for axis, size in enumerate(output.shape):
            if size == "filled":
                cut[at] = cut[at].narrow(axis, 0, ours.shape[axis])
    return cut


def run_whole(model: nn.Module, architecture: Architecture, form: str) -> None:
    """Call the eager model as its users do, at several sizes, with and without padding."""
    if form == "generate":
        for batch, steps, padded in STEPS:
            decode(model, batch, steps, padded)
        return
    for batch, seq, padded in CALLS:
        model(**given(model, batch, seq, padded))


def decode(model: nn.Module, batch: int, steps: Sequence[int], padded: int | None) -> None:
    """A prefill and its steps over one static cache, which begins with one more call.

    That one makes the cache: a block cannot be given what is not there yet.
    """
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=PLACES)
    mask = torch.ones(batch, 0, dtype=torch.int64)
    for at, seq in enumerate((2, *steps)):
        more = torch.ones(batch, seq, dtype=torch.int64)
        if padded is not None and at == 0:
            more[padded] = 0
        mask = torch.cat((mask, more), 1)
        ids = torch.randint(1, config.vocab_size, (batch, seq))
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def given(model: nn.Module, batch: int, seq: int, padded: int | None) -> dict[str, torch.Tensor]:
    """The inputs of one call of a whole model."""
    config: Any = model.config
    found: dict[str, torch.Tensor] = {}
    text = config.get_text_config()
    if hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        found["input_features"] = torch.randn(batch, config.num_mel_bins, frames)
    elif getattr(text, "vocab_size", None):
        found["input_ids"] = torch.randint(1, text.vocab_size, (batch, seq))
        found["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64)
        if padded is not None:
            found["attention_mask"][padded, -seq // 3 :] = 0
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(1, text.vocab_size, (batch, 5))
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        found["pixel_values"] = torch.randn(batch, 3, vision.image_size, vision.image_size)
    return found


def lists_of(model: nn.Module, regions: str) -> Iterator[str]:
    """The paths of all repeated blocks: what lies in the outermost lists, or in the one asked for.

    Not the compiler's own search: what that overlooks must show.
    """
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if regions not in {"auto", parent} or not path:
            continue
        inside = [p for p in ancestors(path) if isinstance(model.get_submodule(p), nn.ModuleList)]
        if inside == [parent] and len([*module.parameters()]) > 2:
            yield path


def ancestors(path: str) -> list[str]:
    """The paths above a module's own."""
    words = path.split(".")
    return [".".join(words[:at]) for at in range(1, len(words))]


def why_not(architecture: Architecture, form: str, folder: Path) -> str:
    """What the compiler says of the blocks that it left out."""
    asked = {"regions": architecture.regions, "dims": dims_of(architecture, form)}
    return "; ".join(api.explain(folder, task=form, settings=at(folder.parent), **asked).left_out)


def at(scratch: Path) -> Settings:
    """Settings of a home of its own, without a Hub."""
    return Settings(home=scratch / "home", endpoint="http://127.0.0.1:9")
