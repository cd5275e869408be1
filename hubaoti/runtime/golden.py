"""Golden answers: what a graph says to constants and inputs that anyone can make without a model.

An artifact ships the answers; whoever opens a graph of it makes the questions again by the rule,
asks, and compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Golden
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime.answer_checks import require_described
from hubaoti.runtime.input_checks import name_dtype, parse_dtype
from hubaoti.runtime.quantize import make_quantized
from hubaoti.runtime.synthetic import fill_synthetic, make_synthetic
from hubaoti.runtime.weights import load_shipped_tensors

GOLDEN = "golden.safetensors"
LARGEST_GOLDEN = 1_000_000  # bytes of that file
_HEADER = 128  # bytes that a tensor's dtype, shape and place take in it, at most

_INT4 = "int4wo.qdata"  # the transform whose result lies differently on different CPUs
_INT4_ROWS = 128  # of such a weight at a time: a multiple of every CPU's block of rows

# Largest difference allowed, as a part of the largest value. A decoder block on CPUs of SSE to AMX
# differs by 1e-6 in float32, 1e-3 in float16, 6e-3 in bfloat16; a GPU may multiply float32 in TF32.
GOLDEN_TOLERANCE = {
    "float64": 1e-3,
    "float32": 1e-3,
    "complex64": 1e-3,
    "float16": 1.5e-2,
    "bfloat16": 6e-2,
    "float8_e4m3fn": 1.5e-1,
    "float8_e5m2": 1.5e-1,
}
_SCRATCH = 64 << 20  # bytes that a BLAS and an allocator take, whatever the sizes
_PART = 4 << 20  # elements that are compared at a time, since in double precision they are large
_INTERMEDIATES = 16  # intermediates of an input's or output's size that are held at once


class Answering(Protocol):
    """What answers as an open graph does: one, or the program that it is made of."""

    entry: Entry
    device: torch.device

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None: ...

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]: ...


def choose_smallest_dims(entry: Entry) -> dict[str, int]:
    """The smallest dims at which a graph's inputs are valid."""
    sizes = {
        dim: _round_up_to_step(entry, dim, max(low, 1)) for dim, (low, _) in entry.bounds.items()
    }
    if entry.cache is not None and entry.cache.kind == "static":
        for inner, outer in (("seq", "filled"), ("filled", "cache")):
            if inner in sizes and outer in sizes:
                sizes[outer] = _round_up_to_step(entry, outer, max(sizes[inner], sizes[outer]))
    return sizes


def _round_up_to_step(entry: Entry, dim: str, size: int) -> int:
    """The next size of a dim that is a multiple of its step."""
    step = max(entry.steps.get(dim, 1), 1)
    return -(-size // step) * step


def make_golden_inputs(entry: Entry, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """A graph's inputs at these dims, on the CPU, in the manifest's order.

    With a static cache, positions are the last of the filled places; the cache's own places hold
    numbers beyond them too, which the graph has to ignore.

    Raises:
        BadInput: a shape cannot be at these dims.
    """
    shapes = [resolve_shape(entry, item.shape, sizes) for item in entry.inputs]
    start = _compute_first_position(entry, shapes)
    made = []
    for item, shape in zip(entry.inputs, shapes, strict=True):
        tensor = make_synthetic(item.name, shape, parse_dtype(item.dtype), item.values, start)
        if item.values == "mask" and entry.unmasked is True:
            tensor = _make_open_mask(shape, tensor.dtype)
        elif item.values == "mask" and entry.masks == "padded":
            _hide_padding(tensor)
        made.append(tensor)
    return made


def _make_open_mask(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A mask that hides nothing, as one that is added has zeros for it."""
    return torch.full(tuple(shape), 0 if dtype.is_floating_point else 1, dtype=dtype)


def _hide_padding(mask: torch.Tensor) -> None:
    """Have a mask (batch, heads, rows, places) hide no place, the first, or the first two."""
    for index, text in enumerate(mask):
        text[..., : min(index % 3, text.shape[-1] - 1)] = False


def resolve_shape(
    entry: Entry, shape: Sequence[str | int | None], sizes: Mapping[str, int]
) -> list[int]:
    """A shape of the manifest in numbers; a size that nobody knows is 1.

    Raises:
        BadInput: it needs a dim that has no size, or comes to less than nothing.
    """
    try:
        known = [1 if size is None else size for size in shape]
        found = [DimExpr.parse(n).at(sizes) if isinstance(n, str) else n for n in known]
    except KeyError as error:
        raise BadInput(
            f"graph {entry.id} has no size for the dim {error}", hint="name it"
        ) from error
    if min(found, default=0) < 0:
        raise BadInput(
            f"graph {entry.id} cannot have {list(shape)} at {dict(sizes)}",
            hint="its publisher must compile it again",
        )
    return found


def _compute_first_position(entry: Entry, shapes: Sequence[Sequence[int]]) -> int:
    """Where positions count from: after the places of a static cache that were filled before."""
    cache = entry.cache
    if cache is None or cache.kind != "static" or cache.position is None:
        return 0
    masks = (s for item, s in zip(entry.inputs, shapes, strict=True) if item.values == "mask" and s)
    filled = next(masks, [shapes[cache.keys][-2]])[-1]
    return max(0, filled - (1, *shapes[cache.position])[-1])


def make_golden_constants(
    entry: Entry, folder: Path, device: torch.device
) -> dict[str, torch.Tensor]:
    """Every constant of a graph by fqn, as the manifest says it lies: by the rule, or shipped.

    Raises:
        MissingConstant: the artifact lacks one that should have come with it, or has another shape.
    """
    shipped = dict(load_shipped_tensors(entry, folder, device))
    found = {}
    for constant in entry.constants:
        fqn, shape = constant.fqn, constant.shape
        tensor = torch.empty_strided(
            shape, constant.stride, dtype=parse_dtype(constant.dtype), device=device
        )
        if constant.origin.file:
            if fqn not in shipped or shipped[fqn].shape != shape:
                raise MissingConstant(
                    f"{constant.origin.file} of the artifact has no {fqn} of shape {list(shape)}",
                    hint="its publisher must compile it again",
                )
            tensor.copy_(shipped[fqn])
        elif constant.origin.transform == _INT4 and device.type == "cpu":
            pack_four_bits(tensor, fqn)
        else:
            fill_synthetic(tensor, fqn)
        found[fqn] = tensor
    return found


def pack_four_bits(tensor: torch.Tensor, name: str) -> None:
    """Write four-bit weights (out, in / 2) as this CPU's kernel reads them: each has its own order.

    On every CPU the same weights: some rows of the rule's, again and again, since packing is slow.
    """
    rows, half = tensor.shape
    weight = make_synthetic(name, (min(rows, _INT4_ROWS), 2 * half), torch.float32)
    packed = make_quantized(_INT4, weight)
    for row in range(0, rows, _INT4_ROWS):
        part = tensor[row : row + _INT4_ROWS]
        last = len(part) < len(weight)
        part.copy_(make_quantized(_INT4, weight[: len(part)]) if last else packed)


def estimate_answer_memory(entry: Entry, sizes: Mapping[str, int]) -> int:
    """Bytes that `ask_golden` takes at these dims on top of a process that has torch.

    Counted are constants, inputs and outputs. Added is an allowance: the largest constant once
    more, as a BLAS may pack it, the inputs and outputs several times for what is computed in
    between, and what a BLAS and an allocator take.
    """
    tensors = [
        *((item.shape, item.dtype) for item in entry.inputs),
        *((item.shape, item.dtype) for item in entry.outputs.tensors),
    ]
    moving = sum(
        math.prod(resolve_shape(entry, shape, sizes)) * dtype_itemsize(d) for shape, d in tensors
    )
    constants = [math.prod(c.shape) * dtype_itemsize(c.dtype) for c in entry.constants]
    return sum(constants) + max(constants, default=0) + (1 + _INTERMEDIATES) * moving + _SCRATCH


def dtype_itemsize(dtype: str) -> int:
    """The bytes of one number of a dtype that a manifest names."""
    return parse_dtype(dtype).itemsize


def ask_golden(graph: Answering, folder: Path) -> dict[str, torch.Tensor]:
    """What an open graph of the artifact in `folder` says to the rule's constants and inputs.

    The graph stays bound to these constants.

    Raises:
        MissingConstant, BadInput, OutOfBounds: as for any call; a manifest that is wrong.
    """
    if graph.entry.constants:
        graph.bind(make_golden_constants(graph.entry, folder, graph.device))
    return answer_golden_inputs(graph)


def answer_golden_inputs(graph: Answering) -> dict[str, torch.Tensor]:
    """A bound graph's mutated inputs afterwards and its outputs, on the CPU, by their names.

    Dims are the ones that its manifest has for this, else the smallest.

    Raises:
        BadInput: an answer is of another dtype or shape than its manifest says, or two have one
            name; else as for any call.
    """
    entry = graph.entry
    sizes = _choose_golden_dims(entry)
    made = make_golden_inputs(entry, sizes)
    inputs = [tensor.to(graph.device) for tensor in made]
    outputs = graph(*inputs)
    require_described(entry, outputs, sizes)
    pairs = zip(entry.inputs, inputs, strict=True)
    answers = [(item.name, tensor) for item, tensor in pairs if item.mutated]
    # A graph that gives fewer than it should is not an error here: its answers are missing.
    answers += zip((item.name for item in entry.outputs.tensors), outputs, strict=False)
    named = {f"{entry.id}/{name}": to_plain(tensor) for name, tensor in answers}
    if len(named) < len(answers):
        raise BadInput(
            f"graph {entry.id} has two answers of one name among {', '.join(named)}",
            hint="its publisher must compile it again",
        )
    return named


def _choose_golden_dims(entry: Entry) -> dict[str, int]:
    """The dims of a graph's golden answers."""
    return choose_smallest_dims(entry) | (entry.golden.dims if entry.golden else {})


def to_plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU; complex numbers as pairs."""
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def describe_golden(entry: Entry, answers: Mapping[str, torch.Tensor]) -> Golden:
    """What the manifest says of a graph's answers."""
    dims = _choose_golden_dims(entry)
    memory = estimate_answer_memory(entry, dims)
    return Golden(dims=dims, tolerances=choose_tolerances(entry, answers), memory=memory)


def choose_tolerances(entry: Entry, answers: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """How far each answer may be off; whole numbers not at all."""
    coarsest = find_tolerance(entry)
    return {
        name: coarsest if tensor.is_floating_point() else 0.0 for name, tensor in answers.items()
    }


def find_tolerance(entry: Entry) -> float:
    """How far a number that a graph computes may be off, as a part of the largest value.

    A float32 answer may come from bfloat16 constants, so the coarsest dtype of the graph counts.
    """
    dtypes = {item.dtype for item in entry.inputs} | {item.dtype for item in entry.constants}
    dtypes |= {item.dtype for item in entry.outputs.tensors}
    return max((GOLDEN_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def sample_answers(
    answers: Mapping[str, torch.Tensor], budget: int = LARGEST_GOLDEN
) -> dict[str, torch.Tensor]:
    """All answers of an artifact, the largest of them sampled, so that their file has its size."""
    room = budget - sum(_HEADER + len(name.encode()) for name in ("", *answers))
    found = {}
    for index, name in enumerate(sorted(answers, key=lambda name: answers[name].nbytes)):
        share = room // (len(answers) - index)
        sample = sample_tensor(answers[name], max(1, share // answers[name].itemsize))
        # Of its own: answers may share memory, as a tensor and a view of it.
        found[name] = sample.clone(memory_format=torch.contiguous_format)
        room -= found[name].nbytes
    return {name: found[name] for name in answers}


def sample_tensor(tensor: torch.Tensor, limit: int) -> torch.Tensor:
    """The tensor, or `limit` of its elements, from the first to the last, evenly spread."""
    if tensor.numel() <= limit:
        return tensor
    places = torch.arange(limit) * (tensor.numel() - 1) // max(limit - 1, 1)
    return tensor.flatten()[places]


def load_expected(entry: Entry, folder: Path) -> dict[str, torch.Tensor]:
    """The golden answers of a graph that came with the artifact in `folder`, one for each it gives.

    Raises:
        MissingConstant: the artifact has none, lacks one, or has a damaged file of them.
    """
    hint = "its publisher must compile it again"
    try:
        with safe_open(folder / GOLDEN, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(f"{entry.id}/")]  # noqa: SIM118
            found = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise MissingConstant(f"{GOLDEN} of the artifact: {error}", hint=hint) from error
    # One that is lacking, or of no number, would be compared with whatever the graph says.
    for name, size in _count_answers(entry).items():
        if name not in found or (size and not found[name].numel()):
            raise MissingConstant(f"{GOLDEN} of the artifact has no {name}", hint=hint)
    return found


def _count_answers(entry: Entry) -> dict[str, int]:
    """How many numbers each golden answer of a graph has, by its name; 0 where nobody knows."""
    sizes = _choose_golden_dims(entry)
    answers = {item.name: item.shape for item in entry.inputs if item.mutated}
    shapes: dict[str, Sequence[str | int | None]] = {**answers}
    shapes |= {item.name: item.shape for item in entry.outputs.tensors}
    return {
        f"{entry.id}/{name}": 0 if None in shape else math.prod(resolve_shape(entry, shape, sizes))
        for name, shape in shapes.items()
    }


def compare_golden_answers(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    allowed: Mapping[str, float],
) -> list[str]:
    """Why answers are not the golden ones, in words; nothing where they are."""
    reasons = (
        compare_golden(name, found.get(name), theirs, allowed.get(name, 0.0))
        for name, theirs in expected.items()
    )
    return [*filter(None, reasons)] if expected else ["there is no golden answer"]


def compare_golden(
    name: str, found: torch.Tensor | None, theirs: torch.Tensor, allowed: float
) -> str | None:
    """Why an answer is not the golden one, which may be a sample."""
    if found is None:
        return f"{name} is missing"
    ours = sample_tensor(found, theirs.numel())
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return f"{name} is {_describe_tensor(found)}; expected is {_describe_tensor(theirs)}"
    difference, largest = measure_difference(ours, theirs)
    relative = difference / largest
    if relative <= allowed:
        return None
    return f"{name} is off by {relative:.1e} of its largest value; {allowed:.0e} is allowed"


def measure_difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference and the largest value; infinite where only one of them answers nan."""
    difference, largest = 0.0, 0.0
    ours, theirs = ours.flatten(), theirs.flatten()
    for start in range(0, ours.numel(), _PART):
        left, right = (each[start : start + _PART].double() for each in (ours, theirs))
        same = (left == right) | (left.isnan() & right.isnan())
        apart = torch.where(same, 0.0, left - right).abs().nan_to_num(nan=float("inf"))
        finite = right[right.isfinite()].abs()
        difference = max(difference, apart.max().item() if apart.numel() else 0.0)
        largest = max(largest, finite.max().item() if finite.numel() else 0.0)
    return difference, largest or 1.0


def _describe_tensor(tensor: torch.Tensor) -> str:
    """A tensor's dtype and shape in words."""
    return f"{name_dtype(tensor.dtype)} {list(tensor.shape)}"
