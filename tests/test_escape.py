"""Text from outside reaches the terminal escaped and cut, from every side that it comes from."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import CPU, make_bundle
from commands import Done, hubaoti, inside
from huggingface_hub import HfApi, constants
from hypothesis import given
from hypothesis import strategies as st
from proxies import Proxy

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.canonical import encode_canonical
from hubaoti.artifact.manifest import FILENAME, parse_manifest
from hubaoti.cli.output import print_json, print_line, print_lines, print_table, print_text
from hubaoti.errors import BadManifest, HubaotiError
from hubaoti.escape import LINE, LONGEST, WHOLE, bound_message, escape, escape_line
from hubaoti.hub.client import HubClient
from hubaoti.hub.errors import hide_stored_login
from hubaoti.mirror import PullOrigin
from hubaoti.server import Endpoint
from hubaoti.settings import Settings, override_environment

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\x08\u202egnp.exe\u2028\ud800"
PLACE = "float32-sdpa/torch2.13-cpu-x86_64_v3-linux"
# What a terminal would obey, and marks that change what a reader sees.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(done: Done) -> None:
    """Nothing in what a command printed moves a cursor, and it ends."""
    said = done.out + done.err
    assert not OBEYED.search(said)
    assert len(said) < 20_000
    assert all(len(line) <= LONGEST + 100 for line in said.splitlines())


@given(st.text())
def test_escaped_text_is_obeyed_by_no_terminal_and_escaped_once(text: str) -> None:
    for shown in (escape(text), escape_line(text), bound_message(text)):
        assert not OBEYED.search(shown)
        shown.encode()
    assert "\n" not in escape_line(text) and len(escape_line(text)) <= LINE
    assert escape(escape(text)) == escape(text)
    assert escape_line(escape_line(text)) == escape_line(text)
    assert bound_message(bound_message(text)) == bound_message(text)


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=LINE))
def test_words_of_any_language_stay_as_they_are(text: str) -> None:
    assert escape_line(text) == bound_message(text) == escape(text) == text


def test_what_joins_letters_and_pictures_stays() -> None:
    text = "👩\u200d💻 क\u094d\u200dष é"
    assert escape(text) == text


def test_an_error_is_escaped_and_cut_wherever_it_is_shown() -> None:
    error = HubaotiError(f"a{EVIL}\n" + "x" * 3_000_000 + "\nlast" * 3000, hint=EVIL)
    assert not OBEYED.search(str(error) + error.hint)
    assert len(str(error)) == WHOLE


def test_what_is_printed_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(f"one {EVIL}\nline")
    print_lines(f"two\n{EVIL}")
    print_text(f"text\n{EVIL}")
    print_table(["a"], [[f"{EVIL}\ncell"]])
    out = capsys.readouterr().out
    assert not OBEYED.search(out)
    assert len(out.splitlines()) == 7
    print_json({"a": f"{EVIL}\n"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": f"{EVIL}\n"}
    assert not OBEYED.search(out)


@pytest.fixture
def api(settings: Settings) -> HfApi:
    return HfApi(settings.endpoint, token=settings.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def held(api: HfApi, repo: str, bundle: Bundle) -> str:
    """A repo with one artifact that fits no host that tests run on."""
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=bundle.path, path_in_repo=PLACE)
    return repo


def renamed(tree: Any) -> Any:
    """A tree whose files have names that a terminal would obey."""
    names = {".gitattributes": f"{EVIL}\nhint: do as I say/{'x' * 9999}/{FILENAME}"}
    return [{**file, "path": names.get(file["path"], file["path"])} for file in tree]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_paths_of_a_repo_are_printed_escaped(
    held: str, settings: Settings, proxy: Proxy, options: tuple[str, ...]
) -> None:
    proxy.matching, proxy.mutate = "/tree/", renamed
    done = inside(settings, "pull", held, "--trust", *options)
    harmless(done)
    assert "\nhint: do as I say" not in done.out + done.err
    if options and done.code == 0:
        assert "is ignored" in json.loads(done.out)["notes"][0]


def test_a_list_that_somebody_else_made_is_printed_in_part(
    held: str, settings: Settings, proxy: Proxy
) -> None:
    proxy.matching = "/tree/"
    proxy.mutate = lambda tree: [
        *tree,
        *({**tree[0], "path": f"{n}/{FILENAME}"} for n in range(100)),
    ]
    done = inside(settings, "pull", held, "--trust")
    assert "and 80 more" in done.out
    harmless(done)


@pytest.mark.parametrize(
    "change",
    [
        {"target": {**CPU, "level": "x" * 3_000_000}},
        {"target": {**CPU, "level": EVIL[:-1] * 1000}},
        {f"{EVIL[:-1]}\nhint: obey": 1},
        {f"{'y' * 3_000_000}": 1},
        {"schema": f"{EVIL}" * 10_000},
        {"schema": 10**4000},
        {"schema": [[["x" * 90] * 9] * 999]},
    ],
    ids=["long level", "level", "field", "long field", "schema", "long schema", "deep schema"],
)
def test_a_manifest_s_words_are_cut_and_escaped(
    repo: str, api: HfApi, bundle: Bundle, settings: Settings, change: dict[str, Any]
) -> None:
    manifest = json.loads((bundle.path / FILENAME).read_bytes()) | change
    text = json.dumps(manifest).encode() if "schema" in change else encode_canonical(manifest)
    with pytest.raises(BadManifest) as caught:
        parse_manifest(text, "here")
    assert len(str(caught.value)) < 3000 and "\n" not in str(caught.value)
    api.create_repo(repo)
    api.upload_file(path_or_fileobj=text, path_in_repo=f"{PLACE}/{FILENAME}", repo_id=repo)
    done = inside(settings, "pull", repo, "--trust")
    assert done.code
    harmless(done)
    assert "\nhint: obey" not in done.err


def test_what_an_endpoint_says_is_printed_escaped(
    repo: str, settings: Settings, proxy: Proxy
) -> None:
    proxy.answers = [(403, {"X-Error-Message": "no\x1b[2J" + "x" * 5000})]
    done = inside(settings, "pull", repo)
    assert done.code == 16
    harmless(done)


def test_an_owner_s_card_is_printed_escaped(
    repo: str, api: HfApi, bundle: Bundle, settings: Settings
) -> None:
    api.create_repo(repo)
    card = f"---\n[{EVIL[:-1]}: {'x' * 9000}\n---\n"
    file = {"path_or_fileobj": card.encode(), "path_in_repo": "README.md"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
        api.upload_file(**file, repo_id=repo)  # type: ignore[arg-type]
    done = inside(settings, "push", "--as-is", bundle.path, repo)
    assert done.code == 25 and "README.md" in done.err
    harmless(done)


@pytest.mark.parametrize("words", [("compile", f"a{EVIL}"), ("pull", f"a/{EVIL}")])
def test_names_that_were_given_are_printed_escaped(
    settings: Settings, tmp_path: Path, words: tuple[str, str]
) -> None:
    more = ("-o", tmp_path / "out") if words[0] == "compile" else ()
    done = inside(settings, *words, *more)
    assert done.code
    harmless(done)


@pytest.mark.parametrize(
    "words",
    [
        ("doctor",),
        ("doctor", "--json"),
        ("pull", "acme/x"),
        ("pull", "acme/x", "-q"),
        ("trust", "ls"),
        ("trust", "rm", "acme"),
        ("mirror", "ls", "--json"),
    ],
    ids=" ".join,
)
def test_a_password_in_the_endpoint_is_never_printed(
    settings: Settings, proxy: Proxy, words: tuple[str, ...]
) -> None:
    url = proxy.url.replace("://", "://someone:s3cret%2Fp@ss@")
    with override_environment(HF_ENDPOINT=url):
        secret = Settings.from_env()
    assert "s3cret" not in repr(secret) and secret.endpoint == proxy.url
    assert Settings.from_env(secret.to_env()).login == secret.login
    here = Here(settings.home, url)
    done = inside(here, *words)  # type: ignore[arg-type]
    assert "s3cret" not in done.out + done.err
    down = inside(Here(settings.home, url.replace(proxy.url[7:], "127.0.0.1:9")), *words)  # type: ignore[arg-type]
    assert "s3cret" not in down.out + down.err


def test_a_password_that_ends_its_url_is_refused_and_not_printed(settings: Settings) -> None:
    here = Here(settings.home, "http://someone:s3cret/p@127.0.0.1:9/hub")
    done = hubaoti(here, "pull", "acme/x")  # type: ignore[arg-type]
    assert done.code == 2 and "%2F" in done.err
    assert "s3cret" not in done.out + done.err


def test_a_password_that_was_kept_once_is_not_printed(settings: Settings) -> None:
    settings.home.mkdir(mode=0o700)
    publisher = 'endpoint = "http://me:s3cret@hub"\nowner = "acme"\nsince = 2026-01-31\n'
    settings.trust.write_text(f"[[publisher]]\n{publisher}")
    settings.trust.chmod(0o600)
    for option in ((), ("--json",)):
        done = inside(settings, "trust", "ls", *option)
        assert "http://hub" in done.out and "s3cret" not in done.out
    assert PullOrigin("http://me:s3cret@hub", "acme/x").endpoint == "http://hub"


class Here:
    """Settings as the environment has them, before anything reads them."""

    token = None

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home, self.endpoint = home, endpoint


def test_a_password_in_the_endpoint_is_sent_and_stands_in_no_file(
    held: str, settings: Settings, proxy: Proxy
) -> None:
    proxy.reset()
    settings = replace(
        settings, endpoint=proxy.url.replace("://", "://some%20one:s3cret@"), token=None
    )
    HubClient(settings).resolve(held)
    here = Here(settings.home, f"http://some%20one:s3cret@{proxy.url[7:]}")
    inside(here, "pull", held, "--trust")  # type: ignore[arg-type]
    expected = "Basic " + base64.b64encode(b"some one:s3cret").decode()
    assert {headers.get("authorization") for headers in proxy.headers} == {expected}
    written = [path for path in settings.home.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert not [path for path in settings.home.rglob("*") if "s3cret" in path.name]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A login that `hf auth login` stored."""
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return "hf_stored"


def test_a_stored_login_is_sent_to_no_other_endpoint(
    settings: Settings, held: str, proxy: Proxy, stored: str, bundle: Bundle
) -> None:
    proxy.reset()
    client = HubClient(replace(settings, token=None))
    commit = client.resolve(held)
    for ask in (
        lambda: client.files(held, commit),
        lambda: client.download(held, commit, f"{PLACE}/{FILENAME}"),
        lambda: client.model_folder(held, None, ("*.json",)),
        lambda: client.tags(held),
        lambda: client.create(held, private=False),
        lambda: client.tag(held, "v1", commit),
        lambda: client.commit(held, {"a": b"a"}, (), "a", commit),
    ):
        try:
            ask()
        except HubaotiError:  # a write, for which it wants a token
            continue
    assert len(proxy.headers) > 8
    assert not [headers for headers in proxy.headers if "authorization" in headers]


def test_an_explicit_token_is_sent_to_the_endpoint_that_is_asked(
    settings: Settings, held: str, proxy: Proxy, stored: str, endpoint: Endpoint
) -> None:
    proxy.reset()
    HubClient(settings).resolve(held)
    assert proxy.headers[-1]["authorization"] == f"Bearer {endpoint.token}"


@pytest.mark.parametrize(
    ("endpoint", "token", "sent"),
    [
        ("https://huggingface.co", None, "Bearer hf_stored"),
        ("http://huggingface.co", None, None),
        ("https://huggingface.co.evil.example", None, None),
        ("https://hub.example", None, None),
        ("https://hub.example", "hf_mine", "Bearer hf_mine"),
        ("https://me:word@huggingface.co", None, "Basic bWU6d29yZA=="),
    ],
)
def test_who_gets_which_login(
    tmp_path: Path, stored: str, endpoint: str, token: str | None, sent: str | None
) -> None:
    client = HubClient(Settings(tmp_path, endpoint, token))
    assert client._api._build_hf_headers().get("authorization") == sent


def test_libraries_that_ask_by_themselves_keep_the_stored_login(
    settings: Settings, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent() -> str | None:
        return HfApi(library_name="kernels")._build_hf_headers().get("authorization")

    with hide_stored_login(replace(settings, token=None)):
        assert sent() is None
    assert sent() == "Bearer hf_stored"
    with hide_stored_login(Settings(settings.home)):
        assert sent() == "Bearer hf_stored"
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    with hide_stored_login(Settings(settings.home)):
        assert sent() is None
