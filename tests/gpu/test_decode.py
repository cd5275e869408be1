"""Decoding with CUDA graphs: `attach(cuda_graphs=True)` and plain `generate`, beside eager's.

How near a token is to the least that it can take, which is reading all weights once, is measured
here as well: a sum over as many bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hubaoti
from gpu import llama
from gpu.conftest import Found
from gpu.llama import GREEDY
from gpu.measure import Peak, measure_error, stopwatch, time_calls
from gpu.place import Place
from hubaoti.artifact.bundle import Bundle

_LONG, _SHORT = 72, 8  # of the difference a token's time is, without the prompt's

pytestmark = pytest.mark.gpu("a CPU has no CUDA graphs")


@dataclass(frozen=True, slots=True)
class Steps:
    """The blocks of a model of 8B, with one attention."""

    name: str
    bundle: str
    attention: str = "sdpa"

    def compile(self, place: Place) -> Bundle:
        """From a config alone."""
        words = place.require_attention(self.attention)
        return llama.compile_model(place, self.bundle, **words)


STEPS = (Steps("decode-sdpa", "model"), Steps("decode-fa3", "model-fa3", "fa3"))


def list_cases(every: bool) -> tuple[Steps, ...]:
    """Both: of the first kind a captured step looks at all places of a cache."""
    return STEPS


@pytest.fixture(scope="module")
def bundle(place: Place, case: Steps) -> Bundle:
    """Made beforehand, or compiled from the config alone."""
    place.require_attention(case.attention)
    return place.get_bundle(case.bundle, case.compile)


@pytest.fixture(scope="module")
def model(device: torch.device) -> Any:
    """That model, with random weights."""
    return llama.make_model(device, llama.make_config(device))


@contextmanager
def replaying(model: Any, bundle: Bundle, place: Place) -> Iterator[Any]:
    """The model with its graphs, whose steps are replayed."""
    with hubaoti.attach(
        model, bundle, cuda_graphs=True, trust=True, settings=place.settings
    ) as attachment:
        yield attachment


def test_replay(model: Any, bundle: Bundle, place: Place, found: Found) -> None:
    """The words that `generate` says, one row and several, padded: as without replays."""
    facts: dict[str, Any] = {}
    for rows, padded in ((1, False), (3, False), (3, True)):
        ids = llama.make_prompt(model, rows)
        mask = llama.make_mask(ids, padded)
        words: dict[str, Any] = {**GREEDY, "max_new_tokens": llama.NEW, "attention_mask": mask}
        words |= {"output_logits": True, "return_dict_in_generate": True}
        with hubaoti.attach(model, bundle, trust=True, settings=place.settings):
            plain = model.generate(ids, **words)
        with replaying(model, bundle, place) as attachment:
            replayed = model.generate(ids, **words)
            stats = attachment.stats()
        same = (plain.sequences == replayed.sequences).float().mean().item()
        off = measure_error(replayed.logits[1], plain.logits[1])
        name = f"{rows}{' padded' if padded else ''}"
        facts[name] = {"same_words": same, "off": off, "replays": stats["cuda_graphs"]}
    said = ", ".join(f"{name}: {each['off']:.1e} off" for name, each in facts.items())
    found(said, **facts)
    assert all(each["off"] <= 2e-2 for each in facts.values()), said


def test_time(model: Any, bundle: Bundle, place: Place, found: Found) -> None:
    """Milliseconds a token of `generate`, beside eager's, and beside reading the weights once."""
    times = {"eager": time_token(model), "read": read_weights_once(model)}
    with hubaoti.attach(model, bundle, trust=True, settings=place.settings):
        times["attached"] = time_token(model)
    peak = Peak.of(model.device)
    with replaying(model, bundle, place) as attachment:
        times["replayed"] = time_token(model)
        stats = attachment.stats()
    (calls, *_) = (each["compiled"] for each in stats["regions"].values())  # a step's, captured
    said = f"{times['replayed']:.2f} ms a token, {times['replayed'] / times['read']:.2f} of reading"
    said += f" the weights, eager {times['eager'] / times['replayed']:.2f} times as long"
    said += f", without replays {times['attached'] / times['replayed']:.2f}"
    found(said, times=times, replays=stats["cuda_graphs"], calls=calls, peak_bytes=peak.bytes)
    assert times["replayed"] < times["attached"], said


def time_token(model: Any) -> float:
    """Milliseconds that each further word of `generate` takes."""
    ids, spent = llama.make_prompt(model), {}
    for count in (_SHORT, _LONG, _SHORT, _LONG):  # the first of each is to warm up
        with stopwatch() as took:
            model.generate(ids, **GREEDY, max_new_tokens=count)
            torch.cuda.synchronize(model.device)
        spent[count] = took[0]
    return (spent[_LONG] - spent[_SHORT]) / (_LONG - _SHORT)


def read_weights_once(model: Any) -> float:
    """Milliseconds that a sum takes over as many bytes as the weights that a token reads."""
    read = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    numbers = torch.ones(read // 8, dtype=torch.int64, device=model.device)
    found = time_calls(model.device, {"read": numbers.sum})
    return found["read"]["median"]


def test_waiting(model: Any, bundle: Bundle, place: Place, found: Found) -> None:
    """While steps are captured, another thread waits for the device, as a logger may."""
    ids, end, waits = llama.make_prompt(model), threading.Event(), [0]
    words: dict[str, Any] = {**GREEDY, "max_new_tokens": llama.NEW}
    expected = model.generate(ids, **words)

    def wait() -> None:
        while not end.is_set():
            torch.cuda.synchronize(model.device)
            waits[0] += 1

    other = threading.Thread(target=wait)
    other.start()
    try:
        with replaying(model, bundle, place) as attachment:
            answer, stats = model.generate(ids, **words), attachment.stats()
    finally:
        end.set()
        other.join()
    same = (answer == expected).float().mean().item()
    found(f"{same:.1%} of words alike, {waits[0]} waits", replays=stats["cuda_graphs"])
    assert same > 0.5 and waits[0]


def test_padding(model: Any, bundle: Bundle, place: Place, found: Found) -> None:
    """Rows with almost nothing in them: fewer tokens than places are left out on the left."""
    ids = llama.make_prompt(model, 3, 8)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :4] = 0, 0
    words: dict[str, Any] = {**GREEDY, "max_new_tokens": 4, "attention_mask": mask}
    words |= {"output_logits": True, "return_dict_in_generate": True}
    theirs = model.generate(ids, **words)
    with replaying(model, bundle, place):
        ours = model.generate(ids, **words)
    off = max(measure_error(a, b) for a, b in zip(ours.logits[:2], theirs.logits[:2], strict=True))
    found(f"{off:.1e} off eager", off=off)
    assert off <= 5e-2


def test_capture(model: Any, bundle: Bundle, place: Place, found: Found) -> None:
    """A step that its user captures, as torch's documentation has it."""
    ids = llama.make_prompt(model)
    expected = llama.answer_prompt(model, ids)[:, -llama.NEW :]
    with hubaoti.attach(model, bundle, trust=True, settings=place.settings) as attachment:
        before = attachment.stats()["eager"]
        answers = capture_steps(model, ids)
        eager = attachment.stats()["eager"] - before
    off = measure_error(answers, expected)
    found(f"{off:.1e} off eager, {eager} calls were the model's own", off=off, eager=eager)
    assert off <= 2e-2 and eager == 0


def capture_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of a prompt's last tokens, each by a replay."""
    start, cache = ids.shape[1] - llama.NEW, llama.make_cache(model)
    with torch.device(model.device), torch.no_grad():
        model(ids[:, :start], past_key_values=cache)
        token, place = ids[:, start : start + 1].clone(), torch.full((1, 1), start)
        seen = torch.zeros(1, 1, 1, llama.PLACES, dtype=torch.bool)

        def step() -> Any:
            seen.copy_((torch.arange(llama.PLACES) <= place)[None, None])
            words = {"attention_mask": seen, "position_ids": place, "past_key_values": cache}
            return model.model(token, **words).last_hidden_state

        def back() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(start)

        warm_up(step, back)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = step()
        back()
        found = []
        for index in range(start, ids.shape[1]):
            token.copy_(ids[:, index : index + 1])
            place.fill_(index)
            graph.replay()
            found.append(answer.clone())
    return torch.cat(found, 1)


def warm_up(step: Any, back: Any) -> None:
    """Take a step a few times, aside from the stream that is captured, as torch wants it."""
    stream: Any = torch.cuda.Stream
    aside = stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
            back()
    torch.cuda.current_stream().wait_stream(aside)
