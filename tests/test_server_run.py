"""The endpoint as a process: starting, stopping, being killed, one root for one process."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from hubaoti import errors
from hubaoti.cli import dispatch
from hubaoti.host.extras import EXTRAS
from hubaoti.server import create_app, run, serve, serve_in_thread
from hubaoti.server.hub import open_hub

PROGRAM = """
import sys
from pathlib import Path
from hubaoti.server import serve
serve(Path(sys.argv[1]), ready=lambda url, token: print(url, token, flush=True))
print("stopped", flush=True)
"""


CLIENT = """
import sys
from huggingface_hub import HfApi
api, content = HfApi(sys.argv[1], token=sys.argv[2]), sys.stdin.buffer.read()
api.upload_file(path_or_fileobj=content, path_in_repo="x.bin", repo_id="o/r")
"""


@contextmanager
def process(root: Path) -> Iterator[tuple[subprocess.Popen[str], HfApi]]:
    command = [sys.executable, "-c", PROGRAM, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url, token = server.stdout.readline().split()
            yield server, HfApi(url, token=token)
        finally:
            server.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path / "root") as (server, api):
        api.create_repo("o/r")
        server.send_signal(number)
        assert server.wait(10) == 0
        assert server.stdout and server.stdout.read() == "stopped\n"
    with serve_in_thread(tmp_path / "root") as endpoint:
        assert HfApi(endpoint.url).repo_exists("o/r")


def test_what_is_cut_off_at_the_end_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "_GRACE", 0.1)
    with socket.socket() as client, serve_in_thread(tmp_path / "root") as endpoint:
        address = urlsplit(endpoint.url)
        client.connect((address.hostname, address.port))
        head = b"POST /api/validate-yaml HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
        client.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert b"100 Continue" in client.recv(100)
    assert caplog.records and not any(record.exc_info for record in caplog.records)


FILES = {f"f{number}.bin": os.urandom(600_000) for number in range(3)}


class Upload:
    """A commit of large files and a small one, by hand, so that it can stop in the middle."""

    def __init__(self, api: HfApi, repo: str) -> None:
        self.netloc, self.repo = urlsplit(api.endpoint).netloc, repo
        self.auth = {"Authorization": f"Bearer {api.token}"}
        self.connection = HTTPConnection(self.netloc)

    def close(self) -> None:
        self.connection.close()

    def lfs(self, content: bytes, part: float = 1) -> None:
        """Send this part of a file's bytes."""
        said = [{"oid": digest(content), "size": len(content)}]
        body = json.dumps({"operation": "upload", "objects": said}).encode()
        answer = self.send("POST", f"/{self.repo}.git/info/lfs/objects/batch", body)
        href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
        self.send("PUT", href.partition(self.netloc)[2], content, part)

    def commit(self, part: float = 1, wait: bool = True) -> None:
        """Send this part of the commit's bytes."""
        small = {"path": "small.txt", "content": "x" * 300_000}
        items: list[tuple[str, object]] = [("header", {"summary": "s"}), ("file", small)]
        items += [("lfsFile", {"path": p, "oid": digest(c)}) for p, c in FILES.items()]
        body = b"\n".join(json.dumps({"key": k, "value": v}).encode() for k, v in items)
        self.send("POST", f"/api/models/{self.repo}/commit/main", body, part, wait)

    def send(
        self, method: str, path: str, body: bytes, part: float = 1, wait: bool = True
    ) -> bytes:
        self.close()
        self.connection = HTTPConnection(self.netloc)
        self.connection.putrequest(method, path)
        for name, value in {**self.auth, "Content-Length": str(len(body))}.items():
            self.connection.putheader(name, value)
        self.connection.endheaders(body[: int(len(body) * part)])
        if part < 1 or not wait:
            return b""
        with self.connection.getresponse() as answer:
            assert answer.status == 200, answer.read()
            return answer.read()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def until(upload: Upload, moment: str) -> None:
    """Go on with the upload until this moment."""
    *first, last = FILES.values()
    for content in first:
        upload.lfs(content)
    upload.lfs(last, 0.5 if moment == "half a file" else 1)
    if moment == "half a commit":
        upload.commit(0.5)
    if moment.startswith("all is sent"):
        upload.commit(wait=False)
        time.sleep(float(moment.split()[-1]))
    if moment == "it is answered":
        upload.commit()


MOMENTS = ["half a file", "all files", "half a commit", "it is answered"]
MOMENTS += [f"all is sent {delay}" for delay in (0, 0.002, 0.004, 0.008, 0.016)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_a_commit_is_whole_or_absent(tmp_path: Path, moment: str) -> None:
    root, whole = tmp_path / "root", [".gitattributes", *FILES, "small.txt"]
    with process(root) as (server, api):
        api.create_repo("o/r")
        upload = Upload(api, "o/r")
        until(upload, moment)
        server.send_signal(signal.SIGKILL)
        server.wait()
        upload.close()
    with serve_in_thread(root) as endpoint:
        api = HfApi(endpoint.url, token=endpoint.token)
        found = api.list_repo_files("o/r")
        assert found in ([".gitattributes"], whole)
        assert found == whole or moment != "it is answered"
        assert found != whole or "all is sent" in moment or moment == "it is answered"
        assert not list((root / "tmp").iterdir())
        for file in (root / "objects").rglob("*/*"):
            assert digest(file.read_bytes()) == file.name, "whole and verified, or absent"
        operations = [CommitOperationAdd(path, content) for path, content in FILES.items()]
        api.create_commit("o/r", operations, commit_message="again")
        for path, content in FILES.items():
            got = api.hf_hub_download("o/r", path, cache_dir=tmp_path / "cache")
            assert Path(got).read_bytes() == content
    with closing(sqlite3.connect(root / "hub.sqlite3")) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)


def test_the_official_client_survives_a_kill_in_the_middle(tmp_path: Path) -> None:
    """Xet, as it comes: the endpoint dies, comes back at once, and the same upload is repeated."""
    root, content = tmp_path / "root", os.urandom(8_000_000)
    with process(root) as (server, api):
        api.create_repo("o/r")
        command = [sys.executable, "-c", CLIENT, api.endpoint, str(api.token)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            assert client.stdin
            client.stdin.write(content)
            client.stdin.close()
            wait_for(lambda: any((root / "tmp").iterdir()) or any((root / "xorbs").iterdir()))
            server.send_signal(signal.SIGKILL)
            client.kill()
    with serve_in_thread(root) as endpoint:
        api = HfApi(endpoint.url, token=endpoint.token)
        assert api.list_repo_files("o/r") in ([".gitattributes"], [".gitattributes", "x.bin"])
        api.upload_file(path_or_fileobj=content, path_in_repo="x.bin", repo_id="o/r")
        got = api.hf_hub_download("o/r", "x.bin", cache_dir=tmp_path / "cache")
        assert Path(got).read_bytes() == content


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not happened() and time.monotonic() < end:
        time.sleep(0.001)


def test_one_root_is_served_by_one_process(tmp_path: Path) -> None:
    with process(tmp_path / "root"), pytest.raises(errors.InUse, match="another process"):
        create_app(tmp_path / "root")


def test_a_port_in_use_is_an_error_with_advice(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.InUse, match="in use") as caught:
            serve(tmp_path / "root", port=port)
    assert "--port" in caught.value.hint
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("port", [-1, 65536, 99999999, 1 << 64])
def test_a_port_that_is_none_is_not_cut_to_one(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(errors.BadRequest, match="is no port"),
        serve_in_thread(tmp_path / "root", port=port),
    ):
        raise AssertionError("it is served somewhere")
    command = ["serve", "--port", str(port), "--root", str(tmp_path / "root"), "token", "ls"]
    assert dispatch(command) == 2
    assert "0<=x<=65535" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("host", "port"), [("no.such.host.invalid", 0), ("192.0.2.1", 0), ("x" * 300, 0)]
)
def test_a_host_that_is_not_ours_is_an_error(tmp_path: Path, host: str, port: int) -> None:
    with pytest.raises(errors.HubaotiError):
        serve(tmp_path / "root", host=host, port=port)


def test_serve_runs_in_any_thread_and_over_ipv6(tmp_path: Path) -> None:
    found: list[str] = []
    listening = threading.Event()
    stop: list[object] = []

    def ready(url: str, token: str) -> None:
        found.extend([url, token])
        listening.set()
        raise SystemExit  # stops the loop, as nothing else can from outside of the main thread

    def target() -> None:
        try:
            serve(tmp_path / "root", host="::1", ready=ready)
        except SystemExit:
            stop.append(True)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(20)
    assert found[0].startswith("http://[::1]:") and found[1] and stop


def test_each_start_makes_up_a_token_of_its_own(tmp_path: Path) -> None:
    tokens = []
    for _ in range(2):
        with serve_in_thread(tmp_path / "root") as endpoint:
            tokens.append(endpoint.token)
            assert endpoint.token not in repr(endpoint)
    assert len(set(tokens)) == 2 and min(map(len, tokens)) > 30


def test_a_given_token_is_the_token(tmp_path: Path) -> None:
    with serve_in_thread(tmp_path / "root", token="sesame") as endpoint:
        assert HfApi(endpoint.url, token="sesame").whoami()["name"] == "local"
        assert endpoint.token == "sesame"


@pytest.mark.parametrize("token", ["", "a b", "ü", "a\nb"])
def test_what_cannot_be_a_token_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(errors.BadRequest):
        open_hub(tmp_path / "root", token)


def test_a_users_name_is_one_that_repos_can_carry(tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequest):
        open_hub(tmp_path / "root", user="datasets")


def test_a_root_is_ours_alone_or_refused(tmp_path: Path) -> None:
    root = tmp_path / "a/b/root"
    open_hub(root).close()
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o755)
    with pytest.raises(errors.UnsafeFolder, match="open to other users"):
        open_hub(root)
    open_to_all = tmp_path / "empty"
    open_to_all.mkdir(mode=0o755)
    open_hub(open_to_all).close()
    assert open_to_all.stat().st_mode & 0o777 == 0o700


def test_a_root_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "file"
    other.mkdir(mode=0o700)
    (other / "thesis.tex").write_text("precious")
    file.write_text("x")
    for root in (other, file, file / "below"):
        with pytest.raises(errors.UnsafeFolder):
            open_hub(root)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_a_root_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(errors.UnsafeFolder, match="another user"):
        open_hub(tmp_path / "root")


def test_a_spoilt_index_is_an_error_with_advice(tmp_path: Path) -> None:
    open_hub(tmp_path / "root").close()
    for name in ("hub.sqlite3", "hub.sqlite3-wal"):
        (tmp_path / "root" / name).write_bytes(b"nonsense" * 1000)
    with pytest.raises(errors.HubaotiError, match="cannot be read") as caught:
        open_hub(tmp_path / "root")
    assert caught.value.hint


@pytest.mark.parametrize("size", ["4k", "16k", "64k", "100k"])
def test_a_full_disk_asks_for_space(tmp_path: Path, size: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with pytest.raises(errors.DiskFull, match="no room") as caught:
            open_hub(tmp_path / "root")
        assert "free some space" in caught.value.hint
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_no_unsafe_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(self: Path, **more: object) -> None:
        raise OSError(errno.ENOSPC, "fake")

    monkeypatch.setattr(Path, "mkdir", fake)
    with pytest.raises(errors.DiskFull):
        open_hub(tmp_path / "root")


def test_without_starlette_the_package_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "starlette").mkdir()
    (tmp_path / "starlette/__init__.py").write_text("raise ModuleNotFoundError(name='starlette')")
    program = """
from hubaoti.errors import MissingDependency
try:
    import hubaoti.server
except MissingDependency as error:
    print(error, "|", error.hint)
"""
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    install = "pip install blake3 lz4 starlette uvicorn"
    assert said == f"serving needs starlette, which is not installed | {install}\n"
    assert install.split()[2:] == [*EXTRAS["serve"]]
