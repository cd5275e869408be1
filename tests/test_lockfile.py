"""A lockfile: the same pins are the same bytes, and nothing else is taken than what it says."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import CPU, CUDA, MEMBERS, changed, make_bundle, make_gpu_host, make_host, put_trusted
from commands import hubaoti, inside
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st
from proxies import Proxy
from test_mirror_store import put

from hubaoti import api
from hubaoti.api.attaching import get_artifact
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.engines.resolve import Wanted, find_in_mirror
from hubaoti.errors import (
    ArtifactHeld,
    BadLock,
    BadRequest,
    HubUnreachable,
    LockMismatch,
    NoArtifact,
    NoMatch,
    NotLocked,
    RepoNotFound,
    RolledBack,
    Untrusted,
)
from hubaoti.hub.choice import Pulled
from hubaoti.hub.layout import ArtifactPath, RepoRef
from hubaoti.hub.lockfile import Lock, LockedRepo
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.gc import collect
from hubaoti.mirror.removal import remove
from hubaoti.progress import report_nothing
from hubaoti.settings import Settings

PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
OTHER = PLACE.replace("cpu", "cu130-sm90")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def locked(tmp_path: Path, bundle: Bundle, repo: str, settings: Settings) -> Path:
    """The lockfile of a repo of two artifacts, under the tag v1."""
    both = [bundle, make_bundle(tmp_path / "other", target=CUDA)]
    push_bundles(both, Destination(RepoRef(repo), tag="v1"), settings)
    path = tmp_path / "hubaoti.lock"
    api.lock(f"{repo}@v1", settings=settings).write(path)
    return path


def pull(repo: str, settings: Settings, locked: Path, trust: bool = True) -> Pulled:
    ref = RepoRef.parse(repo)
    return pull_artifact(ref, settings, make_host(), trust=trust, locked=locked)


# The file

HEX = "0123456789abcdef"
REFS = st.builds(
    RepoRef,
    st.sampled_from(["acme/x", "acme/y", "other/z"]),
    st.sampled_from([None, "v1", "~=1.2", "main", "zerogpu/a/b"]),
)
PINS = st.dictionaries(
    st.sampled_from([PLACE, OTHER, PLACE.replace("sdpa", "sdpa+mine")]).map(ArtifactPath.parse),
    st.text(HEX, min_size=64, max_size=64),
    min_size=1,
)
REPOS = st.builds(
    LockedRepo,
    REFS,
    st.text(HEX, min_size=40, max_size=40),
    PINS,
    st.sampled_from([(), (f"acme/k@{'a' * 40} sha256:{'b' * 64}",)]),
)


@given(st.lists(REPOS, unique_by=lambda each: str(each.ref)).map(tuple))
def test_a_lock_is_read_as_it_is_written_and_written_in_one_way(repos: tuple[LockedRepo]) -> None:
    text = str(Lock(repos))
    found = Lock.parse(text)
    assert sorted(map(str, found.repos)) == sorted(map(str, repos))
    assert str(found) == text == str(Lock(repos[::-1]))


def test_people_can_read_it(repo: str, bundle: Bundle, locked: Path, hub: HfApi) -> None:
    lines = locked.read_text().splitlines()
    assert lines[0].startswith("# Written by `hubaoti lock`")
    assert lines[1:] == [
        "version = 1",
        "",
        "[[repo]]",
        f'name = "{repo}"',
        'revision = "v1"',
        f'commit = "{hub.repo_info(repo).sha}"',
        "",
        "[repo.artifacts]",
        f'"{PLACE}" = "sha256:{bundle.manifest.digest}"',
        lines[-1],
    ]
    assert lines[-1].startswith(f'"{OTHER}" = "sha256:')


GOOD = f'version = 1\n[[repo]]\nname = "a/b"\ncommit = "{"c" * 40}"\n[repo.artifacts]\n'
BAD = {
    "no TOML": "version = ",
    "no version": "",
    "an older version": "version = 0",
    "an unknown word": "version = 1\nmore = 2",
    "a version that is none": 'version = "1"',
    "a repo that is none": GOOD.replace("a/b", "../b"),
    "a commit that is none": GOOD.replace("c" * 40, "main"),
    "no artifacts": GOOD,
    "a path that is none": GOOD + f'"../x" = "sha256:{"a" * 64}"',
    "a digest that is none": GOOD + f'"{PLACE}" = "{"a" * 64}"',
    "a repo twice, as of a merge": (once := GOOD + f'"{PLACE}" = "sha256:{"a" * 64}"\n')
    + once.removeprefix("version = 1\n").replace("c" * 40, "d" * 40),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_lock_is_refused_with_its_path(what: str, tmp_path: Path) -> None:
    path = tmp_path / "hubaoti.lock"
    path.write_text(BAD[what])
    with pytest.raises(BadLock, match=f"{path} is no lockfile") as why:
        Lock.read(path)
    assert "hubaoti lock" in why.value.hint


@pytest.fixture
def others(tmp_path: Path, settings: Settings) -> str:
    """Another repo with an artifact."""
    name = f"acme/{tmp_path.name}-others"
    push_bundles([make_bundle(tmp_path / "others")], Destination(RepoRef(name)), settings)
    return name


def test_the_hint_of_what_is_not_locked_locks_it_beside_all_others(
    repo: str, others: str, locked: Path, settings: Settings
) -> None:
    before = Lock.read(locked).repos
    with pytest.raises(NotLocked) as why:
        pull(others, settings, locked)
    words = why.value.hint.partition("hubaoti lock ")[2].split()
    assert inside(settings, "lock", *words).code == 0
    after = Lock.read(locked)
    assert all(each in after.repos for each in before) and len(after.repos) == len(before) + 1
    pull(others, settings, locked)
    assert inside(settings, "lock", *words).code == 0
    assert Lock.read(locked).repos == after.repos, "renewed, and not doubled"
    with pytest.raises(NotLocked) as why:
        Lock.read(locked).find(RepoRef(repo, f"sha256:{'a' * 64}"))
    words = why.value.hint.partition("hubaoti lock ")[2].split()
    assert inside(settings, "lock", *words).code == 0, "a digest is no revision to lock"


def test_no_repo_leaves_a_lockfile_without_being_named(
    repo: str, others: str, locked: Path, settings: Settings
) -> None:
    before = locked.read_bytes()
    done = inside(settings, "lock", others, "-o", locked)
    assert done.code == BadRequest.exit_code and f"{repo}@v1" in done.err and "--add" in done.err
    assert locked.read_bytes() == before
    done = inside(settings, "lock", others, f"{repo}", "-o", locked)
    assert done.code == 0 and f"{repo}@v1 is locked no more" in done.out
    assert sorted(str(each.ref) for each in Lock.read(locked).repos) == sorted([others, repo])


@pytest.mark.parametrize("what", ["text", "folder", "nowhere", "link"])
def test_what_is_no_lockfile_is_not_written_over(
    what: str, repo: str, locked: Path, settings: Settings, tmp_path: Path, proxy: Proxy
) -> None:
    path = tmp_path / "notes.txt"
    if what == "text":
        path.write_text("what I should not forget")
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "gone")
    else:
        path = tmp_path / "nowhere/x.lock"
    proxy.reset()
    done = inside(settings, "lock", repo, "-o", path)
    kind = BadRequest if what == "nowhere" else BadLock
    assert done.code == kind.exit_code and "-o" in done.err and "HUBAOTI" not in done.err, done
    assert not proxy.requests
    assert what != "text" or path.read_text() == "what I should not forget"


def test_a_lock_that_names_nothing_is_no_success(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hubaoti.lock").write_text("version = 1\n")
    done = inside(settings, "pull", "--locked")
    assert done.code == BadLock.exit_code and "names no repo" in done.err


def test_what_is_no_path_is_no_lock(repo: str, bundle: Bundle, settings: Settings) -> None:
    for held in (repo, bundle):
        with pytest.raises(BadRequest, match="locked=3 names no lockfile"):
            get_artifact(held, False, settings, report_nothing, locked=3)  # type: ignore[arg-type]


def test_one_of_a_newer_hubaoti_or_none_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadLock, match="newer hubaoti"):
        Lock.parse("version = 2\nall = 'new'")
    with pytest.raises(BadLock, match="cannot be read"):
        Lock.read(tmp_path / "hubaoti.lock")
    (tmp_path / "hubaoti.lock").write_bytes(b"\xff")
    with pytest.raises(BadLock, match="cannot be read"):
        Lock.read(tmp_path / "hubaoti.lock")
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BadLock, match="a pipe or a device"):
            Lock.read(endless)


# A pull by it


def test_what_is_locked_is_pulled_without_a_list_and_again_without_a_network(
    repo: str, bundle: Bundle, locked: Path, settings: Settings, proxy: Proxy
) -> None:
    proxy.requests.clear()
    first = pull(f"{repo}@v1", settings, locked)
    assert first.artifact.digest == bundle.manifest.digest and not first.from_mirror
    asked = [path for _, path in proxy.requests]
    assert not [path for path in asked if "/tree/" in path]
    whose = [path for path in asked if "/refs" in path or "/revision/" in path]
    assert len(whose) == 2, "whether it is the owner's commit"
    proxy.requests.clear()
    offline = replace(settings, offline=True)
    again = pull(f"{repo}@v1", offline, locked, trust=False)
    assert again.from_mirror and again.artifact.digest == bundle.manifest.digest
    assert pull(repo, offline, locked).commit == first.commit, "the one revision that is locked"
    assert proxy.requests == []


def test_a_tag_that_moved_changes_nothing_that_is_locked(
    tmp_path: Path, repo: str, bundle: Bundle, locked: Path, settings: Settings
) -> None:
    other = make_bundle(tmp_path / "new", members={"model/new.so": b"new"})
    to = Destination(RepoRef(repo), tag="v1", move_tag=True)
    push_bundles([other], to, settings)
    assert pull(f"{repo}@v1", settings, locked).artifact.digest == bundle.manifest.digest
    with pytest.raises(RolledBack, match="the tag v1 .* was moved"):
        api.lock(f"{repo}@v1", settings=settings)


def test_a_manifest_that_is_another_is_refused_with_both_digests(
    repo: str, bundle: Bundle, locked: Path, settings: Settings
) -> None:
    text = locked.read_text()
    locked.write_text(text.replace(bundle.manifest.digest, "0" * 64))
    with pytest.raises(LockMismatch) as why:
        pull(f"{repo}@v1", settings, locked)
    assert "0" * 64 in str(why.value) and bundle.manifest.digest in str(why.value)


def test_bytes_that_are_changed_on_the_way_are_refused(
    repo: str, locked: Path, settings: Settings, proxy: Proxy
) -> None:
    proxy.matching, proxy.flip = FILENAME, True
    with pytest.raises(LockMismatch):
        pull(f"{repo}@v1", settings, locked)
    proxy.reset()
    assert pull(f"{repo}@v1", settings, locked)


def test_a_commit_that_is_gone_is_said(
    repo: str, locked: Path, settings: Settings, hub: HfApi, bundle: Bundle
) -> None:
    hub.delete_repo(repo)
    push_bundles([changed(bundle, checks=())], Destination(RepoRef(repo), tag="v1"), settings)
    with pytest.raises(RepoNotFound):
        pull(f"{repo}@v1", settings, locked)


@pytest.mark.parametrize("revision", ["@v2", "@main", f"@{'a' * 40}", f"@sha256:{'a' * 64}"])
def test_nothing_else_is_taken(
    repo: str, locked: Path, settings: Settings, proxy: Proxy, revision: str
) -> None:
    proxy.requests.clear()
    with pytest.raises(NotLocked, match=f"it has {repo}@v1"):
        pull(f"{repo}{revision}", settings, locked)
    with pytest.raises(NotLocked, match="the lock has no acme/elsewhere"):
        pull("acme/elsewhere", settings, locked)
    ref, place = RepoRef(repo, "v1"), ArtifactPath.parse(PLACE.replace("v3", "v4"))
    with pytest.raises(NotLocked, match="x86_64_v4"):
        pull_artifact(ref, settings, make_host(), locked=locked, place=place)
    assert proxy.requests == []


def test_a_locked_artifact_is_named_by_its_digest_its_commit_and_its_path(
    repo: str, bundle: Bundle, locked: Path, settings: Settings
) -> None:
    digest = bundle.manifest.digest
    (one,) = Lock.read(locked).repos
    for revision in (f"sha256:{digest}", one.commit, "v1"):
        assert pull(f"{repo}@{revision}", settings, locked).artifact.digest == digest
    place = ArtifactPath.parse(PLACE)
    ref = RepoRef(repo, "v1")
    found = pull_artifact(ref, settings, make_host(), locked=locked, place=place)
    assert found.artifact.digest == digest


def test_a_lock_is_no_trust(repo: str, locked: Path, settings: Settings) -> None:
    with pytest.raises(Untrusted):
        pull(f"{repo}@v1", settings, locked, trust=False)


def test_a_lock_is_for_every_kind_of_host(repo: str, locked: Path, settings: Settings) -> None:
    ref = RepoRef(repo, "v1")
    found = pull_artifact(ref, settings, make_gpu_host(), trust=True, locked=locked)
    assert str(found.place) == OTHER
    with pytest.raises(NoMatch, match=r"sm90.*\n"):
        pull_artifact(ref, settings, make_host(os="darwin"), trust=True, locked=locked)


def test_offline_what_was_never_pulled_is_said(repo: str, locked: Path, settings: Settings) -> None:
    offline = replace(settings, offline=True)
    with pytest.raises(NoArtifact, match=f"nothing that is locked of {repo}@v1 is in the mirror"):
        pull(f"{repo}@v1", offline, locked)
    with pytest.raises(HubUnreachable):
        pull_artifact(RepoRef(repo, "v1"), offline, make_host())


def test_a_lockfile_makes_nothing_its_owner_s(
    repo: str, bundle: Bundle, locked: Path, settings: Settings, hub: HfApi, tmp_path: Path
) -> None:
    """It may be of a project that somebody else wrote, and name a commit that anybody made."""
    hub.create_branch(repo, branch="draft")
    made = hub.upload_file(
        path_or_fileobj=b"proposed", path_in_repo="file", repo_id=repo, revision="draft"
    ).oid
    hub.delete_branch(repo, branch="draft")
    (one,) = Lock.read(locked).repos
    Lock((replace(one, commit=made),)).write(locked)
    digest, path = bundle.manifest.digest, f"{repo}@v1"
    with pytest.raises(Untrusted, match="no branch and no tag") as caught:
        pull(path, settings, locked)
    assert f"hubaoti trust add {digest}" in caught.value.hint
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.ls() == []
        mirror.trust.add_artifact(digest)
    assert pull(path, settings, locked).artifact.digest == digest
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.index.list_origins(digest) == ()
        mirror.trust.remove_artifact(digest)
    for here in (settings, replace(settings, offline=True)):
        with pytest.raises((Untrusted, HubUnreachable)):
            pull(path, here, locked)
    with pytest.raises(Untrusted, match="no branch and no tag"):
        pull_artifact(RepoRef(repo, made), settings, make_host(), trust=True)


@pytest.mark.parametrize("trusted", [False, True], ids=["before", "by the pull"])
@pytest.mark.parametrize("at", ["where another is", "where nothing is"])
def test_what_lies_here_is_the_owner_s_only_where_his_commit_has_it(
    at: str, trusted: bool, repo: str, locked: Path, settings: Settings, tmp_path: Path
) -> None:
    """Who puts a stranger's digest beside a true commit of somebody trusted makes it nobody's."""
    level = {"level": "x86_64_v2"} if at == "where nothing is" else {}
    stranger = make_bundle(tmp_path / "stranger", {**CPU, **level}, {**MEMBERS, "evil": b"code"})
    digest, place = stranger.manifest.digest, f"float32-sdpa/{stranger.manifest.variant}"
    (one,) = Lock.read(locked).repos
    Lock((replace(one, artifacts={ArtifactPath.parse(place): digest}),)).write(locked)
    with Mirror.open(settings.mirror) as mirror:
        put(mirror, stranger, PullOrigin())  # as an import leaves it
        if not trusted:
            mirror.trust.add(settings.endpoint, "acme")
    for _ in range(2):
        with pytest.raises(LockMismatch if at == "where another is" else RepoNotFound):
            pull(f"{repo}@v1", settings, locked, trust=trusted)
        with Mirror.open(settings.mirror) as mirror:
            mirror.trust.add(settings.endpoint, "acme")
            assert mirror.index.list_origins(digest) == ()
            assert not mirror.decide(digest).allowed
    offline = replace(settings, offline=True)
    with pytest.raises((LockMismatch, HubUnreachable)):
        pull(f"{repo}@v1", offline, locked, trust=trusted)


def test_what_lies_here_and_is_the_owner_s_is_his_after_one_manifest(
    repo: str, bundle: Bundle, locked: Path, settings: Settings, proxy: Proxy
) -> None:
    with Mirror.open(settings.mirror) as mirror:
        put(mirror, bundle, PullOrigin())
    assert pull(f"{repo}@v1", settings, locked).from_mirror
    assert not [path for _, path in proxy.requests if ".pt2" in path], "it is here"
    with Mirror.open(settings.mirror) as mirror:
        (origin,) = mirror.index.list_origins(bundle.manifest.digest)
        assert (origin.repo, origin.path) == (repo, PLACE)
    proxy.requests.clear()
    assert pull(f"{repo}@v1", replace(settings, offline=True), locked).from_mirror
    assert proxy.requests == []


def test_what_lies_here_is_not_of_the_repo_that_a_lockfile_names(
    repo: str, bundle: Bundle, locked: Path, settings: Settings, tmp_path: Path
) -> None:
    (one,) = Lock.read(locked).repos
    ref = RepoRef("acme/does-not-exist", "v1")
    Lock((replace(one, ref=ref, commit="1" * 40),)).write(locked)
    with Mirror.open(settings.mirror) as mirror:
        mirror.trust.add(settings.endpoint, "acme")
        put(mirror, bundle, PullOrigin(settings.endpoint, "mallory/x", "c" * 40, PLACE))
    offline = replace(settings, offline=True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        pull(str(ref), offline, locked)
    with pytest.raises(RepoNotFound):
        pull(str(ref), settings, locked)
    with Mirror.open(settings.mirror) as mirror:
        assert not mirror.decide(bundle.manifest.digest).allowed


# What is locked stays


def test_what_is_locked_stays_in_the_mirror_while_the_lockfile_is_there(
    tmp_path: Path, repo: str, bundle: Bundle, locked: Path, settings: Settings
) -> None:
    host = tmp_path / "host.json"
    host.write_text(json.dumps(make_host().to_dict()))
    words = ("pull", f"{repo}@v1", "--lockfile", locked, "--host", host, "--trust")
    assert hubaoti(settings, *words).code == 0  # a process that has ended holds nothing
    digest = bundle.manifest.digest
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.usage.list_pins() == {digest: [str(locked)]}
        assert collect(mirror, max_bytes=0).artifacts == ()
        with pytest.raises(ArtifactHeld, match=f"pinned by {locked}"):
            remove(mirror, digest)
        locked.unlink()
        assert mirror.usage.list_pins() == {}
        assert [each.digest for each in collect(mirror, max_bytes=0).artifacts] == [digest]


def test_a_lockfile_is_one_holder_however_it_is_named_and_only_of_what_it_names(
    tmp_path: Path, repo: str, bundle: Bundle, locked: Path, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ref = RepoRef(repo, "v1")
    pull_artifact(ref, settings, make_host(), trust=True, locked=True)
    pull(f"{repo}@v1", settings, locked)
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.usage.list_pins() == {bundle.manifest.digest: [str(locked)]}
    other = make_bundle(tmp_path / "new", members={"model/new.so": b"new"})
    push_bundles([other], Destination(RepoRef(repo), tag="v2"), settings)
    api.lock(f"{repo}@v2", settings=settings).write(locked)
    with Mirror.open(settings.mirror) as mirror:  # which what it names now is not in yet
        assert mirror.usage.list_pins() == {}
    pull(f"{repo}@v2", settings, locked)
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.usage.list_pins() == {other.manifest.digest: [str(locked)]}


def test_a_pull_without_a_lock_pins_nothing(repo: str, locked: Path, settings: Settings) -> None:
    pull_artifact(RepoRef(repo, "v1"), settings, make_host(), trust=True)
    with Mirror.open(settings.mirror) as mirror:
        assert mirror.usage.list_pins() == {}


def test_a_lockfile_that_cannot_be_looked_at_is_taken_to_be_there(settings: Settings) -> None:
    with Mirror.open(settings.mirror) as mirror:
        mirror.usage.pin("a" * 64, "/" + "x" * 300)
        assert mirror.usage.list_pins() == {"a" * 64: ["/" + "x" * 300]}


# A program by it


def test_a_program_goes_by_the_lock_of_its_environment(
    repo: str, locked: Path, settings: Settings
) -> None:
    program = Settings.from_env({**settings.to_env(), "HUBAOTI_LOCK": str(locked)})
    assert program.lock == locked
    with pytest.raises(NotLocked):
        pull_artifact(RepoRef(repo, "main"), program, make_host(), trust=True)
    assert pull_artifact(RepoRef(repo, "v1"), program, make_host(), trust=True)


def test_what_is_here_is_attached_only_where_it_is_locked(
    tmp_path: Path, bundle: Bundle, locked: Path, settings: Settings
) -> None:
    stranger = make_bundle(tmp_path / "stranger", mode="max-autotune")
    with Mirror.open(settings.mirror) as mirror:
        mine, other = put_trusted(bundle, mirror), put_trusted(stranger, mirror)
    program = replace(settings, lock=locked)  # of HUBAOTI_LOCK: nothing else need say so
    for words in ((settings, report_nothing, locked), (program, report_nothing)):
        for held in (mine, bundle, bundle.path):
            assert get_artifact(held, False, *words).digest == mine.digest
        for refused in (other, stranger, stranger.path):
            with pytest.raises(NotLocked, match=other.digest[:12]):
                get_artifact(refused, False, *words)


def test_an_engine_takes_of_the_mirror_what_is_locked(
    tmp_path: Path, bundle: Bundle, locked: Path, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stranger = make_bundle(tmp_path / "stranger", mode="max-autotune")
    with Mirror.open(settings.mirror) as mirror:
        mine, _ = put_trusted(bundle, mirror), put_trusted(stranger, mirror)
    monkeypatch.setattr(Wanted, "accepts", lambda *_: True)  # whatever model it is
    wanted, program = Wanted(tmp_path, "embed", "cpu", make_host()), replace(settings, lock=locked)
    found = find_in_mirror(wanted, program)
    assert found is not None and found.digest == mine.digest
    with Mirror.open(settings.mirror) as mirror:
        mirror.index.remove(mine.digest)
    assert find_in_mirror(wanted, program) is None
    assert find_in_mirror(wanted, settings) is not None


def test_the_commands_lock_and_pull_all_that_is_locked(
    tmp_path: Path, repo: str, bundle: Bundle, locked: Path, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    locked.unlink()
    done = inside(settings, "pull", "--locked")
    assert done.code == BadLock.exit_code and "hubaoti lock" in done.err
    done = inside(settings, "lock", f"{repo}@v1", repo)
    assert done.code == 0 and f"{repo}@v1: 2 artifacts at" in done.out
    before = locked.read_bytes()
    assert inside(settings, "lock", repo, f"{repo}@v1").code == 0
    assert locked.read_bytes() == before
    host = tmp_path / "host.json"
    host.write_text(json.dumps(make_host().to_dict()))
    words = ("--trust", "--host", host, "--json")
    done = inside(settings, "pull", "--locked", *words)
    assert done.code == 0, done.err
    assert [each["digest"] for each in json.loads(done.out)] == [bundle.manifest.digest] * 2
    done = inside(settings, "pull", repo, "--lockfile", locked, *words)
    assert json.loads(done.out)["from_mirror"]
    assert inside(settings, "pull").code == 2
