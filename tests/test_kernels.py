"""Kernels: pinned by their bytes, fetched, opened by the kernels library, refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bundles import make_gpu_host
from commands import environment_of, inside
from huggingface_hub import HfApi
from kernel_repos import SCHEMAS, compile_library, push_kernel, variant_here, write_build
from kernel_scenes import Attending, make_tensors
from proxies import Proxy

import hubaoti
from gpu import openings
from hubaoti import api
from hubaoti.artifact.bundle import Bundle, make_file_entry, write_manifest
from hubaoti.artifact.kernel_pin import KernelOp, KernelPin
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.manifest import find_oldest_schema
from hubaoti.artifact.package import unpack_all
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import File
from hubaoti.artifact.variant import Recipe
from hubaoti.errors import (
    HubUnreachable,
    KernelArchUnsupported,
    KernelDigestMismatch,
    KernelMissing,
    KernelSchemaMismatch,
    MissingOps,
    RepoMoved,
    RepoNotFound,
    Untrusted,
)
from hubaoti.host.match import MatchResult, judge
from hubaoti.host.probe import Gpu, probe_host
from hubaoti.host.rank import Candidate, rank
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import fetch_kernels, pin_kernel
from hubaoti.mirror import Artifact, Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.runtime.attention_ops import answer_by_reference
from hubaoti.runtime.first_open import OpenHistory
from hubaoti.runtime.graph_ops import require_ops
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

CUDA = Requirements(
    **{"device": "cuda", "os": "linux", "torch": "2.13.0+cu130", "level": "x86_64_v3"},
    **{"cuda": "13.0", "sm": 90},
)
HERE = KernelHost(torch.__version__, None, "x86_64_v3", "linux")
SCENES = Path(__file__).with_name("kernel_scenes.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of all builds, its texts left open."""
    return compile_library(tmp_path_factory.mktemp("library"))


Publish = Callable[..., Path]


@pytest.fixture
def publish(library: Path, endpoint: Endpoint, tmp_path: Path) -> Publish:
    """Push builds of a kernel to a repo of the endpoint; the repo's folder, as it was pushed."""

    def push(repo: str, *namespaces: str, schema: str = "flash-attn3", **how: Any) -> Path:
        folder = tmp_path / repo.replace("/", "~")
        shutil.rmtree(folder, ignore_errors=True)
        for namespace in namespaces:
            write_build(library, folder, namespace, SCHEMAS.get(schema, schema), **how)
        push_kernel(endpoint, repo, folder)
        return folder

    return push


def pin(settings: Settings, name: str, host: KernelHost = HERE) -> KernelPin:
    return pin_kernel(HubClient(settings), name, host)


def fetch(settings: Settings, *pins: KernelPin) -> Path:
    """Pins in the mirror, whoever published them; the mirror."""
    with Mirror.open(settings.mirror) as mirror:
        fetch_kernels(HubClient(settings), mirror, pins, lambda _: None)
    return settings.mirror


def play(settings: Settings, scene: str, **words: Any) -> Any:
    """What a process told that played a scene."""
    pins = {"pins": msgspec.to_builtins(words.pop("pins"))} if "pins" in words else {}
    done = subprocess.run(
        [sys.executable, str(SCENES), scene, json.dumps({**words, **pins})],
        env=environment_of(settings)
        | {"HF_HUB_OFFLINE": str(int(settings.offline)), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Pinned, fetched, opened


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_is_pinned_fetched_and_answers_our_ops(
    publish: Publish, settings: Settings, repo: str, schema: str
) -> None:
    publish(repo, "_attention_cpu_1f", schema=schema)
    pinned = pin(settings, repo)
    assert pinned.build is not None
    assert (pinned.build.namespace, pinned.version) == ("_attention_cpu_1f", 1)
    assert [op.schema for op in pinned.build.ops] == [SCHEMAS[schema]]
    mirror = fetch(settings, pinned)
    found = play(settings, "answers", mirror=str(mirror), pins=[pinned])
    assert max(found.values()) < 2e-6, found
    files = {each.name for each in mirror.glob("kernels/*/build/*/**/*") if each.is_file()}
    assert files == {"metadata.json", "__init__.py", "_late.py", "_ops.py", "_C.abi3.so"}, (
        "no bytecode"
    )


def test_a_pin_survives_json_and_is_known_by_its_bytes_wherever_it_lies(
    publish: Publish, settings: Settings, repo: str, endpoint: Endpoint
) -> None:
    folder = publish(repo, "_attention_cpu_2f")
    first = pin(settings, repo)
    assert msgspec.json.decode(msgspec.json.encode(first), type=KernelPin) == first
    (folder / "README.md").write_text("words")
    push_kernel(endpoint, repo, folder)
    second = pin(settings, repo)
    assert second.commit != first.commit
    assert second.id == first.id


def test_a_version_is_a_branch_and_a_host_need_not_be_this_one(
    publish: Publish, settings: Settings, repo: str, endpoint: Endpoint
) -> None:
    variants = ["torch211-cxx11-cu130-x86_64-linux", "torch-stable-abi29-cu128-x86_64-linux"]
    publish(repo, "_attention_cuda_3f", variant=variants[0], archs=("8.0", "9.0a"))
    HfApi(endpoint.url, token=endpoint.token).create_branch(repo, branch="v1", repo_type="kernel")
    there = KernelHost("2.11.0+cu130", "13.0", "x86_64_v3", "linux")
    found = pin(settings, f"{repo}@1", there)
    assert found.build is not None
    assert (found.build.variant, found.archs) == (variants[0], ("8.0", "9.0a"))
    for other in (HERE, replace(there, cuda="12.9"), replace(there, machine="aarch64")):
        with pytest.raises(KernelArchUnsupported, match=variants[0]):
            pin(settings, repo, other)
    with pytest.raises(RepoNotFound):
        pin(settings, f"{repo}@2", there)


# Refused


def test_a_kernel_whose_commit_cannot_be_asked_is_not_pinned(
    publish: Publish, settings: Settings, repo: str
) -> None:
    publish(repo, "_attention_cpu_4f")
    with pytest.raises(HubUnreachable):
        pin(replace(settings, offline=True), repo)
    with pytest.raises(RepoNotFound):
        pin(settings, f"{repo}-which-is-not-there")


def test_a_kernel_that_lies_elsewhere_by_now_is_not_followed(
    publish: Publish, settings: Settings, repo: str, endpoint: Endpoint, proxy: Proxy
) -> None:
    folder = publish(repo, "_attention_cpu_5f")
    proxy.mutate = lambda told: told | {"id": "evil/kernel"} if "sha" in told else told
    with pytest.raises(RepoMoved, match="called evil/kernel now"):
        pin(settings, repo)
    proxy.mutate = None
    (folder / "kernel-status.toml").write_text(
        'kind = "redirect"\ndestination = "evil/kernel"\nrevision = "main"\n'
    )
    push_kernel(endpoint, repo, folder)
    with pytest.raises(KernelMissing, match="called evil/kernel by now"):
        pin(settings, repo)


@pytest.mark.parametrize("schema", ["gone(Tensor q) -> Tensor", ""])
def test_a_library_without_the_op_that_is_called_is_not_pinned(
    publish: Publish, settings: Settings, repo: str, schema: str
) -> None:
    publish(repo, "_attention_cpu_6f", schema=schema)
    with pytest.raises(KernelSchemaMismatch, match="define 0 ops fwd"):
        pin(settings, repo)


@pytest.mark.parametrize("how", ["flip", "endless"])
def test_bytes_that_are_others_than_were_pinned_are_never_in_the_mirror(
    publish: Publish, settings: Settings, repo: str, proxy: Proxy, how: str
) -> None:
    publish(repo, "_attention_cpu_7f")
    pinned = pin(settings, repo)
    shutil.rmtree(settings.home)  # where they are as they were
    proxy.matching = "_ops.py"
    setattr(proxy, how, True)
    with pytest.raises(KernelDigestMismatch):
        fetch(settings, pinned)
    assert [*settings.mirror.glob("kernels/*")] == []
    proxy.reset()
    fetch(settings, pinned)  # and not again what was kept of it


def test_pulls_of_one_kernel_at_once_all_have_it(
    publish: Publish, settings: Settings, repo: str
) -> None:
    publish(repo, "_attention_cpu_fe")
    pinned = pin(settings, repo)
    with ThreadPoolExecutor(4) as pool:
        assert len({*pool.map(lambda _: fetch(settings, pinned), range(8))}) == 1
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify_kernel(pinned)


def test_a_commit_that_is_gone_is_said_and_what_is_here_is_still_used(
    publish: Publish, settings: Settings, repo: str, endpoint: Endpoint
) -> None:
    publish(repo, "_attention_cpu_8f")
    pinned = pin(settings, repo)
    mirror = fetch(settings, pinned)
    HfApi(endpoint.url, token=endpoint.token).delete_repo(repo, repo_type="kernel")
    fetch(settings, pinned)
    offline = replace(settings, offline=True)
    fetch(offline, pinned)
    assert "ops" in play(settings, "opens", mirror=str(mirror), pins=[pinned])
    shutil.rmtree(settings.home)
    for asked, why in ((settings, "shows no such repo"), (offline, "HF_HUB_OFFLINE is set")):
        with pytest.raises(KernelMissing, match=f"{pinned} cannot be had: .*{why}") as refused:
            fetch(asked, pinned)
        assert "--recipe bfloat16-sdpa" in refused.value.hint


@pytest.mark.parametrize("how", ["flipped", "added", "bytecode", "link", "linked", "gone"])
def test_a_kernel_that_was_changed_in_the_mirror_is_set_apart(
    publish: Publish, settings: Settings, repo: str, how: str
) -> None:
    publish(repo, "_attention_cpu_9f")
    pinned = pin(settings, repo)
    fetch(settings, pinned)
    folder = next(settings.mirror.glob("kernels/*/build/*"))
    spoil(folder, how)
    with Mirror.open(settings.mirror) as mirror:
        with pytest.raises(KernelDigestMismatch):
            mirror.verify_kernel(pinned)
        assert not mirror.has_kernel(pinned)
    fetch(settings, pinned)
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify_kernel(pinned)


def spoil(folder: Path, how: str) -> None:
    """Change a build's folder."""
    if how == "flipped":
        library = folder / "_C.abi3.so"
        content = bytearray(library.read_bytes())
        content[len(content) // 2] ^= 1
        library.chmod(0o600)
        library.write_bytes(content)
    elif how == "added":
        (folder / "sitecustomize.py").write_text("")
    elif how == "bytecode":
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__/__init__.cpython-311.pyc").write_bytes(b"")
    elif how == "linked":
        kernel = folder.parent.parent
        kernel.rename(kernel.parent.parent / "elsewhere")
        kernel.symlink_to(kernel.parent.parent / "elsewhere")
    elif how == "link":
        (folder / "_ops.py").rename(folder.parent.parent.parent / "elsewhere.py")
        (folder / "_ops.py").symlink_to(folder.parent.parent.parent / "elsewhere.py")
    else:
        (folder / "__init__.py").unlink()


# Opened in one process


def test_one_process_has_one_build_of_a_kernel(
    publish: Publish, settings: Settings, repo: str
) -> None:
    publish(repo, "_attention_cpu_af")
    publish(f"{repo}-again", "_attention_cpu_bf")
    publish(f"{repo}-other", "_attention_cpu_af", schema="sgl-flash-attn3")
    first, again, other = (pin(settings, f"{repo}{name}") for name in ("", "-again", "-other"))
    mirror = str(fetch(settings, first, again, other))
    assert "ops" in play(settings, "opens", mirror=mirror, pins=[first, first])
    for second in (again, other):
        told = play(settings, "opens", mirror=mirror, pins=[first, second])
        assert told["error"] == "KernelConflict"
        assert "a process of its own" in told["hint"]


@pytest.mark.slow
def test_a_namespace_that_others_have_loaded_is_theirs_unless_it_is_the_same(
    publish: Publish, settings: Settings, repo: str
) -> None:
    same = publish(repo, "_attention_cpu_cf")
    pinned = pin(settings, repo)
    other = publish(f"{repo}-other", "_attention_cpu_cf", schema="vllm-flash-attn3")
    mirror = str(fetch(settings, pinned))
    words = {"mirror": mirror, "pins": [pinned]}
    assert "ops" in play(settings, "loads_and_opens", theirs=str(same), **words)
    told = play(settings, "loads_and_opens", theirs=str(other), **words)
    assert told["error"] == "KernelConflict"
    assert "_attention_cpu_cf" in told["message"]


def test_a_kernel_for_another_torch_is_refused_by_name(
    publish: Publish, settings: Settings, repo: str
) -> None:
    publish(repo, "_attention_cpu_df", variant=variant_here("2.9"))
    with pytest.raises(KernelArchUnsupported, match="torch29-cpu"):
        pin(settings, repo)
    pinned = pin(settings, repo, replace(HERE, torch="2.9.1"))
    told = play(settings, "opens", mirror=str(fetch(settings, pinned)), pins=[pinned])
    assert told["error"] == "KernelArchUnsupported"
    assert f"the kernel {pinned} is built for torch 2.9" in told["message"]


@pytest.mark.parametrize("size", [None, 2 << 20])
def test_a_kernel_that_says_nothing_of_itself_or_too_much_is_not_loaded(
    publish: Publish, settings: Settings, repo: str, size: int | None
) -> None:
    publish(repo, "_attention_cpu_0e")
    pinned = pin(settings, repo)
    fetch(settings, pinned)
    assert isinstance(pinned.files, tuple)
    files = [each for each in pinned.files if each.path != "metadata.json"]
    files += [] if size is None else [File(path="metadata.json", sha256="0" * 64, size=size)]
    other = replace(pinned, files=tuple(files))
    build = other.build
    assert build is not None
    # As if such a build lay there, which a manifest can say.
    (settings.mirror / "kernels" / build.digest).mkdir()
    told = play(settings, "opens", mirror=str(settings.mirror), pins=[other])
    assert told["error"] == "KernelDigestMismatch"
    assert "has no metadata.json of at most 1048576 bytes" in told["message"]


@pytest.mark.parametrize("change", [("is_causal = False", "is_causal = True"), ("bool", "Nothing")])
def test_an_op_that_is_called_otherwise_than_was_pinned_is_refused(
    publish: Publish, settings: Settings, repo: str, change: tuple[str, str]
) -> None:
    publish(repo, "_attention_cpu_ef")
    pinned = pin(settings, repo)
    assert pinned.build is not None
    schema = pinned.build.ops[0].schema.replace(*change)
    assert schema != pinned.build.ops[0].schema
    lying = replace(pinned, ops=(KernelOp("fwd", schema),))
    told = play(settings, "opens", mirror=str(fetch(settings, pinned)), pins=[lying])
    assert told["error"] == "KernelSchemaMismatch"
    assert f"was pinned as {schema}"[:100] in told["message"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("int sm_margin = 0", "int sm_margin = 0, bool dropped = False"), "has dropped"),
        (("Tensor? leftpad_k = None,", ""), "lacks leftpad_k"),
    ],
)
def test_an_op_that_nobody_knows_how_to_call_is_refused(
    publish: Publish, settings: Settings, repo: str, change: tuple[str, str], problem: str
) -> None:
    schema = SCHEMAS["flash-attn3"].replace(*change)
    assert schema != SCHEMAS["flash-attn3"]
    folder = publish(repo, "_attention_cpu_0e", schema=schema)
    with pytest.raises(KernelSchemaMismatch, match=problem):
        pin(settings, repo)
    pinned = pin_by_hand(folder, schema)  # as others may have
    assert pinned.build is not None
    with Mirror.open(settings.mirror) as mirror:
        files = next((folder / "build").iterdir())
        mirror.put_kernel(
            pinned.build, {each.path: files / each.path for each in pinned.build.files}
        )
    told = play(settings, "opens", mirror=str(settings.mirror), pins=[pinned])
    assert told["error"] == "KernelSchemaMismatch"
    assert problem in told["message"]


def pin_by_hand(folder: Path, schema: str) -> KernelPin:
    """The one build in a repo's folder, pinned by nobody who looked at it."""
    build = next((folder / "build").iterdir())
    metadata = json.loads((build / "metadata.json").read_text())
    return KernelPin(
        repo="acme/kernel",
        commit="a" * 40,
        variant=build.name,
        namespace=metadata["id"],
        files=tuple(make_file_entry(build, each.name) for each in sorted(build.iterdir())),
        ops=(KernelOp("fwd", schema),),
    )


# Of artifacts


@pytest.fixture(scope="module")
def attending(built_at: Settings, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A module over `hubaoti::fa3_fwd`, compiled where plain torch answers it."""
    module = Attending().eval()
    with answer_by_reference("cpu"), torch.no_grad():
        with hubaoti.capture(module) as calls:
            module(*make_tensors(2, 6))
            module(*make_tensors(5, 9))
        folder = tmp_path_factory.mktemp("attending") / "bundle"
        return api.compile(module, folder, calls=calls, settings=built_at)


def bundle_with(bundle: Bundle, folder: Path, *pins: KernelPin) -> Bundle:
    """The same graphs, which are to be answered by pinned kernels."""
    shutil.copytree(bundle.path, folder)
    requires = replace(bundle.manifest.requires, kernels=pins)
    schema = find_oldest_schema(bundle.manifest.build, bundle.manifest.graphs, pins)
    manifest = msgspec.structs.replace(bundle.manifest, requires=requires, schema=schema)
    write_manifest(folder, manifest)
    return Bundle(folder, manifest)


@pytest.fixture
def push(
    attending: Bundle, settings: Settings, tmp_path: Path
) -> Callable[[str, KernelPin], Bundle]:
    """Publish the module's graphs with a pin."""

    def send(repo: str, pinned: KernelPin) -> Bundle:
        bundle = bundle_with(attending, tmp_path / f"bundle-{pinned.id[:6]}", pinned)
        api.push(bundle, repo, as_is=True, settings=settings)
        return bundle

    return send


@pytest.mark.slow
def test_one_graph_is_answered_by_three_builds_of_other_namespaces(
    publish: Publish, push: Callable[..., Bundle], settings: Settings, repo: str
) -> None:
    for schema in ("flash-attn3", "vllm-flash-attn3", "sgl-flash-attn3"):
        kernel, built = f"{repo}-{schema}-kernel", f"{repo}-{schema}"
        publish(kernel, f"_{schema.replace('-', '_')}_cpu_1a", schema=schema)
        push(built, pin(settings, kernel))
        told = play(settings, "attaches", repos=[built], trust=True)
        assert told[built]["off"] < 1e-5
        assert told[built]["compiled"] == 1


@pytest.mark.slow
def test_the_second_build_in_a_process_is_refused_and_the_first_goes_on(
    publish: Publish, push: Callable[..., Bundle], settings: Settings, repo: str
) -> None:
    for name in ("one", "two"):
        publish(f"{repo}-{name}-kernel", f"_attention_cpu_{name}")
        push(f"{repo}-{name}", pin(settings, f"{repo}-{name}-kernel"))
    told = play(settings, "attaches", repos=[f"{repo}-one", f"{repo}-two"], trust=True)
    assert told["error"] == "KernelConflict"
    again = play(settings, "attaches", repos=[f"{repo}-two", f"{repo}-two"], trust=True)
    assert again[f"{repo}-two"]["off"] < 1e-5


@pytest.fixture
def pushed(
    publish: Publish, push: Callable[..., Bundle], settings: Settings, repo: str
) -> tuple[Bundle, KernelPin]:
    """An artifact in `repo`, and the kernel that it pins, in `repo`-kernel."""
    publish(f"{repo}-kernel", "_attention_cpu_2a")
    pinned = pin(settings, f"{repo}-kernel")
    return push(repo, pinned), pinned


def test_a_pull_brings_the_kernel_and_what_was_pulled_opens_without_a_network(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    commit = api.pull(repo, trust=True, settings=settings).commit
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify_kernel(pushed[1])
    offline = replace(settings, offline=True)
    name = f"{repo}@{commit}"
    assert play(offline, "attaches", repos=[name])[name]["off"] < 1e-5


def test_explain_says_which_kernel_is_called_and_who_has_to_be_trusted_for_it(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    said = inside(settings, "explain", repo).out
    assert f"    calls the kernel {pushed[1]}: acme has to be trusted, too\n" in said
    (artifact,) = json.loads(inside(settings, "explain", repo, "--json").out)["artifacts"]
    assert artifact["kernels"] == [str(pushed[1])]


def test_a_kernel_that_is_missing_offline_is_named(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    pulled = api.pull(repo, trust=True, settings=settings)
    shutil.rmtree(settings.mirror / "kernels")
    offline = replace(settings, offline=True)
    with pytest.raises(KernelMissing, match=str(pushed[1])):
        api.pull(f"{repo}@{pulled.commit}", settings=offline)
    told = play(offline, "attaches", repos=[f"{repo}@{pulled.commit}"])
    assert told["error"] == "KernelMissing"
    assert api.pull(f"{repo}@{pulled.commit}", settings=settings).from_mirror  # and brings it back
    assert [*settings.mirror.glob("kernels/*")]


def test_a_kernel_whose_publisher_is_not_trusted_is_not_fetched(
    publish: Publish, push: Callable[..., Bundle], settings: Settings, repo: str
) -> None:
    kernel = f"stranger/{repo.partition('/')[2]}"
    publish(kernel, "_attention_cpu_3a")
    push(repo, pin(settings, kernel))
    Trust(settings.trust).add(settings.endpoint, "acme")
    with pytest.raises(Untrusted, match=f"stranger publishes the kernel {kernel}"):
        api.pull(repo, settings=settings)
    with pytest.raises(Untrusted, match="stranger publishes the kernel") as why:
        api.pull(repo, trust=True, settings=settings)  # which names acme alone
    assert "hubaoti trust add stranger; or pull a recipe that calls no kernel" in why.value.hint
    assert not [*settings.mirror.glob("kernels/*")]
    Trust(settings.trust).add(settings.endpoint, "stranger")
    commit = api.pull(repo, settings=settings).commit
    Trust(settings.trust).remove(settings.endpoint, "stranger")
    with pytest.raises(Untrusted, match="stranger publishes the kernel"):
        api.pull(f"{repo}@{commit}", settings=settings)


@pytest.mark.slow
def test_a_bundle_brings_its_kernel_where_it_is_attached(
    pushed: tuple[Bundle, KernelPin], settings: Settings
) -> None:
    bundle, pinned = pushed
    Trust(settings.trust).add_artifact(bundle.manifest.digest)  # which says nothing of its kernel
    told = play(settings, "attaches_bundle", folder=str(bundle.path), trust=False)
    assert told["error"] == "Untrusted"
    Trust(settings.trust).add(settings.endpoint, "acme")
    told = play(settings, "attaches_bundle", folder=str(bundle.path), trust=False)
    assert told["off"] < 1e-5
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify_kernel(pinned)


def test_what_opens_a_bundle_on_a_card_step_by_step_opens_its_kernel_too(
    pushed: tuple[Bundle, KernelPin], settings: Settings
) -> None:
    Trust(settings.trust).add(settings.endpoint, "acme")
    done = subprocess.run(
        [sys.executable, "-P", openings.__file__, "cpu", str(pushed[0].path)],
        env=environment_of(settings) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=200,
    )
    steps = [line.split(" ms ")[1] for line in done.stdout.splitlines() if "step " in line]
    assert steps[1:] == ["kernels opened", "root opened", "root bound", "root called", "done"], (
        done.stderr[-2000:]
    )


def test_an_artifact_whose_kernel_is_not_there_is_not_pushed(
    pushed: tuple[Bundle, KernelPin],
    attending: Bundle,
    settings: Settings,
    repo: str,
    tmp_path: Path,
) -> None:
    elsewhere = replace(pushed[1], commit="d" * 40)
    bundle = bundle_with(attending, tmp_path / "elsewhere", elsewhere)
    with pytest.raises(KernelMissing, match=str(elsewhere)):
        api.push(bundle, repo, as_is=True, settings=settings)
    assert pushed[1].build is not None
    files = tuple(
        msgspec.structs.replace(file, size=file.size + 1) for file in pushed[1].build.files
    )
    bundle = bundle_with(attending, tmp_path / "other", replace(pushed[1], files=files))
    with pytest.raises(KernelMissing, match="is not there as it was pinned"):
        api.push(bundle, repo, as_is=True, settings=settings)


def test_a_graph_without_a_kernel_for_its_op_is_refused_before_it_is_called(
    attending: Bundle, settings: Settings, tmp_path: Path
) -> None:
    bundle = bundle_with(attending, tmp_path / "bare")
    with pytest.raises(MissingOps, match="calls hubaoti::fa3_fwd, an op that is not registered"):
        hubaoti.attach(Attending().eval(), bundle, trust=True, settings=settings)


def test_an_op_of_ours_that_is_declared_otherwise_than_graphs_were_compiled_for_is_refused(
    attending: Bundle, tmp_path: Path
) -> None:
    (graph,) = attending.manifest.graphs
    unpack_all(attending.path / graph.file, tmp_path)
    name, (schema,) = "hubaoti::fa3_fwd", (graph.schemas or {}).values()
    assert f"{name}{schema}" == str(torch.ops.hubaoti.fa3_fwd.default._schema)
    other = schema.replace("float scale, bool causal", "bool causal, float scale")
    with answer_by_reference("cpu"):
        require_ops(tmp_path, graph, torch.device("cpu"))
        changed = msgspec.structs.replace(graph, schemas={name: other})
        with pytest.raises(KernelSchemaMismatch) as refused:
            require_ops(tmp_path, changed, torch.device("cpu"))
    assert f"{name}{schema}" in str(refused.value) and f"{name}{other}" in str(refused.value)
    assert "the version of hubaoti" in refused.value.hint


def test_a_kernel_that_was_changed_is_not_opened_with_its_artifact(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    pulled = api.pull(repo, trust=True, settings=settings)
    spoil(next(settings.mirror.glob("kernels/*/build/*")), "flipped")
    told = play(settings, "attaches", repos=[f"{repo}@{pulled.commit}"])
    assert told["error"] == "KernelDigestMismatch"
    told = play(settings, "attaches", repos=[f"{repo}@{pulled.commit}"])  # which fetches it again
    assert told[f"{repo}@{pulled.commit}"]["off"] < 1e-5


def test_a_kernel_that_ends_its_process_is_never_loaded_here(
    publish: Publish, push: Callable[..., Bundle], settings: Settings, repo: str
) -> None:
    """Torch ends a process for a schema that it cannot read."""
    schema = SCHEMAS["flash-attn3"].replace("bool is_causal", "Nothing is_causal")
    publish(f"{repo}-kernel", "_attention_cpu_4a", schema=schema)
    pinned = pin(settings, f"{repo}-kernel")
    bundle = push(repo, pinned)
    for _ in range(2):  # the second time it is known
        told = play(settings, "attaches", repos=[repo], trust=True)
        assert told["error"] == "Quarantined"
        assert "as its kernels were loaded, it crashed its process (SIGABRT)" in told["message"]
        assert pinned.full_name in told["message"] and variant_here() in pinned.full_name
        assert "--recipe bfloat16-sdpa" in told["hint"]
        assert find_held_against(settings, bundle) and not [*settings.mirror.glob("quarantine/*")]


def find_held_against(settings: Settings, bundle: Bundle) -> str | None:
    """What is known of the first open of a bundle's graph, with its kernel."""
    with Mirror.open(settings.mirror) as mirror:
        artifact = Artifact(bundle.manifest.digest, bundle.path, bundle.path, bundle.manifest)
        history = OpenHistory.on(mirror, torch.device("cpu"), (), artifact)
        return history.find_problem(bundle.manifest.graphs[0])


@pytest.mark.parametrize(
    ("does", "problem"),
    [
        ("refuses", "failed: this build is not for you"),
        ("crashes", "it crashed its process (SIGABRT); it calls the kernel"),
    ],
)
def test_a_kernel_that_fails_when_it_is_first_called_is_named_and_remembered(
    publish: Publish,
    push: Callable[..., Bundle],
    settings: Settings,
    repo: str,
    does: str,
    problem: str,
) -> None:
    publish(f"{repo}-kernel", f"_{does}_cpu_4b")
    pinned = pin(settings, f"{repo}-kernel")
    bundle = push(repo, pinned)
    told = play(settings, "attaches", repos=[repo], trust=True)
    assert told["error"] == "Quarantined"
    assert problem in told["message"] and pinned.full_name in told["message"]
    assert "--attention sdpa" in told["hint"] and "try again" not in told["hint"]
    assert find_held_against(settings, bundle)
    apart = [*settings.mirror.glob("quarantine/*")]
    assert len(apart) == (does == "crashes"), "of a refusal the graph is not to blame"


def test_a_module_answers_itself_what_a_kernel_refuses_and_says_which(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    for told in play(settings, "answers_itself", repo=repo):
        assert told["off"] < 1e-5 and told["eager"]["kernel"] == 1, told
        (said,) = told["told"]
        assert f"the kernel {pushed[1].full_name} failed: this build takes no 7 rows" in said
        assert 'hubaoti.pull(repo, recipe="bfloat16-sdpa")' in said


@pytest.mark.slow
def test_each_worker_of_a_space_opens_the_kernel_that_was_pulled(
    pushed: tuple[Bundle, KernelPin], settings: Settings, repo: str
) -> None:
    told = play(settings, "serves_workers", repo=repo)
    assert [each["off"] < 1e-5 for each in told] == [True] * 3, told
    assert [each["compiled"] for each in told[1:]] == [1, 1]


# Judged


@pytest.mark.parametrize("sm", [80, 120])
def test_a_host_of_another_capability_is_told_to_take_sdpa(
    publish: Publish, settings: Settings, repo: str, sm: int
) -> None:
    variant = "torch213-cxx11-cu130-x86_64-linux"
    publish(repo, "_attention_cuda_5a", variant=variant, archs=("9.0a",))
    there = KernelHost("2.13.0+cu130", "13.0", "x86_64_v3", "linux")
    pinned = pin(settings, repo, there)
    host = replace(make_gpu_host(), gpus=(Gpu("fake", sm, 1 << 34),))
    verdict = judge(replace(CUDA, sm=sm, kernels=(pinned,)), host)
    assert [refusal.need for refusal in verdict.refusals] == [f"9.0a for the kernel {repo}"]
    assert "sdpa" in verdict.refusals[0].advice
    fits = judge(replace(CUDA, kernels=(pinned,)), make_gpu_host())
    assert fits.fit is MatchResult.EXACT
    offline = judge(replace(CUDA, kernels=(pinned,)), make_gpu_host(offline=True))
    assert [refusal.need for refusal in offline.refusals] == [f"the kernels {pinned}"]
    kept = make_gpu_host(offline=True, kernels=frozenset({pinned.id}))
    assert judge(replace(CUDA, kernels=(pinned,)), kept).fit is MatchResult.EXACT


def test_the_mirror_tells_the_host_which_kernels_need_no_network(
    publish: Publish, settings: Settings, repo: str
) -> None:
    publish(repo, "_attention_cpu_6a")
    pinned = pin(settings, repo)
    fetch(settings, pinned)
    assert pinned.id in probe_host(settings).kernels


@pytest.mark.parametrize(("is_here", "best"), [(True, "fa3"), (False, "sdpa")])
def test_fa3_goes_before_sdpa_where_its_kernel_is_at_hand(
    publish: Publish, settings: Settings, repo: str, is_here: bool, best: str
) -> None:
    variant = "torch213-cxx11-cu130-x86_64-linux"
    publish(repo, "_attention_cuda_7a", variant=variant, archs=("9.0a",))
    pinned = pin(settings, repo, KernelHost("2.13.0+cu130", "13.0", "x86_64_v3", "linux"))
    host = make_gpu_host(offline=True, kernels=frozenset({pinned.id} if is_here else ()))
    requires = {"sdpa": CUDA, "fa3": replace(CUDA, kernels=(pinned,))}
    candidates = [
        Candidate(Recipe("bfloat16", name), each.variant, judge(each, host), name)
        for name, each in requires.items()
    ]
    assert rank(candidates)[0].id == best
    reasons = [found.need for each in candidates for found in each.verdict.refusals]
    assert reasons == ([] if is_here else [f"the kernels {pinned}"])
