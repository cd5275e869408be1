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

from hubaoti.canonical import SAFE, canonical
from hubaoti.compiler.inductor import ALONE, WEIGHTLESS
from hubaoti.errors import BadRequest

MODES = ("default", "max-autotune", "reduce-overhead")
WORD = re.compile(r"[\w.,:+-]*\Z")  # no paths and no commands
SPOKEN = {"true": True, "false": False, "none": None, "null": None}
# Why a user may not set what an option's name says; the first that matches is the reason.
REFUSED = {
    "hubaoti sets it for the target": r"cpp\.(simdlen|march|vec_isa_ok|dynamic_threads)"
    r"|.*_custom_\w*pass(es)?",
    "it computes with weights while compiling, and a graph holds none": (
        r"freezing\w*|cpp\.(weight_prepack|enable_concat_linear)|enable_linear_binary_folding"
    ),
    "hubaoti lays out the package": (
        r"aot_inductor(_mode)?\..*|\w*_wrapper\w*|enable_autograd_for_aot"
    ),
    "a graph would read past its inputs unnoticed": r"assume_(aligned_inputs|32bit_indexing)",
    "no graph is replayed by inductor": r".*cudagraph.*|graph_partition",
    "hubaoti does not build for that backend": (
        r"(rocm|xpu|halide|mtia)\..*|(cpu|cuda|tpu|xpu)_backend"
    ),
    "it is of distributed training": (
        r"aten_distributed_optimizations\..*|_?(collective|fuse_ddp|micro_pipeline).*|bucket_.*"
        r"|(distributed|pipeline)_max_.*|dedup_reduce_scatters|(intra|inter)_node_bw"
    ),
    "it is for debugging inductor, and changes no graph": (
        r"(trace|test_configs|autoheuristic_\w+|lookup_table)\..*|_.*|[A-Z_]+|.*_TESTING_ONLY"
        r"|.*(debug|dump|verbose|log_|profil|proton|report|displayed|progress|trace|warning).*"
        r"|.*(harness|metric|ptxas_info|test_runner|warn_|intermediate_hooks|compile_hook).*"
        r"|comment_origin|save_args|is_nightly\w*|benchmark_kernel"
    ),
    "it names what is on this machine": (
        r".*(path|_dir|home|_root|cxx|platform|compile_cmd)|.*\.(arch|version)|.*worker\w*log\w*"
    ),
    "it is how a build is done, not what is built": (
        r".*((graph|local|autotune|skip)_cache|cacheable|caching|remote|precompil|worker).*"
        r"|.*(timeout|subproc|launcher).*"
        r"|quiesce_\w+|\w*multi_device|triton\.store_cubin|keep_static_cubin_raw"
    ),
}
# And for a graph of a CPU.
GPU_ONLY = {
    "it packs weights while compiling, and a graph holds none": r"max_autotune(_gemm\w*)?",
    "it is of GPU kernels, and this graph is for a CPU": (
        r"(triton|cuda|cutlass)\..*|(max_autotune|coordinate_descent|combo_kernel|nvgemm)\w*"
        r"|cutedsl\w*|benchmark_combo_kernel"
    ),
}
declared: Any = config  # whose methods mypy does not see


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
    return {name: value for name, value in found.items() if refusal(name, device) is None}


def options_of(mode: str, given: Iterable[str] | Mapping[str, Any], device: str) -> dict[str, Any]:
    """The options of a mode, and over them those that were given, as `parse_options` has them.

    Raises:
        BadRequest: the mode or an option is not what it should be.
    """
    return without_defaults(options_of_mode(mode, device) | checked_options(given, device))


def parse_options(given: Iterable[str] | Mapping[str, Any], device: str) -> dict[str, Any]:
    """Options from `key=value` words, or from Python, for a graph on a kind of device.

    Sorted, as JSON has them, without those at torch's default: one spelling for one build.

    Raises:
        BadRequest: an option is malformed, unknown, given twice, not for users, or of another type.
    """
    return without_defaults(checked_options(given, device))


def checked_options(given: Iterable[str] | Mapping[str, Any], device: str) -> dict[str, Any]:
    """The options that were given, each known, allowed and of its type.

    Raises:
        BadRequest: one is not.
    """
    spoken = not isinstance(given, Mapping)
    asked = given if isinstance(given, Mapping) else words_of(given)
    known = declared.get_config_copy()
    for name in asked:
        if name not in known:
            raise unknown(name, known, device)
        if reason := refusal(name, device):
            raise BadRequest(f"inductor option {name} cannot be set: {reason}", hint="leave it out")
    return {name: checked(name, value, spoken) for name, value in asked.items()}


def without_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the order of their names, those at torch's default left out."""
    defaults = declared.get_config_copy()
    return {
        name: options[name]
        for name in sorted(options)
        if canonical(options[name]) != canonical_default(defaults.get(name))
    }


def words_of(texts: Iterable[str]) -> dict[str, str]:
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


def unknown(name: str, known: Iterable[str], device: str) -> BadRequest:
    """That torch has no such option, and those that may have been meant."""
    allowed = [each for each in known if refusal(each, device) is None]
    near = [each for each in allowed if each.endswith(f".{name}")]
    near += difflib.get_close_matches(name, allowed, n=4)
    version = torch.__version__.partition("+")[0]
    return BadRequest(
        f"inductor of torch {version} has no option {name!r}",
        hint=f"near ones: {', '.join(dict.fromkeys(near))}"
        if near
        else "torch._inductor.list_options() has them all",
    )


def refusal(name: str, device: str) -> str | None:
    """Why an option is not for users, None where it is."""
    if name in WEIGHTLESS or name in ALONE:
        return "hubaoti sets it for every build"
    rules = REFUSED | (GPU_ONLY if device.startswith("cpu") else {})
    found = (reason for reason, names in rules.items() if re.fullmatch(names, name))
    return next(found, None) or (None if speakable(kind_of(name)) else "its values are Python")


def kind_of(name: str) -> Any:
    """The type that torch declares for an option."""
    try:
        return declared.get_type(name)
    except KeyError:  # a mode's option that this torch no longer has
        return str


def speakable(kind: Any) -> bool:
    """Whether some value of a type, besides None, is JSON."""
    if get_origin(kind) in {Union, types.UnionType}:
        return any(speakable(each) for each in get_args(kind) if each is not types.NoneType)
    plain = {bool, int, float, str, list, tuple, dict, types.NoneType, Any}
    if get_origin(kind) in {list, tuple}:
        return all(speakable(each) for each in get_args(kind) if each is not Ellipsis)
    return get_origin(kind) in {Literal, dict} or kind in plain


def checked(name: str, value: Any, spoken: bool) -> Any:
    """An option's value, as JSON has it.

    Raises:
        BadRequest: it is of another type.
    """
    kind = kind_of(name)
    for each in readings(value) if spoken else [value]:
        try:
            return fitted(each, kind)
        except ValueError:
            continue
    shown = value if spoken else repr(value)
    raise BadRequest(f"inductor option {name} cannot be {shown}", hint=f"give {described(kind)}")


def readings(text: str) -> list[Any]:
    """What a word may mean: a truth value, None, JSON, or itself."""
    if text.lower() in SPOKEN:
        return [SPOKEN[text.lower()], text]
    try:
        return [json.loads(text), text]
    except ValueError:
        return [text]


def fitted(value: Any, kind: Any) -> Any:
    """A value as a type has it.

    Raises:
        ValueError: it is of another type, or no JSON.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in {Union, types.UnionType}:
        return first_fit(value, inner)
    if origin is Literal:
        return first_equal(value, inner)
    if kind is Any or kind is types.NoneType:
        return first_fit(value, (bool, int, float, str, list, dict)) if value is not None else None
    if (origin or kind) in {list, tuple} and isinstance(value, (list, tuple)):
        return [first_fit(each, inner or (Any,)) for each in value]
    if (origin or kind) is dict and isinstance(value, Mapping):
        return {fitted(k, str): fitted(v, (*inner, Any, Any)[1]) for k, v in value.items()}
    return fitted_plain(value, kind)


def fitted_plain(value: Any, kind: Any) -> bool | int | float | str:
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
    if kind is str and isinstance(value, str) and WORD.match(value):
        return value
    raise ValueError(value)


def first_fit(value: Any, kinds: Iterable[Any]) -> Any:
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
            return fitted(value, kind)
        except ValueError:
            continue
    raise ValueError(value)


def first_equal(value: Any, choices: Iterable[Any]) -> Any:
    """A value that is one of some, of the same type.

    Raises:
        ValueError: it is none of them.
    """
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise ValueError(value)


def described(kind: Any) -> str:
    """A type in words."""
    origin = get_origin(kind)
    if origin in {Union, types.UnionType}:
        return " or ".join(described(each) for each in get_args(kind))
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


def canonical_default(value: Any) -> bytes | None:
    """The canonical form of a default; None of one that is no JSON."""
    try:
        return canonical(value)
    except (ValueError, TypeError):
        return None
