"""Requirements: written by others, so nothing malformed exists."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.variant import Variant
from hubaoti.errors import BadManifest

PIN = KernelPin("kernels-community/flash-attn3", "a" * 40, (90,))
CPU = Requirements(device="cpu", os="linux", torch="2.13.0+cpu", level="x86_64_v3", glibc="2.34")
CUDA = Requirements(
    device="cuda",
    os="linux",
    torch="2.13.0+cu130",
    level="x86_64_v3",
    cuda="13.0",
    driver="13.0",
    sm=90,
    ptx=90,
    glibc="2.34",
    glibcxx="3.4.30",
    cxxabi="1.3.13",
    libraries=("libc.so.6", "libtorch_cuda.so"),
    shared_memory=166_912,
    kernels=(PIN,),
)

MALFORMED: list[tuple[str, Any]] = [
    ("device", "tpu"),
    ("os", "Linux"),
    ("torch", "two"),
    ("torch", "2.13 or so"),
    ("torch", "9" * 5000),
    ("torch", "99999.1"),
    ("torch", 2.13),
    ("level", "../x"),
    ("level", None),
    ("cuda", None),
    ("cuda", "13"),
    ("cuda", "13.0.1"),
    ("driver", "thirteen"),
    ("driver", 13.0),
    ("sm", None),
    ("sm", True),
    ("sm", "90"),
    ("ptx", 9),
    ("ptx", 90.0),
    ("glibc", "2"),
    ("glibc", "2.34\n"),
    ("glibcxx", "GLIBCXX_3.4"),
    ("cxxabi", 1.3),
    ("libraries", ["libc.so.6"]),
    ("libraries", ("../evil.so",)),
    ("libraries", (6,)),
    ("shared_memory", -1),
    ("shared_memory", "much"),
    ("kernels", [PIN]),
    ("kernels", ({"repo": "a/b", "commit": "a" * 40},)),
]


@pytest.mark.parametrize(("field", "value"), MALFORMED)
def test_a_malformed_field_is_refused_with_its_name(field: str, value: Any) -> None:
    with pytest.raises(BadManifest) as refused:
        replace(CUDA, **{field: value})
    assert refused.value.hint
    assert "requires: malformed" in str(refused.value)


@pytest.mark.parametrize(
    "gpu", [{"cuda": "13.0", "sm": 90}, {"sm": 90}, {"driver": "13.0"}, {"ptx": 90}]
)
def test_a_cpu_artifact_that_needs_a_gpu_contradicts_itself(gpu: dict[str, Any]) -> None:
    with pytest.raises(BadManifest):
        replace(CPU, **gpu)


@pytest.mark.parametrize(
    "parts",
    [
        ("flash-attn3", "a" * 40, ()),
        ("../etc/passwd", "a" * 40, ()),
        ("a/..", "a" * 40, ()),
        ("a/b", "main", ()),
        ("a/b", "A" * 40, ()),
        ("a/b", "a" * 40, [90]),
        ("a/b", "a" * 40, ("90",)),
    ],
)
def test_a_malformed_kernel_pin_cannot_exist(parts: tuple[Any, ...]) -> None:
    with pytest.raises(BadManifest):
        KernelPin(*parts)


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(("x",))


@settings(deadline=None)
@given(st.sampled_from(sorted(asdict(CUDA))), anything)
def test_whatever_stands_in_a_field_is_taken_or_is_a_bad_manifest(field: str, value: Any) -> None:
    try:
        changed = replace(CUDA, **{field: value})
    except BadManifest as error:
        assert error.hint
    else:
        assert getattr(changed, field) == value


@pytest.mark.parametrize("requires", [CPU, CUDA])
def test_requirements_survive_json(requires: Requirements) -> None:
    assert msgspec.json.decode(msgspec.json.encode(requires), type=Requirements) == requires


def test_requirements_name_their_variant() -> None:
    assert CUDA.variant == Variant.parse("torch2.13-cu130-sm90-x86_64_v3-linux")
    assert CPU.variant == Variant.parse("torch2.13-cpu-x86_64_v3-linux")


def test_a_pin_is_written_as_repo_and_commit() -> None:
    assert str(PIN) == f"kernels-community/flash-attn3@{'a' * 40}"
