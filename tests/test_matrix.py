"""`hubaoti compile --matrix`: what repos lack is compiled and pushed, one build after the other."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import CPU, changed, make_bundle
from commands import HUBAOTI, environment_of, inside
from huggingface_hub import HfApi
from planned import Building, end_builds, make_built, plan_job, store_built
from proxies import Proxy

import hubaoti
from hubaoti import errors
from hubaoti.api.compiling import CompileOptions
from hubaoti.api.matrix import Entry
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Direct, ModelSource
from hubaoti.compiler.job import Job
from hubaoti.engines.background_compile import Outcome, Work
from hubaoti.engines.background_compile import _run_work as run_work
from hubaoti.hub.keys import make_key_pair
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings

Write = Callable[..., Path]
WORDS: dict[str, Any] = {"dims": {"batch": (1, 2), "seq": (1, 20)}}
DIMS = "dims = { batch = [1, 2], seq = [1, 20] }"


@pytest.fixture(autouse=True)
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that would take its time ends as it begins."""
    end_builds(monkeypatch)


@pytest.fixture(scope="module")
def job(tiny_roberta: Path, built_at: Settings) -> Job:
    """What the tiny classifier would be built as."""
    return plan_job(tiny_roberta, built_at, **WORDS)


@pytest.fixture
def built(tmp_path: Path, settings: Settings, job: Job) -> Bundle:
    """What this machine would compile, in its mirror: it finds it by its key."""
    bundle = make_built(tmp_path / "built", job, ModelSource(model="tiny-roberta"))
    store_built(bundle, settings)
    return bundle


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a table of builds, each given as the lines of its fields."""

    def write(*builds: str) -> Path:
        path = tmp_path / "matrix.toml"
        path.write_text("".join(f"[[build]]\n{each}\n\n" for each in builds))
        return path

    return write


def test_what_repos_lack_is_pushed_and_a_second_run_does_nothing(
    repo: str, built: Bundle, write: Write, tiny_roberta: Path, settings: Settings, tmp_path: Path
) -> None:
    other = f"{repo}-other"
    path = write(
        f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{DIMS}',
        f'model = "acme/nowhere"\nrepo = "{repo}"',
        f'model = "{tiny_roberta}"\nrepo = "{other}"\nrecipe = "float32-sdpa+mine"\n{DIMS}',
    )
    place = f"float32-sdpa/{built.manifest.variant}"
    first = inside(settings, "compile", "--matrix", path, "--quiet", "--json")
    assert first.code == errors.ModelNotFound.exit_code
    assert "1 of 3 builds failed; the first, acme/nowhere for cpu: " in first.err
    facts = json.loads(first.out)
    assert [each["state"] for each in facts] == ["pushed", "failed", "pushed"]
    assert [each["path"] for each in facts] == [place, None, place.replace("sdpa", "sdpa+mine", 1)]
    second = inside(settings, "compile", "--matrix", path)
    assert second.code == first.code
    assert f"{repo} {place} is there already\n" in second.out
    assert f"{repo}, acme/nowhere for cpu failed: " in second.out
    for name in (repo, other):
        pulled = hubaoti.pull(name, trust=True, settings=replace(settings, home=tmp_path / "other"))
        assert pulled.artifact.digest == built.manifest.digest
        assert len(HfApi(settings.endpoint, token=settings.token).list_repo_commits(name)) == 2
    assert not any((settings.home / "fill").iterdir())


def test_what_somebody_else_built_is_compiled_here_before_it_is_published(
    repo: str, write: Write, tiny_roberta: Path, settings: Settings, job: Job, tmp_path: Path
) -> None:
    theirs = make_built(tmp_path / "theirs", job, ModelSource(model="tiny-roberta"))
    files = {each.path: theirs.path / each.path for each in theirs.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        origin = PullOrigin(settings.endpoint, "acme/other", "a" * 40, "path")
        mirror.put(theirs.manifest, files, origin)
        mirror.trust.add(settings.endpoint, "acme")
    path = write(f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{DIMS}')
    done = inside(settings, "compile", "--matrix", path, "--dry-run")
    assert done.out.rstrip().endswith("is missing"), "what is theirs is not built already"
    with pytest.raises(Building):
        [*hubaoti.compile_matrix(path, settings=settings)]
    store_built(make_built(tmp_path / "ours", job, ModelSource(model="ours")), settings)
    (outcome,) = hubaoti.compile_matrix(path, settings=settings)
    assert outcome.state == "pushed", "of both, its own"


def test_what_an_engine_pushes_was_built_here(
    repo: str, tiny_roberta: Path, settings: Settings, job: Job, tmp_path: Path
) -> None:
    theirs = make_built(tmp_path / "theirs", job, ModelSource(model="tiny-roberta"))
    files = {each.path: theirs.path / each.path for each in theirs.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        artifact = mirror.put(theirs.manifest, files, PullOrigin(repo="acme/other"))
        mirror.trust.add_artifact(artifact.digest)
    work = Work(str(tiny_roberta), WORDS, None, settings.to_env())
    found = run_work(work)
    assert isinstance(found, Outcome) and found.digest == artifact.digest
    with pytest.raises(Building):
        run_work(msgspec.structs.replace(work, push=repo))


def test_what_is_not_published_for_it_is_compiled_here_as_the_hint_says(
    repo: str, tiny_roberta: Path, settings: Settings, job: Job, tmp_path: Path
) -> None:
    theirs = make_built(tmp_path / "theirs", job, ModelSource(model="tiny-roberta"))
    with pytest.raises(errors.NotBuiltHere) as why:
        hubaoti.push(theirs, repo, settings=settings)
    assert "--force" in why.value.hint
    Trust(settings.trust).add_artifact(theirs.manifest.digest)
    words: dict[str, Any] = {**WORDS, "settings": settings}
    assert hubaoti.compile(tiny_roberta, theirs.path, **words) == theirs, "found, as it is trusted"
    with pytest.raises(Building):
        hubaoti.compile(tiny_roberta, theirs.path, force=True, **words)


def test_a_dry_run_says_what_is_missing_and_does_nothing(
    repo: str, built: Bundle, write: Write, tiny_roberta: Path, settings: Settings, proxy: Proxy
) -> None:
    model = f'model = "{tiny_roberta}"\nrepo = "{repo}"'
    path = write(f"{model}\n{DIMS}", f"{model}\ndims = {{ batch = [1, 7] }}")
    done = inside(settings, "compile", "--matrix", path, "--dry-run")
    assert done.code == 0, done
    place = f"{repo} float32-sdpa/{built.manifest.variant}"
    assert done.out.splitlines() == [
        f"{place} is missing, and built already in the mirror",
        f"{place} is missing",
    ]
    assert not HfApi(settings.endpoint, token=settings.token).repo_exists(repo)
    assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}


def test_what_another_artifact_lies_at_is_not_compiled_for(
    repo: str, built: Bundle, write: Write, tiny_roberta: Path, settings: Settings, tmp_path: Path
) -> None:
    target = {**CPU, "torch": built.manifest.target.torch}
    push_bundles([make_bundle(tmp_path / "x", target)], Destination(RepoRef(repo)), settings)
    path = write(f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{DIMS}')
    done = inside(settings, "compile", "--matrix", path, "-q")
    assert done.code == errors.Conflict.exit_code
    assert built.manifest.key[:12] in done.err
    assert 'recipe = "float32-sdpa+NAME"' in done.err


def test_what_is_pushed_is_signed(
    repo: str, built: Bundle, write: Write, tiny_roberta: Path, settings: Settings, tmp_path: Path
) -> None:
    key = tmp_path / "key.pem"
    make_key_pair(key)
    words = ("compile", "--matrix", write(f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{DIMS}'))
    done = inside(settings, *words, "--sign", tmp_path / "none.pem")
    assert (done.code, done.out) == (errors.BadRequest.exit_code, ""), done
    done = inside(settings, *words, "--sign", key)
    assert done.code == 0, done
    owner, reader = repo.partition("/")[0], replace(settings, home=tmp_path / "reader")
    assert inside(reader, "trust", "add", owner, "--key", key.with_suffix(".pub")).code == 0
    assert hubaoti.pull(repo, settings=reader).artifact.digest == built.manifest.digest


def test_what_other_loaders_read_goes_to_its_branch_once(
    repo: str,
    write: Write,
    tiny_roberta: Path,
    settings: Settings,
    built_at: Settings,
    tmp_path: Path,
) -> None:
    words = {"task": "forward", "regions": "none", "layout": "zerogpu", **WORDS}
    job = plan_job(tiny_roberta, built_at, **words)
    made = make_built(tmp_path / "built", job, ModelSource(model="tiny-roberta"))
    graphs = [msgspec.structs.replace(each, direct=Direct()) for each in made.manifest.graphs]
    bundle = changed(made, graphs=tuple(graphs))
    store_built(bundle, settings)
    fields = 'task = "forward"\nregions = "none"\nlayout = "zerogpu"'
    path = write(f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{fields}\n{DIMS}')
    for said in ("pushed", "is there already"):
        done = inside(settings, "compile", "--matrix", path)
        assert done.code == 0 and done.out.strip().endswith(said), done
    branch = f"zerogpu/{bundle.manifest.recipe}/{bundle.manifest.variant}"
    files = HfApi(settings.endpoint, token=settings.token).list_repo_files(repo, revision=branch)
    assert "package/root/package.pt2" in files


@pytest.mark.cuda
def test_a_machine_without_a_gpu_fills_a_repo_for_several(
    repo: str, built: Bundle, write: Write, tiny_roberta: Path, settings: Settings, tmp_path: Path
) -> None:
    hopper = plan_job(tiny_roberta, settings, capabilities=(90,), **WORDS)
    gpu = make_built(tmp_path / "sm90", hopper, ModelSource(model="tiny-roberta"))
    store_built(gpu, settings)
    model = f'model = "{tiny_roberta}"\nrepo = "{repo}"\n{DIMS}'
    done = inside(settings, "compile", "--matrix", write(f'{model}\nfor = ["cpu", "sm90"]'))
    assert done.code == 0, done
    places = [f"{repo} float32-sdpa/{each.manifest.variant}" for each in (built, gpu)]
    assert done.out.splitlines() == [f"{place} pushed" for place in places]
    path = write(f'{model}\nfor = ["sm80", "sm90", "cpu"]')
    done = inside(settings, "compile", "--matrix", path, "--dry-run")
    first, second, third = done.out.splitlines()  # the CPU's first
    assert (first, third) == tuple(f"{place} is there already" for place in places)
    assert second == places[1].replace("sm90", "sm80") + " is missing"


MODEL = 'model = "acme/tiny"\n'
REPO = 'repo = "acme/tiny-compiled"\n'
BAD: dict[str, tuple[str, tuple[str, ...], type[errors.HubaotiError]]] = {
    "a field that is nearly one": (
        f'[[build]]\n{MODEL}{REPO}quantise = "int8wo"',
        ("build 1", "'quantise'", "did you mean 'quantize'?"),
        errors.BadRequest,
    ),
    "a table that is nearly one": (
        f"[[biuld]]\n{MODEL}{REPO}",
        ("'biuld'", "did you mean 'build'?"),
        errors.BadRequest,
    ),
    "a field of another type": (
        f'[[build]]\n{MODEL}{REPO}for = "sm90"',
        ("build 1", "$.for"),
        errors.BadRequest,
    ),
    "no repo": (f"[[build]]\n{MODEL}", ("build 1", "`repo`"), errors.BadRequest),
    "no build": ("", ("has no [[build]]",), errors.BadRequest),
    "no TOML": ("[[build]", ("is no table of builds",), errors.BadRequest),
    "a second build that is odd": (
        f'[[build]]\n{MODEL}{REPO}\n[[build]]\n{MODEL}{REPO}task = "sing"',
        ("build 2", "sing", "embed"),
        errors.UnknownTask,
    ),
    "a GPU that there is not": (
        f'[[build]]\n{MODEL}{REPO}for = ["cpu", "sm12"]',
        ("build 1", "sm12", "sm90"),
        errors.BadRequest,
    ),
    "for nothing": (
        f"[[build]]\n{MODEL}{REPO}for = []",
        ("build 1", "no GPU is named"),
        errors.BadRequest,
    ),
    "a recipe and its parts": (
        f'[[build]]\n{MODEL}{REPO}recipe = "bfloat16-sdpa"\ndtype = "float32"',
        ("build 1", "dtype is said beside the recipe"),
        errors.BadRequest,
    ),
    "dims without end": (
        f"[[build]]\n{MODEL}{REPO}dims = {{ seq = [8] }}",
        ("build 1", "(min, max)"),
        errors.BadDim,
    ),
    "a repo at a revision": (
        f'[[build]]\n{MODEL}repo = "me/m@v1"',
        ("build 1", "goes to the default branch", 'repo = "me/m"'),
        errors.BadRequest,
    ),
    "a repo that is none": (
        f'[[build]]\n{MODEL}repo = "tiny"',
        ("build 1", "owner/name"),
        errors.BadRequest,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_says_something_odd_is_refused_before_anything_is_begun(
    case: str, settings: Settings, proxy: Proxy, tmp_path: Path
) -> None:
    text, said, kind = BAD[case]
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    done = inside(settings, "compile", "--matrix", path)
    assert (done.code, done.out) == (kind.exit_code, ""), done
    assert [word for word in said if word not in done.err] == [], done.err
    assert proxy.requests == []


def test_what_the_table_says_is_said_nowhere_else(
    write: Write, settings: Settings, tmp_path: Path
) -> None:
    path = write(f"{MODEL}{REPO}")
    for words in (["acme/tiny"], ["--dim", "batch=1:4"], ["-o", "out"], ["--explain"]):
        done = inside(settings, "compile", *words, "--matrix", path)
        assert done.code == errors.BadRequest.exit_code
        assert "--matrix goes by its file" in done.err
    done = inside(settings, "compile", "acme/tiny", "--dry-run")
    assert done.code == 2 and "--explain" in done.err
    done = inside(settings, "compile", "acme/tiny", "-o", tmp_path / "x", "--sign", "key.pem")
    assert done.code == 2 and "hubaoti push" in done.err
    done = inside(settings, "compile", "--matrix", tmp_path / "missing.toml")
    assert done.code == errors.BadRequest.exit_code and "No such file" in done.err


def test_a_build_has_every_option_of_compile_by_its_name() -> None:
    ours = {*Entry.__struct_encode_fields__} - {"model", "repo", "for", "recipe"}
    assert ours == CompileOptions.__annotations__.keys() - {"calls", "shapes"}  # of a module


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_it_leaves_what_was_pushed_and_nothing_half_done(
    how: signal.Signals,
    repo: str,
    built: Bundle,
    write: Write,
    tiny_roberta: Path,
    settings: Settings,
) -> None:
    model = f'model = "{tiny_roberta}"\nrepo = "{repo}"'
    labelled = 'recipe = "float32-sdpa+large"\ndims = { batch = [1, 9] }'
    path = write(f"{model}\n{DIMS}", f"{model}\n{labelled}")
    words = [HUBAOTI, "compile", "--matrix", path]
    pipe, env = subprocess.PIPE, environment_of(settings)
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        assert process.stderr is not None
        step = f"compiling {tiny_roberta} for float32-sdpa+large"
        assert any(line.strip().startswith(step) for line in process.stderr)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -how), err
    assert out.splitlines() == [f"{repo} float32-sdpa/{built.manifest.variant} pushed"]
    files = HfApi(settings.endpoint, token=settings.token).list_repo_files(repo)
    assert any(name.startswith("float32-sdpa/") for name in files)
    assert not any(name.startswith("float32-sdpa+large/") for name in files)
    assert how is signal.SIGKILL or not any((settings.home / "fill").iterdir())
    done = inside(settings, "compile", "--matrix", path, "--dry-run")
    there, missing = done.out.splitlines()
    assert there.endswith("is there already") and missing.endswith("is missing"), done
