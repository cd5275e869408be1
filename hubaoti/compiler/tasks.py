"""Tasks: which class makes the model, what it is called with, and what a whole graph answers.

For a whole graph the model's own `forward` is replaced, on the instance, by its task's: token ids
and mask in, a tuple of plain tensors out. So the graph's constants have the model's own names.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from hubaoti.artifact.schema import Input
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import UnknownTask
from hubaoti.program.model_files import POOLING, choose_max_length
from hubaoti.program.pooling import pool
from hubaoti.runtime.call_template import choose_cache_word

# Sizes at which a model is looked at. No dim's are another's plus a number or times one, nor the
# sum of two others', so whatever changes with them says which it follows.
LOOKS: dict[str, tuple[int, ...]] = {
    "batch": (2, 3, 5),
    "seq": (6, 11, 13),
    "filled": (17, 23, 37),
    "target": (7, 9, 19),
}
WHOLE_TASKS = {"embed", "classify", "logits"}  # their graph answers texts without transformers


def infer_task(folder: Path, config: Any) -> str:
    """What a model is for, as its files say.

    Raises:
        UnknownTask: they do not say.
    """
    if (folder / "modules.json").is_file():
        return "embed"
    names = " ".join(config.architectures or ())
    if "ForSequenceClassification" in names:
        return "classify"
    if "ForCausalLM" in names or "ForMaskedLM" in names or "LMHead" in names:
        return "logits"
    if names.endswith("Model"):
        return "embed"
    raise UnknownTask(
        f"{folder.name} does not say what it is for (architectures: {names or 'none'})",
        hint="say it with --task embed, classify, logits, generate or forward",
    )


def choose_auto_class(task: str, config: Any) -> Any:
    """The transformers class that makes the model of a task."""
    if task in {"embed", "forward"}:
        return transformers.AutoModelForTextEncoding if _is_half(config) else transformers.AutoModel
    if task == "classify":
        return transformers.AutoModelForSequenceClassification
    if task == "logits" and "ForMaskedLM" in " ".join(config.architectures or ()):
        return transformers.AutoModelForMaskedLM
    if task == "generate" and _is_multimodal(config):
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def _is_multimodal(config: Any) -> bool:
    """Whether the files are those of a model whose text decoder is but a part of it."""
    whole: Any = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    alone = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = [*(config.architectures or ())]
    return whole is not None and (alone is None or whole.__name__ in named)


def refuse_two_caches(name: str, config: Any) -> None:
    """Refuse to generate with a decoder that looks at an encoder, and keeps what it saw of it.

    Raises:
        UnknownTask: the model's files are of one.
    """
    if config.is_encoder_decoder and "ForCausalLM" not in " ".join(config.architectures or ()):
        raise UnknownTask(
            f"{name} has a decoder that keeps what it saw of its encoder in a cache of its own, "
            "which graphs do not take",
            hint="compile it with --task forward: its encoder is served, inside of generate, too",
        )


def _is_half(config: Any) -> bool:
    """Whether the files are those of an encoder whose whole model has a decoder, or eyes, too."""
    half: Any = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    whole = transformers.MODEL_MAPPING.get(type(config), None)
    named = [*(config.architectures or ())]
    return half is not None and half is not whole and named == [half.__name__]


def make_whole_signature(vocabulary: int) -> CallSignature:
    """How the `forward` of embed, classify and logits is called."""
    ids = _make_ids_input("input_ids", "seq", vocabulary)
    return _make_keyword_signature([ids, _make_mask_input("attention_mask", "seq")], {})


def make_own_signature(model: nn.Module, config: Any, task: str, vocabulary: int) -> CallSignature:
    """How a model's own `forward` is called: with whatever it takes of what models take.

    Raises:
        UnknownTask: it is to generate, and has no KV cache.
    """
    taken = inspect.signature(model.forward).parameters
    if task == "generate":
        _require_cache(type(model).__name__, {*taken})
    # A mask beside images alone is none of tokens.
    words = vocabulary if "input_ids" in taken else 0
    possible = _list_possible_inputs(config, task, words)
    literals: dict[str, Any] = {"use_cache": task == "generate"} if "use_cache" in taken else {}
    if task == "generate":
        literals[choose_cache_word(taken)] = {"cache": True}
    return _make_keyword_signature([each for each in possible if each.name in taken], literals)


def make_user_signature(face: CallSignature, model: nn.Module, config: Any) -> CallSignature:
    """The face of a call as a model's user makes it, with what its tokenizer or processor gives."""
    taken = inspect.signature(model.forward).parameters
    inputs = [entry for entry in face.inputs if entry.name != "position_ids"]
    kinds = getattr(config, "type_vocab_size", None) or 0
    if "token_type_ids" in taken and kinds > 1:
        inputs.insert(1, _make_ids_input("token_type_ids", "seq", kinds))
    is_encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    literals = {"use_cache": False} if "use_cache" in taken and not is_encoder else {}
    return _make_keyword_signature(inputs, literals)


def _require_cache(name: str, taken: set[str]) -> None:
    """Refuse to generate with a model that takes no KV cache, by the arguments that it takes."""
    if taken & {"past_key_values", "cache"}:
        return
    kept = "recurrent states" if taken & {"cache_params", "state"} else "nothing"
    raise UnknownTask(
        f"{name} keeps {kept} between tokens, and no KV cache: graphs carry nothing else",
        hint="generate with it as it is",
    )


def _make_keyword_signature(inputs: Sequence[Input], literals: dict[str, Any]) -> CallSignature:
    """A signature whose inputs and literals are keyword arguments, by their names."""
    kwargs = {entry.name: {"tensor": index} for index, entry in enumerate(inputs)}
    return CallSignature({"args": [], "kwargs": kwargs | literals}, tuple(inputs))


def _list_possible_inputs(config: Any, task: str, vocabulary: int) -> list[Input]:
    """What models of transformers take, with sizes as a config gives them."""
    length = "filled" if task == "generate" else "seq"
    inputs = []
    if vocabulary:
        inputs += [
            _make_ids_input("input_ids", "seq", vocabulary),
            _make_mask_input("attention_mask", length),
            Input(name="position_ids", dtype="int64", shape=("batch", "seq"), values="position"),
        ]
    if task == "generate":  # images and sounds are tokens before the decoder sees them
        return inputs
    if config.is_encoder_decoder:
        inputs.append(_make_ids_input("decoder_input_ids", "target", vocabulary))
    vision = getattr(config, "vision_config", None) or config
    if hasattr(vision, "image_size"):
        size = vision.image_size
        sides = (size, size) if isinstance(size, int) else (size[0], size[1])  # height and width
        channels = getattr(vision, "num_channels", 3)
        inputs.append(_make_real_input("pixel_values", (channels, *sides)))
    if hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 512)
        inputs.append(_make_real_input("input_features", (config.num_mel_bins, frames)))
        inputs = [entry for entry in inputs if entry.name not in {"input_ids", "attention_mask"}]
    return inputs


def _make_real_input(name: str, sizes: tuple[int, ...]) -> Input:
    """Numbers of any size, as of images and sounds."""
    return Input(name=name, dtype="float32", shape=("batch", *sizes), values="real")


def read_config_maximum(config: Any, name: str, default: int) -> int:
    """A number of a config; of one that has a number for each of its stages, the largest."""
    value = getattr(config, name, None)
    each = value if isinstance(value, (list, tuple)) else [value]
    return max((number for number in each if isinstance(number, int)), default=default)


def _make_ids_input(name: str, length: str, vocabulary: int) -> Input:
    """Token ids, below the size of the vocabulary."""
    return Input(name=name, dtype="int64", shape=("batch", length), values=f"ids<{vocabulary}")


def _make_mask_input(name: str, length: str) -> Input:
    """One for each token that is there, zero for padding."""
    return Input(name=name, dtype="int64", shape=("batch", length), values="mask")


def choose_default_dims(
    face: CallSignature, folder: Path, config: Any, positions: int | None, task: str
) -> dict[str, Range]:
    """The bounds of a model's dims where nothing else is asked."""
    if task != "generate":
        most = choose_max_length(folder, config, positions, 512, task)
        return {dim: Range(1, 32) if dim == "batch" else Range(2, most) for dim in face.dims}
    most = choose_max_length(folder, config, positions, 4096, task)
    cache = choose_max_length(folder, config, positions, 32768, task)
    return {"batch": Range(1, 32), "seq": Range(1, most), "cache": Range(min(16, cache), cache)}


def find_text_part(model: nn.Module, config: Any, task: str) -> nn.Module:
    """What of a model reads tokens where it is to generate: the rest has positions of its own."""
    is_whole = task != "generate" or not _is_multimodal(config)
    return model if is_whole else model.get_decoder()  # type: ignore[operator]


def count_learned_positions(model: nn.Module) -> int | None:
    """How many positions a model's own table has; None where it has no such table.

    RoBERTa's begin after the padding id.
    """
    sizes = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in {"position_embeddings", "embed_positions", "wpe"}
    ]
    return min(sizes, default=None)


def answer_task(model: nn.Module, task: str, steps: tuple[str, ...]) -> str:
    """Let a model answer its task, from now on; returns what the answer is called.

    To embed that is one vector a row, to classify and for logits it is the model's own logits.
    """
    inner = model.forward

    def embed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = [pool(mode, hidden, attention_mask) for mode in steps if mode in POOLING]
        vectors = torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]
        return (functional.normalize(vectors, dim=1) if "normalize" in steps else vectors,)

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (inner(input_ids=input_ids, attention_mask=attention_mask).logits,)

    model.forward = embed if task == "embed" else score
    return "embedding" if task == "embed" else "logits"
