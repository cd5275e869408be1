"""Trust: said once, kept in a file that nobody else may write, taken back at any time."""

from __future__ import annotations

import multiprocessing
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from disks import read_only
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_mirror_commands import at_most

from hubaoti.errors import HubaotiError, UnsafeFolder
from hubaoti.mirror.limits import Limits
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.signer import Signer
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


# Who has to sign

KEY, OTHER = Signer(key="a" * 64), Signer(key="b" * 64)
WHO = Signer(identity="release@acme.example", issuer="https://login.example")


def test_a_signer_who_is_named_stays_so_until_the_publisher_is_removed(trust: Trust) -> None:
    trust.add(HUB, "acme")
    since = trust.publishers()[0].since
    assert trust.holds(HUB, "acme")
    trust.add(HUB, "acme", KEY)
    assert trust.publishers() == (Publisher(HUB, "acme", since, KEY),)
    assert not trust.holds(HUB, "acme")
    trust.add(HUB, "acme")  # as pull --trust does
    trust.add(HUB, "acme", KEY)
    assert trust.publishers() == (Publisher(HUB, "acme", since, KEY),)
    assert trust.remove(HUB, "acme")
    trust.add(HUB, "acme")
    assert trust.holds(HUB, "acme")


def test_one_of_several_signers_is_enough_and_each_is_read_back(trust: Trust) -> None:
    for signer in (KEY, OTHER, WHO, KEY):
        trust.add(HUB, "acme", signer)
    said = trust.read()
    assert said.list_signers(HUB, "acme") == (KEY, OTHER, WHO)
    for signer in (KEY, OTHER, WHO):
        assert said.trusts(HUB, "acme", [Signed(HUB, "acme/x", "path", str(signer))])
    assert not said.trusts(HUB, "acme", [Signed(HUB, "acme/x", "path", "key " + "c" * 64)])


# Names that are made of what stands between names, too.
PARTS = st.sampled_from(["x", "y", " of ", "y", " by root ", "a" * 64, '"', "\\", " "])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("".join) | st.text(min_size=1, max_size=4)
SIGNERS = st.builds(
    Signer, identity=NAMES, issuer=NAMES, root=st.none() | st.just("a" * 64)
) | st.builds(Signer, identity=NAMES, root=st.just("a" * 64))


@settings(deadline=None)
@given(SIGNERS, SIGNERS)
@example(Signer(identity="x of y", root="a" * 64), Signer(identity="x", issuer="y", root="a" * 64))
@example(
    Signer(identity="x", issuer=f"y by root {'a' * 64}"),
    Signer(identity="x", issuer="y", root="a" * 64),
)
def test_no_two_signers_are_called_alike(one: Signer, another: Signer) -> None:
    assert (str(one) == str(another)) == (one == another)


def test_whom_one_word_names_is_called_as_ever() -> None:
    """For by that text it is known whose signatures were verified."""
    assert str(WHO) == "identity release@acme.example of https://login.example"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"key": "a" * 63},
        {"key": "A" * 64},
        {"key": "a" * 64, "identity": "me", "issuer": "x"},
        {"key": "a" * 64, "root": "b" * 64},
        {"identity": "me"},
        {"identity": "", "issuer": "x"},
        {"issuer": "x", "root": "a" * 64},
        {"identity": "me", "root": "../../etc/passwd"},
        {"identity": 1, "issuer": "x"},
    ],
)
def test_who_is_nobody_signs_nothing(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        Signer(**fields)


@pytest.mark.parametrize(
    "more",
    ["key = 'a'", "identity = 'me'", "key = 3", "signer = 'me'", "root = '../x'\nidentity = 'me'"],
)
def test_a_signer_that_is_malformed_leaves_nobody_trusted(trust: Trust, more: str) -> None:
    write(trust, f"[[publisher]]\nowner = 'acme'\nendpoint = 'x'\nsince = 2026-01-01\n{more}\n")
    with pytest.raises(HubaotiError, match="cannot be read"):
        trust.holds("x", "acme")


# What manifests may claim


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", Limits()),
        ("[limits]\ntolerance = 1e-3\nmemory = 1000000", Limits(1e-3, 1_000_000)),
        ("[limits]\nwithout_golden = true", Limits(without_golden=True)),
    ],
)
def test_limits_are_what_the_file_says(trust: Trust, text: str, limits: Limits) -> None:
    write(trust, text)
    assert trust.read().limits == limits


@pytest.mark.parametrize(
    "text",
    [
        "tolerance = '1'",
        "memory = true",
        "without_golden = 1",
        "more = 1",
        "memory = []",
        "memory = nan",
        "tolerance = nan",
    ],
)
def test_limits_that_are_none_are_said_and_nothing_is_believed(trust: Trust, text: str) -> None:
    write(trust, f"[limits]\n{text}\n")
    with pytest.raises(HubaotiError, match="cannot be read"):
        trust.read()


def write(trust: Trust, text: str) -> None:
    trust.path.parent.mkdir(mode=0o700)
    trust.path.write_text(text)
    trust.path.chmod(0o600)


COMMENTED = """\
# whom we trust

[[publisher]]  # {name}
endpoint = "https://huggingface.co"
owner = "acme"  # the team
since = 2026-01-31
# behind acme

# the second one
[[publisher]]
endpoint = "https://huggingface.co"
owner = "other"
since = 2026-01-31
# at the end
"""


def test_comments_outlive_whom_they_stand_beside(trust: Trust) -> None:
    trust.add(HUB, "acme")
    trust.path.write_text(COMMENTED)
    comments = [line for line in COMMENTED.splitlines() if line.startswith("#")]
    trust.add(HUB, "third")
    trust.block(HUB, "other")
    for owner in ("acme", "third", "other"):
        assert trust.remove(HUB, owner)
        lines = trust.path.read_text().splitlines()
        assert [line for line in lines if line.startswith("#")] == comments, owner
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_a_table_that_is_written_otherwise_is_changed_all_the_same(trust: Trust) -> None:
    trust.add(HUB, "acme")
    one = f'{{ endpoint = "{HUB}", owner = "OWNER", since = 2026-01-31 }}'
    entries = ", ".join(one.replace("OWNER", owner) for owner in ("a", "b"))
    trust.path.write_text(f"publisher = [{entries}]\n")
    assert trust.remove(HUB, "a")
    assert [each.owner for each in trust.publishers()] == ["b"]


def test_of_what_is_no_plain_file_nothing_is_awaited_and_nobody_is_trusted(trust: Trust) -> None:
    trust.path.parent.mkdir(mode=0o700)
    os.mkfifo(trust.path, 0o600)
    with at_most(10.0), pytest.raises(HubaotiError, match="a pipe or a device"):
        trust.holds(HUB, "acme")
    trust.path.unlink()
    trust.path.touch(0o600)
    os.truncate(trust.path, 20 << 30)
    with at_most(10.0), pytest.raises(HubaotiError, match="larger than 16 MiB"):
        trust.holds(HUB, "acme")
    with at_most(10.0), pytest.raises(HubaotiError, match="larger than 16 MiB"):
        trust.add(HUB, "acme")


def test_a_file_that_is_reached_by_a_link_and_has_windows_lines_is_read(trust: Trust) -> None:
    trust.add(HUB, "acme")
    content = trust.path.read_bytes()
    trust.path.with_name("real").write_bytes(content.replace(b"\n", b"\r\n"))
    trust.path.with_name("real").chmod(0o600)
    trust.path.unlink()
    trust.path.symlink_to("real")
    assert trust.holds(HUB, "acme")


@pytest.mark.parametrize("table", ["publisher", "artifact", "block"])
def test_a_table_that_is_to_be_a_list_is_said_with_its_brackets(trust: Trust, table: str) -> None:
    trust.path.parent.mkdir(mode=0o700)
    trust.path.write_text(f"[{table}]\nowner = 'acme'\nendpoint = 'x'\nsince = 2026-01-01\n")
    trust.path.chmod(0o600)
    with pytest.raises(HubaotiError, match=rf"write \[\[{table}\]\]"):
        trust.holds("x", "acme")
