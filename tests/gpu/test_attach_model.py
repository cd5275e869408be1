"""An attached model of 32 blocks: answers, generate, time and memory beside eager; streams.

Answers are compared with float32 eager of the same weights, beside those of eager in the model's
own dtype; on a CPU, where everything is float32, with float64.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hubaoti
from gpu import llama
from gpu.conftest import Found
from gpu.errors import FLOOR, TIMES
from gpu.llama import NEW, answer_prompt, bind_step, make_config, make_model, make_prompt
from gpu.measure import ALONE, Peak, measure_error, stopwatch, time_calls
from gpu.place import Place, describe
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import Attachment, find_regions
from hubaoti.settings import Settings

SPARE = 1 << 20  # bytes that attaching, or a call of what is attached, may take above eager's

_GREEDY: dict[str, Any] = {**llama.GREEDY, "max_new_tokens": NEW}


@dataclass
class Attached:
    """A model and its graphs, which a check may take away for a while."""

    model: Any
    bundle: Bundle
    settings: Settings
    attachment: Attachment

    def attach(self) -> None:
        """Attach the graphs, strictly."""
        bundle, settings = self.bundle, self.settings
        self.attachment = hubaoti.attach(
            self.model, bundle, strict=True, trust=True, settings=settings
        )

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Inside the block the model answers itself; afterwards the graphs are attached anew."""
        self.attachment.detach()
        yield
        self.attach()


@pytest.fixture(scope="module")
def bundle(place: Place) -> Bundle:
    """The blocks, compiled once."""
    return place.get_bundle("model", llama.compile_model)


@pytest.fixture(scope="module")
def offline(place: Place) -> Settings:
    """A home of its own; nothing is fetched."""
    return place.settings


@pytest.fixture(scope="module")
def model(device: torch.device, bundle: Bundle) -> Any:
    """A list of one model, so that the last check can let go of it."""
    return [make_model(device, make_config(device))]


@pytest.fixture
def attached(model: Any, bundle: Bundle, offline: Settings) -> Iterator[Attached]:
    """The model with its graphs, for one check."""
    attachment = hubaoti.attach(model[0], bundle, strict=True, trust=True, settings=offline)
    found = Attached(model[0], bundle, offline, attachment)
    yield found
    found.attachment.detach()


def test_built(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts)


def test_attach(model: Any, bundle: Bundle, offline: Settings, found: Found) -> None:
    """The graphs of all blocks are bound; weights are not copied."""
    device = model[0].device
    peak = Peak.of(device) if device.type == "cuda" else None
    with stopwatch() as first:
        hubaoti.attach(model[0], bundle, strict=True, trust=True, settings=offline).detach()
    with stopwatch() as again:
        attachment = hubaoti.attach(model[0], bundle, strict=True, trust=True, settings=offline)
    taken, blocks = peak.bytes if peak else 0, len(attachment.regions)
    with stopwatch() as called:
        answer_prompt(model[0], make_prompt(model[0]), new=1)
        if peak:
            torch.cuda.synchronize(device)
    attachment.detach()
    said = f"{blocks} blocks in {again[0]:.1f} ms, and the first two calls {called[0]:.1f} ms"
    facts: dict[str, Any] = {"first_ms": first[0], "ms": again[0], "calls_ms": called[0]}
    found(said, blocks=blocks, **facts, bytes=taken if peak else None)
    assert taken <= SPARE, f"attaching took {taken} bytes on the device"
    assert blocks == len(model[0].model.layers)


def test_answer(attached: Attached, device: torch.device, found: Found) -> None:
    """A prompt's last hidden states and those of tokens after it, beside eager's and float32's."""
    model = attached.model
    ids = make_prompt(model, 2)
    ours, stats = answer_prompt(model, ids), attached.attachment.stats()
    with attached.without_graphs():
        theirs = answer_prompt(model, ids)
        exact = copy.deepcopy(model)
    exact = exact.float() if device.type == "cuda" else exact.double()
    expected = answer_prompt(exact, ids)
    del exact
    said, facts = compare_answers(ours, theirs, expected)
    found(said, **facts, stats=stats)
    require_answers(said, facts, device)
    assert stats["eager"] == 0 and stats["compiled"] == len(model.model.layers) * (NEW + 1)


def compare_answers(
    ours: torch.Tensor, theirs: torch.Tensor, expected: torch.Tensor
) -> tuple[str, dict[str, float]]:
    """How far both sides are off, and how often the largest number is the same one."""
    errors = {"attached": measure_error(ours, expected), "eager": measure_error(theirs, expected)}
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    said = f"{errors['attached']:.1e} off, eager {errors['eager']:.1e}, {same:.1%} alike"
    return said, errors | {"same_words": same}


def require_answers(said: str, facts: dict[str, float], device: torch.device) -> None:
    """Fail where graphs are further off than eager of the same dtype may be."""
    allowed = TIMES * facts["eager"] + FLOOR[llama.choose_dtype(device)]
    assert facts["attached"] <= allowed, said
    if device.type == "cpu":
        assert facts["same_words"] == 1, said
        assert 0 < facts["attached"] < 1e-5 and 0 < facts["eager"] < 1e-5, said


def test_other_answers_fail(attached: Attached, device: torch.device) -> None:
    ids = make_prompt(attached.model, 2)
    ours = answer_prompt(attached.model, ids)
    said, facts = compare_answers(ours + 1, ours, ours.double() * (1 + 1e-6))
    with pytest.raises(AssertionError, match="off, eager"):
        require_answers(said, facts, device)


def test_generate(attached: Attached, device: torch.device, found: Found) -> None:
    """`generate` as anybody calls it: time a token, and what it takes on the device at most."""
    ids = make_prompt(attached.model)
    facts = {"attached": generate(attached.model, ids)}
    with attached.without_graphs():
        facts["eager"] = generate(attached.model, ids)
    tokens = {side: each.pop("tokens") for side, each in facts.items()}
    same = (tokens["attached"] == tokens["eager"]).float().mean().item()
    ratio = facts["eager"]["ms"] / facts["attached"]["ms"]
    said = f"{facts['attached']['ms']:.2f} ms a token, eager {ratio:.2f} times as long"
    if device.type == "cuda":
        peaks = [facts[side]["bytes"] / 1e6 for side in ("attached", "eager")]
        said += f"; at most {peaks[0]:.1f} MB above the model, eager {peaks[1]:.1f}"
    found(said, **facts, same_words=same)
    if device.type == "cpu":
        assert same == 1, f"only {same:.0%} of the words are eager's"
    else:
        assert facts["attached"]["bytes"] <= facts["eager"]["bytes"] + SPARE, said


def generate(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """One side's tokens, milliseconds a token, and most bytes."""
    cuda = model.device.type == "cuda"
    model.generate(ids, **_GREEDY)
    peak = Peak.of(model.device) if cuda else None
    with stopwatch() as spent:
        tokens = model.generate(ids, **_GREEDY)
        if cuda:
            torch.cuda.synchronize(model.device)
    return {"tokens": tokens, "ms": spent[0] / NEW, "bytes": peak.bytes if peak else None}


def bypass_graphs(model: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call in which the blocks of an attached model answer themselves."""
    regions = [*find_regions(model)]

    def run() -> Any:
        for region in regions:
            region.inside.module.forward = region.eager
        try:
            return call()
        finally:
            for region in regions:
                region.inside.module.forward = region

    return run


def test_step(attached: Attached, device: torch.device, found: Found) -> None:
    """One token over a cache that is filled in part, the device idle before."""
    step = bind_step(attached.model)
    calls = {"attached": step, "eager": bypass_graphs(attached.model, step)}
    off = measure_error(calls["attached"](), calls["eager"]())
    assert off <= 0.1, f"the sides are {off:.1e} apart"
    times = time_calls(device, calls, pace=ALONE)
    ours, theirs = (times[side]["median"] for side in ("attached", "eager"))
    found(f"{ours:.2f} ms, eager {theirs / ours:.2f} times as long", times=times)
    assert {*times} == {"attached", "eager"}


@pytest.mark.gpu("a CPU has no streams")
def test_streams(attached: Attached, device: torch.device, found: Found) -> None:
    """The same prompts on several streams at once, none waited for before the end."""
    model, stream = attached.model, torch.cuda.Stream
    prompts = [make_prompt(model, rows) for rows in (1, 2, 3, 4)]
    expected = [answer_prompt(model, ids) for ids in prompts]
    streams = [stream(model.device) for _ in prompts]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(model.device)
    answers = []
    for index in range(3 * len(prompts)):
        which = index % len(prompts)
        with torch.cuda.stream(streams[which]):
            answers.append((which, answer_prompt(model, prompts[which])))
    torch.cuda.synchronize(model.device)
    errors = [measure_error(ours, expected[which]) for which, ours in answers]
    said = f"{len(answers)} answers on {len(streams)} streams, {max(errors):.1e} off"
    found(said, streams=len(streams), errors=errors)
    assert max(errors) <= FLOOR[llama.choose_dtype(device)], said


@pytest.mark.gpu("there is no second GPU")
def test_second(bundle: Bundle, device: torch.device, offline: Settings, found: Found) -> None:
    """The same artifact over a model on the second device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    index = ((device.index or 0) + 1) % torch.cuda.device_count()
    model = make_model(torch.device("cuda", index), make_config(device))
    ids = make_prompt(model)
    expected = answer_prompt(model, ids)
    with hubaoti.attach(model, bundle, strict=True, trust=True, settings=offline):
        off = measure_error(answer_prompt(model, ids), expected)
    found(f"{off:.1e} off on {model.device}", off=off)
    assert off <= 0.1


def test_detach(model: Any, bundle: Bundle, offline: Settings, found: Found) -> None:
    """Everything is given back: the model's answers, and its memory when it is gone."""
    last = model.pop()
    attachment = hubaoti.attach(last, bundle, strict=True, trust=True, settings=offline)
    ids = make_prompt(last)
    answer_prompt(last, ids)
    attachment.detach()
    plain, again = answer_prompt(last, ids), answer_prompt(last, ids)
    assert torch.equal(plain, again), "two answers of the plain model differ"
    size, device = sum(each.nbytes for each in last.parameters()), last.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    del last, attachment
    gc.collect()
    if device.type == "cpu":
        found("the model answers itself again")
        return
    freed = before - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    found(f"{freed / 1e6:.0f} MB came back", bytes=size, freed=freed)
    assert freed >= size, f"of {size / 1e6:.0f} MB of weights {freed / 1e6:.0f} came back"
