"""Which operations a block does, written down as they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_Step = tuple[str, Any]  # an operation of a block: what was called, and what came of it


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations of the block that runs: names, numbers, and of what they are.

    Tensors are called by what they are to the block: one of its inputs, one of its own by name, a
    result by its place. Any other tensor is a constant, which only its values tell from others.

    What a block of the same kind was asked before, in the same words, it is not asked again: most
    of a model is blocks that do what one before them did, and a result has no values.

    `masks` are what attention was given, as `note_masks` has them.
    """

    def __init__(
        self, own: Mapping[str, torch.Tensor], truth: bool, masks: list[torch.Tensor | None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._truth, self._masks = truth, masks
        self.lines: list[str] | None = None
        self.idle: dict[str, frozenset[str]] = {}  # by what a block did: the flags that it ignores
        self._own = {id(tensor): name for name, tensor in own.items()}
        self._start = ""
        self._words: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # an id is one tensor's only while it lives
        self._known: dict[Any, list[list[_Step]]] = {}  # by kinds of blocks
        self._kind: Any = None
        self._alike: list[list[_Step]] = []  # those that did the same so far
        self._steps: list[_Step] = []
        self._pure = True

    def begin(self, path: str, block: nn.Module, given: Sequence[torch.Tensor]) -> None:
        """Write down from here on what the block at a path does with what it is given."""
        self._masks.clear()
        self._start = f"{path}."
        self._words = {id(tensor): f"input {index}" for index, tensor in enumerate(given)}
        self.lines, self._kept = [], [*given]
        own = [_fingerprint_tensor(tensor, name) for name, tensor in block.named_parameters()]
        own += [_fingerprint_tensor(tensor, name) for name, tensor in block.named_buffers()]
        self._kind = (type(block), *own, *map(_fingerprint_tensor, given))
        self._alike, self._steps, self._pure = self._known.get(self._kind, []), [], True

    def end(self, answer: Any) -> str:
        """What was written down, and what of it the block answers and leaves in its call."""
        lines, self.lines = self.lines or [], None
        leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        last = " ".join(self._name_value(leaf) for leaf in leaves)
        if self._pure and not self._alike:
            self._known.setdefault(self._kind, []).append(self._steps)
        self._words, self._kept = {}, []
        return "\n".join([*lines, last])

    def have_own_masks(self) -> bool:
        """Whether attention was given masks, and nothing but those that the block was given."""
        words = [self._words.get(id(mask), "") for mask in self._masks]
        return bool(words) and all(word.startswith("input ") for word in words)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.lines is None:
            return self._run_outside_blocks(func, args, kwargs or {})
        if func.namespace == "prim":  # as asking for a device
            return func(*args, **(kwargs or {}))
        request = " ".join([str(func), *map(self._name_value, tree_leaves((args, kwargs)))])
        before = self._find_same_step(request)
        # A view is of one tensor only, and belongs to it.
        out = func(*args, **(kwargs or {})) if before is None or func.is_view else before[1]
        leaves = tree_leaves(out)
        # What writes to a tensor is done for each block: it would write to another's.
        self._pure &= not func._schema.is_mutable and self._is_new(out)
        self.lines.append(f"{request} -> {' '.join(map(self._name_value, leaves))}")
        self._steps.append((request, out))
        return out

    def _run_outside_blocks(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation between the blocks, where what has no values is zero, or false, to who asks.

        That decides what the model does around its blocks, as with a rope that grows: it stays
        eager. What they are given in another case is another call to their graphs. With `truth`, it
        is true: that a mask is all ones, say, so that it can be left out.
        """
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            is_scalar = func is torch.ops.aten._local_scalar_dense.default
            dtype = args[0].dtype if is_scalar else torch.bool
            return 0.0 if dtype.is_floating_point else self._truth if dtype is torch.bool else 0

    def _find_same_step(self, request: str) -> _Step | None:
        """What came of the same in a block that did the same until here."""
        index = len(self._steps)
        alike = (steps for steps in self._alike if index < len(steps))
        self._alike = [steps for steps in alike if steps[index][0] == request]
        step = self._alike[0][index] if self._alike else None
        # What this block has already, as its input, is another tensor than what comes of it.
        return step if step is not None and self._is_new(step[1]) else None

    def _is_new(self, out: Any) -> bool:
        """Whether the block has not had any tensor of a result before."""
        return all(id(leaf) not in self._words for leaf in tree_leaves(out))

    def _name_value(self, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        if id(leaf) not in self._words:
            self._words[id(leaf)] = self._name_new_tensor(leaf)
            self._kept.append(leaf)
        return f"%{self._words[id(leaf)]}{list(leaf.shape)}"

    def _name_new_tensor(self, tensor: torch.Tensor) -> str:
        if id(tensor) in self._own:
            return self._own[id(tensor)].removeprefix(self._start)
        place = str(len(self._words))
        return place if isinstance(tensor, FakeTensor) else f"{place} {digest_values(tensor)}"


def _fingerprint_tensor(tensor: torch.Tensor, name: str = "") -> tuple[Any, ...]:
    """What of a tensor decides on what comes of it, where it has no values."""
    return name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def digest_values(tensor: torch.Tensor) -> str:
    """The digest of a tensor's values; a tensor without storage has none.

    Private, checked on torch 2.11 to 2.15: `unset_fake_temporarily`. Within a mode of fake tensors
    there is no public way to the values of a real one.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return "no values"
    with unset_fake_temporarily():
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:12]
