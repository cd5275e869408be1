"""What strangers may cost the endpoint: connections, heads, bodies, lines of log; and its names."""

from __future__ import annotations

import http.client
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.errors import BadRequest
from hubaoti.server import Endpoint, Upstream, connections, request, serve_in_thread
from hubaoti.server.auth import Hosts, parse_host
from hubaoti.server.connections import Seldom

HALF = b"GET /api/models HTTP/1.1\r\nHo"
MANY = b"[]," * (28 * 2**20 // 3)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Endpoint]:
    """An endpoint of this test's own."""
    with serve_in_thread(tmp_path / "root") as found:
        yield found


@contextmanager
def served(
    root: Path, *words: str, files: int = 1024, **env: str
) -> Iterator[tuple[int, Endpoint]]:
    """`hubaoti serve` as a process that may have so many files open; its log is beside the root."""

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-m", "hubaoti.cli", "serve", "--port", "0", "--root", str(root)]
    with (
        root.with_suffix(".log").open("wb") as log,
        subprocess.Popen(
            [*command, *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=bound,
            env={**os.environ, **env},
        ) as server,
    ):
        try:
            assert server.stdout
            server.stdout.readline()
            _, url, token = server.stdout.readline().split(maxsplit=2)
            endpoint = Endpoint(url.partition("=")[2], token.partition("=")[2].strip())
            yield server.pid, endpoint
        finally:
            server.terminate()


def connected(endpoint: Endpoint, *sent: bytes) -> socket.socket:
    at = urlsplit(endpoint.url)
    found = socket.create_connection((at.hostname, at.port), timeout=20)
    for each in sent:
        found.sendall(each)
    return found


def ended(client: socket.socket, patience: float = 0.0) -> bool:
    """Whether the endpoint has closed a connection."""
    client.settimeout(patience or 0.001)
    try:
        while client.recv(4096):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def asked(
    endpoint: Endpoint, path: str, body: bytes | None = None, method: str = "GET", **headers: str
) -> tuple[int, Any]:
    """One request, and what its JSON is answered by."""
    with closing(http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=60)) as hub:
        hub.request(method, path, body, headers)
        with hub.getresponse() as answer:
            content = answer.read()
            return answer.status, json.loads(content) if content else None


def test_half_heads_keep_nobody_out_and_do_not_stay(
    own: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 20)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 2.0)
    held = [connected(own, HALF) for _ in range(60)]
    start = time.monotonic()
    assert asked(own, "/api/models") == (200, [])
    assert time.monotonic() - start < 1.5
    assert 35 <= sum(ended(each) for each in held) <= 45  # the oldest made room
    assert all(ended(each, 5.0) for each in held)
    for each in held:
        each.close()


def test_a_head_that_drips_is_as_late_as_one_that_never_comes(
    own: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    whole = b"GET /api/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for first in (b"", whole):  # a connection's second head has no more time than its first
        with connected(own, first) as client:
            if first:
                assert client.recv(9999).startswith(b"HTTP/1.1 200")
            with suppress(OSError):
                for _ in range(40):
                    client.sendall(b"G")
                    time.sleep(0.05)
            assert ended(client, 1.0)


def test_at_the_limit_of_files_it_answers_and_its_log_stays_short(tmp_path: Path) -> None:
    with served(tmp_path / "root", files=256) as (pid, endpoint):
        held = [connected(endpoint, HALF) for _ in range(700)]
        assert asked(endpoint, "/api/models") == (200, [])
        assert len([*Path(f"/proc/{pid}/fd").iterdir()]) < 200
        for each in held:
            each.close()
    assert (tmp_path / "root.log").stat().st_size < 20_000


def test_where_all_are_busy_the_next_is_told(
    own: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    head = b"POST /api/validate-yaml HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with connected(own, head), connected(own, head):
        time.sleep(0.2)
        with connected(own) as third:
            assert third.recv(999).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(
    own: Endpoint, monkeypatch: pytest.MonkeyPatch, drips: bool
) -> None:
    monkeypatch.setattr(request, "_SILENCE", 0.5)
    head = b"POST /api/validate-yaml HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
    with connected(own, head) as client:
        with suppress(OSError):
            for _ in range(20 if drips else 0):
                client.sendall(b" ")
                time.sleep(0.05)
        assert client.recv(99).startswith(b"HTTP/1.1 408")


def peak(pid: int) -> int:
    """The most memory that a process had, in MB."""
    (line,) = (
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) // 1000


def test_no_body_of_json_costs_much_more_memory_than_its_view_needs(tmp_path: Path) -> None:
    with served(tmp_path / "root", HUBAOTI_SERVE_TOKEN="hf_kept") as (pid, endpoint):
        auth = {"Authorization": "Bearer hf_kept"}
        asked(endpoint, "/api/repos/create", b'{"name": "x"}', "POST", **auth)
        before = peak(pid)
        large = b'{"content": "x", "more": [%s[]]}' % MANY
        status, said = asked(endpoint, "/api/validate-yaml", large, "POST")
        assert (status, said["error"]) == (413, "The body is larger than 4194304 bytes")
        largest = b'{"content": "x", "more": [%s[]]}' % MANY[: 4_000_000 // 3 * 3]
        threads = [
            threading.Thread(target=asked, args=(endpoint, "/api/validate-yaml", largest, "POST"))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        line = b'{"key": "header", "value": {"summary": "s", "more": [%s[]]}}' % MANY[:18_000_000]
        assert asked(endpoint, "/api/models/x/commit/main", line, "POST", **auth)[0] == 200
        files = b'{"files": [%s[]]}' % MANY[: 3_900_000 // 3 * 3]
        status, said = asked(endpoint, "/api/models/x/preupload/main", files, "POST", **auth)
        assert status == 400 and "values" in said["error"]
        assert peak(pid) - before < 120


def test_a_card_of_a_megabyte_is_judged_by_its_head(own: Endpoint) -> None:
    for head, status in (("license: mit", 200), ("license: [", 400)):
        card = json.dumps({"content": f"---\n{head}\n---\n" + "a, [b], {c}" * 100_000}).encode()
        assert asked(own, "/api/validate-yaml", card, "POST")[0] == status


NAMES = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "x", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_the_endpoint_s_is_not_answered(own: Endpoint, name: str) -> None:
    status, said = asked(own, "/api/models", Host=name)
    assert status == 421 and "--allow-host" in said["error"]


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.1.2.3:9", "[::1]:8"]
)
def test_loopback_has_many_names(own: Endpoint, name: str) -> None:
    assert asked(own, "/api/models", Host=name) == (200, [])


def test_old_clients_say_no_name(own: Endpoint) -> None:
    with connected(own, b"GET /api/models HTTP/1.0\r\n\r\n") as client:
        assert client.recv(99).startswith(b"HTTP/1.1 200")


def test_urls_that_it_signs_work_under_the_names_that_it_is_told(tmp_path: Path) -> None:
    words = ("--allow-host", "hub.example", "--allow-host", "10.0.0.5", "--token", "hf_t")
    with served(tmp_path / "root", *words) as (_, endpoint):
        auth = {"Authorization": "Bearer hf_t"}
        asked(endpoint, "/api/repos/create", b'{"name": "x"}', "POST", **auth)
        content, oid = b"large", "1c26a29f2dbaf7b0e8c5e8ee0ba5d76a0e9a09ac6ec1d4d0ce1a9e0ea2e2b4d7"
        for host in ("hub.example", "hub.example:8443", "10.0.0.5"):
            size = {"oid": oid, "size": len(content)}
            batch = json.dumps({"operation": "upload", "objects": [size]}).encode()
            path = "/local/x.git/info/lfs/objects/batch"
            _, said = asked(endpoint, path, batch, "POST", Host=host, **auth)
            url = urlsplit(said["objects"][0]["actions"]["upload"]["href"])
            assert url.netloc == host
            put = f"{url.path}?{url.query}"
            assert asked(endpoint, put, content, "PUT", Host=host)[0] == 400  # another's digest
            assert asked(endpoint, put, content, "PUT", Host="evil.example")[0] == 421
            _, said = asked(endpoint, "/api/models/x/xet-write-token/main", Host=host, **auth)
            xet = urlsplit(said["casUrl"])
            assert xet.netloc == host
            xorb, token = (
                f"{xet.path}/v1/shards",
                {"Authorization": f"Bearer {said['accessToken']}"},
            )
            assert asked(endpoint, xorb, b"none", "POST", Host=host, **token)[0] == 400


def test_the_host_that_it_listens_on_is_its_name(tmp_path: Path) -> None:
    with served(tmp_path / "root", "--host", "0.0.0.0") as (_, endpoint):
        assert asked(endpoint, "/api/models") == (200, [])
        assert asked(endpoint, "/api/models", Host="0.0.0.0:5")[0] == 200
        assert asked(endpoint, "/api/models", Host="evil.example")[0] == 421


@given(st.ip_addresses() | st.from_regex(r"[a-z][a-z0-9-]{0,9}(\.[a-z]{1,5}){0,2}", fullmatch=True))
def test_a_host_is_the_same_with_its_port_and_in_brackets(host: Any) -> None:
    text = str(host)
    spelled = f"[{text}]" if ":" in text else text
    assert parse_host(text) == parse_host(f"{spelled}:80") == parse_host(spelled.upper()) == text
    assert Hosts([text]).hold(f"{spelled}:80")


def test_a_name_that_is_none_cannot_be_allowed() -> None:
    with pytest.raises(BadRequest, match="no host's name"):
        Hosts([" "])


@pytest.mark.parametrize("way", ["file", "variable"])
def test_a_token_that_is_kept_apart_is_not_on_the_command_line(tmp_path: Path, way: str) -> None:
    file = tmp_path / "a token"
    file.write_text("hf_apart\n")
    words = ("--token-file", str(file)) if way == "file" else ()
    env = {} if way == "file" else {"HUBAOTI_SERVE_TOKEN": "hf_apart"}
    with served(tmp_path / "root", *words, **env) as (pid, endpoint):
        assert b"hf_apart" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert "hf_apart" not in endpoint.token  # what is printed, for a shell to fill in
        auth = {"Authorization": "Bearer hf_apart"}
        assert asked(endpoint, "/api/whoami-v2", **auth)[0] == 200
        assert asked(endpoint, "/api/whoami-v2", Authorization="Bearer hf_other")[0] == 401


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--token-file", "absent"], "cannot be read"),
        (["--token-file", "absent", "--token", "x"], "two tokens"),
        (["--token-file", os.devnull], "printable"),
    ],
)
def test_a_token_that_cannot_be_had_is_said(tmp_path: Path, words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "hubaoti.cli", "serve", "--port", "0", "--root", "root"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "error: unexpected" not in done.stderr


def test_a_log_gets_so_many_lines_and_their_number(caplog: pytest.LogCaptureFixture) -> None:
    logger, seldom = logging.getLogger("seldom"), Seldom(most=2, seconds=0.2)
    logger.addFilter(seldom)
    try:
        for at in range(10):
            logger.error("line %d", at)
        time.sleep(0.3)
        logger.error("line %d", 10)
    finally:
        logger.removeFilter(seldom)
    said = [record.getMessage() for record in caplog.records if record.name == "seldom"]
    assert said == ["line 0", "line 1", "line 10 (8 lines before it were left out)"]


@pytest.mark.parametrize(
    "url", ["http://a:99999999", "http://a:0", "http://a:b", "http://[::1", "http://u@a", "a", ""]
)
def test_an_upstream_is_an_endpoint_s_url(url: str) -> None:
    with pytest.raises(BadRequest, match="no URL of an endpoint"):
        Upstream(url)


@pytest.mark.parametrize("name", ["http://hub.example", "*", "hub.example/", ":", "", "a b"])
def test_what_is_allowed_is_a_host_s_name(name: str) -> None:
    with pytest.raises(BadRequest, match="is no host's name"):
        Hosts([name])
