"""How what a module answers is made of a graph's outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from hubaoti.errors import BadManifest
from hubaoti.runtime.call_template import LITERALS, split_word

_MakeAnswer = Callable[[Sequence[torch.Tensor]], Any]


def parse_output_template(
    template: Any, given: Mapping[tuple[Any, ...], int] | None = None
) -> _MakeAnswer:
    """What makes a module's answer of a graph's outputs, as a manifest's template says.

    `given` has where in them that stands which the call itself gives, by its path there.

    Raises:
        BadManifest: the template names a class that is none of a library's outputs.
    """
    plan = partial(parse_output_template, given=given)
    if isinstance(template, list):
        items = [plan(item) for item in template]
        return lambda tensors: [make(tensors) for make in items]
    if not isinstance(template, dict):
        return lambda tensors: template
    word, inner = split_word(template)
    if word in {"tensor", "given"}:
        place = inner if word == "tensor" else (given or {})[tuple(inner)]
        return lambda tensors: tensors[place]
    if word == "tuple":
        items = [plan(item) for item in inner]
        return lambda tensors: tuple([make(tensors) for make in items])
    if word == "items":
        pairs = [(key, plan(item)) for key, item in inner]
        return lambda tensors: {key: make(tensors) for key, make in pairs}
    if word in {"dict", "fields"}:
        fields = {name: plan(inner[name]) for name in template.get("order", inner)}
        cls = _find_output_class(template["class"]) if "class" in template else dict
        return lambda tensors: cls(**{name: make(tensors) for name, make in fields.items()})
    value = LITERALS.get(word, torch.device)(inner)
    return lambda tensors: value


def _find_output_class(name: str) -> type[Any]:
    """The class of a library's output, by the name that a manifest gives.

    Nothing is imported for it: who has the module has it already. It must be a mapping with fields,
    as transformers' and diffusers' outputs are; another is refused.
    """
    module, _, qualname = name.rpartition(".")
    cls: Any = vars(sys.modules[module]).get(qualname) if module in sys.modules else None
    is_output = isinstance(cls, type) and issubclass(cls, Mapping | dict)
    if not is_output or not hasattr(cls, "__dataclass_fields__"):
        raise BadManifest(
            f"the artifact answers {name!r:.80}, which is no output of a library that is loaded",
            hint="import the library that the module is of, in the version it was compiled with",
        )
    return cls  # type: ignore[no-any-return]
