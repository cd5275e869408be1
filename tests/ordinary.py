"""Calls as users make them: of what a tokenizer or a processor gives, and what graphs make of them.

Which graph a call finds is decided without running any: so all of a model's calls are tried in a
second, without compiling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hubaoti.attachment.dispatch import Dispatcher
from hubaoti.compiler.capture import replace_forward
from hubaoti.compiler.plan import Plan
from hubaoti.compiler.signature import CallSignature, FlatModule
from hubaoti.compiler.traced import draft_graph
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.kv_cache import CacheSlot, slide_window

CPU = torch.device("cpu")
# Batch and seq of calls, and the row that is padded.
CALLS = ((1, 9, None), (3, 14, 1), (2, 33, 0), (4, 39, None))


def given(config: Any, batch: int, seq: int, padded: int | None) -> dict[str, torch.Tensor]:
    """What a tokenizer or a processor gives for so many texts, images or sounds."""
    found: dict[str, torch.Tensor] = {}
    text = config.get_text_config()
    if hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions
        found["input_features"] = torch.randn(batch, config.num_mel_bins, frames)
    elif getattr(text, "vocab_size", None) and not is_of_images(config):
        found["input_ids"] = torch.randint(1, text.vocab_size, (batch, seq))
        found["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64)
        if padded is not None:
            found["attention_mask"][padded, -seq // 3 :] = 0
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = torch.randint(1, text.vocab_size, (batch, 5))
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "image_size"):
        found["pixel_values"] = torch.randn(batch, 3, vision.image_size, vision.image_size)
    return found


def is_of_images(config: Any) -> bool:
    """Whether a model sees images and reads nothing, though its config may count words."""
    return hasattr(config, "image_size") and not hasattr(config, "text_config")


@contextmanager
def asking(model: nn.Module, plan: Plan) -> Iterator[Counter[str]]:
    """Count the calls for which a plan has a graph, as "served", and the others by their reasons.

    The model itself answers all of them. What a graph would be given, the block is asked in its
    place, too, and has to answer the same.
    """
    entries: dict[str, list[Any]] = {}
    for unit in plan.units:
        for path in unit.modules:
            entries.setdefault(path, []).append(draft_graph(unit))
    counts: Counter[str] = Counter()
    shared: dict[tuple[str, ...], Dispatcher] = {}
    with ExitStack() as around:
        for path, each in entries.items():
            block, ids = model.get_submodule(path), tuple(entry.id for entry in each)
            ways = shared.setdefault(ids, Dispatcher(each, block, CPU, True, plan.source.attention))
            around.enter_context(replace_forward(block, asked(block, path, ways, counts)))
        yield counts


def asked(
    block: nn.Module, path: str, ways: Dispatcher, counts: Counter[str]
) -> Callable[..., Any]:
    """A block's own `forward`, which counts what graphs would make of its calls."""
    forward = block.forward
    flats = [FlatModule(block, CallSignature(e.call, e.inputs, e.cache)) for e in ways.entries]
    place = CacheSlot(block, ways.entries) if ways.has_cache else None

    def asking(*args: Any, **kwargs: Any) -> Any:
        try:
            at, inputs = find(path, ways, place, args, kwargs)
            counts["served"] += 1
        except CannotServe as why:
            counts[f"{why.reason}: {why}"] += 1
            return forward(*args, **kwargs)
        with torch.no_grad():
            found = flats[at](*inputs)
        answer = forward(*args, **kwargs)
        wanted = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        some = slice(1 if place is not None else None)  # scores are over what is filled only
        torch.testing.assert_close([*found][some], wanted[some], atol=1e-4, rtol=1e-4)
        return answer

    return asking


def find(
    path: str,
    ways: Dispatcher,
    place: CacheSlot | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[int, list[torch.Tensor]]:
    """The number of the graph that a call finds, as a region does, and what it would be given.

    What it writes are copies, and a cache's layer is as it was.

    Raises:
        CannotServe: there is none.
    """
    found, held = ways.plan.flatten(args, kwargs), None
    if place is not None:
        held = place.get_state(found[ways.plan.count], *ways.read_sizes(found), CPU)
        held.require_room()
        ways.add_cache(found, held)
    inputs, numbers = found[: ways.plan.count], found[ways.plan.count + 1 :]
    if held is not None and held.slides:
        inputs.pop()
    way = ways.find_route(inputs, numbers, held, path)
    entry = ways.entries[way.graph]
    row = ways.follow(way, inputs, held, path)
    given = [t.clone() if i.mutated else t for i, t in zip(entry.inputs, row, strict=True)]
    slide_window(entry.cache, held, given)
    if held is not None:
        held.undo()
    return way.graph, given
