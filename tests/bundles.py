"""Small real bundles, made without compiling: honest manifests over zips of made-up code."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from hubaoti import api
from hubaoti.artifact.bundle import Bundle, make_file_entry
from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.artifact.package import hash_file, list_members
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import (
    Build,
    BuildRecord,
    Check,
    Golden,
    Graph,
    Input,
    ModelSource,
    Outputs,
    Program,
    Target,
    compute_key,
)
from hubaoti.host.probe import Gpu, Host, Torch
from hubaoti.mirror import Artifact, Mirror

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CPU = {"device": "cpu", "os": "linux", "level": "x86_64_v3", "torch": "2.13.0+cpu"}
CUDA = {**CPU, "device": "cuda", "torch": "2.13.0+cu130", "cuda": "13.0", "sm": 90}
MEMBERS = {"model/root.so": b"\x7fELF" + bytes(range(256)) * 20, "model/root.json": b"{}"}


def make_bundle(
    folder: Path,
    target: Mapping[str, Any] = CPU,
    members: Mapping[str, bytes] = MEMBERS,
    source: ModelSource = ModelSource(model="acme/tiny", commit=COMMIT),  # noqa: B008
    graphs: tuple[str, ...] = ("root",),
    **build: Any,
) -> Bundle:
    """A bundle that `Bundle.check` accepts; `build` are fields of `Build`, by name."""
    (folder / "graphs").mkdir(parents=True)
    for name in graphs:
        write_zip(folder / f"graphs/{name}.pt2", {**members, "name": name.encode()})
    (folder / "golden.safetensors").write_bytes(b"golden" * 100)
    return write_manifest(folder, target, source, graphs, **build)


def write_manifest(
    folder: Path,
    target: Mapping[str, Any] = CPU,
    source: ModelSource = ModelSource(model="acme/tiny", commit=COMMIT),  # noqa: B008
    graphs: tuple[str, ...] = ("root",),
    **build: Any,
) -> Bundle:
    """Describe the files that lie in a folder."""
    program = Program(config={"hidden": 8}, code="a" * 64, task="embed")
    chosen: dict[str, Any] = {"dtype": "float32", "attention": "sdpa", **build}
    options = Build(regions="whole", dims={"batch": (1, 8, 1)}, **chosen)
    kind = Target(git="b" * 40, **target)
    manifest = Manifest(
        program=program,
        build=options,
        target=kind,
        key=compute_key(program, options, kind),
        source=source,
        requires=Requirements(**target, glibc="2.17"),
        graphs=tuple(describe(folder, name) for name in graphs),
        files=(make_file_entry(folder, "golden.safetensors"),),
        checks=(check_of(graphs[0]),),
        built=BuildRecord(
            at="2026-01-31T12:00:00Z",
            seconds=1.5,
            peak_bytes=1 << 20,
            host="x86_64_v3",
            hubaoti="0.1.0",
            transformers="5.22.2",
        ),
    )
    return rewrite(folder, manifest)


def describe(folder: Path, name: str) -> Graph:
    """A graph's entry, of a package that lies in the folder."""
    entry = make_file_entry(folder, f"graphs/{name}.pt2")
    return Graph(
        id=name,
        file=entry.path,
        sha256=entry.sha256,
        size=entry.size,
        members=list_members(folder / entry.path),
        modules=("",),
        bounds={"batch": (1, 8)},
        call={"args": [{"tensor": 0}], "kwargs": {}},
        inputs=(Input(name="x", dtype="float32", shape=("batch", 8), values="real"),),
        outputs=Outputs(template=None, tensors=()),
        constants=(),
        golden=Golden(dims={"batch": 1}, tolerances={}, memory=1 << 20),
    )


def check_of(graph: str) -> Check:
    return Check(
        graph=graph, dims={"batch": 1}, max_absolute=1.5e-7, max_relative=1e-6, tolerance=1e-5
    )


def rewrite(folder: Path, manifest: Manifest) -> Bundle:
    """Write a manifest over the one that is there."""
    (folder / FILENAME).write_bytes(manifest.to_json())
    return Bundle(folder, manifest)


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    """The bundle with other fields in its manifest, written."""
    return rewrite(bundle.path, msgspec.structs.replace(bundle.manifest, **fields))


def write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """A zip of exactly these entries, whatever their names."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)


def make_host(**facts: Any) -> Host:
    """A made-up machine that runs `CPU` exactly."""
    torch = Torch("2.13.0+cpu", None, "b" * 40, Path("/torch"))
    host = Host(
        os="linux",
        machine="x86_64",
        python="3.11.9",
        level="x86_64_v3",
        cpu="haswell",
        cores=2,
        torch=torch,
        glibc="2.36",
        glibcxx="3.4.30",
        cxxabi="1.3.13",
        endpoint="http://127.0.0.1",
        mirror=Path("/mirror"),
    )
    return replace(host, **facts)


def make_gpu_host(**facts: Any) -> Host:
    """A made-up machine that runs `CUDA` exactly."""
    torch = Torch("2.13.0+cu130", "13.0", "b" * 40, Path("/torch"))
    gpu = Gpu("fake H100", 90, 80 << 30)
    return make_host(torch=torch, gpus=(gpu,), driver="580.1", driver_cuda="13.0", **facts)


def tree_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the sha256 of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put_trusted(bundle: Bundle, mirror: Mirror) -> Artifact:
    """A bundle in a mirror whose machine was told that it may run there."""
    mirror.trust.add_artifact(bundle.manifest.digest)
    return api.put(bundle, mirror)


def list_again(artifact: Artifact) -> None:
    """Have the manifest of an artifact list what its first graph's package is now."""
    graph, *others = artifact.manifest.graphs
    folder = artifact.graph_folder(graph)
    members = tuple(
        msgspec.structs.replace(each, sha256=hash_file(folder / each.path))
        for each in graph.members
    )
    graphs = (msgspec.structs.replace(graph, members=members), *others)
    manifest = msgspec.structs.replace(artifact.manifest, graphs=graphs)
    object.__setattr__(artifact, "manifest", manifest)
    path = artifact.path / FILENAME
    path.unlink()
    path.write_bytes(manifest.to_json())
