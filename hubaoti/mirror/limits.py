"""What a manifest may claim on this machine, whoever published it: `[limits]` of trust.toml.

A graph is compared with its golden answers before it is opened, by the tolerance and within the
memory that its own manifest names. A manifest that could name any would say what it is checked by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hubaoti.artifact.schema import Graph
from hubaoti.errors import LimitsExceeded


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that is allowed; `without_golden` opens graphs that have no answers at all.

    `tolerance` is a part of the largest value, by default that of float8, the coarsest that is
    compiled; `memory` are bytes.

    Raises:
        ValueError: one is no number, or none that anything is compared with (nan).
    """

    tolerance: float = 0.15
    memory: int = 32 << 30
    without_golden: bool = False

    def __post_init__(self) -> None:
        given = (self.tolerance, self.memory)
        numbers = all(type(each) in {int, float} and not math.isnan(each) for each in given)
        if not numbers or type(self.without_golden) is not bool:
            raise ValueError("limits are numbers, and without_golden is true or false")

    def require(self, graphs: Iterable[Graph]) -> None:
        """See that graphs claim no more.

        Raises:
            LimitsExceeded: some do; all of them are named.
        """
        if found := [problem for graph in graphs for problem in self._judge(graph)]:
            raise LimitsExceeded(
                f"{'; '.join(found)}: it is not opened here",
                hint="ask its publisher to compile it again; if it is meant so, allow it under "
                "[limits] in trust.toml (tolerance, memory, without_golden), as docs/trust.md says",
            )

    def _judge(self, graph: Graph) -> list[str]:
        """What a graph claims too much of."""
        if graph.golden is None:
            problem = f"graph {graph.id} comes without golden answers, so nothing would check it"
            return [] if self.without_golden else [problem]
        found = [
            f"{name} of graph {graph.id} may be off by {tolerance:.1e} of its largest value, "
            f"{self.tolerance:.1e} is allowed"
            for name, tolerance in graph.golden.tolerances.items()
            if not tolerance <= self.tolerance  # not a number, too
        ]
        if graph.golden.memory > self.memory:
            found.append(
                f"the answers of graph {graph.id} take {graph.golden.memory / 1e9:.1f} GB, "
                f"{self.memory / 1e9:.1f} GB are allowed"
            )
        return found
