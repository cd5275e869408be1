"""A pull that is disturbed at a step: it goes on, or is refused by name and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bundles import MEMBERS, make_bundle, make_host, tree_of
from huggingface_hub import HfApi
from proxies import Proxy

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import HubUnreachable, RolledBack
from hubaoti.hub.choice import Pulled
from hubaoti.hub.keys import make_key_pair, read_public_key
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.mirror import Mirror
from hubaoti.mirror.signer import Signer
from hubaoti.mirror.trust import Trust
from hubaoti.progress import Progress, report_nothing
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

MIB = 1 << 20
LARGE = {"model/weights.bin": os.urandom(5 * MIB)}
HOST = make_host()


@pytest.fixture
def hub(endpoint: Endpoint) -> HfApi:
    """The publisher's own client."""
    return HfApi(endpoint.url, token=endpoint.token)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", members={**MEMBERS, **LARGE})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sleeps between one attempt and the next."""
    monkeypatch.setattr("time.sleep", lambda _: None)


def push(bundle: Bundle, repo: str, settings: Settings, **how: object) -> str:
    return api.push(bundle, repo, as_is=True, settings=settings, **how).commit  # type: ignore[arg-type]


def pull(ref: str, settings: Settings, progress: Progress = report_nothing) -> Pulled:
    return pull_artifact(RepoRef.parse(ref), settings, HOST, trust=True, progress=progress)


def list_left(settings: Settings) -> list[str]:
    """What lies in the mirror beside its index and the transport's folder."""
    names = tree_of(settings.mirror)
    return [name for name in names if not name.startswith(("index.sqlite3", "hub/", "locks/"))]


# Cut


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_download_that_is_cut_at_each_mib_goes_on_where_it_was(
    after: int, bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, impatient: None
) -> None:
    push(bundle, repo, settings)
    size = bundle.manifest.graphs[0].size
    proxy.reset()
    proxy.matching, proxy.cut_after = ".pt2", after * MIB
    pulled = pull(repo, settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(pulled.artifact)
    gets = sum(method == "GET" and ".pt2" in path for method, path in proxy.requests)
    assert gets == -(-size // (after * MIB))
    assert size <= proxy.sent < size + gets * (MIB // 8)


def test_a_download_that_is_cut_within_a_mib_brings_little_twice(
    bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, impatient: None
) -> None:
    push(bundle, repo, settings)
    size = bundle.manifest.graphs[0].size
    proxy.matching, proxy.cut_after = ".pt2", 2 * MIB + MIB // 2
    pulled = pull(repo, settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify(pulled.artifact)
    assert size < proxy.sent < size + 2 * MIB


# Moved in between


@pytest.mark.parametrize("step", ["reading the manifests", "downloading", "unpacking"])
def test_a_tag_that_moves_while_it_is_pulled_is_what_it_was_when_it_was_asked_for(
    step: str, bundle: Bundle, tmp_path: Path, repo: str, settings: Settings, hub: HfApi
) -> None:
    first = push(bundle, repo, settings, tag="v1.0.0")
    other = make_bundle(tmp_path / "other", members={**MEMBERS, "model/evil.bin": b"evil"})
    second, heard = push(other, repo, settings, replace=True), []

    def move_tag(message: str) -> None:
        if message.startswith(step) and not heard:
            heard.append(message)
            hub.delete_tag(repo, tag="v1.0.0")
            hub.create_tag(repo, tag="v1.0.0", revision=second)

    pulled = pull(f"{repo}@v1.0.0", settings, move_tag)
    assert heard and pulled.commit == first != second
    assert pulled.artifact.digest == bundle.manifest.digest
    with pytest.raises(RolledBack, match=f"{first}.*{second}"):
        pull(f"{repo}@v1.0.0", settings)


# Status 500

STEPS = {
    "the commit": "/revision/",
    "the versions": "/refs",
    "the list": "/tree/",
    "the manifest": "/hubaoti.json",
    "the signature": "/hubaoti.json.sigstore",
    "the statement": "/statement.json",
    "a file": "/golden.safetensors",
    "a package": ".pt2",
}


@pytest.mark.parametrize("step", STEPS)
def test_an_endpoint_that_fails_at_a_step_is_said_and_leaves_nothing_half_written(
    step: str, bundle: Bundle, repo: str, settings: Settings, proxy: Proxy, impatient: None
) -> None:
    private = bundle.path.parent / "acme.pem"
    public, digest = make_key_pair(private)
    trust = Trust(settings.trust)
    trust.keys.keep(read_public_key(public))
    trust.add(settings.endpoint, "acme", Signer(key=digest))
    push(bundle, repo, settings, tag="v1.0.0", sign=private)
    ref = f"{repo}@v1" if step == "the versions" else f"{repo}@main"
    proxy.matching, proxy.status = STEPS[step], 500
    with pytest.raises(HubUnreachable, match="500") as why:
        pull(ref, settings)
    assert why.value.exit_code == 17 and why.value.hint
    assert any(proxy.matching in path for _, path in proxy.requests)
    assert list_left(settings) == []
    assert not [*settings.mirror.rglob("*.incomplete")]
    proxy.reset()
    assert pull(ref, settings).artifact.digest == bundle.manifest.digest
