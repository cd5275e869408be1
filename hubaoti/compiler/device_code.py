"""Code that computes something else on a GPU than on the CPU, where programs are traced.

A module is run twice without storage, once on each, and what it asks of torch is compared: not
which kernels torch takes for that, which is torch's affair and may differ.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from hubaoti.compiler.fake_gpu import CPU, GPU, pretend_gpu, pretend_no_gpu
from hubaoti.compiler.fake_run import clear_model_caches
from hubaoti.compiler.module_copy import copy_module
from hubaoti.compiler.operations import digest_values
from hubaoti.compiler.patched import patch_attribute
from hubaoti.compiler.signature import CallSignature, FlatModule
from hubaoti.compiler.symbols import list_parts
from hubaoti.errors import CompileFailed, first_line

_HINT = (
    "have its code do the same on every device, or compile other layers of the model: --regions "
    "PATH; what is not compiled stays eager"
)
_DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")
_WRITES = {"__setitem__", "__set__", "copy_"}
# What these answer has the values that they were given: asked on one side only, nothing differs.
_SAME_VALUES = {"contiguous", "cpu", "cuda", "to"}
# What torch.export sets while it traces, which code asks for: private, there in torch 2.11 to 2.15.
_TRACING = {"_is_compiling_flag", "_is_exporting_flag"}
_SAME_NUMBERS = {"int", "long", "float", "double"}
_TORCH = str(Path(torch.__file__).parent)


def require_same_on_gpu(
    module: nn.Module, face: CallSignature, tensors: Sequence[torch.Tensor], capability: int
) -> None:
    """Refuse a module whose code asks for the device, and computes something else on a GPU.

    `tensors` are a call of the module, of which sizes and dtypes count only. With the attention
    that the module is traced with. Nothing is computed, and nothing of the module changes. What
    code found out before, as while it was imported, is not seen.

    Raises:
        CompileFailed: with the first thing that is asked of torch in one case only, and where.
    """
    here = _run(module, face, tensors, CPU, pretend_no_gpu())
    there = _run(module, face, tensors, GPU, pretend_gpu(capability))
    kind = type(module).__name__
    if found := next((each for each in here.steps if each.elsewhere), None):
        raise CompileFailed(
            f"source: {kind} moves tensors to a GPU by itself, wherever its own are: "
            f"{found.text}{found.where}",
            hint=f"name the device of a tensor that it is given, as x.device; {_HINT}",
        )
    for ours, theirs in zip_longest(here.steps, there.steps):
        if ours is None or theirs is None or ours.text != theirs.text:
            raise _describe_difference(kind, ours, theirs, there)
    if _DEVICE.sub("", here.error) != _DEVICE.sub("", there.error):
        raise CompileFailed(
            f"source: {kind} fails on {'a GPU' if there.error else 'the CPU'} only: "
            f"{there.error or here.error}",
            hint=_HINT,
        )
    if here.answer != there.answer:
        raise CompileFailed(
            f"source: {kind} answers something else on a GPU: {there.answer}, and on the CPU "
            f"{here.answer}",
            hint=_HINT,
        )


def settle_autocast(program: ExportedProgram) -> ExportedProgram:
    """A program in which autocast is what it did where it was traced: each tensor made of a dtype.

    Its regions name the device that they are for, and do nothing once a program is moved. A program
    that has none is answered itself.
    """
    targets = {node.target for part in list_parts(program) for node in part.graph.nodes}
    if torch.ops.higher_order.wrap_with_autocast not in targets:
        return program
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of torch's own calls
        settled: ExportedProgram = program.run_decompositions({})
    return settled


@dataclass(frozen=True, slots=True)
class _Step:
    """What was asked of torch, without devices, and the line of code that asked.

    It is `elsewhere` where the answer lies on another device than what the module was given.
    """

    text: str
    where: str
    elsewhere: bool


@dataclass(slots=True)
class _Run:
    """What a module asked of torch, what it answered, and what it raised, if it did."""

    steps: list[_Step] = field(default_factory=list)
    answer: str = ""
    error: str = ""


def _describe_difference(
    kind: str, ours: _Step | None, theirs: _Step | None, there: _Run
) -> CompileFailed:
    """The refusal of a module, with the first thing that is asked in one case only."""
    if theirs is None and there.error:
        return CompileFailed(f"source: {kind} fails on a GPU only: {there.error}", hint=_HINT)
    words = [each.text + each.where if each else "nothing more" for each in (theirs, ours)]
    return CompileFailed(
        f"source: {kind} computes something else on a GPU: {words[0]}, and on the CPU {words[1]}",
        hint=_HINT,
    )


def _run(
    module: nn.Module,
    face: CallSignature,
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    pretending: AbstractContextManager[None],
) -> _Run:
    """What a copy of a module on a device, without values, asks of torch in a call."""
    run = _Run()
    with warnings.catch_warnings(), _without_values(module), pretending:
        warnings.simplefilter("ignore")  # of autocast, where there is no GPU
        copied = copy_module(module, lambda tensor: _make_fake(tensor, device), str(device))
        flat, given = FlatModule(copied, face), [_make_fake(tensor, device) for tensor in tensors]
        named = {id(tensor): f"input {index}" for index, tensor in enumerate(given)}
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            named[id(tensor)] = name
        with _Requests(run.steps, named, device) as requests:
            try:
                answer = flat(*given)
            except Exception as error:  # whatever a model's code raises
                run.error = f"{type(error).__name__}: {first_line(error)}"
            else:
                words = [*map(requests.name_value, answer), repr(flat.template), repr(flat.writes)]
                away = [] if all(map(requests.is_here, answer)) else ["not all of it there"]
                run.answer = " ".join([*words, *away])
    return run


@contextmanager
def _without_values(module: nn.Module) -> Iterator[None]:
    """Around a run of a module without storage, as torch traces it, but for fixed sizes."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    clear_model_caches(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    try:
        with ExitStack() as around:
            for flag in vars(torch.compiler).keys() & _TRACING:
                around.enter_context(patch_attribute(torch.compiler, flag, True))
            around.enter_context(torch.no_grad())
            around.enter_context(mode)
            yield
    finally:
        clear_model_caches(module)
        logger.setLevel(before)


def _make_fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor without storage on a device, a parameter where it is one."""
    bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


class _Requests(TorchFunctionMode):
    """Writes down what is asked of torch that answers tensors or writes to them."""

    def __init__(self, steps: list[_Step], named: dict[int, str], device: torch.device) -> None:
        super().__init__()
        self._steps, self._named, self._device = steps, named, device
        self._kept: list[torch.Tensor] = []  # an id is one tensor's only while it lives
        self._numbers: set[int] = set()  # tensors whose dtype says nothing of their values
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(answer) if _has_device(leaf)]
        name = getattr(func, "__name__", str(func))
        elsewhere = self._device == CPU and not all(map(self.is_here, results))
        if not elsewhere and self._keeps_values(name, args, answer):
            self._name(answer, self._find_name(args[0]))
        elif results or name in _WRITES:
            words = [*map(self.name_value, tree_leaves((args, kwargs))), "->"]
            words += map(self.name_value, results)
            text = " ".join([resolve_name(func) or name, *words])
            self._steps.append(_Step(text, _find_caller(), elsewhere))
        return answer

    def name_value(self, leaf: Any) -> str:
        """A value as text that is equal on every device."""
        if isinstance(leaf, torch.Tensor):
            numbers = id(leaf) in self._numbers
            kind = "numbers" if numbers else str(leaf.dtype).removeprefix("torch.")
            return f"%{self._find_name(leaf)}:{kind}{list(leaf.shape)}"
        if isinstance(leaf, torch.device) or (isinstance(leaf, str) and _DEVICE.fullmatch(leaf)):
            return "device"
        return repr(leaf)

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where the module's own do."""
        return tensor.device.type == self._device.type

    def _keeps_values(self, name: str, args: Sequence[Any], answer: Any) -> bool:
        """Whether what is answered has the values that were given, so that they keep their name.

        Whole numbers are the same as other numbers: torch.histc counts floats on the CPU only, and
        integers with deterministic algorithms on a GPU only, so that code converts them before.
        """
        if not args or not isinstance(args[0], torch.Tensor) or not _has_device(answer):
            return False
        given = args[0]
        if name in _SAME_NUMBERS and not given.is_floating_point() and given.shape == answer.shape:
            self._numbers.add(id(answer))
            return True
        if name == "histc" and id(given) in self._numbers:
            self._numbers.add(id(answer))
        same = (given.dtype, given.shape) == (answer.dtype, answer.shape)
        return name in _SAME_VALUES and same

    def _find_name(self, tensor: torch.Tensor) -> str:
        """What a tensor is to the module; of one from outside its values tell."""
        if id(tensor) not in self._named:
            values = "" if isinstance(tensor, FakeTensor) else f" {digest_values(tensor)}"
            self._name(tensor, f"{self._count}{values}")
            self._count += 1
        return self._named[id(tensor)]

    def _name(self, tensor: torch.Tensor, name: str) -> None:
        self._named[id(tensor)] = name
        self._kept.append(tensor)


def _has_device(leaf: Any) -> bool:
    """Whether a value is a tensor that lies somewhere, unlike those that torch makes fakes by."""
    return isinstance(leaf, torch.Tensor) and (isinstance(leaf, FakeTensor) or not leaf.is_meta)


def _find_caller() -> str:
    """The line of code that asked, beyond torch's own, as the end of a sentence."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return f", at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
