"""The program of a model: what it computes, whatever its weights.

Two fine-tunes have one program, so the config is normalized: what only names, labels, trains or
versions a model is left out. The code that computes is taken in by its digest.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from hubaoti.manifest import Program

# Keys that change no number of a forward pass in eval mode.
NAMES = {
    "_name_or_path",
    "_commit_hash",
    "name_or_path",
    "architectures",
    "auto_map",
    "model_name",
    "transformers_version",
    "finetuning_task",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "problem_type",
    "label2id",
    "id2label",
    "dtype",
    "torch_dtype",
    "gradient_checkpointing",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
    "initializer_range",
    "initializer_factor",
    "_attn_implementation_autoset",
    "attn_implementation",
}
# Packages that are no part of a model's own code; torch's version stands in the target.
OUTSIDE = {"torch", "builtins", "typing", "hubaoti"}
GENERAL = {"modeling_utils", "peft", "hub", "distributed", "distributed_mixin", "generation"}
TRAINING = re.compile(r"drop|_loss|_token_ids?\Z")


def program_of(model: nn.Module, config: Any, task: str, steps: tuple[str, ...]) -> Program:
    """The program of a transformers model that does a task, followed by steps."""
    classes = classes_of(model)
    plain = normalized(config.to_dict())
    if task == "classify":
        plain["num_labels"] = config.num_labels
    if reads_pad_token(classes):
        plain["pad_token_id"] = getattr(config, "pad_token_id", None)
    code = digest_of_sources(source_files(classes))
    return Program(config=plain, code=code, task=task, steps=steps)  # type: ignore[arg-type]


def normalized(config: dict[str, Any]) -> dict[str, Any]:
    """The config without names, labels, token ids, versions and knobs of training, at any depth."""
    kept = {}
    for key, value in config.items():
        if key in NAMES or TRAINING.search(key) or value is None:
            continue
        kept[key] = plain_value(value)
    return kept


def plain_value(value: Any) -> Any:
    """A config value as canonical JSON can have it."""
    if isinstance(value, dict):
        return normalized({str(key): item for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def classes_of(model: nn.Module) -> set[type]:
    """The classes that compute a model: its modules' and their bases, torch's left out."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return {cls for cls in classes if cls.__module__.split(".")[0] not in OUTSIDE and computes(cls)}


def computes(cls: type) -> bool:
    """Not what every transformers model inherits: loading, saving, generating."""
    return not {*cls.__module__.split(".")} & GENERAL


def source_files(classes: set[type]) -> list[Path]:
    """The Python files that define classes."""
    sources = {inspect.getsourcefile(sys.modules[cls.__module__]) for cls in classes}
    return sorted(Path(source) for source in sources if source)


def digest_of_sources(files: list[Path]) -> str:
    """One sha256 over the files' names and bytes."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def reads_pad_token(classes: set[type]) -> bool:
    """Whether a model computes with the padding id (positions of RoBERTa, last token of GPT-2).

    An `nn.Embedding` only keeps that row from being trained, and its keeping is often named first.
    The classes are read, not their files, in which other models' heads stand, too.
    """
    text = "".join(inspect.getsource(cls) for cls in classes)
    text = re.sub(r"nn\.Embedding\([^()]*\)|self\.padding_idx = config\.pad_token_id", "", text)
    return re.search(r"pad_token_id|self\.padding_idx", text) is not None
