"""What is asked for in an odd way is refused in words, with a hint that helps to the letter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle
from commands import inside

import hubaoti
from hubaoti import errors
from hubaoti.artifact.bundle import Bundle
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.mirror import Mirror
from hubaoti.settings import Settings


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


ODD: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "push nothing": ("push", (None, "acme/x"), {}),
    "push a number among bundles": ("push", (["bundle", 3], "acme/x"), {}),
    "push to a number": ("push", ([], 3), {}),
    "push with a tag that is a number": ("push", ([], "acme/x"), {"tag": 3}),
    "pull a number": ("pull", (3,), {}),
    "pull for a number": ("pull", ("acme/x",), {"host": 3}),
    "pull by a lock that is a number": ("pull", ("acme/x",), {"locked": 3}),
    "explain for a number": ("explain_repo", ("acme/x",), {"host": 3.5}),
    "lock a number": ("lock", (3,), {}),
}


@pytest.mark.parametrize("how", ODD)
def test_what_is_of_another_type_is_a_bad_request(
    how: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    verb, words, options = ODD[how]
    with pytest.raises(errors.BadRequest) as why:
        getattr(hubaoti, verb)(*words, settings=settings, **options)
    assert why.value.hint


@pytest.mark.parametrize("name", ["nowhere/acme", ".."])
def test_a_key_is_made_in_a_folder_that_is_there(
    name: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = inside(settings, "trust", "keygen", name)
    assert done.code == errors.BadRequest.exit_code and "hint: " in done.err, done
    assert not any(tmp_path.glob("*pem"))


@pytest.mark.parametrize(
    "words", [("push", "BUNDLE"), ("versions",), ("explain",), ("lock",), ("pull",), ("search",)]
)
def test_offline_nobody_is_told_to_do_what_would_not_help(
    words: tuple[str, ...], bundle: Bundle, repo: str, settings: Settings,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    given = [bundle.path if each == "BUNDLE" else each for each in words]
    done = inside(settings, *given, *([] if words == ("search",) else [repo]), "-q",
                  *(["--as-is"] if "BUNDLE" in words else []))  # fmt: skip
    assert done.code == errors.HubUnreachable.exit_code, done
    assert "unset HF_HUB_OFFLINE" in done.err and "hubaoti pull gives" in done.err
    assert "or name a full commit id" not in done.err


def test_what_the_hint_says_that_a_pull_gives_offline_it_gives(
    bundle: Bundle, repo: str, settings: Settings
) -> None:
    made = push_bundles([bundle], Destination(RepoRef(repo)), settings)
    offline = replace(settings, offline=True)
    for revision in (made.commit, f"sha256:{bundle.manifest.digest}"):
        with pytest.raises(errors.HubaotiError):
            hubaoti.pull(f"{repo}@{revision}", trust=True, settings=offline)
        first = hubaoti.pull(f"{repo}@{revision}", trust=True, settings=settings)
        again = hubaoti.pull(f"{repo}@{revision}", settings=offline)
        assert again.from_mirror and again.artifact.digest == first.artifact.digest
        with Mirror.open(settings.mirror) as mirror:
            mirror.index.remove(first.artifact.digest)


def test_what_is_damaged_is_got_again_as_it_came(
    bundle: Bundle, settings: Settings, tmp_path: Path
) -> None:
    files = {each.path: bundle.path / each.path for each in bundle.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        artifact = mirror.put(bundle.manifest, files)
        for name in ("golden.safetensors", "hubaoti.json"):
            artifact.file(name).unlink()
    done = inside(settings, "mirror", "export", artifact.digest, tmp_path / "out.tar")
    assert done.code == errors.DigestMismatch.exit_code and "import" in done.err, done
