"""Signatures: who has to sign is heard, and whatever else lies in a repo is never opened."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bundles import CPU, make_bundle, make_host
from commands import inside
from huggingface_hub import HfApi
from proxies import Proxy
from signers import Pair, make_pair

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME, Manifest, parse_manifest
from hubaoti.artifact.statement import FILENAME as STATEMENT
from hubaoti.artifact.statement import LARGEST_SIGNATURE, SIGNATURE, Statement
from hubaoti.errors import (
    BadManifest,
    BadRequest,
    BadSignature,
    HubaotiError,
    MissingDependency,
    NoArtifact,
    Unsigned,
)
from hubaoti.host import extras
from hubaoti.hub import catalog
from hubaoti.hub.kernels import require_kernel_publisher
from hubaoti.hub.keys import read_public_key, read_root
from hubaoti.hub.layout import ArtifactPath, RepoRef, artifact_path
from hubaoti.hub.pull import Pulled, Puller, pull_artifact
from hubaoti.hub.pull_all import find_pulled, pull_fleet, read_revision_catalog
from hubaoti.hub.push import Commit
from hubaoti.hub.signing import Signing, sign, verify
from hubaoti.mirror import Mirror
from hubaoti.mirror.rows import Signed
from hubaoti.mirror.signer import Signer
from hubaoti.mirror.trust import Trust
from hubaoti.settings import Settings

HOST = make_host()
OTHER = {"level": "x86_64_v2"}


@dataclass(frozen=True)
class Authority:
    """A CA's certificate, a key, and the certificate that the CA gave it."""

    root: Path
    key: Path
    chain: Path
    name: str = "release@acme.example"

    @classmethod
    def make(cls, folder: Path) -> Authority:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        now, found = datetime.now(UTC), cls(folder / "ca.pem", folder / "key.pem", folder / "c.pem")
        ca, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "acme's CA")])
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )

        def certify(public: Any, subject: str, name: x509.ExtensionType, is_ca: bool) -> bytes:
            use = x509.KeyUsage(digital_signature=not is_ca, key_cert_sign=is_ca, **usage)
            return (
                x509.CertificateBuilder()
                .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
                .issuer_name(issuer)
                .public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(days=1))
                .not_valid_after(now + timedelta(days=30))
                .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
                .add_extension(use, critical=True)
                .add_extension(name, critical=False)
                .sign(ca, hashes.SHA256())
                .public_bytes(serialization.Encoding.PEM)
            )

        own = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
        names = x509.SubjectAlternativeName([x509.RFC822Name(found.name)])
        found.root.write_bytes(certify(ca.public_key(), "acme's CA", own, True))
        found.chain.write_bytes(certify(key.public_key(), "acme", names, False))
        found.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return found


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def wary(settings: Settings, acme: Pair) -> Settings:
    """A machine that takes only what acme signed."""
    require_signer(settings, acme)
    return settings


def require_signer(settings: Settings, pair: Pair) -> None:
    trust = Trust(settings.trust)
    trust.keys.keep(read_public_key(pair.public))
    trust.add(settings.endpoint, "acme", pair.signer)


def push(bundle: Bundle, repo: str, settings: Settings, pair: Pair | None = None) -> Commit:
    sign = None if pair is None else pair.private
    return api.push(bundle, repo, sign=sign, as_is=True, settings=settings)


def pull(repo: str, settings: Settings, trust: bool = False) -> Pulled:
    return pull_artifact(RepoRef.parse(repo), settings, HOST, trust=trust)


def refuse(repo: str, settings: Settings, kind: type[HubaotiError]) -> str:
    """That nothing is pulled, and why; no graph was fetched."""
    with pytest.raises(kind) as why:
        pull(repo, settings)
    assert why.value.hint
    assert not [*settings.mirror.glob("artifacts/*"), *settings.mirror.glob("graphs/*")]
    return str(why.value)


def read(hub: HfApi, repo: str, place: ArtifactPath, name: str) -> bytes:
    found = hub.hf_hub_download(repo, place.file(name), force_download=True)
    return Path(found).read_bytes()


def write(hub: HfApi, repo: str, place: ArtifactPath, files: dict[str, bytes]) -> None:
    hub.create_repo(repo, exist_ok=True)
    for name, content in files.items():
        hub.upload_file(path_or_fileobj=content, path_in_repo=place.file(name), repo_id=repo)


# The road


def test_what_is_signed_by_whom_it_has_to_be_is_pulled_and_opened_and_asks_nothing_twice(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, proxy: Proxy
) -> None:
    made = push(bundle, repo, wary, acme)
    assert made.artifacts[0].created and made.artifacts[0].signed
    pulled = pull(repo, wary)
    assert pulled.artifact.digest == bundle.manifest.digest
    with Mirror.open(wary.mirror) as mirror:
        mirror.require_allowed(pulled.artifact.digest)
        assert mirror.decide(pulled.artifact.digest).reason.endswith("trusted and signed it")
        (signed,) = mirror.seen.list_signed(pulled.artifact.digest)
    assert (signed.repo, signed.path, signed.signer) == (repo, made.path, str(acme.signer))
    proxy.requests.clear()
    assert pull(repo, wary).from_mirror
    assert len(proxy.requests) == 1  # the revision's commit


@pytest.mark.parametrize("revision", [None, "v1.0.0", "v1"])
def test_who_has_to_sign_costs_two_requests_before_the_download(
    revision: str | None, bundle: Bundle, repo: str, wary: Settings, acme: Pair, proxy: Proxy
) -> None:
    """The commit (of v1 the tags), the list, the manifest; the statement and the signature."""
    api.push(bundle, repo, sign=acme.private, as_is=True, tag="v1.0.0", settings=wary)
    proxy.requests.clear()
    pull_artifact(RepoRef(repo, revision), wary, HOST)
    asked = [path for method, path in proxy.requests]
    before = asked[: next(at for at, path in enumerate(asked) if path.endswith(".pt2"))]
    before = [path for path in before if not path.endswith("golden.safetensors")]
    assert len(before) == 5 and sum(path.endswith((STATEMENT, SIGNATURE)) for path in before) == 2


def lock(repo: str, settings: Settings, path: Path) -> Path:
    """A lockfile of a repo, as a machine wrote it that asks nobody to sign."""
    careless = replace(settings, home=path.parent / "careless")
    api.lock(repo, settings=careless).write(path)
    return path


def test_what_is_locked_is_verified_without_a_list(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, proxy: Proxy, tmp_path: Path
) -> None:
    push(bundle, repo, wary, acme)
    locked = lock(repo, wary, tmp_path / "hubaoti.lock")
    proxy.requests.clear()
    pulled = pull_artifact(RepoRef.parse(repo), wary, HOST, locked=locked)
    assert pulled.artifact.digest == bundle.manifest.digest
    assert not [path for _, path in proxy.requests if "/tree/" in path or "/refs" in path]
    with Mirror.open(wary.mirror) as mirror:
        assert mirror.decide(pulled.artifact.digest).reason.endswith("trusted and signed it")
    proxy.requests.clear()
    assert pull_artifact(RepoRef.parse(repo), wary, HOST, locked=locked).from_mirror
    assert not proxy.requests


@pytest.mark.parametrize("by", [None, "mallory"])
def test_what_is_locked_and_not_signed_by_whom_it_has_to_be_is_refused(
    bundle: Bundle, repo: str, wary: Settings, mallory: Pair, by: str | None, tmp_path: Path
) -> None:
    push(bundle, repo, wary, mallory if by else None)
    locked = lock(repo, wary, tmp_path / "hubaoti.lock")
    with pytest.raises(BadSignature if by else Unsigned):
        pull_artifact(RepoRef.parse(repo), wary, HOST, locked=locked)
    assert not [*wary.mirror.glob("artifacts/*")]
    with pytest.raises(BadSignature if by else Unsigned):
        api.lock(repo, settings=wary)


def test_what_is_named_by_its_digest_is_refused_for_its_signature_and_not_called_missing(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, mallory: Pair, tmp_path: Path
) -> None:
    named = f"{repo}@sha256:{bundle.manifest.digest}"
    other = make_bundle(tmp_path / "other", mode="max-autotune")
    api.push(other, repo, label="other", sign=acme.private, as_is=True, settings=wary)
    push(bundle, repo, wary)
    refuse(named, wary, Unsigned)
    push(bundle, repo, wary, mallory)
    refuse(named, wary, BadSignature)
    assert "holds the artifact" in refuse(f"{repo}@sha256:{'0' * 64}", wary, NoArtifact)


def test_a_digest_is_no_signature(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, tmp_path: Path
) -> None:
    push(bundle, repo, wary)
    named = f"{repo}@sha256:{bundle.manifest.digest}"
    refuse(named, wary, Unsigned)
    careless = replace(wary, home=tmp_path / "careless")
    assert pull(named, careless, trust=True).artifact.digest == bundle.manifest.digest
    push(bundle, repo, wary, acme)
    assert pull(named, wary).artifact.digest == bundle.manifest.digest


def test_who_trusts_a_digest_asks_nobody_to_sign_it(
    bundle: Bundle, repo: str, wary: Settings
) -> None:
    push(bundle, repo, wary)
    named = f"{repo}@sha256:{bundle.manifest.digest}"
    assert not pull(named, wary, trust=True).from_mirror
    assert pull(named, wary).from_mirror


def test_what_nobody_asks_to_be_signed_is_pulled_without_a_look_at_its_signature(
    bundle: Bundle, repo: str, settings: Settings, mallory: Pair, proxy: Proxy
) -> None:
    push(bundle, repo, settings, mallory)
    proxy.requests.clear()
    pull(repo, settings, trust=True)
    assert not [path for _, path in proxy.requests if SIGNATURE in path or STATEMENT in path]


def test_a_signature_says_repo_path_key_program_and_manifest(
    bundle: Bundle, repo: str, settings: Settings, acme: Pair, hub: HfApi
) -> None:
    made = push(bundle, repo, settings, acme)
    statement = json.loads(read(hub, repo, ArtifactPath.parse(made.path), STATEMENT))
    assert statement == {
        "schema": 1,
        "repo": repo,
        "path": made.path,
        "key": bundle.manifest.key,
        "program": bundle.manifest.program.digest,
        "recipe": "float32-sdpa",
        "variant": "torch2.13-cpu-x86_64_v3-linux",
        "manifest": bundle.manifest.digest,
    }


def test_what_is_there_unsigned_gets_its_signature_and_is_not_sent_again(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, hub: HfApi
) -> None:
    first = push(bundle, repo, wary)
    refuse(repo, wary, Unsigned)
    before = {entry.path for entry in hub.list_repo_tree(repo, recursive=True)}
    second = push(bundle, repo, wary, acme)
    assert first.commit != second.commit and not second.created
    assert [(each.created, each.signed) for each in second.artifacts] == [(False, True)]
    place = ArtifactPath.parse(second.path)
    after = {entry.path for entry in hub.list_repo_tree(repo, recursive=True)}
    assert after - before == {place.file(STATEMENT), place.file(SIGNATURE)}
    assert hub.list_repo_commits(repo)[0].title == f"Sign {place}"
    assert pull(repo, wary).artifact.digest == bundle.manifest.digest
    assert push(bundle, repo, wary, acme).commit == second.commit  # and that once


def test_a_signature_by_another_key_gives_way_to_one_s_own(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, mallory: Pair
) -> None:
    push(bundle, repo, wary, mallory)
    assert push(bundle, repo, wary, acme).artifacts[0].signed
    pull(repo, wary)


def test_another_build_takes_the_signature_of_the_one_that_it_replaces_along(
    tmp_path: Path, repo: str, wary: Settings, acme: Pair
) -> None:
    push(make_bundle(tmp_path / "first"), repo, wary, acme)
    push(make_bundle(tmp_path / "second", members={"model/other.so": b"\x7fELF"}), repo, wary)
    assert "not signed by key" in refuse(repo, wary, Unsigned)


def test_of_several_the_ones_that_are_signed_can_be_had(
    tmp_path: Path, repo: str, wary: Settings, acme: Pair
) -> None:
    push(make_bundle(tmp_path / "best"), repo, wary)
    signed = push(make_bundle(tmp_path / "lesser", {**CPU, **OTHER}), repo, wary, acme)
    pulled = pull(repo, wary)
    assert str(pulled.place) == signed.path
    errors = [each.error for each in pulled.considered if each.error]
    assert [type(each) for each in errors] == [Unsigned]


def test_what_is_not_signed_is_called_that_by_every_command(
    tmp_path: Path, repo: str, wary: Settings, acme: Pair, hub: HfApi
) -> None:
    path = push(make_bundle(tmp_path / "bundle"), repo, wary).path
    key = f"not signed by key {acme.signer.key[:12]}, as is asked of acme here"
    explained, pulled = inside(wary, "explain", repo, "-q"), inside(wary, "pull", repo, "-q")
    assert f"refused       {path}: {key}\n" in explained.out
    assert f"is refused:\n  {path}\n    refused: {key}\nhint: ask acme to push" in pulled.err
    assert pulled.code == Unsigned.exit_code and "unreadable" not in explained.out
    found = inside(wary, "search", repo.partition("/")[2], "--fits", "-q").out
    assert f"refused: {key}" in found
    named = lock(repo, wary, tmp_path / "hubaoti.lock")
    locked = inside(wary, "pull", repo, "--lockfile", named, "-q").err
    assert f"error: {path} of {repo} is refused: {key}\n" in locked


def test_what_a_name_is_trusted_for_is_said_with_all_who_may_sign(
    tmp_path: Path, settings: Settings, acme: Pair, mallory: Pair
) -> None:
    first, second = (f"key {each.signer.key}" for each in (acme, mallory))
    said = inside(settings, "trust", "add", "acme", "--key", acme.public).out
    assert said.endswith(f"is trusted for what is signed by {first}\n")
    said = inside(settings, "trust", "add", "acme", "--key", mallory.public).out
    assert f"signed by {second}, or by {first[:16]}, who was named before" in said
    said = inside(settings, "trust", "add", "acme").out
    assert f"still only for what is signed by {first[:16]} or {second[:16]};" in said
    assert "hubaoti trust rm acme first" in said


# Whatever else lies there


@dataclass(frozen=True)
class Scene:
    """What acme signed and pushed, and what whoever writes to the repo has beside it.

    The signed files of an artifact at its path; of another one at another path of the repo; of the
    same one in another repo; of it, by mallory.
    """

    place: ArtifactPath
    files: dict[str, bytes]
    other: dict[str, bytes]
    elsewhere: dict[str, bytes]
    stranger: dict[str, bytes]


@pytest.fixture
def scene(
    bundle: Bundle,
    tmp_path: Path,
    repo: str,
    wary: Settings,
    acme: Pair,
    hub: HfApi,
) -> Scene:
    def ship(bundle: Bundle, repo: str, pair: Pair) -> dict[str, bytes]:
        place = ArtifactPath.parse(push(bundle, repo, wary, pair).path)
        return {name: read(hub, repo, place, name) for name in (FILENAME, STATEMENT, SIGNATURE)}

    other = make_bundle(tmp_path / "other", {**CPU, **OTHER})
    return Scene(
        place=artifact_path(bundle.manifest),
        other=ship(other, f"{repo}-others", acme),
        elsewhere=ship(bundle, f"{repo}-elsewhere", acme),
        stranger=ship(bundle, f"{repo}-strange", make_pair(tmp_path, "mallory")),
        files=ship(bundle, repo, acme),
    )


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def only(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: files[name] for name in names}


def without_hint(scene: Scene) -> dict[str, bytes]:
    """A signature of the older kind, which does not say by which key it is."""
    found = json.loads(scene.files[SIGNATURE])
    del found["verificationMaterial"]["publicKey"]["hint"]
    return {SIGNATURE: json.dumps(found).encode()}


def claims_acme(scene: Scene) -> dict[str, bytes]:
    """Mallory's signature, which says that it is by acme's key."""
    found, acme = json.loads(scene.stranger[SIGNATURE]), json.loads(scene.files[SIGNATURE])
    found["verificationMaterial"] = acme["verificationMaterial"]
    return {STATEMENT: scene.stranger[STATEMENT], SIGNATURE: json.dumps(found).encode()}


SIGNED = (STATEMENT, SIGNATURE)
SWAPS: dict[str, tuple[Callable[[Scene], dict[str, bytes]], str]] = {
    "another artifact's signature": (lambda s: only(s.other, SIGNATURE), "of other bytes"),
    "another artifact's statement": (lambda s: only(s.other, STATEMENT), "of other bytes"),
    "another artifact's both": (lambda s: only(s.other, *SIGNED), "of other bytes"),
    "another artifact, whole": (lambda s: s.other, "describes|signed as something else"),
    "another manifest": (lambda s: only(s.other, FILENAME), "of other bytes"),
    "another repo's": (lambda s: only(s.elsewhere, *SIGNED), "its repo is '.*-elsewhere', not"),
    "by another key": (lambda s: only(s.stranger, *SIGNED), "by the key"),
    "by another key that says it is ours": (claims_acme, "InvalidSignature"),
    "by no key that it names": (without_hint, "not signed by"),
    "a flipped byte of the manifest": (
        lambda s: {FILENAME: flip(s.files[FILENAME], 99)},
        "of other bytes",
    ),
    "a flipped byte of the statement": (
        lambda s: {STATEMENT: flip(s.files[STATEMENT], 99)},
        "of other bytes",
    ),
    "a statement with a space": (lambda s: {STATEMENT: s.files[STATEMENT] + b" "}, "of other"),
    "no JSON": (lambda _: {SIGNATURE: b"nothing of the kind"}, "not signed by"),
    "no object": (lambda _: {SIGNATURE: b"[]"}, "not signed by"),
    "an empty object": (lambda _: {SIGNATURE: b"{}"}, "not signed by"),
    "an empty file": (lambda _: {SIGNATURE: b""}, "not signed by"),
    "no text": (lambda _: {SIGNATURE: bytes(range(256))}, "not signed by"),
    "JSON without an end": (lambda _: {SIGNATURE: b"[" * 50_000}, "not signed by"),
    "a huge one": (lambda _: {SIGNATURE: b" " * (LARGEST_SIGNATURE + 1)}, "at most"),
    "a huge statement": (lambda _: {STATEMENT: b" " * (1 << 20)}, "at most"),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_no_swap_is_taken_and_no_manifest_of_one_is_parsed(
    swap: str, scene: Scene, repo: str, wary: Settings, hub: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = list[bytes]()

    def parse(text: bytes, where: str) -> Manifest:
        parsed.append(text)
        return parse_manifest(text, where)

    make, why = SWAPS[swap]
    write(hub, repo, scene.place, make(scene))
    monkeypatch.setattr(catalog, "parse_manifest", parse)
    kind = BadManifest if swap == "another artifact, whole" else BadSignature
    assert re.search(why, refuse(repo, wary, kind))
    # Of what was signed, all that is left is to see that it was meant for this place.
    assert len(parsed) == (swap in {"another repo's", "another artifact, whole"})


@pytest.mark.parametrize(
    "signed",
    [
        ({FILENAME: b"", STATEMENT: b"", "x": b""}, {FILENAME, STATEMENT}),
        ({FILENAME: b"another", STATEMENT: b"a statement"}, {FILENAME}),
        ({FILENAME: b"a manifest", STATEMENT: b"another"}, {STATEMENT}),
        ({FILENAME: b"a manifest", STATEMENT: b"a statement", "x": b""}, ()),
        ({FILENAME: b"a manifest"}, ()),
    ],
)
def test_a_signature_that_covers_less_or_more_than_the_two_files_is_none(
    signed: tuple[dict[str, bytes], set[str]], acme: Pair, wary: Settings, tmp_path: Path
) -> None:
    """Whoever has the key may have signed a folder with it of which files were left out."""
    from model_signing import hashing
    from model_signing.signing import Config

    files, ignored = signed
    folder, path, keys = tmp_path / "signed", tmp_path / "signature", Trust(wary.trust).keys
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = [folder / name for name in ignored]
    how = hashing.Config().set_ignored_paths(paths=paths, ignore_git_paths=False)
    signer = Config().set_hashing_config(how).use_elliptic_key_signer(private_key=acme.private)
    signer.sign(folder, path)
    with pytest.raises(BadSignature):
        verify(b"a manifest", b"a statement", path.read_bytes(), acme.signer, keys, "acme")


def test_every_byte_that_is_signed_and_of_the_signature_counts(
    bundle: Bundle, acme: Pair, wary: Settings, repo: str
) -> None:
    manifest, keys = bundle.manifest.to_json(), Trust(wary.trust).keys
    statement = Statement.of(repo, "a/b", bundle.manifest).to_json()
    good = json.loads(sign(manifest, statement, Signing.parse(acme.private, None, None)))

    def check(found: dict[str, Any]) -> None:
        verify(manifest, statement, json.dumps(found).encode(), acme.signer, keys, "acme")

    check(good)
    for holder, name in ((lambda each: each, "payload"), (lambda e: e["signatures"][0], "sig")):
        content = base64.b64decode(holder(good["dsseEnvelope"])[name])
        for place in range(0, len(content), 17):
            bad = copy.deepcopy(good)
            holder(bad["dsseEnvelope"])[name] = base64.b64encode(flip(content, place)).decode()
            with pytest.raises(BadSignature):
                check(bad)


def test_a_signed_artifact_is_nothing_at_another_label_of_its_repo(
    scene: Scene, repo: str, wary: Settings, hub: HfApi
) -> None:
    moved = replace(scene.place, recipe=replace(scene.place.recipe, label="fast"))
    write(hub, repo, moved, scene.files)
    with pytest.raises(BadSignature, match="its path is 'float32-sdpa/.*, not .float32-sdpa.fast"):
        pull_artifact(RepoRef(repo), wary, HOST, place=moved)


@pytest.mark.parametrize("name", SIGNED)
def test_without_one_of_its_files_a_signature_is_none(
    name: str, scene: Scene, repo: str, wary: Settings, hub: HfApi
) -> None:
    hub.delete_file(scene.place.file(name), repo)
    assert "not signed by key" in refuse(repo, wary, Unsigned)


@pytest.mark.parametrize("field", ["key", "program", "recipe", "variant", "manifest", "schema"])
def test_what_the_signer_says_has_to_be_so(
    field: str, scene: Scene, repo: str, wary: Settings, hub: HfApi, acme: Pair
) -> None:
    """A signer's own mistake, or one who was had to sign something else."""
    said = json.loads(scene.files[STATEMENT])
    said[field] = 1.5 if field == "schema" else "0" * 64
    statement = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    signing = Signing.parse(acme.private, None, None)
    signature = sign(scene.files[FILENAME], statement, signing)
    write(hub, repo, scene.place, {STATEMENT: statement, SIGNATURE: signature})
    assert "was signed as something else" in refuse(repo, wary, BadSignature)


# What was there before


def test_who_has_to_sign_from_now_on_has_to_for_what_was_pulled_before(
    bundle: Bundle, repo: str, settings: Settings, acme: Pair, proxy: Proxy
) -> None:
    push(bundle, repo, settings)
    pulled = pull(repo, settings, trust=True)
    require_signer(settings, acme)
    with Mirror.open(settings.mirror) as mirror, pytest.raises(Unsigned, match="not signed by key"):
        mirror.require_allowed(pulled.artifact.digest)
    for trust in (False, True):  # --trust names somebody, and takes nothing back
        with pytest.raises(Unsigned):
            pull(repo, settings, trust)
    with pytest.raises(Unsigned, match="not signed by key") as why:
        pull(f"{repo}@{pulled.commit}", replace(settings, offline=True))
    assert "HF_HUB_OFFLINE is set" in why.value.hint
    made = push(bundle, repo, settings, acme)
    proxy.requests.clear()
    assert pull(repo, settings).commit == made.commit
    assert not [path for _, path in proxy.requests if path.endswith((".pt2", ".safetensors"))]
    assert pull(f"{repo}@{made.commit}", replace(settings, offline=True)).from_mirror


def test_another_key_is_asked_for_anew_and_the_first_one_again_is_not(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, mallory: Pair
) -> None:
    push(bundle, repo, wary, acme)
    digest, trust = pull(repo, wary).artifact.digest, Trust(wary.trust)
    with Mirror.open(wary.mirror) as mirror:
        trust.remove(wary.endpoint, "acme")
        trust.add(wary.endpoint, "acme", mallory.signer)
        assert isinstance(mirror.decide(digest).refusal, Unsigned)
        trust.add(wary.endpoint, "acme", acme.signer)  # one of two is enough
        assert mirror.decide(digest).allowed


def test_opening_asks_the_index_alone_and_takes_under_5_ms(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair
) -> None:
    push(bundle, repo, wary, acme)
    digest = pull(repo, wary).artifact.digest
    with Mirror.open(wary.mirror) as mirror:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            mirror.require_allowed(digest)
            times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 5e-3


def test_a_key_that_is_gone_or_was_changed_verifies_nothing(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair
) -> None:
    push(bundle, repo, wary, acme)
    (kept,) = Trust(wary.trust).keys.folder.iterdir()
    kept.write_bytes(kept.read_bytes() + b" ")
    assert "other bytes than its name says" in refuse(repo, wary, HubaotiError)
    kept.unlink()
    assert "cannot be read" in refuse(repo, wary, HubaotiError)


def test_a_kernel_of_whom_who_has_to_sign_is_taken_with_the_artifact_that_they_signed(
    wary: Settings, acme: Pair, mallory: Pair
) -> None:
    """It pins the kernel's bytes; a repo of a kernel, or of packages alone, has no signature."""
    trust, kernel = Trust(wary.trust), (wary.endpoint, "acme/attention", "commit x")
    for signed in ((), (Signed(wary.endpoint, "acme/x", "path", str(mallory.signer)),)):
        with pytest.raises(Unsigned, match="the kernel acme/attention"):
            require_kernel_publisher(trust, *kernel, signed)
    signed = (Signed(wary.endpoint, "acme/x", "path", str(acme.signer)),)
    require_kernel_publisher(trust, *kernel, signed)


def test_what_a_space_pulls_has_to_be_signed_as_well(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair
) -> None:
    with Mirror.open(wary.mirror) as mirror:
        puller, ref = Puller(mirror, wary, HOST), RepoRef(repo)
        for pair, wanted in ((None, ()), (acme, (acme.signer,))):
            push(bundle, repo, wary, pair)
            catalog = read_revision_catalog(puller, ref)
            assert (*catalog.signers.values(),) == wanted
            if pair is None:
                with pytest.raises(Unsigned):
                    pull_fleet(puller, ref, [catalog], frozenset({"cpu"}))
        (offer,) = pull_fleet(puller, ref, [catalog], frozenset({"cpu"}))
        mirror.require_allowed(offer.artifact.digest)
        offline = replace(puller, settings=replace(wary, offline=True))
        assert find_pulled(offline, ref) == (offer,)
        Trust(wary.trust).remove(wary.endpoint, "acme")
        Trust(wary.trust).add(wary.endpoint, "acme", Signer(key="0" * 64))
        with pytest.raises(Unsigned):
            find_pulled(offline, ref)


# Identities


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA, and a key with a certificate of it."""
    return Authority.make(tmp_path_factory.mktemp("authority"))


def test_an_identity_signs_with_a_certificate_and_nobody_else_s_is_taken(
    bundle: Bundle, repo: str, settings: Settings, authority: Authority, tmp_path: Path
) -> None:
    trust = Trust(settings.trust)
    root = trust.keys.keep(read_root(authority.root))
    api.push(
        bundle,
        repo,
        sign=authority.key,
        certificates=authority.chain,
        as_is=True,
        settings=settings,
    )
    trust.add(settings.endpoint, "acme", Signer(identity="ci@acme.example", root=root))
    assert "by a certificate of release@acme.example" in refuse(repo, settings, BadSignature)
    stranger = Authority.make(tmp_path)
    other = trust.keys.keep(read_root(stranger.root))
    trust.remove(settings.endpoint, "acme")
    trust.add(settings.endpoint, "acme", Signer(identity=authority.name, root=other))
    assert "certificate" in refuse(repo, settings, BadSignature)
    trust.add(settings.endpoint, "acme", Signer(identity=authority.name, root=root))
    assert pull(repo, settings).artifact.digest == bundle.manifest.digest


def make_trust_config() -> bytes:
    """The roots of sigstore's public instance, as its package has them."""
    import sigstore

    store = Path(sigstore.__file__).parent / "_store"
    (folder,) = store.glob("*tuf-repo-cdn.sigstore.dev")
    config = {
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": json.loads((folder / "trusted_root.json").read_text()),
        "signingConfig": json.loads((folder / "signing_config.v0.2.json").read_text()),
    }
    return json.dumps(config).encode()


def test_sigstore_s_own_verifier_takes_no_signature_by_a_key_or_another_certificate(
    bundle: Bundle, repo: str, settings: Settings, acme: Pair, authority: Authority
) -> None:
    """Without its services nothing can be signed by it here: what is seen is what it refuses."""
    trust, login = Trust(settings.trust), "https://login.example"
    root = trust.keys.keep(make_trust_config())
    trust.add(settings.endpoint, "acme", Signer(identity=authority.name, issuer=login, root=root))
    push(bundle, repo, settings, acme)
    words = "not signed by identity release@acme.example of https://login.example by root"
    assert words in refuse(repo, settings, BadSignature)
    keys = {"sign": authority.key, "certificates": authority.chain}
    api.push(bundle, repo, **keys, as_is=True, settings=settings)
    assert words in refuse(repo, settings, BadSignature)


def test_a_root_that_verifies_nothing_is_not_the_publisher_s_fault(
    bundle: Bundle, repo: str, settings: Settings, acme: Pair
) -> None:
    push(bundle, repo, settings, acme)
    trust = Trust(settings.trust)
    root = trust.keys.keep(b"{}")
    for issuer in ("https://login.example", None):
        trust.remove(settings.endpoint, "acme")
        trust.add(settings.endpoint, "acme", Signer(identity="ci", issuer=issuer, root=root))
        assert "cannot be verified here" in refuse(repo, settings, HubaotiError)


# On the command line


def test_a_key_is_made_and_told_and_asked_for_by_commands(
    bundle: Bundle, repo: str, settings: Settings, tmp_path: Path
) -> None:
    private, public = tmp_path / "fleet.pem", tmp_path / "fleet.pub"
    done = inside(settings, "trust", "keygen", tmp_path / "fleet")
    sha256 = hashlib.sha256(public.read_bytes()).hexdigest()
    assert done.code == 0 and f"its sha256 is {sha256}" in done.out
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert inside(settings, "trust", "keygen", private).code == 27  # nothing is written over
    assert inside(settings, "trust", "add", "acme", "--key", public).code == 0
    assert f"signed by key {sha256}" in inside(settings, "trust", "ls").out
    assert inside(settings, "push", bundle.path, repo, "--as-is").code == 0
    refused = inside(settings, "pull", repo, "--path", artifact_path(bundle.manifest), "--trust")
    assert refused.code == 47 and "--sign" in refused.err
    done = inside(settings, "push", bundle.path, repo, "--as-is", "--sign", private)
    assert "was there already, signed now" in done.out
    assert "(its signature)" in done.err and "0 B" not in done.err
    words = ("pull", repo, "--path", artifact_path(bundle.manifest))
    assert inside(settings, *words).code == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--key", "{private}"], "no public key in PEM"),
        (["--key", "{nothing}"], "cannot be read"),
        (["--root", "{public}", "--identity", "me"], "no certificate in PEM"),
        (["--identity", "me"], "an identity needs an issuer or a root"),
        (["--key", "{public}", "--issuer", "https://x.example"], "a key needs no identity"),
    ],
)
def test_who_cannot_sign_is_not_asked_to(
    words: list[str], why: str, settings: Settings, acme: Pair, tmp_path: Path
) -> None:
    paths = {"private": acme.private, "public": acme.public, "nothing": tmp_path / "none"}
    done = inside(settings, "trust", "add", "acme", *(word.format(**paths) for word in words))
    assert done.code == 2 and why in done.err
    assert not Trust(settings.trust).read().publishers


def test_what_signs_nothing_is_said_before_anything_is_sent(
    bundle: Bundle, repo: str, settings: Settings, acme: Pair, proxy: Proxy
) -> None:
    for words in (
        ("--sign", acme.public),
        ("--sign", bundle.path / FILENAME),
        ("--sign", acme.private, "--trust-config", "x"),
        ("--sign", "sigstore", "--certificates", "x"),
    ):
        assert inside(settings, "push", bundle.path, repo, "--as-is", *words).code == 2
    assert proxy.requests == []


@pytest.mark.parametrize("option", ["certificates", "trust_config"])
def test_what_is_given_beside_a_key_is_read_within_bounds(
    option: str, acme: Pair, tmp_path: Path
) -> None:
    """The libraries that sign would read all of it."""
    named = {"certificates": None, "trust_config": None}
    key = acme.private if option == "certificates" else "sigstore"
    large, pipe, other = tmp_path / "large", tmp_path / "pipe", tmp_path / "other"
    large.write_bytes(b"{-----BEGIN CERTIFICATE-----")
    os.truncate(large, (1 << 20) + 1)
    os.mkfifo(pipe)
    other.write_text("neither")
    for path, problem in (
        (large, "cannot be read: it is larger than 1 MiB"),
        (pipe, "cannot be read: it is a pipe or a device"),
        (tmp_path / "none", "cannot be read: No such file"),
        (other, "no certificate in PEM, and no trust configuration"),
    ):
        with pytest.raises(BadRequest, match=problem) as caught:
            Signing.parse(key, **{**named, option: path})
        assert "keygen" not in caught.value.hint


def test_without_the_extra_it_is_named(
    bundle: Bundle, repo: str, wary: Settings, acme: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle, repo, wary, acme)
    version = extras.package_version
    monkeypatch.setattr(
        extras, "package_version", lambda name: None if name == "model-signing" else version(name)
    )
    for act in (lambda: push(bundle, repo, wary, acme), lambda: pull(repo, wary)):
        with pytest.raises(MissingDependency, match="needs model-signing") as why:
            act()
        assert why.value.hint == extras.format_install("sign")
