"""A model from its config alone: no weight is read, parameters are memory that nobody touched.

The model's own `forward` is replaced, on the instance, by the one of its task: token ids and mask
in, a tuple of plain tensors out. So the graph's constants have the names that the model gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from hubaoti.compiler.program import program_of
from hubaoti.compiler.request import DTYPES, Range
from hubaoti.errors import (
    BadRequest,
    CompileFailed,
    MissingConstant,
    ModelNotFound,
    UnknownTask,
    first_line,
)
from hubaoti.manifest import Program
from hubaoti.model_files import POOLING, read_json, sentence_steps

LARGEST = 1 << 20  # tokenizers write 1e30 where a model has no limit


@dataclass(frozen=True, slots=True)
class Source:
    """A model ready to export, and what must be known of it."""

    model: nn.Module
    config: Any
    program: Program
    dtype: str
    attention: str
    output: str
    vocabulary: int
    positions: int | None  # of a learned table; None where any length has a position
    default_dims: dict[str, Range]


def load(
    folder: Path, task: str | None, dtype: str | None, device: torch.device, weights: bool = False
) -> Source:
    """Build the model of a folder for a task; `weights=True` is eager's way, for comparing.

    Raises:
        ModelNotFound: the folder has no config, or one that transformers does not know.
        UnknownTask: the model cannot do the task, or takes no text.
        MissingConstant: eager's weights are not there.
    """
    config = read_config(folder)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise UnknownTask(f"{folder.name} takes no text", hint="a model of texts is needed")
    task = task or task_of(folder, config)
    chosen = dtype or dtype_in(config)
    steps = sentence_steps(folder) if task == "embed" else ()
    model, attention = build(folder, config, task, getattr(torch, chosen), weights)
    model = model.eval().to(device)
    forward, output = FORWARDS[task]
    model.forward = forward(model, steps)
    positions = learned_positions(model)
    return Source(
        model=model,
        config=config,
        program=program_of(model, config, task, steps),
        dtype=chosen,
        attention=attention,
        output=output,
        vocabulary=vocabulary,
        positions=positions,
        default_dims={"batch": Range(1, 32), "seq": Range(2, longest(folder, config, positions))},
    )


def read_config(folder: Path) -> Any:
    """The model's config.

    Raises:
        ModelNotFound: there is none, or transformers does not know its kind.
    """
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} has no config.json", hint="give a Hub id or the folder of a model"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as why:  # of many kinds, as a value is of the wrong type or size
        raise ModelNotFound(
            f"transformers cannot read the config of {folder}: {first_line(why)}",
            hint="models that bring their own code, and kinds newer than this transformers, "
            "cannot be compiled from their config",
        ) from why


def task_of(folder: Path, config: Any) -> str:
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
        hint="say it with --task embed, classify or logits",
    )


def dtype_in(config: Any) -> str:
    """The dtype that a config names, float32 where it names none.

    Raises:
        BadRequest: it names one that graphs are not compiled for.
    """
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadRequest(
            f"the model's dtype is {dtype}", hint=f"say --dtype, one of: {', '.join(DTYPES)}"
        )
    return dtype


def build(
    folder: Path, config: Any, task: str, dtype: torch.dtype, weights: bool
) -> tuple[nn.Module, str]:
    """The model of a task and its attention: sdpa where the model has it, else eager."""
    for attention in ("sdpa", "eager"):
        try:
            with quiet():
                return make(folder, config, task, dtype, attention, weights), attention
        except ValueError as why:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(why):
                continue
            raise UnknownTask(
                f"{folder.name} cannot do {task}: {first_line(why)}", hint="try another --task"
            ) from why
        except OSError as why:
            raise MissingConstant(
                f"transformers cannot load the weights of {folder}: {first_line(why)}",
                hint="--model takes a folder or a Hub id with the weights as safetensors",
            ) from why
        except Exception as why:  # whatever a model's constructor makes of an odd config
            raise CompileFailed(
                f"source: {type(why).__name__}: {first_line(why)}",
                hint="the config contradicts itself, or is of another transformers",
            ) from why
    raise CompileFailed(f"{folder.name} has no attention that can be compiled")


def make(
    folder: Path, config: Any, task: str, dtype: torch.dtype, attention: str, weights: bool
) -> nn.Module:
    """Build with weights, or without: buffers for real, parameters as untouched memory."""
    auto = auto_class(task, config)
    config.use_cache = False  # a cache would be one more output
    if weights:
        return auto.from_pretrained(folder, dtype=dtype, attn_implementation=attention)  # type: ignore[no-any-return]
    with no_init_weights():
        model: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # type: ignore[operator]  # which was skipped, too
    return model


def auto_class(task: str, config: Any) -> Any:
    """The transformers class that makes the model of a task."""
    if task == "embed":
        return transformers.AutoModel
    if task == "classify":
        return transformers.AutoModelForSequenceClassification
    if "ForMaskedLM" in " ".join(config.architectures or ()):
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM


@contextmanager
def no_init_weights() -> Iterator[None]:
    """Skip filling parameters with random numbers.

    Private, checked on transformers 5.17 to 5.22: `transformers.initialization.no_init_weights`.
    Where it is gone, models are built the public way, which only takes longer.
    """
    try:
        from transformers.initialization import no_init_weights as private
    except ImportError:
        yield
        return
    with private():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and advice out of our output; its errors are ours to tell."""
    log: Any = transformers.utils.logging  # its functions have no types
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def learned_positions(model: nn.Module) -> int | None:
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


def longest(folder: Path, config: Any, positions: int | None) -> int:
    """The largest default for `seq`: 512, or less where the model or its tokenizer ends before."""
    limits = [512, positions, getattr(config.get_text_config(), "max_position_embeddings", None)]
    limits.append(read_json(folder / "tokenizer_config.json").get("model_max_length"))
    return min(int(n) for n in limits if isinstance(n, (int, float)) and 2 <= n < LARGEST)


def pool(mode: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector a row from (batch, seq, width) and a (batch, seq) mask.

    As the Pooling of sentence-transformers 6 computes it: padding may stand on either side, and
    half types are summed in float32.
    """
    first = mask.argmax(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if mode == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)
    if mode in {"cls", "lasttoken"}:
        at = first if mode == "cls" else (mask * places).argmax(1)
        return hidden.take_along_dim(at.view(-1, 1, 1), 1).squeeze(1)
    if mode == "weightedmean":
        mask = mask * (places + 1 - first.unsqueeze(1))
    precise = torch.promote_types(hidden.dtype, torch.float32)
    weights = mask.unsqueeze(-1).to(precise)
    count = weights.sum(1).clamp(min=1e-9)
    if mode == "mean_sqrt_len_tokens":
        count = count.sqrt()
    return ((hidden * weights).sum(1) / count).to(hidden.dtype)


Forward = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def embedder(model: nn.Module, steps: tuple[str, ...]) -> Forward:
    """`forward` of embed: one vector a row."""
    inner = model.forward

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = [pool(mode, hidden, attention_mask) for mode in steps if mode in POOLING]
        vectors = torch.cat(pooled, 1) if len(pooled) > 1 else pooled[0]
        return (functional.normalize(vectors, dim=1) if "normalize" in steps else vectors,)

    return forward


def scorer(model: nn.Module, steps: tuple[str, ...]) -> Forward:
    """`forward` of classify and logits: the model's own logits."""
    inner = model.forward

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (inner(input_ids=input_ids, attention_mask=attention_mask).logits,)

    return forward


FORWARDS = {
    "embed": (embedder, "embedding"),
    "classify": (scorer, "logits"),
    "logits": (scorer, "logits"),
}
