"""Which masks attention looks at, while a model is run without storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from hubaoti.compiler.kv_inputs import ATTENTION, find_unknown

_NOTED = ("sdpa", ATTENTION)  # attention that a graph without masks may be made of


@contextmanager
def note_masks() -> Iterator[list[torch.Tensor | None]]:
    """The masks that transformers' attention is given inside, each as often as it is; None for what
    else it is given to compute with, as a bias."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    noted = list[torch.Tensor | None]()
    with ExitStack() as around:
        for name in _NOTED:
            if attend := ALL_ATTENTION_FUNCTIONS.get(name):
                noting = partial(_note_and_attend, attend, noted)
                around.enter_context(_set_entry(ALL_ATTENTION_FUNCTIONS, name, noting))
        yield noted


@contextmanager
def _set_entry(registry: Any, name: str, value: Any) -> Iterator[None]:
    """Let an entry be another for a while; one that all registries have is seen again then."""
    before = registry[name]
    registry[name] = value
    try:
        yield
    finally:
        del registry[name]
        if registry.get(name) is not before:
            registry[name] = before


def _note_and_attend(  # noqa: PLR0913 - as transformers calls it
    attend: Callable[..., Any],
    noted: list[torch.Tensor | None],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **rest: Any,
) -> Any:
    """What attention answers, its mask noted."""
    if attention_mask is not None:
        noted.append(attention_mask)
    if find_unknown(rest):
        noted.append(None)
    return attend(module, query, key, value, attention_mask, *args, **rest)
