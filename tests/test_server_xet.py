"""Xet uploads: the two formats, honest and lying, and how they become plain objects."""

import hashlib
import io
import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import lz4.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.server import Endpoint, xet
from hubaoti.server.database import Database
from hubaoti.server.errors import ServerError
from hubaoti.server.ingest import Ingest
from hubaoti.server.objects import Objects
from hubaoti.server.xet import BadXet, read_chunk, read_chunks, read_files

END = b"\xff" * 32 + bytes(16)
HEAD = b"HFRepoMetaData" + bytes(34)


def grouped(content: bytes) -> bytes:
    return b"".join(content[plane::4] for plane in range(4))


def chunk(content: bytes, scheme: int = 0) -> bytes:
    stored = [
        lambda: content,
        lambda: lz4.frame.compress(content),
        lambda: lz4.frame.compress(grouped(content)),
    ][scheme]()
    return chunk_head(len(stored), scheme, len(content)) + stored


def chunk_head(stored: int, scheme: int, length: int, version: int = 0) -> bytes:
    numbers = stored.to_bytes(3, "little"), length.to_bytes(3, "little")
    return bytes([version]) + numbers[0] + bytes([scheme]) + numbers[1]


def hashed(name: str) -> bytes:
    return struct.pack("<4Q", *(int(name[i : i + 16], 16) for i in range(0, 64, 16)))


Segments = list[tuple[str, int, int, int]]


def file_rows(segments: Segments, sha256: str | None, verified: bool = False) -> bytes:
    flags = (1 << 30 if sha256 else 0) | (1 << 31 if verified else 0)
    rows = [bytes(32) + struct.pack("<IIQ", flags, len(segments), 0)]
    rows += [hashed(xorb) + struct.pack("<IIII", 0, *numbers) for xorb, *numbers in segments]
    rows += [bytes(48)] * (len(segments) if verified else 0)
    rows += [hashed(sha256) + bytes(16)] if sha256 else []
    return b"".join(rows)


def shard(*files: bytes) -> bytes:
    return HEAD + b"".join(files) + END


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def named(*parts: bytes) -> str:
    return xet.hash_leaves(map(xet.hash_chunk, parts))


def test_a_xorbs_hash_is_the_one_of_xets_test_vectors() -> None:
    alone = "d8d408e608fb9ca213b9909a65d86d725f2de4d8d540324be8a363e7a6e228cb"
    assert named(b"Hello World!") == alone
    first = "c28f58387a60d4aa200c311cda7c7f77f686614864f5869eadebf765d0a14a69"
    second = "6e4e3263e073ce2c0e78cc770c361e2778db3b054b98ab65e277fc084fa70f22"
    both = xet.hash_leaves([xet.Node(first, 100), xet.Node(second, 200)])
    assert both == "be64c7003ccd3cf4357364750e04c9592b3c36705dee76a71590c011766b6c14"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(0, 2)), min_size=1))
def test_a_xorb_gives_back_the_chunks_it_was_made_of(parts: list[tuple[bytes, int]]) -> None:
    xorb = b"".join(chunk(content, scheme) for content, scheme in parts)
    for whole in (xorb, xorb + b"XETBLOB" + bytes(30)):
        file = io.BytesIO(whole)
        found = read_chunks(file, len(whole))
        assert [read_chunk(file, at.offset) for at in found] == [content for content, _ in parts]
        assert [at.length for at in found] == [len(content) for content, _ in parts]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_are_a_xorb_or_refused(content: bytes, headed: bool) -> None:
    content = chunk(b"abc") + content if headed else content
    with suppress(BadXet):
        for at in read_chunks(io.BytesIO(content), len(content)):
            read_chunk(io.BytesIO(content), at.offset)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_shard_or_refused(content: bytes) -> None:
    for said in (content, HEAD + content, HEAD + content + END):
        with suppress(BadXet):
            list(read_files(said))


BOMB = lz4.frame.compress(bytes(50_000_000))
BAD_CHUNKS = {
    "no chunk": b"",
    "a head cut short": chunk(b"abc")[:5],
    "a body cut short": chunk(b"abc")[:-1],
    "another version": chunk_head(3, 0, 3, version=1) + b"abc",
    "an unknown scheme": chunk_head(3, 3, 3) + b"abc",
    "nothing stored": chunk_head(0, 0, 3),
    "nothing inside": chunk_head(3, 0, 0) + b"abc",
    "too long a chunk": chunk_head(3, 1, 2**24 - 1) + b"abc",
    "another length": chunk_head(3, 0, 4) + b"abc",
    "not compressed": chunk_head(30, 1, 30) + b"abc" * 10,
    "compressed in part": chunk_head(3, 1, 3) + lz4.frame.compress(b"abc")[:3],
    "shorter than said": chunk_head(len(lz4.frame.compress(b"ab")), 1, 3)
    + lz4.frame.compress(b"ab"),
    "a bomb": chunk_head(len(BOMB), 1, 1000) + BOMB,
}


@pytest.mark.parametrize("content", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_a_lying_xorb_is_refused(content: bytes) -> None:
    file = io.BytesIO(content)
    with pytest.raises(BadXet):
        for at in read_chunks(file, len(content)):
            read_chunk(file, at.offset)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[Ingest, Objects, Path]]:
    objects, database = Objects(tmp_path), Database(tmp_path / "index")
    yield Ingest(tmp_path, database, objects), objects, tmp_path
    database.close()


Store = tuple[Ingest, Objects, Path]


def keep(store: Store, name: str, content: bytes) -> bool:
    with store[1].receive() as incoming:
        incoming.write(content)
        return store[0].keep_xorb(name, incoming)


PARTS = [b"alpha" * 20, b"beta", b"gamma" * 7]
ONE, TWO, NONE = named(*PARTS), named(b"delta"), "0" * 64


@pytest.fixture
def filled(store: Store) -> Store:
    assert keep(store, ONE, b"".join(chunk(part, n) for n, part in enumerate(PARTS)))
    assert keep(store, TWO, chunk(b"delta"))
    return store


def lengths(first: int, last: int) -> int:
    return sum(map(len, PARTS[first:last]))


def test_files_are_put_together_from_chunks_of_any_xorb(filled: Store) -> None:
    ingest, objects, root = filled
    whole, mixed = b"".join(PARTS), PARTS[1] + b"delta" + PARTS[0] + PARTS[1]
    segments: Segments = [(ONE, lengths(1, 2), 1, 2), (TWO, 5, 0, 1), (ONE, lengths(0, 2), 0, 2)]
    ingest.assemble(
        shard(
            file_rows([(ONE, lengths(0, 3), 0, 3)], digest(whole)),
            file_rows(segments, digest(mixed), verified=True),
            file_rows([(TWO, 5, 0, 1)], None),
            file_rows([], digest(b"")),
        )
    )
    for content in (whole, mixed, b"delta", b""):
        assert objects.path(digest(content)).read_bytes() == content
    assert not list((root / "xorbs").iterdir()), "what moved into objects is not kept twice"


def test_chunks_sent_once_serve_later_shards(filled: Store) -> None:
    ingest, objects, root = filled
    ingest.assemble(shard(file_rows([(ONE, lengths(0, 2), 0, 2)], None)))
    assert (root / "xorbs" / ONE).exists(), "its third chunk is still needed"
    known = b"".join(chunk(part) for part in PARTS)
    assert not keep(filled, ONE, known), "its chunks need not be kept again"
    ingest.assemble(shard(file_rows([(ONE, lengths(1, 3), 1, 3)], digest(PARTS[1] + PARTS[2]))))
    assert not (root / "xorbs" / ONE).exists()
    reverse = PARTS[2] + PARTS[0]
    segments: Segments = [(ONE, lengths(2, 3), 2, 3), (ONE, lengths(0, 1), 0, 1)]
    again = shard(file_rows(segments, digest(reverse)))
    ingest.assemble(again)
    ingest.assemble(again)
    assert objects.path(digest(reverse)).read_bytes() == reverse


@pytest.mark.parametrize(
    "lie",
    [[PARTS[0]], PARTS[1:], PARTS[::-1], [*PARTS, b"x"], [b"".join(PARTS)], [b"delta"]],
    ids=["a part", "another part", "another order", "more", "joined", "another's"],
)
def test_a_xorb_of_another_hash_is_refused_and_leaves_nothing(
    store: Store, lie: list[bytes]
) -> None:
    with pytest.raises(BadXet, match="hash mismatch"):
        keep(store, ONE, b"".join(chunk(part) for part in lie))
    left = [path for folder in ("xorbs", "tmp") for path in (store[2] / folder).iterdir()]
    assert not left
    assert keep(store, ONE, b"".join(chunk(part) for part in PARTS))


def test_a_xorb_that_the_disk_spoilt_gives_way_to_the_next_upload(filled: Store) -> None:
    ingest, objects, root = filled
    (root / "xorbs" / TWO).unlink()
    (root / "xorbs" / TWO).write_bytes(chunk(b"spoil"))
    file = shard(file_rows([(TWO, 5, 0, 1)], digest(b"delta")))
    with pytest.raises(ServerError, match="SHA-256 mismatch"):
        ingest.assemble(file)
    assert keep(filled, TWO, chunk(b"delta"))
    ingest.assemble(file)
    assert objects.path(digest(b"delta")).read_bytes() == b"delta"


BAD_SHARDS = {
    "nothing": b"",
    "no magic": bytes(48) + END,
    "no end": HEAD,
    "an end cut short": (HEAD + END)[:-1],
    "a row cut short": shard(file_rows([(ONE, 100, 0, 1)], None))[:-100],
    "more segments than rows": HEAD + bytes(32) + struct.pack("<IIQ", 0, 2**32 - 1, 0) + END,
    "verification that is not there": HEAD
    + bytes(32)
    + struct.pack("<IIQ", 1 << 31, 1, 0)
    + bytes(48)
    + END,
    "an unknown xorb": shard(file_rows([(NONE, 100, 0, 1)], None)),
    "chunks beyond the last": shard(file_rows([(ONE, lengths(0, 3), 0, 4)], None)),
    "chunks backwards": shard(file_rows([(ONE, 0, 2, 1)], None)),
    "no chunks": shard(file_rows([(ONE, 0, 1, 1)], None)),
    "huge indices": shard(file_rows([(ONE, 1, 2**32 - 2, 2**32 - 1)], None)),
    "another length": shard(file_rows([(ONE, 1, 0, 1)], None)),
}


@pytest.mark.parametrize("content", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_lying_shard_is_refused_and_leaves_nothing(filled: Store, content: bytes) -> None:
    with pytest.raises(BadXet):
        filled[0].assemble(content)
    left = [path for folder in ("objects", "tmp") for path in (filled[2] / folder).rglob("*")]
    assert not left


def test_a_file_of_another_digest_is_refused_and_leaves_nothing(filled: Store) -> None:
    with pytest.raises(ServerError, match="SHA-256 mismatch"):
        filled[0].assemble(shard(file_rows([(TWO, 5, 0, 1)], digest(b"other"))))
    assert not [*(filled[2] / "objects").iterdir(), *(filled[2] / "tmp").iterdir()]


def test_a_full_disk_is_told_before_it_is_filled(
    filled: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "free", lambda self: 4)
    with pytest.raises(ServerError, match="full"):
        filled[0].assemble(shard(file_rows([(TWO, 5, 0, 1)], None)))


def test_many_xorbs_are_read_with_few_open_files(store: Store) -> None:
    parts = [b"%02d" % number for number in range(40)]
    for part in parts:
        keep(store, named(part), chunk(part))
    content = b"".join(parts)
    segments: Segments = [(named(part), 2, 0, 1) for part in parts]
    store[0].assemble(shard(file_rows(segments, digest(content))))
    assert store[1].path(digest(content)).read_bytes() == content


def test_what_a_killed_endpoint_left_is_swept(filled: Store) -> None:
    ingest, objects, root = filled
    stray, done = root / "xorbs" / NONE, (root / "xorbs" / TWO).read_bytes()
    stray.write_bytes(b"no row names me")
    ingest.assemble(shard(file_rows([(TWO, 5, 0, 1)], None)))
    (root / "xorbs" / TWO).write_bytes(done)
    database = Database(root / "index")
    Ingest(root, database, objects)
    database.close()
    assert [path.name for path in (root / "xorbs").iterdir()] == [ONE]


@pytest.fixture(scope="module")
def cas(endpoint: Endpoint) -> dict[str, str]:
    body = json.dumps({"name": "xet"}).encode()
    auth = {"Authorization": f"Bearer {endpoint.token}"}
    urlopen(Request(f"{endpoint.url}/api/repos/create", body, auth)).close()
    url = f"{endpoint.url}/api/models/local/xet/xet-write-token/main"
    with urlopen(Request(url, headers=auth)) as answer:
        said = json.load(answer)
        assert answer.headers["X-Xet-Cas-Url"] == said["casUrl"]
        assert answer.headers["X-Xet-Access-Token"] == said["accessToken"]
        assert answer.headers["X-Xet-Token-Expiration"] == str(said["exp"])
    return {"path": urlsplit(said["casUrl"]).path, "token": said["accessToken"]}


def post(endpoint: Endpoint, path: str, body: bytes, token: str) -> int:
    connection = HTTPConnection(urlsplit(endpoint.url).netloc)
    connection.request("POST", path, body, {"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def test_uploads_over_http_are_judged_the_same(endpoint: Endpoint, cas: dict[str, str]) -> None:
    xorbs, shards = f"{cas['path']}/v1/xorbs/default", f"{cas['path']}/v1/shards"
    content = os.urandom(1000)
    name = named(content)

    def send(path: str, body: bytes) -> int:
        return post(endpoint, path, body, cas["token"])

    assert send(f"{xorbs}/{name}", b"nonsense") == 400
    assert send(f"{xorbs}/{name}", chunk(content[1:])) == 400
    assert send(f"{xorbs}/..%2F..%2Fhub.sqlite3", chunk(content)) == 400
    assert send(f"{xorbs}/{name}", chunk(content)) == 200
    for lie in BAD_SHARDS.values():
        assert send(shards, lie) == 400
    assert send(shards, shard(file_rows([(name, 1000, 0, 1)], digest(b"other")))) == 400
    assert send(shards, shard(file_rows([(name, 1000, 0, 1)], digest(content)))) == 200


def test_only_a_token_that_we_signed_uploads_and_only_to_this_epoch(
    endpoint: Endpoint, cas: dict[str, str]
) -> None:
    path = f"{cas['path']}/v1/xorbs/default/{ONE}"
    end, _, mac = cas["token"].partition(".")
    for token in ("", "x", endpoint.token, f"{int(end) + 1}.{mac}", f"1.{mac}", f"{end}.{mac}0"):
        assert post(endpoint, path, chunk(b"x"), token) == 401
    other = f"/_cas/{'0' * 16}/v1/xorbs/default/{ONE}"
    assert post(endpoint, other, chunk(b"x"), cas["token"]) == 404
