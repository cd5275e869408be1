"""What a graph's inputs must be; everything is looked at before native code sees it.

A compiled graph checks nothing: a wrong stride gives a wrong answer, a size out of bounds reads
memory that is not its own. What has to be asked is worked out once, when the graph is opened; and
of a call that looks to torch as one that was examined before, only what may still differ is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Cache, Constant, Input
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput, MissingConstant, OutOfBounds
from hubaoti.runtime.known_calls import KnownCalls
from hubaoti.runtime.threads import Constants

# A CUDA graph clones an input whose address is not a multiple of this, and loses writes to it
# (torch._inductor.utils.ALIGNMENT).
_CUDA_ALIGNMENT = 16
_COMPILED = ("float32", "bfloat16", "float16")  # what `compile --dtype` takes
_NO_LIMIT = 1 << 62  # a size that no dim has

address = torch.Tensor.data_ptr


@dataclass(frozen=True, slots=True)
class Slot:
    """What one input must be, worked out once when the graph is opened."""

    entry: Input
    dtype: torch.dtype
    rank: int
    fixed: tuple[tuple[int, int], ...]  # (axis, size)
    dims: tuple[tuple[int, str], ...]  # (axis, name)
    extents: tuple[tuple[int, DimExpr], ...]  # (axis, what follows from dims)
    alignment: int
    below: int | None  # what its numbers must be less than, where they are ids

    @classmethod
    def of(cls, entry: Input, device: torch.device) -> Slot:
        """What a manifest's input must be for a graph on a device.

        Raises:
            BadInput: this torch does not have its dtype.
        """
        dtype = parse_dtype(entry.dtype)
        sizes = list(enumerate(entry.shape))
        follow = [(axis, DimExpr.parse(size)) for axis, size in sizes if isinstance(size, str)]
        return cls(
            entry,
            dtype,
            len(sizes),
            tuple((axis, size) for axis, size in sizes if isinstance(size, int)),
            tuple((axis, extent.dims[0]) for axis, extent in follow if extent.plain),
            tuple((axis, extent) for axis, extent in follow if not extent.plain),
            tensor_alignment(dtype, device),
            int(entry.values[4:]) if entry.values.startswith("ids<") else None,
        )


class Overlap(BadInput):
    """What a graph writes shares memory with what it reads."""


class BadValue(BadInput):
    """A number that no table has, or a place that no cache has."""


class OtherDtype(MissingConstant):
    """A tensor that is the constant but for its dtype."""

    def __init__(self, message: str, found: torch.dtype, wanted: torch.dtype) -> None:
        super().__init__(message, hint=advise_on_dtypes(found, wanted))
        self.dtypes = (found, wanted)


class Checks:
    """The questions that a graph's inputs are asked; all blocks that it serves share them."""

    def __init__(self, entry: Entry, device: torch.device) -> None:
        self.entry = entry
        self.device = device
        self.slots = [Slot.of(item, device) for item in entry.inputs]
        # Numbers are looked at on a CPU only: a GPU would have to be waited for.
        on_cpu = device.type == "cpu"
        ids = [index for index, slot in enumerate(self.slots) if slot.below is not None]
        self._ids = ids if on_cpu else []
        self._mutated = [index for index, slot in enumerate(self.slots) if slot.entry.mutated]
        largest = max((slot.alignment for slot in self.slots), default=1)
        self._odd = largest - 1  # the bits of an address that none may have
        self._seen: KnownCalls[tuple[tuple[int, ...], bool]] = KnownCalls()
        cache = entry.cache
        self._constants = Constants.of(constant.shape for constant in entry.constants)
        self._stored = () if cache is None else (cache.keys, cache.values)
        self._places = cache if on_cpu and cache and cache.position is not None else None

    def is_small(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether one thread of a CPU is the fastest for inputs that fit."""
        new = [tensor for index, tensor in enumerate(inputs) if index not in self._stored]
        return self.device.type == "cpu" and self._constants.is_small(inputs, new)

    def fit(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], bool]:
        """The inputs as the graph may have them, and whether they are a small call.

        What is only read is copied where it must be.

        Raises:
            BadInput: not the graph's number of inputs, dtype, rank, size or device; an input that
                the graph writes does not fit as it is, or shares memory with another; an id is not
                one of the vocabulary.
            OutOfBounds: a dim is outside of what the graph was compiled for.
        """
        if len(inputs) != len(self.slots):
            raise BadInput(
                f"graph {self.entry.id} takes {len(self.slots)} inputs, got {len(inputs)}",
                hint="give them in the manifest's order",
            )
        seen = self._seen.find(inputs)
        if seen is None:
            inputs = self.examine(inputs)
            seen = tuple(tensor.nbytes for tensor in inputs), self.is_small(inputs)
            self._seen.add(inputs, seen)
        fitting = self.fit_known(inputs, seen[0])
        if self._places is not None:
            self._require_places(fitting, self._places)
        return fitting, seen[1]

    def fit_known(self, inputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Inputs whose look was examined, of these sizes in bytes: where they lie, and ids.

        Raises:
            BadInput: one that is written cannot be where it is.
            Overlap: one that is written shares memory with another.
            BadValue: an id that no table has, for which native code would end the process.
        """
        addresses = [*map(address, inputs)]
        if reduce(or_, addresses, 0) & self._odd:
            inputs = [
                fit_to_slot(slot, each) for slot, each in zip(self.slots, inputs, strict=True)
            ]
            addresses = [*map(address, inputs)]
        if self._mutated:
            self._require_apart(addresses, sizes)
        for index in self._ids:
            self._require_id(self.slots[index], inputs[index])
        return [*inputs]

    def examine(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Look at everything but numbers, and copy what has to be copied."""
        sizes: dict[str, int] = {}
        fitting = []
        for slot, tensor in zip(self.slots, inputs, strict=True):
            self._check_kind(slot, tensor)
            self._check_sizes(slot, tensor, sizes)
            fitting.append(fit_to_slot(slot, tensor))
        self._check_related(inputs, sizes)
        return fitting

    def _require_id(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Refuse ids that no table has."""
        assert slot.below is not None
        odd = _find_out_of_range(tensor, slot.below)
        if odd is not None:
            raise BadValue(
                f"{slot.entry.name} has {odd}: index out of bounds, which are 0 to "
                f"{slot.below - 1}",
                hint="see that its inputs are what the manifest says of their values",
            )

    def _require_places(self, inputs: Sequence[torch.Tensor], cache: Cache) -> None:
        """Refuse to write beyond a cache."""
        assert cache.position is not None
        places = inputs[cache.keys].shape[2]
        odd = _find_out_of_range(inputs[cache.position], places)
        if odd is not None:
            raise BadValue(
                f"position {odd} is outside of a cache of {places} places",
                hint="make a longer cache",
            )

    def _check_kind(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Refuse another dtype, device or number of axes."""
        expected = (slot.dtype, self.device, slot.rank)
        found = (tensor.dtype, tensor.device, tensor.dim())
        if found != expected or not has_memory(tensor):
            raise BadInput(
                f"{slot.entry.name} is {_describe_kind(*found)}{describe_layout(tensor)}; graph "
                f"{self.entry.id} takes {_describe_kind(*expected)}",
                hint=f"convert {slot.entry.name} before the call",
            )

    def _check_sizes(self, slot: Slot, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
        """Refuse a fixed size that differs, a dim outside its bounds, or one dim of two sizes."""
        shape = tensor.shape
        for axis, size in slot.fixed:
            if shape[axis] != size:
                raise BadInput(
                    f"{slot.entry.name} has size {shape[axis]} on axis {axis}, not {size}",
                    hint="this graph was compiled for another shape",
                )
        for axis, dim in slot.dims:
            self._learn_dim(dim, shape[axis], slot, sizes)

    def _learn_dim(self, dim: str, size: int, slot: Slot, sizes: dict[str, int]) -> None:
        """Learn a dim's size; refuse one outside its bounds, or another than before."""
        low, high = self.entry.bounds[dim]
        if not low <= size <= high or size % self.entry.steps.get(dim, 1):
            step = f" in steps of {self.entry.steps[dim]}" if dim in self.entry.steps else ""
            raise OutOfBounds(
                f"{dim} is {size}; graph {self.entry.id} takes {low} to {high}{step}",
                hint=f"stay within, or compile with --dim {dim}={min(low, size)}:{max(high, size)}",
            )
        if sizes.setdefault(dim, size) != size:
            raise BadInput(
                f"{slot.entry.name} has {dim} = {size}, another input has {sizes[dim]}",
                hint=f"all inputs of one call share {dim}",
            )

    def _check_related(self, inputs: Sequence[torch.Tensor], sizes: dict[str, int]) -> None:
        """Refuse a size that does not follow from the dims as the manifest says it does."""
        for slot, tensor in zip(self.slots, inputs, strict=True):
            for axis, extent in slot.extents:
                size = tensor.shape[axis]
                unknown = [dim for dim in extent.dims if dim not in sizes]
                dim_size = extent.solve(size) if unknown else None
                if dim_size is not None:
                    self._learn_dim(unknown[0], dim_size, slot, sizes)
                elif unknown or extent.at(sizes) != size:
                    raise BadInput(
                        f"{slot.entry.name} has size {size} on axis {axis}, which is not {extent}",
                        hint=f"the dims of this call are {sizes}",
                    )
        if sizes.get("filled", 0) > sizes.get("cache", _NO_LIMIT) and self.entry.cache:
            raise OutOfBounds(
                f"filled is {sizes['filled']}, the cache holds {sizes['cache']}",
                hint="make a longer cache",
            )

    def _require_apart(self, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        """Refuse to write where another input is read."""
        for index in self._mutated:
            start, end = addresses[index], addresses[index] + sizes[index]
            for other, (low, size) in enumerate(zip(addresses, sizes, strict=True)):
                if low < end and low + size > start and other != index:
                    names = [self.slots[each].entry.name for each in (index, other)]
                    raise Overlap(
                        f"{names[0]}, which the graph writes, shares memory with {names[1]}",
                        hint="give each a tensor of its own",
                    )


def _find_out_of_range(tensor: torch.Tensor, below: int) -> int | None:
    """The number of a tensor that is not from 0 to below `below`, if there is one."""
    if not tensor.numel():
        return None
    if tensor.numel() == 1:  # a step's position: many times as fast
        only = int(tensor)
        return None if 0 <= only < below else only
    low, high = (int(edge) for edge in torch.aminmax(tensor))
    if low < 0 or high >= below:
        return low if low < 0 else high
    return None


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are what lies in its memory, one after the other."""
    return tensor.layout is torch.strided and not (
        tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()
    )


def describe_layout(tensor: torch.Tensor) -> str:
    """How a tensor lies whose values are not in its memory, to go behind its kind; else nothing."""
    if tensor.layout is not torch.strided:
        return f" ({str(tensor.layout).removeprefix('torch.')})"
    return "" if has_memory(tensor) else " (a view whose values are not computed yet)"


def fit_to_slot(slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its memory is as the graph reads it, else a copy that is."""
    if tensor.is_contiguous() and tensor.data_ptr() % slot.alignment == 0:
        return tensor
    if slot.entry.mutated:
        raise BadInput(
            f"{slot.entry.name} is written by the graph and is not contiguous and aligned",
            hint="pass the tensor itself, not a view of it",
        )
    return tensor.clone(memory_format=torch.contiguous_format)


def check_constant(constant: Constant, tensor: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that is not the constant the graph was compiled for.

    Raises:
        MissingConstant: dtype, shape, stride, alignment or device differ. OtherDtype: the dtype
            alone does.
    """
    dtype = parse_dtype(constant.dtype)
    if not has_memory(tensor):
        raise MissingConstant(
            f"{constant.fqn} is {_describe_kind(tensor.dtype, tensor.device, tensor.dim())}"
            f"{describe_layout(tensor)}, not a plain one",
            hint="give the module plain tensors: to_dense(), clone()",
        )
    found = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device)
    expected = (dtype, constant.shape, constant.stride, device)
    if found != expected:
        message = (
            f"{constant.fqn} is {found[0]} {list(found[1])} strides {list(found[2])} on "
            f"{found[3]}; the graph was compiled for {expected[0]} {list(expected[1])} strides "
            f"{list(expected[2])} on {expected[3]}"
        )
        if found[1:] == expected[1:]:
            raise OtherDtype(message, tensor.dtype, dtype)
        raise MissingConstant(message, hint="use the checkpoint of a model that has this program")
    if tensor.data_ptr() % tensor_alignment(dtype, device):
        raise MissingConstant(
            f"{constant.fqn} starts at an address that the graph cannot read",
            hint="clone the tensor before binding it",
        )


def tensor_alignment(dtype: torch.dtype, device: torch.device) -> int:
    """The multiple that a tensor's address must be, in bytes."""
    return dtype.itemsize if device.type == "cpu" else _CUDA_ALIGNMENT


def parse_dtype(name: str) -> torch.dtype:
    """The dtype that a manifest names.

    Raises:
        BadInput: this torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"this torch has no dtype {name}", hint="upgrade torch")
    return dtype


def advise_on_dtypes(
    found: torch.dtype, wanted: torch.dtype, how: str = "load the model with dtype={}"
) -> str:
    """What to do where a model has its weights in another dtype than graphs were compiled for.

    `how` says what gives it theirs.
    """
    own = name_dtype(found)
    return how.format(wanted) + (f"; or compile it with --dtype {own}" if own in _COMPILED else "")


def name_dtype(dtype: torch.dtype) -> str:
    """A dtype as manifests and messages name it: `parse_dtype` takes it back."""
    return str(dtype).removeprefix("torch.")


def _describe_kind(dtype: torch.dtype, device: torch.device, rank: int) -> str:
    """What a tensor is, for a message: its dtype, its number of axes, where it is."""
    return f"a {name_dtype(dtype)} tensor of {rank} axes on {device}"
