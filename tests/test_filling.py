"""What a repo lacks for this host is compiled here, once, and pushed back for all others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from bundles import CPU, CUDA, make_bundle, make_gpu_host, make_host
from commands import inside
from huggingface_hub import HfApi
from planned import OLD, Building, end_builds, make_built, plan_job, store_built
from proxies import Proxy
from test_hub_crash import start
from torch import nn

import hubaoti
from hubaoti import errors
from hubaoti.api.filling import choose_pattern, read_build_options
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import ModelSource
from hubaoti.artifact.variant import Recipe
from hubaoti.compiler.job import Job
from hubaoti.host.probe import Gpu
from hubaoti.hub.catalog import Catalog
from hubaoti.hub.keys import make_key_pair
from hubaoti.hub.layout import RepoRef, artifact_path
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

WORDS: dict[str, Any] = {"dims": {"batch": (1, 3), "seq": (1, 24)}}


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that would take its time ends as it begins."""
    end_builds(monkeypatch)


@pytest.fixture(scope="module")
def job(tiny_roberta: Path, built_at: Settings) -> Job:
    """What the tiny classifier would be built as, with dims of the repo's own."""
    return plan_job(tiny_roberta, built_at, **WORDS)


@pytest.fixture(scope="module")
def source(tiny_roberta: Path, endpoint: Endpoint) -> ModelSource:
    """The tiny classifier as a model of the Hub."""
    hub, name = HfApi(endpoint.url, token=endpoint.token), "acme/tiny-roberta"
    hub.create_repo(name)
    made = hub.upload_folder(
        repo_id=name, folder_path=tiny_roberta, ignore_patterns=["*.safetensors"]
    )
    return ModelSource(model=name, commit=made.oid)


@pytest.fixture
def held(tmp_path: Path, repo: str, settings: Settings, job: Job, source: ModelSource) -> Bundle:
    """The repo's only artifact, which is for another torch than any machine here has."""
    bundle = make_built(tmp_path / "old", job, source, OLD)
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    return bundle


@pytest.fixture
def built(tmp_path: Path, settings: Settings, job: Job, source: ModelSource) -> Bundle:
    """What this machine would compile, in its mirror: it finds it by its key."""
    bundle = make_built(tmp_path / "built", job, source)
    store_built(bundle, settings)
    return bundle


def fill(repo: str, settings: Settings, **words: Any) -> Any:
    """A pull that compiles what is missing."""
    words = {"missing": "compile", "trust": True} | words
    return hubaoti.pull(repo, settings=settings, **words)


def test_what_a_repo_lacks_is_compiled_as_its_others_were_and_pushed_to_it(
    repo: str, held: Bundle, built: Bundle, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(errors.NoMatch):
        hubaoti.pull(repo, trust=True, settings=settings)
    first = fill(repo, settings, push_back=True)
    assert first.compiled and first.artifact.digest == built.manifest.digest
    assert first.notes == (f"pushed to {repo} at {first.commit}",)
    other = replace(settings, home=tmp_path / "other")
    for pulled in (hubaoti.pull(repo, trust=True, settings=other), fill(repo, other)):
        assert not pulled.compiled and pulled.artifact.digest == built.manifest.digest
        assert (pulled.commit, pulled.place) == (first.commit, first.place)
    again = fill(repo, settings, push_back=True)
    assert not again.compiled and again.commit == first.commit
    assert not any((settings.home / "fill").iterdir())


def test_what_is_pushed_back_is_signed_with_the_key_that_is_named(
    repo: str, held: Bundle, built: Bundle, settings: Settings, tmp_path: Path
) -> None:
    key, words = tmp_path / "key.pem", ("pull", repo, "--trust", "--missing", "compile")
    make_key_pair(key)
    done = inside(settings, *words, "--sign", key)
    assert done.code == errors.BadRequest.exit_code and "--push-back" in done.err
    done = inside(settings, *words, "--push-back", "--sign", key)
    assert done.code == 0 and f"pushed to {repo} at" in done.out, done
    owner, reader = repo.partition("/")[0], replace(settings, home=tmp_path / "reader")
    assert inside(reader, "trust", "add", owner, "--key", key.with_suffix(".pub")).code == 0
    assert hubaoti.pull(repo, settings=reader).artifact.digest == built.manifest.digest


def test_a_repo_that_has_nothing_at_all_needs_a_model(
    repo: str, job: Job, source: ModelSource, settings: Settings, tmp_path: Path, tiny_roberta: Path
) -> None:
    hub = HfApi(settings.endpoint, token=settings.token)
    hub.create_repo(repo)
    with pytest.raises(errors.NoModel, match="nothing says of which model") as caught:
        fill(repo, settings)
    assert "--model" in caught.value.hint
    with pytest.raises(errors.NoModel):
        hubaoti.attach(nn.Linear(1, 1), repo, missing="compile", settings=settings)
    steps: list[str] = []
    with pytest.raises(Building):
        fill(repo, settings, model=tiny_roberta, progress=steps.append)
    assert f"compiling {tiny_roberta} for {repo}" in steps
    card = f"---\nbase_model: {source.model}\n---\n# Mine\n".encode()
    hub.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    with pytest.raises(Building):
        fill(repo, settings, progress=steps.append)
    assert f"compiling {source.model} for {repo}" in steps


def test_what_was_made_of_no_model_of_the_hub_says_so(
    repo: str, job: Job, settings: Settings, tmp_path: Path
) -> None:
    bundle = make_built(tmp_path / "own", job, ModelSource(model="MyModule"), OLD)
    push_bundles([bundle], Destination(RepoRef(repo)), settings)
    done = inside(settings, "pull", repo, "--trust", "--missing", "compile")
    assert done.code == errors.NoModel.exit_code == 61
    assert "'MyModule', which the Hub has not" in done.err and "--model" in done.err


def test_a_stranger_s_words_are_not_compiled_by(
    repo: str, held: Bundle, built: Bundle, settings: Settings
) -> None:
    with pytest.raises(errors.Untrusted, match="the options of float32-sdpa"):
        fill(repo, settings, trust=False)


def test_what_may_not_be_pushed_is_of_use_here_and_that_is_said(
    repo: str, held: Bundle, built: Bundle, settings: Settings
) -> None:
    reader = replace(settings, token=None)
    words = ("pull", repo, "--trust", "--missing", "compile", "--push-back")
    done = inside(reader, *words)
    assert done.code == 0, done
    assert "compiled here" in done.out and f"it is not pushed to {repo}: " in done.out
    assert "set HF_TOKEN" in done.out
    done = inside(settings, *words, "--json")  # and is pushed as soon as it may be
    facts = json.loads(done.out)
    assert facts["compiled"] and facts["digest"] == built.manifest.digest
    assert facts["notes"] == [f"pushed to {repo} at {facts['commit']}"]


@pytest.fixture
def theirs(tmp_path: Path, repo: str, settings: Settings, job: Job, source: ModelSource) -> Bundle:
    """What acme built of this very key, and this machine pulled once."""
    bundle = make_built(tmp_path / "theirs", job, source)
    files = {each.path: bundle.path / each.path for each in bundle.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        origin = PullOrigin(settings.endpoint, "acme/other", "a" * 40, "path")
        mirror.put(bundle.manifest, files, origin)
    return bundle


def test_what_somebody_else_built_is_found_and_not_called_compiled_here(
    repo: str, held: Bundle, theirs: Bundle, settings: Settings
) -> None:
    done = inside(settings, "pull", repo, "--trust", "--missing", "compile")
    assert done.code == 0 and theirs.manifest.digest[:12] in done.out, done
    assert "from the mirror" in done.out and "compiled here" not in done.out


def test_what_somebody_else_built_is_compiled_here_before_it_is_pushed_back(
    repo: str, held: Bundle, theirs: Bundle, settings: Settings, hub: HfApi
) -> None:
    before = hub.repo_info(repo).sha
    with pytest.raises(Building):
        fill(repo, settings, push_back=True)
    assert hub.repo_info(repo).sha == before


def test_a_push_back_that_failed_is_said_to_who_wants_to_hear_nothing(
    repo: str, held: Bundle, built: Bundle, settings: Settings
) -> None:
    reader = replace(settings, token=None)
    done = inside(reader, "pull", repo, "--trust", "--missing", "compile", "--push-back", "-q")
    assert (done.code, done.out) == (0, "")
    assert f"it is not pushed to {repo}: " in done.err and "HF_TOKEN" in done.err


def test_a_machine_that_was_faster_keeps_its_place(
    repo: str, held: Bundle, built: Bundle, job: Job, settings: Settings, tmp_path: Path
) -> None:
    theirs = make_built(tmp_path / "theirs", job, ModelSource(model="another/source"))
    assert theirs.manifest.key == built.manifest.key

    def race(step: str) -> None:
        if step.startswith("compiling"):
            push_bundles([theirs], Destination(RepoRef(repo)), settings)

    found = fill(repo, settings, push_back=True, progress=race)
    assert found.compiled and found.artifact.digest == built.manifest.digest
    assert found.notes[0].startswith("another machine pushed")
    other = replace(settings, home=tmp_path / "other")
    pulled = hubaoti.pull(repo, trust=True, settings=other)
    assert pulled.artifact.digest == theirs.manifest.digest


FILL = """
import sys
from pathlib import Path
import hubaoti
from hubaoti.settings import Settings
home, endpoint, token, repo = sys.argv[1:5]
settings = Settings(home=Path(home), endpoint=endpoint, token=token)
found = hubaoti.pull(repo, trust=True, missing="compile", push_back=True, settings=settings)
print(found.compiled, found.artifact.digest)
"""


def test_of_many_processes_that_miss_it_one_compiles_and_pushes(
    repo: str, held: Bundle, built: Bundle, settings: Settings, proxy: Proxy
) -> None:
    proxy.reset()
    asked = [start(FILL, settings, repo) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in asked]
    assert [process.returncode for process in asked] == [0] * 3, said
    outcomes = sorted(out.split() for out, _ in said)
    assert outcomes == [[word, built.manifest.digest] for word in ("False", "False", "True")]
    commits = [path for method, path in proxy.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 1


def test_a_compile_that_fails_leaves_its_report_and_no_bundle(
    repo: str, held: Bundle, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise errors.CompileFailed("lower: no such op", hint="try another torch")

    monkeypatch.setattr("hubaoti.compiler.build.build_unit", fail)
    with pytest.raises(errors.CompileFailed, match="no such op") as caught:
        fill(repo, settings)
    (report,) = (settings.home / "fill").iterdir()
    assert str(report) in caught.value.hint and "no such op" in report.read_text()


def test_the_artifact_gone_by_is_of_the_recipe_the_device_and_the_newest_torch(
    tmp_path: Path,
) -> None:
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "old": ({**CPU, "torch": "2.9.0+cpu"}, {}),
        "new": ({**CPU, "torch": "2.12.0+cpu"}, {}),
        "gpu": (CUDA, {}),
        "int8wo": (CPU, {"quantization": "int8wo"}),
    }
    bundles = {
        name: make_bundle(tmp_path / name, target, **build)
        for name, (target, build) in made.items()
    }
    places = {name: artifact_path(bundle.manifest) for name, bundle in bundles.items()}
    manifests = {places[name]: bundle.manifest for name, bundle in bundles.items()}
    catalog = Catalog("acme/tiny", "a" * 40, {}, {**manifests}, (), (*manifests,))
    assert choose_pattern(catalog, None, "cpu") == places["new"]
    assert choose_pattern(catalog, None, "cuda") == places["gpu"]
    assert choose_pattern(catalog, Recipe.parse("float32-sdpa-int8wo"), "cuda") == places["int8wo"]
    assert choose_pattern(replace(catalog, artifacts={}), None, "cpu") is None


def test_another_device_takes_over_what_it_can_have(tmp_path: Path) -> None:
    options = {"cpp.weight_prepack": False, "epilogue_fusion": False, "max_autotune": True}
    bundle = make_bundle(tmp_path / "x", CUDA, attention="fa3", mode="default", options=options)
    hopper = make_gpu_host()
    ampere = replace(hopper, gpus=(Gpu("fake A100", 80, 80 << 30),))
    said = {
        device: read_build_options(bundle.manifest, device.partition(" ")[0], host)
        for device, host in {"cuda 90": hopper, "cuda 80": ampere, "cpu": make_host()}.items()
    }
    assert [each["attention"] for each in said.values()] == ["fa3", None, None]
    given = {"epilogue_fusion": False, "max_autotune": True}
    assert [each["inductor"] for each in said.values()] == [
        given,
        given,
        {"epilogue_fusion": False},
    ]


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "another word": ({"missing": "ignore"}, "there is compile"),
    "a push of nothing": ({"missing": None, "push_back": True}, "--missing compile"),
    "a model of nothing": ({"missing": None, "model": "acme/tiny"}, "--missing compile"),
    "a path": ({"path": "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"}, "one of them"),
    "a lockfile": ({"locked": True}, "one of them"),
    "another host": ({"host": "host.json"}, "one of them"),
}


@pytest.mark.parametrize("case", ODD)
def test_words_that_say_nothing_of_what_is_missing_are_refused(
    case: str, settings: Settings, proxy: Proxy
) -> None:
    words, advice = ODD[case]
    with pytest.raises(errors.BadRequest) as caught:
        fill("acme/any", settings, **words)
    assert advice in caught.value.hint
    assert proxy.requests == []


@pytest.mark.parametrize("revision", ["v1", "main"])
def test_what_is_pushed_back_would_not_be_at_another_revision(
    revision: str, settings: Settings
) -> None:
    with pytest.raises(errors.BadRequest, match="default branch"):
        fill(f"acme/any@{revision}", settings, push_back=True)
    with pytest.raises(errors.BadRequest, match="is taken or nothing"):
        fill(f"acme/any@sha256:{'a' * 64}", settings)
    locked = replace(settings, lock=settings.home / "hubaoti.lock")
    with pytest.raises(errors.BadRequest, match="HUBAOTI_LOCK"):
        fill("acme/any", locked)


def test_what_run_lacks_is_compiled_and_answers(
    repo: str, held: Bundle, roberta_bundle: Bundle, tiny_roberta: Path, settings: Settings
) -> None:
    store_built(roberta_bundle, settings)
    hub = HfApi(settings.endpoint, token=settings.token)
    hub.delete_folder(str(held.manifest.recipe), repo_id=repo)  # of dims that nobody has built
    ours = {"settings": settings, "missing": "compile", "push_back": True}
    run = ("run", repo, "--model", tiny_roberta, "--text", "cat", "--json")
    first = inside(settings, *run, "--trust", "--missing", "compile", "--push-back")
    assert first.code == 0, first
    again = hubaoti.run(repo, tiny_roberta, ["cat"], settings=settings)  # as it is in the repo now
    assert again.values.tolist() == json.loads(first.out)["values"]
    words = ("run", "--model", tiny_roberta, "--prompt", "cat", "--missing", "compile")
    assert "of what REPO lacks" in inside(settings, *words).err
    with pytest.raises(errors.BadRequest, match="nothing is missing"):
        hubaoti.load(roberta_bundle, tiny_roberta, **ours)
