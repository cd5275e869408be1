"""Repos are found by program; what fits is said, and taken of nobody who is not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import CPU, CUDA, changed, make_bundle, make_host
from commands import inside
from huggingface_hub import HfApi
from proxies import Proxy, proxying
from signers import make_pair
from test_signatures import require_signer

from hubaoti import api
from hubaoti.api import searching
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Program, compute_key
from hubaoti.errors import (
    BadManifest,
    Blocked,
    HubaotiError,
    NoMatch,
    NoRepo,
    NotLocked,
    RolledBack,
    UnknownTask,
    Untrusted,
)
from hubaoti.host.extras import format_install
from hubaoti.host.match import MatchResult
from hubaoti.host.probe import Host
from hubaoti.hub import search, survey
from hubaoti.hub.choice import Pulled
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.hub.search import FoundRepo, RepoFinder
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.progress import report_nothing
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
OLDER = {**CPU, "torch": "2.13.1+cpu"}  # which runs on the test's host, and is not made for it
HOST = make_host()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, str]]:
    """An endpoint that holds nothing but these tests' repos, behind a proxy; and its token."""
    root = tmp_path_factory.mktemp("search") / "root"
    with serve_in_thread(root) as endpoint, proxying(endpoint.url) as found:
        yield found, endpoint.token


@pytest.fixture
def settings(alone: tuple[Proxy, str], tmp_path: Path) -> Iterator[Settings]:
    """An empty home, and that endpoint, which is empty again when the test is over."""
    proxy, token = alone
    proxy.reset()
    yield Settings(home=tmp_path / "home", endpoint=proxy.url, token=token)
    proxy.reset()
    hub = HfApi(proxy.url, token=token)
    for each in hub.list_models():
        hub.delete_repo(each.id)


@pytest.fixture
def proxy(alone: tuple[Proxy, str]) -> Proxy:
    return alone[0]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def program(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program of these bundles, which a model of any name is of: no config says it."""
    found = bundle.manifest.program
    monkeypatch.setattr(searching, "identify", lambda *_: found)
    return found


def ship(bundle: Bundle, repo: str, settings: Settings) -> str:
    return push_bundles([bundle], Destination(RepoRef(repo)), settings).commit


def trust(settings: Settings, *owners: str) -> None:
    for owner in owners:
        Trust(settings.trust).add(settings.endpoint, owner)


def make_of_other_program(folder: Path) -> Bundle:
    """A bundle that differs in its program alone."""
    found = make_bundle(folder)
    other = Program(config={"hidden": 9}, code="a" * 64, task="embed")
    key = compute_key(other, found.manifest.build, found.manifest.target)
    return changed(found, program=other, key=key)


def built_at(bundle: Bundle, at: str) -> Bundle:
    record: dict[str, Any] = {
        name: getattr(bundle.manifest.built, name)
        for name in bundle.manifest.built.__struct_fields__
    }
    return changed(bundle, built=type(bundle.manifest.built)(**{**record, "at": at}))


def pull_any_of(settings: Settings, host: Host = HOST, **words: str) -> Pulled:
    return api.pull_any_of("any/model", host=host, settings=settings, **words)


def names(found: tuple[api.RepoFound, ...]) -> list[str]:
    return [each.repo for each in found]


# The list


def test_repos_with_graphs_are_found_by_words_and_by_program(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program
) -> None:
    ship(bundle, "acme/minilm-compiled", settings)
    ship(make_of_other_program(tmp_path / "other"), "acme/other-compiled", settings)
    HfApi(settings.endpoint, token=settings.token).create_repo("acme/minilm")
    assert names(api.search(settings=settings)) == ["acme/other-compiled", "acme/minilm-compiled"]
    assert names(api.search("MiniLM", "acme", settings=settings)) == ["acme/minilm-compiled"]
    (found,) = api.search(program="any/model", settings=settings)
    assert (found.repo, found.owner) == ("acme/minilm-compiled", "not trusted")
    assert {*found.tags} == {program.tag, "torch-2.13", "x86_64_v3"} and found.updated is not None
    assert api.search("nothing", settings=settings) == ()


def test_owners_are_trusted_blocked_or_neither(bundle: Bundle, settings: Settings) -> None:
    for owner in ("acme", "mallory", "stranger"):
        ship(bundle, f"{owner}/x", settings)
    trust(settings, "acme")
    Trust(settings.trust).block(settings.endpoint, "mallory")
    owners = {each.repo: each.owner for each in api.search(settings=settings)}
    assert owners == {
        "acme/x": "trusted",
        "mallory/x": "blocked",
        "stranger/x": "not trusted",
    }


@pytest.mark.parametrize(
    "item",
    [
        {"id": "../../etc/passwd"},
        {"id": "one-word"},
        {"id": "acme/\x1b[31mred"},
        {"id": "acme/x", "tags": ["hubaoti", "sm-90\x1b[0m", "`|`", "sm-90"]},
        {"id": "acme/x", "tags": None, "lastModified": None},
    ],
)
def test_names_and_tags_that_are_none_are_left_out(
    item: dict[str, Any], settings: Settings, proxy: Proxy
) -> None:
    proxy.matching, proxy.mutate = "/api/models", lambda _: [item]
    found = RepoFinder(settings).find()
    expected = [FoundRepo(RepoRef("acme/x"), None, ("sm-90",) if item.get("tags") else ())]
    assert [*found] == (expected if item["id"] == "acme/x" else [])


@pytest.mark.parametrize("answer", [{}, [1], [{"id": 1}], [{"id": "a/b", "tags": [1]}], ["x"]])
def test_a_list_that_is_none_is_refused(answer: Any, settings: Settings, proxy: Proxy) -> None:
    proxy.matching, proxy.mutate = "/api/models", lambda _: answer
    if answer == {}:
        assert RepoFinder(settings).find() == ()
        return
    with pytest.raises(HubaotiError) as why:
        RepoFinder(settings).find()
    assert why.value.hint


# What fits


def test_what_fits_best_is_shown_first_and_nothing_but_manifests_is_fetched(
    tmp_path: Path, bundle: Bundle, settings: Settings, proxy: Proxy
) -> None:
    ship(bundle, "acme/exact", settings)
    ship(make_bundle(tmp_path / "near", target=OLDER), "acme/near", settings)
    ship(make_bundle(tmp_path / "cuda", target=CUDA), "acme/cuda", settings)
    proxy.requests.clear()
    found = api.search(fits=True, host=HOST, settings=settings)
    fits = {each.repo: each.best and each.best.verdict and each.best.verdict.fit for each in found}
    assert [*fits.items()] == [
        ("acme/exact", MatchResult.EXACT),
        ("acme/near", MatchResult.COMPATIBLE),
        ("acme/cuda", None),
    ]
    assert found[-1].reason == "nothing of it fits"
    asked = [path for _, path in proxy.requests if "/resolve/" in path]
    assert len(asked) == 2 and all(path.endswith("/hubaoti.json") for path in asked)
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.ls() == []


def test_a_tag_proves_no_program(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program
) -> None:
    ship(bundle, "mallory/x", settings)
    other = make_of_other_program(tmp_path / "other")
    hub = HfApi(settings.endpoint, token=settings.token)
    hub.upload_file(
        path_or_fileobj=other.manifest.to_json(),
        path_in_repo=f"{PLACE}/hubaoti.json",
        repo_id="mallory/x",
    )
    (found,) = api.search(program="any/model", fits=True, host=HOST, settings=settings)
    assert found.best is None and found.reason == "nothing of it fits"
    trust(settings, "mallory")
    with pytest.raises(NoMatch, match=f"not of {program.digest[:12]}"):
        pull_any_of(settings)


def test_a_repo_that_cannot_be_looked_into_hides_no_other(
    bundle: Bundle, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(3):
        ship(bundle, f"acme/x{at}", settings)
    hub = HfApi(settings.endpoint, token=settings.token)
    push_bundles([bundle], Destination(RepoRef("acme/flood")), settings)
    for at in range(2):  # none of which says enough to stop reading
        where = f"{PLACE.replace('/', f'+l{at}/')}/hubaoti.json"
        hub.upload_file(path_or_fileobj=b"{}", path_in_repo=where, repo_id="acme/flood")
    hub.delete_file(f"{PLACE}/hubaoti.json", "acme/flood")
    monkeypatch.setattr(survey, "_MANIFESTS", 1)
    monkeypatch.setattr(survey, "MOST_LOOKED_INTO", 3)
    found = api.search(fits=True, host=HOST, settings=settings)
    said = {each.repo: each.reason for each in found}
    assert said["acme/x2"] == said["acme/x1"] == "" and said["acme/x0"] == "not looked into"
    assert "has more manifests than are read: 0" in said["acme/flood"]


# A pull of any


def test_of_trusted_owners_what_fits_best_is_taken_and_it_is_said_why(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program, proxy: Proxy
) -> None:
    ship(bundle, "acme/exact", settings)
    ship(make_bundle(tmp_path / "near", target=OLDER), "other/near", settings)
    ship(built_at(make_bundle(tmp_path / "new"), "2027-01-01T00:00:00Z"), "stranger/x", settings)
    trust(settings, "acme", "other")
    proxy.requests.clear()
    pulled = pull_any_of(settings)
    assert (pulled.ref, str(pulled.place)) == (RepoRef("acme/exact"), PLACE)
    assert pulled.artifact.digest == bundle.manifest.digest and not pulled.from_mirror
    assert pulled.notes[0].startswith("of acme/exact: exact, and what other/near has ")
    assert pulled.notes[1] == (
        "stranger/x says that it has some, too; if you trust stranger: hubaoti trust add stranger"
    )
    assert not [path for _, path in proxy.requests if "stranger" in path]
    assert pull_any_of(settings).from_mirror
    assert api.pull("acme/exact", host=HOST, settings=settings).commit == pulled.commit


def test_of_equals_the_one_that_was_built_last_is_taken(
    tmp_path: Path, settings: Settings, program: Program
) -> None:
    dates = {"acme/a": "2026-02-01", "acme/b": "2026-03-01", "acme/c": "2026-01-01"}
    for repo, day in dates.items():
        each = built_at(make_bundle(tmp_path / repo.replace("/", "-")), f"{day}T12:00:00Z")
        ship(each, repo, settings)
    trust(settings, "acme")
    pulled = pull_any_of(settings)
    assert pulled.ref.repo == "acme/b"
    assert pulled.notes[0].startswith("of acme/b: built last of those that fit as well; acme/a")


def test_nothing_is_taken_of_strangers_and_they_are_named(
    bundle: Bundle, settings: Settings, program: Program, proxy: Proxy
) -> None:
    with pytest.raises(NoRepo, match=f"no repo of .* has graphs of {program.tag}"):
        pull_any_of(settings)
    ship(bundle, "stranger/x", settings)
    ship(bundle, "mallory/x", settings)
    Trust(settings.trust).block(settings.endpoint, "mallory")
    proxy.requests.clear()
    with pytest.raises(Untrusted, match="mallory/x, stranger/x say") as why:
        pull_any_of(settings)
    assert "hubaoti trust add OWNER" in why.value.hint
    assert [path.partition("?")[0] for _, path in proxy.requests] == ["/api/models"]


def test_a_blocked_artifact_is_not_taken_of_whoever_is_trusted(
    bundle: Bundle, settings: Settings, program: Program
) -> None:
    ship(bundle, "acme/x", settings)
    trust(settings, "acme")
    Trust(settings.trust).block_artifact(bundle.manifest.digest)
    with pytest.raises(Blocked):
        pull_any_of(settings)


def test_where_nothing_fits_every_reason_of_every_repo_is_said(
    tmp_path: Path, settings: Settings, program: Program
) -> None:
    ship(make_bundle(tmp_path / "cuda", target=CUDA), "acme/cuda", settings)
    ship(make_bundle(tmp_path / "old", target={**CPU, "torch": "2.11.0+cpu"}), "acme/old", settings)
    trust(settings, "acme")
    with pytest.raises(NoMatch, match="needs torch 2.11") as why:
        pull_any_of(settings)
    assert "acme/cuda:" in str(why.value) and "needs an NVIDIA GPU" in str(why.value)
    with Mirror.open(settings.mirror) as mirror:  # so that mirror stats advises to compile it
        (miss,) = mirror.answers.read().misses
    assert miss.what.startswith(f"{program.tag} for torch 2.13.0+cpu")


def test_a_trusted_repo_that_went_back_is_left_out(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program
) -> None:
    ship(bundle, "acme/back", settings)
    ship(make_bundle(tmp_path / "more", target=CUDA), "acme/back", settings)
    trust(settings, "acme")
    assert pull_any_of(settings).ref.repo == "acme/back"
    HfApi(settings.endpoint, token=settings.token).super_squash_history("acme/back")
    with pytest.raises(RolledBack, match="another history"):
        pull_any_of(settings)
    ship(bundle, "acme/good", settings)
    pulled = pull_any_of(settings)
    assert pulled.ref.repo == "acme/good"
    assert any(note.startswith("acme/back was left out: main") for note in pulled.notes)


def test_of_who_has_to_sign_only_what_is_signed_is_taken(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program
) -> None:
    pair = make_pair(tmp_path, "acme")
    require_signer(settings, pair)
    newer = built_at(make_bundle(tmp_path / "newer"), "2027-01-01T00:00:00Z")
    ship(newer, "acme/unsigned", settings)
    with pytest.raises(NoMatch, match="not signed by key"):
        pull_any_of(settings)
    api.push(bundle, "acme/signed", sign=pair.private, as_is=True, settings=settings)
    assert {each.owner for each in api.search(settings=settings)} == {"trusted if signed"}
    assert pull_any_of(settings).ref.repo == "acme/signed"


def test_strangers_cannot_crowd_out_who_is_trusted(
    bundle: Bundle, settings: Settings, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(bundle, "acme/x", settings)
    for at in range(3):
        ship(bundle, f"stranger/x{at}", settings)
    trust(settings, "acme")
    monkeypatch.setattr(search, "MOST_LISTED", 2)
    monkeypatch.setattr("hubaoti.hub.pull_any_of.MOST_LISTED", 2)
    assert pull_any_of(settings).ref.repo == "acme/x"


def test_where_a_lockfile_says_what_is_taken_nothing_is_chosen(
    tmp_path: Path, settings: Settings, program: Program
) -> None:
    with pytest.raises(NotLocked, match="says what is taken"):
        pull_any_of(replace(settings, lock=tmp_path / "hubaoti.lock"))


# The program of a model


def test_a_model_has_the_program_that_a_compile_of_it_has(
    tiny_roberta: Path, roberta_bundle: Bundle, settings: Settings
) -> None:
    found = searching.identify(tiny_roberta, None, settings, report_nothing)
    assert found == roberta_bundle.manifest.program


def test_the_graphs_of_a_model_are_found_and_pulled_by_its_config(
    tiny_roberta: Path, roberta_bundle: Bundle, settings: Settings
) -> None:
    ship(roberta_bundle, "acme/roberta", settings)
    (found,) = api.search(program=tiny_roberta, fits=True, settings=settings)
    assert found.best and found.best.verdict
    assert found.best.verdict.fit is not MatchResult.INCOMPATIBLE
    trust(settings, "acme")
    pulled = api.pull_any_of(tiny_roberta, settings=settings)
    assert pulled.artifact.digest == roberta_bundle.manifest.digest


def test_another_task_is_another_program_and_none_is_refused(
    tiny_roberta: Path, settings: Settings
) -> None:
    tasks = ("forward", "embed")
    found = {searching.identify(tiny_roberta, t, settings, report_nothing).tag for t in tasks}
    assert len(found) == 2
    with pytest.raises(UnknownTask):
        api.search(program=tiny_roberta, task="sing", settings=settings)


# The commands


def test_the_commands_say_the_same(
    tmp_path: Path, bundle: Bundle, settings: Settings, program: Program
) -> None:
    assert inside(settings, "search").out == "no repo was found\n"
    assert json.loads(inside(settings, "search", "--json").out) == []
    done = inside(settings, "pull", "--any-of", "any/model")
    assert done.code == NoRepo.exit_code and "hint: " in done.err
    ship(bundle, "acme/x", settings)
    host = tmp_path / "host.json"
    host.write_text(json.dumps(HOST.to_dict()))
    lines = inside(settings, "search", "-q", "--program", "any/model").out.splitlines()
    assert lines[1].split()[:3] == ["acme/x", "not", "trusted"]
    lines = inside(settings, "search", "-q", "--fits", "--host", host).out.splitlines()
    assert lines[1].split() == ["acme/x", "not", "trusted", "exact", PLACE]
    (facts,) = json.loads(inside(settings, "search", "--fits", "--host", host, "--json").out)
    assert facts["best"]["digest"] == bundle.manifest.digest
    assert facts["best"]["verdict"]["fit"] == "exact" and facts["owner"] == "not trusted"
    trust(settings, "acme")
    done = inside(settings, "pull", "--any-of", "any/model", "--host", host)
    assert done.code == 0 and "of acme/x: the only one that fits" in done.out
    done = inside(settings, "pull", "--any-of", "any/model", "--host", host, "--json")
    assert json.loads(done.out)["repo"] == "acme/x"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["acme/x", "--any-of", "m"], "without REPO"),
        (["--any-of", "m", "--trust", "--allow-rollback"], "without --trust, --allow-rollback"),
        (["--any-of", "m", "--locked"], "without"),
        (["acme/x", "--task", "embed"], "--task is of --any-of"),
    ],
)
def test_words_that_contradict_each_other_are_refused(
    words: list[str], said: str, settings: Settings
) -> None:
    done = inside(settings, "pull", *words)
    assert done.code == 2 and said in done.err


def test_a_program_without_the_compiler_s_packages_says_what_to_install(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hubaoti.host.extras.package_version", lambda _: None)
    done = inside(settings, "search", "--program", "any/model")
    assert done.code == 26 and format_install("compile") in done.err


def test_manifests_without_end_are_bounded(bundle: Bundle) -> None:
    """The bound of one repo is far below that of a pull, which its owner is trusted for."""
    from hubaoti.hub.catalog import Allowance

    with pytest.raises(BadManifest, match="200 of them, and 16 MiB, were left"):
        Allowance(survey._MANIFESTS, survey._BYTES).take("x", [1] * 201)
