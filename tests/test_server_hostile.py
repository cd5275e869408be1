"""Requests that no honest client sends: each gets a clear no, and never a 500."""

import base64
import errno
import hashlib
import http.client
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route

from hubaoti.server import Endpoint, card, views_uploads
from hubaoti.server.objects import Objects
from hubaoti.server.routes import ROUTES
from hubaoti.server.views_uploads import MAX_REGULAR

REPO = "hostile/target"
CONTENT = base64.b64encode(b"hello").decode()


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Send = Callable[..., Answer]


@pytest.fixture(scope="module")
def send(endpoint: Endpoint) -> Send:
    """Sends one request as it is given, with the token unless told otherwise."""

    def send(
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = endpoint.token,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        auth = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, raw, {**auth, **(headers or {})})
            found = connection.getresponse()
            answer = Answer(found.status, found.headers, found.read())
        finally:
            connection.close()
        assert answer.status < 500, answer
        return answer

    send("POST", "/api/repos/create", {"name": "target", "organization": "hostile"})
    return send


def lines(*items: tuple[str, object], parent: str = "") -> bytes:
    header = ("header", {"summary": "s", **({"parentCommit": parent} if parent else {})})
    said = [{"key": key, "value": value} for key, value in (header, *items)]
    return b"\n".join(json.dumps(item).encode() for item in said)


def commit(send: Send, *items: tuple[str, object], branch: str = "main", **more: str) -> Answer:
    return send("POST", f"/api/models/{REPO}/commit/{branch}", lines(*items, **more))


def put(path: object) -> tuple[str, object]:
    return ("file", {"path": path, "content": CONTENT, "encoding": "base64"})


def refused(answer: Answer, status: int) -> None:
    """As JSON, with the same words in the header that the client reads."""
    assert answer.status == status, answer
    assert answer.json["error"] and answer.headers["X-Error-Message"]


def test_unknown_roads_and_methods_are_answered_in_json(send: Send) -> None:
    for path in ("/none", "/api/none", "/api/models/a/b/none", "/_cas/x/v1/none", "//", "/a//b"):
        refused(send("GET", path), 404)
    refused(send("DELETE", "/api/whoami-v2"), 405)
    refused(send("GET", "/_cas/none/v1/shards"), 404)


HOSTILE_NAMES = [
    "..",
    ".",
    "",
    "a/b/c",
    "a b",
    "-a",
    "a.git",
    "a..b",
    "a--b",
    "refs",
    "a\0b",
    "\ud800",
]
HOSTILE_NAMES += ["../../etc", "ü", "a" * 200, "%2e%2e", "models/x", "api/x", None, 5, ["a"], {}]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_repo_is_named_plainly_or_not_at_all(send: Send, name: object) -> None:
    refused(send("POST", "/api/repos/create", {"name": name}), 400)
    refused(send("POST", "/api/repos/move", {"fromRepo": REPO, "toRepo": name}), 400)
    refused(send("DELETE", "/api/repos/delete", {"name": name}), 400)


@pytest.mark.parametrize(
    "path",
    [
        "..%2F..%2Fetc/passwd",
        "%2e%2e/x",
        "a%00b/c",
        "%ff/x",
        "a%2Fb/c",
        "hostile%2Ftarget",
        "a%0Ab/c",
    ],
)
def test_a_quoted_name_is_judged_unquoted(send: Send, path: str) -> None:
    for url in (
        f"/api/models/{path}",
        f"/{path}/resolve/main/f",
        f"/datasets/{path}/resolve/main/f",
    ):
        assert send("GET", url).status in {200, 400, 404}
    assert b"root:" not in send("GET", f"/{path}/resolve/main/f").body


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../x", "a/../b", "a//b", "a/", "", ".", "./a", "a\\b", "a\0b", "a\nb"),
        *(".git/config", "a/.GIT/hooks", "\ud800", "x" * 2000, "a/" * 200 + "b", "é" * 200),
        *(None, 5, [], {}),
    ],
    ids=lambda path: ascii(path)[:20],
)
def test_a_path_stays_inside_its_repo(send: Send, path: object) -> None:
    for item in (
        put(path),
        ("lfsFile", {"path": path, "oid": "0" * 64}),
        ("deletedFile", {"path": path}),
    ):
        refused(commit(send, item), 400)
    refused(send("POST", f"/api/models/{REPO}/preupload/main", {"files": [{"path": path}]}), 400)


@pytest.mark.parametrize(
    "path", ["../../hub.sqlite3", "%2e%2e/%2e%2e/hub.sqlite3", "..%2fhub.sqlite3"]
)
def test_no_url_reaches_outside_of_a_commit(send: Send, path: str) -> None:
    assert send("GET", f"/{REPO}/resolve/main/{path}").status in {400, 404}
    assert send("GET", f"/api/models/{REPO}/tree/main/{path}").status in {400, 404}


def test_a_path_is_a_file_or_a_folder_but_not_both(send: Send) -> None:
    refused(commit(send, put("clash"), put("clash/inner")), 400)
    refused(commit(send, put("clash/inner"), put("clash")), 400)
    assert commit(send, put("clash")).status == 200
    refused(commit(send, put("clash/inner")), 400)
    swap = commit(send, ("deletedFile", {"path": "clash"}), put("clash/inner"))
    assert swap.status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n",
        b"nonsense",
        b"[]",
        b"{}",
        b'{"key": "header"}',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"key": "file", "value": {}}).encode(),
        lines(("unknown", {"path": "a"})),
        lines(("file", {"path": "a"})),
        lines(("file", {"path": "a", "content": 5})),
        lines(("file", {"path": "a", "content": "!!!", "encoding": "base64"})),
        lines(("file", {"path": "a", "content": "\xe9", "encoding": "base64"})),
        lines(("file", {"path": "a", "content": "x", "encoding": "rot13"})),
        lines(("file", {"path": "a", "content": "x", "encoding": ["base64"]})),
        lines(("lfsFile", {"path": "a", "oid": "../../etc/passwd"})),
        lines(("lfsFile", {"path": "a", "oid": "A" * 64})),
        lines(("lfsFile", {"path": "a", "oid": "0" * 64})),
        lines(parent="zz"),
        b'{"key": "header", "value": {"summary": "\\ud800"}}',
        b'{"key": "header", "value": {"summary": null}}',
    ],
    ids=lambda body: ascii(body)[:40],
)
def test_a_malformed_commit_is_a_400_and_changes_nothing(send: Send, body: bytes) -> None:
    before = send("GET", f"/api/models/{REPO}").json["sha"]
    refused(send("POST", f"/api/models/{REPO}/commit/main", body), 400)
    assert send("GET", f"/api/models/{REPO}").json["sha"] == before


def test_an_lfs_file_is_believed_only_as_it_is(send: Send) -> None:
    content = os.urandom(1000)
    oid = upload(send, content)
    file = {"path": "f.bin", "oid": oid, "size": 1000, "algo": "sha256"}
    refused(commit(send, ("lfsFile", file | {"size": 999})), 400)
    refused(commit(send, ("lfsFile", file | {"size": -1})), 400)
    refused(commit(send, ("lfsFile", file | {"algo": "md5"})), 400)
    assert commit(send, ("lfsFile", file)).status == 200
    assert send("GET", f"/{REPO}/resolve/main/f.bin").body == content


def batch(send: Send, oid: object, size: object, **more: object) -> Answer:
    said = {"operation": "upload", "objects": [{"oid": oid, "size": size}], **more}
    return send("POST", f"/{REPO}.git/info/lfs/objects/batch", said)


def upload(send: Send, content: bytes) -> str:
    oid = hashlib.sha256(content).hexdigest()
    (found,) = batch(send, oid, len(content)).json["objects"]
    href = urlsplit(found["actions"]["upload"]["href"])
    assert send("PUT", f"{href.path}?{href.query}", content, token=None).status == 200
    (found,) = batch(send, oid, len(content)).json["objects"]
    assert "actions" not in found
    return oid


def test_an_upload_is_what_its_signed_url_says_or_nothing(send: Send) -> None:
    content = os.urandom(100)
    oid, other = (hashlib.sha256(said).hexdigest() for said in (content, b"other"))
    (found,) = batch(send, oid, 100).json["objects"]
    href = urlsplit(found["actions"]["upload"]["href"])
    url = f"{href.path}?{href.query}"
    refused(send("PUT", url, content + b"x", token=None), 413)
    refused(send("PUT", url, content[:-1], token=None), 400)
    refused(send("PUT", url, bytes(100), token=None), 400)
    refused(send("PUT", url.replace(oid, other), b"other", token=None), 403)
    refused(send("PUT", url.replace("size=100", "size=1000"), content, token=None), 403)
    refused(send("PUT", f"{href.path}?size=100", content), 403)
    refused(send("PUT", f"{href.path}?size=100&signature=1.2", content), 403)
    refused(send("PUT", f"{href.path}?size=100&signature=%FC.%E9", content), 403)
    assert send("PUT", url, content, token=None).status == 200


@pytest.mark.parametrize(
    "oid", ["0" * 63, "0" * 65, "g" * 64, "../" * 20, None, 5, "\ud800"], ids=ascii
)
def test_a_digest_is_64_hex_digits(send: Send, oid: object) -> None:
    refused(batch(send, oid, 1), 400)
    if isinstance(oid, str):
        word = quote(oid.encode("utf-8", "replace"), safe="")
        refused(send("PUT", f"/_lfs/{word}?size=1&signature=1.1", b"x"), 400)


@pytest.mark.parametrize("size", [-1, 1.5, "1", None, True, 2**60], ids=ascii)
def test_a_size_is_a_sane_number(send: Send, size: object) -> None:
    refused(batch(send, "0" * 64, size), 400)
    files = {"files": [{"path": "f", "size": size, "sample": ""}]}
    refused(send("POST", f"/api/models/{REPO}/preupload/main", files), 400)


def test_lfs_is_for_uploads_only(send: Send) -> None:
    refused(batch(send, "0" * 64, 1, operation="download"), 400)
    refused(batch(send, "0" * 64, 1, objects="x"), 400)
    refused(batch(send, "0" * 64, 1, objects=["x"]), 400)


JSON_ROADS = [
    ("POST", "/api/repos/create"),
    ("DELETE", "/api/repos/delete"),
    ("POST", "/api/repos/move"),
    ("PUT", f"/api/models/{REPO}/settings"),
    ("POST", f"/api/models/{REPO}/preupload/main"),
    ("POST", f"/api/models/{REPO}/tag/main"),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch"),
    ("POST", "/api/validate-yaml"),
]
SPOILT = [b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"a": ' * 5000, b"1" * 5000, b'"\\ud800"']


@pytest.mark.parametrize(("method", "path"), JSON_ROADS)
def test_bad_json_is_a_400(send: Send, method: str, path: str) -> None:
    for body in SPOILT:
        refused(send(method, path, body), 400)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    road=st.sampled_from([*JSON_ROADS, ("POST", f"/api/models/{REPO}/branch/b")]),
    values=st.lists(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
        min_size=8,
        max_size=8,
    ),
)
def test_no_json_value_breaks_the_endpoint(
    send: Send, road: tuple[str, str], values: list[object]
) -> None:
    keys = ("name", "fromRepo", "toRepo", "tag", "files", "objects", "private", "startingPoint")
    if road[1].endswith("delete") or road[1].endswith("settings"):
        values[0] = values[6] = None
    send(*road, dict(zip(keys, values, strict=True)))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    road=st.sampled_from(
        [
            f"/api/models/{REPO}/revision/{{}}",
            f"/api/models/{REPO}/tree/{{}}",
            f"/api/models/{REPO}/tree/main/{{}}",
            f"/{REPO}/resolve/{{}}/f",
            f"/{REPO}/resolve/main/{{}}",
            f"/api/models/{REPO}/commits/{{}}",
            "/api/models/{}",
            "/api/models?search={}",
            "/api/models?filter={}&author={}",
            "/api/models?limit={}",
            "/api/models?cursor={}",
            "/api/models?sort={}",
            f"/api/models/{REPO}/tree/main?cursor={{}}",
        ]
    ),
    word=st.binary(max_size=40),
)
def test_no_url_breaks_the_endpoint(send: Send, road: str, word: bytes) -> None:
    send("GET", road.replace("{}", quote(word, safe="")))


@pytest.mark.parametrize(
    "name", ["a..b", "a b", "/a", "a/", "a.lock", "@", "HEAD", "a~1", "a:b", "-x"]
)
def test_refs_are_named_by_gits_rules(send: Send, name: str) -> None:
    refused(send("POST", f"/api/models/{REPO}/branch/{quote(name, safe='')}", {}), 400)
    refused(send("POST", f"/api/models/{REPO}/tag/main", {"tag": name}), 400)


def test_no_ref_poses_as_a_pinned_commit(send: Send) -> None:
    head = send("GET", f"/api/models/{REPO}").json["sha"]
    refused(send("POST", f"/api/models/{REPO}/tag/main", {"tag": head}), 400)
    refused(send("POST", f"/api/models/{REPO}/branch/{head}", {}), 400)


def test_big_bodies_are_cut_off(send: Send, endpoint: Endpoint) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
    connection.putrequest("POST", "/api/repos/create")
    connection.putheader("Authorization", f"Bearer {endpoint.token}")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    for size in (MAX_REGULAR + 1, MAX_REGULAR + 2**20):
        content = base64.b64encode(bytes(size)).decode()
        file = {"path": "f", "content": content, "encoding": "base64"}
        refused(commit(send, ("file", file)), 413)


def test_a_commit_has_so_many_changes_and_no_more(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_uploads, "_MAX_CHANGES", 2)
    refused(commit(send, put("a"), put("b"), put("c")), 413)
    assert commit(send, put("a"), put("b")).status == 200


def test_a_body_without_a_length_is_bounded_too(send: Send, endpoint: Endpoint) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
    url, auth = f"/api/models/{REPO}/paths-info/main", {"Transfer-Encoding": "chunked"}
    try:
        with suppress(OSError):  # the endpoint may hang up before it has read all
            connection.request("POST", url, (bytes(2**20) for _ in range(40)), auth)
            assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_paths_come_as_a_form_or_as_json_and_may_be_anything(send: Send) -> None:
    url = f"/api/models/{REPO}/paths-info/main"
    commit(send, put("p/f"))
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    said = send(
        "POST", url, b"paths=p%2Ff&paths=p&paths=..%2F..&paths=%FF&expand=True", headers=form
    )
    assert [item["path"] for item in said.json] == ["p/f", "p"] and "lastCommit" in said.json[0]
    said = send("POST", url, {"paths": ["/p/f/"]}, headers={"Content-Type": "application/json"})
    assert [item["path"] for item in said.json] == ["p/f"]
    refused(send("POST", url, b"\xff", headers=form), 400)
    refused(send("POST", url, b"paths=a&" * 20_000, headers=form), 400)
    refused(send("POST", url, {"paths": [5]}, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize(
    "said", ["bytes=x", "lines=1-2", "bytes=-", "bytes=1", "x", "bytes=" + "0-1," * 999]
)
def test_a_malformed_range_is_a_400(send: Send, said: str) -> None:
    url = f"/{REPO}/resolve/main/.gitattributes"
    refused(send("GET", url, headers={"Range": said}), 400)


def test_a_missing_token_a_wrong_one_and_a_foreign_scheme_are_401(send: Send) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic eDp5"}):
        refused(send("GET", "/api/whoami-v2", token=None, headers=headers), 401)
        body = {"name": "x"}
        refused(send("POST", "/api/repos/create", body, token=None, headers=headers), 401)
    for spoilt in ("Bearer ", "Bearer", "Bearer \xfc", "Bearer a b"):
        headers = {"Authorization": spoilt}
        refused(send("GET", "/api/whoami-v2", token=None, headers=headers), 401)


def test_a_token_is_asked_for_before_a_body_is_read(send: Send) -> None:
    for method, path in JSON_ROADS[:-1]:
        refused(send(method, path, b"{", token=None), 401)
    refused(send("POST", f"/api/models/{REPO}/commit/main", b"{", token=None), 401)
    refused(send("GET", f"/api/models/{REPO}/xet-write-token/main", token=None), 401)
    refused(send("GET", "/api/settings/repositories", token=None), 401)
    refused(send("GET", "/api/organizations/o/settings/repositories", token=None), 401)
    refused(send("GET", f"/api/models/{REPO}/auth-check/write", token=None), 401)


OPEN = {"view_paths", "validate_yaml"}
WRITING = [
    route
    for route in ROUTES
    if isinstance(route, Route) and route.methods != {"GET", "HEAD"} and route.name not in OPEN
]


@pytest.mark.parametrize("route", WRITING, ids=lambda route: route.path)
def test_no_route_writes_for_whoever_comes(send: Send, route: Route) -> None:
    url = send("GET", f"/api/models/{REPO}/xet-write-token/main").json["casUrl"]
    words = dict.fromkeys(route.param_convertors, "0" * 64) | {
        "kind": "models",
        "owner": "hostile",
        "name": "target",
        "epoch": url.rpartition("/")[2],
    }
    path = re.sub(r"\{(\w+)[^}]*\}", lambda match: words[match[1]], route.path)
    (method,) = route.methods or ()
    refused(send(method, path, b"nonsense", token=None), 403 if "_lfs" in path else 401)


def test_a_hidden_repo_and_none_at_all_look_the_same(send: Send) -> None:
    send("POST", "/api/repos/create", {"name": "hidden", "visibility": "private"})
    roads = ["/api/models/local/{}", "/local/{}/resolve/main/f", "/api/models/local/{}/refs"]
    for road in roads:
        hidden, none = (send("GET", road.format(x), token=None) for x in ("hidden", "nothin"))
        refused(hidden, 401)
        assert hidden.headers["X-Error-Code"] == none.headers["X-Error-Code"] == "RepoNotFound"
        assert hidden.body.replace(b"hidden", b"nothin") == none.body
        refused(send("GET", road.format("nothin")), 404)


def test_an_unchanged_commit_is_a_commit_of_its_own(send: Send) -> None:
    first, second = commit(send).json["commitOid"], commit(send).json["commitOid"]
    log = send("GET", f"/api/models/{REPO}/commits/main").json
    assert [entry["id"] for entry in log[:2]] == [second, first]


def test_a_commit_needs_a_branch_not_a_tag_or_a_commit(send: Send) -> None:
    send("POST", f"/api/models/{REPO}/tag/main", {"tag": "fixed"})
    answer = commit(send, branch="fixed")
    refused(answer, 404)
    assert answer.headers["X-Error-Code"] == "RevisionNotFound"
    refused(commit(send, branch=send("GET", f"/api/models/{REPO}").json["sha"]), 400)


def test_a_file_is_never_a_page(send: Send) -> None:
    page = base64.b64encode(b"<script>alert(1)</script>").decode()
    commit(send, ("file", {"path": "x.html", "content": page, "encoding": "base64"}))
    headers = send("GET", f"/{REPO}/resolve/main/x.html").headers
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("visibility", ["secret", 5, [], {}, "Public"], ids=ascii)
def test_a_repo_is_public_or_private(send: Send, visibility: object) -> None:
    body = {"name": "v", "visibility": visibility}
    refused(send("POST", "/api/repos/create", body), 400)
    refused(send("PUT", f"/api/models/{REPO}/settings", body), 400)


def test_a_space_needs_an_sdk_and_a_repo_a_known_kind(send: Send) -> None:
    refused(send("POST", "/api/repos/create", {"name": "v", "type": "space"}), 400)
    for sdk in ("a: b", ["gradio"], {}):
        refused(send("POST", "/api/repos/create", {"name": "v", "type": "space", "sdk": sdk}), 400)
    for kind in ("models", "bucket", 5, ["model"]):
        refused(send("POST", "/api/repos/create", {"name": "v", "type": kind}), 400)


CARDS = [
    "---\na: &a [x, x]\nb: [*a, *a]\n---\n",
    "---\n" + "a: {" * 3000 + "\n---\n",
    "---\nx: .nan\ny: .inf\nz: 1" + "0" * 400 + "\nw: 2020-01-01\n? [a]\n: b\n---\n",
    "---\nx: .nan\nw: 2020-01-01\n3: {2020-01-01: .inf}\ns: !!set {a}\nb: !!binary aGk=\n---\n",
    '---\nx: "\\ud800"\ntags: [1, 2.5, null, [a], {b: c}, true]\n---\n',
    "---\n!!python/object/apply:os.system ['true']\n---\n",
    "---\nx: !!int ''\n---\n",
    "---\nx: !!bool maybe\n---\n",
    "---\nx: !!timestamp now\n---\n",
    "---\nx: 0x" + "f" * 5000 + "\n---\n",
    "---\nx: " + "1:" * 200 + "1.0\n---\n",
    "---\ntags: hello\nlicense: [a, b]\nbase_model_relation: finetune\nbase_model: a/b\n---",
    "---\n---\n",
    "---\nnever closed",
    "",
]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: ascii(card)[:30])
def test_no_card_breaks_the_list(send: Send, card: str) -> None:
    readme = {"path": "README.md", "content": card}
    assert commit(send, ("file", readme)).status == 200
    assert send("GET", f"/api/models/{REPO}").status == 200
    found = send("GET", "/api/models?full=true&cardData=true&search=target").json
    assert [repo["id"] for repo in found] == [REPO]
    said = send("POST", "/api/validate-yaml", {"content": card, "repoType": "model"})
    assert said.status in {200, 400} and "errors" in said.json


def test_a_card_is_read_while_others_may_write(
    endpoint: Endpoint, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(readme: str) -> dict[str, Any]:
        assert send("POST", "/api/repos/create", {"name": "meanwhile"}).status == 200
        return {"tags": ["read"]}

    monkeypatch.setattr(card, "parse_card", fake)
    assert commit(send, ("file", {"path": "README.md", "content": "---"})).status == 200
    assert "read" in send("GET", f"/api/models/{REPO}").json["tags"]


def test_a_card_is_the_one_of_mains_last_readme(send: Send) -> None:
    def readme(tag: str) -> tuple[str, object]:
        return ("file", {"path": "README.md", "content": f"---\ntags: [{tag}]\n---\n"})

    def tags_after(*changes: tuple[str, object], branch: str = "main") -> list[str]:
        assert commit(send, *changes, branch=branch).status == 200
        tags: list[str] = send("GET", f"/api/models/{REPO}").json["tags"]
        return tags

    gone = ("deletedFile", {"path": "README.md"})
    assert tags_after(readme("a"), readme("b")) == ["b"]
    assert tags_after(put("other")) == ["b"]
    send("POST", f"/api/models/{REPO}/branch/aside", {})
    assert tags_after(readme("c"), branch="aside") == ["b"]
    assert send("POST", f"/api/models/{REPO}/super-squash/main", {}).status == 200
    assert tags_after(put("another")) == ["b"]
    assert tags_after(readme("d"), gone) == []
    assert tags_after(readme("d")) == ["d"]
    assert tags_after(gone, readme("e")) == ["e"]
    assert tags_after(gone) == []


FLAGS = {"true": True, "True": True, "1": True, "yes": True, "false": False, "": False}


def test_flags_are_spelled_alike_everywhere(send: Send) -> None:
    for word, set_ in FLAGS.items():
        (found,) = send("GET", f"/api/models?full={word}&author=hostile&search=target").json
        assert ("siblings" in found) is set_
        (first, *_) = send("GET", f"/api/models/{REPO}?blobs={word}").json["siblings"]
        assert ("size" in first) is set_


def test_what_a_list_cannot_answer_it_refuses(send: Send) -> None:
    for query in ("sort=hearts", "limit=-1", "limit=x", "cursor=1e5", "num_parameters=min:6B"):
        refused(send("GET", f"/api/models?{query}"), 400)
    for query in ("models=o/m", "datasets=o/d", "linked=True"):
        refused(send("GET", f"/api/spaces?{query}"), 400)


def test_pages_of_a_list_follow_each_other(send: Send) -> None:
    for number in range(3):
        send("POST", "/api/repos/create", {"name": f"page/{number}"})
    path: str | None = "/api/models?author=page&limit=2&sort=createdAt&x=%3E"
    found: list[str] = []
    while path:
        answer = send("GET", path)
        found += [repo["id"] for repo in answer.json]
        link = answer.headers.get("Link", "")
        url = urlsplit(link.removeprefix("<").partition(">")[0])
        path = f"{url.path}?{url.query}" if link else None
    assert found == ["page/2", "page/1", "page/0"]
    assert send("GET", "/api/models?limit=0").json == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "fake"), 507),
        (OSError(errno.EIO, "fake"), 500),
        (RuntimeError("fake"), 500),
    ],
)
def test_a_failure_of_our_own_is_told_in_json_and_the_endpoint_goes_on(
    endpoint: Endpoint,
    send: Send,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    def fake(self: Objects, content: bytes) -> str:
        raise error

    monkeypatch.setattr(Objects, "put", fake)
    body, auth = lines(put("f")), {"Authorization": f"Bearer {endpoint.token}"}
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc)
    connection.request("POST", f"/api/models/{REPO}/commit/main", body, auth)
    answer = connection.getresponse()
    assert answer.status == status and json.loads(answer.read())["error"]
    connection.close()
    monkeypatch.undo()
    assert commit(send, put("f")).status == 200


def test_a_full_disk_refuses_an_upload_before_it_starts(
    send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "free", lambda self: 10)
    (found,) = batch(send, hashlib.sha256(b"full").hexdigest(), 100).json["objects"]
    href = urlsplit(found["actions"]["upload"]["href"])
    with pytest.raises(AssertionError, match="507"):
        send("PUT", f"{href.path}?{href.query}", bytes(100))
