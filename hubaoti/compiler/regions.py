"""Regions: the repeated blocks of any module, grouped by what they compute.

Equal shapes are not enough: Gemma 3's sliding and full layers have the same, and so do two blocks
of which one scales by another number. So members of a group agree in class, tensors, attributes,
in how they are called, and in every operation of a call. `export.py` compares two of them again.
"""

from __future__ import annotations

import difflib
import hashlib
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.compiler.fake_run import BlockCalls
from hubaoti.compiler.operations import digest_values
from hubaoti.errors import BadRequest

# Attributes that differ between equal blocks: their number, and what only training uses.
_LAYER_NUMBERS = {
    "layer_idx",
    "layer_id",
    "layer_number",
    "layer_num",
    "layer_index",
    "block_idx",
    "idx",
}
_TRAINING = ("drop", "gradient_checkpointing", "training")
_OF_EVERY_MODULE = set(vars(nn.Module()))  # what every module has: parameters, hooks, …


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that one graph serves, by their paths; `id` is what the graph is called."""

    id: str
    modules: tuple[str, ...]


def find_blocks(model: nn.Module, regions: str) -> dict[str, nn.Module]:
    """The modules to compile, by path: repeated blocks (`auto`), or those at one path.

    Raises:
        BadRequest: there is no module at the path.
    """
    if regions == "auto":
        named = {*(getattr(model, "_repeated_blocks", None) or ())}
        named |= {*(getattr(model, "_no_split_modules", None) or ())}
        return dict(_find_repeated(model, "", named))
    modules = dict(model.named_modules())
    if regions not in modules:
        near = difflib.get_close_matches(regions, modules, 3)
        raise BadRequest(
            f"the model has no module {regions!r}",
            hint=f"near: {', '.join(near)}" if near else "see: hubaoti compile --explain MODEL",
        )
    found = modules[regions]
    if isinstance(found, (nn.ModuleList, nn.Sequential)):
        return {f"{regions}.{name}": child for name, child in found.named_children()}
    return {regions: found}


def _find_repeated(
    module: nn.Module, path: str, named: Set[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost blocks: children of a list of which two have one class and equal tensors.

    And those of the named classes, as the model's own code calls its blocks, even a single one.
    """
    children = [(f"{path}.{name}".lstrip("."), each) for name, each in module.named_children()]
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        large = [(name, each) for name, each in children if is_block(each)]
        kinds = Counter((type(each), _list_tensor_shapes(each)) for _, each in large)
        named_here = any(type(each).__name__ in named for _, each in large)
        if named_here or any(count > 1 for count in kinds.values()):
            yield from large
            return
    for name, child in children:
        yield from _find_repeated(child, name, named)


def find_lone_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost blocks that are the only one of their list; what lies within one is its own."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        children = [*module.named_children()] if is_list else []
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if len(children) == 1 and is_block(children[0][1]) and not inside:
            found[f"{path}.{children[0][0]}"] = children[0][1]
    return found


def is_block(module: nn.Module) -> bool:
    """More than a layer: it has children that compute, and two parameters at least."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return any(True for _ in module.children()) and sum(1 for _ in module.parameters()) > 1


def _list_tensor_shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Names, shapes and dtypes of a module's parameters and buffers."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


def group_blocks(
    blocks: Mapping[str, nn.Module],
    observed: Mapping[str, BlockCalls],
    before: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Group, ...]:
    """Blocks that one graph serves, in the order in which the model holds them.

    `before` are their attributes as they were before they were observed, since some keep what they
    make. Blocks that were never called are in no group.
    """
    members: dict[str, list[str]] = {}
    for path, block in blocks.items():
        if seen := observed.get(path):
            held = before[path] if before else list_block_attributes(block)
            members.setdefault(_fingerprint_block(block, seen, held), []).append(path)
    names = _name_groups([*members.values()], blocks)
    return tuple(
        Group(name, tuple(paths)) for name, paths in zip(names, members.values(), strict=True)
    )


def _fingerprint_block(block: nn.Module, seen: BlockCalls, held: Sequence[str]) -> str:
    """What blocks of one group have in common."""
    templates = [call.template for call in seen.calls]
    sizes = [[list(size) for size in call.sizes] for call in seen.calls]
    text = encode_canonical([templates, sizes]).decode() + seen.operations
    return "\n".join([*map(repr, _list_tensor_shapes(block)), *held, text])


def list_block_attributes(block: nn.Module) -> list[str]:
    """The attributes of a block and of what is in it, private ones too, without layer numbers."""
    found = []
    for path, module in block.named_modules():
        found.append(f"{path}: {type(module).__module__}.{type(module).__qualname__}")
        for name, value in sorted(vars(module).items()):
            if (
                name in _OF_EVERY_MODULE
                or name in _LAYER_NUMBERS
                or any(word in name for word in _TRAINING)
            ):
                continue
            found.append(f"{path}.{name} = {_render_attribute(value)}")
    return found


def _render_attribute(value: Any, depth: int = 3) -> str:
    """A value as text that is equal for equal values; what has no such text is its class."""
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"tensor {tuple(value.shape)} {digest_values(value)}"
    if isinstance(value, types.FunctionType):
        return _render_function(value, depth)
    if depth and isinstance(value, (tuple, list)):
        return f"[{', '.join(_render_attribute(item, depth - 1) for item in value)}]"
    if depth and isinstance(value, dict):
        items = (f"{k!r}: {_render_attribute(v, depth - 1)}" for k, v in value.items())
        return f"{{{', '.join(items)}}}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _render_function(function: types.FunctionType, depth: int) -> str:
    """A function by its code and what it closes over."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    held = [_render_attribute(each, depth - 1) for each in cells] if depth else []
    code = hashlib.sha256(function.__code__.co_code).hexdigest()[:12]
    return f"{function.__qualname__} {code} {function.__code__.co_consts!r} {held}"


def _name_groups(groups: Sequence[Sequence[str]], blocks: Mapping[str, nn.Module]) -> list[str]:
    """A name for each group: where it lies, and where several lie there, of what kind it is."""
    places = [paths[0].rpartition(".")[0] or paths[0] for paths in groups]
    names = []
    for place, paths in zip(places, groups, strict=True):
        alone = places.count(place) == 1 and (len(paths) > 1 or place != paths[0])
        names.append(place if alone else f"{place}.{_name_kind(blocks[paths[0]])}")
    return [
        name if names.count(name) == 1 else f"{name}{paths[0].rpartition('.')[2]}"
        for name, paths in zip(names, groups, strict=True)
    ]


def _name_kind(block: nn.Module) -> str:
    """A word for the kind of a block: its layer type, or its class."""
    for module in block.modules():
        for name in ("attention_type", "layer_type", "is_sliding"):
            value = getattr(module, name, None)
            if isinstance(value, str):
                return value.removesuffix("_attention")
            if value is True:
                return "sliding"
    return type(block).__name__.lower()
