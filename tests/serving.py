"""Blocks of a model answered by something else: by graphs, or by a module as its face calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.schema import Cache, Input
from hubaoti.compiler.capture import make_call, replace_forward
from hubaoti.compiler.kv_inputs import count_layers

Answer = Callable[..., Sequence[torch.Tensor]]


def matched(ours: Any, theirs: Any) -> Iterator[tuple[int, int | None]]:
    """Each tensor of a graph's call, and its place among those of a block's call.

    What is not computed with may be anything, all else must be what the graph was compiled for;
    transformers leave out a mask that is causal and nothing more.
    """
    if isinstance(ours, dict) and "tensor" in ours:
        yield ours["tensor"], theirs and theirs["tensor"]
    elif isinstance(ours, dict) and "any" not in ours:
        assert ours.keys() == theirs.keys()
        for name, item in ours.items():
            yield from matched(item, theirs[name])
    elif isinstance(ours, list):
        for item, other in zip(ours, theirs, strict=True):
            yield from matched(item, other)
    elif not isinstance(ours, dict):
        assert ours == theirs


class Form:
    """One way to answer a block's calls: a call's template, its inputs, its cache, and who does."""

    def __init__(self, call: Any, inputs: Sequence[Input], cache: Cache | None, answer: Answer):
        self.call, self.inputs, self.cache, self.answer = call, inputs, cache, answer
        self.calls = 0

    def __call__(self, given: Any, layer: Any, start: int) -> torch.Tensor:
        """The first tensor that is answered to a call, its cache's layer written in place."""
        self.calls += 1
        places = dict(matched(self.call, given.template))
        hidden = given.tensors[0]
        rows, length = hidden.shape[:2]
        sliding = self.cache is not None and self.cache.kind == "sliding"
        filled = layer.keys.shape[2] + length - 1 if sliding else start + length
        causal = torch.ones(length, filled, dtype=torch.bool).tril(filled - length)
        tensors = []
        for at, place in sorted(places.items()):
            tensor = causal[None, None] if place is None else given.tensors[place]
            if self.inputs[at].values == "mask":
                tensor = tensor[..., :filled]
            tensors.append(tensor.expand(rows, *tensor.shape[1:]).contiguous())
        position = () if sliding else (torch.arange(start, start + length),)
        return self.answer(*tensors, layer.keys, layer.values, *position)[0]


class Served:
    """A block's `forward` that answers by one of its forms."""

    def __init__(self, block: nn.Module, forms: Mapping[str, Form]) -> None:
        self.eager, self.forms, self.index = block.forward, forms, count_layers(block) - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = make_call(self.eager, args, kwargs)
        layer = given.caches[0].layers[self.index]
        start, length = int(layer.get_seq_length()), args[0].shape[1]
        layer.cumulative_length.add_(length)
        if layer.is_sliding:
            layer.cumulative_length_int += length
        full = layer.is_sliding and start >= layer.max_cache_len
        return self.forms["sliding" if full else "static"](given, layer, start)


@contextmanager
def serving(model: Any, forms: Mapping[str, Mapping[str, Form]]) -> Iterator[None]:
    """Blocks of a model, by their paths, answer by their forms, by the kind of cache."""
    with ExitStack() as around:
        for path, each in forms.items():
            block = model.get_submodule(path)
            around.enter_context(replace_forward(block, Served(block, each)))
        yield
