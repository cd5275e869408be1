"""The mirror within its budget: what leaves, in which order, and what never does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from bundles import CPU, make_bundle
from commands import hubaoti, inside
from disks import immovable
from hypothesis import given
from hypothesis import strategies as st
from test_leases import running
from test_mirror_store import files_of, put

from hubaoti import api, errors
from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import BUILT_HERE, Artifact, Mirror, PullOrigin
from hubaoti.mirror.eviction import Candidate, estimate_cost, order
from hubaoti.mirror.gc import BUDGET, collect, read_budget
from hubaoti.mirror.retry import retry
from hubaoti.mirror.usage import Usage
from hubaoti.settings import Settings

SIZE = 100_000  # bytes of an artifact, about
HERE = version("torch")


@pytest.fixture
def mirror(settings: Settings) -> Iterator[Mirror]:
    with Mirror.open(settings.mirror) as found:
        found.trust.add("https://hub", "acme")
        yield found


def make(folder: Path, name: str, torch: str = HERE) -> Bundle:
    """A bundle of a size, which shares nothing with another."""
    content = random.Random(name).randbytes(SIZE)
    target = {**CPU, "torch": f"{torch.partition('+')[0]}+cpu"}
    return make_bundle(folder / name, target, {"model/root.so": content}, mode=name)


def origin(name: str, owner: str = "acme") -> PullOrigin:
    return PullOrigin("https://hub", f"{owner}/{name}", "c" * 40, "path")


def fill(mirror: Mirror, folder: Path, *names: str) -> list[Artifact]:
    """Artifacts as if they had been pulled of a publisher who is trusted."""
    return [put(mirror, make(folder, name), origin(name)) for name in names]


def here(mirror: Mirror) -> set[str]:
    return {row.digest for row in mirror.ls()}


def use(mirror: Mirror, artifact: Artifact, times: int) -> None:
    for _ in range(times):
        mirror.usage.record_open(artifact.digest)


# The order


candidates = st.builds(
    Candidate,
    digest=st.text("abcdef", min_size=4, max_size=4),
    size=st.integers(1, 10**9),
    opens=st.integers(0, 1000),
    cost=st.floats(0, 1e5),
    age=st.floats(0, 1e3),
    is_allowed=st.booleans(),
    is_runnable=st.booleans(),
)


@given(st.lists(candidates))
def test_what_may_not_be_opened_leaves_first_and_then_what_no_torch_runs(
    found: list[Candidate],
) -> None:
    kinds = [(each.is_allowed, each.is_runnable) for each in order(found)]
    assert kinds == sorted(kinds)
    for one, other in zip(order(found), order(found)[1:], strict=False):
        same = (one.is_allowed, one.is_runnable) == (other.is_allowed, other.is_runnable)
        assert not same or one.worth <= other.worth


@given(candidates, st.integers(1, 50))
def test_more_uses_and_more_seconds_are_worth_more(each: Candidate, more: int) -> None:
    assert replace(each, opens=each.opens + more).worth >= each.worth
    assert replace(each, cost=each.cost + more).worth >= each.worth
    assert replace(each, size=each.size + more).worth <= each.worth
    assert replace(each, age=each.age + more).worth > each.worth


def test_what_is_nowhere_else_costs_its_compile() -> None:
    assert estimate_cost(25_000_000, 7.0, None) == 7.0
    assert estimate_cost(25_000_000, 0.0, None) == 2.0
    assert estimate_cost(25_000_000, 7.0, 300.0) == 300.0


# The budget


def test_the_budget_is_a_fifth_of_the_disk_until_somebody_says_another(
    mirror: Mirror, settings: Settings
) -> None:
    disk = os.statvfs(mirror.root)
    total = disk.f_frsize * disk.f_blocks
    default = min(max(int(total * 0.2), 10**9), 50 * 10**9)
    assert read_budget(mirror) == default
    assert "of 2.0 MB are used" in inside(settings, "mirror", "budget", "2MB").out
    assert read_budget(mirror) == 2_000_000
    inside(settings, "mirror", "budget", "default")
    assert read_budget(mirror) == default
    assert inside(settings, "mirror", "budget", "much").code == errors.BadRequest.exit_code
    assert inside(settings, "mirror", "gc", "--older-than", "-3d").code == 2


def test_a_put_that_goes_over_the_budget_has_the_least_used_leave(
    mirror: Mirror, tmp_path: Path
) -> None:
    mirror.usage.record_number(BUDGET, 3.5 * SIZE)
    one, two, three = fill(mirror, tmp_path, "one", "two", "three")
    use(mirror, one, 5), use(mirror, three, 5)
    (four,) = fill(mirror, tmp_path, "four")
    assert here(mirror) == {one.digest, three.digest, four.digest}
    assert not two.path.exists() and not two.graph_folder(two.manifest.graphs[0]).exists()
    assert mirror.usage.count_bytes() <= 3.5 * SIZE
    for artifact in (one, three, four):
        mirror.verify(artifact)


def test_how_often_something_was_used_is_remembered_when_it_comes_back(
    mirror: Mirror, tmp_path: Path
) -> None:
    mirror.usage.record_number(BUDGET, 2.5 * SIZE)
    one, _ = fill(mirror, tmp_path, "one", "two")
    use(mirror, one, 9)
    mirror.index.remove(one.digest)
    put(mirror, Bundle.read(tmp_path / "one"), origin("one"))
    fill(mirror, tmp_path, "three")
    assert one.digest in here(mirror)


def test_what_was_used_much_long_ago_leaves_at_last(mirror: Mirror, tmp_path: Path) -> None:
    mirror.usage.record_number(BUDGET, 3.5 * SIZE)
    (old,) = fill(mirror, tmp_path, "old")
    use(mirror, old, 6)
    for turn in range(20):
        (new,) = fill(mirror, tmp_path, f"new{turn}")
        use(mirror, new, 2)
    assert mirror.usage.read_age() > 0
    assert old.digest not in here(mirror)


def test_what_is_pinned_open_or_built_here_alone_never_leaves(
    mirror: Mirror, tmp_path: Path
) -> None:
    pinned, opened, built, pushed, other = fill(
        mirror, tmp_path, "pinned", "opened", "built", "pushed", "other"
    )
    for artifact in (built, pushed):
        mirror.index.remove(artifact.digest)
        with mirror.index.writing() as db:  # nobody ever pulled them
            db.execute("delete from origins where digest = ?", (artifact.digest,))
        put(mirror, Bundle.read(tmp_path / artifact.manifest.build.mode), BUILT_HERE)
        mirror.index.record_built(artifact.manifest)
    mirror.usage.record_pushed([pushed.digest], origin("pushed"))
    mirror.usage.pin(pinned.digest)
    with running(mirror.root, f"mirror.leases.hold('{opened.digest}')"):
        found = collect(mirror, max_bytes=0)
        assert {each.digest for each in found.artifacts} == {pushed.digest, other.digest}
        assert here(mirror) == {pinned.digest, opened.digest, built.digest}
        for artifact in (pinned, opened, built):
            mirror.verify(artifact)
    mirror.usage.unpin(pinned.digest)
    collect(mirror, max_bytes=0, older_than=0)
    assert here(mirror) == {built.digest}


def test_what_no_torch_here_runs_leaves_first(mirror: Mirror, tmp_path: Path) -> None:
    foreign = put(mirror, make(tmp_path, "foreign", "2.1.0"), origin("foreign"))
    with mirror.index.writing() as db:
        db.execute("insert into usage values (?, 99, 0, 0, 9999)", (foreign.digest,))
    own = fill(mirror, tmp_path, "one", "two")
    found = collect(mirror, max_bytes=int(2.5 * SIZE))
    assert [(each.digest, each.why) for each in found.artifacts] == [
        (foreign.digest, "no torch here can run it")
    ]
    assert here(mirror) == {each.digest for each in own}


def test_what_another_torch_opens_is_of_use(mirror: Mirror, tmp_path: Path) -> None:
    """Environments of several torches share a home."""
    foreign = put(mirror, make(tmp_path, "foreign", "2.1.0"), origin("foreign"))
    use(mirror, foreign, 9)
    fill(mirror, tmp_path, "one", "two")
    collect(mirror, max_bytes=int(2.5 * SIZE))
    assert foreign.digest in here(mirror)


def test_what_is_of_nobody_trusted_any_more_is_collected(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    one, two = fill(mirror, tmp_path, "one", "two")
    mirror.trust.block_artifact(two.digest)
    done = json.loads(inside(settings, "mirror", "gc", "--json", "--dry-run").out)
    assert [each["digest"] for each in done["artifacts"]] == [two.digest]
    assert here(mirror) == {one.digest, two.digest}
    assert two.digest[:12] in inside(settings, "mirror", "gc").out
    assert here(mirror) == {one.digest}
    mirror.trust.remove("https://hub", "acme")
    assert "not trusted" in inside(settings, "mirror", "gc").out
    assert here(mirror) == set()


def test_what_is_blocked_and_pinned_stays_and_is_named_with_what_pins_it(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    one, two, _ = fill(mirror, tmp_path, "one", "two", "three")
    lock = tmp_path / "hubaoti.lock"
    lock.write_text(two.digest)
    mirror.usage.pin(one.digest), mirror.usage.pin(two.digest, str(lock))
    assert "stays: " not in inside(settings, "mirror", "gc", "--dry-run").out
    mirror.trust.block("https://hub", "acme")
    for words in (["--dry-run"], []):
        done = inside(settings, "mirror", "gc", *words).out
        for each, holder in ((one, "hubaoti mirror pin"), (two, lock)):
            (line,) = (said for said in done.splitlines() if each.digest[:12] in said)
            assert line.startswith("stays: ")
            assert line.endswith(f"published by acme, who is blocked, and pinned by {holder}")
    assert here(mirror) == {one.digest, two.digest}
    found = json.loads(inside(settings, "mirror", "gc", "--json").out)
    assert found["artifacts"] == []
    assert {each["digest"] for each in found["blocked"]} == {one.digest, two.digest}


def test_what_nobody_said_anything_of_yet_waits(mirror: Mirror, tmp_path: Path) -> None:
    """As after an import, or when the index was lost: it may be nowhere else."""
    unknown = put(mirror, make(tmp_path, "unknown"), BUILT_HERE)
    assert not mirror.decide(unknown.digest).allowed
    collect(mirror)
    assert here(mirror) == {unknown.digest}
    mirror.trust.block_artifact(unknown.digest)
    collect(mirror)
    assert here(mirror) == set()


def test_what_was_not_opened_for_long_leaves_where_that_is_said(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    old, used = fill(mirror, tmp_path, "old", "used")
    with mirror.index.writing() as db:
        db.execute("update artifacts set added = ?", (time.time() - 40 * 24 * 3600,))
    use(mirror, used, 1)
    budget = f"{read_budget(mirror) / 1e9:.1f} GB"
    used_up = f"{sum(row.size for row in mirror.ls()) / 1e3:.1f} kB of {budget}"
    nothing = inside(settings, "mirror", "gc").out
    assert nothing == f"removed 0 artifacts (0 B) and 0 stray files; {used_up} used\n"
    planned = inside(settings, "mirror", "gc", "--older-than", "30d", "--dry-run").out
    assert "would remove 1 artifact (" in planned and f" of {budget} would be used\n" in planned
    assert here(mirror) == {old.digest, used.digest}
    assert "not opened for 40" in inside(settings, "mirror", "gc", "--older-than", "30d").out
    assert here(mirror) == {used.digest}


def test_a_clock_that_goes_back_removes_nothing(mirror: Mirror, tmp_path: Path) -> None:
    (one,) = fill(mirror, tmp_path, "one")
    with mirror.index.writing() as db:
        db.execute("update artifacts set added = ?", (time.time() + 24 * 3600,))
    assert collect(mirror, older_than=0).artifacts == ()
    assert here(mirror) == {one.digest}


def test_what_does_not_go_in_is_refused_before_anything_leaves_for_it(
    mirror: Mirror, tmp_path: Path
) -> None:
    one, two = fill(mirror, tmp_path, "one", "two")
    mirror.usage.record_number(BUDGET, 2.5 * SIZE)
    mirror.usage.pin(one.digest), mirror.usage.pin(two.digest)
    with pytest.raises(errors.MirrorFull, match="205.2 kB pinned, or in a lockfile") as caught:
        fill(mirror, tmp_path, "three")
    assert "mirror budget" in caught.value.hint
    assert here(mirror) == {one.digest, two.digest}
    mirror.usage.unpin(one.digest)
    mirror.usage.record_number(BUDGET, 0.5 * SIZE)
    with pytest.raises(errors.MirrorFull):
        fill(mirror, tmp_path, "four")
    assert here(mirror) == {one.digest, two.digest}
    mine = make(tmp_path, "mine")
    put(mirror, mine, BUILT_HERE)  # an hour's compile is stored all the same
    assert mine.manifest.digest in here(mirror)


def test_what_is_larger_than_the_budget_is_said_so_and_nothing_leaves_for_it(
    mirror: Mirror, tmp_path: Path
) -> None:
    mirror.usage.record_number(BUDGET, 0.5 * SIZE)
    for names in (["one"], ["two"]):  # of an empty mirror, and of one with more than the budget
        with pytest.raises(errors.MirrorFull, match="whatever leaves for it") as caught:
            fill(mirror, tmp_path, *names)
        assert "pinned" not in str(caught.value) and "mirror budget" in caught.value.hint
        put(mirror, make(tmp_path, f"mine of {names[0]}"), BUILT_HERE)
    assert len(here(mirror)) == 2


def test_what_cannot_be_removed_keeps_nothing_else(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    one, two, three = fill(mirror, tmp_path, "one", "two", "three")
    left = mirror.root / "artifacts" / ("a" * 64)
    left.mkdir()
    with immovable(one.path), immovable(left):
        done = inside(settings, "mirror", "gc", "--max-bytes", "0", "--json")
        found = json.loads(done.out)
        assert len(found["artifacts"]) == 3 and found["after"] == 0
        stuck = sorted(each["path"] for each in found["stuck"])
        assert stuck == sorted(f"artifacts/{each.name}" for each in (one.path, left))
        assert not two.path.exists() and not three.path.exists()
        again = inside(settings, "mirror", "gc")
        assert done.code == again.code == 1 and here(mirror) == set()
        for each in (one.path, left):
            assert f"artifacts/{each.name}: Operation not permitted" in again.err
        fill(mirror, tmp_path, "four")
    assert inside(settings, "mirror", "gc").code == 0
    assert not one.path.exists() and not left.exists()


def test_what_has_to_leave_and_cannot_be_removed_is_in_no_pull_s_way(
    mirror: Mirror, tmp_path: Path
) -> None:
    (one,) = fill(mirror, tmp_path, "one")
    mirror.usage.record_number(BUDGET, 1.5 * SIZE)
    with immovable(one.path):
        (two,) = fill(mirror, tmp_path, "two")
        assert here(mirror) == {two.digest}


# What no row promises


def test_what_a_kill_left_is_found(mirror: Mirror, tmp_path: Path, settings: Settings) -> None:
    one, two = fill(mirror, tmp_path, "one", "two")
    mirror.index.remove(two.digest)  # as if the put had been killed before its row
    graph = two.graph_folder(two.manifest.graphs[0])
    (mirror.root / "kernels" / ("a" * 64)).mkdir()
    blobs = mirror.root / "hub/host~12345678/models--acme--one/blobs"
    blobs.mkdir(parents=True)
    for name, age in {"a.incomplete": 2, "b.incomplete": 0, "c": 48, "d": 2}.items():
        (blobs / name).write_bytes(bytes(2 << 20))
        then = time.time() - age * 3600
        os.utime(blobs / name, (then, then))
    found = json.loads(inside(settings, "mirror", "gc", "--dry-run", "--json").out)["orphans"]
    assert len(found) == 5 and f"artifacts/{two.digest}" in found
    assert two.path.exists()
    inside(settings, "mirror", "gc")
    assert not two.path.exists() and not graph.exists()
    assert {each.name for each in blobs.iterdir()} == {"b.incomplete", "d"}
    assert [*(mirror.root / "kernels").iterdir()] == []
    mirror.verify(one)
    assert json.loads(inside(settings, "mirror", "gc", "--json").out)["orphans"] == []


def test_what_is_open_without_a_row_stays(mirror: Mirror, tmp_path: Path) -> None:
    (one,) = fill(mirror, tmp_path, "one")
    with running(mirror.root, f"mirror.leases.hold('{one.digest}')"):
        mirror.index.remove(one.digest)
        assert collect(mirror).orphans == ()
        mirror.verify(one)
    assert len(collect(mirror).orphans) == 2


def test_what_is_in_quarantine_can_still_come_back(mirror: Mirror, tmp_path: Path) -> None:
    (one,) = fill(mirror, tmp_path, "one")
    mirror.quarantine(one.manifest.graphs[0])
    collect(mirror)
    retry(mirror)
    assert here(mirror) == {one.digest}
    mirror.verify(one)


# Counting never gets in the way


def test_an_open_is_counted_and_never_fails(mirror: Mirror, tmp_path: Path) -> None:
    (one,) = fill(mirror, tmp_path, "one")
    use(mirror, one, 3)
    assert mirror.usage.read()[one.digest].opens == 3
    with Mirror.open(mirror.root) as other, other.index.writing():
        began = time.monotonic()
        use(mirror, one, 1)  # somebody writes: it is not counted
        assert time.monotonic() - began < 2.0
    assert mirror.usage.read()[one.digest].opens == 3
    best = min(_time_open(mirror.usage, one.digest) for _ in range(20))
    assert best < 0.005


def _time_open(usage: Usage, digest: str) -> float:
    began = time.perf_counter()
    usage.record_open(digest)
    return time.perf_counter() - began


def test_a_clock_that_goes_back_a_day_takes_nothing_away_and_the_budget_holds(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fill(mirror, tmp_path, "one", "two")
    use(mirror, one, 1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 24 * 3600)
    assert collect(mirror, older_than=3600).artifacts == ()
    (three,) = fill(mirror, tmp_path, "three")
    use(mirror, two, 1)
    assert all(mirror.decide(each.digest).allowed for each in (one, two, three))
    code = f"mirror.leases.hold('{three.digest}')"
    with running(mirror.root, code):
        assert collect(mirror, max_bytes=int(2.5 * SIZE)).after <= 2.5 * SIZE
        monkeypatch.setattr(time, "time", lambda: now + 24 * 3600)
        collect(mirror, older_than=3600)
        assert here(mirror) == {three.digest}


def churn(root: Path, folder: Path, seed: int) -> int:
    """Random work of a process; the most bytes that it saw."""
    chance, most = random.Random(seed), 0
    bundles = [Bundle.read(each) for each in sorted(folder.iterdir())]
    with Mirror.open(root) as mirror:
        for _ in range(25):
            bundle, action = chance.choice(bundles), chance.random()
            digest = bundle.manifest.digest
            if action < 0.5:
                mirror.put(bundle.manifest, files_of(bundle), origin("x"))
            elif action < 0.8:
                mirror.usage.record_open(digest)
            elif action < 0.9:
                collect(mirror, max_bytes=2 * SIZE)
            elif (artifact := mirror.artifact(digest)) is not None:
                assert artifact.digest == digest
            most = max(most, mirror.usage.count_bytes())
    return most


def test_many_processes_never_exceed_the_budget_and_all_that_is_left_is_whole(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    for at in range(6):
        make(tmp_path / "bundles", f"b{at}")
    mirror.usage.record_number(BUDGET, 3.5 * SIZE)
    work = [(mirror.root, tmp_path / "bundles", seed) for seed in range(4)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        most = pool.starmap(churn, work)
        pool.close()
        pool.join()
    assert max(most) <= 3.5 * SIZE
    assert inside(settings, "verify").code == 0
    found = collect(mirror)
    assert found.orphans == () and found.after <= 3.5 * SIZE
    assert not any((mirror.root / "tmp").iterdir())


def measure(root: Path) -> int:
    """The bytes of all files below a mirror, as the disk has them, but for its index."""
    files = (each for each in root.glob("*/**/*") if each.is_file())
    return sum(each.stat().st_size for each in files)


def test_the_disk_has_no_more_than_the_budget_whatever_is_put_and_pulled(
    tmp_path: Path, mirror: Mirror, settings: Settings, repo: str
) -> None:
    """Not as the index counts it: all files that lie there, of downloads, too.

    Who pulls is a process each time, for what it pulled stays as long as it lives.
    """
    owner, budget, seen = repo.partition("/")[0], int(3.5 * SIZE), list[int]()
    mirror.usage.record_number(BUDGET, budget)
    mirror.trust.add(settings.endpoint, owner)
    for at in range(3):
        for name in (f"{at}-one", f"{at}-other"):
            put(mirror, make(tmp_path, name), origin(name))
            seen.append(measure(mirror.root))
        api.push(make(tmp_path, f"{at}"), f"{repo}-{at}", as_is=True, settings=settings)
        assert hubaoti(settings, "pull", f"{repo}-{at}").code == 0
        seen.append(measure(mirror.root))
    assert max(seen) <= budget
    assert max(seen) > budget / 2 and len(here(mirror)) < 4, "it was never near the budget"


CHURN = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_gc import churn
print("begun", flush=True)
for seed in range(1000):
    churn(Path(sys.argv[1]), Path(sys.argv[2]), seed)
"""


def test_whenever_a_process_is_killed_the_budget_holds_and_all_that_is_listed_is_whole(
    mirror: Mirror, tmp_path: Path, settings: Settings
) -> None:
    for at in range(4):
        make(tmp_path / "bundles", f"b{at}")
    mirror.usage.record_number(BUDGET, 2.5 * SIZE)
    command = [sys.executable, "-c", CHURN, str(mirror.root), str(tmp_path / "bundles")]
    for turn in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            time.sleep(0.05 + 0.13 * turn)
            assert process.poll() is None
            process.kill()
        with Mirror.open(mirror.root) as found:
            assert not any((found.root / "tmp").iterdir())
            assert found.usage.count_bytes() <= 2.5 * SIZE
            collect(found)
            assert collect(found).orphans == ()
        assert inside(settings, "verify").code == 0
