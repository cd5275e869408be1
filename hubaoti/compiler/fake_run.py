"""A model run without storage: what its blocks are given, and which operations they do.

The model's tensors are fake ones, which have shapes and no values. So a model of any size runs in
a second and in no memory, and no mask is left out because its values would allow it.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException

from hubaoti.compiler.capture import (
    Call,
    Frozen,
    Opaque,
    bind_arguments,
    make_call,
    replace_forward,
    thaw_arguments,
)
from hubaoti.compiler.fake_gpu import PLANNED, pretend_gpu
from hubaoti.compiler.mask_use import note_masks
from hubaoti.compiler.module_copy import describe_devices, find_main_device, list_devices
from hubaoti.compiler.operations import Operations
from hubaoti.compiler.patched import patch_attribute
from hubaoti.errors import CompileFailed, first_line
from hubaoti.runtime.call_template import CAUSAL, takes_containers
from hubaoti.runtime.containers import Contents

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: by place, and by name


def init_empty_parameters() -> AbstractContextManager[None]:
    """Modules made inside have parameters without memory; buffers are real, since code makes them.

    A parameter is made as untouched memory first, and given back at once.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            bare = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(bare, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    return patch_attribute(nn.Module, "register_parameter", register_empty)


@dataclass(slots=True)
class BlockCalls:
    """The first call of one block in each run, and the operations of the very first as text.

    It `attends` where it puts keys and values into a cache, and is `recurrent` where it puts states
    there, each of which follows from the one before. A block that did in the first run what another
    had done need not run again: it answers what that one, its `leader`, has answered. It looks at
    `own_masks` where attention was given masks, and none but those that the block was given.
    """

    calls: list[Call] = field(default_factory=list)
    operations: str = ""
    idle: frozenset[str] = frozenset()  # flags among its arguments on which nothing depends
    problem: str | None = None
    called: bool = False
    writes: bool = False
    answered: bool = False
    attends: bool = False
    recurrent: bool = False
    own_masks: bool = False
    times: int = 0  # that it was called, in all runs
    leader: BlockCalls | None = None
    answer: Any = None

    def wrap(self, block: nn.Module, path: str, operations: Operations) -> Callable[..., Any]:
        """The `forward` of the block at a path, noted."""
        forward = block.forward

        def watch(*args: Any, **kwargs: Any) -> Any:
            self.times += 1
            if self.called or self.problem:
                return forward(*args, **kwargs)
            self.called = True
            try:
                self.calls.append(make_call(forward, args, kwargs))
            except Opaque as error:
                self.problem = str(error)
                return forward(*args, **kwargs)
            if self.leader is not None and self.leader.called:
                return self.leader.answer
            alone = not self.operations and operations.lines is None
            if alone:
                operations.begin(path, block, self.calls[-1].tensors)
            before = Contents(bind_arguments(forward, args, kwargs))
            puts, states = _count_cached(self.calls[-1])
            self.answer = forward(*args, **kwargs)
            puts_now, states_now = _count_cached(self.calls[-1])
            self.attends |= puts_now > puts
            self.recurrent |= states_now > states
            changes = before.changes()
            self.writes |= bool(changes)
            if alone:
                self.own_masks = operations.have_own_masks()
                self.operations = operations.end([self.answer, [each.items for each in changes]])
                self.operations += "".join(
                    f"\n{each.path} holds {[(k, type(v).__name__) for k, v in each.items]}"
                    for each in changes
                )
                self.idle = self._find_idle_flags(forward, block, path, operations)
            return self.answer

        def answer(*args: Any, **kwargs: Any) -> Any:
            found = watch(*args, **kwargs)
            self.answered = True  # where it did not fail
            return found

        return answer

    def _find_idle_flags(
        self, forward: Callable[..., Any], block: nn.Module, path: str, operations: Operations
    ) -> frozenset[str]:
        """The flags of the call that may as well be the other: the block does and answers the same.

        Of a call over a cache, or with containers, nothing is said: the block would put into it
        twice, or leave something else there.
        """
        call, kind = self.calls[0], self.describe_work(block)
        if call.caches or takes_containers(call.template):
            return frozenset()
        given = call.template["kwargs"].items()
        flags = [name for name, value in given if isinstance(value, bool) and name != CAUSAL]
        if kind not in operations.idle:
            same = (self.operations, _freeze_answer(self.answer))
            found = {}
            for name in flags:
                operations.begin(path, block, call.tensors)
                answer = _call_with_other_flag(forward, call, name)
                found[name] = (operations.end(answer), _freeze_answer(answer))
            operations.idle[kind] = frozenset(name for name in found if found[name] == same)
        return operations.idle[kind]

    @property
    def unused(self) -> frozenset[int]:
        """The tensors of its call that a block neither computed with nor answered."""
        used = {int(place) for place in re.findall(r"%input (\d+)\[", self.operations)}
        return frozenset(range(len(self.calls[0].tensors))) - used

    def describe_work(self, block: nn.Module) -> str:
        """What a block was given first, and what it did, as text."""
        first = self.calls[0]
        given = [(tuple(t.shape), t.dtype) for t in first.tensors]
        return f"{type(block)} {first.template} {given} {self.operations}"


def _call_with_other_flag(forward: Callable[..., Any], call: Call, flag: str) -> Any:
    """What a call is answered of which one flag is the other; nothing where it raises."""
    args, kwargs = thaw_arguments(call.template, call.tensors, {})
    try:
        return forward(*args, **{**kwargs, flag: not kwargs[flag]})
    except Exception:  # whatever a model's code raises
        return None


def _freeze_answer(answer: Any) -> Any:
    """The structure of an answer; nothing equals one that has none."""
    try:
        return Frozen().freeze(answer, "answer")
    except Opaque:
        return object()


def observe(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    calls: Sequence[Callable[[], Arguments]],
    device: torch.device,
    truth: bool = False,
) -> dict[str, BlockCalls]:
    """Run a model once for each of `calls`, and note what each of its blocks is given first.

    Of the tensors of a call only shape and dtype count. `truth` is what comes of a question about
    values that the model asks between its blocks. A GPU as the device need not be there. Of a model
    on several devices, blocks that lie elsewhere than most of it have that as their problem.

    Raises:
        CompileFailed: the model looks at values, or cannot take what it is called with.
    """
    found = {path: BlockCalls(problem=p) for path, p in _find_misplaced(model, blocks)}
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with ExitStack() as around:
        around.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
        around.callback(clear_model_caches, model)
        around.enter_context(torch.no_grad())
        around.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        around.enter_context(pretend_gpu(PLANNED) if device.type == "cuda" else nullcontext())
        if truth:
            around.enter_context(_pretend_real())
        tensors = {
            name: torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=device)
            for name, each in (*model.named_parameters(), *model.named_buffers())
        }
        operations = Operations(tensors, truth, around.enter_context(note_masks()))
        for path, block in blocks.items():
            watched = found[path].wrap(block, path, operations)
            around.enter_context(replace_forward(block, watched))
        around.enter_context(operations)
        for index, call in enumerate(calls):
            args, kwargs = call()
            if index == 1:
                _assign_leaders(found, blocks)
            for seen in found.values():
                seen.called = seen.answered = False
            try:
                # A model may replace its buffers: each look begins with its own.
                torch.func.functional_call(model, dict(tensors), args, kwargs)
            except Exception as error:  # whatever a model's code raises
                _require_answers(model, found, error)
    for seen in found.values():  # whose tensors outlive the mode that they were made in
        seen.calls = [_move_call_to_meta(call) for call in seen.calls]
    return {path: seen for path, seen in found.items() if seen.calls or seen.problem}


def _find_misplaced(
    model: nn.Module, blocks: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str | None]]:
    """Each block's path, and why no graph for the model's device could read all of its tensors, if
    so.

    Those of a model from a config lie on the CPU, as far as they have memory, for every device.
    """
    everywhere = list_devices(model).keys()
    placed = len(everywhere) > 1 and everywhere != {"cpu", "meta"}
    kind = find_main_device(model).type
    for path, block in blocks.items():
        own = list_devices(block) if placed else {}
        alone = len(own) <= 1 and all(torch.device(name).type == kind for name in own)
        where = f"graphs of this model are for {kind}, and it has {describe_devices(own)}"
        yield path, None if alone else where


def _require_answers(model: nn.Module, found: Mapping[str, BlockCalls], error: Exception) -> None:
    """Refuse a model that failed before each of its blocks had answered."""
    if all(seen.answered for seen in found.values()):
        return
    if isinstance(error, UnsupportedOperatorException):
        raise describe_missing_fake("capture", error) from error
    inside = [path for path, seen in found.items() if seen.called and not seen.answered]
    before = _find_answered_path(found)
    compiled = f"compile what comes before with --regions {before}, or " if before else ""
    raise CompileFailed(
        f"capture: {type(model).__name__} cannot be run without values"
        f"{f', in {inside[-1]}' if inside else ''}: {type(error).__name__}: {first_line(error)}",
        hint=f"it looks at values to decide what to compute, or takes other inputs: {compiled}"
        "capture the calls of a module inside of it, as hubaoti.capture(model.PATH)",
    ) from error


def _find_answered_path(found: Mapping[str, BlockCalls]) -> str | None:
    """The first list of which all blocks have answered, else the first block that has."""
    missing = {path.rpartition(".")[0] for path, seen in found.items() if not seen.answered}
    answered = [path for path, seen in found.items() if seen.answered]
    lists = [path.rpartition(".")[0] for path in answered]
    whole = (path for path in lists if path and path not in missing)
    return next(itertools.chain(whole, answered), None)


def describe_missing_fake(step: str, op: Exception) -> CompileFailed:
    """The refusal of an op of which torch does not know what it answers, only how it is run."""
    return CompileFailed(
        f"{step}: the op {op} has no fake, so that it cannot be run without values",
        hint="who made the op can register one, with torch.library.register_fake; until then what "
        "calls it stays eager",
    )


def clear_model_caches(model: nn.Module) -> None:
    """Empty what a model's classes and their files cached of a run without storage: no values."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    kept = [value for cls in classes for value in vars(cls).values()]
    for name in {cls.__module__ for cls in classes} & {*sys.modules}:
        functions = [*vars(sys.modules[name]).values()]
        kept += [each for each in functions if getattr(each, "__module__", None) == name]
    # And what a function closes over, as the cache that a decorator's own function calls.
    cells = [cell for each in kept for cell in getattr(each, "__closure__", None) or ()]
    for cell in cells:
        with suppress(ValueError):  # an empty one
            kept.append(cell.cell_contents)
    for each in kept:
        if callable(clear := getattr(each, "cache_clear", None)):
            clear()


def _assign_leaders(found: Mapping[str, BlockCalls], blocks: Mapping[str, nn.Module]) -> None:
    """Give each block that did what one before it had done that one as its leader."""
    first: dict[str, BlockCalls] = {}
    for path, seen in found.items():
        if seen.calls and not seen.problem and not seen.writes:  # which others have to see
            leader = first.setdefault(seen.describe_work(blocks[path]), seen)
            seen.leader = None if leader is seen else leader


def _move_call_to_meta(call: Call) -> Call:
    tensors = (torch.empty(each.shape, dtype=each.dtype, device="meta") for each in call.tensors)
    return replace(call, tensors=tuple(tensors))


def _pretend_real() -> AbstractContextManager[None]:
    """Have transformers leave out masks that say nothing, as it does wherever nothing is traced.

    Private, there in transformers 5.15 to 5.24: `utils.import_utils.is_fake_tensor`, by which it
    knows a run without values. Where it has another name, masks stay.
    """
    from transformers.utils import import_utils

    if not hasattr(import_utils, "is_fake_tensor"):
        return nullcontext()
    return patch_attribute(import_utils, "is_fake_tensor", lambda _: False)


def _count_cached(call: Call) -> tuple[int, int]:
    """How many keys, and how many recurrent states, are in the caches of a call, which count."""
    layers = [layer for cache in call.caches for layer in getattr(cache, "layers", ())]
    puts = sum(len(getattr(layer, "puts", ())) for layer in layers)
    return puts, sum(getattr(layer, "states", 0) for layer in layers)
