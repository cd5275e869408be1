"""Trust: said once, kept in a file that nobody else may write, taken back at any time."""

from __future__ import annotations

import multiprocessing
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from disks import read_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubaoti.errors import HubaotiError, UnsafeFolder
from hubaoti.mirror.trust import Publisher, Trust

HUB = "https://huggingface.co"


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    return Trust(tmp_path / "home/trust.toml")


def test_nobody_is_trusted_at_first(trust: Trust) -> None:
    assert trust.publishers() == ()
    assert not trust.holds(HUB, "acme")
    assert not trust.path.parent.exists()  # and asking makes nothing


def test_who_was_trusted_once_stays_trusted(trust: Trust) -> None:
    trust.add(HUB, "acme")
    trust.add(HUB, "acme")
    assert Trust(trust.path).holds(HUB, "acme")
    assert trust.publishers() == (Publisher(HUB, "acme", datetime.now(UTC).date()),)


def test_trust_is_for_one_owner_at_one_endpoint(trust: Trust) -> None:
    trust.add(HUB, "acme")
    for endpoint, owner in (
        (HUB, "Acme"),
        (HUB, "acm"),
        (HUB, ""),
        ("http://127.0.0.1", "acme"),
        (HUB + "/", "acme"),
    ):
        assert not trust.holds(endpoint, owner)


def test_trust_is_taken_back(trust: Trust) -> None:
    trust.add(HUB, "acme")
    trust.add(HUB, "other")
    assert trust.remove(HUB, "acme")
    assert not trust.remove(HUB, "acme")
    assert [each.owner for each in trust.publishers()] == ["other"]


def test_the_file_is_ours_alone(trust: Trust) -> None:
    trust.add(HUB, "acme")
    assert stat.S_IMODE(trust.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(trust.path.parent.stat().st_mode) == 0o700
    names = {path.name for path in trust.path.parent.iterdir()}
    assert names == {"trust.toml", "trust.toml.lock"}


def change(path: Path, owner: str) -> None:
    trust = Trust(path)
    for turn in range(5):
        trust.add(HUB, f"{owner}-{turn}")
    trust.remove(HUB, f"{owner}-0")


def test_no_change_is_lost_among_many_processes(trust: Trust) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.starmap(change, [(trust.path, f"owner{at}") for at in range(8)], chunksize=1)
        pool.close()
        pool.join()
    expected = {f"owner{at}-{turn}" for at in range(8) for turn in range(1, 5)}
    assert {each.owner for each in trust.publishers()} == expected


def test_what_is_trusted_already_is_so_without_writing(trust: Trust) -> None:
    trust.add(HUB, "acme")
    with read_only(trust.path.parent):
        trust.add(HUB, "acme")
        assert not trust.remove(HUB, "stranger")
        with pytest.raises(HubaotiError, match="Read-only"):
            trust.remove(HUB, "acme")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_others_may_write_says_nothing(trust: Trust, what: str) -> None:
    trust.add(HUB, "acme")
    path = trust.path if what == "file" else trust.path.parent
    path.chmod(0o777)
    for act in (
        lambda: trust.holds(HUB, "acme"),
        lambda: trust.add(HUB, "evil"),
        lambda: trust.remove(HUB, "acme"),
    ):
        with pytest.raises(UnsafeFolder) as caught:
            act()
        assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "publisher = 3",
        "publisher = ['acme']",
        "[[publisher]]\nowner = 'acme'",
        "[[publisher]]\nowner = 'acme'\nendpoint = 'x'\nsince = 'today'",
        "[[publisher]]\nowner = 1\nendpoint = 'x'\nsince = 2026-01-01",
        "[[publisher]]\nowner = 'acme'\nendpoint = 'x'\nsince = 2026-01-01\nmore = 1",
        "\xff\x00",
    ],
)
def test_a_file_that_is_not_ours_is_said_and_trusts_nobody(trust: Trust, text: str) -> None:
    trust.path.parent.mkdir(mode=0o700)
    trust.path.write_text(text)
    trust.path.chmod(0o600)
    with pytest.raises(HubaotiError, match="trust.toml cannot be read") as caught:
        trust.holds("x", "acme")
    assert caught.value.hint


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(owners=st.lists(st.text(max_size=12), max_size=4, unique=True))
def test_whoever_is_added_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, owners: list[str]
) -> None:
    trust = Trust(tmp_path_factory.mktemp("trust") / "trust.toml")
    for owner in owners:
        trust.add(HUB, owner)
    assert [each.owner for each in trust.publishers()] == owners
