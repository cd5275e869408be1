"""Pins of kernels: written by others, so nothing malformed exists; judged as kernels would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_repos import SCHEMAS
from kernels.archs import _supports_cuda_capability
from kernels.variants import parse_variant

from hubaoti.artifact.kernel_metadata import parse_metadata
from hubaoti.artifact.kernel_pin import KernelOp, KernelPin
from hubaoti.artifact.kernel_schema import list_unknown, read_arguments
from hubaoti.artifact.kernel_variant import KernelHost, KernelVariant, choose_variant
from hubaoti.artifact.schema import File
from hubaoti.errors import BadManifest, BadRequest
from hubaoti.hub.layout import RepoRef

FILE = File(path="metadata.json", sha256="a" * 64, size=3)
PIN = KernelPin(
    repo="kernels-community/flash-attn3",
    commit="a" * 40,
    version=1,
    variant="torch211-cxx11-cu130-x86_64-linux",
    namespace="_flash_attn3_cuda_1f",
    archs=("8.0", "9.0a"),
    files=(FILE, File(path="_ops.py", sha256="b" * 64, size=4)),
    ops=(KernelOp("fwd", "fwd(Tensor q) -> Tensor"),),
)
H200 = KernelHost("2.11.0+cu130", "13.0", "x86_64_v3", "linux")


def test_a_pin_without_a_build_is_written_as_it_always_was() -> None:
    short = KernelPin("a/b", "c" * 40, (90,))
    assert msgspec.to_builtins(short) == {"repo": "a/b", "commit": "c" * 40, "sms": (90,)}
    assert short.build is None
    assert short.id == str(short)


REPOS = st.from_regex(r"[A-Za-z0-9_.-]{0,4}/[A-Za-z0-9_.-]{0,6}(\.git)?", fullmatch=True)


@given(st.one_of(REPOS, st.integers(40, 60).map(lambda n: f"{'a' * n}/{'b' * 48}")))
def test_a_pin_names_a_repo_that_can_be_asked_for_and_no_other(repo: str) -> None:
    try:
        RepoRef(repo)
    except BadRequest:
        with pytest.raises(BadManifest, match="malformed kernel's repo"):
            replace(PIN, repo=repo)
    else:
        assert replace(PIN, repo=repo).repo == repo


def test_pins_survive_json() -> None:
    for pin in (PIN, replace(PIN, version=msgspec.UNSET, archs=msgspec.UNSET)):
        assert msgspec.json.decode(msgspec.json.encode(pin), type=KernelPin) == pin


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", -1),
        ("version", True),
        ("variant", "torch-universal"),
        ("variant", "../torch211-cu130-x86_64-linux"),
        ("variant", msgspec.UNSET),
        ("namespace", "a.b"),
        ("namespace", ""),
        ("namespace", msgspec.UNSET),
        ("archs", ("90",)),
        ("archs", ["9.0"]),
        ("archs", ("9.0b",)),
        ("files", ()),
        ("files", msgspec.UNSET),
        ("files", (FILE, FILE)),
        ("files", (FILE, msgspec.structs.replace(FILE, path="METADATA.json"))),
        ("files", (FILE, msgspec.structs.replace(FILE, path=f"{FILE.path}/ops.py"))),
        ("files", (msgspec.structs.replace(FILE, path="../evil.py"),)),
        ("files", (msgspec.structs.replace(FILE, path="/etc/evil"),)),
        ("files", (msgspec.structs.replace(FILE, path="a/./b"),)),
        ("files", (msgspec.structs.replace(FILE, sha256="A" * 64),)),
        ("files", (msgspec.structs.replace(FILE, size=1 << 60),)),
        ("files", ({"path": "a", "sha256": "a" * 64, "size": 1},)),
        ("ops", msgspec.UNSET),
        ("ops", (KernelOp("bwd", "fwd(Tensor q) -> Tensor"),)),
        ("ops", (KernelOp("fwd", "fwd(Tensor q)"),)),
        ("ops", (KernelOp("fwd", f"fwd({'x' * 10_000}) -> Tensor"),)),
        ("ops", (KernelOp("fwd", "fwd(Tensor q\n) -> Tensor"),)),
    ],
)
def test_a_malformed_part_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(BadManifest, match="requires: malformed kernel's") as refused:
        replace(PIN, **{field: value})
    assert refused.value.hint


def test_builds_are_told_apart_by_their_bytes_alone() -> None:
    again = replace(PIN, repo="a/b", commit="b" * 40, files=PIN.files[::-1])  # type: ignore[index]
    assert again.id == PIN.id
    others = (
        replace(PIN, namespace="_other"),
        replace(PIN, variant="torch211-cu130-x86_64-linux"),
        replace(PIN, files=(FILE,)),
    )
    assert len({PIN.id, *(each.id for each in others)}) == 4


archs = st.builds(
    lambda major, minor, suffix, ptx: f"{major}.{minor}{suffix}{ptx}",
    st.integers(1, 13),
    st.integers(0, 9),
    st.sampled_from(["", "a", "f"]),
    st.sampled_from(["", "+PTX"]),
)


@given(st.lists(archs, min_size=1, max_size=3), st.integers(5, 13), st.integers(0, 9))
def test_archs_mean_what_kernels_takes_them_for(named: list[str], major: int, minor: int) -> None:
    pin = replace(PIN, archs=tuple(named))
    assert pin.supports(10 * major + minor) == _supports_cuda_capability(named, (major, minor))


@pytest.mark.parametrize(
    ("arch", "fits", "fails"),
    [
        ("9.0a", (90,), (89, 100, 120)),
        ("8.0", (80, 86, 89), (75, 90)),
        ("10.0f", (100, 103), (90, 110, 120)),
        ("9.0+PTX", (90, 100, 120), (80, 89)),
    ],
)
def test_archs_are_read_in_kernels_own_grammar(arch: str, fits: Any, fails: Any) -> None:
    pin = replace(PIN, archs=(arch,))
    assert [pin.supports(sm) for sm in fits] == [True] * len(fits)
    assert [pin.supports(sm) for sm in fails] == [False] * len(fails)


variants = st.builds(
    KernelVariant,
    torch=st.builds(lambda a, b: f"{a}.{b}", st.integers(1, 9), st.integers(0, 99)),
    backend=st.sampled_from(["cpu", "cu118", "cu130", "cu132"]),
    machine=st.sampled_from(["x86_64", "aarch64"]),
    os=st.sampled_from(["linux", "darwin", "windows"]),
    stable=st.just(False),
    abi=st.sampled_from([None, "cxx11", "cxx98"]),
) | st.builds(
    KernelVariant,
    torch=st.builds(lambda a, b: f"{a}.{b}", st.integers(1, 9), st.integers(0, 99)),
    backend=st.sampled_from(["cpu", "cu130"]),
    machine=st.just("x86_64"),
    os=st.just("linux"),
    stable=st.just(True),
)


@given(variants)
def test_variants_are_read_as_they_are_written_and_as_kernels_reads_them(
    variant: KernelVariant,
) -> None:
    assert KernelVariant.parse(str(variant)) == variant
    assert parse_variant(str(variant)).variant_str == str(variant)


@given(st.text() | st.from_regex(r"torch[a-z0-9_-]{0,40}"))
def test_whatever_is_read_as_a_variant_has_one_spelling(text: str) -> None:
    try:
        found = KernelVariant.parse(text)
    except BadRequest as error:
        assert error.hint
    else:
        assert str(found) == text


@pytest.mark.parametrize(
    ("name", "misfits"),
    [
        ("torch211-cxx11-cu130-x86_64-linux", []),
        ("torch211-cu128-x86_64-linux", ["CUDA 12.8"]),
        ("torch211-cu132-x86_64-linux", ["CUDA 13.2"]),
        ("torch210-cu130-x86_64-linux", ["torch 2.10"]),
        ("torch-stable-abi29-cu130-x86_64-linux", []),
        ("torch-stable-abi212-cu130-x86_64-linux", ["torch 2.12 or newer"]),
        ("torch211-cxx98-cu130-x86_64-linux", ["the C++ ABI of before 2011"]),
        ("torch211-cpu-aarch64-darwin", ["a CPU", "aarch64 machines", "darwin"]),
    ],
)
def test_a_build_is_judged_with_every_reason(name: str, misfits: list[str]) -> None:
    assert H200.list_misfits(KernelVariant.parse(name)) == misfits


def test_of_the_builds_that_fit_the_stable_one_goes_first_then_the_newest_cuda() -> None:
    names = [
        *("torch-universal", "torch211-cxx11-cu130-x86_64-linux", "torch210-cu130-x86_64-linux"),
        *("torch-stable-abi29-cu130-x86_64-linux", "torch-stable-abi210-cu130-x86_64-linux"),
    ]
    assert choose_variant(names, H200) == "torch-stable-abi210-cu130-x86_64-linux"
    assert choose_variant(names[:3], H200) == "torch211-cxx11-cu130-x86_64-linux"
    newer = replace(H200, cuda="13.2")
    both = ["torch211-cu130-x86_64-linux", "torch211-cu132-x86_64-linux"]
    assert choose_variant(both, newer) == both[1]
    assert choose_variant(both, H200) == both[0]
    assert choose_variant(names[:1], H200) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"id": "a"}',
        b'{"id": 3, "backend": {"type": "cpu"}}',
        b'{"id": "a", "backend": {"type": "cpu"}, "kernel-depends": [{"repo-id": "a/b"}]}',
        b"[" * 100_000,
    ],
)
def test_metadata_that_say_nothing_or_load_other_kernels_are_refused(text: bytes) -> None:
    with pytest.raises(BadManifest) as refused:
        parse_metadata(text, "metadata.json of a/b")
    assert refused.value.hint


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_schema_that_there_is_is_known_by_its_arguments(schema: str) -> None:
    names = [argument.name for argument in torch._C.parse_schema(f"a::{schema}").arguments]
    assert read_arguments(schema) == names
    assert list_unknown(names) == []
    assert list_unknown([*names[:-1], "dropped"])[0] == "has dropped"
    assert list_unknown(names[1:]) == ["lacks q"]
