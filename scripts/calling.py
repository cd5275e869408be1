"""What is spent on one call of a block beside the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import Figure, figure, in_turn, ratios
from recording import require_same
from torch import nn
from torch._inductor import aoti_load_package

import hubaoti
from hubaoti import api
from hubaoti.attachment.attach import find_regions
from hubaoti.runtime.threads import run_in_one_thread
from hubaoti.settings import Settings

CALLS = 400  # of one side before the other's turn


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
        region = next(find_regions(block))
        graph = region.graphs[0]
        bare = graph._runner
        attached = partial(region, each[0], each[1], **words)
        # We choose one thread for such a call; without it the others mostly wait for a second.
        sides: dict[str, Callable[[], Any]] = {
            "bare": partial(run_in_one_thread, repeated(lambda: bare.run(each)), CALLS),
            "graph": partial(repeated(lambda: graph(*each)), CALLS),
            "attached": partial(repeated(attached), CALLS),
            "torch": partial(
                run_in_one_thread, repeated(lambda: public(each[0], each[1], **words)), CALLS
            ),
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
