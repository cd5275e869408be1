"""Bundles with the very key that a compile would have, made without compiling."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from bundles import changed, describe, make_bundle

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import find_oldest_schema
from hubaoti.artifact.package import pack_folder
from hubaoti.artifact.schema import ModelSource, compute_key
from hubaoti.compiler.fake_gpu import CPU, GPU
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.job import Job
from hubaoti.compiler.options import merge_options
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest
from hubaoti.compiler.targets import choose_targets, derive_requirements
from hubaoti.host.probe import probe_host
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings

OLD = "2.1.0+cpu"  # a torch that no machine of the tests has


class Building(Exception):
    """What was asked for is built."""


def end_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever is built end as it begins, with `Building`."""

    def build(*_: object) -> NoReturn:
        raise Building

    monkeypatch.setattr("hubaoti.compiler.build.build_unit", build)


def plan_job(model: Path, settings: Settings, **words: Any) -> Job:
    """What `hubaoti.compile` would build of a model with some words."""
    request = CompileRequest.parse(words)
    device = GPU if request.is_for_gpus else CPU
    request = replace(request, inductor=merge_options(request.mode, request.inductor, device.type))
    plan = make_plan(load_source(model, request, CPU), request, device)
    return Job.of(plan, request, choose_targets(probe_host(settings), request)[0])


def make_built(folder: Path, job: Job, source: ModelSource, torch: str | None = None) -> Bundle:
    """A bundle of a job's key, over made-up code; or of its key for another torch."""
    target = job.target if torch is None else msgspec.structs.replace(job.target, torch=torch)
    program, bundle = job.plan.source.program, make_bundle(folder)
    package, members = folder / "graphs/root.pt2", folder.with_name(f"{folder.name}-members")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(members)
    pack_folder(members, package)  # as one that comes out of a mirror again
    low, high, _ = job.build.dims["batch"]
    graphs = (msgspec.structs.replace(describe(folder, "root"), bounds={"batch": (low, high)}),)
    return changed(
        bundle,
        schema=find_oldest_schema(job.build, graphs, ()),
        graphs=graphs,
        program=program,
        build=job.build,
        target=target,
        key=compute_key(program, job.build, target),
        requires=derive_requirements(target),
        source=source,
    )


def store_built(bundle: Bundle, settings: Settings) -> None:
    """Have a machine's mirror hold a bundle as one that it built."""
    files = {each.path: bundle.path / each.path for each in bundle.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        mirror.index.record_built(bundle.manifest)
        mirror.put(bundle.manifest, files)
