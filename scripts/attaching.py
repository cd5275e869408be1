"""What a call costs: of a block's graph, of blocks in a model; what attaching one costs."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from decoding import kilobytes
from figures import Figure, figure, in_turn, ratios
from recording import apart, shaken
from torch import nn
from torch._inductor import aoti_load_package
from transformers.cache_utils import StaticCache
from weighing import bench_quantized

import hubaoti
from hubaoti import api
from hubaoti.bundle import Bundle
from hubaoti.compiler.calls import replaced
from hubaoti.runtime.attach import regions_in
from hubaoti.runtime.threads import in_one
from hubaoti.settings import Settings

BLOCKS, DECODER_BLOCKS = 12, 32
CALLS = 400  # of one side before the other's turn
ROUNDS = 1000
KINDS = ("fd", "task")  # what the kernel lists of this process
FILLED, PLACES = 100, 256  # of the cache in a decode step
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
PEAK = """
import sys, torch, hubaoti
from pathlib import Path
from attaching import config, text
from decoding import kilobytes
from hubaoti.bundle import Bundle
from hubaoti.settings import Settings
import transformers
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config({blocks})).eval()
if {attached}:
    settings = Settings(home=Path({home!r}), endpoint="http://127.0.0.1:9")
    attachment = hubaoti.attach(model, Bundle.read(Path({bundle!r})), settings=settings)
text(model)
if {attached}:
    assert attachment.stats()["eager"] == 0, attachment.stats()
print(kilobytes("VmHWM"))
"""

# Of another process the sources are known: it attached a model of the same code before.
FIRST = """
import time, torch, transformers, hubaoti
from pathlib import Path
from hubaoti.bundle import Bundle
from hubaoti.settings import Settings
config = transformers.LlamaConfig(num_hidden_layers={blocks}, **{sizes})
model = transformers.LlamaForCausalLM(config).eval()
bundle = Bundle.read(Path({bundle!r}))
settings = Settings(home=Path({home!r}), endpoint="http://127.0.0.1:9")
start = time.perf_counter()
hubaoti.attach(model, bundle, settings=settings)
print((time.perf_counter() - start) * 1000)
"""


def config(blocks: int, sizes: Mapping[str, Any] = SMALL) -> transformers.LlamaConfig:
    """A Llama of so many blocks."""
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], num_hidden_layers=blocks, **sizes
    )


def bench_attach(scratch: Path, rounds: int) -> Iterator[Figure]:
    """Calls over attached blocks, beside eager and beside other ways to call the same graphs."""
    settings = Settings(home=scratch / "attach-home", endpoint="http://127.0.0.1:9")
    make = partial(compiled, scratch, settings)
    dims = {"batch": (1, 8), "seq": (1, 128)}
    forward = make("forward", config(BLOCKS), dims=dims)
    narrow = make("forward", config(BLOCKS, NARROW), dims=dims)
    decoder = make("generate", config(DECODER_BLOCKS),
                   dims={"batch": (1, 4), "seq": (1, 128), "cache": (16, 1024)},
                   buckets=[{"seq": (1, 1)}, {"seq": (2, 128)}])  # fmt: skip
    yield from calls_of_a_block(settings, scratch, rounds)
    yield from in_a_model(narrow, NARROW, settings, rounds)
    yield from in_a_model(forward, SMALL, settings, rounds)
    model = shaken(transformers.LlamaForCausalLM(config(DECODER_BLOCKS)))
    yield from seconds_to_attach(model, decoder, settings, scratch, rounds)
    yield from decode_step(model, decoder, settings, rounds)
    yield from again_and_again(forward, settings)
    del model
    ctypes.CDLL(None).malloc_trim(0)
    yield peak_memory(decoder, settings, scratch)
    yield from bench_quantized(settings, scratch)


def compiled(
    scratch: Path, settings: Settings, task: str, config: transformers.LlamaConfig, **asked: Any
) -> Bundle:
    """The graphs of a Llama."""
    folder = scratch / f"attach-{task}-{config.hidden_size}"
    if task == "forward":
        config.architectures = ["LlamaModel"]
    config.save_pretrained(folder)
    output = scratch / f"{folder.name}-bundle"
    return api.compile(folder, output, task=task, settings=settings, **asked)


def in_a_model(
    bundle: Bundle, sizes: Mapping[str, Any], settings: Settings, rounds: int
) -> Iterator[Figure]:
    """A call of a block, and of a model of blocks, in three ways."""
    model = shaken(transformers.LlamaModel(config(BLOCKS, sizes)))
    ids = torch.randint(0, sizes["vocab_size"], (1, 2))
    ask = many(lambda: model(ids, use_cache=False)[0], 3)
    with torch.no_grad(), hubaoti.attach(model, bundle, strict=True, settings=settings):
        regions = {region.path: region for region in regions_in(model)}
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
        stack = {name: partial(by, model, way, many(stacked(model, ids), 3))
                 for name, way in ways.items()}  # fmt: skip
        in_turn(stack, 2)
        alone = in_turn(stack, 8 * rounds)
    width = f"{BLOCKS} of width {sizes['hidden_size']}"
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
            around.enter_context(replaced(model.get_submodule(path), way))
        return ask()


def many(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """Some calls in a row; what the last one answers."""

    def run() -> Any:
        answers = [call() for _ in range(times)]
        return answers[-1]

    return run


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two sides that are measured must answer alike."""
    if apart([found], [expected]) > 1e-4:
        raise SystemExit("the sides answer differently")


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


class Scale(nn.Module):
    """One constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Block(nn.Module):
    """As many inputs and constants as a decoder's block has, and next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Sequential(*(Scale() for _ in range(9)))

    def forward(  # noqa: PLR0913 - as many as a block's
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor,
        *,
        tables: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        position: torch.Tensor,
        use_cache: bool = True,
    ) -> torch.Tensor:
        mixed = hidden + mask + tables[0] + tables[1] + keys + values + position
        return self.scales(mixed)  # type: ignore[no-any-return]


def calls_of_a_block(settings: Settings, scratch: Path, rounds: int) -> Iterator[Figure]:
    """What is spent on one call of a block beside the graph itself."""
    block = Block().eval()
    each = [torch.randn(2, 8) for _ in range(7)]
    words: dict[str, Any] = {"tables": (each[2], each[3]), "keys": each[4], "values": each[5]}
    words |= {"position": each[6], "use_cache": True}
    ask = partial(block, each[0], each[1], **words)
    with torch.no_grad(), hubaoti.capture(block) as calls:
        ask()
    bundle = api.compile(block, scratch / "block-bundle", calls=calls, settings=settings,
                         regions="none")  # fmt: skip
    (entry,) = bundle.manifest.graphs
    public = aoti_load_package(str(bundle.path / entry.file))
    public.load_constants(dict(block.named_parameters()), check_full_update=True, user_managed=True)
    with torch.no_grad(), hubaoti.attach(block, bundle, settings=settings):
        require_same(ask(), ask())  # the first is a trial
        region = next(regions_in(block))
        graph = region.graphs[0]
        bare = graph._runner
        attached = partial(region, each[0], each[1], **words)
        # We choose one thread for such a call; without it the others mostly wait for a second.
        sides: dict[str, Callable[[], Any]] = {
            "bare": partial(in_one, repeated(lambda: bare.run(each)), CALLS),
            "graph": partial(repeated(lambda: graph(*each)), CALLS),
            "attached": partial(repeated(attached), CALLS),
            "torch": partial(in_one, repeated(lambda: public(each[0], each[1], **words)), CALLS),
        }
        in_turn(sides, 2)
        spent = in_turn(sides, 20 * rounds)
    more = {
        name: [(t - b) / CALLS * 1e6 for t, b in zip(spent[name], spent["bare"], strict=True)]
        for name in ("graph", "attached", "torch")
    }
    name = f"a call, {len(each)} inputs, {len(entry.constants)} constants, over the bare runner"
    yield figure("attach", f"{name}, the graph", more["graph"], "us", ("at most", 10))
    yield figure("attach", f"{name}, the module", more["attached"], "us", ("at most", 10))
    yield figure("attach", f"{name}, AOTICompiledModel", more["torch"], "us")
    for way in ("graph", "attached"):
        yield figure("attach", f"AOTICompiledModel to the {way}", ratios(more["torch"], more[way]),
                     "times", ("at least", 2))  # fmt: skip


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
    """Many calls in a row, so that the clock is not what is measured."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run


def seconds_to_attach(
    model: Any, bundle: Bundle, settings: Settings, scratch: Path, rounds: int
) -> Iterator[Figure]:
    """How long it takes to attach a model whose graphs are in the mirror."""
    artifact = api.artifact_of(bundle, False, settings, lambda step: None)
    name = f"attach, {DECODER_BLOCKS} blocks, graphs in the mirror"
    program = FIRST.format(blocks=DECODER_BLOCKS, sizes=SMALL, home=str(settings.home),
                           bundle=str(bundle.path))  # fmt: skip
    firsts = [told_by(program, scratch) for _ in range(3)]
    yield figure("attach", f"{name}, first in a process", firsts, "ms")
    spent = []
    for _ in range(2 + 3 * rounds):
        start = time.perf_counter()
        attachment = hubaoti.attach(model, artifact, settings=settings)
        spent.append((time.perf_counter() - start) * 1000)
        attachment.detach()
    yield figure("attach", name, spent[2:], "ms", ("at most", 50))


def decode_step(model: Any, bundle: Bundle, settings: Settings, rounds: int) -> Iterator[Figure]:
    """One token of one text over a static cache."""
    sides: dict[str, Callable[[], Any]] = {}
    with ExitStack() as around, torch.no_grad():
        for side in ("eager", "attached"):
            cache = StaticCache(config=model.config, max_cache_len=PLACES)
            ids = torch.arange(FILLED)[None]
            model(ids[:, :-1], past_key_values=cache)
            sides[side] = partial(step, model, ids[:, -1:], cache)
            if side == "eager":
                graphs = hubaoti.attach(model, bundle, strict=True, settings=settings)
                around.enter_context(graphs)
        own = {region.path: region.eager for region in regions_in(model)}
        both = {"eager": partial(by, model, own, sides["eager"]), "attached": sides["attached"]}
        require_same(both["attached"](), both["eager"]())
        in_turn(both, 2)
        spent = in_turn(both, 6 * rounds)
    over = ratios(spent["eager"], spent["attached"])
    name = f"decode, {DECODER_BLOCKS} blocks, {FILLED} of {PLACES} filled"
    yield figure("attach", name, [t * 1000 for t in spent["attached"]], "ms")
    yield figure("attach", f"{name}, eager over attached", over, "times", ("at least", 1.3))


def step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last token again: the cache is set back to what was before it."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(FILLED - 1)
    return model(ids, past_key_values=cache).logits  # type: ignore[no-any-return]


def again_and_again(bundle: Bundle, settings: Settings) -> Iterator[Figure]:
    """What is left of a model that is attached, called and detached a thousand times."""
    model = shaken(transformers.LlamaModel(config(BLOCKS)))
    artifact = api.artifact_of(bundle, False, settings, lambda step: None)
    ids = torch.arange(3)[None]
    held: list[tuple[int, int, int]] = []
    with torch.no_grad():
        for at in range(ROUNDS + 1):
            with hubaoti.attach(model, artifact, strict=True, settings=settings):
                model(ids, use_cache=False)
            if at in {ROUNDS // 20, ROUNDS}:
                files, threads = (len([*Path("/proc/self", each).iterdir()]) for each in KINDS)
                held.append((files, threads, kilobytes("VmRSS")))
    name = f"{ROUNDS} times attached and detached"
    grown = [after - before for before, after in zip(*held, strict=True)]
    yield figure("attach", f"{name}, files and threads more", [grown[0] + grown[1]], "",
                 ("at most", 0))  # fmt: skip
    yield figure("attach", f"{name}, memory more", [grown[2] / 1000], "MB", ("at most", 20))


def text(model: Any) -> Any:
    """Some tokens, greedily."""
    return model.generate(torch.arange(3, 19)[None], max_new_tokens=24, do_sample=False,
                          cache_implementation="static", disable_compile=True,
                          pad_token_id=0, eos_token_id=None)  # fmt: skip


def peak_memory(bundle: Bundle, settings: Settings, scratch: Path) -> Figure:
    """The most that a process holds that generates, attached to not."""
    peaks: dict[bool, list[float]] = {False: [], True: []}
    for attached in (False, True) * 3:
        program = PEAK.format(blocks=DECODER_BLOCKS, attached=attached, home=str(settings.home),
                              bundle=str(bundle.path))  # fmt: skip
        peaks[attached].append(told_by(program, scratch))
    return figure("attach", f"memory, {DECODER_BLOCKS} blocks, attached to plain",
                  ratios(peaks[True], peaks[False]), "times", ("at most", 1.02))  # fmt: skip


def told_by(program: str, scratch: Path) -> float:
    """The number that a program says last, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        words = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=False, env=environment(folder))  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.split()[-1]))


def environment(folder: str) -> dict[str, str]:
    """That of a child, which compiles nothing."""
    return {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
