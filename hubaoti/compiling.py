"""The verb compile: what is built already is found by its key, what is not is built.

A bundle is looked for in the output folder, then in the mirror, where every build is stored too.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

from hubaoti import __version__
from hubaoti.bundle import Bundle, tidy, write_manifest, writing
from hubaoti.compiler.request import Bounds, Request, bucket_ranges, ranges
from hubaoti.errors import (
    BadDim,
    BadManifest,
    BadRequest,
    CheckFailed,
    CompileFailed,
    DigestMismatch,
    HubaotiError,
)
from hubaoti.extras import require
from hubaoti.fetching import COMPILE_FILES, model_files
from hubaoti.host import Host
from hubaoti.manifest import Source
from hubaoti.mirror import Artifact, Mirror
from hubaoti.package import pack
from hubaoti.settings import Settings
from hubaoti.steps import Say

if TYPE_CHECKING:
    from torch import nn

    from hubaoti.compiler.build import Job
    from hubaoti.compiler.calls import Call, Calls

Shape = Sequence[str | int | None]


class Asked(TypedDict, total=False):
    """What may be asked of a compile; what is left out is as the model says."""

    # of a module from Python: its calls, or several sets of them, which make a graph each; names
    # for the sizes of its inputs, as {"hidden_states": ("batch", "seq", None)}
    calls: Calls | Sequence[Call] | Sequence[Calls] | None
    shapes: Mapping[str, Shape]
    # of a model: embed, classify, logits, generate or forward; a branch, tag or commit; whether its
    # own code may run
    task: str | None
    revision: str | None
    trust_remote_code: bool
    # bounds of dims, as {"batch": (1, 32)} or ["batch=1:32"], and of those that have a graph of
    # their own, as [{"seq": (1, 1)}, {"seq": (2, 4096)}]: the first that holds a call serves it
    dims: Mapping[str, Bounds] | Iterable[str]
    buckets: Iterable[Mapping[str, Bounds] | str]
    # auto (the repeated blocks), none (the whole model) or a module's path; by default none where
    # the graph alone answers texts (embed, classify, logits), else auto
    regions: str | None
    # the dtype, the CPU level of the host code as archspec names it, cpu or cuda, a recipe of
    # torchao, inductor's mode, and inductor's options
    dtype: str | None
    level: str | None
    device: str
    quantize: str | None
    mode: str
    inductor: Mapping[str, Any] | Iterable[str]
    # zerogpu, for loaders that know no manifest: calls and answers are the module's own, and what
    # its state_dict has not is inside
    layout: str | None


def request_of(asked: Asked) -> Request:
    """What was asked, as a request.

    Raises:
        BadRequest, BadDim, UnknownTask: a word that the compiler does not know.
    """
    own = ("calls", "shapes", "revision", "inductor")
    words: dict[str, Any] = {name: value for name, value in asked.items() if name not in own}
    words["dims"] = ranges(asked.get("dims", ()))
    words["buckets"] = bucket_ranges(asked.get("buckets", ()))
    return Request(**words)


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


def job_of(
    model: str | Path | nn.Module, asked: Asked, host: Host, settings: Settings, say: Say
) -> tuple[Job, Source]:
    """Everything but the work: the source, the plan, and the key that they have.

    Raises:
        HubaotiError: what was asked cannot be; torch is not loaded for what can be seen before.
    """
    require("compile", "compile")
    request = request_of(asked)
    if request.quantize is not None:
        require(f"--quantize {request.quantize}", "quantize")
    for name in settings.tuning:
        raise BadRequest(
            f"{name} is set, which changes what inductor builds and stands in no key",
            hint=f"unset {name}, and say it with --inductor key=value",
        )
    if not isinstance(model, (str, Path)) and "device" not in asked:
        device = next((parameter.device for parameter in model.parameters()), "cpu")
        request = replace(request, device=str(device))
    origin = Source(model=type(model).__name__)
    if isinstance(model, (str, Path)):
        say("files")
        folder, origin = model_files(model, asked.get("revision"), COMPILE_FILES, settings, say)
    say("torch")  # importing it takes longer than most steps
    from hubaoti.compiler.build import Job, device_of, target_of
    from hubaoti.compiler.options import options_of
    from hubaoti.compiler.plan import plan

    where = device_of(request.device)
    target = target_of(host, where, request.level)
    chosen = options_of(request.mode, asked.get("inductor", ()), request.device)
    request = replace(request, inductor=chosen)
    say("source")
    if isinstance(model, (str, Path)):
        from hubaoti.compiler.source import load

        source = load(folder, request, where)
    else:
        from hubaoti.compiler.live import source_of

        calls = sets_of(asked.get("calls"), model)
        source, buckets = source_of(model, calls, asked.get("shapes", {}), request)
        request = replace(request, buckets=request.buckets or buckets)
    return Job.of(plan(source, request, where), request, target, where), origin


def planned(
    model: str | Path | nn.Module,
    asked: Asked,
    output: Path,
    host: Host,
    settings: Settings,
    say: Say,
) -> tuple[Job, Source]:
    """`job_of`, with a report beside the output of a model that cannot be read or captured.

    Raises:
        HubaotiError: what was asked cannot be.
    """
    words = {name: value for name, value in asked.items() if name != "calls"}
    with reported(output, [f"asked: {words}"], (CompileFailed,)):
        return job_of(model, asked, host, settings, say)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Around work on a module from Python: it is in eval mode, and afterwards as it was.

    Raises:
        BadRequest: it is no module.
    """
    if isinstance(model, (str, Path)):
        yield
        return
    if not isinstance(model, SupportsModules):
        raise BadRequest(
            f"a {type(model).__name__} is neither a module nor the name of a model",
            hint="give a Hub id, a folder, or a module; of a pipeline one of its modules, as "
            "pipe.transformer",
        )
    from hubaoti.compiler.live import unchanged

    module: Any = model
    with unchanged(module):
        yield


@runtime_checkable
class SupportsModules(Protocol):
    """An `nn.Module`, said without torch."""

    def modules(self) -> Iterator[Any]: ...


def sets_of(calls: Any, model: object) -> list[Any]:
    """The calls of a module as sets.

    Raises:
        BadRequest: there are none.
    """
    if calls is None:
        raise BadRequest(
            f"{type(model).__name__} is a module, and how it is called is not known",
            hint="record calls: with hubaoti.capture(module) as calls: ...; compile(..., "
            "calls=calls)",
        )
    from hubaoti.compiler.calls import Call, Calls

    if isinstance(calls, Calls):
        return [calls]
    each = list(calls)
    if all(isinstance(call, Call) for call in each):
        return [each]
    if not all(isinstance(one, (Calls, list, tuple)) for one in each):
        raise BadRequest(
            f"calls are {type(calls).__name__} of {type(each[0]).__name__}",
            hint="give what hubaoti.capture recorded, or a list of such",
        )
    return each


def compiled(
    job: Job, origin: Source, output: Path, host: Host, jobs: int | None, say: Say
) -> Bundle:
    """Build a job; a report of what failed lies beside the output.

    Raises:
        HubaotiError: what failed and what to do; no half-written bundle is left.
    """
    from hubaoti.compiler.build import build

    graphs = [f"  {unit.id}: {unit.bounds}" for unit in job.plan.units]
    facts = [str(job.target), str(job.build), "", "graphs", *graphs]
    with reported(output, facts, (CompileFailed, CheckFailed, BadDim)):
        return build(job, origin, host, output, say, jobs)


def existing(key: str, output: Path, mirror: Mirror, say: Say) -> Bundle | None:
    """The bundle of a key where it is already: at the output, or in the mirror."""
    tidy(output)  # else one that a kill moved aside is not found
    if bundle := whole(output, key):
        say(f"found {key[:12]} in {output}")
        return bundle
    for artifact in mirror.by_key(key):
        try:
            mirror.verify(artifact)
            bundle = copied(artifact, output)
        except DigestMismatch:
            continue
        say(f"found {key[:12]} in the mirror")
        return bundle
    return None


def copied(artifact: Artifact, output: Path) -> Bundle:
    """A bundle from the mirror, its graphs packed again.

    Raises:
        DigestMismatch: another zlib packed it, so that its bytes cannot be had again.
    """
    with writing(output) as scratch:
        for file in artifact.manifest.files:
            target = scratch / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(file.path), target)
        for graph in artifact.manifest.graphs:
            package = scratch / graph.file
            package.parent.mkdir(parents=True, exist_ok=True)
            pack(artifact.graph_folder(graph), package)
        write_manifest(scratch, artifact.manifest)
        Bundle.read(scratch).check()
    return Bundle.read(output)


@contextmanager
def reported(
    output: Path, facts: Sequence[str], kinds: tuple[type[HubaotiError], ...]
) -> Iterator[None]:
    """Around a step: the whole report of a failure goes to a file beside the output.

    Raises:
        HubaotiError: as it came; one of `kinds` with the report's path in the hint.
    """
    try:
        yield
    except kinds as why:
        path = output.absolute().with_name(f"{output.absolute().name}.report.txt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report(why, facts))
        except OSError:
            raise why from why.__cause__
        raise type(why)(str(why), hint=f"{why.hint}; the whole report: {path}") from why.__cause__


def report(why: Exception, facts: Sequence[str]) -> str:
    """All that is known of a failure."""
    import torch
    import transformers

    versions = (
        f"hubaoti {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )
    trace = "".join(traceback.format_exception(why))
    return "\n".join([str(why), "", versions, *facts, "", trace])


def explanation(job: Job, output: Path | None, mirror: Mirror) -> Explanation:
    """What compiling a job would do, without doing it."""
    from hubaoti.manifest import recipe_of, variant_of

    places = [str(output)] if output and whole(output, job.key) else []
    places += ["the mirror"] if mirror.by_key(job.key) else []
    return Explanation(
        key=job.key,
        built=next(iter(places), None),
        recipe=str(recipe_of(job.build)),
        variant=str(variant_of(job.target)),
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


def whole(output: Path, key: str) -> Bundle | None:
    """The bundle of a key that lies in a folder; None where it is not there, or damaged."""
    try:
        bundle = Bundle.read(output)
        if bundle.manifest.key != key:
            return None
        bundle.check()
    except (BadManifest, DigestMismatch):
        return None
    return bundle
