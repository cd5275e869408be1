"""A model from its config alone: no weight is read.

For regions, parameters have no memory at all; for a whole graph they are memory that nobody
touched. Buffers are made for real, since the model's own code computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hubaoti.artifact.schema import Program
from hubaoti.compiler import tasks
from hubaoti.compiler.capture import Call
from hubaoti.compiler.fake_run import init_empty_parameters
from hubaoti.compiler.infer_dims import Series
from hubaoti.compiler.request import DTYPES, CompileRequest, Range
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import (
    BadRequest,
    CompileFailed,
    HubaotiError,
    MissingConstant,
    ModelNotFound,
    UnknownTask,
    first_line,
)
from hubaoti.program.identity import identify_program
from hubaoti.program.model_files import read_json, read_sentence_steps
from hubaoti.program.silence import silence_transformers

NATIVE = "native"  # attention that is a module's own, whatever its parts are told
_EXPERTS = "batched_mm"  # transformers' name for experts as products of batches


@dataclass(frozen=True, slots=True)
class Source:
    """A model ready to export, and what must be known of it."""

    model: nn.Module
    program: Program
    regions: str  # none, auto or a path
    dtype: str
    attention: str
    face: CallSignature
    default_dims: dict[str, Range]
    vocabulary: int = 0
    positions: int | None = None  # of a learned table; None where any length has a position
    outputs: tuple[str, ...] = ()  # names of what a whole graph answers, where the task has them
    config: Any = None
    looks: dict[str, Series] = field(default_factory=dict)  # sizes at which it is looked at
    recorded: dict[str, Series] = field(default_factory=dict)  # those of the user's calls
    stated: frozenset[str] = frozenset()  # dims that the user named or bounded
    calls: tuple[Call, ...] = ()  # those to look at it with, where they have no face
    live: bool = False  # the user's own module, whose weights are not ours to change
    layout: str | None = None  # of loaders that know no manifest
    unpadded: bool = False  # no call pads, so that masks say nothing, and are left out inside


def load_source(
    folder: Path, request: CompileRequest, device: torch.device, weights: bool = False
) -> Source:
    """Build the model of a folder for a task; `weights=True` is eager's way, for comparing.

    Raises:
        ModelNotFound: the folder has no config, or one that transformers does not know.
        UnknownTask: the model cannot do the task, or takes no text.
        MissingConstant: eager's weights are not there.
    """
    config = _read_config(folder, request.trust_remote_code)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 0
    task = request.task or ("forward" if request.layout else tasks.infer_task(folder, config))
    _refuse_quantized(folder, config)
    if not vocabulary and task != "forward":
        raise UnknownTask(f"{folder.name} takes no text", hint="compile it with --task forward")
    if task == "generate":
        tasks.refuse_two_caches(folder.name, config)
    regions = request.regions or ("none" if task in tasks.WHOLE_TASKS else "auto")
    chosen = request.dtype or _read_config_dtype(config)
    made = _Making(folder, config, task, getattr(torch, chosen), weights, regions != "none")
    model, attention = _build_model(made, request.trust_remote_code)
    steps = read_sentence_steps(folder) if task == "embed" else ()
    positions = tasks.count_learned_positions(tasks.find_text_part(model, config, task))
    face = tasks.make_own_signature(model, config, task, vocabulary)
    if request.layout:
        face = tasks.make_user_signature(face, model, config)
    outputs: tuple[str, ...] = ()
    if regions == "none":
        model = model.to(device)
        if task in tasks.WHOLE_TASKS:
            face = tasks.make_whole_signature(vocabulary)
            outputs = (tasks.answer_task(model, task, steps),)
    return Source(
        model=model,
        program=identify_program(model, config, task, steps),
        regions=regions,
        dtype=chosen,
        attention=attention,
        face=face,
        default_dims=tasks.choose_default_dims(face, folder, config, positions, task),
        vocabulary=vocabulary,
        positions=positions,
        outputs=outputs,
        config=config,
        looks=tasks.LOOKS,
        stated=frozenset(request.dims),
        layout=request.layout,
        unpadded=request.layout is not None,
    )


def _read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's config.

    Raises:
        ModelNotFound: there is none, or transformers does not know its kind.
        BadRequest: the model brings its own code, which nobody said to trust.
    """
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} has no config.json", hint="give a Hub id or the folder of a model"
        )
    if not trust_remote_code and _has_remote_code(read_json(folder / "config.json")):
        raise BadRequest(
            f"{folder.name} brings its own code, which would run here",
            hint="read it; if you trust it: --trust-remote-code",
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, as a value is of the wrong type or size
        raise ModelNotFound(
            f"transformers cannot read the config of {folder}: {first_line(error)}",
            hint="its kind may be newer than this transformers: pip install -U transformers",
        ) from error


def _has_remote_code(config: dict[str, Any]) -> bool:
    """Whether a config names classes of the model's own, and not only some that transformers has by
    now, which it takes itself where nobody trusts the others."""
    own = config.get("auto_map") or {}
    if not isinstance(own, dict):
        return True
    made = [name for auto, name in own.items() if auto.startswith(("AutoConfig", "AutoModel"))]
    return not all(hasattr(transformers, str(name).rpartition(".")[2]) for name in made)


def _refuse_quantized(folder: Path, config: Any) -> None:
    """Refuse a checkpoint that was quantized before: from its config alone transformers would make
    the plain model, whose weights that checkpoint does not have.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    plain = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = plain.get("quant_method", "an unknown method")
    raise CompileFailed(
        f"source: {folder.name} is quantized with {getattr(method, 'value', method)}, whose "
        "layers are built from ops of other packages, while its checkpoint is loaded",
        hint="compile the model it was made from, with --quantize int4wo or int8wo",
    )


def _read_config_dtype(config: Any) -> str:
    """The dtype that a config names, float32 where it names none."""
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadRequest(
            f"the model's dtype is {dtype}", hint=f"say --dtype, one of: {', '.join(DTYPES)}"
        )
    return dtype


@dataclass(frozen=True, slots=True)
class _Making:
    """What a model is made from, and with what of its memory."""

    folder: Path
    config: Any
    task: str
    dtype: torch.dtype
    weights: bool
    bare: bool


def _build_model(making: _Making, trust: bool) -> tuple[nn.Module, str]:
    """The model of a task and its attention: sdpa where the model has it, else eager."""
    for attention in ("sdpa", "eager"):
        try:
            with silence_transformers():
                return _instantiate_model(making, attention, trust).eval(), attention
        except HubaotiError:
            raise
        except ValueError as error:
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            raise _describe_failure(making, error) from error
        except (OSError, SafetensorError) as error:
            raise MissingConstant(
                f"transformers cannot load the weights of {making.folder}: {first_line(error)}",
                hint="--model takes a folder or a Hub id with the weights as safetensors",
            ) from error
        except Exception as error:  # whatever a model's constructor makes of an odd config
            raise _describe_failure(making, error) from error
    raise CompileFailed(f"{making.folder.name} has no attention that can be compiled")


def _describe_failure(making: _Making, error: Exception) -> HubaotiError:
    """The refusal of a model that transformers does not make, as where no class does the task."""
    if not isinstance(error, ValueError) or "Unrecognized configuration class" not in str(error):
        return CompileFailed(
            f"source: {type(error).__name__}: {first_line(error)}",
            hint="install the package that it names"
            if isinstance(error, ImportError)
            else "the config contradicts itself, or is of another transformers",
        )
    return UnknownTask(
        f"{making.folder.name} cannot do {making.task}: transformers has no class that does, for "
        f"models of {getattr(making.config, 'model_type', 'of this kind')}",
        hint="compile it with --task forward"
        if making.task != "forward"
        else "capture its calls, and compile those: hubaoti.capture(model)",
    )


def _instantiate_model(making: _Making, attention: str, trust: bool) -> nn.Module:
    """Build with weights, or without: buffers for real, parameters untouched or not there."""
    auto = _find_declared_class(making) or tasks.choose_auto_class(making.task, making.config)
    if hasattr(making.config, "use_cache"):  # to one that has none, layers would be given one
        making.config.use_cache = making.task == "generate"  # a cache would be one more output
    options: dict[str, Any] = {"dtype": making.dtype, "attn_implementation": attention}
    options["trust_remote_code"] = trust
    if making.weights:
        model, info = auto.from_pretrained(making.folder, output_loading_info=True, **options)
        _require_all_weights(making, info["missing_keys"])
        return model  # type: ignore[no-any-return]
    with _skip_init_weights(), init_empty_parameters() if making.bare else nullcontext():
        model = _construct_from_config(auto, making.config, **options)
    model.tie_weights()  # type: ignore[operator]  # which was skipped, too
    return _set_traceable_experts(model, making.dtype)


def _require_all_weights(making: _Making, names: Iterable[str]) -> None:
    """Refuse a model of which a part has new, random weights: it answers, and says nothing.

    Of one that embeds this may be a pooler, which no vector is made of.
    """
    spared = "pooler" if making.task == "embed" else None
    missing = sorted(name for name in names if spared not in name.split("."))
    if missing:
        raise MissingConstant(
            f"the checkpoint of {making.folder.name} has no {', '.join(missing[:3])}"
            + (f", nor {len(missing) - 3} more tensors" if missing[3:] else "")
            + f", which a model to {making.task} has: they would be random",
            hint=f"take a checkpoint that was trained for {making.task}, or another task",
        )


def _find_declared_class(making: _Making) -> Any:
    """The class that the files name, for forward, whose calls are those of the user's own model.

    None where they name none that transformers has for this config.
    """
    if making.task != "forward":
        return None
    for name in making.config.architectures or ():
        kind = getattr(transformers, name, None)
        if getattr(kind, "config_class", None) is type(making.config):
            return kind
    return None


def _construct_from_config(
    kind: Any, config: Any, trust_remote_code: bool, **options: Any
) -> nn.Module:
    """A model of an auto class or of one class.

    Private, checked on transformers 5.22: `_from_config`, which the auto classes call.
    """
    if hasattr(kind, "from_config"):
        options["trust_remote_code"] = trust_remote_code
        return kind.from_config(config, **options)  # type: ignore[no-any-return]
    return kind._from_config(config, **options)  # type: ignore[no-any-return]


def _set_traceable_experts(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Experts as products of batches where torch cannot compile grouped ones."""
    settable = getattr(model, "_can_set_experts_implementation", None)
    if not _can_group_experts(dtype) and settable is not None and settable():
        model.set_experts_implementation(_EXPERTS)  # type: ignore[operator]
    return model


def _can_group_experts(dtype: torch.dtype) -> bool:
    """Whether torch compiles grouped products: of bfloat16, since they have an entry of their own
    for compiled code, which those of torch 2.11 have not.

    transformers' own fallback for others is an op of its own, which no graph could bring along
    (integrations/moe.py, 5.22).
    """
    from torchgen.aoti.fallback_ops import inductor_fallback_ops  # type: ignore[import-untyped]

    return dtype == torch.bfloat16 and "aten._grouped_mm.default" in inductor_fallback_ops


@contextmanager
def use_traceable_experts(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a model have experts that can be traced, as products of batches, for a while.

    For somebody's own module; one from a config is made so.
    """
    if _can_group_experts(dtype):
        yield
        return
    with _set_in_configs(model, "_experts_implementation", _EXPERTS):
        yield


def use_attention(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Let a model use another attention for a while; its blocks ask their configs."""
    if name == NATIVE:
        return nullcontext()
    return _set_in_configs(model, "_attn_implementation", name)


@contextmanager
def _set_in_configs(model: nn.Module, attribute: str, value: str) -> Iterator[None]:
    """Have every config of a model that says something of an attribute say this, for a while."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c}
    choices = ((each, getattr(each, attribute, None)) for each in configs.values())
    kept = [(config, before) for config, before in choices if before is not None]
    for config, _ in kept:
        setattr(config, attribute, value)
    try:
        yield
    finally:
        for config, before in kept:
            setattr(config, attribute, before)


def _skip_init_weights() -> AbstractContextManager[None]:
    """Skip filling parameters with random numbers.

    Private, checked on transformers 5.15 to 5.24: `transformers.initialization.no_init_weights`.
    Where it is gone, models are built the public way, which only takes longer.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()
