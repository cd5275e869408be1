"""A repo's card: what it holds, who says to have signed it, calls that work; nothing injected."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import pytest
from bundles import CPU, CUDA, changed, make_bundle
from huggingface_hub import HfApi, ModelCard
from signers import Pair
from test_signatures import Authority

from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import Program, compute_key
from hubaoti.artifact.statement import SIGNATURE
from hubaoti.cli import group
from hubaoti.cli.compile import _print_checks
from hubaoti.hub.card import render
from hubaoti.hub.layout import ArtifactPath, artifact_path
from hubaoti.hub.signing import UNREADABLE, read_claim
from hubaoti.settings import Settings


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def make_with_task(folder: Path, task: str) -> Manifest:
    """The manifest of a bundle of another task."""
    found = make_bundle(folder).manifest
    program = Program(config={"hidden": 8}, code="a" * 64, task=task)  # type: ignore[arg-type]
    key = compute_key(program, found.build, found.target)
    return changed(Bundle(folder, found), program=program, key=key).manifest


def render_all(*manifests: Manifest, repo: str = "acme/x", **signers: str) -> str:
    there = {artifact_path(each): each for each in manifests}
    claims = {place: signers["signer"] for place in there if signers}
    return render(repo, "", there, manifests[-1], signers=claims)


def read_card(hub: HfApi, repo: str) -> str:
    return Path(hub.hf_hub_download(repo, "README.md", force_download=True)).read_text()


def list_signers(card: str) -> list[str]:
    """The cells of the table that say who signed."""
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| `")]
    return [row[5] for row in rows]


def test_the_largest_error_is_the_one_that_compile_prints(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [
        msgspec.structs.replace(bundle.manifest.checks[0], max_relative=each, **more)
        for each, more in ((2e-6, {}), (3e-4, {"where": "interpreted"}))
    ]
    manifest = changed(bundle, checks=tuple(checks)).manifest
    _print_checks(manifest)
    assert "against eager, largest relative error 2.0e-06\n" in capsys.readouterr().out
    assert "| packed | largest relative error" in render_all(manifest)
    assert "| 2.0e-06 |" in render_all(manifest)


# Who signed


def test_the_table_says_by_which_key_each_artifact_is_signed(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, hub: HfApi, acme: Pair
) -> None:
    said = f"`key {str(acme.signer.key)[:12]}`"
    api.push(bundle, repo, as_is=True, settings=settings)
    assert list_signers(read_card(hub, repo)) == ["nobody"]
    assert "nobody verified it" not in read_card(hub, repo)
    api.push(bundle, repo, as_is=True, sign=acme.private, settings=settings)
    assert list_signers(read_card(hub, repo)) == [said]
    other = make_bundle(tmp_path / "cuda", target=CUDA)
    api.push(other, repo, as_is=True, settings=settings)
    assert list_signers(read_card(hub, repo)) == [said, "nobody"]
    assert "nobody verified it" in read_card(hub, repo)


def test_the_signature_of_what_is_replaced_is_said_no_more(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, hub: HfApi, acme: Pair
) -> None:
    api.push(bundle, repo, as_is=True, sign=acme.private, settings=settings)
    other = make_bundle(tmp_path / "other", mode="max-autotune")
    api.push(other, repo, as_is=True, replace=True, settings=settings)
    assert list_signers(read_card(hub, repo)) == ["nobody"]


def test_an_identity_is_said_as_its_certificate_has_it(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, hub: HfApi
) -> None:
    ca = Authority.make(tmp_path)
    signed = {"sign": ca.key, "certificates": ca.chain}
    api.push(bundle, repo, as_is=True, settings=settings, **signed)
    assert list_signers(read_card(hub, repo)) == [f"`{ca.name}`"]


def claim(**material: object) -> bytes:
    return json.dumps({"verificationMaterial": material}).encode()


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        claim(),
        claim(publicKey={"hint": "`|`"}),
        claim(publicKey={"hint": "a" * 63}),
        claim(publicKey={"hint": 1}),
        claim(certificate={"rawBytes": "AAAA"}),
        claim(x509CertificateChain={"certificates": []}),
    ],
)
def test_a_signature_that_is_none_is_of_nobody(signature: bytes) -> None:
    assert read_claim(signature) == UNREADABLE


def test_a_signature_that_is_none_keeps_nobody_from_pushing(
    tmp_path: Path, bundle: Bundle, repo: str, settings: Settings, hub: HfApi
) -> None:
    made = api.push(bundle, repo, as_is=True, settings=settings)
    for content, said in ((b"x", UNREADABLE), (b"x" * (65 << 10), UNREADABLE)):
        where = f"{made.path}/{SIGNATURE}"
        hub.upload_file(path_or_fileobj=content, path_in_repo=where, repo_id=repo)
        other = make_bundle(tmp_path / f"{len(content)}", target={**CPU, "torch": "2.11.0+cpu"})
        api.push(other, repo, as_is=True, replace=True, settings=settings)
        assert f"`{said}`" in list_signers(read_card(hub, repo))
        hub.delete_file(f"{other.manifest.recipe}/{other.manifest.variant}/hubaoti.json", repo)


@pytest.mark.parametrize(
    "name",
    [
        "a | b",
        "`code` <script>alert(1)</script>",
        "[x](javascript:1)",
        "a\n# Title\n---\ntags: [x]",
        "<!-- hubaoti: end -->",
        "x" * 10_000,
        "\x1b[31m\u202e{{ repo }}",
    ],
)
def test_a_hostile_name_injects_nothing(name: str, bundle: Bundle) -> None:
    honest = render_all(bundle.manifest, signer="acme")
    hostile = render_all(bundle.manifest, signer=name)
    differ = [
        (one, other)
        for one, other in zip(honest.splitlines(), hostile.splitlines(), strict=True)
        if one != other
    ]
    ((row, cell),) = differ
    head, tail = row.split("`acme`")
    assert cell.startswith(head) and cell.endswith(tail)
    assert re.fullmatch(r"`[A-Za-z0-9@._:/+ ?-]{1,80}`", cell[len(head) : -len(tail)])


# What it says


def find_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("task", ["embed", "generate", "forward"])
def test_what_a_card_says_can_be_typed(task: str, tmp_path: Path) -> None:
    card = render_all(make_with_task(tmp_path / task, task))
    commands = [line for block in find_blocks(card, "bash") for line in block.splitlines()]
    ours = [shlex.split(line, comments=True) for line in commands if line.startswith("hubaoti ")]
    assert len(ours) >= 3
    for _, name, *words in ours:
        with click.Context(group) as context:
            command = group.get_command(context, name)
            assert command is not None
            command.make_context(name, words)
    for block in find_blocks(card, "python"):
        compile(block, "card", "exec")
    python = "\n".join(find_blocks(card, "python"))
    assert ("hubaoti.load(" in python) == (task == "embed")
    assert ("hubaoti.attach(" in python) == ("hubaoti.spaces.load(" in python) == (task != "embed")
    assert ("--prompt" in card) == (task == "generate")


def test_it_names_every_program_and_pins_every_artifact(tmp_path: Path, bundle: Bundle) -> None:
    other = make_with_task(tmp_path / "other", "generate")
    there = {
        artifact_path(bundle.manifest): bundle.manifest,
        artifact_path(other, "decode"): other,
    }
    card = render("acme/x", "", there, other)
    for each in (bundle.manifest, other):
        assert f"`{each.program.tag}` (task `{each.program.task}`)" in card
        assert f"hubaoti pull acme/x@sha256:{each.digest}" in card
    assert "hubaoti search --program acme/tiny --task generate" in card
    assert {bundle.manifest.program.tag, other.program.tag} <= {*ModelCard(card).data.tags}


def test_kernels_that_graphs_call_are_named_with_their_commits(bundle: Bundle) -> None:
    assert "call these kernels" not in render_all(bundle.manifest)
    pin = KernelPin("kernels-community/flash-attn3", "c" * 40)
    requires = replace(bundle.manifest.requires, kernels=(pin,))
    card = render_all(changed(bundle, requires=requires).manifest)
    assert f"pinned by the bytes of one build: `kernels-community/flash-attn3@{'c' * 40}`." in card


def test_a_branch_is_named_where_the_card_is_a_branch_s(tmp_path: Path) -> None:
    card = render_all(make_with_task(tmp_path / "x", "forward"), repo="acme/x@zerogpu/a/b")
    assert 'hubaoti.spaces.load(module, "acme/x", revision="zerogpu/a/b")' in card
    assert "hubaoti pull acme/x@zerogpu/a/b" in card and "acme/x@sha256:" in card


def test_it_is_rendered_anew_and_what_people_wrote_stays(bundle: Bundle) -> None:
    first = render_all(bundle.manifest)
    mine = first.replace("# x\n", "# Mine\n\nAbove.\n") + "\nBelow.\n"
    place = ArtifactPath.parse(f"{bundle.manifest.recipe}/{bundle.manifest.variant}")
    again = render("acme/x", mine, {place: bundle.manifest}, bundle.manifest)
    assert again == mine
