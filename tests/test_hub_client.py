"""The Hub's door: foreign errors in our words, no token in any of them, nothing printed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import make_bundle
from huggingface_hub import HfApi, ModelInfo, constants, errors
from huggingface_hub.utils import logging
from proxies import Proxy

from hubaoti import front_matter
from hubaoti.errors import (
    AuthFailed,
    BadRequest,
    Conflict,
    DigestMismatch,
    DiskFull,
    HubaotiError,
    HubUnreachable,
    RepoNotFound,
)
from hubaoti.hub.card import render
from hubaoti.hub.client import Entry, HubClient
from hubaoti.hub.door import endpoint_folder
from hubaoti.hub.errors import StaleParent, silence_hub
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

try:
    from huggingface_hub.utils import httpx
except ImportError:  # 1.30 has no name for its own transport
    import httpx

bars = import_module("huggingface_hub.utils.tqdm")
TOKEN = "hf_secret_of_ours"


@pytest.fixture
def client(settings: Settings) -> HubClient:
    return HubClient(settings)


@pytest.fixture(scope="module")
def model(endpoint: Endpoint) -> str:
    """A repo with a config and weights."""
    api = HfApi(endpoint.url, token=endpoint.token)
    api.create_repo("acme/model")
    for path in ("config.json", "model.safetensors", "sub/config.json"):
        api.upload_file(path_or_fileobj=path.encode(), path_in_repo=path, repo_id="acme/model")
    return "acme/model"


def answered(status: int, kind: type[errors.HfHubHTTPError], said: str = "said") -> Exception:
    request = httpx.Request("GET", "http://x/")
    return kind(f"\n\n{said}", response=httpx.Response(status, request=request))


HTTP = errors.HfHubHTTPError


@pytest.mark.parametrize(
    ("why", "expected", "writing"),
    [
        (answered(404, errors.RepositoryNotFoundError), RepoNotFound, False),
        (answered(401, errors.RepositoryNotFoundError), RepoNotFound, False),
        (answered(401, errors.RepositoryNotFoundError), AuthFailed, True),
        (answered(404, errors.RepositoryNotFoundError), RepoNotFound, True),
        (answered(404, errors.RevisionNotFoundError), RepoNotFound, False),
        (answered(404, errors.RemoteEntryNotFoundError), RepoNotFound, False),
        (answered(403, errors.GatedRepoError), AuthFailed, False),
        (answered(401, HTTP), AuthFailed, False),
        (answered(403, HTTP), AuthFailed, True),
        (answered(404, HTTP), RepoNotFound, False),
        (answered(409, HTTP), Conflict, True),
        (answered(412, HTTP), StaleParent, True),
        (answered(400, errors.BadRequestError), HubaotiError, True),
        (answered(429, HTTP), HubUnreachable, False),
        (answered(503, HTTP), HubUnreachable, False),
        (errors.OfflineModeIsEnabled("x"), HubUnreachable, False),
        (errors.LocalEntryNotFoundError("x"), HubUnreachable, False),
        (errors.HFValidationError("x"), BadRequest, False),
        (httpx.ConnectError("x"), HubUnreachable, False),
        (httpx.ReadTimeout("x"), HubUnreachable, False),
        (httpx.RemoteProtocolError("peer closed"), HubUnreachable, False),
        (ConnectionResetError(errno.ECONNRESET, "x"), HubUnreachable, False),
        (OSError("Consistency check failed: file should be of size 3"), HubUnreachable, False),
        (RuntimeError("Data processing error: CAS service error"), HubUnreachable, True),
        (RuntimeError("IO Error: No space left on device (os error 28)"), DiskFull, False),
        (UserWarning("Not enough free disk space to download"), DiskFull, False),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, False),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), HubaotiError, False),
        (json.JSONDecodeError("Expecting value", "<html>", 0), HubUnreachable, False),
        (ValueError("not of the network"), HubaotiError, False),
        (OSError(errno.EIO, "Input/output error", "/x"), HubaotiError, False),
        (KeyError("sha"), HubaotiError, False),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_a_foreign_error_becomes_ours(
    client: HubClient, why: Exception, expected: type[Exception], writing: bool
) -> None:
    with pytest.raises(expected) as caught, client._door("acme/x", writing):
        raise why
    assert type(caught.value) is expected
    assert caught.value.__cause__ is why
    if isinstance(caught.value, HubaotiError):
        assert caught.value.hint


def test_the_reason_behind_a_missing_local_file_is_the_reason(client: HubClient) -> None:
    why = errors.LocalEntryNotFoundError("cannot find the file")
    why.__cause__ = answered(403, HTTP)
    with pytest.raises(AuthFailed), client._door("acme/x"):
        raise why


@pytest.mark.parametrize("kind", [httpx.ConnectError, ValueError, RuntimeError])
def test_no_message_carries_the_token(settings: Settings, kind: type[Exception]) -> None:
    client = HubClient(replace(settings, token=TOKEN))
    why = kind(f"Illegal header value b'Bearer {TOKEN}'")
    with pytest.raises(HubaotiError) as caught, client._door("acme/x"):
        raise why
    assert TOKEN not in str(caught.value) + caught.value.hint
    assert "***" in str(caught.value)


def test_no_message_carries_a_token_that_is_spelled_otherwise(settings: Settings) -> None:
    client = HubClient(replace(settings, token=f"{TOKEN}\n\x01"))
    with pytest.raises(HubUnreachable) as caught:
        client.resolve("acme/x")
    assert TOKEN not in str(caught.value) + caught.value.hint


def test_an_odd_card_is_not_blamed_on_the_network(
    client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object, **__: object) -> ModelInfo:
        return ModelInfo(id="acme/x", tags=[], cardData={"tags": 5})

    monkeypatch.setattr(HfApi, "repo_info", odd)
    with pytest.raises(HubaotiError, match=r"acme/x: \w+: ") as caught:
        client.resolve("acme/x")
    assert type(caught.value) is HubaotiError


def test_our_own_errors_pass(client: HubClient) -> None:
    with pytest.raises(DigestMismatch, match="mine"), client._door("acme/x"):
        raise DigestMismatch("mine")


def test_without_any_token_the_hint_is_to_get_one(settings: Settings) -> None:
    client = HubClient(replace(settings, token=None))
    with pytest.raises(AuthFailed, match="wants a token") as caught:
        client.create("acme/new", private=False)
    assert "hf auth login" in caught.value.hint


def test_a_server_that_is_no_hub_is_said(settings: Settings, tmp_path: Path) -> None:
    code = "import http.server, sys\nserver = http.server.ThreadingHTTPServer(('127.0.0.1', 0), "
    code += "http.server.SimpleHTTPRequestHandler)\nprint(server.server_address[1], flush=True)\n"
    code += "server.serve_forever()"
    (tmp_path / "api/models/acme").mkdir(parents=True)
    (tmp_path / "api/models/acme/x").write_text("<html>")
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:  # type: ignore[call-overload]
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        client = HubClient(replace(settings, endpoint=url))
        with pytest.raises(HubUnreachable, match=url):
            client.resolve("acme/x")
        with pytest.raises(RepoNotFound):
            client.resolve("acme/y")
        process.terminate()


def test_files_are_listed_with_what_proves_them(client: HubClient, model: str) -> None:
    commit = client.resolve(model)
    entries = {entry.path: entry for entry in client.files(model, commit)}
    assert {"config.json", "model.safetensors", "sub/config.json"} <= entries.keys()
    entry = entries["config.json"]
    assert client.read(model, commit, entry) == b"config.json"
    assert entry.is_of(b"config.json") and not entry.is_of(b"config.jsoN")
    lfs = Entry(
        "x", 4, "0" * 40, "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    )
    assert lfs.is_of(b"test") and not lfs.is_of(b"Test")


def test_a_file_that_was_changed_in_the_cache_is_fetched_again(
    client: HubClient, model: str
) -> None:
    commit = client.resolve(model)
    (entry,) = (each for each in client.files(model, commit) if each.path == "config.json")
    path = client.download(model, commit, "config.json")
    path.resolve().write_bytes(b"evil")
    assert client.read(model, commit, entry) == b"config.json"


def test_dropping_removes_the_link_and_what_it_points_to(client: HubClient, model: str) -> None:
    path = client.download(model, client.resolve(model), "config.json")
    blob = path.resolve()
    client.drop(path)
    assert not path.exists() and not blob.exists()
    client.drop(path)  # nothing there is nothing to do


def test_dropping_never_leaves_the_cache_folder(client: HubClient, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    client.cache.mkdir(parents=True)
    (client.cache / "link").symlink_to(outside)
    client.drop(client.cache / "link")
    client.drop(outside)
    assert outside.read_text() == "mine"


def test_endpoints_do_not_share_a_cache_folder(settings: Settings) -> None:
    urls = ["https://huggingface.co", "http://huggingface.co", "http://127.0.0.1:1", "http://a/b"]
    folders = {HubClient(replace(settings, endpoint=url)).cache for url in urls}
    assert len(folders) == 4
    assert all(folder.parent == settings.mirror / "hub" for folder in folders)
    assert endpoint_folder(urls[0]).startswith("huggingface.co~")


def test_a_model_s_files_are_fetched_by_pattern_at_one_commit(
    client: HubClient, model: str, proxy: Proxy
) -> None:
    folder, commit = client.model_folder(model, None, ("*.json",))
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/config.json"}
    assert commit == client.resolve(model)
    proxy.requests.clear()


def test_offline_a_model_that_is_here_is_used(
    settings: Settings, client: HubClient, model: str, proxy: Proxy
) -> None:
    folder, commit = client.model_folder(model, None, ("*.json",))
    proxy.requests.clear()
    offline = HubClient(replace(settings, offline=True))
    assert offline.model_folder(model, None, ("*.json",)) == (folder, commit)
    assert offline.model_folder(model, commit, ("*.json",)) == (folder, commit)
    down = HubClient(replace(settings, endpoint="http://127.0.0.1:9"))
    assert down.model_folder(model, None, ("*.json",)) == (folder, commit)
    with pytest.raises(HubUnreachable) as caught:
        offline.model_folder("acme/absent", None, ("*.json",))
    assert caught.value.hint
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        offline.resolve(model)
    assert proxy.requests == []


@pytest.mark.parametrize("model", ["", "a/b/c", "../x", "/etc", "a b"])
def test_what_is_no_model_id_is_refused_before_the_network(client: HubClient, model: str) -> None:
    with pytest.raises(BadRequest):
        client.model_folder(model)


def test_a_missing_model_is_said(client: HubClient) -> None:
    with pytest.raises(RepoNotFound, match="acme/absent"):
        client.model_folder("acme/absent", None, ("*.json",))


def test_a_tag_that_exists_is_a_conflict(client: HubClient, model: str) -> None:
    commit = client.resolve(model)
    client.tag(model, "v1", commit)
    assert client.tags(model)["v1"] == commit
    with pytest.raises(Conflict):
        client.tag(model, "v1", commit)


@pytest.mark.parametrize("said", [None, True, False])
def test_progress_bars_are_off_and_come_back_unless_the_user_said(
    monkeypatch: pytest.MonkeyPatch, said: bool | None
) -> None:
    for module in (constants, bars):
        monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", said, raising=False)
    monkeypatch.setattr(bars, "progress_bar_states", {})
    before = bars.are_progress_bars_disabled()
    with silence_hub():
        assert bars.are_progress_bars_disabled() is (said is not False)
        with silence_hub():
            pass
        assert bars.are_progress_bars_disabled() is (said is not False)
    assert bars.are_progress_bars_disabled() == before


def test_retries_are_not_printed_unless_the_user_asked(
    settings: Settings, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's patience between its retries
    before = logging.get_verbosity()
    down = HubClient(replace(settings, endpoint="http://127.0.0.1:9"))
    with pytest.raises(HubUnreachable):
        down.download("acme/x", "0" * 40, "x")
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    monkeypatch.setattr(logging._get_library_root_logger(), "level", logging.INFO)
    with silence_hub():
        assert logging.get_verbosity() == logging.INFO


def test_what_huggingface_hub_warns_of_is_not_printed() -> None:
    log = logging.get_logger("huggingface_hub.utils._http")
    with silence_hub():
        with silence_hub():
            assert not log.isEnabledFor(logging.WARNING)
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)


def test_an_endpoint_that_names_no_commit_is_no_hub(
    client: HubClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        HfApi, "repo_info", lambda *_, **__: SimpleNamespace(id="acme/x", sha="../../etc")
    )
    with pytest.raises(HubUnreachable, match="names no commit"):
        client.resolve("acme/x")


def test_a_download_that_another_process_dropped_is_asked_for_again(
    client: HubClient, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, download, failures = client.resolve(model), HfApi.hf_hub_download, [2]

    def vanish(*args: object, **more: object) -> str:
        if failures.pop() > 0:
            failures.append(0)
            raise FileNotFoundError(errno.ENOENT, "No such file", "blobs/x")
        failures.append(0)
        return str(download(*args, **more))  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "hf_hub_download", vanish)
    assert client.download(model, commit, "config.json").read_bytes() == b"config.json"


@pytest.mark.parametrize("text", ["", "Just words", "# A title\n\n---\n\nbelow a line\n"])
def test_a_card_without_metadata_is_all_text(text: str) -> None:
    assert front_matter.split(text) == ({}, text)


def test_a_card_comes_apart_and_together() -> None:
    text = front_matter.join({"tags": ["a"], "license": "mit"}, "# Words\n")
    assert front_matter.split(text) == ({"tags": ["a"], "license": "mit"}, "# Words\n")


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        (BOMB, "aliases are not allowed"),
        ("a: &a {b: *a}\n", "aliases are not allowed"),
        (f"a: {'x' * front_matter.LIMIT}\n", "larger than 128 KiB"),
        ("[" * 60_000 + "\n", "nested more than 100 deep"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (f"a: {'9' * 100_000}\n", "not valid YAML"),
    ],
    ids=["bomb", "circle", "large", "deep", "code", "number"],
)
def test_a_card_is_read_within_the_endpoint_s_bounds(
    metadata: str, why: str, tmp_path: Path
) -> None:
    manifest = make_bundle(tmp_path / "bundle").manifest
    started = time.perf_counter()
    with pytest.raises(Conflict, match=why) as caught:
        render("acme/graphs", f"---\n{metadata}---\ntext\n", {}, manifest)
    assert "README.md" in caught.value.hint
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "metadata",
    [
        {"license": "mit", "tags": ["ä", "b"], "date": date(2026, 1, 31), 7: "seven"},
        {"self": "x", "ignore_metadata_errors": True, "nested": {"a": [1, 2.5, None]}},
        {},
    ],
)
def test_what_a_card_says_stays_as_it_is(metadata: dict[Any, Any]) -> None:
    text = front_matter.join(metadata, "# Words\n")
    assert front_matter.split(text) == (metadata, "# Words\n")


@pytest.mark.parametrize("text", ["---\n[: bad\n---\n", "---\n- a list\n---\n"])
def test_a_card_with_unreadable_metadata_is_a_conflict(text: str, tmp_path: Path) -> None:
    with pytest.raises(Conflict) as caught:
        render("acme/graphs", text, {}, make_bundle(tmp_path / "bundle").manifest)
    assert "README.md" in caught.value.hint


@pytest.mark.parametrize("token", ["é", "hf_\udcff"])
def test_what_no_header_can_have_is_no_token(settings: Settings, token: str) -> None:
    with pytest.raises(AuthFailed, match="HF_TOKEN is no token") as caught:
        HubClient(replace(settings, token=token)).resolve("acme/model")
    assert token not in f"{caught.value}{caught.value.hint}"
