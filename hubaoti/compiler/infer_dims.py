"""A face from calls of different sizes.

Sizes that change together are one dim, a size that is always twice another's is `2*seq`, the sum
of two is `image+text`, and a number that follows a size is that size.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Input
from hubaoti.compiler.capture import Call
from hubaoti.compiler.request import Shape
from hubaoti.compiler.signature import CallSignature, encode_extent, make_names_unique
from hubaoti.errors import BadDim, BadRequest
from hubaoti.runtime.input_checks import name_dtype

Series = tuple[int, ...]  # one size in each of the calls
_LOOKS = 4  # recorded calls at which a module is looked at again, at most


@dataclass(slots=True)
class Dims:
    """Dims by the sizes they had in some calls; unknown ones get a name as they are met.

    With `related`, a size may be found to be a multiple of another. That is for calls whose sizes
    we chose: from batches of 1, 2 and 3 and texts of 8, 16 and 24 nothing follows. `given` are
    extents that the user stated, by input and axis.
    """

    series: dict[str, Series]
    related: bool = True
    given: dict[tuple[str, int], DimExpr] = field(default_factory=dict)

    def find_extent(self, sizes: Series, name: str) -> DimExpr:
        """The extent that had these sizes: a dim, one that follows from dims, or a new dim."""
        related = [self.find_multiple] if self.related else []
        for find in (self.find_equal, *related, self._find_sum):
            if (found := find(sizes)) is not None:
                return found
        fresh = name
        while fresh in self.series:
            fresh += "x"
        self.series[fresh] = sizes
        return DimExpr.of({fresh: 1})

    def find_equal(self, sizes: Series) -> DimExpr | None:
        """A dim that always had these sizes."""
        same = (name for name, series in self.series.items() if series == sizes)
        return next((DimExpr.of({name: 1}) for name in same), None)

    def find_multiple(self, sizes: Series) -> DimExpr | None:
        """A multiple of a dim, plus a number; two calls are too few to tell."""
        for name, series in self.series.items():
            steps = [(s - series[0], z - sizes[0]) for s, z in zip(series, sizes, strict=True)]
            moved = [(ours, theirs) for ours, theirs in steps if ours]
            if len({*series}) < 3 or not moved:
                continue
            factor, rest = divmod(moved[0][1], moved[0][0])
            same = all(factor * ours == theirs for ours, theirs in steps)
            if not rest and factor > 0 and same:
                return DimExpr.of({name: factor}, sizes[0] - factor * series[0])
        return None

    def _find_sum(self, sizes: Series) -> DimExpr | None:
        """The sum of two dims, as of image and text tokens."""
        for (first, ours), (second, theirs) in itertools.combinations(self.series.items(), 2):
            if tuple(map(operator.add, ours, theirs)) == sizes:
                return DimExpr.of({first: 1, second: 1})
        return None


def infer_signature(
    calls: Sequence[Call], dims: Dims, vocabulary: int | None, where: str = "the module"
) -> CallSignature:
    """The face that all of some calls have; `dims` learns the dims that it does not know.

    Raises:
        BadRequest: the calls have different structures.
    """
    first = calls[0]
    for call in calls[1:]:
        _require_same(first, call, where)
    shapes: list[list[int | str]] = [list(sizes) for sizes in first.sizes]
    for series, index, axis in _find_changing_sizes(calls):
        extent = dims.given.get((first.names[index], axis))
        name = f"{_normalize_name(first.names[index])}_{axis}"
        shapes[index][axis] = encode_extent(extent or dims.find_extent(series, name))
    inputs = tuple(
        Input(
            name=_normalize_name(name),
            dtype=name_dtype(tensor.dtype),
            shape=tuple(shape),
            values=_classify_values(name, [call.tensors[index] for call in calls], vocabulary),
        )
        for index, (name, tensor, shape) in enumerate(
            zip(first.names, first.tensors, shapes, strict=True)
        )
    )
    template = _merge_templates([call.template for call in calls], dims, where)
    return CallSignature(template, make_names_unique(inputs))


def _find_changing_sizes(calls: Sequence[Call]) -> list[tuple[Series, int, int]]:
    """The sizes that change, the smaller ones first, so that others can follow from them."""
    found = []
    for index, tensor in enumerate(calls[0].tensors):
        for axis in range(tensor.dim()):
            series = tuple(call.tensors[index].shape[axis] for call in calls)
            if len({*series}) > 1:
                found.append((series, index, axis))
    return sorted(found, key=lambda each: each[0])


def _require_same(first: Call, other: Call, where: str) -> None:
    """Refuse calls of which one gives a tensor where the other gives none, or of another kind."""
    kinds = [[(t.dtype, t.dim()) for t in call.tensors] for call in (first, other)]
    if first.names != other.names or kinds[0] != kinds[1]:
        raise BadRequest(
            f"capture: calls of {where} have different structures: "
            f"{_describe_tensors(first)} and {_describe_tensors(other)}",
            hint="give calls of one structure, and compile the other structure on its own",
        )


def _describe_tensors(call: Call) -> str:
    """The tensors of a call in words."""
    kinds = [f"{str(t.dtype).removeprefix('torch.')} of {t.dim()} axes" for t in call.tensors]
    return ", ".join(f"{name} ({kind})" for name, kind in zip(call.names, kinds, strict=True))


def _merge_templates(templates: Sequence[Any], dims: Dims, where: str) -> Any:
    """The one template of several: numbers that follow a size become that size."""
    first = templates[0]
    if all(template == first and type(template) is type(first) for template in templates[1:]):
        return first
    kinds = {type(each) for each in templates}
    if kinds == {dict} and "float" not in first and len({frozenset(t) for t in templates}) == 1:
        return {
            key: _merge_templates([each[key] for each in templates], dims, where) for key in first
        }
    if kinds == {list} and len({len(each) for each in templates}) == 1:
        return [_merge_templates(each, dims, where) for each in zip(*templates, strict=True)]
    if kinds == {int}:
        found = dims.find_equal(tuple(templates)) or dims.find_multiple(tuple(templates))
        if found:
            return {"size": str(found)}
    literals = [t["float"] if isinstance(t, dict) and "float" in t else repr(t) for t in templates]
    raise BadRequest(
        f"capture: calls of {where} differ in a value that is no tensor: {', '.join(literals)}",
        hint="give it as a tensor, or compile one bundle for each of the values",
    )


def _normalize_name(name: str) -> str:
    """A name as manifests have them: lower case, of letters, digits and `_`, a letter first."""
    lower = "".join(letter if letter.isalnum() else "_" for letter in name.lower())
    return lower if lower[:1].isalpha() else f"x{lower}"


def _classify_values(name: str, tensors: Sequence[torch.Tensor], vocabulary: int | None) -> str:
    """What the numbers of an input mean, by its name and dtype, and by those that were seen."""
    dtype = tensors[0].dtype
    if dtype == torch.bool or "mask" in name:
        return "mask"
    if dtype.is_floating_point or dtype.is_complex:
        return "real"
    if "position" in name and all(_is_consecutive(tensor) for tensor in tensors):
        return "position"
    if name.endswith("input_ids") and vocabulary:
        return f"ids<{vocabulary}"
    seen = [int(tensor.max()) for tensor in tensors if not tensor.is_meta and tensor.numel()]
    return f"any<{max([0, *seen]) + 1}"


def _is_consecutive(tensor: torch.Tensor) -> bool:
    """Whether numbers count on along the last axis, as far as there are any."""
    if tensor.is_meta or tensor.dim() == 0 or not tensor.numel():
        return True
    return bool((tensor.diff(dim=-1) == 1).all())


def read_stated_dims(calls: Sequence[Call], shapes: Mapping[str, Shape]) -> Dims:
    """Dims as the user names them: `{"hidden_states": ("batch", "seq", None)}`.

    Raises:
        BadDim: an input is not there, has another number of axes, or a name stands for two sizes.
    """
    dims = Dims({}, related=False)
    for name, shape in shapes.items():
        index = _find_input(name, calls[0])
        rank = calls[0].tensors[index].dim()
        if len(shape) != rank:
            raise BadDim(
                f"{name} has {rank} axes, its shape names {len(shape)}",
                hint="give one name, or None, for each axis",
            )
        for axis, text in enumerate(shape):
            if isinstance(text, str):
                sizes = tuple(call.tensors[index].shape[axis] for call in calls)
                _set_stated_dim(dims, (name, axis), _parse_extent(text), sizes)
    for (name, axis), extent in dims.given.items():
        index = _find_input(name, calls[0])
        _require_stated(dims, name, extent, [call.tensors[index].shape[axis] for call in calls])
    return dims


def _set_stated_dim(dims: Dims, place: tuple[str, int], extent: DimExpr, sizes: Series) -> None:
    """Take what the user says of one size."""
    dims.given[place] = extent
    if extent.plain and dims.series.setdefault(extent.dims[0], sizes) != sizes:
        dim = extent.dims[0]
        raise BadDim(
            f"{dim} is {dims.series[dim]} in one input, and {sizes} in {place[0]}",
            hint="give them different names",
        )


def _require_stated(dims: Dims, name: str, extent: DimExpr, sizes: list[int]) -> None:
    """Refuse an extent over dims that nobody stated, or that the calls do not have."""
    unknown = [dim for dim in extent.dims if dim not in dims.series]
    if unknown:
        reason = f"{unknown[0]} stands alone nowhere"
    else:
        calls = range(len(sizes))
        found = [extent.at({dim: dims.series[dim][c] for dim in extent.dims}) for c in calls]
        reason = f"that is {found}" if found != sizes else ""
    if reason:
        raise BadDim(
            f"{name} has sizes {sizes}, its shape says {extent}: {reason}",
            hint="name the dims of the shapes as the calls have them",
        )


def _parse_extent(text: str) -> DimExpr:
    """An extent as the user writes it."""
    try:
        return DimExpr.parse(text)
    except ValueError as error:
        raise BadDim(str(error), hint='as "batch", "2*seq" or "image+text"') from error


def _find_input(name: str, call: Call) -> int:
    """The place of an input by its name."""
    if name not in call.names:
        raise BadDim(
            f"the calls have no input {name!r}", hint=f"they have: {', '.join(call.names)}"
        )
    return call.names.index(name)


def vary_call(call: Call, shapes: Mapping[str, Shape], steps: Mapping[str, int]) -> list[Call]:
    """A call, and two of other sizes without values, where only one call was recorded.

    They grow by numbers of steps and by their squares, of which none are multiples or sums of
    others'.

    Raises:
        BadDim: the shapes are not the call's.
    """
    named = {dim: sizes[0] for dim, sizes in read_stated_dims([call], shapes).series.items()}
    calls = [call]
    for power in (1, 2):
        sizes = {
            dim: size + steps.get(dim, 1) * more**power
            for more, (dim, size) in enumerate(named.items(), 3)
        }
        tensors = list(call.tensors)
        for name, shape in shapes.items():
            index = _find_input(name, call)
            size = [
                _parse_extent(dim).at(sizes) if isinstance(dim, str) else old
                for dim, old in zip(shape, tensors[index].shape, strict=True)
            ]
            tensors[index] = torch.empty(size, dtype=tensors[index].dtype, device="meta")
        calls.append(replace(call, tensors=tuple(tensors)))
    return calls


def mix_sizes(series: Mapping[str, Series]) -> dict[str, Series]:
    """Sizes at which to look at a module again: those of its calls, and each dim changed alone.

    So what changes with a dim says which one it follows, however the calls' own sizes did.
    """
    calls = min(max((len(sizes) for sizes in series.values()), default=0), _LOOKS)
    found = {name: list(sizes[:calls]) for name, sizes in series.items()}
    for alone in ("", *series):
        for name, sizes in series.items():
            found[name].append(max(sizes) if name == alone else min(sizes))
    return {name: tuple(sizes) for name, sizes in found.items()}
