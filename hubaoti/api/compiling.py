"""The verbs capture, compile and explain, as their users call them, for this host or for GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from hubaoti.api.building import Explanation, Means, build_missing, explain_jobs
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler.request import CompileRequest, RangeLike, Shape, parse_capabilities
from hubaoti.errors import BadRequest
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.compiler.capture import Call, Calls


def capture(
    module: nn.Module, n: int | None = None, *, run: bool = True
) -> AbstractContextManager[Calls]:
    """Record the calls that `module` receives inside the block, whoever makes them.

    All of them, or the first `n`. With `run=False` the module is not run, its calls answer None,
    and the block is left, without an error, as soon as `n` of them (one, by default) have come.

    Raises:
        BadRequest: `n` is less than one; what called the module cannot go on without its answer.
    """
    require_flags(run=run)
    require("capture", "compile")
    from hubaoti.compiler import capture

    return capture.record_calls(module, n, run=run)


class CompileOptions(TypedDict, total=False):
    """What `compile` takes of what is built, whatever it is built for; its docstring says more."""

    calls: Calls | Sequence[Call] | Sequence[Calls] | None
    shapes: Mapping[str, Shape] | None
    task: str | None
    dims: Mapping[str, RangeLike] | Iterable[str]
    buckets: Iterable[Mapping[str, RangeLike] | str]
    regions: str | None
    dtype: str | None
    quantize: str | None
    attention: str | Iterable[str] | None
    kernel: str | None
    mode: str
    inductor: Mapping[str, Any] | Iterable[str]
    level: str | None
    layout: str | None
    revision: str | None
    trust_remote_code: bool


def compile(  # noqa: PLR0913 - a face of keywords
    model: str | Path | nn.Module,
    output: str | Path = "bundle",
    *,
    calls: Calls | Sequence[Call] | Sequence[Calls] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    task: str | None = None,
    dims: Mapping[str, RangeLike] | Iterable[str] = (),
    buckets: Iterable[Mapping[str, RangeLike] | str] = (),
    regions: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    attention: str | Iterable[str] | None = None,
    kernel: str | None = None,
    mode: str = "default",
    inductor: Mapping[str, Any] | Iterable[str] = (),
    level: str | None = None,
    device: str | None = None,
    layout: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    jobs: int | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Bundle:
    """Compile a model into the bundle `output`; what is built already is found and not built again.

    Args:
        model: a Hub id or a folder, of which no weight is read, or a module with its `calls`.
        output: the folder of the bundle.
        calls: of a module: what `hubaoti.capture` recorded; or several such of one structure, each
            with a graph of its own.
        shapes: of a module: names for the sizes of its inputs, as
            `{"hidden_states": ("batch", "seq", None)}`.
        task: embed, classify, logits, generate or forward; by default as the model's files say.
        dims: bounds, as `{"batch": (1, 32)}` or `["batch=1:32"]`; with a step, `(8, 512, 8)`.
        buckets: dims that have a graph of their own, as `[{"seq": (1, 1)}, {"seq": (2, 4096)}]`;
            the first that holds a call serves it.
        regions: auto (the repeated blocks), none (the whole model) or a module's path; by default
            none where the graph alone answers texts (embed, classify, logits), else auto.
        dtype: float32, bfloat16 or float16; by default the config's.
        quantize: int8wo, int4wo or float8dq, through torchao.
        attention: sdpa or fa3 (FlashAttention-3: sm90, bfloat16); by default the model's own.
        kernel: the repo of fa3's kernel, `owner/name[@version]`, as it is now; what is found built
            already keeps its own. By default it is kernels-community/flash-attn3.
        mode: default, max-autotune or reduce-overhead, as `torch.compile` has them.
        inductor: options of torch.inductor, as `{"max_autotune": True}` or `["max_autotune=true"]`.
        level: the CPU level of the host code as archspec names it; x86_64_v3 by default.
        device: cpu, cuda or cuda:0; by default where a module is, and the CPU for a model's name.
        layout: zerogpu, for loaders that know no manifest: calls and answers are the module's own,
            and what its `state_dict` has not is inside.
        revision: of the model: a branch, tag or commit.
        trust_remote_code: whether the code that the model brings may run.
        force: build what is built already.
        jobs: graphs compiled at a time; by default as many as memory and cores allow.
        settings: where the mirror and the Hub are; by default as the environment says.
        progress: called with the name of each step as it starts.

    Raises:
        HubaotiError: what failed and what to do; no half-written bundle is left.
    """
    options: CompileOptions = {
        "calls": calls,
        "shapes": shapes,
        "task": task,
        "dims": dims,
        "buckets": buckets,
        "regions": regions,
        "dtype": dtype,
        "quantize": quantize,
        "attention": attention,
        "kernel": kernel,
        "mode": mode,
        "inductor": inductor,
        "level": level,
        "layout": layout,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    means = Means(settings or Settings.from_env(), progress, force, jobs)
    return build_model(model, output, means, device, **options)


def build_model(
    model: str | Path | nn.Module,
    output: str | Path,
    means: Means,
    device: str | None = None,
    **options: Unpack[CompileOptions],
) -> Bundle:
    """As `compile`, by some means, which may be those of what is published.

    Raises:
        HubaotiError: as `compile`.
    """
    return build_missing(model, make_request(model, device, options), Path(output), means)[0]


def compile_for(  # noqa: PLR0913 - a face of keywords
    model: str | Path | nn.Module,
    capabilities: str | Iterable[str | int],
    output: str | Path = "bundles",
    *,
    force: bool = False,
    jobs: int | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
    **options: Unpack[CompileOptions],
) -> tuple[Bundle, ...]:
    """Compile a model for GPUs that need not be here: no GPU, no driver and no weights are needed.

    Args:
        model: as `compile` has it.
        capabilities: of the GPUs, as `"sm80,sm90"` or `["sm80", "9.0"]`.
        output: a folder of bundles; each is called after its variant, with `-fa3` behind that.
        options: as `compile` has them, without a device; `mode="max-autotune"` needs the GPU.
            Of several attentions, as `"fa3,sdpa"`, there is a bundle each, where it can be;
            what is left out, as fa3 for `sm80`, `progress` is told.

    Raises:
        HubaotiError: what failed and what to do; no half-written bundle is left.
    """
    request = make_request_for(capabilities, options)
    means = Means(settings or Settings.from_env(), progress, force, jobs)
    return tuple(build_missing(model, request, Path(output), means))


def explain(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    device: str | None = None,
    capability: str | None = None,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
    **options: Unpack[CompileOptions],
) -> Explanation:
    """What `compile` would do with the same options: regions, dims, graphs, recipe and key.

    Args:
        model, output, device, options: as `compile` has them.
        capability: of a GPU that need not be here, as `sm90`, instead of a device; of several
            `explain_for` tells, with less work.

    Raises:
        HubaotiError: why it could not be done.
    """
    place = Path(output) if output is not None else None
    means = Means(settings or Settings.from_env(), progress)
    if capability is None:
        request = make_request(model, device, options)
    else:
        request = make_request_for(capability, {**options, "device": device})
    if len(request.capabilities) * max(1, len(request.attentions)) > 1:
        several = [f"sm{each}" for each in request.capabilities], request.attentions
        raise BadRequest(
            f"explain is of one bundle, and these are several: {_name_pairs(*several)}",
            hint="one at a time, or of all: hubaoti.explain_for(model, 'sm80,sm90')",
        )
    return explain_jobs(model, request, place, means)[0]


def explain_for(
    model: str | Path | nn.Module,
    capabilities: str | Iterable[str | int],
    output: str | Path | None = None,
    *,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
    **options: Unpack[CompileOptions],
) -> tuple[Explanation, ...]:
    """What `compile_for` would do with the same options, for each of the GPUs; planned once.

    Raises:
        HubaotiError: why it could not be done.
    """
    place = Path(output) if output is not None else None
    means = Means(settings or Settings.from_env(), progress)
    request = make_request_for(capabilities, options)
    return tuple(explain_jobs(model, request, place, means))


def make_request(
    model: str | Path | nn.Module, device: str | None, options: CompileOptions
) -> CompileRequest:
    """What is asked for a device of this machine, by default the one on which a module lies."""
    return CompileRequest.parse({**options, "device": device or _find_device(model)})


def _name_pairs(gpus: Sequence[str], attentions: Sequence[str]) -> str:
    return ", ".join(
        f"{gpu} with {attention}" if attentions else gpu
        for gpu in gpus
        for attention in attentions or ("",)
    )


def make_request_for(
    capabilities: str | Iterable[str | int], options: Mapping[str, Any]
) -> CompileRequest:
    """What is asked for GPUs that need not be here."""
    return CompileRequest.parse({**options, "capabilities": parse_capabilities(capabilities)})


def _find_device(model: str | Path | nn.Module) -> str:
    """Where most of a module lies; the CPU for a model's name, and for what is no module."""
    if isinstance(model, (str, Path)) or not hasattr(model, "parameters"):
        return "cpu"
    from hubaoti.compiler.module_copy import find_main_device

    return str(find_main_device(model))
