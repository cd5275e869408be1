"""Kernels of somebody who has to sign: they come with an artifact that was, and with no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import CPU, make_bundle, make_host, rewrite
from huggingface_hub import HfApi
from kernel_repos import SCHEMAS, push_kernel, write_build
from signers import Pair
from test_signatures import push, require_signer

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.manifest import FILENAME, find_oldest_schema
from hubaoti.errors import BadSignature, HubaotiError, Unsigned, Untrusted
from hubaoti.host.probe import Torch
from hubaoti.hub.client import HubClient
from hubaoti.hub.kernels import pin_kernel
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import Pulled, pull_artifact
from hubaoti.mirror import Mirror
from hubaoti.mirror.trust import Trust
from hubaoti.server import Endpoint
from hubaoti.settings import Settings

VERSION = torch.__version__.partition("+")[0]
TARGET = {**CPU, "torch": f"{VERSION}+cpu"}
HOST = make_host(torch=Torch(f"{VERSION}+cpu", None, "b" * 40, Path("/torch")))
MADE_UP = b"\x7fELF" + b"\0".join((b"", b"@namespace@", bytes(200), b"@schema@", bytes(2000)))


@pytest.fixture
def publish(settings: Settings, endpoint: Endpoint, tmp_path: Path) -> Callable[[str], KernelPin]:
    """Push a kernel of made-up code, which nobody runs here, and pin it."""

    def publish(repo: str) -> KernelPin:
        library = tmp_path / "open.so"
        library.write_bytes(MADE_UP)
        folder = tmp_path / repo.replace("/", "~")
        write_build(library, folder, "_attention_cpu", SCHEMAS["flash-attn3"])
        push_kernel(endpoint, repo, folder)
        host = KernelHost(torch.__version__, None, "x86_64_v3", "linux")
        return pin_kernel(HubClient(settings), repo, host)

    return publish


def calling(pin: KernelPin, folder: Path) -> Bundle:
    """A bundle whose graphs call a kernel."""
    bundle = make_bundle(folder, TARGET)
    requires = replace(bundle.manifest.requires, kernels=(pin,))
    schema = find_oldest_schema(bundle.manifest.build, bundle.manifest.graphs, (pin,))
    return rewrite(
        folder, msgspec.structs.replace(bundle.manifest, requires=requires, schema=schema)
    )


def pull(repo: str, settings: Settings) -> Pulled:
    return pull_artifact(RepoRef.parse(repo), settings, HOST)


def refuse(repo: str, settings: Settings, kind: type[HubaotiError], why: str) -> None:
    """That neither the artifact nor its kernel comes."""
    with pytest.raises(kind, match=why):
        pull(repo, settings)
    assert not [*settings.mirror.glob("artifacts/*"), *settings.mirror.glob("kernels/*")]


def test_a_kernel_comes_with_the_artifact_that_its_publisher_signed_and_pinned_it(
    publish: Callable[[str], KernelPin],
    settings: Settings,
    repo: str,
    acme: Pair,
    mallory: Pair,
    tmp_path: Path,
) -> None:
    pin = publish(f"{repo}-kernel")
    bundle = calling(pin, tmp_path / "bundle")
    require_signer(settings, acme)
    push(bundle, repo, settings)
    refuse(repo, settings, Unsigned, "not signed by key")
    push(bundle, repo, settings, mallory)
    refuse(repo, settings, BadSignature, "not signed by key")
    push(bundle, repo, settings, acme)
    pulled = pull(repo, settings)
    with Mirror.open(settings.mirror) as mirror:
        mirror.verify_kernel(pin)
        mirror.require_allowed(pulled.artifact.digest)
    assert pull(repo, settings).from_mirror


def test_who_pins_the_kernel_of_somebody_who_has_to_sign_does_not_sign_for_him(
    publish: Callable[[str], KernelPin],
    settings: Settings,
    repo: str,
    acme: Pair,
    mallory: Pair,
    tmp_path: Path,
) -> None:
    """Neither by a signature of his own nor by his name."""
    pin = publish(f"{repo}-kernel")
    theirs = f"mallory/{tmp_path.name}"
    bundle, trust = calling(pin, tmp_path / "bundle"), Trust(settings.trust)
    require_signer(settings, acme)
    trust.add(settings.endpoint, "mallory")
    for pair in (None, mallory):
        push(bundle, theirs, settings, pair)
        refuse(theirs, settings, Unsigned, f"the kernel {repo}-kernel .*which acme publishes")
    trust.remove(settings.endpoint, "acme")
    refuse(theirs, settings, Untrusted, f"acme publishes the kernel {repo}-kernel")
    trust.add(settings.endpoint, "acme")  # whose name is enough now
    pull(theirs, settings)


def test_a_kernel_of_which_a_byte_differs_is_covered_by_no_signature(
    publish: Callable[[str], KernelPin],
    settings: Settings,
    endpoint: Endpoint,
    repo: str,
    acme: Pair,
    tmp_path: Path,
) -> None:
    """It is pinned in what is signed: to pin other bytes is to sign anew."""
    pin = publish(f"{repo}-kernel")
    bundle = calling(pin, tmp_path / "bundle")
    require_signer(settings, acme)
    made = push(bundle, repo, settings, acme)
    assert pin.build is not None
    library = max(pin.build.files, key=lambda file: file.size)
    content = (bundle.path / FILENAME).read_bytes()
    other = content.replace(library.sha256.encode(), b"0" * 64)
    assert other != content
    HfApi(endpoint.url, token=endpoint.token).upload_file(
        path_or_fileobj=other, path_in_repo=f"{made.path}/{FILENAME}", repo_id=repo
    )
    refuse(repo, settings, BadSignature, "it is of other bytes")
