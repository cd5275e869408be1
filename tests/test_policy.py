"""May it run here? Every row of what can be known of an artifact, and what was said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from bundles import make_bundle, put_trusted, write_manifest
from transformers import AutoModelForCausalLM

import hubaoti
from hubaoti import api
from hubaoti.api.finding import find_built
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import pack_folder, unpack_all
from hubaoti.errors import Blocked, NotBuiltHere, Unsigned, Untrusted
from hubaoti.mirror import Artifact, Mirror, PullOrigin
from hubaoti.mirror.policy import Evidence, decide
from hubaoti.mirror.rows import Pin, Signed
from hubaoti.mirror.signer import Signer
from hubaoti.mirror.trust import Named, Publisher, TrustList
from hubaoti.settings import Settings

HUB, DIGEST, DAY = "https://huggingface.co", "3f" * 32, date(2026, 1, 31)
ACME, MALLORY = Publisher(HUB, "acme", DAY), Publisher(HUB, "mallory", DAY)
SAID = TrustList(publishers=(ACME,))
BLOCKS = {"nothing": (), "the artifact": (Named(DIGEST, DAY),), "acme": (ACME,), "eve": (MALLORY,)}
ORIGINS = {
    "nobody": (),
    "acme": ("acme/x",),
    "mallory": ("mallory/x",),
    "mallory, then acme": ("mallory/x", "acme/x"),
    "acme, then mallory": ("acme/x", "mallory/y"),
}
ROWS = [*itertools.product((False, True), ORIGINS, (False, True), BLOCKS)]


def is_blocked(published: str, block: str) -> bool:
    """Whether the artifact is, or somebody who ever published it."""
    whose = {"acme": "acme", "eve": "mallory"}.get(block)
    return block == "the artifact" or (whose is not None and whose in published)


def origins(name: str) -> tuple[PullOrigin, ...]:
    return tuple(PullOrigin(HUB, repo, "c" * 40, "path") for repo in ORIGINS[name])


@pytest.mark.parametrize(("built", "published", "is_named", "block"), ROWS)
def test_every_row(built: bool, published: str, is_named: bool, block: str) -> None:
    said = TrustList(
        publishers=SAID.publishers,
        artifacts=(Named(DIGEST, DAY),) if is_named else (),
        blocked=BLOCKS[block],
    )
    decision = decide(Evidence(DIGEST, built, origins(published)), said)
    if is_blocked(published, block):
        assert isinstance(decision.refusal, Blocked) and "trust rm" in decision.refusal.hint
        return
    assert decision.allowed == (built or is_named or "acme" in published)
    assert decision.reason
    if not decision.allowed:
        assert isinstance(decision.refusal, Untrusted) and "trust add" in decision.refusal.hint


# Whether acme has to sign, and whose signatures of it were verified, as whose.
KEY, OLD, EVIL = (Signer(key=digit * 64) for digit in "abc")
WHO = Signer(identity="release@acme.example", root="d" * 64)
ASKED: dict[str, tuple[Signer | None, ...]] = {
    "nobody": (None,),
    "a key": (KEY,),
    "one of two": (OLD, KEY),
    "an identity": (WHO,),
}
SIGNED = {
    "nobody": (),
    "that key": (("acme/x", KEY),),
    "another key": (("acme/x", EVIL),),
    "that key, of somebody else's": (("mallory/x", KEY),),
    "that identity": (("acme/x", WHO),),
    "that name, by another root": (("acme/x", replace(WHO, root="e" * 64)),),
}
FITS = {
    *{("nobody", signed) for signed in SIGNED},
    ("a key", "that key"),
    ("one of two", "that key"),
    ("an identity", "that identity"),
}
SIGNED_ROWS = [*itertools.product(ASKED, SIGNED, ORIGINS, BLOCKS)]


@pytest.mark.parametrize(("asked", "signed", "published", "block"), SIGNED_ROWS)
def test_every_row_of_signatures(asked: str, signed: str, published: str, block: str) -> None:
    found = tuple(Signed(HUB, repo, "path", str(signer)) for repo, signer in SIGNED[signed])
    by_acme = "acme" in published and (asked, signed) in FITS
    for built, is_named in itertools.product((False, True), (False, True)):
        said = TrustList(
            publishers=tuple(replace(ACME, signer=signer) for signer in ASKED[asked]),
            artifacts=(Named(DIGEST, DAY),) if is_named else (),
            blocked=BLOCKS[block],
        )
        decision = decide(Evidence(DIGEST, built, origins(published), found), said)
        if is_blocked(published, block):
            assert isinstance(decision.refusal, Blocked), "whatever anybody signed"
            continue
        assert decision.allowed == (built or is_named or by_acme)
        if not decision.allowed and "acme" in published:
            assert isinstance(decision.refusal, Unsigned) and "--sign" in decision.refusal.hint
            assert ASKED[asked][0].describe() in str(decision.refusal)


@pytest.mark.parametrize(
    ("endpoint", "owner"), [("http://127.0.0.1:1", "acme"), (HUB, "Acme"), (HUB, "acme2")]
)
def test_a_name_is_one_at_its_endpoint(endpoint: str, owner: str) -> None:
    origin = PullOrigin(endpoint, f"{owner}/x", "c" * 40, "path")
    assert not decide(Evidence(DIGEST, origins=(origin,)), SAID).allowed


@pytest.mark.parametrize("named", ["Acme", "acme", "ACME"])
def test_who_is_blocked_is_so_in_whichever_letters(named: str) -> None:
    said = replace(SAID, blocked=(Publisher(HUB, named, DAY),))
    decision = decide(Evidence(DIGEST, origins=origins("acme")), said)
    assert isinstance(decision.refusal, Blocked)


# What the mirror knows


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")


def test_the_first_place_it_came_from_hides_no_other(tmp_path: Path, settings: Settings) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        first = PullOrigin(settings.endpoint, "mallory/x", "a" * 40, "path")
        artifact = mirror.put(bundle.manifest, files, first)
        mirror.trust.add(settings.endpoint, "acme")
        with pytest.raises(Untrusted, match="published by mallory"):
            mirror.require_allowed(artifact.digest)
        pin = Pin(settings.endpoint, "acme/x", "b" * 40, "", "host")
        mirror.index.record_pull(pin, artifact.digest, "path")
        mirror.require_allowed(artifact.digest)
        assert [each.repo for each in mirror.index.list_origins(artifact.digest)] == [
            "mallory/x",
            "acme/x",
        ]
        mirror.index.remove(artifact.digest)  # and what is known outlives its copy
        assert len(mirror.index.list_origins(artifact.digest)) == 2
        mirror.trust.remove(settings.endpoint, "acme")
        with pytest.raises(Untrusted, match="mallory at .* and acme at .*, who are not"):
            mirror.require_allowed(artifact.digest)


def pulled(bundle: Bundle, settings: Settings) -> Artifact:
    """A bundle in the mirror, as it was pulled from somebody who is trusted no more."""
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    with Mirror.open(settings.mirror) as mirror:
        origin = PullOrigin(settings.endpoint, "mallory/x", "a" * 40, "path")
        return mirror.put(bundle.manifest, files, origin)


def test_whose_publisher_is_trusted_no_more_is_opened_by_no_door(
    settings: Settings,
    tiny_roberta: Path,
    roberta_bundle: Bundle,
    tiny_decoder: Path,
    decoder_bundle: Bundle,
) -> None:
    whole, blocks = pulled(roberta_bundle, settings), pulled(decoder_bundle, settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    engine = hubaoti.LightweightEngine(settings=settings)
    apart = hubaoti.LightweightEngine(settings=settings, isolate=True)
    doors: list[Callable[[], object]] = [
        lambda: hubaoti.attach(model, blocks, settings=settings),
        lambda: hubaoti.attach(model, decoder_bundle, settings=settings),
        lambda: hubaoti.load(whole, tiny_roberta, settings=settings),
        lambda: hubaoti.load(roberta_bundle, tiny_roberta, settings=settings),
        lambda: engine.load(str(tiny_decoder), artifact=blocks),
        lambda: apart.load(str(tiny_decoder), artifact=blocks),
    ]
    with engine, apart:
        for door in doors:
            with pytest.raises(Untrusted, match="published by mallory"):
                door()
    for found in hubaoti.api.verify(opens=True, settings=settings):
        assert isinstance(found.error, Untrusted) and found.graphs == ()


def test_a_folder_that_somebody_left_is_opened_when_that_is_said_and_not_when_it_is_blocked(
    tmp_path: Path, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(Untrusted, match="not built on this machine") as why:
        api.get_artifact(bundle.path, False, settings, print)
    assert bundle.manifest.digest in why.value.hint
    api.get_artifact(bundle.path, True, settings, print)
    api.get_artifact(bundle, False, settings, print)  # said once
    with Mirror.open(settings.mirror) as mirror:
        mirror.trust.block_artifact(bundle.manifest.digest)
    for trust in (True, False):
        with pytest.raises(Blocked, match="blocked on this machine"):
            api.get_artifact(bundle, trust, settings, print)


def test_what_this_machine_built_is_not_opened_either_where_it_is_blocked(
    tmp_path: Path, settings: Settings
) -> None:
    with Mirror.open(settings.mirror) as mirror:
        artifact = put_trusted(make_bundle(tmp_path / "bundle"), mirror)
        mirror.index.record_built(artifact.manifest)
        mirror.trust.block_artifact(artifact.digest)
        with pytest.raises(Blocked):
            mirror.require_allowed(artifact.digest)


def test_a_bundle_that_others_planted_is_not_found_by_its_key(
    tmp_path: Path, settings: Settings
) -> None:
    """The key is public, and a shared folder is anybody's."""
    bundle, said = make_bundle(tmp_path / "bundle"), list[str]()
    key = bundle.manifest.key
    with Mirror.open(settings.mirror) as mirror:
        assert find_built(key, bundle.path, mirror, said.append) is None
        assert "it is not taken" in said[0]
        mirror.index.record_built(bundle.manifest)
        assert find_built(key, bundle.path, mirror, said.append) == bundle
        assert said[1].endswith("built here")


def packed(folder: Path) -> Bundle:
    """A bundle whose package the mirror can make again, as it can of those that are compiled."""
    package = make_bundle(folder).path / "graphs/root.pt2"
    unpack_all(package, folder.with_name("unpacked"))
    package.unlink()
    pack_folder(folder.with_name("unpacked"), package)
    return write_manifest(folder)


def test_a_key_that_somebody_claims_who_is_not_trusted_is_not_found_in_the_mirror(
    tmp_path: Path, settings: Settings
) -> None:
    """Nor is it one's own build where he is: what he made is not published under one's own name."""
    bundle, said = packed(tmp_path / "bundle"), list[str]()
    key, output = bundle.manifest.key, tmp_path / "output"
    pulled(bundle, settings)
    with Mirror.open(settings.mirror) as mirror:
        assert find_built(key, output, mirror, said.append) is None
        assert not output.exists() and not said
        mirror.trust.add(settings.endpoint, "mallory")
        found = find_built(key, output, mirror, said.append)
    assert found is not None and said[0].endswith("published by mallory, who is trusted")
    with pytest.raises(NotBuiltHere, match="mallory published it"):
        hubaoti.push(found, "acme/x", settings=settings)


def test_what_was_not_built_here_is_published_only_as_it_is(
    tmp_path: Path, settings: Settings
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with Mirror.open(settings.mirror) as mirror:
        pin = Pin(settings.endpoint, "mallory/x", "b" * 40, "", "host")
        mirror.index.record_pull(pin, bundle.manifest.digest, "path")
    with pytest.raises(NotBuiltHere, match="mallory published it") as why:
        hubaoti.push(bundle, "acme/x", settings=settings)
    assert "--as-is" in why.value.hint
