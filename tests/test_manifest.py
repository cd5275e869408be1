"""The manifest: one spelling, checked once, refused with the reason."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import CPU, CUDA, make_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.artifact.manifest import LARGEST_MANIFEST, Manifest, encode_canonical, parse_manifest
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import (
    Build,
    BuildRecord,
    Check,
    Constant,
    ConstantOrigin,
    ModelSource,
    Program,
    Target,
    compute_key,
)
from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.errors import BadManifest, NewerSchema

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", CUDA).manifest


def edited(manifest: Manifest, edit: Edit, rekey: bool = True) -> bytes:
    """The manifest's text after an edit by someone who knows the format."""
    value = json.loads(manifest.to_json())
    edit(value)
    if rekey:
        parts = {name: value[name] for name in ("program", "build", "target")}
        value["key"] = hashlib.sha256(encode_canonical(parts)).hexdigest()
    return encode_canonical(value)


def test_a_manifest_is_its_own_canonical_form(manifest: Manifest) -> None:
    assert parse_manifest(manifest.to_json(), "x") == manifest
    assert parse_manifest(manifest.to_json(), "x").digest == manifest.digest


def test_it_names_its_recipe_variant_size_and_program(manifest: Manifest) -> None:
    assert manifest.recipe == Recipe("float32", "sdpa")
    assert manifest.variant == Variant("2.13", "13.0", 90, "x86_64_v3")
    assert manifest.size == sum(file.size for file in manifest.all_files())
    assert manifest.program.tag == f"hubaoti-program-{manifest.program.digest[:12]}"


def test_the_key_is_of_program_build_and_target_alone(manifest: Manifest, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "b", CUDA, source=ModelSource(model="other/model")).manifest
    assert other.key == manifest.key
    assert other.digest != manifest.digest
    assert make_bundle(tmp_path / "c", CPU).manifest.key != manifest.key
    assert make_bundle(tmp_path / "d", CUDA, mode="other").manifest.key != manifest.key


def test_a_newer_schema_says_upgrade(manifest: Manifest) -> None:
    text = edited(manifest, lambda value: value.update(schema=5, future={"x": 1}))
    with pytest.raises(NewerSchema, match="schema 5") as caught:
        parse_manifest(text, "repo/hubaoti.json")
    assert "upgrade" in caught.value.hint
    assert caught.value.exit_code == 12


@pytest.mark.parametrize("schema", [0, -1, "1", None, 1.5, True])
def test_a_schema_that_never_was_is_refused(manifest: Manifest, schema: object) -> None:
    text = edited(manifest, lambda value: value.update(schema=schema))
    with pytest.raises(BadManifest) as caught:
        parse_manifest(text, "x")
    assert caught.value.exit_code == 11


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"1e999", b'"schema"']
)
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(BadManifest) as caught:
        parse_manifest(text, "here")
    assert "here" in str(caught.value)
    assert caught.value.hint


def test_what_a_requirement_lacks_is_said_with_the_name_of_the_file(manifest: Manifest) -> None:
    text = edited(manifest, lambda value: value["requires"].update(sm=None))
    with pytest.raises(BadManifest, match="^here is not a manifest: requires: malformed sm"):
        parse_manifest(text, "here")


def test_threads_may_read_their_first_manifests_at_once(manifest: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "hubaoti.json"
    file.write_bytes(manifest.to_json())
    program = f"""
import sys, threading
from pathlib import Path
from hubaoti.artifact.manifest import parse_manifest
sys.setswitchinterval(1e-6)
text, start = Path({str(file)!r}).read_bytes(), threading.Barrier(8)
def read():
    start.wait()
    parse_manifest(text, "here")
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_manifest_of_any_size_is_not_read() -> None:
    with pytest.raises(BadManifest, match="larger than"):
        parse_manifest(b" " * (LARGEST_MANIFEST + 1), "x")


def test_another_spelling_of_the_same_is_refused(manifest: Manifest) -> None:
    pretty = json.dumps(json.loads(manifest.to_json()), indent=1).encode()
    twice = manifest.to_json().replace(b'"schema":1', b'"schema":1,"schema":1')
    for text in (pretty, twice, manifest.to_json() + b"\n"):
        with pytest.raises(BadManifest, match="canonical"):
            parse_manifest(text, "x")


def rename(value: dict[str, Any], path: str) -> None:
    value["graphs"][0]["file"] = path


def put(*keys: str | int, to: object) -> Edit:
    def edit(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return edit


BAD = {
    "an unknown field": put("extra", to=1),
    "a missing field": lambda value: value.pop("graphs"),
    "a negative size": put("graphs", 0, "size", to=-1),
    "a short digest": put("graphs", 0, "sha256", to="ab"),
    "a digest with a newline": put("graphs", 0, "sha256", to="a" * 64 + "\n"),
    "a path that climbs": put("graphs", 0, "file", to="../x.pt2"),
    "an absolute path": put("files", 0, "path", to="/etc/passwd"),
    "a hidden path": put("files", 0, "path", to=".bashrc"),
    "an empty segment": put("files", 0, "path", to="a//b"),
    "a backslash": put("files", 0, "path", to="a\\b"),
    "a member that climbs": put("graphs", 0, "members", 0, "path", to="model/../../x"),
    "a member that is absolute": put("graphs", 0, "members", 0, "path", to="/x"),
    "a member that is a dot": put("graphs", 0, "members", 0, "path", to="./x"),
    "an unknown task": put("program", "task", to="steal"),
    "an unknown device": put("target", "device", to="tpu"),
    "a malformed dtype": put("build", "dtype", to="Float 32"),
    "an attention without a name": put("build", "attention", to="A/B"),
    "a torch without a version": put("target", "torch", to="x"),
    "an extent that is none": put("graphs", 0, "inputs", 0, "shape", to=["batch//2", 8]),
    "a part of a path that no disk has": put("files", 0, "path", to="a" * 256),
    "a path that is too long": put("files", 0, "path", to="/".join(["a" * 255] * 5)),
    "a path that is too deep": put("files", 0, "path", to="a/" * 17 + "a"),
    "a member's part that no disk has": put("graphs", 0, "members", 0, "path", to="a" * 256),
    "a member that is too long": put(
        "graphs", 0, "members", 0, "path", to="/".join(["a" * 255] * 5)
    ),
    "a member that is too deep": put("graphs", 0, "members", 0, "path", to="a/" * 17 + "a"),
    "a graph's name that no disk has": put("graphs", 0, "id", to="a" * 256),
    **{
        f"schemas of ops: {what}": put("graphs", 0, "schemas", to=schemas)
        for what, schemas in {
            "none": {},
            "a list": ["acme::shift(Tensor x) -> Tensor"],
            "an op of no namespace": {"shift": "(Tensor x) -> Tensor"},
            "an op that is not a name": {"acme::shift\n": "(Tensor x) -> Tensor"},
            "no schema": {"acme::shift": "Tensor x"},
            "not of printable characters": {"acme::shift": "(Tensor x\x1b) -> Tensor"},
            "too long": {"acme::shift": f"({8000 * 'x'}) -> Tensor"},
            "too many": {f"acme::shift{n}": "() -> Tensor" for n in range(1001)},
        }.items()
    },
    "values of no kind": put("graphs", 0, "inputs", 0, "values", to="ids<x"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_field_is_refused(manifest: Manifest, what: str) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(edited(manifest, BAD[what]), "x")


def twice(value: dict[str, Any], list_of: str) -> None:
    value[list_of].append(value[list_of][0])


CACHE = {"kind": "static", "keys": 0, "values": 0, "position": None, "window": None}
CODE = dict.fromkeys(("kernels", "registers", "local_bytes", "shared_memory"), 0)
KERNEL: dict[str, Any] = {
    **{"repo": "acme/attention", "commit": "a" * 40, "sms": []},
    **{"variant": "torch213-cxx11-cu130-x86_64-linux", "namespace": "_attention"},
    **{"archs": ["9.0a"], "files": [{"path": "metadata.json", "sha256": "b" * 64, "size": 2}]},
    **{"ops": [{"name": "fwd", "schema": "fwd(Tensor q) -> Tensor"}]},
}


def pinning(*pins: Any, schema: int = 4) -> Edit:
    """A manifest that calls these kernels."""

    def edit(value: dict[str, Any]) -> None:
        value["requires"]["kernels"] = [*pins]
        value["schema"] = schema

    return edit


def binding(*constants: list[str]) -> Edit:
    """A manifest of constants, by their names, their own first."""

    def edit(value: dict[str, Any]) -> None:
        origin = {"file": "golden.safetensors"}
        rest = {"dtype": "float32", "shape": [], "stride": [], "from": origin}
        value["graphs"][0]["constants"] = [
            {"fqn": fqn, "aliases": aliases, "shared_by_all_modules": False, **rest}
            for fqn, *aliases in constants
        ]

    return edit


def answering(task: str, name: str) -> Edit:
    """A manifest of a task, whose graph answers by a name."""

    def edit(value: dict[str, Any]) -> None:
        output = {"name": name, "dtype": "float32", "shape": ["batch", 4]}
        value["graphs"][0]["outputs"] = {"template": {"tensor": 0}, "tensors": [output]}
        value["program"]["task"] = task

    return edit


CLASHES: dict[str, tuple[Edit, str]] = {
    "a graph twice": (lambda value: twice(value, "graphs"), "graph root is listed twice"),
    "a file twice": (lambda value: twice(value, "files"), "golden.safetensors is listed twice"),
    "a file as the manifest": (put("files", 0, "path", to="Hubaoti.json"), "listed twice"),
    "a member twice": (
        lambda value: value["graphs"][0]["members"].append(value["graphs"][0]["members"][0]),
        "member",
    ),
    "a dim without bounds": (put("graphs", 0, "bounds", to={}), "dim batch has no bounds"),
    "an extent without bounds": (
        put("graphs", 0, "inputs", 0, "shape", to=["batch", "2*seq+1"]),
        "dim seq has no bounds",
    ),
    "a step without bounds": (put("graphs", 0, "steps", to={"seq": 8}), "seq has a step"),
    **{
        f"steps of {step}": (put("graphs", 0, "steps", to={"batch": step}), f"has steps of {step},")
        for step in (0, -1, 9, 10**12)
    },
    "a constant twice": (binding(["a"], ["a"]), "constant a is listed twice"),
    "a constant that is another one's alias": (
        binding(["a"], ["b", "a"]),
        "a is another name of constant b, and a constant itself",
    ),
    "steps of another task": (
        lambda value: value["program"].update(task="classify", steps=["mean"]),
        "its task is classify, its program ends with mean, as of embed",
    ),
    "an answer of another task": (
        answering("classify", "embedding"),
        "its task is classify, its graph answers embedding",
    ),
    "a vector that is called logits": (answering("embed", "logits"), "its graph answers logits"),
    "a cache that is no input": (
        put("graphs", 0, "cache", to=CACHE | {"keys": 7}),
        "its cache is not among its mutated inputs",
    ),
    "a cache that is not written": (
        put("graphs", 0, "cache", to=CACHE),
        "its cache is not among its mutated inputs",
    ),
    "no graph": (put("graphs", to=[]), "it lists no graph"),
    "a graph for nobody": (put("graphs", 0, "modules", to=[]), "root: it serves no module"),
    "bounds of nothing": (put("graphs", 0, "bounds", "batch", to=[0, 0]), "bounded by"),
    "empty bounds": (put("graphs", 0, "bounds", "batch", to=[3, 2]), "bounded by"),
    "two tales of the host": (put("requires", "sm", to=80), "target.sm is 90"),
    "code for another GPU": (
        put("graphs", 0, "device_code", to=CODE | {"capability": 80}),
        "target.sm is 90, root has code for 80",
    ),
    "more shared memory than is said": (
        put("graphs", 0, "device_code", to=CODE | {"capability": 90, "shared_memory": 1024}),
        "root takes 1024",
    ),
    "a kernel twice": (pinning(KERNEL, KERNEL), "is pinned twice"),
    "a kernel for another torch": (
        pinning(KERNEL | {"variant": "torch212-cu130-x86_64-linux"}),
        "is for torch 2.12, the graphs are not",
    ),
    "a kernel for another CUDA": (
        pinning(KERNEL | {"variant": "torch213-cu132-x86_64-linux"}),
        "is for CUDA 13.2",
    ),
    "a kernel for another GPU": (
        pinning(KERNEL | {"archs": ["8.0", "10.0f"]}),
        "target.sm is 90, kernel acme/attention@a+ is for 8.0 or 10.0f",
    ),
    "a kernel that no schema 1 has": (pinning(KERNEL, schema=1), "what it says is of schema 4"),
    "schemas of ops that no schema 1 has": (
        put("graphs", 0, "schemas", to={"acme::shift": "(Tensor x) -> Tensor"}),
        "what it says is of schema 4",
    ),
    "a kernel that is needed elsewhere": (put("kernels", to=[KERNEL]), "kernels are not"),
}


@pytest.mark.parametrize("what", CLASHES)
def test_a_contradiction_is_refused_with_its_reason(manifest: Manifest, what: str) -> None:
    edit, reason = CLASHES[what]
    with pytest.raises(BadManifest, match=reason):
        parse_manifest(edited(manifest, edit), "x")


def test_paths_are_read_as_deep_and_as_long_as_is_said(manifest: Manifest) -> None:
    deep, long = "a/" * 16 + "a", "/".join(["a" * 255] * 4)
    for path in (deep, long):
        text = edited(manifest, put("graphs", 0, "members", 0, "path", to=path))
        assert parse_manifest(text, "x").graphs[0].members[0].path == path
        text = edited(manifest, put("graphs", 0, "file", to=path))
        assert parse_manifest(text, "x").graphs[0].file == path


def test_schemas_of_ops_are_read_as_torch_writes_them(manifest: Manifest) -> None:
    schemas = {
        "acme::shift.out": '(Tensor(a!) x, str how="it", *, float[]? by=None) -> (Tensor[] y, int)',
        "Acme.v1::nothing": "() -> ()",
    }

    def edit(value: dict[str, Any]) -> None:
        value["graphs"][0]["schemas"] = schemas
        value["schema"] = 4

    assert parse_manifest(edited(manifest, edit), "x").graphs[0].schemas == schemas


def test_constants_of_several_names_and_answers_of_the_task_are_read(manifest: Manifest) -> None:
    for edit in (
        binding(["a", "b"], ["c", "d"]),
        answering("embed", "embedding"),
        answering("logits", "logits"),
        answering("forward", "anything"),
        put("graphs", 0, "steps", to={"batch": 8}),
    ):
        parse_manifest(edited(manifest, edit), "x")


def test_a_manifest_with_kernels_is_read_as_it_was_written(manifest: Manifest) -> None:
    text = edited(manifest, pinning(KERNEL))
    read = parse_manifest(text, "x")
    assert read.to_json() == text
    assert [str(pin) for pin in read.requires.kernels] == [f"acme/attention@{'a' * 40}"]


@pytest.mark.parametrize("extra", [{"signature": "x"}, {"version": None}])
def test_a_field_that_no_kernel_has_is_refused(manifest: Manifest, extra: Any) -> None:
    with pytest.raises(BadManifest):
        parse_manifest(edited(manifest, pinning(KERNEL | extra)), "x")


def test_a_key_of_something_else_is_refused(manifest: Manifest) -> None:
    text = edited(manifest, put("key", to="0" * 64), rekey=False)
    with pytest.raises(BadManifest, match="the key is not"):
        parse_manifest(text, "x")


def test_a_constant_from_an_unlisted_file_is_refused(manifest: Manifest) -> None:
    constant = Constant(
        fqn="weight",
        dtype="float32",
        shape=(1,),
        stride=(1,),
        origin=ConstantOrigin(file="absent.bin"),
    )
    graph = msgspec.structs.replace(manifest.graphs[0], constants=(constant,))
    bad = msgspec.structs.replace(manifest, graphs=(graph,))
    with pytest.raises(BadManifest, match=r"constants from absent\.bin"):
        parse_manifest(bad.to_json(), "x")
    good = msgspec.structs.replace(constant, origin=ConstantOrigin(file="golden.safetensors"))
    graph = msgspec.structs.replace(graph, constants=(good,))
    fine = msgspec.structs.replace(manifest, graphs=(graph,))
    assert parse_manifest(fine.to_json(), "x") == fine


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)
DIMS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True),
    st.tuples(st.integers(1, 9), st.integers(9, 99), st.just(1)),
    max_size=3,
)
FLOATS = st.floats(0, 1e300)


@settings(max_examples=60, deadline=None)
@given(config=st.dictionaries(st.sampled_from(["a", "b", "é"]), JSON), dims=DIMS, error=FLOATS)
def test_parse_reads_whatever_to_json_writes(
    manifest: Manifest,
    config: dict[str, Any],
    dims: dict[str, tuple[int, int, int]],
    error: float,
) -> None:
    program = Program(config=config, code="a" * 64, task="embed", steps=("x",))
    dims |= {"batch": (1, 8, 1)}  # which its graphs have
    build = Build(
        regions="whole", dims={**dims, "batch": (1, 8, 1)}, dtype="float32", attention="sdpa"
    )
    target = Target(git="b" * 40, **CPU)
    check = Check(graph="r", dims={}, max_absolute=error, max_relative=error, tolerance=error)
    written = Manifest(
        program=program,
        build=build,
        target=target,
        key=compute_key(program, build, target),
        source=ModelSource(model="m"),
        requires=Requirements(**CPU),  # type: ignore[arg-type]
        graphs=manifest.graphs,
        checks=(check,),
        built=BuildRecord(
            at="now", seconds=error, peak_bytes=1, host="h", hubaoti="0", transformers="5"
        ),
    )
    read = parse_manifest(written.to_json(), "x")
    assert read.to_json() == written.to_json()
    assert read.digest == written.digest


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_no_flipped_byte_is_the_same_artifact(manifest: Manifest, cut: int, mask: int) -> None:
    text = bytearray(manifest.to_json())
    text[cut % len(text)] ^= mask
    with suppress(BadManifest):
        assert parse_manifest(bytes(text), "x").digest != manifest.digest


@pytest.mark.parametrize(
    "template",
    [
        {"tensor": 0},
        {"tensor": -1},
        {"tuple": [{"tensor": True}]},
        {},
        {"nope": 1},
        {"given": ["x"]},
        {"dict": {"a": 1}, "order": ["b"]},
        {"items": [[1]]},
        {"float": 2.5},
    ],
)
def test_an_answer_that_nothing_can_be_made_of_is_refused(
    manifest: Manifest, template: Any
) -> None:
    def change(value: Any) -> None:
        value["graphs"][0]["outputs"] = {"template": template, "tensors": []}
        if "items" in template or "float" in template:
            value["schema"] = 2

    with pytest.raises(BadManifest, match="its answer is made of what is not there"):
        parse_manifest(edited(manifest, change), "x")
