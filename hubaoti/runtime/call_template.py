"""Where in a call a graph's inputs stand, and where its outputs stand in what the module answers.

A manifest's template is read when a module is attached, and once more for each order in which
arguments are given. A call then costs a few look-ups, whatever the template has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from functools import partial
from operator import is_, itemgetter
from types import CodeType
from typing import Any

import torch

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.errors import BadManifest
from hubaoti.runtime.fallback import WITHOUT_CACHE, CannotServe

_MISSING: Any = type("Missing", (), {"__repr__": lambda _: "nothing"})()
_UNGIVEN: Any = type("Ungiven", (), {"__repr__": lambda _: "nothing"})()  # and None is something
# What a model of transformers says to all of its blocks, and what none does without being told to.
_OFF_BY_DEFAULT = {
    *("output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "use_cache"),
}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
CACHE = ("past_key_values", "cache")  # what transformers calls a KV cache: before 5.24, and since
CAUSAL = "is_causal"  # the flag that counts where there is no mask
_BESIDE = {"class", "order"}

# What stands in a template as words, by what makes it of them.
LITERALS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "dtype": partial(getattr, torch),
    "device": torch.device,
}

_Pick = Callable[[Sequence[Any]], Sequence[Any]]


class CallPlan:
    """A call as its template has it: arguments by name, whoever gives them and in which order.

    `count` is the number of the graph's inputs. What `flatten` answers has their places first, then
    one for the KV cache, then one for each number that follows from a dim, as `extents` has them.
    What `unread` names may be given and be anything.
    """

    def __init__(
        self,
        call: Mapping[str, Any],
        count: int,
        forward: Callable[..., Any],
        unread: Set[str] = frozenset(),
    ) -> None:
        self.count, self.unread = count, unread
        parameters = inspect.signature(forward).parameters
        self.names = [name for name, each in parameters.items() if each.kind in _POSITIONAL]
        given = {**dict(zip(self.names, call["args"], strict=False)), **call["kwargs"]}
        self._own = _map_cache_words(given, parameters)
        self._defaults = {
            name: each.default
            for name, each in parameters.items()
            if each.default is not inspect.Parameter.empty
        }
        self.given = {self._own.get(name, name): item for name, item in given.items()}
        self._asked = _list_texts(forward) - parameters.keys() - _OFF_BY_DEFAULT
        self._layouts: dict[tuple[Any, ...], _Layout] = {}
        self.extents = self._layout(len(call["args"]), tuple(call["kwargs"])).extents

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What stands in the place of each tensor, the cache, and each number.

        Raises:
            CannotServe: another structure, or another constant than the template has.
        """
        layout = self._layouts.get((len(args), *kwargs))
        if layout is None:
            layout = self._layout(len(args), tuple(kwargs))
        return layout.flatten_row([*args, *kwargs.values()])

    def name_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, with the defaults of those that it leaves out."""
        return {**self._defaults, **dict(zip(self.names, args, strict=False)), **kwargs}

    def default(self, name: str) -> Any:
        """What an argument is that is not given; a tensor without a default is None.

        Of what `forward` itself asks its `**kwargs` for, nobody knows what it is without.
        """
        if name in self._asked and name not in self.given:
            return _UNGIVEN
        is_tensor = isinstance(self.given.get(name), dict) and "tensor" in self.given[name]
        return self._defaults.get(name, None if is_tensor else _MISSING)

    def _layout(self, count: int, names: tuple[str, ...]) -> _Layout:
        """The layout of calls with so many positional arguments, and these by name."""
        if count > len(self.names):
            raise CannotServe("arguments", f"{count} positional arguments are given")
        given = (*self.names[:count], *names)
        # Who gives both words means the module's own by it, and the other is one more argument.
        twice = {name for name, own in self._own.items() if own in given}
        own = [name if name in twice else self._own.get(name, name) for name in given]
        layout = _Layout(self, own)
        self._layouts[count, *names] = layout
        return layout


class _Layout:
    """Where everything stands in calls that give arguments of the same names in the same order.

    What a call gives is laid out in a row: its arguments, what it leaves out, then what is inside
    of its tuples and dictionaries. A place is a place in that row.
    """

    def __init__(self, plan: CallPlan, names: Sequence[str]) -> None:
        self.extents: list[DimExpr] = []
        self._count = plan.count
        self._tensors: dict[int, int] = {}
        self._numbers: list[int] = []
        self._twice: list[tuple[int, int, str]] = []
        self._constants: list[tuple[int, Any, str]] = []
        self._devices: list[tuple[int, str, str]] = []
        self._opened: list[tuple[int, Callable[[Any], Sequence[Any]]]] = []
        left_out = [name for name in plan.given if name not in names]
        self._absent = [plan.default(name) for name in left_out]
        self._size = len(names) + len(left_out)
        for place, name in enumerate((*names, *left_out)):
            if name in plan.unread:
                continue
            if name in plan.given:
                self._read(plan.given[name], place, name)
            else:  # an argument that the graph does not know may be given if it says nothing
                self._constants.append((place, plan.default(name), name))
        nothing = self._size  # one more place, which stands for what the template does not have
        wanted = [self._tensors.get(index, nothing) for index in range(plan.count + 1)]
        self._find = _make_picker([*wanted, *self._numbers])
        self._pick = _make_picker([place for place, _, _ in self._constants])
        self._expected = [expected for _, expected, _ in self._constants]

    def flatten_row(self, row: list[Any]) -> list[Any]:
        """What `CallPlan.flatten` answers, of the arguments in their order.

        Raises:
            CannotServe: another structure, or another constant than the template has.
        """
        row += self._absent
        for place, items in self._opened:
            row += items(row[place])
        row.append(None)
        if not all(map(is_, self._pick(row), self._expected)):
            self._compare(row)
        for place, name, where in self._devices:
            if _parse_device_kind(row[place]) != name:
                raise CannotServe(
                    "arguments", f"{where} is {row[place]!r:.40}; the graph has {name}"
                )
        for place, other, where in self._twice:
            if row[place] is not row[other]:
                raise CannotServe("arguments", f"{where} was one tensor with another argument")
        return [*self._find(row)]

    def _compare(self, row: Sequence[Any]) -> None:
        """Compare constants that are not the very same objects."""
        for place, expected, where in self._constants:
            value = row[place]
            # A flag that the graph does not know may be off, as if it were not given; only of
            # attention that has no mask, being causal is said by leaving the flag out.
            is_off = value is False and expected is _MISSING and where != CAUSAL
            if not is_off and not _is_same_literal(value, expected):
                message = f"{where} is {describe_value(value)}; the graph has {expected!r:.60}"
                if hasattr(value, "get_seq_length"):
                    raise CannotServe("cache", message, advice=WITHOUT_CACHE)
                raise CannotServe("arguments", message)

    def _read(self, template: Any, place: int, where: str) -> None:
        """Note what the template has at a place."""
        if isinstance(template, list):
            self._read_sequence(template, place, where)
        elif isinstance(template, dict):
            word, inner = split_word(template)
            if word in {"float", "dtype"}:
                self._constants.append((place, LITERALS[word](inner), where))
                return
            if word not in _WORD_READERS:
                raise BadManifest(
                    f"a call of the artifact has the word {word!r:.40}",
                    hint="it was compiled by a newer hubaoti: upgrade this one",
                )
            if "order" in template:
                inner = {name: inner[name] for name in template["order"]}
            _WORD_READERS[word](self, inner, place, where)
        else:
            self._constants.append((place, template, where))

    def _read_tensor(self, index: int, place: int, where: str) -> None:
        # A tensor that was given twice is one input: calls must give it in both places.
        if index in self._tensors:
            self._twice.append((self._tensors[index], place, where))
        self._tensors.setdefault(index, place)

    def _read_cache(self, _true: bool, place: int, where: str) -> None:
        self._tensors[self._count] = place

    def _skip(self, _face: Any, place: int, where: str) -> None:
        """Note nothing: the graph does not compute with it."""

    def _read_size(self, extent: str, place: int, where: str) -> None:
        self.extents.append(DimExpr.parse(extent))
        self._numbers.append(place)

    def _read_device(self, name: str, place: int, where: str) -> None:
        self._devices.append((place, torch.device(name).type, where))

    def _read_sequence(self, items: Sequence[Any], place: int, where: str) -> None:
        """A list or a tuple of as many items as there were."""
        start = self._append_items(place, _make_item_getter(len(items), where), len(items))
        for index, item in enumerate(items):
            self._read(item, start + index, f"{where}[{index}]")

    def _read_mapping(self, items: Mapping[Any, Any], place: int, where: str) -> None:
        """A dictionary, whose values stand in the row like a tuple's items."""
        start = self._append_items(place, _make_field_getter([*items], where), len(items))
        for index, (name, item) in enumerate(items.items()):
            self._read(item, start + index, f"{where}.{name}")

    def _read_items(self, items: Sequence[tuple[Any, Any]], place: int, where: str) -> None:
        """A dictionary whose keys are no words."""
        self._read_mapping(dict(map(tuple, items)), place, where)

    def _append_items(self, place: int, items: Callable[[Any], Sequence[Any]], count: int) -> int:
        """Have the items of a container stand at the end of the row; the place of the first."""
        self._opened.append((place, items))
        self._size += count
        return self._size - count


_WORD_READERS: dict[str, Callable[[_Layout, Any, int, str], None]] = {
    "tensor": _Layout._read_tensor,
    "cache": _Layout._read_cache,
    "any": _Layout._skip,
    "size": _Layout._read_size,
    "device": _Layout._read_device,
    "tuple": _Layout._read_sequence,
    "dict": _Layout._read_mapping,
    "items": _Layout._read_items,
    "fields": _Layout._read_mapping,
}


def choose_cache_word(taken: Container[str]) -> str:
    """What something that takes these arguments calls its KV cache."""
    return next((word for word in CACHE if word in taken), CACHE[0])


def _map_cache_words(given: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    """The module's own word for its KV cache, by the word that it has in other transformers.

    A graph that was compiled with one answers calls with the other, as the module does itself.
    """
    in_call = [word for word in CACHE if given.get(word) == {"cache": True}]
    own = [word for word in CACHE if word in parameters] or in_call
    if not in_call or len(own) > 1:
        return {}
    return {word: own[0] for word in CACHE if word != own[0]}


def _make_picker(places: Sequence[int]) -> _Pick:
    """What takes the values at some places, in one step."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda row: [row[place] for place in places]


def _make_item_getter(count: int, where: str) -> Callable[[Any], Sequence[Any]]:
    """The items of a tuple or a list."""

    def items(value: Any) -> Sequence[Any]:
        if not isinstance(value, (tuple, list)) or len(value) != count:
            raise CannotServe(
                "arguments", f"{where} is {describe_value(value)}, not {count} values"
            )
        return value

    return items


def _make_field_getter(names: Sequence[Any], where: str) -> Callable[[Any], Sequence[Any]]:
    """The values of a dictionary, in the order of the template's."""

    def items(value: Any) -> Sequence[Any]:
        if not isinstance(value, Mapping) or [*value] != [*names]:
            raise CannotServe(
                "arguments", f"{where} is {describe_value(value)}, not {', '.join(map(str, names))}"
            )
        return [value[name] for name in names]

    return items


def _list_texts(function: Any) -> set[str]:
    """The texts in a function's code, as those by which it asks for keywords."""
    function = inspect.unwrap(getattr(function, "func", function))  # of a partial
    codes, texts = [getattr(function, "__code__", None)], set[str]()
    while codes:
        for each in getattr(codes.pop(), "co_consts", ()):
            if isinstance(each, str):
                texts.add(each)
            elif isinstance(each, CodeType):
                codes.append(each)
    return texts


def _is_same_literal(value: Any, expected: Any) -> bool:
    """Whether two constants are one; what is not given is None to code that asks for it."""
    if expected is _UNGIVEN:
        return False
    if value is _MISSING or expected is _MISSING:
        return value is expected or value is None or expected is None
    if isinstance(value, torch.Tensor) or type(value) is not type(expected):
        return False
    return bool(value == expected)


def _parse_device_kind(value: Any) -> str | None:
    """The kind of a device, however it is named; None of anything else."""
    try:
        return torch.device(value).type if isinstance(value, (str, torch.device)) else None
    except RuntimeError:
        return None


def describe_value(value: Any) -> str:
    """A value in a message: a tensor by its shape, what is no literal by its class."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    plain = value is _MISSING or value is None or isinstance(value, (str, int, float))
    return f"{value!r:.60}" if plain else f"a {type(value).__name__}"


def split_word(template: Mapping[str, Any]) -> tuple[str, Any]:
    """The word of a template's dictionary and what it is about, what stands beside it left out."""
    return next((word, inner) for word, inner in template.items() if word not in _BESIDE)


def is_own_call(call: Mapping[str, Any]) -> bool:
    """Whether a graph takes every tensor that a call gives, and its template says all of the call.

    It does not of an output of a library among the arguments, whose class graphs do not know.
    """
    return not {"any", "cache", "fields"} & collect_template_words(call)


def collect_template_words(call: Mapping[str, Any]) -> set[str]:
    """The words that a template has for a call's arguments, each once."""
    return {word for item in _list_argument_templates(call) for word in walk_template_words(item)}


def _list_argument_templates(call: Mapping[str, Any]) -> tuple[Any, ...]:
    """The templates of a call's arguments, those by place first."""
    return (*call["args"], *call["kwargs"].values())


def takes_containers(call: Mapping[str, Any]) -> bool:
    """Whether a call gives lists or dictionaries, into which a module may write."""
    return any(map(_is_container, _list_argument_templates(call)))


def _is_container(template: Any) -> bool:
    """Whether a template is a list or a dictionary, or a tuple that holds one."""
    if not isinstance(template, dict):
        return isinstance(template, list)
    word, inner = split_word(template)
    return word in {"dict", "items", "fields"} or (
        word == "tuple" and any(map(_is_container, inner))
    )


def walk_template_words(template: Any) -> Iterator[str]:
    """The words of a template, a tensor's for each of its places."""
    for word, inner in walk_template(template):
        if word != "any" or isinstance(inner, dict):  # a flag that nobody reads is a constant
            yield word


def walk_template(template: Any) -> Iterator[tuple[str, Any]]:
    """The words of a template, each with what it is about, those that hold others first."""
    items = template if isinstance(template, (list, tuple)) else ()
    if isinstance(template, Mapping):
        word, inner = split_word(template)
        yield word, inner
        if word in {"dict", "fields"}:
            items = inner.values()
        elif word in {"tuple", "items"}:
            items = inner if word == "tuple" else [item for _, item in inner]
    for item in items:
        yield from walk_template(item)
