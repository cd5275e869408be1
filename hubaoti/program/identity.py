"""The program of a model: what it computes, whatever its weights.

Two fine-tunes have one program, so the config is normalized: a key counts where the code that
computes reads it, and where it is no name, label, version or knob of training. Measured over the
788 configs of transformers 5.22: what they name and do not count is read by no code that computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from hubaoti.artifact.canonical import SAFE, digest_canonical
from hubaoti.artifact.schema import Program
from hubaoti.errors import BadRequest, OtherProgram, first_line
from hubaoti.program import changed_attributes
from hubaoti.program.adapters import list_own_parts
from hubaoti.program.changed_attributes import is_as_built
from hubaoti.program.model_code import Code, collect_code, collect_code_of_types, is_loose
from hubaoti.program.module_fingerprint import Listing
from hubaoti.program.monkey_patches import find_patches
from hubaoti.program.names_read import unwrap_descriptor
from hubaoti.program.output_capturing import FLAGS
from hubaoti.program.reachable_code import find_functions

# Names, labels, and what is done while training; dtype and attention stand in the build.
_NAMES = {
    "_name_or_path", "_commit_hash", "name_or_path", "architectures", "auto_map",
    "transformers_version", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "problem_type", "label2id", "id2label", "dtype", "torch_dtype", "gradient_checkpointing",
    "initializer_range", "initializer_factor", "_attn_implementation_autoset",
    "attn_implementation", "generation_config", "warnings_issued",
}  # fmt: skip
# What comes out beside the answer. The tasks decide it themselves, so it counts only without one.
_OUTPUTS = {"use_cache", "return_dict", *FLAGS}
# What counts though it is read where models are made, not where they compute.
_ALWAYS = {"model_type", "tie_word_embeddings", "quantization_config", "per_layer_config"}
_DROPS = re.compile(r"drop|pdrop")
_LOSSES = re.compile(r"(\A|_)loss_(coef|coefficient|weight)\Z")


def identify_program(model: nn.Module, config: Any, task: str, steps: tuple[str, ...]) -> Program:
    """The program of a transformers model that does a task, followed by steps."""
    code = collect_code(model, collect_config_classes(config))
    plain = Normal(code, task).whole(config)
    digest = _add_patches_to_digest(_digest_code(code, model), model, code)
    return Program(config=plain, code=digest, task=task, steps=steps)  # type: ignore[arg-type]


def identify_module_program(module: nn.Module, task: str = "forward") -> Program:
    """The program of any module, as it stands: patched, fused or adapted.

    Its config is that of transformers or diffusers, where it has one, and always a digest of its
    structure: classes, attributes, shapes and dtypes, and code that no file tells of. What is
    trained does not count. Code without a file is known by its bytecode, which is one Python's.
    """
    config = getattr(module, "config", None)
    configs = {
        cls for part in module.modules() for cls in collect_config_classes(vars(part).get("config"))
    }
    code = collect_code(module, configs)
    normal = Normal(code, task)
    listing = Listing(module, normal.has_attribute, normal.config_of_part)
    structure = digest_canonical(listing.parts())
    plain = {"class": type(module).__qualname__, "structure": structure}
    whole = collect_code(module, configs, listing.modules)
    return Program(
        config=normal.whole(config) | plain,
        code=_add_patches_to_digest(whole.digest, module, whole),
        task=task,  # type: ignore[arg-type]
    )


def matches_program(model: nn.Module, program: Program, whole: bool) -> bool:
    """Whether a model that somebody made is known to compute a program; if not, it can be tried.

    Its config, normalized, must say so, and its code must be the code that was compiled. What comes
    out beside the answer counts only where a graph answers for the `whole` model.

    Raises:
        OtherProgram: its config says that it computes something else; each key with both values.
    """
    config = getattr(model, "config", None)
    if not (_is_transformers(config) or _is_diffusers(config)):
        return False
    # A call of a model that was compiled from its config says itself whether it wants a cache.
    by_call = set() if "structure" in program.config else {"use_cache"}
    left_out = {"class", "structure"} | (by_call if whole else _OUTPUTS)
    # Adapters read no config of the model; they were compiled with it, or stand over its layers.
    for parts in (list_own_parts(model), model.modules()):
        types = frozenset(map(type, parts))
        code = collect_code_of_types(types, frozenset(collect_config_classes(config)), frozenset())
        ours = Normal(code, program.task).whole(config)
        names = sorted((ours.keys() | program.config.keys()) - left_out)
        differ = [name for name in names if ours.get(name) != program.config.get(name)]
        if not differ:
            if "structure" in program.config or _digest_code(code, model) != program.code:
                return False
            listed = list_read_attributes(code, program.task)
            built = is_as_built(model, code, program.task, listed)  # loads what it first needs
            if find_patches(model, code):
                # A class that is patched may have made what is kept.
                changed_attributes.BUILT.clear()
                return False
            return built
    raise OtherProgram(
        f"{type(model).__name__} is not of the program that was compiled: "
        + "; ".join(
            f"{name} is {_format_value(ours, name)}, "
            f"the program's is {_format_value(program.config, name)}"
            for name in differ
        ),
        hint="attach an artifact of this model, or compile one",
    )


def list_read_attributes(code: Code, task: str) -> changed_attributes.AttributeListing:
    """A listing of the attributes that the code of a model reads."""
    normal = Normal(code, task)
    left_out = _NAMES | _OUTPUTS | {"vocab_size"}  # which the tables tell by themselves

    def counts(name: str) -> bool:
        private = name.startswith("_")  # libraries keep plans of loading and training there
        if name in left_out or (private and code.words is None):
            return False
        return code.reads(name) and name != "_gradient_checkpointing_func"

    return changed_attributes.AttributeListing(counts, normal.config_of_part)


def _format_value(config: Mapping[str, Any], name: str) -> str:
    """A value of a config in a few words."""
    return f"{config[name]!r:.80}" if name in config else "not there"


class Normal:
    """What of a config counts for a program, given the code that computes and the task."""

    def __init__(self, code: Code, task: str) -> None:
        self.code = code
        self.left_out = _NAMES if task == "forward" else _NAMES | _OUTPUTS
        self.other_names: dict[str, set[str]] = {"pad_token_id": {"padding_idx"}}

    def whole(self, config: Any) -> dict[str, Any]:
        """A config of transformers or diffusers; nothing of any other kind."""
        if not _is_transformers(config):
            return self.diffusers(config) if _is_diffusers(config) else {}
        for each in _walk_configs(config):
            for alias, name in each.attribute_map.items():
                self.other_names.setdefault(name, set()).add(alias)
        plain = self.normalize(config.to_dict())
        if self.code.reads("num_labels", "id2label"):
            plain["num_labels"] = config.num_labels
        return plain

    def normalize(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that count, in this config and in those within it."""
        return {
            key: self.plain(value)
            for key, value in config.items()
            if self.has(key, value) and (_is_config(value) or self.is_read(key))
        }

    def diffusers(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A diffusers config: what its class was made with, read or not."""
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        return {key: self.plain(value) for key, value in kept.items() if self.has(key, value)}

    def has(self, key: str, value: Any) -> bool:
        """Whether a key may count, by its name and value."""
        if value is None or key in self.left_out or _LOSSES.search(key):
            return False
        return not _is_probability(key, value) or key in self.code.left_of_one

    def is_read(self, key: str) -> bool:
        """Whether the code that computes reads a key, by any of its names."""
        return key in _ALWAYS | _OUTPUTS or self.code.reads(key, *self.other_names.get(key, ()))

    def plain(self, value: Any) -> Any:
        """A config value as canonical JSON can have it."""
        if _is_config(value):
            return self.normalize(value)
        if isinstance(value, Mapping):
            items = {str(key): item for key, item in value.items()}
            return {key: self.plain(item) for key, item in items.items() if item is not None}
        if isinstance(value, (list, tuple)):
            return [self.plain(item) for item in value]
        return value if _is_json(value) else str(value)

    def has_attribute(self, name: str, value: Any) -> bool:
        """Whether an attribute of a module may count.

        Token ids, and what is private, only where the code reads them: libraries keep plans of
        loading and sharding there. Empty ones count, for code may ask whether they are.
        """
        if name == "padding_idx":
            return self.is_read("pad_token_id")
        if name.startswith("_") or name.endswith(("token_id", "token_ids")):
            return self.is_read(name)
        return value is None or self.has(name, value)

    def config_of_part(self, value: Any) -> Any:
        """The config that a part of a module holds, normalized; not of anything else."""
        known = _is_transformers(value) or _is_diffusers(value)
        return self.whole(value) if known else NotImplemented


def _digest_code(code: Code, model: nn.Module) -> str:
    """The digest of a model's code, with that of its classes that no file tells of."""
    loose = sorted((cls for cls in code.classes if is_loose(cls)), key=lambda cls: cls.__qualname__)
    if not loose:
        return code.digest
    listing = Listing(model)
    return digest_canonical([code.digest, [listing.kind(cls) for cls in loose]])


def _add_patches_to_digest(digest: str, model: nn.Module, code: Code) -> str:
    """A digest of code with that of what was patched in this process; as it is where nothing was.

    What was put there is known by its code, and by the files that it is from.
    """
    found = find_patches(model, code)
    if not found:
        return digest
    listing = Listing(model, special=_name_python_module)
    listed = {name: _list_patch(listing, name, value) for name, value in sorted(found.items())}
    return digest_canonical([digest, listed, collect_code(nn.Module(), (), listing.modules).digest])


def _list_patch(listing: Listing, name: str, value: Any) -> list[Any]:
    """What was put in a place, as plain values."""
    entries = dict(dict.items(value)) if isinstance(value, dict) else unwrap_descriptor(value)
    try:
        codes = [listing.code(each.__code__, 1) for each in find_functions(value)]
        whole = [listing.value(entries), *codes]
        digest_canonical(whole)
        return whole
    except Exception as error:  # whatever an object does that somebody put there
        raise BadRequest(
            f"{name} was replaced in this process by a {type(value).__name__}, of which no key can "
            f"tell: {first_line(error)}",
            hint="compile where it is what its file says, or replace it by a function or class",
        ) from error


def _name_python_module(value: Any) -> Any:
    """A Python module, as a listing has it; not anything else."""
    return f"module {value.__name__}" if isinstance(value, ModuleType) else NotImplemented


def _is_transformers(config: Any) -> bool:
    """Whether a value is a config of transformers, or of code for it."""
    return callable(getattr(config, "to_dict", None)) and hasattr(config, "attribute_map")


def _is_diffusers(config: Any) -> bool:
    """Whether a value is a config of diffusers."""
    marks = {"_class_name", "_use_default_values"}
    return isinstance(config, Mapping) and not marks.isdisjoint(config)


def _is_config(value: Any) -> bool:
    """Whether a value of a config is itself a config, and no row of parameters."""
    return isinstance(value, Mapping) and "model_type" in value


def _walk_configs(config: Any) -> Iterator[Any]:
    """A transformers config and those within it."""
    if _is_transformers(config):
        yield config
        for value in vars(config).values():
            yield from _walk_configs(value)


def collect_config_classes(config: Any) -> set[type]:
    """The classes of a config and of those within it."""
    return {type(each) for each in _walk_configs(config)}


def _is_probability(key: str, value: Any) -> bool:
    """A rate of dropout: a number, or one a layer, below a name that says so; never a choice."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_probability(key, item) for item in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 1 and _DROPS.search(key) is not None


def _is_json(value: Any) -> bool:
    """Whether canonical JSON has this value: a text, a truth, or a number that a double holds."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and abs(value) <= SAFE)
