"""From what is asked to bundles: found by their keys, or built.

A bundle is looked for in the output folder, then in the mirror, where every build is stored too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubaoti.api.attaching import put
from hubaoti.api.finding import find_built, find_whole, list_allowed, telling_replaced
from hubaoti.artifact.bundle import Bundle, explain_store_errors
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.manifest import FILENAME, label_recipe, label_variant
from hubaoti.artifact.schema import ModelSource, Target
from hubaoti.compiler.reports import describe_jobs, join_errors, report_failure
from hubaoti.compiler.request import KERNEL, CompileRequest
from hubaoti.errors import (
    BadDim,
    BadRequest,
    CheckFailed,
    CompileFailed,
    HubaotiError,
    OutputExists,
)
from hubaoti.flags import require_flags
from hubaoti.host.extras import require
from hubaoti.host.probe import Host, probe_host
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import download_build, pin_kernel
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.model_download import COMPILE_FILES, fetch_model_files, find_local_folder
from hubaoti.mirror import Mirror
from hubaoti.mirror.answers import BUILT
from hubaoti.progress import Progress
from hubaoti.settings import Settings, list_kernel_tuning

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.compiler.job import Job, Jobs
    from hubaoti.compiler.plan import Plan

_FA3 = "fa3"  # as recipes have it


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a compile would do: its key, whether that is built already, and each graph.

    Of a `kernel` that graphs will call the repo is named; it is asked when they are compiled.
    """

    key: str
    built: str | None
    recipe: str
    variant: str
    regions: str
    dims: dict[str, str]
    graphs: list[dict[str, Any]]
    left_out: tuple[str, ...]
    kernel: str | None


@dataclass(frozen=True, slots=True)
class Means:
    """Where things are, who is told of steps, and how the work is done.

    With `own` nothing that others built is found: what is published is this machine's.
    """

    settings: Settings
    progress: Progress
    force: bool = False
    at_once: int | None = None
    own: bool = False

    def __post_init__(self) -> None:
        require_flags(force=self.force)


def build_missing(
    model: str | Path | nn.Module,
    request: CompileRequest,
    output: Path,
    means: Means,
) -> list[Bundle]:
    """The bundles that are asked for, each at its place; those that are found are not built."""
    require("compile", "compile")
    if request.capabilities:
        _refuse_bundle(output)
    host = probe_host(means.settings)
    with Mirror.open(means.settings.mirror) as mirror, _in_eval_mode(model), ExitStack() as around:
        mirror.index.require_writable()
        with report_failure(output, _describe_request(request), (CompileFailed,)):
            jobs, origin = _prepare(model, request, host, means)
        found: dict[Path, Bundle | None] = {
            choose_place(output, request, job): None for job in jobs.jobs
        }
        missing = dict(zip(found, jobs.jobs, strict=True))
        around.enter_context(_alone_with(missing.values(), mirror, means.progress))
        around.enter_context(telling_replaced([*found], mirror, means.progress))
        for place in [] if means.force else [*missing]:
            key = missing[place].key
            found[place] = find_built(key, place, mirror, means.progress, means.own)
            if found[place]:
                del missing[place]
        if missing:
            facts = describe_jobs([*missing.values()])
            with report_failure(output, facts, (CompileFailed, CheckFailed, BadDim)):
                built = _build(missing, origin, host, means, request.kernel or KERNEL)
                bundles = [_store(each, mirror) for each in built if isinstance(each, Bundle)]
                found |= {bundle.path: bundle for bundle in bundles}
                errors = [each for each in built if isinstance(each, HubaotiError)]
                if errors:
                    raise join_errors([*errors, *jobs.refused], _list_whole(found))
        if jobs.refused:
            raise join_errors(jobs.refused, _list_whole(found))
        return [bundle for bundle in found.values() if bundle]


@contextmanager
def _alone_with(jobs: Iterable[Job], mirror: Mirror, progress: Progress) -> Iterator[None]:
    """Around work on some keys, each of which one process at a time builds; others find it then."""
    with ExitStack() as held:
        for key in sorted({job.key for job in jobs}):  # in one order, so that all of them end
            held.enter_context(mirror.leases.alone(key, progress))
        yield


def _list_whole(found: Mapping[Path, Bundle | None]) -> list[Path]:
    """Where bundles are whole."""
    return [path for path, bundle in found.items() if bundle]


def _refuse_bundle(output: Path) -> None:
    """See that bundles are not written into one, which would be no good one any more.

    Raises:
        OutputExists: they would be.
    """
    if (output / FILENAME).is_file():
        raise OutputExists(
            f"{output} is a bundle, and --for makes a folder of bundles",
            hint="choose another folder with -o",
        )


def _prepare(
    model: str | Path | nn.Module, request: CompileRequest, host: Host, means: Means
) -> tuple[Jobs, ModelSource]:
    """Everything but the work: the source, the plan, and the keys that they have.

    Raises:
        HubaotiError: what was asked cannot be; torch is not loaded for what can be seen before.
    """
    if request.quantize is not None:
        require(f"--quantize {request.quantize}", "quantize")
    refuse_tuning(request, means.settings)
    _refuse_unread(model, request)
    if request.kernel is not None:
        RepoRef.parse(request.kernel)
    origin = ModelSource(model=type(model).__name__)
    if isinstance(model, (str, Path)):
        means.progress("files")
        folder, origin = fetch_model_files(
            model, request.revision, COMPILE_FILES, means.settings, means.progress
        )
    means.progress("torch")  # importing it takes longer than most steps
    from hubaoti.compiler.fake_gpu import CPU, GPU
    from hubaoti.compiler.options import merge_options, refuse_measuring
    from hubaoti.compiler.plan import make_plan
    from hubaoti.compiler.targets import choose_targets

    targets = choose_targets(host, request)
    options = merge_options(request.mode, request.inductor, targets[0].device)
    if request.capabilities:
        refuse_measuring(options)
    request = replace(request, inductor=options)
    means.progress("source")
    if isinstance(model, (str, Path)):
        from hubaoti.compiler.from_config import load_source

        source = load_source(folder, request, CPU)
    else:
        from hubaoti.compiler.from_module import make_source

        source, buckets = make_source(model, request)
        request = replace(request, buckets=request.buckets or buckets)
    # As a model calls its blocks there, whether there is one here or not.
    plan = make_plan(source, request, GPU if targets[0].device == "cuda" else CPU)
    return _plan_jobs(plan, request, targets, means.progress), origin


def _plan_jobs(
    plan: Plan, request: CompileRequest, targets: Sequence[Target], progress: Progress
) -> Jobs:
    """The jobs of a request; what is left out beside them is told."""
    from hubaoti.compiler.job import make_jobs

    jobs = make_jobs(plan, request, targets)
    for error in jobs.left_out:
        progress(f"left out: {error}")
    return jobs


def _refuse_unread(model: str | Path | nn.Module, request: CompileRequest) -> None:
    """Refuse options that nothing would read: of a model's name, of a folder, or of a module.

    Raises:
        BadRequest: they are of one, and this is another.
    """
    revision = f"the revision {request.revision}" if request.revision is not None else ""
    if not isinstance(model, (str, Path)):
        task = f"the task {request.task}" if request.task not in {None, "forward"} else ""
        unread, hint = task or revision, "leave it out: the calls of a module say what it does"
        what = f"a module ({type(model).__name__})"
    elif request.calls is not None or request.shapes:
        unread = "calls" if request.calls is not None else "shapes"
        what, hint = f"a model by its name ({model})", "leave it out, or compile the module itself"
    else:
        unread = revision if find_local_folder(model) else ""
        what, hint = f"a folder ({model})", "leave it out, or give the model's Hub id"
    if unread:
        raise BadRequest(f"{what} is compiled, which has no use for {unread}", hint=hint)


def refuse_tuning(request: CompileRequest, settings: Settings) -> None:
    """See that no variable changes what is built: a key says all that a build depends on.

    Raises:
        BadRequest: one does.
    """
    for name in settings.tuning:
        raise BadRequest(
            f"{name} is set, which changes what inductor builds and stands in no key",
            hint=f"unset {name}, and say it with --inductor key=value",
        )
    for name in list_kernel_tuning() if request.is_for_gpus else ():
        raise BadRequest(
            f"{name} is set, which changes the kernels that triton builds and stands in no key",
            hint=f"unset {name}: kernels are the same on every machine that builds them",
        )


def _describe_request(request: CompileRequest) -> list[str]:
    """What was asked, for a report."""
    options = {each.name: getattr(request, each.name) for each in fields(request)}
    return [f"asked: { {name: value for name, value in options.items() if name != 'calls'} }"]


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
    jobs: Mapping[Path, Job], origin: ModelSource, host: Host, means: Means, kernel: str
) -> list[Bundle | HubaotiError]:
    """Build jobs, those of one plan together; where none comes to anything, that is raised."""
    from hubaoti.compiler.build import build
    from hubaoti.compiler.stand_in import build_stand_in

    stand_in = None
    if next(iter(jobs.values())).target.device == "cuda":
        assert host.torch is not None  # it is loaded by now
        stand_in = build_stand_in(host.torch, means.settings.home)
    results = list[Bundle | HubaotiError]()
    groups: dict[int, dict[Path, Job]] = {}
    for place, job in jobs.items():
        try:
            groups.setdefault(id(job.plan), {})[place] = _pin(job, kernel, means.settings)
        except HubaotiError as error:
            if len(jobs) == 1:
                raise
            results.append(error)
    for group in groups.values():
        try:
            results += build(group, origin, host, means.progress, means.at_once, stand_in)
        except HubaotiError as error:
            if len(group) == len(jobs):
                raise
            results.append(error)
    return results


def _pin(job: Job, kernel: str, settings: Settings) -> Job:
    """A job with the kernel that its graphs may call, as its repo has it now.

    Raises:
        HubaotiError: of `pin_kernel`. BadRequest: it does not compute in the dtype.
    """
    from hubaoti.compiler.flash_attention import read_abilities, require_dtype
    from hubaoti.compiler.plan import drop_told_graphs

    if job.build.attention != _FA3:
        return job
    client, target = HubClient(settings), job.target
    host = KernelHost(target.torch, target.cuda, target.level, target.os)
    pin = pin_kernel(client, kernel, host)
    has = read_abilities(download_build(client, pin))
    require_dtype(job.build.dtype, has, str(pin))
    plan = drop_told_graphs(job.plan, has.widest if has.lengths and has.appends else 0)
    return replace(job, plan=plan, pins=(pin,), widest=has.widest)


def _store(bundle: Bundle, mirror: Mirror) -> Bundle:
    """Keep a bundle that was built here in the mirror, too, where its key finds it."""
    with explain_store_errors(bundle.path):
        mirror.index.record_built(bundle.manifest)  # before it could have to leave
        put(bundle, mirror)
    mirror.answers.record(BUILT, bundle.manifest)
    return bundle


def choose_place(output: Path, request: CompileRequest, job: Job) -> Path:
    """Where the bundle of a job goes: the output, or where they are several a folder in it."""
    if not request.capabilities:
        return output
    kernel = f"-{_FA3}" * (job.build.attention == _FA3)
    return output / f"{label_variant(job.target)}{kernel}"


def explain_jobs(
    model: str | Path | nn.Module, request: CompileRequest, output: Path | None, means: Means
) -> list[Explanation]:
    """What each of the builds that are asked for would be."""
    require("compile", "compile")
    with Mirror.open(means.settings.mirror) as mirror, _in_eval_mode(model):
        found, _ = _prepare(model, request, probe_host(means.settings), means)
        if found.refused:
            raise join_errors(found.refused)
        kernel = str(RepoRef.parse(request.kernel or KERNEL))
        return [
            _explain_job(job, output and choose_place(output, request, job), kernel, mirror, means)
            for job in found.jobs
        ]


def _explain_job(
    job: Job, output: Path | None, kernel: str, mirror: Mirror, means: Means
) -> Explanation:
    """What compiling a job would do, without doing it."""
    bundle = find_whole(output, job.key) if output else None
    places = [f"{output}"] if bundle and mirror.decide(bundle.manifest.digest).allowed else []
    here = list_allowed(mirror, mirror.index.rows(job.key), means.own)
    places += ["the mirror"] if any(here) else []
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
        kernel=kernel if job.build.attention == _FA3 else None,
    )
