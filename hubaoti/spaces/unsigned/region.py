"""Packages without a manifest, as other tools make them: called by their own call spec.

Nothing says for which calls and which module such a package was made. So each call of a new look is
answered by the module first, and the graph's answer compared; and whatever cannot be seen to fit
is answered by the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Member
from hubaoti.attachment.binding import require_quiet
from hubaoti.attachment.first_call import AGREES, DIFFERS, UNTRIED, describe_difference
from hubaoti.attachment.forward_patch import CountMiss, GraphPatch
from hubaoti.attachment.module_guard import refuse_collecting
from hubaoti.attachment.torch_modes import refuse_modes, refuse_watchers, wants_gradient
from hubaoti.errors import CannotOpen, MissingConstant
from hubaoti.program.output_capturing import find_captures_inside
from hubaoti.runtime.capturing import is_capturing
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.graph import explain_refusal
from hubaoti.runtime.input_checks import address, tensor_alignment
from hubaoti.runtime.library import hold_library
from hubaoti.runtime.runners import Bound, Runner, open_native_runner
from hubaoti.settings import override_environment
from hubaoti.spaces.unsigned.outcomes import IS_BUSY, IS_FULL, CallOutcomes

_PLAIN = (torch.Tensor, nn.Parameter)
# What a package was made for beside its tensors; anything else may change and look the same.
_VALUES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout)
# Read by a library at its first run: it compares its inputs with the sizes that it was made for.
_CHECKS = {"AOTI_RUNTIME_CHECK_INPUTS": "1"}
# c10/core/ScalarType.h: the numbers by which a library names the dtypes of its constants.
_DTYPES = {
    **dict(enumerate((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))),
    **{5: torch.float16, 6: torch.float32, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16},
    **{23: torch.float8_e5m2, 24: torch.float8_e4m3fn},
}


def find_library(members: Iterable[Member], name: str) -> Member:
    """A package's library inside of it.

    Raises:
        CannotOpen: it has none, or several.
    """
    found = [member for member in members if member.path.endswith(".so")]
    libraries = [each for each in found if each.path.endswith(".wrapper.so")] or found
    if len(libraries) != 1:
        raise CannotOpen(
            f"{name} has {len(libraries)} libraries, not one", hint="ask its publisher"
        )
    return libraries[0]


def open_package(
    folder: Path, members: Sequence[Member], name: str, device: torch.device
) -> Runner:
    """Make an unpacked package callable; the caller has verified the folder.

    Raises:
        DigestMismatch: its library has other bytes by now.
        CannotOpen, MissingOps: it cannot be loaded here.
    """
    try:
        library = hold_library(folder, find_library(members, name), members)
        return open_native_runner(folder, library, device)
    except (RuntimeError, OSError) as error:
        raise explain_refusal(name, folder, str(error)) from error


class UnsignedRegion(GraphPatch):
    """A module's `forward` that a package answers by its own call spec, or else the module."""

    __slots__ = (
        *("_id", "_names", "_dtypes", "_taken", "_made", "_device", "_outcomes"),
        *("_given", "_bound", "_addresses", "_has_run"),
    )

    def __init__(
        self, path: str, module: nn.Module, entry: Entry, runner: Runner, device: torch.device
    ) -> None:
        """Raises MissingConstant where the module lacks tensors that the package reads."""
        super().__init__(path, module, [runner], [entry.id])
        self._id = entry.id
        self._names = runner.get_constant_names_to_original_fqns()
        if missing := sorted({*self._names.values()} - _collect_tensors(module).keys()):
            raise MissingConstant(
                f"{path or type(module).__name__} has no {', '.join(missing)}, which its package "
                "reads",
                hint="load the packages of this very model",
            )
        dtypes = getattr(runner, "get_constant_names_to_dtypes", None)
        self._dtypes: dict[str, int] = dtypes() if dtypes else {}
        self._taken, self._made = map(pytree.treespec_loads, runner.get_call_spec())
        self._device = device
        self._given: list[torch.Tensor] = []
        self._bound = Bound({})
        self._addresses: list[int] = []
        self._has_run = False
        self._outcomes: CallOutcomes | None = None

    def put(self, count_miss: CountMiss, outcomes: CallOutcomes) -> None:
        """Answer from here on; `count_miss` is told of each call that the module answers itself."""
        self._count_miss, self._outcomes = count_miss, outcomes
        self.install()

    def remove(self) -> None:
        """Give the module its own `forward` back, and its tensors."""
        super().remove()
        with self._lock:
            self.graphs = []
            self._given, self._bound, self._addresses = [], Bound({}), []

    def bind(self, *, anew: bool = False) -> None:
        """As every patch of graphs does, of a module that has all its tensors in their dtypes."""
        with self._lock:
            if not self.graphs or (not anew and self._is_bound()):
                return
            self._given = []
            found = _collect_tensors(self.module)
            given = {inner: self._find_tensor(found, inner) for inner in self._names}
            bound = Bound({inner: _align_detached(tensor) for inner, tensor in given.items()})
            self.graphs[0].update_constant_buffer(bound.aliases, False, True, True)
            self._bound, self._given = bound, [*given.values()]
            self._addresses = [*map(address, self._given)]

    def _find_tensor(self, found: Mapping[str, torch.Tensor], inner: str) -> torch.Tensor:
        """The tensor of one constant, which has to fit."""
        fqn = self._names[inner]
        tensor, dtype = found.get(fqn), _DTYPES.get(self._dtypes.get(inner, -1))
        if tensor is None or type(tensor) not in _PLAIN or tensor.is_meta:
            message = "is not there" if tensor is None else f"is a {type(tensor).__name__}"
            raise CannotServe("weights", f"{fqn} {message}")
        if tensor.device != self._device:
            raise CannotServe(
                "weights", f"{fqn} is on {tensor.device}, the package on {self._device}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise CannotServe("weights", f"{fqn} is {tensor.dtype}; the package takes {dtype}")
        return tensor

    def _is_bound(self) -> bool:
        """Whether the package has the module's tensors as they are now."""
        if len(self._given) != len(self._names):
            return False
        found = _collect_tensors(self.module)
        same = all(map(is_, map(found.get, self._names.values()), self._given))
        return same and [*map(address, self._given)] == self._addresses

    def answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the package answers, once its answer to a call of this look was compared."""
        refuse_watchers()
        if is_capturing(self._device):  # answers are compared at calls that nobody knows of
            raise CannotServe("capture", "a package without a manifest is in no CUDA graph")
        refuse_modes(self._device)
        self._require_quiet()
        self.bind()
        inputs, values = self._read_inputs(args, kwargs)
        tensors = ((*each.shape, str(each.dtype)) for each in inputs)
        look = (self.path, self._id, *tensors, *values)
        assert self._outcomes is not None
        verdict = self._outcomes[look]
        if verdict == DIFFERS:
            raise CannotServe("differs", "the package refused such a call, or answered otherwise")
        if verdict == IS_FULL:
            raise CannotServe(
                "arguments", "there were too many different calls to remember this one"
            )
        if verdict == IS_BUSY:  # who tries it will know
            return self.eager(*args, **kwargs)
        if verdict == UNTRIED:
            eager = partial(self.eager, *args, **kwargs)
            return self._compare(self._outcomes, look, inputs, eager)
        outputs = self._run(inputs)
        next(self._counts[self._id])
        return pytree.tree_unflatten(outputs, self._made)

    def _compare(
        self,
        outcomes: CallOutcomes,
        look: object,
        inputs: list[torch.Tensor],
        eager: Callable[[], Any],
    ) -> Any:
        """What the module answers, after the package was asked the same; others are told."""
        outcomes.begin(look)
        try:
            given = [each.clone() for each in inputs]
            ours = self._run(given)
            writes = not all(map(_have_same_bytes, given, inputs))
            answer = eager()
            writes = writes or not all(map(_have_same_bytes, given, inputs))
            outcomes[look] = DIFFERS if writes or self._differs(ours, answer) else AGREES
        except CannotServe:
            outcomes.count_failure(look)
            raise
        except BaseException:
            outcomes.undo(look)
            raise
        next(self._compared[self._id])
        return answer

    def _differs(self, ours: list[torch.Tensor], answer: Any) -> bool:
        """Whether the module answers otherwise than the package, or in another structure."""
        leaves, made = pytree.tree_flatten(answer)
        if made != self._made or len(ours) != made.num_leaves:
            return True
        theirs = [each for each in leaves if isinstance(each, torch.Tensor)]
        return describe_difference(ours, theirs) is not None

    def _require_quiet(self) -> None:
        """Refuse what a graph cannot see, and gradients of the module's own tensors."""
        require_quiet(self.module, (UnsignedRegion,))
        refuse_collecting(find_captures_inside(self.module))
        if torch.is_grad_enabled() and any(each.requires_grad for each in self.module.parameters()):
            raise CannotServe("gradients", "the module's parameters are trained")

    def _read_inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], list[str]]:
        """The tensors and all values of a call that is as the package's own call spec has it."""
        names = self._taken.child(1).context
        if {*kwargs} != {*names}:
            raise CannotServe("arguments", f"{', '.join(kwargs) or 'nothing'} is given by name")
        leaves, given = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in names}))
        if given != self._taken:
            raise CannotServe("arguments", "the call has another structure than the package's")
        inputs = [each for each in leaves if isinstance(each, torch.Tensor)]
        values = [_describe_leaf(each) for each in leaves]
        for each in inputs:
            if type(each) not in _PLAIN:
                raise CannotServe("subclass", f"an input is a {type(each).__name__}")
            if torch.is_grad_enabled() and wants_gradient(each):
                raise CannotServe("gradients", "gradients are wanted of an input")
            if each.device != self._device:
                raise CannotServe("device", f"an input is on {each.device}")
            if not each.is_contiguous():
                raise CannotServe("layout", "an input is a view")
        return inputs, values

    def _run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The package's answer to a list of tensors."""
        bound = self._bound  # held until it has run
        try:
            with nullcontext() if self._has_run else override_environment(**_CHECKS):
                self._has_run = True
                runner: Runner = self.graphs[0]
                return runner.run([_align_detached(each) for each in inputs])
        except (RuntimeError, IndexError) as error:
            raise CannotServe("failed", f"{error!s:.200}") from error
        finally:
            del bound


def _collect_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a package may read, by every name: parameters and buffers, saved or not."""
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def _describe_leaf(leaf: object) -> str:
    """A leaf of a call that is not a tensor, as its look has it."""
    if isinstance(leaf, torch.Tensor):
        return "a tensor"
    if type(leaf) not in _VALUES:
        raise CannotServe("arguments", f"it is given a {type(leaf).__name__}")
    return f"{type(leaf).__name__} {leaf!r}"


def _have_same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _align_detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy where it starts at an address that cannot be read."""
    off = tensor.data_ptr() % tensor_alignment(tensor.dtype, tensor.device)
    return tensor.detach().clone() if off else tensor.detach()
