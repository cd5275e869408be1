"""Where in a call a graph's inputs stand, and where its outputs stand in what the module answers.

What is read of a manifest's templates here is worked out once, when a module is attached: a call
then costs a few dictionary look-ups.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hubaoti.errors import BadManifest
from hubaoti.extents import Extent
from hubaoti.runtime.reasons import Unserved

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "nothing"})()
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NUMBERS = (int, float)
BESIDE = {"class", "order"}

Read = Callable[[Any, list[Any]], None]
Make = Callable[[Sequence[torch.Tensor]], Any]


class CallPlan:
    """A call as its template has it: arguments by name, whoever gives them and in which order.

    `count` is the number of the graph's inputs. What `flat` answers has their places first, then
    one for the KV cache, then one for each number that follows from a dim.
    """

    def __init__(self, call: Mapping[str, Any], count: int, forward: Callable[..., Any]) -> None:
        self.count = count
        self.extents: list[Extent] = []
        parameters = inspect.signature(forward).parameters
        self._names = [name for name, each in parameters.items() if each.kind in POSITIONAL]
        self._defaults = {
            name: each.default
            for name, each in parameters.items()
            if each.default is not inspect.Parameter.empty
        }
        given = self._by_name(call["args"], call["kwargs"])
        self._reads = [
            (name, self._default(name), self._read(t, name)) for name, t in given.items()
        ]
        self._known = given.keys()

    @property
    def width(self) -> int:
        """How many places `flat` answers."""
        return self.count + 1 + len(self.extents)

    def flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What stands in the place of each tensor, the cache, and each number.

        Raises:
            Unserved: another structure, or another constant than the template has.
        """
        given = self._by_name(args, kwargs) if args else kwargs
        found: list[Any] = [None] * self.width
        for name, default, read in self._reads:
            read(given.get(name, default), found)
        if not given.keys() <= self._known:
            self._refuse_more(given)
        return found

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by the names of their parameters."""
        if len(args) > len(self._names):
            raise Unserved("arguments", f"{len(args)} positional arguments are given")
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def _default(self, name: str) -> Any:
        return self._defaults.get(name, MISSING)

    def _refuse_more(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments that the graph was not compiled with, unless they say nothing."""
        for name in given.keys() - self._known:
            value = given[name]
            if value is not None and not same_literal(value, self._default(name)):
                raise Unserved("arguments", f"{name} is given, which the graph does not know")

    def _read(self, template: Any, where: str) -> Read:
        """How the value at one place of a call is read."""
        if isinstance(template, list):
            return self._sequence(template, where)
        if not isinstance(template, dict):
            return constant(template, where)
        word, inner = word_of(template)
        words: dict[str, Callable[[Any, str], Read]] = {
            "tensor": lambda place, _: placed(place),
            "any": lambda _face, _: ignored,
            "cache": lambda _true, _: placed(self.count),
            "size": self._size,
            "tuple": self._sequence,
            "dict": self._mapping,
            "fields": self._mapping,
            "device": of_device,
            "dtype": lambda name, where: constant(getattr(torch, name), where),
        }
        if word not in words:
            raise BadManifest(
                f"a call of the artifact has the word {word!r:.40}",
                hint="it was compiled by a newer hubaoti: upgrade this one",
            )
        return words[word](inner, where)

    def _size(self, extent: str, where: str) -> Read:
        """A number that follows from the dims, which are not known yet."""
        self.extents.append(Extent.parse(extent))
        return placed(self.width - 1)

    def _sequence(self, items: Sequence[Any], where: str) -> Read:
        """A list or a tuple, each item as its template says."""
        reads = [self._read(item, f"{where}[{at}]") for at, item in enumerate(items)]

        def read(value: Any, found: list[Any]) -> None:
            if not isinstance(value, (tuple, list)) or len(value) != len(reads):
                raise Unserved("arguments", f"{where} is {kind(value)}, not {len(reads)} values")
            for each, item in zip(reads, value, strict=True):
                each(item, found)

        return read

    def _mapping(self, items: Mapping[str, Any], where: str) -> Read:
        """A dictionary, each value as its template says."""
        reads = {name: self._read(item, f"{where}.{name}") for name, item in items.items()}

        def read(value: Any, found: list[Any]) -> None:
            if not isinstance(value, Mapping) or value.keys() != reads.keys():
                raise Unserved("arguments", f"{where} is {kind(value)}, not {', '.join(reads)}")
            for name, each in reads.items():
                each(value[name], found)

        return read


def ignored(value: Any, found: list[Any]) -> None:
    """What is not computed with may be anything."""


def placed(place: int) -> Read:
    """Put a value in its place."""

    def read(value: Any, found: list[Any]) -> None:
        found[place] = None if value is MISSING else value

    return read


def constant(expected: Any, where: str) -> Read:
    """Compare a value with the one that the graph was compiled with."""

    def read(value: Any, found: list[Any]) -> None:
        if value is not expected and not same_literal(value, expected):
            reason = "cache" if is_cache(value) else "arguments"
            raise Unserved(reason, f"{where} is {kind(value)}; the graph has {expected!r:.60}")

    return read


def of_device(name: str, where: str) -> Read:
    """Compare the kind of a device; which one of them it is, is the module's."""
    expected = torch.device(name).type

    def read(value: Any, found: list[Any]) -> None:
        if torch.device(value).type != expected:
            raise Unserved("arguments", f"{where} is {value}; the graph has {name}")

    return read


def same_literal(value: Any, expected: Any) -> bool:
    """Whether two constants are one; what is not given is None to code that asks for it."""
    if value is MISSING or expected is MISSING:
        return value is expected or value is None or expected is None
    if isinstance(value, torch.Tensor) or type(value) is not type(expected):
        return False
    return bool(value == expected)


def is_cache(value: Any) -> bool:
    """Whether a value is a KV cache of transformers, which is not imported for this."""
    return hasattr(value, "get_seq_length")


def kind(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    plain = value is MISSING or value is None or isinstance(value, (bool, str, *NUMBERS))
    return f"{value!r:.60}" if plain else f"a {type(value).__name__}"


def word_of(template: Mapping[str, Any]) -> tuple[str, Any]:
    """The word of a template's dictionary and what it is about, what stands beside it left out."""
    return next((word, inner) for word, inner in template.items() if word not in BESIDE)


def answer_plan(template: Any) -> Make:
    """How a module's answer is made of a graph's outputs.

    Raises:
        BadManifest: the template names a class that is none of a library's outputs.
    """
    if isinstance(template, list):
        items = [answer_plan(item) for item in template]
        return lambda tensors: [make(tensors) for make in items]
    if not isinstance(template, dict):
        return lambda tensors: template
    word, inner = word_of(template)
    if word == "tensor":
        return lambda tensors: tensors[inner]
    if word == "tuple":
        items = [answer_plan(item) for item in inner]
        return lambda tensors: tuple([make(tensors) for make in items])
    if word in {"dict", "fields"}:
        fields = {name: answer_plan(inner[name]) for name in template.get("order", inner)}
        cls = output_class(template["class"]) if "class" in template else dict
        return lambda tensors: cls(**{name: make(tensors) for name, make in fields.items()})
    value = getattr(torch, inner) if word == "dtype" else torch.device(inner)
    return lambda tensors: value


def output_class(name: str) -> type[Any]:
    """The class of a library's output, by the name that a manifest gives.

    Nothing is imported for it: who has the module has it already. It must be a mapping with fields,
    as transformers' and diffusers' outputs are.

    Raises:
        BadManifest: there is none of that name.
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
