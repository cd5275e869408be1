"""Inductor's options as users give them: known, of the right type, safe for a graph, spelled once.

What stands here stands in the manifest and in the key, so it is JSON, and an option at torch's own
default is left out. What inductor would ignore is refused, because it would only split keys. Which
options are for users, and words others are not, is in `inductor_options.toml`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch._inductor import config

from hubaoti.artifact.canonical import SAFE, encode_canonical
from hubaoti.compiler.inductor import ALONE, WEIGHTLESS
from hubaoti.errors import BadRequest

MODES = ("default", "max-autotune", "reduce-overhead")
_LISTED = tomllib.loads(Path(__file__).with_name("inductor_options.toml").read_text("utf-8"))
ANY_DEVICE = frozenset(_LISTED["any_device"])
GPU_KERNELS = frozenset(_LISTED["gpu_kernels"])
_REFUSED = {"hubaoti sets it for every build": [*WEIGHTLESS, *ALONE], **_LISTED["refused"]}
_MEASURING = frozenset(_LISTED["measuring"])
_UNKNOWN = "hubaoti does not know what it changes"
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
    """The options of a mode, and over them those from `key=value` words, or from Python.

    Sorted, as JSON has them, without those at torch's default: one spelling for one build.

    Raises:
        BadRequest: the mode is unknown; an option is malformed, unknown, given twice, not for
            users, or of another type.
    """
    options = options_of_mode(mode, device)
    spoken = not isinstance(given, Mapping)
    requested = given if isinstance(given, Mapping) else _split_words(given)
    defaults = _declared.get_config_copy()
    for name in requested:
        _require_settable(name, defaults, device)
    options |= {name: _read_value(name, value, spoken) for name, value in requested.items()}
    return {
        name: options[name]
        for name in sorted(options)
        if encode_canonical(options[name]) != _encode_default(defaults.get(name))
    }


def list_given(options: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Of a build's options those that somebody gave, or a mode has, as `merge_options` takes them.

    What every build has is left out, and what a graph for another kind of device cannot have.
    """
    return {name: value for name, value in options.items() if refuse_option(name, device) is None}


def find_measuring(options: Mapping[str, Any]) -> list[str]:
    """Those of a build's options that have kernels chosen by measuring them, on the GPU itself."""
    return [name for name in options if name in _MEASURING and options[name]]


def refuse_measuring(options: Mapping[str, Any]) -> None:
    """Refuse what has kernels chosen by measuring them, for GPUs that need not be here.

    Raises:
        BadRequest: with the options.
    """
    if found := find_measuring(options):
        raise BadRequest(
            f"{', '.join(found)}: kernels are chosen by measuring them on the GPU itself",
            hint="compile on a machine with that GPU, with --device cuda; or leave it out",
        )


def _split_words(texts: Iterable[str]) -> dict[str, str]:
    """The names and values of `key=value` words."""
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


def _require_settable(name: str, known: Iterable[str], device: str) -> None:
    """Refuse an option that torch does not have, or that cannot be set."""
    if name not in known:
        near = _find_near(name, known, device)
        raise BadRequest(
            f"inductor of torch {torch.__version__.partition('+')[0]} has no option {name!r}",
            hint=near or "torch._inductor.list_options() has them all",
        )
    reason = refuse_option(name, device)
    if reason == _UNKNOWN:
        near = _find_near(name, known, device)
        listed = "hubaoti/compiler/inductor_options.toml has all that can be set"
        hint = "; ".join(filter(None, ("leave it out", near, listed)))
        raise BadRequest(f"inductor option {name} cannot be set: {reason}", hint=hint)
    if reason:
        raise BadRequest(f"inductor option {name} cannot be set: {reason}", hint="leave it out")


def _find_near(name: str, known: Iterable[str], device: str) -> str:
    """Options for users whose names are like one, for a hint; empty where there are none."""
    allowed = [each for each in known if refuse_option(each, device) is None]
    near = [each for each in allowed if each.endswith(f".{name}")]
    near += difflib.get_close_matches(name, allowed, n=4)
    return f"near ones: {', '.join(dict.fromkeys(near))}" if near else ""


def refuse_option(name: str, device: str) -> str | None:
    """Why an option is not for users, None where it is: it is in the list, and JSON can say it."""
    if name in GPU_KERNELS and device.startswith("cpu"):
        if name in _LISTED["packing"]:
            return "it packs weights while compiling, and a graph holds none"
        return "it is of GPU kernels, and this graph is for a CPU"
    reason = None
    if name not in ANY_DEVICE | GPU_KERNELS:
        fitting = (words for words, starts in _REFUSED.items() if name.startswith(tuple(starts)))
        reason = next(fitting, _UNKNOWN)
    if reason in {None, _UNKNOWN} and not _is_speakable(_get_kind(name)):
        return "its values are Python"
    return reason


def _get_kind(name: str) -> Any:
    """The type that torch declares for an option."""
    try:
        return _declared.get_type(name)
    except KeyError:  # a mode's option that this torch no longer has
        return str


def _is_speakable(kind: Any) -> bool:
    """Whether some value of a type, besides None, is JSON."""
    if get_origin(kind) in {Union, types.UnionType}:
        return any(_is_speakable(each) for each in get_args(kind) if each is not types.NoneType)
    plain = {bool, int, float, str, list, tuple, dict, types.NoneType, Any}
    if get_origin(kind) in {list, tuple}:
        return all(_is_speakable(each) for each in get_args(kind) if each is not Ellipsis)
    return get_origin(kind) in {Literal, dict} or kind in plain


def _read_value(name: str, value: Any, spoken: bool) -> Any:
    """An option's value, as JSON has it."""
    kind = _get_kind(name)
    for each in _list_readings(value) if spoken else [value]:
        with suppress(ValueError):
            return _fit(each, kind)
    shown = value if spoken else repr(value)
    raise BadRequest(
        f"inductor option {name} cannot be {shown}", hint=f"give {_describe_type(kind)}"
    )


def _list_readings(text: str) -> list[Any]:
    """What a word may mean: a truth value, None, JSON, or itself."""
    if text.lower() in _SPOKEN:
        return [_SPOKEN[text.lower()], text]
    try:
        return [json.loads(text), text]
    except ValueError:
        return [text]


def _fit(value: Any, kind: Any) -> Any:
    """A value as a type has it."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in {Union, types.UnionType}:
        return _fit_first(value, inner)
    if origin in {Any, types.NoneType}:
        return _fit_first(value, (types.NoneType, bool, int, float, str, list, dict))
    if origin is Literal and any(type(each) is type(value) and each == value for each in inner):
        return value
    if origin in {list, tuple} and isinstance(value, (list, tuple)):
        return [_fit_first(each, inner or (Any,)) for each in value]
    if origin is dict and isinstance(value, Mapping):
        return {_fit(k, str): _fit(v, (*inner, Any, Any)[1]) for k, v in value.items()}
    return _fit_plain(value, kind)


def _fit_first(value: Any, kinds: Iterable[Any]) -> Any:
    """A value as the first of some types that has it; None only where a type is None."""
    for kind in kinds:
        if kind is not types.NoneType:
            with suppress(ValueError):
                return _fit(value, kind)
        elif value is None:
            return None
    raise ValueError(value)


def _fit_plain(value: Any, kind: Any) -> bool | int | float | str:
    """A value as one of JSON's plain types has it."""
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


def _describe_type(kind: Any) -> str:
    """A type in the words of a hint, as what is to be given."""
    origin = get_origin(kind)
    if origin in {Union, types.UnionType}:
        return " or ".join(_describe_type(each) for each in get_args(kind))
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


def _encode_default(value: Any) -> bytes | None:
    """The canonical form of a default; None of one that is no JSON."""
    try:
        return encode_canonical(value)
    except (ValueError, TypeError):
        return None
