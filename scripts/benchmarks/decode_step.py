"""What one step of decoding costs: a block over its KV cache, beside transformers' eager one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import StaticCache

import hubaoti
from benchmarks.answers import require_same
from benchmarks.figures import Figure, divide_pairs, make_figure, time_in_turn
from benchmarks.memory import measure_growth
from benchmarks.models import ModelCase
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

# 8 heads over 4.
_CONFIG = transformers.LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=512,
    intermediate_size=1376,
    max_position_embeddings=16384,
    num_attention_heads=8,
    num_hidden_layers=4,
    num_key_value_heads=4,
    vocab_size=8000,
)
_DIMS = {"batch": (1, 4), "seq": (1, 64), "cache": (16, 16384)}
# A step has a graph of its own, in which the heads of a group are rows of one product.
_BUCKETS = [{"seq": (1, 1)}, {"seq": (2, 64)}]
GROUPED = ModelCase(_CONFIG, {"task": "generate", "dims": _DIMS, "buckets": _BUCKETS})
_GOALS = {256: 1.3, 4096: 3.0, 16384: 5.0}  # over eager, at a full cache
_LESS = {16384: 3.0}  # times as fast again, where a quarter is filled
_RUN = 8  # steps of one side before the other's turn: a step follows a step where texts are made
_TOKENS = 24


@dataclass(frozen=True)
class _Step:
    """One token of one row through one block, by both sides, over a cache of some length."""

    eager: Callable[[], Any]
    ours: Callable[[], Any]


def bench_cache(
    scratch: Path,
    settings: Settings,
    rounds: int,
    case: ModelCase = GROUPED,
    goals: Mapping[int, float] = _GOALS,
) -> Iterator[Figure]:
    """A decode step over caches of several lengths, full and a quarter filled; then whole texts."""
    bundle = case.compile(scratch / "grouped", settings)
    plain, model = case.make_model(), case.make_model()
    attach = partial(hubaoti.attach, model, bundle, strict=True, settings=settings)
    with torch.no_grad(), attach() as attachment:
        graph = next(each for each in attachment.graphs if each.entry.order == 0)
        for length, goal in goals.items():
            yield from _measure_length(graph, plain, length, goal, rounds)
        yield _count_same_tokens(plain, model)


def _measure_length(
    graph: Graph, model: Any, length: int, goal: float, rounds: int
) -> list[Figure]:
    """The figures of one length of the cache."""
    steps = {part: _make_step(graph, model, length, length // part) for part in (1, 4)}
    sides = {
        f"{side} {part}": partial(_run_steps, getattr(step, side))
        for part, step in steps.items()
        for side in ("eager", "ours")
    }
    time_in_turn(sides, 1)
    spent = time_in_turn(sides, 8 * rounds)
    again = divide_pairs(spent["ours 1"], spent["ours 4"])
    less = ("at least", _LESS[length]) if length in _LESS else None
    times = {part: [t * 1000 / _RUN for t in spent[f"ours {part}"]] for part in steps}
    over = {part: divide_pairs(spent[f"eager {part}"], spent[f"ours {part}"]) for part in steps}
    name = f"cache {length}"
    found = [
        make_figure("cache", f"{name} full, a step", times[1], "ms"),
        make_figure("cache", f"{name} full, over eager", over[1], "times", ("at least", goal)),
        make_figure("cache", f"{name} a quarter filled, a step", times[4], "ms"),
        make_figure("cache", f"{name} a quarter filled, over eager", over[4], "times"),
        make_figure("cache", f"{name} a quarter filled, over full", again, "times", less),
    ]
    for which, part in ((side, part) for part in steps for side in ("eager", "ours")):
        more = [measure_growth(getattr(steps[part], which)) / 1e6 for _ in range(3)]
        words = "full" if part == 1 else "a quarter filled"
        found.append(make_figure("cache", f"{name} {words}, memory of {which}", more, "MB"))
    return found


def _run_steps(step: Callable[[], Any]) -> None:
    """Some steps in a row."""
    for _ in range(_RUN):
        step()


def _make_step(graph: Graph, model: Any, length: int, filled: int) -> _Step:
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
    name = f"cache {length}, {filled} filled: the graph and eager"
    require_same(ours(), [eager()], name)
    require_same([keys, values], [held.keys, held.values], name)
    return _Step(eager, ours)


def _count_same_tokens(plain: Any, attached: Any) -> Figure:
    """How many of the tokens of a greedy `generate` over attached blocks are eager's."""
    draw, words = torch.Generator().manual_seed(1), plain.config.vocab_size
    prompt = torch.randint(1, words, (2, 9), generator=draw)
    options: dict[str, Any] = {
        "max_new_tokens": _TOKENS,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # a row that is padded on the left
    expected, found = (
        model.generate(prompt, attention_mask=mask, **options) for model in (plain, attached)
    )
    same = [(found == expected).float().mean().item()]
    return make_figure("cache", "generate, tokens equal to eager's", same, "of 1", ("at least", 1))
