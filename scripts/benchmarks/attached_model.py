"""What calls of a model cost whose blocks are attached, and what attaching one costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._inductor import aoti_load_package
from transformers.cache_utils import StaticCache

import hubaoti
from benchmarks.answers import require_same
from benchmarks.call_overhead import measure_call_overhead
from benchmarks.figures import Figure, divide_pairs, make_figure, time_in_turn
from benchmarks.held_memory import MEDIUM, ask_side, measure_quantized
from benchmarks.long_calls import measure_long_calls
from benchmarks.memory import measure_leaks, trim_heap
from benchmarks.models import ModelCase
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import find_regions
from hubaoti.compiler.capture import replace_forward
from hubaoti.progress import report_nothing
from hubaoti.settings import Settings

_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "max_position_embeddings": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}
# A block whose loops are over before a second thread has woken up.
_NARROW = {**_SMALL, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 2}
_NARROW |= {"num_key_value_heads": 1}
_FORWARD = {"task": "forward", "dims": {"batch": (1, 8), "seq": (1, 128)}}
_GENERATE = {
    "task": "generate",
    "dims": {"batch": (1, 4), "seq": (1, 128), "cache": (16, 1024)},
    "buckets": [{"seq": (1, 1)}, {"seq": (2, 128)}],
}
_ROW = 3  # calls of one side before the other's turn

Forwards = dict[str, Callable[..., Any]]  # what answers for a block, by its path


def _make_llama(kind: str, blocks: int, sizes: Any = _SMALL) -> transformers.LlamaConfig:
    """A Llama of so many blocks."""
    return transformers.LlamaConfig(architectures=[kind], num_hidden_layers=blocks, **sizes)


@dataclass(frozen=True)
class Sizes:
    """The models whose blocks are attached, and how much is asked of them."""

    narrow: ModelCase = ModelCase(_make_llama("LlamaModel", 12, _NARROW), _FORWARD)
    forward: ModelCase = ModelCase(_make_llama("LlamaModel", 12), _FORWARD)
    decoder: ModelCase = ModelCase(_make_llama("LlamaForCausalLM", 32), _GENERATE)
    quantized: ModelCase = MEDIUM
    filled: int = 100  # of the places of the cache in a decode step
    places: int = 256
    times: int = 1000  # attached and detached
    processes: int = 3  # of each kind, of which each says what it took


def bench_attach(
    scratch: Path, settings: Settings, rounds: int, sizes: Sizes | None = None
) -> Iterator[Figure]:
    """Calls over attached blocks, beside eager and beside other ways to call the same graphs."""
    sizes = sizes or Sizes()
    forward = sizes.forward.compile(scratch / "forward", settings)
    narrow = sizes.narrow.compile(scratch / "narrow", settings)
    folder = scratch / "decoder"
    decoder = sizes.decoder.compile(folder, settings)
    yield from measure_call_overhead(settings, scratch, rounds)
    yield from measure_long_calls(settings, scratch, rounds)
    yield from _measure_calls(sizes.narrow.make_model(), narrow, settings, rounds)
    yield from _measure_calls(sizes.forward.make_model(), forward, settings, rounds)
    sides = ("plain", "attached") * sizes.processes
    answers = [ask_side(side, folder, decoder, settings) for side in sides]
    plain, attached = answers[::2], answers[1::2]
    model = sizes.decoder.make_model()
    firsts = [each["attach_ms"] for each in attached]
    yield from _measure_attaching(model, decoder, settings, firsts, rounds)
    yield from _measure_decode_step(model, decoder, settings, sizes, rounds)
    yield from _measure_detaching(sizes.forward.make_model(), forward, settings, sizes.times)
    over = divide_pairs([each["peak"] for each in attached], [each["peak"] for each in plain])
    name = f"memory, {model.config.num_hidden_layers} blocks, attached to plain"
    yield make_figure("attach", name, over, "times", ("at most", 1.02))
    del model
    trim_heap()
    yield from measure_quantized(scratch, settings, sizes.quantized, sizes.processes)


def _measure_calls(model: Any, bundle: Bundle, settings: Settings, rounds: int) -> Iterator[Figure]:
    """A call of a stack of blocks, and of a model of them, with three kinds of blocks."""
    ids = torch.randint(0, model.config.vocab_size, (1, 2))
    whole = _repeat(lambda: model(ids, use_cache=False)[0])
    with torch.no_grad(), hubaoti.attach(model, bundle, strict=True, settings=settings):
        regions = {region.path: region for region in find_regions(model)}
        kinds: dict[str, Forwards] = {
            "eager": {path: region.eager for path, region in regions.items()},
            "attached": {**regions},
            "swapped": _swap_constants(bundle, model),
        }
        sides = {name: partial(_call_with, model, kind, whole) for name, kind in kinds.items()}
        for side in sides.values():
            require_same([side()], [sides["eager"]()])
        time_in_turn(sides, 2)
        spent = time_in_turn(sides, 8 * rounds)
        blocks = _repeat(_stack_blocks(model.base_model, ids))
        stack = {name: partial(_call_with, model, kind, blocks) for name, kind in kinds.items()}
        time_in_turn(stack, 2)
        alone = time_in_turn(stack, 8 * rounds)
    width = f"{len(regions)} of width {model.config.hidden_size}"
    for name, each in ((f"blocks, {width}, (1, 2)", alone), (f"a model of {width}", spent)):
        times = [seconds / _ROW * 1000 for seconds in each["attached"]]
        yield make_figure("attach", f"{name}, attached", times, "ms")
        for words, other, goal in (
            ("constants swapped at each call, to attached", "swapped", 2),
            ("eager to attached", "eager", 1.5),
        ):
            over = divide_pairs(each[other], each["attached"])
            yield make_figure("attach", f"{name}, {words}", over, "times", ("at least", goal))


def _stack_blocks(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The blocks of a model one after the other, and nothing else of it."""
    hidden = model.embed_tokens(ids)
    position = torch.arange(ids.shape[1])[None]
    tables = model.rotary_emb(hidden, position)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    options = {"attention_mask": mask, "position_embeddings": tables, "position_ids": position}
    options |= {"past_key_values": None, "use_cache": False}

    def run() -> torch.Tensor:
        states = hidden
        for block in model.layers:
            states = block(states, **options)
        return states  # type: ignore[no-any-return]

    return run


def _call_with(model: Any, forwards: Forwards, call: Callable[[], Any]) -> Any:
    """What a model answers while something else answers for its blocks."""
    with ExitStack() as around:
        for path, forward in forwards.items():
            around.enter_context(replace_forward(model.get_submodule(path), forward))
        return call()


def _repeat(call: Callable[[], Any]) -> Callable[[], Any]:
    """Some calls in a row; what the last one answers."""

    def run() -> Any:
        answers = [call() for _ in range(_ROW)]
        return answers[-1]

    return run


def _swap_constants(bundle: Bundle, model: torch.nn.Module) -> Forwards:
    """The blocks as `aokit` calls them: one model of torch's, and at each call other constants."""
    (entry,) = bundle.manifest.graphs
    package = aoti_load_package(str(bundle.path / entry.file))
    forwards = {}
    for path in entry.modules:
        constants = dict(model.get_submodule(path).named_parameters())

        def forward(*args: Any, _constants: Any = constants, **kwargs: Any) -> Any:
            names = package.get_constant_fqns()
            theirs = {name: each for name, each in _constants.items() if name in names}
            package.load_constants(theirs, check_full_update=False, user_managed=True)
            mask = kwargs["attention_mask"]
            if mask is None:
                seq = args[0].shape[1]
                mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).tril()
            return package(args[0], mask, *kwargs["position_embeddings"])[0]

        forwards[path] = forward
    return forwards


def _measure_attaching(
    model: Any, bundle: Bundle, settings: Settings, firsts: list[float], rounds: int
) -> Iterator[Figure]:
    """How long it takes to attach a model whose graphs are in the mirror."""
    name = f"attach, {model.config.num_hidden_layers} blocks, graphs in the mirror"
    yield make_figure("attach", f"{name}, first in a process", firsts, "ms")
    artifact = api.get_artifact(bundle, False, settings, report_nothing)
    spent = []
    for _ in range(2 + 3 * rounds):
        start = time.perf_counter()
        attachment = hubaoti.attach(model, artifact, settings=settings)
        spent.append((time.perf_counter() - start) * 1000)
        attachment.detach()
    yield make_figure("attach", name, spent[2:], "ms", ("at most", 50))


def _measure_decode_step(
    model: Any, bundle: Bundle, settings: Settings, sizes: Sizes, rounds: int
) -> Iterator[Figure]:
    """One token of one text over a static cache."""
    sides: dict[str, Callable[[], Any]] = {}
    with ExitStack() as around, torch.no_grad():
        for side in ("eager", "attached"):
            cache = StaticCache(config=model.config, max_cache_len=sizes.places)
            ids = torch.arange(sizes.filled)[None]
            model(ids[:, :-1], past_key_values=cache)
            sides[side] = partial(_repeat_token, model, ids[:, -1:], cache, sizes.filled - 1)
            if side == "eager":
                graphs = hubaoti.attach(model, bundle, strict=True, settings=settings)
                around.enter_context(graphs)
        own = {region.path: region.eager for region in find_regions(model)}
        both: dict[str, Callable[[], Any]] = {
            "eager": partial(_call_with, model, own, sides["eager"]),
            "attached": sides["attached"],
        }
        require_same([both["attached"]()], [both["eager"]()])
        time_in_turn(both, 2)
        spent = time_in_turn(both, 6 * rounds)
    over = divide_pairs(spent["eager"], spent["attached"])
    blocks = model.config.num_hidden_layers
    name = f"decode, {blocks} blocks, {sizes.filled} of {sizes.places} filled"
    yield make_figure("attach", name, [t * 1000 for t in spent["attached"]], "ms")
    yield make_figure("attach", f"{name}, eager over attached", over, "times", ("at least", 1.3))


def _repeat_token(model: Any, ids: torch.Tensor, cache: Any, before: int) -> torch.Tensor:
    """The last token again: the cache is set back to what was before it."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(before)
    return model(ids, past_key_values=cache).logits  # type: ignore[no-any-return]


def _measure_detaching(
    model: Any, bundle: Bundle, settings: Settings, times: int
) -> Iterator[Figure]:
    """What is left of a model that is attached, called and detached a thousand times."""
    artifact = api.get_artifact(bundle, False, settings, report_nothing)
    ids = torch.arange(3)[None]

    def once() -> None:
        with hubaoti.attach(model, artifact, strict=True, settings=settings):
            model(ids, use_cache=False)

    with torch.no_grad():
        yield from measure_leaks("attach", f"{times} times attached and detached", once, times)
