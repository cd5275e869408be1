"""What calls of attached blocks cost in a model, and what attaching one costs."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from calling import calls_of_a_block
from decoding import kilobytes
from figures import Figure, figure, in_turn, ratios
from recording import Asked, require_same
from torch._inductor import aoti_load_package
from transformers.cache_utils import StaticCache
from weighing import MEDIUM, bench_quantized, peak_memory, told_by

import hubaoti
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import find_regions
from hubaoti.compiler.capture import replace_forward
from hubaoti.settings import Settings

KINDS = ("fd", "task")  # what the kernel lists of this process
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "max_position_embeddings": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}
# A block whose loops are over before a second thread has woken up.
NARROW = {**SMALL, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 2,
          "num_key_value_heads": 1}  # fmt: skip
FORWARD = {"task": "forward", "dims": {"batch": (1, 8), "seq": (1, 128)}}
GENERATE = {
    "task": "generate",
    "dims": {"batch": (1, 4), "seq": (1, 128), "cache": (16, 1024)},
    "buckets": [{"seq": (1, 1)}, {"seq": (2, 128)}],
}
# Of another process the sources are known: it attached a model of the same code before.
FIRST = """
import time, torch, transformers, hubaoti
from pathlib import Path
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings
config = transformers.AutoConfig.from_pretrained({folder!r})
model = transformers.LlamaForCausalLM(config).eval()
bundle = Bundle.read(Path({bundle!r}))
settings = Settings(home=Path({home!r}), endpoint="http://127.0.0.1:9")
start = time.perf_counter()
hubaoti.attach(model, bundle, settings=settings)
print((time.perf_counter() - start) * 1000)
"""


def llama(kind: str, blocks: int, sizes: Any = SMALL) -> transformers.LlamaConfig:
    """A Llama of so many blocks."""
    return transformers.LlamaConfig(architectures=[kind], num_hidden_layers=blocks, **sizes)


@dataclass(frozen=True)
class Sizes:
    """The models whose blocks are attached, and how much is asked of them."""

    narrow: Asked = Asked(llama("LlamaModel", 12, NARROW), FORWARD)
    forward: Asked = Asked(llama("LlamaModel", 12), FORWARD)
    decoder: Asked = Asked(llama("LlamaForCausalLM", 32), GENERATE)
    quantized: Asked = MEDIUM
    filled: int = 100  # of the places of the cache in a decode step
    places: int = 256
    times: int = 1000  # attached and detached
    processes: int = 3  # of each kind, of which each says what it took


def bench_attach(
    scratch: Path, settings: Settings, rounds: int, sizes: Sizes | None = None
) -> Iterator[Figure]:
    """Calls over attached blocks, beside eager and beside other ways to call the same graphs."""
    sizes = sizes or Sizes()
    forward = sizes.forward.compiled(scratch / "forward", settings)
    narrow = sizes.narrow.compiled(scratch / "narrow", settings)
    folder = scratch / "decoder"
    decoder = sizes.decoder.compiled(folder, settings)
    yield from calls_of_a_block(settings, scratch, rounds)
    yield from in_a_model(sizes.narrow.model(), narrow, settings, rounds)
    yield from in_a_model(sizes.forward.model(), forward, settings, rounds)
    model = sizes.decoder.model()
    firsts = [first_in_a_process(folder, decoder, settings) for _ in range(sizes.processes)]
    yield from seconds_to_attach(model, decoder, settings, firsts, rounds)
    yield from decode_step(model, decoder, settings, sizes, rounds)
    yield from again_and_again(sizes.forward.model(), forward, settings, sizes.times)
    del model
    ctypes.CDLL(None).malloc_trim(0)
    yield peak_memory(folder, decoder, settings, sizes.processes)
    yield from bench_quantized(scratch, settings, sizes.quantized, sizes.processes)


def in_a_model(model: Any, bundle: Bundle, settings: Settings, rounds: int) -> Iterator[Figure]:
    """A call of a block, and of a model of blocks, in three ways."""
    ids = torch.randint(0, model.config.vocab_size, (1, 2))
    ask = many(lambda: model(ids, use_cache=False)[0], 3)
    with torch.no_grad(), hubaoti.attach(model, bundle, strict=True, settings=settings):
        regions = {region.path: region for region in find_regions(model)}
        ways: dict[str, dict[str, Callable[..., Any]]] = {
            "eager": {path: region.eager for path, region in regions.items()},
            "attached": {**regions},
            "swapped": swapped(bundle, model),
        }
        sides = {name: partial(by, model, way, ask) for name, way in ways.items()}
        for side in sides.values():
            require_same(side(), sides["eager"]())
        in_turn(sides, 2)
        spent = in_turn(sides, 8 * rounds)
        blocks = many(stacked(model.base_model, ids), 3)
        stack = {name: partial(by, model, way, blocks) for name, way in ways.items()}
        in_turn(stack, 2)
        alone = in_turn(stack, 8 * rounds)
    width = f"{len(regions)} of width {model.config.hidden_size}"
    for name, each in ((f"blocks, {width}, (1, 2)", alone), (f"a model of {width}", spent)):
        yield from sides_of(name, each)


def stacked(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The blocks of a model one after the other, and nothing else of it."""
    hidden = model.embed_tokens(ids)
    position = torch.arange(ids.shape[1])[None]
    tables = model.rotary_emb(hidden, position)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    words = {"attention_mask": mask, "position_embeddings": tables, "position_ids": position}
    words |= {"past_key_values": None, "use_cache": False}

    def run() -> torch.Tensor:
        states = hidden
        for block in model.layers:
            states = block(states, **words)
        return states  # type: ignore[no-any-return]

    return run


def sides_of(name: str, spent: dict[str, list[float]]) -> Iterator[Figure]:
    """The figures of three calls by each side."""
    times = [t / 3 * 1000 for t in spent["attached"]]
    yield figure("attach", f"{name}, attached", times, "ms")
    yield figure("attach", f"{name}, constants swapped at each call, to attached",
                 ratios(spent["swapped"], spent["attached"]), "times", ("at least", 2))  # fmt: skip
    yield figure("attach", f"{name}, eager to attached",
                 ratios(spent["eager"], spent["attached"]), "times", ("at least", 1.5))  # fmt: skip


def by(model: Any, ways: dict[str, Callable[..., Any]], ask: Callable[[], Any]) -> Any:
    """What a model answers while something else answers for its blocks."""
    with ExitStack() as around:
        for path, way in ways.items():
            around.enter_context(replace_forward(model.get_submodule(path), way))
        return ask()


def many(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """Some calls in a row; what the last one answers."""

    def run() -> Any:
        answers = [call() for _ in range(times)]
        return answers[-1]

    return run


def swapped(bundle: Bundle, model: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """The blocks as `aokit` calls them: one model of torch's, and at each call other constants."""
    (entry,) = bundle.manifest.graphs
    loaded = aoti_load_package(str(bundle.path / entry.file))
    ways = {}
    for path in entry.modules:
        constants = dict(model.get_submodule(path).named_parameters())

        def forward(*args: Any, _constants: Any = constants, **kwargs: Any) -> Any:
            names = loaded.get_constant_fqns()
            theirs = {name: each for name, each in _constants.items() if name in names}
            loaded.load_constants(theirs, check_full_update=False, user_managed=True)
            mask = kwargs["attention_mask"]
            if mask is None:
                seq = args[0].shape[1]
                mask = torch.ones(1, 1, seq, seq, dtype=torch.bool).tril()
            return loaded(args[0], mask, *kwargs["position_embeddings"])[0]

        ways[path] = forward
    return ways


def first_in_a_process(folder: Path, bundle: Bundle, settings: Settings) -> float:
    """The milliseconds of the first attach of another process, to a model of the same config."""
    places = {"folder": str(folder), "home": str(settings.home), "bundle": str(bundle.path)}
    return told_by(FIRST.format(**places), folder)


def seconds_to_attach(
    model: Any, bundle: Bundle, settings: Settings, firsts: list[float], rounds: int
) -> Iterator[Figure]:
    """How long it takes to attach a model whose graphs are in the mirror."""
    name = f"attach, {model.config.num_hidden_layers} blocks, graphs in the mirror"
    yield figure("attach", f"{name}, first in a process", firsts, "ms")
    artifact = api.get_artifact(bundle, False, settings, lambda step: None)
    spent = []
    for _ in range(2 + 3 * rounds):
        start = time.perf_counter()
        attachment = hubaoti.attach(model, artifact, settings=settings)
        spent.append((time.perf_counter() - start) * 1000)
        attachment.detach()
    yield figure("attach", name, spent[2:], "ms", ("at most", 50))


def decode_step(
    model: Any, bundle: Bundle, settings: Settings, sizes: Sizes, rounds: int
) -> Iterator[Figure]:
    """One token of one text over a static cache."""
    sides: dict[str, Callable[[], Any]] = {}
    with ExitStack() as around, torch.no_grad():
        for side in ("eager", "attached"):
            cache = StaticCache(config=model.config, max_cache_len=sizes.places)
            ids = torch.arange(sizes.filled)[None]
            model(ids[:, :-1], past_key_values=cache)
            sides[side] = partial(step, model, ids[:, -1:], cache, sizes.filled - 1)
            if side == "eager":
                graphs = hubaoti.attach(model, bundle, strict=True, settings=settings)
                around.enter_context(graphs)
        own = {region.path: region.eager for region in find_regions(model)}
        both = {"eager": partial(by, model, own, sides["eager"]), "attached": sides["attached"]}
        require_same(both["attached"](), both["eager"]())
        in_turn(both, 2)
        spent = in_turn(both, 6 * rounds)
    over = ratios(spent["eager"], spent["attached"])
    blocks = model.config.num_hidden_layers
    name = f"decode, {blocks} blocks, {sizes.filled} of {sizes.places} filled"
    yield figure("attach", name, [t * 1000 for t in spent["attached"]], "ms")
    yield figure("attach", f"{name}, eager over attached", over, "times", ("at least", 1.3))


def step(model: Any, ids: torch.Tensor, cache: Any, before: int) -> torch.Tensor:
    """The last token again: the cache is set back to what was before it."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(before)
    return model(ids, past_key_values=cache).logits  # type: ignore[no-any-return]


def again_and_again(model: Any, bundle: Bundle, settings: Settings, times: int) -> Iterator[Figure]:
    """What is left of a model that is attached, called and detached a thousand times."""
    artifact = api.get_artifact(bundle, False, settings, lambda step: None)
    ids = torch.arange(3)[None]
    held: list[tuple[int, int, int]] = []
    with torch.no_grad():
        for at in range(times + 1):
            with hubaoti.attach(model, artifact, strict=True, settings=settings):
                model(ids, use_cache=False)
            if at in {times // 20, times}:
                files, threads = (len([*Path("/proc/self", each).iterdir()]) for each in KINDS)
                held.append((files, threads, kilobytes("VmRSS")))
    name = f"{times} times attached and detached"
    grown = [after - before for before, after in zip(*held, strict=True)]
    yield figure("attach", f"{name}, files and threads more", [grown[0] + grown[1]], "",
                 ("at most", 0))  # fmt: skip
    yield figure("attach", f"{name}, memory more", [grown[2] / 1000], "MB", ("at most", 20))
