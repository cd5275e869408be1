"""What is spent on one call of a block beside the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_load_package

import hubaoti
from benchmarks.answers import require_same
from benchmarks.figures import Figure, divide_pairs, make_figure, time_in_turn
from hubaoti import api
from hubaoti.attachment.attach import find_regions
from hubaoti.runtime.threads import run_in_one_thread
from hubaoti.settings import Settings

_CALLS = 400  # of one side before the other's turn


class _Scale(nn.Module):
    """One constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class _Block(nn.Module):
    """As many inputs and constants as a decoder's block has, and next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Sequential(*(_Scale() for _ in range(9)))

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


def measure_call_overhead(settings: Settings, scratch: Path, rounds: int) -> Iterator[Figure]:
    """Microseconds over the bare runner, of the graph, the module, and torch's own loader."""
    block = _Block().eval()
    each = [torch.randn(2, 8) for _ in range(7)]
    options: dict[str, Any] = {"tables": (each[2], each[3]), "keys": each[4], "values": each[5]}
    options |= {"position": each[6], "use_cache": True}
    call = partial(block, each[0], each[1], **options)
    with torch.no_grad(), hubaoti.capture(block) as calls:
        call()
    output = scratch / "block-bundle"
    bundle = api.compile(block, output, calls=calls, settings=settings, regions="none")
    (entry,) = bundle.manifest.graphs
    public = aoti_load_package(str(bundle.path / entry.file))
    public.load_constants(dict(block.named_parameters()), check_full_update=True, user_managed=True)
    with torch.no_grad(), hubaoti.attach(block, bundle, settings=settings):
        require_same([call()], [call()])  # the first is a trial
        region = next(find_regions(block))
        graph = region.graphs[0]
        # We choose one thread for such a call; without it the others mostly wait for a second.
        sides: dict[str, Callable[[], Any]] = {
            "bare": partial(run_in_one_thread, _repeat(lambda: graph._run_short(each)), _CALLS),
            "graph": partial(_repeat(lambda: graph(*each)), _CALLS),
            "attached": partial(_repeat(partial(region, each[0], each[1], **options)), _CALLS),
            "torch": partial(
                run_in_one_thread, _repeat(lambda: public(each[0], each[1], **options)), _CALLS
            ),
        }
        time_in_turn(sides, 2)
        spent = time_in_turn(sides, 20 * rounds)
    more = {
        name: [(t - b) / _CALLS * 1e6 for t, b in zip(spent[name], spent["bare"], strict=True)]
        for name in ("graph", "attached", "torch")
    }
    yield from _list_figures(f"{len(each)} inputs, {len(entry.constants)} constants", more)


def _list_figures(sizes: str, more: dict[str, list[float]]) -> Iterator[Figure]:
    """The figures of what each side takes over the bare runner."""
    name = f"a call, {sizes}, over the bare runner"
    yield make_figure("attach", f"{name}, the graph", more["graph"], "us", ("at most", 10))
    yield make_figure("attach", f"{name}, the module", more["attached"], "us", ("at most", 10))
    yield make_figure("attach", f"{name}, AOTICompiledModel", more["torch"], "us")
    for side in ("graph", "attached"):
        over = divide_pairs(more["torch"], more[side])
        name = f"AOTICompiledModel to the {side}"
        yield make_figure("attach", name, over, "times", ("at least", 2))


def _repeat(call: Callable[[], Any]) -> Callable[[int], None]:
    """Many calls in a row, so that the clock is not what is measured."""

    def run(times: int) -> None:
        for _ in range(times):
            call()

    return run
