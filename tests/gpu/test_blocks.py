"""Two blocks of a Llama at their real width, attached and called as a user calls their model.

Answers are compared with float32 eager of the same weights, beside those of eager in the model's
own dtype; on a CPU, where everything is float32, with float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hubaoti
from gpu import llama
from gpu.conftest import Found
from gpu.errors import list_problems, word_worst
from gpu.measure import Peak, measure_error, stopwatch
from gpu.place import Place, describe
from hubaoti.artifact.bundle import Bundle

MORE = 1.02  # of eager's peak, what attached blocks may take


@dataclass(frozen=True, slots=True)
class Form:
    """One way to compile the blocks."""

    name: str
    cached: bool = True
    attention: str = "sdpa"

    def compile(self, place: Place) -> Bundle:
        """From a config alone."""
        words = place.require_attention(self.attention)
        if not self.cached:
            most = llama.MOST if place.is_gpu else llama.PLACES
            dims = {"batch": (1, 4), "seq": (1, most)}
            words |= {"task": "forward", "regions": "auto", "dims": dims, "buckets": ()}
        config = llama.make_config(place.device, 2)
        return llama.compile_blocks(place, self.name, config, **words)

    def list_prompts(self, place: Place) -> Iterator[tuple[int, int, bool]]:
        """Rows, tokens, and whether the last row is padded."""
        lengths = (32, 128, llama.MOST // 2) if place.is_gpu else (12, 40)
        for tokens in lengths:
            yield from ((1, tokens, False), (3, tokens, False), (3, tokens, True))

    def answer(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The last hidden states: at once, or over a cache, the last few one by one."""
        if not self.cached:
            return llama.answer_at_once(model, ids, mask)
        places = llama.MOST if model.device.type == "cuda" else llama.PLACES
        return llama.answer_prompt(model, ids, mask, 4, places)


FORMS = (
    Form("block-plain", cached=False),
    Form("block-cache"),
    Form("block-fa3", attention="fa3"),
    Form("prompt-fa3", cached=False, attention="fa3"),
)


def list_cases(every: bool) -> tuple[Form, ...]:
    """The forms that are checked: on a CPU that over a cache stands for all."""
    return FORMS if every else FORMS[1:2]


@pytest.fixture(scope="module")
def bundle(place: Place, case: Form) -> Bundle:
    """Made beforehand, or compiled from the config alone."""
    place.require_attention(case.attention)
    return place.get_bundle(case.name, case.compile)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Any:
    """Two blocks in a model."""
    return llama.make_model(device, llama.make_config(device, 2))


def test_built(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts)


def test_attach(bundle: Bundle, model: Any, place: Place, found: Found) -> None:
    """It is tried in a child, opened and bound; then all of that is known."""
    times = []
    for _ in range(2):
        with stopwatch() as spent:
            hubaoti.attach(model, bundle, strict=True, trust=True, settings=place.settings).detach()
        times.append(spent[0])
    found(f"{times[0]:.0f} ms with a first open, again {times[1]:.1f} ms", ms=times)


def test_answer(bundle: Bundle, model: Any, case: Form, place: Place, found: Found) -> None:
    """Prompts of several lengths, padded and not: answers, and who gave them."""
    exact = copy.deepcopy(model)
    exact = exact.float() if place.is_gpu else exact.double()
    facts: dict[str, Any] = {}
    for rows, tokens, padded in case.list_prompts(place):
        ids = llama.make_prompt(model, rows, tokens)
        mask = llama.make_mask(ids, padded)
        text = mask.bool() if mask is not None else torch.ones_like(ids).bool()
        expected = case.answer(exact, ids, mask)[text]
        theirs = case.answer(model, ids, mask)[text]
        with hubaoti.attach(
            model, bundle, strict=True, trust=True, settings=place.settings
        ) as attached:
            ours = case.answer(model, ids, mask)[text]
            served = attached.stats()["regions"]["model.layers.0"]["compiled"]
        facts[f"{rows}x{tokens}{' padded' if padded else ''}"] = {
            "off": measure_error(ours, expected),
            "eager": measure_error(theirs, expected),
            "served": served,
        }
    found(word_worst(facts), **facts)
    problems = list_problems(facts, llama.choose_dtype(place.device))
    assert not problems, "; ".join(problems)
    graphs = {graph for each in facts.values() for graph, count in each["served"].items() if count}
    assert graphs == {graph.id for graph in bundle.manifest.graphs}, f"only {graphs} answered"


@pytest.mark.gpu("memory is counted on a GPU only")
def test_memory(bundle: Bundle, model: Any, case: Form, place: Place, found: Found) -> None:
    """What a long prompt and a few tokens take at most, beside eager."""
    ids = llama.make_prompt(model, 3, llama.MOST // 2)
    taken = {"eager": measure_peak(case, model, ids)}
    with hubaoti.attach(model, bundle, strict=True, trust=True, settings=place.settings):
        taken["attached"] = measure_peak(case, model, ids)
    said = f"{taken['attached'] / 1e6:.1f} MB, eager {taken['eager'] / 1e6:.1f}"
    found(said, **taken)
    assert taken["attached"] <= MORE * taken["eager"], said


def measure_peak(case: Form, model: Any, ids: torch.Tensor) -> int:
    """Bytes that a call takes at most, its libraries' own workspaces left out."""
    case.answer(model, ids, None)
    peak = Peak.of(model.device)
    answer = case.answer(model, ids, None)
    taken = peak.bytes
    del answer
    return taken
