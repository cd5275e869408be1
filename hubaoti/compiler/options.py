"""Inductor's options as users give them: known, of the right type, safe for a graph, spelled once.

What stands here stands in the manifest and in the key, so it is JSON, and an option at torch's own
default is left out. What inductor would ignore is refused, because it would only split keys.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch._inductor import config

from hubaoti.artifact.canonical import SAFE, encode_canonical
from hubaoti.compiler.inductor_options import ANY_DEVICE, GPU_KERNELS
from hubaoti.compiler.refused_options import UNKNOWN, reason_for_a_cpu, reason_to_refuse
from hubaoti.errors import BadRequest

MODES = ("default", "max-autotune", "reduce-overhead")
_WORD = re.compile(r"[\w.,:+-]*\Z")  # no paths and no commands
_SPOKEN = {"true": True, "false": False, "none": None, "null": None}
_declared: Any = config  # whose methods mypy does not see


def options_of_mode(mode: str, device: str) -> dict[str, Any]:
    """What a mode of `torch.compile` turns on, as far as a graph for a kind of device can have it.

    `reduce-overhead` is CUDA graphs, which whoever calls the graph records: no option of inductor.
    `max-autotune` chooses GPU kernels by measuring; two builds may choose differently. On a CPU all
    it has is weights packed while compiling, so nothing remains of it: measured on torch 2.13, the
    package is the default's to the byte.

    Raises:
        BadRequest: there is no such mode.
    """
    if mode not in MODES:
        raise BadRequest(f"unknown mode {mode!r}", hint=f"one of: {', '.join(MODES)}")
    found = torch._inductor.list_mode_options(mode)
    return {name: value for name, value in found.items() if refuse_option(name, device) is None}


def merge_options(
    mode: str, given: Iterable[str] | Mapping[str, Any], device: str
) -> dict[str, Any]:
    """The options of a mode, and over them those that were given, as `parse_options` has them.

    Raises:
        BadRequest: the mode or an option is not what it should be.
    """
    return _without_defaults(options_of_mode(mode, device) | _checked_options(given, device))


def parse_options(given: Iterable[str] | Mapping[str, Any], device: str) -> dict[str, Any]:
    """Options from `key=value` words, or from Python, for a graph on a kind of device.

    Sorted, as JSON has them, without those at torch's default: one spelling for one build.

    Raises:
        BadRequest: an option is malformed, unknown, given twice, not for users, or of another type.
    """
    return _without_defaults(_checked_options(given, device))


def _checked_options(given: Iterable[str] | Mapping[str, Any], device: str) -> dict[str, Any]:
    """The options that were given, each known, allowed and of its type.

    Raises:
        BadRequest: one is not.
    """
    spoken = not isinstance(given, Mapping)
    asked = given if isinstance(given, Mapping) else _words_of(given)
    known = _declared.get_config_copy()
    for name in asked:
        if name not in known:
            raise _unknown(name, known, device)
        if reason := refuse_option(name, device):
            raise _refused(name, reason, known, device)
    return {name: _checked(name, value, spoken) for name, value in asked.items()}


def _without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the order of their names, those at torch's default left out."""
    defaults = _declared.get_config_copy()
    return {
        name: options[name]
        for name in sorted(options)
        if encode_canonical(options[name]) != _canonical_default(defaults.get(name))
    }


def _words_of(texts: Iterable[str]) -> dict[str, str]:
    """The names and values of `key=value` words.

    Raises:
        BadRequest: a word is malformed, or gives its option twice.
    """
    words: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not name or not equals or name in words:
            what = "gives its option twice" if name in words else "is malformed"
            raise BadRequest(
                f"--inductor {text} {what}", hint="write it as --inductor max_autotune=true"
            )
        words[name] = value.strip()
    return words


def _unknown(name: str, known: Iterable[str], device: str) -> BadRequest:
    """That torch has no such option, and those that may have been meant."""
    near = _near(name, known, device)
    version = torch.__version__.partition("+")[0]
    return BadRequest(
        f"inductor of torch {version} has no option {name!r}",
        hint=f"near ones: {', '.join(near)}"
        if near
        else "torch._inductor.list_options() has them all",
    )


def _refused(name: str, reason: str, known: Iterable[str], device: str) -> BadRequest:
    """That an option cannot be set, and why; of one that hubaoti does not know, which it does."""
    hint = "leave it out"
    if reason == UNKNOWN:
        near = _near(name, known, device)
        hint += f"; near ones: {', '.join(near)}" if near else ""
        hint += "; hubaoti/compiler/inductor_options.py has all that can be set"
    return BadRequest(f"inductor option {name} cannot be set: {reason}", hint=hint)


def _near(name: str, known: Iterable[str], device: str) -> list[str]:
    """Options for users whose names are like one."""
    allowed = [each for each in known if refuse_option(each, device) is None]
    near = [each for each in allowed if each.endswith(f".{name}")]
    near += difflib.get_close_matches(name, allowed, n=4)
    return [*dict.fromkeys(near)]


def refuse_option(name: str, device: str) -> str | None:
    """Why an option is not for users, None where it is: it is in the list, and JSON can say it."""
    if name in GPU_KERNELS and device.startswith("cpu"):
        return reason_for_a_cpu(name)
    listed = name in ANY_DEVICE or name in GPU_KERNELS
    reason = None if listed else reason_to_refuse(name)
    if reason in {None, UNKNOWN} and not _speakable(_kind_of(name)):
        return "its values are Python"
    return reason


def _kind_of(name: str) -> Any:
    """The type that torch declares for an option."""
    try:
        return _declared.get_type(name)
    except KeyError:  # a mode's option that this torch no longer has
        return str


def _speakable(kind: Any) -> bool:
    """Whether some value of a type, besides None, is JSON."""
    if get_origin(kind) in {Union, types.UnionType}:
        return any(_speakable(each) for each in get_args(kind) if each is not types.NoneType)
    plain = {bool, int, float, str, list, tuple, dict, types.NoneType, Any}
    if get_origin(kind) in {list, tuple}:
        return all(_speakable(each) for each in get_args(kind) if each is not Ellipsis)
    return get_origin(kind) in {Literal, dict} or kind in plain


def _checked(name: str, value: Any, spoken: bool) -> Any:
    """An option's value, as JSON has it.

    Raises:
        BadRequest: it is of another type.
    """
    kind = _kind_of(name)
    for each in _readings(value) if spoken else [value]:
        try:
            return _fitted(each, kind)
        except ValueError:
            continue
    shown = value if spoken else repr(value)
    raise BadRequest(f"inductor option {name} cannot be {shown}", hint=f"give {_described(kind)}")


def _readings(text: str) -> list[Any]:
    """What a word may mean: a truth value, None, JSON, or itself."""
    if text.lower() in _SPOKEN:
        return [_SPOKEN[text.lower()], text]
    try:
        return [json.loads(text), text]
    except ValueError:
        return [text]


def _fitted(value: Any, kind: Any) -> Any:
    """A value as a type has it.

    Raises:
        ValueError: it is of another type, or no JSON.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        return _first_fit(value, inner)
    if origin is Literal:
        return _first_equal(value, inner)
    if kind is Any or kind is types.NoneType:
        return _first_fit(value, (bool, int, float, str, list, dict)) if value is not None else None
    if (origin or kind) in {list, tuple} and isinstance(value, (list, tuple)):
        return [_first_fit(each, inner or (Any,)) for each in value]
    if (origin or kind) is dict and isinstance(value, Mapping):
        return {_fitted(k, str): _fitted(v, (*inner, Any, Any)[1]) for k, v in value.items()}
    return _fitted_plain(value, kind)


def _fitted_plain(value: Any, kind: Any) -> bool | int | float | str:
    """A value as one of JSON's plain types has it.

    Raises:
        ValueError: it is of another type; a word is no word, a number no finite one.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and number and isinstance(value, int) and abs(value) <= SAFE:
        return value
    if kind is float and number and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str) and _WORD.match(value):
        return value
    raise ValueError(value)


def _first_fit(value: Any, kinds: Iterable[Any]) -> Any:
    """A value as the first of some types that has it; None only where a type is None.

    Raises:
        ValueError: none of them has it.
    """
    for kind in kinds:
        if kind is types.NoneType:
            if value is None:
                return None
            continue
        try:
            return _fitted(value, kind)
        except ValueError:
            continue
    raise ValueError(value)


def _first_equal(value: Any, choices: Iterable[Any]) -> Any:
    """A value that is one of some, of the same type.

    Raises:
        ValueError: it is none of them.
    """
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ValueError(value)


def _described(kind: Any) -> str:
    """A type in words."""
    origin = get_origin(kind)
    if origin in {Union, types.UnionType}:
        return " or ".join(_described(each) for each in get_args(kind))
    if origin is Literal:
        return f"one of: {', '.join(map(str, get_args(kind)))}"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word",
        list: "a list as JSON has it",
        tuple: "a list as JSON has it",
        dict: "a table as JSON has it",
        types.NoneType: "none",
    }
    return names.get(origin or kind, "a plain value")


def _canonical_default(value: Any) -> bytes | None:
    """The canonical form of a default; None of one that is no JSON."""
    try:
        return encode_canonical(value)
    except (ValueError, TypeError):
        return None
