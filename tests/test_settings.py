"""Settings: read from the environment, once, and never showing a secret."""

from __future__ import annotations

import os
import secrets
from datetime import date
from pathlib import Path

import pytest

from hubaoti.errors import BadRequest
from hubaoti.mirror import PullOrigin
from hubaoti.mirror.trust import Publisher
from hubaoti.settings import (
    ENDPOINT,
    Settings,
    hide_secrets,
    list_kernel_tuning,
    override_environment,
    read_upstream_token,
)


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = Settings.from_env({})
    assert settings.home == Path.home() / ".cache" / "hubaoti"
    assert settings.mirror == settings.home / "mirror"
    assert settings.trust == settings.home / "trust.toml"
    assert (settings.endpoint, settings.token, settings.offline) == (ENDPOINT, None, False)


def test_every_variable_is_read() -> None:
    settings = Settings.from_env(
        {
            "HUBAOTI_HOME": "/data/h",
            "HF_ENDPOINT": "http://hub.local:8000/",
            "HF_TOKEN": "hf_secret",
            "HF_HUB_OFFLINE": "1",
            "KERNELS_CACHE": "/kernels",
        }
    )
    kernels = Path("/kernels")
    expected = Settings(Path("/data/h"), "http://hub.local:8000", "hf_secret", True, kernels)
    assert settings == expected


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"HUBAOTI_HOME": "/h", "HF_ENDPOINT": "http://a:1", "HF_TOKEN": "t", "HF_HUB_OFFLINE": "1"},
        {"KERNELS_CACHE": "/k", "AOTI_DISABLED": "1", "TORCHINDUCTOR_MAX_AUTOTUNE": "1"},
        {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    ],
)
def test_another_process_reads_the_same_settings(env: dict[str, str]) -> None:
    settings = Settings.from_env(env)
    assert Settings.from_env(settings.to_env()) == settings


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"KERNELS_CACHE": "/k", "HF_HUB_CACHE": "/c"}, "/k"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, "/old"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "~/c"}, "~/c"),
    ],
)
def test_kernels_are_where_their_library_keeps_them(env: dict[str, str], folder: str) -> None:
    assert Settings.from_env(env).kernel_cache == Path(folder).expanduser()


def test_an_empty_variable_is_an_unset_one() -> None:
    names = ("HUBAOTI_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")
    assert Settings.from_env(dict.fromkeys(names, "")) == Settings.from_env({})


@pytest.mark.parametrize("text", ["hf_secret\n", " hf_secret\r\n", "hf_\nsecret"])
def test_no_white_space_is_part_of_a_token(text: str) -> None:
    assert Settings.from_env({"HF_TOKEN": text}).token == "hf_secret"


def test_the_cache_folder_of_the_system_is_used() -> None:
    assert Settings.from_env({"XDG_CACHE_HOME": "/c"}).home == Path("/c/hubaoti")


@pytest.mark.parametrize(
    ("url", "endpoint", "login"),
    [
        ("https://me:word@hub.local:8000/a/", "https://hub.local:8000/a", "me:word"),
        ("https://me:wo@rd@hub.local/x@y", "https://hub.local/x@y", "me:wo@rd"),
        ("https://word@hub.local", "https://hub.local", "word"),
        ("me:word@hub.local", "hub.local", "me:word"),
        ("https://hub.local/x@y", "https://hub.local/x@y", None),
        ("http://[::1]:8000/x@y", "http://[::1]:8000/x@y", None),
        ("http://hub.local:8000", "http://hub.local:8000", None),
    ],
)
def test_a_login_is_taken_out_of_the_endpoint(url: str, endpoint: str, login: str | None) -> None:
    settings = Settings.from_env({"HF_ENDPOINT": url})
    assert (settings.endpoint, settings.login) == (endpoint, login)
    assert "word" not in repr(settings)
    assert Settings.from_env(settings.to_env()) == settings
    assert Settings(settings.home, url.rstrip("/")).endpoint == endpoint


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co",
        "https://huggingface.co/",
        "https://huggingface.co//",
        "HTTPS://HUGGINGFACE.co",
        "https://huggingface.co:443",
        "https://HuggingFace.co:0443/",
        "https://huggingface.co:",
    ],
)
def test_an_endpoint_is_one_however_it_is_spelled(url: str) -> None:
    for settings in (Settings.from_env({"HF_ENDPOINT": url}), Settings(Path("/h"), url)):
        assert settings.endpoint == ENDPOINT
    assert PullOrigin(url, "acme/x", "c" * 40, "path").endpoint == ENDPOINT
    assert Publisher(url, "acme", date(2026, 1, 31)).endpoint == ENDPOINT
    assert read_upstream_token(url, {"HF_TOKEN": "hf_secret"}) == "hf_secret"


@pytest.mark.parametrize(
    "url",
    [
        "http://huggingface.co",
        "https://huggingface.co:80",
        "https://huggingface.co/a",
        "https://hub.local/A",
        "https://hub.local/a",
        "http://127.0.0.1:8000",
        "http://[::1]:8080",
        "hub.local",
    ],
)
def test_another_endpoint_stays_another(url: str) -> None:
    assert Settings(Path("/h"), url).endpoint == url


def test_a_home_is_absolute_and_without_tilde() -> None:
    assert Settings.from_env({"HUBAOTI_HOME": "~/h"}).home == Path.home() / "h"
    assert Settings.from_env({"HUBAOTI_HOME": "h"}).home == Path.cwd() / "h"


@pytest.mark.parametrize(("text", "offline"), [("true", True), ("YES", True), ("0", False)])
def test_offline_is_spelled_as_the_hub_s_client_spells_it(text: str, offline: bool) -> None:
    assert Settings.from_env({"HF_HUB_OFFLINE": text}).offline is offline


def test_the_token_is_never_printed() -> None:
    shown = repr(Settings.from_env({"HF_TOKEN": "hf_secret"}))
    assert "hf_secret" not in shown
    assert "token set" in shown


def test_a_variable_is_set_for_a_while_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBAOTI_A", "before")
    monkeypatch.delenv("HUBAOTI_B", raising=False)
    with pytest.raises(ZeroDivisionError), override_environment(HUBAOTI_A="now", HUBAOTI_B="now"):
        assert (os.environ["HUBAOTI_A"], os.environ["HUBAOTI_B"]) == ("now", "now")
        with override_environment(HUBAOTI_A=None):
            assert "HUBAOTI_A" not in os.environ
        assert os.environ["HUBAOTI_A"] == "now"
        _ = 1 / 0
    assert os.environ["HUBAOTI_A"] == "before"
    assert "HUBAOTI_B" not in os.environ


def test_variables_that_change_what_inductor_builds_are_known() -> None:
    env = {"TORCHINDUCTOR_FREEZING": "1", "TORCHINDUCTOR_CACHE_DIR": "/x", "TORCHINDUCTORX": "1"}
    env |= {"TORCHINDUCTOR_MAX_AUTOTUNE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    env |= {"AOT_INDUCTOR_DEBUG_COMPILE": "1", "AOTINDUCTOR_REPRO_LEVEL": "2"}
    found = Settings.from_env(env).tuning
    assert found == (
        "AOT_INDUCTOR_DEBUG_COMPILE",
        "TORCHINDUCTOR_FREEZING",
        "TORCHINDUCTOR_MAX_AUTOTUNE",
    )


def test_what_changes_kernels_is_told_and_not_where_they_are_kept() -> None:
    env = {"TRITON_OVERRIDE_ARCH": "sm80", "PTXAS_OPTIONS": "-O1", "TRITON_PTXAS_PATH": "/x"}
    others = {"TRITON_CACHE_DIR": "/x", "TRITON_INTERPRET": "", "TRITON_SERVER": "1"}
    assert list_kernel_tuning(env | others) == sorted(env)


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(BadRequest, match="HF_ENDPOINT is no URL") as caught:
        Settings.from_env({"HF_ENDPOINT": "http://[::1"})
    assert "https://" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_abcdefgh-ij_kl", "(token)"),
        ("hf_oauth_head.payload.sig", "(token)"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic (token)"),
        ("{'authorization': 'Bearer api_org_abcdefg'}", "{'authorization': 'Bearer (token)'}"),
        ("https://user:p@ss@hub.example/a", "https://(token)@hub.example/a"),
        ("https://me:p%40ss@hub.example", "https://(token)@hub.example"),
        ("/tmp/x_hf_abcdefghijkl.txt", "/tmp/x_(token)"),
        ("in hf_hub_download: hf_raise_for_status()", "in hf_hub_download: hf_raise_for_status()"),
        ("https://hub.example/a@b", "https://hub.example/a@b"),
        ("a token's-own 'words' here", "a (token) (token) here"),
    ],
)
def test_what_is_said_in_confidence_is_not_shown(
    text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "token's-own 'words'\n")
    assert hide_secrets(text) == shown


def test_no_token_of_our_endpoint_is_shown() -> None:
    for _ in range(1000):
        token = f"hf_{secrets.token_urlsafe(24)}"
        assert hide_secrets(f"a {token} b") == "a (token) b"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:99999",
        "http://127.0.0.1:abc",
        "http://127.0.0.1:-1",
        "http://[::1]:x",
        "http://127.0.0.1\udcff:8000",
        "http://a b:8000",
        "http://a\tb",
        "http://me:word@hub.local:x",
    ],
)
def test_what_no_request_could_be_sent_to_is_no_endpoint(url: str) -> None:
    for make in (
        lambda: Settings.from_env({"HF_ENDPOINT": url}),
        lambda: Settings(Path("/h"), url),
    ):
        with pytest.raises(BadRequest, match="HF_ENDPOINT is no URL") as caught:
            make()
        assert "word" not in f"{caught.value}{caught.value.hint}" and caught.value.hint


def test_white_space_around_an_endpoint_is_none_of_it() -> None:
    assert Settings.from_env({"HF_ENDPOINT": "http://a:1\n"}).endpoint == "http://a:1"


@pytest.mark.parametrize("name", ["HUBAOTI_HOME", "XDG_CACHE_HOME", "HF_HOME", "KERNELS_CACHE"])
def test_the_home_of_a_user_whom_nobody_knows_is_said(name: str) -> None:
    with pytest.raises(BadRequest, match="~nosuch/x.* does not know"):
        Settings.from_env({name: "~nosuch/x"})
    assert read_upstream_token(ENDPOINT, {"HF_TOKEN_PATH": "~nosuch/x"}) is None
