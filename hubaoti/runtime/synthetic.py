"""Numbers that anyone can make again: the rule for constants and inputs without a model.

It is the same for every machine, device and torch, bit for bit: whole numbers are mixed by an
integer hash, and turned into floats by powers of two.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Sequence

import torch

PERIOD = 65521  # numbers until they repeat: a prime, so that no row of a matrix starts like another
_BITS = 24  # of a number: as many as float32 holds exactly
BLOCK = 1 << 22  # elements that are laid at a time where memory is not in the order of the axes

# A norm's scale and its like: they multiply what goes on, so they are about one.
_FACTOR = re.compile(r"(^|\.)weight$|norm\w*\.scale$|gamma|lambda|(layer|logit)_scale|running_var")
# What turns a quantized weight's whole numbers into values; torchao numbers a weight's parts.
_QUANTIZER = re.compile(
    r"((^|[._])(scales?|scale_inv|scale_and_zero|zeros?|zero_points?)|(^|\.)original[1-9])$"
)
# Many small numbers in each of 32 bits; any other constant of 32 bits is taken for an index.
_PACKED_WEIGHT = re.compile(r"(original0|qweight|qzeros|qdata|packed)$")


def make_synthetic(
    name: str, shape: Sequence[int], dtype: torch.dtype, values: str = "real", start: int = 0
) -> torch.Tensor:
    """A new tensor, on the CPU, by the rule."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    fill_synthetic(tensor, name, values, start)
    return tensor


def fill_synthetic(
    tensor: torch.Tensor, name: str, values: str = "constant", start: int = 0
) -> None:
    """The rule: give a tensor the values of its name, shape, dtype, wherever and however it lies.

    `values` is what a manifest says of an input (positions count from `start`), or `constant`:
    then numbers are of a trained model's size, so that products keep theirs, and those that
    quantize are positive. It takes next to no memory beside the tensor's own.
    """
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if values == "mask" or tensor.dtype is torch.bool:
        tensor.copy_(_make_synthetic_mask(tensor.shape, tensor.dtype))
    elif values == "position":
        tensor.copy_(_make_positions(tensor.shape, start))
    elif tensor.numel():
        first = zlib.crc32(name.encode()) % PERIOD
        needed = generate_numbers()[first : first + min(tensor.numel(), 2 * PERIOD)]
        found = _convert_numbers(needed, name, tensor.shape, tensor.dtype, values)
        _tile_into(tensor, found.to(tensor.device), 0)


@functools.cache
def generate_numbers() -> torch.Tensor:
    """PERIOD whole numbers of BITS bits without an order, each the hash of its place, three times.

    The hash is of 32 bits, after "Hash function for integers" (T. Mueller); its factor leaves all
    products below 2**63, so nothing overflows.
    """
    mixed = torch.arange(1, PERIOD + 1, dtype=torch.int64, device="cpu")
    for _ in range(2):
        mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B & 0xFFFFFFFF
    return (((mixed >> 16) ^ mixed) >> (32 - _BITS)).repeat(3)


def _convert_numbers(
    numbers: torch.Tensor, name: str, shape: Sequence[int], dtype: torch.dtype, values: str
) -> torch.Tensor:
    """What these numbers become in a tensor of this name, shape and dtype."""
    if values.startswith(("ids<", "any<")):
        return (numbers % max(int(values[4:]), 1)).to(dtype)
    if not dtype.is_floating_point:
        return _convert_to_integers(numbers, name, dtype)
    middle, reach = _choose_value_range(name, shape, dtype, values)
    half = 1 << (_BITS - 1)
    # Exact in double, then rounded once to float32, and once more where the dtype is narrower.
    exact = middle + (numbers - half).double() * (reach / half)
    return exact.to(dtype) if dtype is torch.float64 else exact.float().to(dtype)


def _convert_to_integers(numbers: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Quantized values over all of the dtype, small zero points, and zeros for an index.

    The first place is in every table; other indices would have to be known.
    """
    bits = 8 * dtype.itemsize
    if _QUANTIZER.search(name):
        numbers = 4 + (numbers >> (_BITS - 3))
    elif bits > 32 or (bits == 32 and not _PACKED_WEIGHT.search(name)):
        numbers = torch.zeros_like(numbers)
    else:
        words = numbers << (32 - _BITS) | numbers >> (2 * _BITS - 32)
        numbers = (words >> (32 - bits)) + torch.iinfo(dtype).min
    return numbers.to(dtype)


def _choose_value_range(
    name: str, shape: Sequence[int], dtype: torch.dtype, values: str
) -> tuple[float, float]:
    """The middle of the values and how far they reach from it, all of few bits."""
    if values != "constant":
        return 0.0, 2.0
    if len(shape) < 2 and _FACTOR.search(name):
        return 1.0, 2.0**-3
    if _QUANTIZER.search(name):
        # Four bits have a scale a group, eight bits one a row: either way a weight is about 0.03.
        few = len(shape) > 2 or name.endswith("scales")
        step = 2.0**-8 if few else 2.0**-12
        return 1.5 * step, 0.5 * step
    if dtype.itemsize == 1:
        return 0.0, 128.0  # the half of float8 that both of its kinds have
    if len(shape) < 2:
        return 0.0, 2.0**-3
    # sqrt(3 / fan_in), to the next power of two without a logarithm: uniform numbers that reach
    # that far sum up to what they were multiplied with.
    fan_in = math.prod(shape[1:]) if len(shape) > 3 else max(shape[1:])
    return 0.0, 2.0 ** -((fan_in.bit_length() - 2) // 2)


def _tile_into(tensor: torch.Tensor, numbers: torch.Tensor, start: int) -> None:
    """Repeat numbers over a tensor in the order of its axes.

    They are two periods, or as many as the tensor has elements if that is less.
    """
    if tensor.is_contiguous():
        cycle = numbers[start % PERIOD :][:PERIOD]
        flat = tensor.view(-1)
        whole = len(flat) // len(cycle) * len(cycle)
        flat[:whole].view(-1, len(cycle)).copy_(cycle)
        flat[whole:].copy_(cycle[: len(flat) - whole])
    elif tensor.numel() <= BLOCK:
        block = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        _tile_into(block, numbers, start)
        tensor.copy_(block)
    elif len(tensor) == 1:
        _tile_into(tensor[0], numbers, start)
    else:
        rows = max(1, BLOCK * len(tensor) // tensor.numel())
        for row in range(0, len(tensor), rows):
            part = tensor[row : row + rows]
            _tile_into(part, numbers, start)
            start += part.numel()


def _make_synthetic_mask(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A mask: every row sees a place; true, 1 or 0.0 where it looks.

    With two axes, every second row is padded from the middle on. With more, they end in rows and
    places: the last row sees all places, the one before it all but the last, and so on.
    """
    rows, places = (1, 1, *shape)[-2:]
    row, place = _make_positions((rows,)).unsqueeze(1), _make_positions((places,))
    if len(shape) > 2:
        seen = place <= (places - rows + row).clamp(min=0)
    else:
        seen = place < torch.where(row % 2 == 1, max(1, places // 2), places)
    seen = seen.expand(*shape[:-2], rows, places).view(shape)
    if not dtype.is_floating_point:
        return seen.to(dtype)
    never = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device="cpu")
    return never.masked_fill(seen, 0.0)


def _make_positions(shape: Sequence[int], start: int = 0) -> torch.Tensor:
    """Whole numbers that count on from `start` along the last axis."""
    end = start + (1, *shape)[-1]
    return torch.arange(start, end, device="cpu").expand((*shape[:-1], end - start)).view(shape)
