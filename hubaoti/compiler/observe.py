"""A model run without storage: what its blocks are given, and which operations they do.

The model's tensors are fake ones, which have shapes and no values. So a model of any size runs in
a second and in no memory, and no mask is left out because its values would allow it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubaoti.compiler.calls import Call, Opaque, call_of, replaced
from hubaoti.errors import CompileFailed, first_line


@contextmanager
def storage_free() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers are real, since code makes them.

    A parameter is made as untouched memory first, and given back at once.
    """
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            bare = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(bare, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations of the block that runs: names, numbers, and whose results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[str] | None = None
        self._places: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # an id is one tensor's only while it lives

    def begin(self) -> None:
        """Write down from here on."""
        self.lines, self._places, self._kept = [], {}, []

    def end(self) -> str:
        """What was written."""
        text = "\n".join(self.lines or ())
        self.lines, self._places, self._kept = None, {}, []
        return text

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.lines is not None:
            given = [self._word(leaf) for leaf in tree_leaves((args, kwargs))]
            made = [self._word(leaf) for leaf in tree_leaves(out)]
            self.lines.append(f"{func} {' '.join(given)} -> {' '.join(made)}")
        return out

    def _word(self, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        if id(leaf) not in self._places:
            self._places[id(leaf)] = len(self._places)
            self._kept.append(leaf)
        return f"%{self._places[id(leaf)]}{list(leaf.shape)}"


@dataclass(slots=True)
class Observed:
    """The first call of one block in each run, and the operations of the very first as text."""

    calls: list[Call] = field(default_factory=list)
    operations: str = ""
    problem: str | None = None
    called: bool = False

    def around(self, forward: Callable[..., Any], operations: Operations) -> Callable[..., Any]:
        """The block's `forward`, noted."""

        def watching(*args: Any, **kwargs: Any) -> Any:
            if self.called:
                return forward(*args, **kwargs)
            self.called = True
            try:
                self.calls.append(call_of(forward, args, kwargs))
            except Opaque as why:
                self.problem = str(why)
            if self.operations or operations.lines is not None:
                return forward(*args, **kwargs)
            operations.begin()
            out = forward(*args, **kwargs)
            self.operations = operations.end()
            return out

        return watching


@dataclass(frozen=True, slots=True)
class Given:
    """One call of a whole model: arguments of which tensors count by shape and dtype only."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def observe(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    calls: Sequence[Callable[[], Given]],
    device: torch.device,
) -> dict[str, Observed]:
    """Run a model once for each of `calls`, and note what each of its blocks is given first.

    Raises:
        CompileFailed: the model looks at values, or cannot take what it is called with.
    """
    found: dict[str, Observed] = {path: Observed() for path in blocks}
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    operations = Operations()
    with ExitStack() as around:
        for path, block in blocks.items():
            watching = found[path].around(block.forward, operations)
            around.enter_context(replaced(block, watching))
        around.enter_context(torch.no_grad())
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tensors = {
            name: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device)
            for name, each in (*model.named_parameters(), *model.named_buffers())
        }
        around.enter_context(operations)
        for call in calls:
            given = call()
            for seen in found.values():
                seen.called = False
            try:
                torch.func.functional_call(model, tensors, given.args, dict(given.kwargs))
            except Exception as why:  # whatever a model's code raises
                raise CompileFailed(
                    f"capture: {type(model).__name__} cannot be run without values: "
                    f"{type(why).__name__}: {first_line(why)}",
                    hint="it looks at values to decide what to compute, or takes other inputs: "
                    "compile a part of it with --regions PATH, or capture real calls",
                ) from why
    for seen in found.values():
        seen.calls = [bare(call) for call in seen.calls]
    return {path: seen for path, seen in found.items() if seen.calls or seen.problem}


def bare(call: Call) -> Call:
    """A call whose tensors have faces only, and outlive the mode that they were made in."""
    tensors = (
        torch.empty(tuple(each.shape), dtype=each.dtype, device="meta") for each in call.tensors
    )
    return Call(call.template, tuple(tensors), call.names, call.caches)
