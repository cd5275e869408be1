"""Every architecture of a list, compiled as a tiny model, attached, and called as users call it.

Encoders get what a tokenizer or a processor gives, decoders generate over a static cache, or are
told to use none. What graphs answered is counted, and compared with what eager answers. Each one in
a child of its own: a graph that crashes is a line of the table.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from architectures import ARCHITECTURES, Architecture
from ordinary import CALLS, given
from torch import nn

from benchmarks.answers import find_difference
from benchmarks.children import Died, call_in_fork
from benchmarks.figures import Figure, make_figure
from benchmarks.models import make_settings, randomize_parameters
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import Attachment
from hubaoti.attachment.stats import Fallback
from hubaoti.cli.output import print_table
from hubaoti.errors import HubaotiError, first_line
from hubaoti.settings import Settings

GOAL = 0.95  # of the architectures pass
_TOLERANCE = 1e-4  # of the largest value of a tensor
_DIMS = {"forward": {"batch": (1, 4), "seq": (2, 40)},
        "generate": {"batch": (1, 4), "seq": (1, 40), "cache": (8, 64)}}  # fmt: skip
_SERVED = 0.99  # of the calls of its blocks, at least
# Batch and seq of prompts, and the row that is padded. The compiler checks at the ends of the dims;
# none of these is one.
_PROMPTS = ((1, 5, None), (3, 11, 1), (2, 26, 0))
# Tokens that are generated: they cross the windows of 8 places, and fill 16 after any prompt.
_STEPS = 12

Words = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How an architecture fared: pass, refuse, wrong (other answers) or fail, and why.

    `served` is the share of its blocks' calls that graphs answered, `plain` what became of a call
    of nothing but its first input.
    """

    name: str
    form: str
    verdict: str
    reason: str = ""
    graphs: int = 0
    blocks: str = ""
    calls: int = 0
    served: float = 0.0
    plain: str = ""
    error: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """An architecture in one form, and the bounds of its dims."""

    name: str
    form: str
    architecture: Architecture
    dims: Mapping[str, tuple[int, int]]
    settings: Settings | None = None  # of a home that may have its graphs; else of an empty one

    def choose_settings(self, scratch: Path) -> Settings:
        """The settings that it is compiled and attached with."""
        return self.settings or make_settings(scratch / "home")


class EagerFails(Exception):
    """A model that transformers itself cannot run in a form."""


def bench_breadth(
    names: Sequence[str], forms: Sequence[str], outcomes: list[Outcome]
) -> list[Figure]:
    """Compile and compare each, print a table and the counts, and leave all in `outcomes`."""
    return measure_cases(list_cases(names, forms), outcomes)


def list_cases(names: Sequence[str], forms: Sequence[str]) -> list[Case]:
    """The architectures of these names, all without any, in the forms that they have.

    Raises:
        SystemExit: there is none of a name.
    """
    if unknown := {*names} - {*ARCHITECTURES}:
        raise SystemExit(f"no such architecture: {', '.join(unknown)}; {', '.join(ARCHITECTURES)}")
    return [
        Case(name, form, ARCHITECTURES[name], _choose_dims(ARCHITECTURES[name], form))
        for name in names or ARCHITECTURES
        for form in forms
        if form == "forward" or ARCHITECTURES[name].generates
    ]


def measure_cases(todo: Sequence[Case], outcomes: list[Outcome]) -> list[Figure]:
    """What becomes of each case, in `outcomes` too, as a table and in figures."""
    for index, case in enumerate(todo):
        outcome = _judge_apart(case)
        outcomes.append(outcome)
        click.echo(
            f"{index + 1}/{len(todo)} {case.name} {case.form}: {outcome.verdict} {outcome.reason} "
            f"({outcome.seconds:.0f} s)",
            err=True,
        )
    return _sum_up(outcomes)


def _sum_up(found: Sequence[Outcome]) -> list[Figure]:
    """Print the table and the counts; the figures of both."""
    rows = [
        (o.name, o.form, o.verdict, o.graphs, o.blocks, o.calls, f"{o.served:.1%}", o.plain)
        + (f"{o.error:.1e}", o.reason)
        for o in found
    ]
    head = ["architecture", "form", "", "graphs", "blocks", "calls", "served", "plain call"]
    head += ["largest error", "reason"]
    print_table(head, [[str(cell) for cell in row] for row in rows])
    counts = Counter(outcome.verdict for outcome in found)
    share = counts["pass"] / len(found)
    words = ", ".join(f"{counts[word]} {word}" for word in ("pass", "refuse", "wrong", "fail"))
    click.echo(f"{words}: {share:.1%} of {len(found)} pass, at least {GOAL:.0%} wanted")
    bad = counts["wrong"] + counts["fail"]
    return [
        make_figure("breadth", f"share of {len(found)} that pass", [share], "", ("at least", GOAL)),
        make_figure("breadth", "architectures wrong or failed", [bad], "", ("at most", 0)),
    ]


def _judge_apart(case: Case) -> Outcome:
    """The outcome of one architecture, found in a child."""
    start = time.perf_counter()
    try:
        outcome = call_in_fork(partial(_judge_case, case))
    except Died as error:
        outcome = Outcome(case.name, case.form, "fail", f"the process {error}")
    return replace(outcome, seconds=round(time.perf_counter() - start, 1))


def _judge_case(case: Case, scratch: Path) -> Outcome:
    """Compile one architecture, and compare what its graphs answer with what eager does."""
    case.architecture.config.save_pretrained(scratch / case.name)
    try:
        bundle = _compile(case, scratch)
    except HubaotiError as error:
        return Outcome(case.name, case.form, "refuse", str(error))
    try:
        return _compare(case, bundle, scratch)
    except EagerFails as error:
        return Outcome(case.name, case.form, "refuse", str(error))
    except Exception as error:  # nobody knows what
        traceback.print_exc()
        return Outcome(case.name, case.form, "fail", f"{type(error).__name__}: {error}")


def _choose_dims(architecture: Architecture, form: str) -> dict[str, tuple[int, int]]:
    """The bounds of the dims that an architecture has: images have no length."""
    config = architecture.config
    text = getattr(config.get_text_config(), "vocab_size", None) and architecture.kind != "Whisper"
    return _DIMS[form] if text else {"batch": _DIMS[form]["batch"]}


def _compile(case: Case, scratch: Path) -> Bundle:
    """The bundle of a tiny model."""
    return api.compile(
        scratch / case.name,
        scratch / "bundle",
        task=case.form,
        regions=case.architecture.regions,
        dims=case.dims,
        settings=case.choose_settings(scratch),
    )


def _compare(case: Case, bundle: Bundle, scratch: Path) -> Outcome:
    """What eager answers to ordinary calls, and then the model with its graphs attached."""
    architecture, form = case.architecture, case.form
    torch.manual_seed(0)
    auto: Any = transformers.AutoModel if form == "forward" else transformers.AutoModelForCausalLM
    model = randomize_parameters(auto.from_config(architecture.config))
    calls = [*_list_calls(model, architecture, form)]
    expected = [_answer_eagerly(model, form, words) for words in calls]
    with api.attach(model, bundle, settings=case.choose_settings(scratch)) as attachment:
        warnings.simplefilter("ignore", Fallback)
        pairs = [(_answer(model, form, c), e) for c, e in zip(calls, expected, strict=True)]
        stats = attachment.stats()
        first = next(name for name in calls[0] if name != "attention_mask")
        plain = _explain_plain_call(model, {first: calls[0][first]}, attachment)
    worst = max(find_difference(found, wanted) for found, wanted in pairs)
    count = stats["compiled"] + stats["eager"]
    share = stats["compiled"] / max(count, 1)
    served = [path for entry in bundle.manifest.graphs for path in entry.modules]
    all_blocks = [*list_blocks(model, architecture.regions)]
    missing = [path for path in all_blocks if path not in served]
    blocks = f"{len(all_blocks) - len(missing)} of {len(all_blocks)}"
    verdict, reason = "pass", ""
    if worst > _TOLERANCE:
        verdict, reason = "wrong", f"an answer differs by {worst:.1e} of the largest value"
    elif missing:
        verdict, reason = "refuse", explain_left_out(case, scratch) or ", ".join(missing)
    elif share < _SERVED:
        verdict, reason = "fail", f"served {share:.1%}, the others: {_count_reasons(stats)}"
    graphs = len(bundle.manifest.graphs)
    return Outcome(case.name, form, verdict, reason, graphs, blocks, count, share, plain, worst)


def _answer_eagerly(model: nn.Module, form: str, words: Words) -> list[torch.Tensor]:
    """What the model itself answers.

    Raises:
        EagerFails: it cannot run at all, as Bloom over a static cache (transformers 5.22).
    """
    try:
        return _answer(model, form, words)
    except Exception as error:
        raise EagerFails(f"eager itself fails: {first_line(error)}") from error


def _answer(model: Any, form: str, words: Words) -> list[torch.Tensor]:
    """The tensors that a call answers; of `generate` the logits of each step."""
    with torch.no_grad():
        if form == "forward":
            return [each for each in model(**words).values() if isinstance(each, torch.Tensor)]
        found = model.generate(
            **words,
            max_new_tokens=_STEPS,
            min_new_tokens=_STEPS,
            do_sample=False,
            cache_implementation="static",
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [*found.logits]


def _list_calls(model: Any, architecture: Architecture, form: str) -> Iterator[Words]:
    """Calls as users make them, at several sizes, with and without padding."""
    if form == "forward":
        without = {"use_cache": False} if architecture.generates else {}
        yield from (given(model.config, *call) | without for call in CALLS)
        return
    for batch, seq, padded in _PROMPTS:
        words = given(model.config, batch, seq, None)
        if padded is not None:
            words["attention_mask"][padded, : seq // 3] = 0
        yield words


def _explain_plain_call(model: Any, words: Words, attachment: Attachment) -> str:
    """What a call was answered by: graphs, or else the module, with the reason."""
    before = attachment.stats()
    try:
        with torch.no_grad():
            model(**words)
    except Exception as error:  # as of an encoder that wants its decoder's ids
        return f"eager fails: {type(error).__name__}"
    after = attachment.stats()
    if after["eager"] == before["eager"]:
        return "graphs"
    return f"module: {_count_reasons(after, before)}"


def _count_reasons(stats: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """Why calls were left to the module, those of `before` left out."""
    counts: Counter[str] = Counter()
    for path, region in stats["regions"].items():
        counts.update(region["eager"])
        counts.subtract(before["regions"][path]["eager"] if before else {})
    return ", ".join(f"{reason} {count}" for reason, count in sorted((+counts).items()))


def list_blocks(model: nn.Module, regions: str) -> Iterator[str]:
    """The paths of all repeated blocks: what lies in the outermost lists, or in the one asked for.

    Not the compiler's own search: what that overlooks must show.
    """
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if regions not in {"auto", parent} or not path:
            continue
        inside = [
            p for p in _list_ancestors(path) if isinstance(model.get_submodule(p), nn.ModuleList)
        ]
        if inside == [parent] and len([*module.parameters()]) > 2:
            yield path


def _list_ancestors(path: str) -> list[str]:
    """The paths above a module's own."""
    words = path.split(".")
    return [".".join(words[:end]) for end in range(1, len(words))]


def explain_left_out(case: Case, scratch: Path) -> str:
    """What the compiler says of the blocks that it left out."""
    explained = api.explain(
        scratch / case.name,
        task=case.form,
        regions=case.architecture.regions,
        dims=case.dims,
        settings=case.choose_settings(scratch),
    )
    return "; ".join(explained.left_out)
