"""The verb compile: what is built already is found by its key, what is not is built.

A bundle is looked for in the output folder, then in the mirror, where every build is stored too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubaoti.api.attaching import put
from hubaoti.api.finding import find_built, find_whole
from hubaoti.artifact.bundle import Bundle, explain_store_errors
from hubaoti.artifact.schema import ModelSource
from hubaoti.compiler.reports import report_failure
from hubaoti.compiler.request import (
    CompileRequest,
    RangeLike,
    Shape,
    make_bucket_ranges,
    make_ranges,
)
from hubaoti.errors import BadDim, BadRequest, CheckFailed, CompileFailed
from hubaoti.host.extras import require
from hubaoti.host.probe import Host, probe_host
from hubaoti.hub.model_download import COMPILE_FILES, fetch_model_files
from hubaoti.mirror import Mirror
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.compiler.capture import Call, Calls
    from hubaoti.compiler.job import Job


def capture(
    module: nn.Module, n: int | None = None, *, run: bool = True
) -> AbstractContextManager[Calls]:
    """Record the calls that `module` receives inside the block, whoever makes them.

    All of them, or the first `n`. With `run=False` the module is not run, its calls answer None,
    and the block is left, without an error, as soon as `n` of them (one, by default) have come.

    Raises:
        BadRequest: `n` is less than one; what called the module cannot go on without its answer.
    """
    require("capture", "compile")
    from hubaoti.compiler import capture

    return capture.record_calls(module, n, run=run)


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
        calls: of a module: what `hubaoti.capture` recorded, or several such, a graph for each.
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
    require("compile", "compile")
    settings = settings or Settings.from_env()
    host, place = probe_host(settings), Path(output)
    with Mirror.open(settings.mirror) as mirror, _in_eval_mode(model):
        mirror.index.require_writable()
        request = CompileRequest(
            calls=calls,
            shapes=shapes or {},
            task=task,
            dims=make_ranges(dims),
            buckets=make_bucket_ranges(buckets),
            regions=regions,
            dtype=dtype,
            quantize=quantize,
            mode=mode,
            inductor=inductor,
            level=level,
            device=device or _find_device(model),
            layout=layout,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        with report_failure(place, _describe_request(request), (CompileFailed,)):
            job, origin = _prepare(model, request, host, settings, progress)
        if not force and (found := find_built(job.key, place, mirror, progress)):
            return found
        return _store(_build(job, origin, place, host, jobs, progress), mirror)


def explain(  # noqa: PLR0913 - a face of keywords
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    calls: Calls | Sequence[Call] | Sequence[Calls] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    task: str | None = None,
    dims: Mapping[str, RangeLike] | Iterable[str] = (),
    buckets: Iterable[Mapping[str, RangeLike] | str] = (),
    regions: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    mode: str = "default",
    inductor: Mapping[str, Any] | Iterable[str] = (),
    level: str | None = None,
    device: str | None = None,
    layout: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    settings: Settings | None = None,
    progress: Progress = report_nothing,
) -> Explanation:
    """What `compile` would do with the same words: regions, dims, graphs, recipe and key.

    Args:
        As `compile` takes them.

    Raises:
        HubaotiError: why it could not be done.
    """
    require("compile", "compile")
    settings = settings or Settings.from_env()
    with Mirror.open(settings.mirror) as mirror, _in_eval_mode(model):
        request = CompileRequest(
            calls=calls,
            shapes=shapes or {},
            task=task,
            dims=make_ranges(dims),
            buckets=make_bucket_ranges(buckets),
            regions=regions,
            dtype=dtype,
            quantize=quantize,
            mode=mode,
            inductor=inductor,
            level=level,
            device=device or _find_device(model),
            layout=layout,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        job, _ = _prepare(model, request, probe_host(settings), settings, progress)
        return _explain_job(job, Path(output) if output else None, mirror)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a compile would do: its key, whether that is built already, and each graph."""

    key: str
    built: str | None
    recipe: str
    variant: str
    regions: str
    dims: dict[str, str]
    graphs: list[dict[str, Any]]
    left_out: tuple[str, ...]


def _prepare(
    model: str | Path | nn.Module,
    request: CompileRequest,
    host: Host,
    settings: Settings,
    progress: Progress,
) -> tuple[Job, ModelSource]:
    """Everything but the work: the source, the plan, and the key that they have.

    Raises:
        HubaotiError: what was asked cannot be; torch is not loaded for what can be seen before.
    """
    if request.quantize is not None:
        require(f"--quantize {request.quantize}", "quantize")
    for name in settings.tuning:
        raise BadRequest(
            f"{name} is set, which changes what inductor builds and stands in no key",
            hint=f"unset {name}, and say it with --inductor key=value",
        )
    origin = ModelSource(model=type(model).__name__)
    if isinstance(model, (str, Path)):
        progress("files")
        folder, origin = fetch_model_files(
            model, request.revision, COMPILE_FILES, settings, progress
        )
    progress("torch")  # importing it takes longer than most steps
    from hubaoti.compiler.build import choose_target, resolve_device
    from hubaoti.compiler.job import Job
    from hubaoti.compiler.options import merge_options
    from hubaoti.compiler.plan import make_plan

    where = resolve_device(request.device)
    target = choose_target(host, where, request.level)
    options = merge_options(request.mode, request.inductor, request.device)
    request = replace(request, inductor=options)
    progress("source")
    if isinstance(model, (str, Path)):
        from hubaoti.compiler.from_config import load_source

        source = load_source(folder, request, where)
    else:
        from hubaoti.compiler.from_module import make_source

        source, buckets = make_source(model, request)
        request = replace(request, buckets=request.buckets or buckets)
    return Job.of(make_plan(source, request, where), request, target, where), origin


def _describe_request(request: CompileRequest) -> list[str]:
    """What was asked, for a report."""
    words = {each.name: getattr(request, each.name) for each in fields(request)}
    return [f"asked: { {name: value for name, value in words.items() if name != 'calls'} }"]


def _find_device(model: str | Path | nn.Module) -> str:
    """Where a module's tensors are; the CPU for a model's name."""
    if isinstance(model, (str, Path)):
        return "cpu"
    return str(next((parameter.device for parameter in model.parameters()), "cpu"))


@contextmanager
def _in_eval_mode(model: Any) -> Iterator[None]:
    """Around work on a module from Python: it is in eval mode, and afterwards as it was."""
    if isinstance(model, (str, Path)):
        yield
        return
    if not hasattr(model, "modules"):  # an `nn.Module`, said without torch
        raise BadRequest(
            f"a {type(model).__name__} is neither a module nor the name of a model",
            hint="give a Hub id, a folder, or a module; of a pipeline one of its modules, as "
            "pipe.transformer",
        )
    from hubaoti.compiler.from_module import evaluate_unchanged

    with evaluate_unchanged(model):
        yield


def _build(
    job: Job, origin: ModelSource, output: Path, host: Host, jobs: int | None, progress: Progress
) -> Bundle:
    """Build a job; a report of what failed lies beside the output."""
    from hubaoti.compiler.build import build

    graphs = [f"  {unit.id}: {unit.bounds}" for unit in job.plan.units]
    facts = [str(job.target), str(job.build), "", "graphs", *graphs]
    with report_failure(output, facts, (CompileFailed, CheckFailed, BadDim)):
        return build(job, origin, host, output, progress, jobs)


def _store(bundle: Bundle, mirror: Mirror) -> Bundle:
    """Keep a bundle that was built here in the mirror, too, where its key finds it."""
    with explain_store_errors(bundle.path):
        put(bundle, mirror)
        mirror.index.record_built(bundle.manifest)
    return bundle


def _explain_job(job: Job, output: Path | None, mirror: Mirror) -> Explanation:
    """What compiling a job would do, without doing it."""
    from hubaoti.artifact.manifest import label_recipe, label_variant

    places = [str(output)] if output and find_whole(output, job.key) else []
    places += ["the mirror"] if mirror.by_key(job.key) else []
    return Explanation(
        key=job.key,
        built=next(iter(places), None),
        recipe=str(label_recipe(job.build)),
        variant=str(label_variant(job.target)),
        regions=job.build.regions,
        dims={name: str(sizes) for name, sizes in job.plan.dims.items()},
        graphs=[
            {
                "id": unit.id,
                "modules": list(unit.modules),
                "dims": {name: str(sizes) for name, sizes in unit.bounds.items()},
                "inputs": {entry.name: list(entry.shape) for entry in unit.face.inputs},
                "cache": unit.face.cache.kind if unit.face.cache else None,
            }
            for unit in job.plan.units
        ],
        left_out=job.plan.left_out,
    )
