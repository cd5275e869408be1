"""What one step of decoding costs: a block over its KV cache, beside transformers' eager one."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from figures import Figure, figure, in_turn, ratios
from recording import Asked, apart, opened
from transformers.cache_utils import StaticCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

# 8 heads over 4.
CONFIG = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=512,
    intermediate_size=1376,
    max_position_embeddings=16384,
    num_attention_heads=8,
    num_hidden_layers=4,
    num_key_value_heads=4,
    vocab_size=8000,
)
DIMS = {"batch": (1, 4), "seq": (1, 64), "cache": (16, 16384)}
# A step has a graph of its own, in which the heads of a group are rows of one product.
BUCKETS = [{"seq": (1, 1)}, {"seq": (2, 64)}]
GROUPED = Asked(CONFIG, {"task": "generate", "dims": DIMS, "buckets": BUCKETS})
GOALS = {256: 1.3, 4096: 3.0, 16384: 5.0}  # over eager, at a full cache
LESS = {16384: 3.0}  # times as fast again, where a quarter is filled
RUN = 8  # steps of one side before the other's turn: a step follows a step where texts are made
TOKENS = 24


@dataclass(frozen=True)
class Step:
    """One token of one row through one block, by both sides, over a cache of some length."""

    eager: Callable[[], Any]
    ours: Callable[[], Any]


def bench_cache(
    scratch: Path,
    settings: Settings,
    rounds: int,
    asked: Asked = GROUPED,
    goals: Mapping[int, float] = GOALS,
) -> Iterator[Figure]:
    """A decode step over caches of several lengths, full and a quarter filled; then whole texts."""
    bundle = asked.compiled(scratch / "grouped", settings)
    model = asked.model()
    entry = next(each for each in bundle.manifest.graphs if each.order == 0)
    graph = next(opened(bundle, entry, scratch / "unpacked", model))
    with torch.no_grad():
        for length, goal in goals.items():
            yield from at_length(graph, model, length, goal, rounds)
        yield same_tokens(model, bundle, settings)


def at_length(graph: Graph, model: Any, length: int, goal: float, rounds: int) -> list[Figure]:
    """The figures of one length of the cache."""
    steps = {part: step_of(graph, model, length, length // part) for part in (1, 4)}
    sides = {
        f"{side} {part}": partial(run_of, getattr(step, side))
        for part, step in steps.items()
        for side in ("eager", "ours")
    }
    in_turn(sides, 1)
    spent = in_turn(sides, 8 * rounds)
    again = ratios(spent["ours 1"], spent["ours 4"])
    less = ("at least", LESS[length]) if length in LESS else None
    times = {part: [t * 1000 / RUN for t in spent[f"ours {part}"]] for part in steps}
    over = {part: ratios(spent[f"eager {part}"], spent[f"ours {part}"]) for part in steps}
    name = f"cache {length}"
    found = [
        figure("cache", f"{name} full, a step", times[1], "ms"),
        figure("cache", f"{name} full, over eager", over[1], "times", ("at least", goal)),
        figure("cache", f"{name} a quarter filled, a step", times[4], "ms"),
        figure("cache", f"{name} a quarter filled, over eager", over[4], "times"),
        figure("cache", f"{name} a quarter filled, over full", again, "times", less),
    ]
    for which, part in ((side, part) for part in steps for side in ("eager", "ours")):
        more = [peak_of(getattr(steps[part], which)) / 1e6 for _ in range(3)]
        words = "full" if part == 1 else "a quarter filled"
        found.append(figure("cache", f"{name} {words}, memory of {which}", more, "MB"))
    return found


def run_of(step: Callable[[], Any]) -> None:
    """Some steps in a row."""
    for _ in range(RUN):
        step()


def step_of(graph: Graph, model: Any, length: int, filled: int) -> Step:
    """Both sides of one step: the last of the filled places is the new one.

    Raises:
        SystemExit: they answer differently.
    """
    block, config = model.model.layers[0], model.config
    cache = StaticCache(config=config, max_cache_len=length)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    held: Any = cache.layers[0]
    held.lazy_initialization(*(torch.empty(1, heads, 1, width) for _ in range(2)))
    held.keys.normal_()
    held.values.normal_()
    keys, values = held.keys.clone(), held.values.clone()
    hidden = torch.randn(1, 1, config.hidden_size)
    position = torch.tensor([filled - 1])
    tables = model.model.rotary_emb(hidden, position[None])
    mask = torch.zeros(1, 1, 1, length, dtype=torch.bool)
    mask[..., :filled] = True
    known: dict[str, Any] = {
        "hidden_states": hidden,
        "attention_mask": mask[..., :filled].contiguous(),
        "position_embeddings_0": tables[0],
        "position_embeddings_1": tables[1],
        "position_ids": position[None],
        "keys": keys,
        "values": values,
        "position": position,
    }
    inputs = [known[item.name] for item in graph.entry.inputs]

    def eager() -> torch.Tensor:
        held.cumulative_length.fill_(filled - 1)  # else the cache would be full after one step
        return block(  # type: ignore[no-any-return]
            hidden,
            attention_mask=mask,
            position_embeddings=tables,
            past_key_values=cache,
            use_cache=True,
        )

    ours = partial(graph, *inputs)
    if apart(ours(), [eager()]) > 1e-4 or apart([keys, values], [held.keys, held.values]) > 1e-4:
        raise SystemExit(f"cache {length}, {filled} filled: the graph and eager differ")
    return Step(eager, ours)


def peak_of(call: Callable[[], Any]) -> int:
    """By how many bytes this process grows while something runs, at most."""
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is taken again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    answer = call()
    grown = kilobytes("VmHWM") - before
    del answer
    return max(grown, 0) << 10


def kilobytes(name: str) -> int:
    """A line of what the kernel says of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def same_tokens(model: Any, bundle: Bundle, settings: Settings) -> Figure:
    """How many of the tokens of a greedy `generate` over attached blocks are eager's."""
    draw, words = torch.Generator().manual_seed(1), model.config.vocab_size
    prompt = torch.randint(1, words, (2, 9), generator=draw)
    options: dict[str, Any] = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # a row that is padded on the left
    expected = copy.deepcopy(model).generate(prompt, attention_mask=mask, **options)
    with hubaoti.attach(model, bundle, strict=True, settings=settings):
        found = model.generate(prompt, attention_mask=mask, **options)
    same = (found == expected).float().mean().item()
    return figure("cache", "generate, tokens equal to eager's", [same], "of 1", ("at least", 1.0))
