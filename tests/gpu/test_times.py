"""Times beside eager and `torch.compile`, in turn in one process: blocks of a Llama, and of FLUX.

Models are called as their users call them. `torch.compile` is given the blocks one by one, as
`compile_repeated_blocks` does, since a model's blocks are then compiled once; with every mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import hubaoti
from gpu import flux, llama
from gpu.conftest import Found
from gpu.measure import Pace, measure_error, time_calls
from gpu.place import Place
from gpu.test_blocks import FORMS
from hubaoti.artifact.bundle import Bundle

pytestmark = pytest.mark.gpu  # with --device cpu on a CPU, too: it takes a minute

_PACE = Pace(3, 15)
_PREFILL = 4096  # tokens of one row


@dataclass(frozen=True, slots=True)
class Race:
    """What is timed: a model, its attached bundles by their attention, and the other sides."""

    name: str
    kind: str  # llama or flux
    mode: str


RACES = (
    Race("time-prefill", "llama", "default"),
    Race("time-flux", "flux", "default"),
    Race("autotune-prefill", "llama", "max-autotune-no-cudagraphs"),
    Race("autotune-flux", "flux", "max-autotune-no-cudagraphs"),
)
FLUX = {
    "flux": {},
    "flux-fa3": {"attention": "fa3"},
    "flux-float8dq": {"quantize": "float8dq"},
}


def list_cases(every: bool) -> tuple[Race, ...]:
    """On a CPU FLUX stands for both."""
    return RACES if every else RACES[1:2]


def compile_named(place: Place, name: str) -> Bundle:
    """A bundle of those that are raced; skips what cannot be had."""
    if name in FLUX:
        words = {**FLUX[name]}
        words |= place.require_attention(words.get("attention", "sdpa"))
        return flux.compile_flux(place, name, **words)
    return next(form for form in FORMS if form.name == name).compile(place)


def list_names(case: Race, place: Place) -> tuple[str, ...]:
    """The bundles that take part."""
    if case.kind == "llama":
        return ("block-plain", "prompt-fa3")
    return tuple(FLUX) if place.is_gpu else ("flux",)


@pytest.fixture(scope="module")
def bundles(case: Race, place: Place) -> dict[str, Bundle]:
    """Those that are here, or can be made."""
    found = {}
    for name in list_names(case, place):
        try:
            found[name] = place.get_bundle(name, partial(compile_named, name=name))
        except pytest.skip.Exception:
            continue  # the table has the sides that there are
    return found


@pytest.fixture(scope="module")
def call(case: Race, place: Place) -> tuple[Any, Callable[[Any], Any]]:
    """A model, and how it is called."""
    if case.kind == "llama":
        model = llama.make_model(place.device, llama.make_config(place.device, 2))
        ids = llama.make_prompt(model, 1, _PREFILL if place.is_gpu else 64)
        return model, lambda of: llama.answer_at_once(of, ids)
    model = flux.make_flux(place.device)
    words, side = (flux.WORDS, flux.PATCHES) if place.is_gpu else (8, 4)
    given = flux.make_inputs(model, 1, words, side)
    return model, lambda of: flux.answer(of, given)


@pytest.fixture(scope="module")
def sides(
    bundles: dict[str, Bundle], call: tuple[Any, Callable[[Any], Any]], place: Place
) -> dict[str, Any]:
    """The model, and for each bundle one that it is attached to."""
    model, _ = call
    found: dict[str, Any] = {"eager": model}
    for name, bundle in bundles.items():
        found[name] = copy.deepcopy(model)
        hubaoti.attach(
            found[name],
            bundle,
            strict=True,
            trust=True,
            quantize=bundle.manifest.recipe.quantization is not None,
            settings=place.settings,
        )
    return found


def test_beside_eager(
    sides: dict[str, Any],
    call: tuple[Any, Callable[[Any], Any]],
    place: Place,
    found: Found,
) -> None:
    """Milliseconds of each side, and how far its answer is off eager's."""
    race(sides, call, place, found)


def test_beside_compile(
    sides: dict[str, Any],
    call: tuple[Any, Callable[[Any], Any]],
    case: Race,
    place: Place,
    found: Found,
) -> None:
    """The same with `torch.compile` among them, which may take longer than there is time."""
    compiled = {f"torch.compile {case.mode}": compile_side(call[0], case, place)}
    race({**sides, **compiled}, call, place, found)


def race(
    sides: dict[str, Any], call: tuple[Any, Callable[[Any], Any]], place: Place, found: Found
) -> None:
    """Have all sides answer, then time them in turn; one that cannot must not hide the rest."""
    model, run = call
    expected, lost = run(model), dict[str, str]()
    off: dict[str, float] = {}
    for name, side in sides.items():
        try:
            off[name] = measure_error(run(side), expected)
        except Exception as error:
            lost[name] = f"{type(error).__name__}: {error}"
    calls = {name: partial(run, side) for name, side in sides.items() if name in off}
    timed = time_calls(place.device, calls, pace=_PACE)
    times = {name: each["median"] for name, each in timed.items()}
    facts: dict[str, Any] = {"times": times, "off": off, "lost": lost}
    if place.is_gpu:
        facts["products_ms"] = time_products(model, run)
    found(word_times(times, facts.get("products_ms")), **facts)
    assert not [name for name in lost if "torch.compile" not in name], f"{lost}"
    assert all(each <= 0.1 for name, each in off.items() if "float8" not in name), f"{off}"


def compile_side(model: Any, case: Race, place: Place) -> Any:
    """The model again, each of its blocks compiled by torch; on a CPU nothing is generated."""
    again = copy.deepcopy(model)
    torch._dynamo.reset()
    blocks = again.model.layers if case.kind == "llama" else flux.list_blocks(again)
    for block in blocks:
        if place.is_gpu:
            block.compile(mode=case.mode, dynamic=False)
        else:
            block.compile(backend="eager", dynamic=False)
    return again


@contextmanager
def record_products(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The operands of each Linear of a model's blocks that is called inside."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: seen.append((args[0].flatten(0, -2), module.weight))
        )
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def time_products(model: Any, run: Callable[[Any], Any]) -> float:
    """Milliseconds of a call's Linears alone, by torch: attention is left out."""
    with record_products(model) as seen:
        run(model)
    outputs = [torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device) for x, w in seen]

    def multiply() -> None:
        for (x, w), out in zip(seen, outputs, strict=True):
            torch.mm(x, w.T, out=out)

    return time_calls(model.device, {"products": multiply}, pace=_PACE)["products"]["median"]


def word_times(times: dict[str, float], products: float | None) -> str:
    """The times, eager's as a multiple of each, and the least that there is."""
    words = [f"eager {times['eager']:.2f} ms"]
    for name, each in times.items():
        if name != "eager":
            words.append(f"{name} {each:.2f} ({times['eager'] / each:.2f} x)")
    if products:
        others = [each for name, each in times.items() if name != "eager"]
        best = f", of which the best is {min(others) / products:.2f}" if others else ""
        words.append(f"its Linears alone {products:.2f}{best}")
    return ", ".join(words)
