"""An endpoint for a fleet: who may what, how much, counted, shown, copied, and many at once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from bundles import make_bundle
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from test_server_limits import asked

import hubaoti
from hubaoti import errors
from hubaoti.cli import dispatch
from hubaoti.server import Endpoint, Service, serve_in_thread
from hubaoti.server.backup import back_up, restore
from hubaoti.server.hub import open_root
from hubaoti.server.tokens import add_token, list_tokens, remove_token
from hubaoti.server.trees import TreeEntry, dump_tree
from hubaoti.settings import Settings

CONTENT = os.urandom(200_000)
VARIANT = "torch2.13-cu130-sm90-x86_64_v3-linux"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def own(root: Path) -> Iterator[Endpoint]:
    with serve_in_thread(root) as found:
        yield found


@pytest.fixture
def api(own: Endpoint) -> HfApi:
    return HfApi(own.url, token=own.token)


def put(api: HfApi, repo: str, files: dict[str, bytes], **more: bool) -> str:
    api.create_repo(repo, exist_ok=True, **more)
    adds = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, adds, commit_message="files").oid


def page(
    endpoint: Endpoint, path: str = "/", token: str | None = None
) -> tuple[int, str, dict[str, str]]:
    """A page as a browser, or a monitor, is given it."""
    with closing(http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)) as hub:
        hub.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        with hub.getresponse() as answer:
            return (
                answer.status,
                answer.read().decode(errors="replace"),
                dict(answer.headers.items()),
            )


def token(root: Path, name: str, role: str, *owners: str) -> str:
    with open_root(root) as database, database.writing() as db:
        return add_token(db, name, role, owners)


def test_a_private_repo_is_there_only_for_tokens_that_may_read_it(
    own: Endpoint, api: HfApi, root: Path, tmp_path: Path
) -> None:
    put(api, "acme/secret", {"x": CONTENT}, private=True)
    reader, other = token(root, "reader", "read", "acme"), token(root, "other", "read", "else")
    found = HfApi(own.url, token=reader)
    path = found.hf_hub_download("acme/secret", "x", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == CONTENT
    assert [each.id for each in found.list_models()] == ["acme/secret"]
    assert found.whoami()["name"] == "reader"
    for headers in ({}, {"Authorization": "Bearer hf_wrong"}, {"Authorization": f"Bearer {other}"}):
        for where in ("/api/models/acme/{}", "/acme/{}/resolve/main/x", "/api/models/acme/{}/refs"):
            hidden = asked(own, where.format("secret"), **headers)
            none = asked(own, where.format("secre7"), **headers)
            assert hidden[0] == none[0] == (404 if other in str(headers) else 401)
            assert str(hidden[1]).replace("secret", "") == str(none[1]).replace("secre7", "")
        assert asked(own, "/api/models", **headers) == (200, [])


def test_a_token_writes_what_it_is_for_and_nothing_else(
    own: Endpoint, api: HfApi, root: Path
) -> None:
    put(api, "other/r", {"x": b"1"})
    writer = HfApi(own.url, token=token(root, "writer", "write", "acme"))
    reader = HfApi(own.url, token=token(root, "reader", "read"))
    put(writer, "acme/r", {"x": b"1"})
    for change in (
        lambda who: who.create_repo("other/new"),
        lambda who: who.delete_repo("other/r"),
        lambda who: who.move_repo("acme/r", "other/moved"),
        lambda who: who.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id="other/r"),
        lambda who: who.create_tag("other/r", tag="v1"),
        lambda who: who.update_repo_settings("other/r", private=True),
    ):
        for who in (writer, reader):
            with pytest.raises(HfHubHTTPError, match="403"):
                change(who)
    with pytest.raises(HfHubHTTPError, match="may read, and not write"):
        reader.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id="acme/r")
    writer.delete_repo("acme/r")


def test_tokens_are_kept_as_hashes_and_end_at_once(own: Endpoint, root: Path) -> None:
    secret = token(root, "ci", "write")
    assert HfApi(own.url, token=secret).whoami()["name"] == "ci"
    held = b"".join(file.read_bytes() for file in root.glob("hub.sqlite3*"))
    assert secret.encode() not in held
    assert hashlib.sha256(secret.encode()).hexdigest().encode() in held
    with open_root(root) as database, database.writing() as db:
        assert [each.name for each in list_tokens(db)] == ["ci"]
        with pytest.raises(errors.BadRequest, match="already"):
            add_token(db, "ci", "read", ())
        remove_token(db, "ci")
        with pytest.raises(errors.BadRequest, match="no token"):
            remove_token(db, "ci")
    assert asked(own, "/api/whoami-v2", Authorization=f"Bearer {secret}")[0] == 401


def test_the_commands_look_after_the_folder(
    own: Endpoint, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        assert dispatch(["serve", *map(str, words), "--root", str(root)]) == 0
        return capsys.readouterr().out.strip()

    made = run("token", "add", "ci", "--role", "write", "--owner", "acme")
    assert HfApi(own.url, token=made).whoami()["name"] == "ci"
    (listed,) = json.loads(run("token", "ls", "--json"))
    assert (listed["name"], listed["role"], listed["owners"]) == ("ci", "write", ["acme"])
    assert "acme" in run("token", "ls") and made not in run("token", "ls")
    assert "nothing any more" in run("token", "rm", "ci")
    assert dispatch(["serve", "--root", str(root), "token", "add", "early"]) == 0
    capsys.readouterr()
    assert json.loads(run("token", "ls", "--json"))[0]["name"] == "early"
    assert run("gc", "--dry-run") == "0 files would be removed (0 B)"
    assert json.loads(run("gc", "--json")) == {"files": [], "bytes": 0, "copies": []}
    assert "files" in run("backup", tmp_path / "backup")
    root = tmp_path / "again"
    assert "can be served" in run("restore", tmp_path / "backup")
    again = ["serve", "restore", str(tmp_path / "backup"), "--root", str(root)]
    assert dispatch(again) == errors.BadRequest.exit_code
    assert "is not empty" in capsys.readouterr().err


def test_metrics_are_what_prometheus_reads_and_name_nobody(own: Endpoint, api: HfApi) -> None:
    put(api, "acme/secret", {"x": CONTENT}, private=True)
    for _ in range(3):
        asked(own, "/api/models/acme/none")
    page(own, "/acme/secret/resolve/main/x", own.token)
    status, said, headers = page(own, "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    helped = [line.split()[2] for line in said.splitlines() if line.startswith("# HELP")]
    assert helped == [line.split()[2] for line in said.splitlines() if line.startswith("# TYPE")]
    values = dict(line.rsplit(" ", 1) for line in said.splitlines() if not line.startswith("#"))
    assert float(values['hubaoti_requests_total{method="GET",status="401"}']) == 3
    assert float(values['hubaoti_repos{kind="model"}']) == 1
    assert float(values["hubaoti_file_hits_total"]) == 1
    assert float(values["hubaoti_sent_bytes_total"]) > len(CONTENT)
    assert float(values["hubaoti_received_bytes_total"]) > len(CONTENT)
    assert float(values["hubaoti_stored_bytes"]) > len(CONTENT)
    assert float(values["hubaoti_disk_free_bytes"]) > 0
    assert "secret" not in said and "acme" not in said


def test_hits_are_remembered(root: Path) -> None:
    with serve_in_thread(root) as found:
        put(HfApi(found.url, token=found.token), "acme/r", {"x": b"1"})
        for _ in range(2):
            page(found, "/acme/r/resolve/main/x")
    with serve_in_thread(root) as found:
        page(found, "/acme/r/resolve/main/x")
        assert "hubaoti_file_hits_total 3\n" in page(found, "/metrics")[1]


def test_a_push_over_the_quota_is_refused_and_leaves_nothing(root: Path) -> None:
    with serve_in_thread(root, service=Service(max_bytes=500_000)) as found:
        api = HfApi(found.url, token=found.token)
        put(api, "acme/r", {"a.bin": os.urandom(300_000)})
        before = held(root)
        with pytest.raises(HfHubHTTPError, match="do not go into the 500000 bytes"):
            put(api, "acme/r", {"b.bin": os.urandom(300_000)})
        assert held(root) == before
        put(api, "acme/r", {"c.bin": os.urandom(100_000)})


def held(root: Path) -> set[str]:
    """Every file of a root that holds what somebody sent."""
    return {f.name for part in ("objects", "xorbs", "tmp") for f in (root / part).rglob("*")}


def test_those_who_push_at_once_stay_within_the_quota_together(root: Path) -> None:
    def push(number: int) -> bool:
        try:
            put(api, f"acme/r{number}", {"x.bin": os.urandom(150_000)})
        except (HfHubHTTPError, ConnectionError) as error:
            assert "413" in str(error)
            return False
        return True

    with serve_in_thread(root, service=Service(max_bytes=500_000)) as found:
        api = HfApi(found.url, token=found.token)
        with ThreadPoolExecutor(8) as pool:
            assert 1 <= sum(pool.map(push, range(8))) <= 3
    assert sum(file.stat().st_size for file in (root / "objects").glob("*/*")) <= 500_000


def test_our_client_says_that_the_quota_is_spent(root: Path, tmp_path: Path) -> None:
    with serve_in_thread(root, service=Service(max_bytes=3000)) as found:
        settings = Settings(home=tmp_path / "home", endpoint=found.url, token=found.token)
        bundle = make_bundle(tmp_path / "bundle")
        with pytest.raises(errors.OverQuota, match="do not go into the 3000 bytes"):
            hubaoti.push(bundle, "acme/r", settings=settings, as_is=True)


class _Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_what_fits_which_host_and_no_private_repo(own: Endpoint, api: HfApi) -> None:
    name = f"bfloat16-fa3/{VARIANT}/hubaoti.json"
    put(api, "acme/models", {name: b"{}", f"bfloat16-fa3/{VARIANT}/graphs/root.pt2": CONTENT})
    put(api, "acme/secret", {"x": b"1"}, private=True)
    page(own, f"/acme/models/resolve/main/{name}")
    status, said, headers = page(own)
    shown = _Page(said)
    assert status == 200 and "acme/models" in shown.text and VARIANT in shown.text
    assert "torch 2.13 on a GPU sm 90 with CUDA 13.0, x86_64_v3, linux" in shown.text
    assert "200.0 kB" in shown.text and "acme/secret" not in shown.text
    hits = [each for each in shown.text.split("\n") if each.strip() == "1"]
    assert hits
    assert "acme/secret" in page(own, token=own.token)[1]
    policy = headers["content-security-policy"]
    style = said.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in shown.elements}
    assert not any(
        key.startswith("on") or key in {"src", "style"} for _, a in shown.elements for key in a
    )


def test_nothing_that_was_pushed_becomes_part_of_the_page(own: Endpoint, api: HfApi) -> None:
    evil = "<script>alert(1)</script>"
    put(api, "acme/r", {f"{evil.replace('/', '')}/'\"><img src=x>/hubaoti.json": b"{}"})
    shown = _Page(page(own)[1])
    assert not {"script", "img"} & {tag for tag, _ in shown.elements}
    assert "<script>alert(1)<script>" in shown.text


def test_a_browser_shows_the_page_and_runs_nothing_of_what_was_pushed(
    own: Endpoint, api: HfApi, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no Chromium here")
    evil = "<img src=x onerror=\"document.title='taken'\">"
    path = f"bfloat16-fa3/{VARIANT}/hubaoti.json"
    put(api, "acme/r", {path: b"{}", f"{evil}/{evil}/hubaoti.json": b"{}"})
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'me'}"]
    said = subprocess.run(
        [browser, *words, "--enable-logging=stderr", "--dump-dom", f"{own.url}/"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = _Page(said.stdout)
    assert "<title>hubaoti</title>" in said.stdout
    assert "torch 2.13 on a GPU sm 90" in shown.text and evil in shown.text
    assert "img" not in {tag for tag, _ in shown.elements}
    assert "Refused to" not in said.stderr and "violates" not in said.stderr  # its own style


def test_a_backup_that_is_taken_while_all_push_is_whole_and_serves(
    own: Endpoint, api: HfApi, root: Path, tmp_path: Path
) -> None:
    def push(number: int) -> tuple[str, str, bytes]:
        content = os.urandom(5000) + b"\0"
        return f"acme/r{number}", put(api, f"acme/r{number}", {"x.bin": content}), content

    first = [push(number) for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        later = [pool.submit(push, number) for number in range(3, 12)]
        back_up(root, tmp_path / "backup")
        for each in later:
            each.result()
    token(root, "ci", "read")
    again = back_up(root, tmp_path / "backup")
    assert 0 < again.new < again.files
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
    restored = restore(tmp_path / "backup", tmp_path / "restored")
    assert restored.files == again.files
    with serve_in_thread(tmp_path / "restored") as found:
        other = HfApi(found.url, token=False)
        for repo, oid, content in (*first, *(each.result() for each in later)):
            path = other.hf_hub_download(repo, "x.bin", revision=oid, cache_dir=tmp_path / "cache")
            assert Path(path).read_bytes() == content
        put(HfApi(found.url, token=found.token), "acme/r0", {"x.bin": first[0][2], "y": b"1"})
    with open_root(tmp_path / "restored") as database, database.reading() as db:
        assert [each.name for each in list_tokens(db)] == ["ci"]


def test_a_backup_that_is_damaged_or_none_is_refused(
    own: Endpoint, api: HfApi, root: Path, tmp_path: Path
) -> None:
    put(api, "acme/r", {"x.bin": CONTENT})
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    with pytest.raises(errors.BadBackup, match="no backup"):
        restore(backup, restored)
    back_up(root, backup)
    with pytest.raises(errors.BadRequest, match="not empty"):
        restore(backup, root)
    (victim,) = (f for f in (backup / "objects").glob("*/*") if f.stat().st_size == len(CONTENT))
    victim.chmod(0o600)
    victim.write_bytes(bytes(len(CONTENT)))
    with pytest.raises(errors.BadBackup, match="damaged"):
        restore(backup, restored)
    assert not (restored / "objects").exists() and not (restored / "hub.sqlite3").exists()
    victim.unlink()
    with pytest.raises(errors.BadBackup, match="lacks files"):
        restore(backup, restored)
    shutil.rmtree(backup)
    put(api, "acme/r", {"more": b"1"})
    back_up(root, backup)
    (backup / "hub.sqlite3").write_bytes(b"no database, and long enough" * 99)
    with pytest.raises(errors.BadBackup, match="cannot be read"):
        restore(backup, restored)
    with pytest.raises(errors.UnsafeFolder):
        back_up(root, Path(__file__).parent)


def test_a_backup_names_no_file_but_by_a_digest(
    own: Endpoint, api: HfApi, root: Path, tmp_path: Path
) -> None:
    put(api, "acme/r", {"x": b"1"})
    back_up(root, tmp_path / "backup")
    (tmp_path / "evil").write_bytes(b"x")
    entry = TreeEntry("0" * 40, 1, "/../../evil", lfs=True)
    with closing(sqlite3.connect(tmp_path / "backup/hub.sqlite3")) as index, index:
        index.execute("update revision set tree = ?", (dump_tree({"x": entry}, "0" * 40),))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.BadBackup, match="names no file"):
        restore(tmp_path / "backup", tmp_path / "restored")
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / "restored"}


def test_two_hundred_clients_at_once_lose_nothing(own: Endpoint, api: HfApi, root: Path) -> None:
    """Half of them push, each a commit of its own to one of four repos; half of them read."""
    for number in range(4):
        put(api, f"acme/r{number}", {"x.bin": CONTENT})

    async def push(number: int) -> str:
        header = {"key": "header", "value": {"summary": f"push {number}"}}
        file = {"key": "file", "value": {"path": f"new/{number}", "content": f"{number}"}}
        body = "\n".join(map(json.dumps, (header, file))).encode()
        path = f"/api/models/acme/r{number % 4}/commit/main"
        status, said = await ask_at_once(own, "POST", path, body)
        assert status == 200, said
        return str(json.loads(said)["commitOid"])

    async def read(number: int) -> None:
        path = f"/acme/r{number % 4}/resolve/main/x.bin"
        assert await ask_at_once(own, "GET", path) == (200, CONTENT)

    async def all_at_once() -> list[str]:
        reading = asyncio.gather(*(read(number) for number in range(100)))
        pushed = await asyncio.gather(*(push(number) for number in range(100)))
        await reading
        return pushed

    commits = asyncio.run(all_at_once())
    assert len(set(commits)) == 100
    for number in range(4):
        log = {each.commit_id for each in api.list_repo_commits(f"acme/r{number}")}
        assert set(commits[number::4]) <= log
        files = {path for path in api.list_repo_files(f"acme/r{number}") if "new/" in path}
        assert files == {f"new/{n}" for n in range(number, 100, 4)}
    with closing(sqlite3.connect(root / "hub.sqlite3")) as index:
        assert index.execute("pragma integrity_check").fetchone() == ("ok",)


async def ask_at_once(
    endpoint: Endpoint, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    """One request with the token, on a connection of its own."""
    at = urlsplit(endpoint.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {endpoint.token}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    top, _, content = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), content


def test_whoever_has_no_right_is_told_of_no_repo(own: Endpoint, api: HfApi, root: Path) -> None:
    put(api, "acme/secret", {"x": b"1"}, private=True)
    other = HfApi(own.url, token=token(root, "other", "write", "else"))
    with pytest.raises(RepositoryNotFoundError):
        other.model_info("acme/secret")
