"""Open one graph, bind its constants by reference, and call it; nothing unchecked reaches it.

A compiled graph checks nothing: a wrong stride gives a wrong answer, an unbound constant a crash.
So every input and constant is compared with the manifest here, in Python, before native code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hubaoti.errors import (
    BadInput,
    BadRequest,
    CannotOpen,
    MissingConstant,
    MissingOps,
    OutOfBounds,
    first_line,
)
from hubaoti.extents import Extent
from hubaoti.manifest import Constant, Input
from hubaoti.manifest import Graph as Entry
from hubaoti.runtime.runners import Runner, native_runner

# A CUDA graph clones an input whose address is not a multiple of this, and loses writes to it
# (torch._inductor.utils.ALIGNMENT).
CUDA_ALIGNMENT = 16
LARGEST = 1 << 62  # a size that no dim has


def device_for(target: str, asked: str | None = None) -> torch.device:
    """Where a graph that was built for `target` (cpu or cuda) is opened: by default its first.

    Raises:
        BadRequest: what is asked for is no device, or one of another kind.
    """
    try:
        device = torch.device(asked or target)
    except RuntimeError as why:
        raise BadRequest(f"unknown device: {asked!r:.120}", hint=f"ask for {target}") from why
    if device.type != target:
        raise BadRequest(
            f"the artifact was built for {target}, not for {device}", hint=f"ask for {target}"
        )
    # A CUDA graph is always told which GPU; the CPU has no number.
    return torch.device("cuda", device.index or 0) if target == "cuda" else torch.device("cpu")


def open_graph(folder: Path, entry: Entry, device: torch.device) -> Graph:
    """Make the unpacked package in `folder` callable; nothing is copied and nothing is compiled.

    The caller has verified the folder: opening runs the library's initializers.

    Raises:
        CannotOpen: the system refuses to load the library.
        MissingOps: the graph calls ops that no loaded library registers.
    """
    libraries = [m.path for m in entry.members if m.path.endswith(".wrapper.so")]
    if len(libraries) != 1:
        raise CannotOpen(
            f"graph {entry.id} has {len(libraries)} libraries, not one",
            hint="its publisher must compile it again",
        )
    try:
        runner = native_runner(folder, folder / libraries[0], device)
    except (RuntimeError, OSError) as why:
        raise refusal(entry.id, folder, str(why)) from why
    return Graph(entry, runner, device)


def refusal(graph: str, folder: Path, why: str) -> CannotOpen | MissingOps:
    """What the loader's message means, in words that say what to do."""
    first = first_line(why)
    if "Could not find schema for" in why:
        return MissingOps(
            f"graph {graph} calls an op that is not registered: {first}",
            hint="install the kernels that its manifest lists",
        )
    if "failed to map segment" in why:
        return CannotOpen(
            f"graph {graph} cannot be loaded from {folder}: its disk does not allow code",
            hint="the disk is mounted noexec; set HUBAOTI_HOME to a folder on another disk",
        )
    if "cannot open shared object file" in why:
        return CannotOpen(
            f"graph {graph} needs a library that is not here: {first}",
            hint="install that library, or pull a variant built for this host",
        )
    return CannotOpen(
        f"graph {graph} cannot be opened: {first}",
        hint="see what it needs and what is here with: hubaoti doctor",
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """What one input must be, worked out once when the graph is opened."""

    entry: Input
    dtype: torch.dtype
    rank: int
    fixed: tuple[tuple[int, int], ...]  # (axis, size)
    dims: tuple[tuple[int, str], ...]  # (axis, name)
    extents: tuple[tuple[int, Extent], ...]  # (axis, what follows from dims)
    alignment: int
    below: int | None  # what its numbers must be less than, where they are ids

    @classmethod
    def of(cls, entry: Input, device: torch.device) -> Slot:
        """Read a manifest's input."""
        dtype = dtype_of(entry.dtype)
        sizes = list(enumerate(entry.shape))
        follow = [(axis, Extent.parse(size)) for axis, size in sizes if isinstance(size, str)]
        return cls(
            entry,
            dtype,
            len(sizes),
            tuple((axis, size) for axis, size in sizes if isinstance(size, int)),
            tuple((axis, extent.dims[0]) for axis, extent in follow if extent.plain),
            tuple((axis, extent) for axis, extent in follow if not extent.plain),
            alignment_of(dtype, device),
            int(entry.values[4:]) if entry.values.startswith("ids<") else None,
        )


class Graph:
    """An open graph: bind its constants, then call it with its inputs in the manifest's order."""

    def __init__(self, entry: Entry, runner: Runner, device: torch.device) -> None:
        self.entry = entry
        self.device = device
        self._runner = runner
        self._slots = [Slot.of(item, device) for item in entry.inputs]
        self._bound: dict[str, torch.Tensor] = {}
        self._ready = not runner.get_constant_names_to_original_fqns()

    def constant_fqns(self) -> set[str]:
        """The names of the constants that the library reads."""
        return {*self._runner.get_constant_names_to_original_fqns().values()}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the graph its constants, by fqn; they are kept alive and not copied.

        Raises:
            MissingConstant: one that the graph reads is not given or not in the manifest, or has
                another dtype, shape, stride, alignment or device.
        """
        listed = {constant.fqn: constant for constant in self.entry.constants}
        names = self._runner.get_constant_names_to_original_fqns()
        for fqn in names.values():
            if fqn not in listed or fqn not in tensors:
                raise MissingConstant(
                    f"graph {self.entry.id} reads {fqn}, which is not "
                    + ("given" if fqn in listed else "in its manifest"),
                    hint="bind every constant that the manifest lists",
                )
            check_constant(listed[fqn], tensors[fqn], self.device)
        bound = {inner: tensors[fqn].detach() for inner, fqn in names.items()}
        self._runner.update_constant_buffer(bound, False, True, True)
        self._bound = bound
        self._ready = True

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run it. An input that is only read is copied where its layout does not fit.

        Raises:
            BadInput: not the graph's number of inputs, dtype, rank, size or device; constants are
                not bound; an input that the graph writes does not fit as it is; an id is not one
                of the vocabulary.
            OutOfBounds: a dim is outside of what the graph was compiled for.
        """
        if not self._ready:
            raise BadInput(f"graph {self.entry.id} has no constants yet", hint="call bind first")
        fitting = self._checked(inputs)
        try:
            return self._runner.run(fitting)
        except RuntimeError as why:  # the native code's own checks, as of an embedding's ids
            raise BadInput(
                f"graph {self.entry.id} failed: {first_line(why)}",
                hint="see that its inputs are what the manifest says of their values",
            ) from why

    def _checked(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs as the graph may have them."""
        if len(inputs) != len(self._slots):
            raise BadInput(
                f"graph {self.entry.id} takes {len(self._slots)} inputs, got {len(inputs)}",
                hint="give them in the manifest's order",
            )
        sizes: dict[str, int] = {}
        fitting = []
        for slot, tensor in zip(self._slots, inputs, strict=True):
            self._check_kind(slot, tensor)
            self._check_sizes(slot, tensor, sizes)
            fitting.append(fit(slot, tensor))
            self._check_values(slot, tensor)
        self._check_related(inputs, sizes)
        return fitting

    def _check_values(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Refuse ids that no table has, and places that no cache has: native code ends the process.

        Only on a CPU: a GPU would have to be waited for.
        """
        if slot.below is None or self.device.type != "cpu" or not tensor.numel():
            return
        low, high = (int(edge) for edge in torch.aminmax(tensor))
        if low < 0 or high >= slot.below:
            raise BadInput(
                f"{slot.entry.name} has {low if low < 0 else high}: index out of bounds, which are "
                f"0 to {slot.below - 1}",
                hint="see that its inputs are what the manifest says of their values",
            )

    def _check_kind(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Refuse another dtype, device or number of axes."""
        expected = (slot.dtype, self.device, slot.rank)
        found = (tensor.dtype, tensor.device, tensor.dim())
        if found != expected or tensor.layout is not torch.strided:
            raise BadInput(
                f"{slot.entry.name} is {describe(*found)}; graph {self.entry.id} takes "
                f"{describe(*expected)}",
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
            self._take(dim, shape[axis], slot, sizes)

    def _take(self, dim: str, size: int, slot: Slot, sizes: dict[str, int]) -> None:
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
        for slot, tensor in zip(self._slots, inputs, strict=True):
            for axis, extent in slot.extents:
                size = tensor.shape[axis]
                unknown = [dim for dim in extent.dims if dim not in sizes]
                dim_size = extent.solve(size) if unknown else None
                if dim_size is not None:
                    self._take(unknown[0], dim_size, slot, sizes)
                elif unknown or extent.at(sizes) != size:
                    raise BadInput(
                        f"{slot.entry.name} has size {size} on axis {axis}, which is not {extent}",
                        hint=f"the dims of this call are {sizes}",
                    )
        if sizes.get("filled", 0) > sizes.get("cache", LARGEST) and self.entry.cache:
            raise OutOfBounds(
                f"filled is {sizes['filled']}, the cache holds {sizes['cache']}",
                hint="make a longer cache",
            )
        self._check_position(inputs)

    def _check_position(self, inputs: Sequence[torch.Tensor]) -> None:
        """Refuse to write beyond a cache; on a CPU, as for ids."""
        cache = self.entry.cache
        if cache is None or cache.position is None or self.device.type != "cpu":
            return
        low, high = (int(edge) for edge in torch.aminmax(inputs[cache.position]))
        places = inputs[cache.keys].shape[2]
        if low < 0 or high >= places:
            raise BadInput(
                f"position {low if low < 0 else high} is outside of a cache of {places} places",
                hint="make a longer cache",
            )


def fit(slot: Slot, tensor: torch.Tensor) -> torch.Tensor:
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
        MissingConstant: dtype, shape, stride, alignment or device differ.
    """
    dtype = dtype_of(constant.dtype)
    found = (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.device)
    expected = (dtype, constant.shape, constant.stride, device)
    if found != expected:
        raise MissingConstant(
            f"{constant.fqn} is {found[0]} {list(found[1])} strides {list(found[2])} on "
            f"{found[3]}; the graph was compiled for {expected[0]} {list(expected[1])} strides "
            f"{list(expected[2])} on {expected[3]}",
            hint="use the checkpoint of a model that has this program",
        )
    if tensor.data_ptr() % alignment_of(dtype, device):
        raise MissingConstant(
            f"{constant.fqn} starts at an address that the graph cannot read",
            hint="clone the tensor before binding it",
        )


def alignment_of(dtype: torch.dtype, device: torch.device) -> int:
    """The multiple that a tensor's address must be, in bytes."""
    return dtype.itemsize if device.type == "cpu" else CUDA_ALIGNMENT


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a manifest names.

    Raises:
        BadInput: this torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f"this torch has no dtype {name}", hint="upgrade torch")
    return dtype


def describe(dtype: torch.dtype, device: torch.device, rank: int) -> str:
    """A tensor's kind in words."""
    return f"a {str(dtype).removeprefix('torch.')} tensor of {rank} axes on {device}"
