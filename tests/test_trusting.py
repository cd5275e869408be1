"""Whom `hubaoti trust` means: an owner at an endpoint, or an artifact, and never the other one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_bundle
from commands import inside

from hubaoti import errors
from hubaoti.artifact.bundle import Bundle
from hubaoti.mirror import Mirror
from hubaoti.mirror.rows import Pin, PullOrigin
from hubaoti.mirror.trust import Publisher, Trust
from hubaoti.settings import Settings

OTHER = "http://127.0.0.1:9/hub"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def digest(bundle: Bundle, settings: Settings) -> str:
    """That of an artifact that was pulled of mallory's once."""
    digest = bundle.manifest.digest
    with Mirror.open(settings.mirror) as mirror:
        pin = Pin(settings.endpoint, "mallory/x", "b" * 40, "", "host")
        mirror.index.record_pull(pin, digest, "path")
    return digest


def say(settings: Settings, *words: object) -> str:
    """What a command printed that went well."""
    done = inside(settings, "trust", *words)
    assert done.code == 0, done
    return done.out


def refuse(settings: Settings, *words: object) -> str:
    """What a command said that did nothing."""
    before = Trust(settings.trust).read()
    done = inside(settings, "trust", *words)
    assert done.code == errors.BadRequest.exit_code, done
    assert Trust(settings.trust).read() == before
    return done.err


@pytest.mark.parametrize("verb", ["add", "block"])
def test_a_digest_means_its_artifact_as_it_is_printed_and_in_capitals(
    verb: str, digest: str, settings: Settings
) -> None:
    for word in (digest[:12], digest[:40], digest.upper(), f"sha256:{digest}", digest):
        assert f"artifact {digest} is " in say(settings, verb, word)
        said = Trust(settings.trust).read()
        assert (said.names if verb == "add" else said.blocks_artifact)(digest)
        assert not said.publishers
        assert f"artifact {digest} is no longer" in say(settings, "rm", word)
        assert Trust(settings.trust).read() == type(said)()


def test_digits_that_begin_no_digest_here_are_nobody_until_it_is_said_that_they_are_an_owner(
    digest: str, settings: Settings
) -> None:
    assert "all 64 digits, or the owner as owner:facade" in refuse(settings, "block", "facade")
    assert "digits" in refuse(settings, "block", "0" * 12)
    short = refuse(settings, "block", digest[:6])
    assert "may be called so" in short and digest in short
    assert "begins 1 digest here" in short
    assert "facade at" in say(settings, "block", "owner:facade")
    assert Trust(settings.trust).read().blocks(settings.endpoint, "facade")


def test_what_is_trusted_here_alone_is_known_by_the_beginning_of_its_digest(
    settings: Settings,
) -> None:
    say(settings, "add", "a" * 64)
    assert "no longer" in say(settings, "rm", "a" * 12)
    say(settings, "add", "a" * 64)
    say(settings, "add", "a" * 63 + "b")
    assert "begins 2 digests" in refuse(settings, "rm", "a" * 12)


def test_a_bundle_that_is_called_like_an_owner_is_neither_until_that_is_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "acme")
    monkeypatch.chdir(tmp_path)
    for verb in ("add", "block", "rm"):
        message = refuse(settings, verb, "acme")
        assert "owner:acme, or ./acme" in message
    assert f"acme at {settings.endpoint} is blocked" in say(settings, "block", "owner:acme")
    for word in ("./acme", "acme/", bundle.path):
        assert f"artifact {bundle.manifest.digest} is blocked" in say(settings, "block", word)
    said = Trust(settings.trust).read()
    assert said.blocks(settings.endpoint, "acme")
    assert said.blocks_artifact(bundle.manifest.digest)


def test_an_owner_is_blocked_in_whichever_letters_he_is_named(settings: Settings) -> None:
    say(settings, "add", "mallory")
    say(settings, "block", "Mallory")
    said = Trust(settings.trust).read()
    assert said.blocks(settings.endpoint, "mallory") and not said.publishers
    done = inside(settings, "trust", "add", "mallory")
    assert done.code == errors.Blocked.exit_code, done
    say(settings, "block", "MALLORY")
    assert len(Trust(settings.trust).read().blocked) == 1
    assert "no longer" in say(settings, "rm", "mallory")
    assert "is trusted" in say(settings, "add", "mallory")
    assert "no longer" in say(settings, "rm", "MALLORY")


def test_the_hint_of_a_stranger_s_artifact_trusts_who_published_it_whichever_endpoint_is_today_s(
    digest: str, settings: Settings
) -> None:
    today = replace(settings, endpoint=OTHER)
    with Mirror.open(today.mirror) as mirror:
        refusal = mirror.decide(digest).refusal
    assert isinstance(refusal, errors.Untrusted) and settings.endpoint in str(refusal)
    say(today, *refusal.hint.rpartition("hubaoti trust ")[2].split())
    (publisher,) = Trust(settings.trust).publishers()
    assert (publisher.owner, publisher.endpoint) == ("mallory", settings.endpoint)
    with Mirror.open(today.mirror) as mirror:
        assert mirror.decide(digest).allowed


def test_the_hint_of_what_is_blocked_takes_that_back_whichever_endpoint_is_today_s(
    digest: str, settings: Settings
) -> None:
    say(settings, "block", "Mallory")
    today = replace(settings, endpoint=OTHER)
    for _ in ("the owner", "the artifact"):
        with Mirror.open(today.mirror) as mirror:
            refusal = mirror.decide(digest).refusal
        assert isinstance(refusal, errors.Blocked)
        say(today, *refusal.hint.rpartition("hubaoti trust ")[2].split())
        with Mirror.open(today.mirror) as mirror:
            assert not isinstance(mirror.decide(digest).refusal, errors.Blocked)
        say(settings, "block", digest)


def test_an_owner_who_is_called_like_a_digest_is_meant_by_the_hint(settings: Settings) -> None:
    origin = PullOrigin(OTHER, "facade/x", "b" * 40, "path")
    with Mirror.open(settings.mirror) as mirror:
        refusal = mirror.decide("c" * 64, origin).refusal
    assert refusal is not None
    say(settings, *refusal.hint.rpartition("hubaoti trust ")[2].split())
    (publisher,) = Trust(settings.trust).publishers()
    assert publisher == Publisher(OTHER, "facade", publisher.since)


def test_an_endpoint_is_a_url_and_of_an_owner(digest: str, settings: Settings) -> None:
    assert "no endpoint" in refuse(settings, "add", "acme", "--endpoint", "huggingface.co")
    assert "every endpoint" in refuse(settings, "add", digest, "--endpoint", OTHER)
    assert f"acme at {OTHER} is trusted" in say(settings, "add", "acme", "--endpoint", f"{OTHER}/")


def test_who_corrects_the_file_is_told_what_removing_it_forgets(settings: Settings) -> None:
    settings.home.mkdir(exist_ok=True, mode=0o700)
    settings.trust.write_text("[[block")
    done = inside(settings, "trust", "ls")
    assert "nobody is blocked either" in done.err and "had to sign" in done.err


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc", "huggingface.co", "http://x:abc", ""])
def test_an_owner_is_of_an_endpoint_that_can_be_asked(settings: Settings, url: str) -> None:
    done = inside(settings, "trust", "add", "acme", "--endpoint", url)
    assert done.code == 2 and "hint: " in done.err and not settings.trust.exists()
