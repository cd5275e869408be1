"""The driver's own word for the CUDA that it serves, where NVML does not answer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hubaoti.spaces import devices


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("*version = 13020; return 0;", "13.2"),
        ("*version = 12080; return 0;", "12.8"),
        ("*version = 13020; return 100;", None),
        ("*version = 0; return 0;", None),
    ],
)
def test_the_driver_is_asked_which_cuda_it_serves(
    says: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, fake = tmp_path / "fake.c", tmp_path / "fake_libcuda.so"
    source.write_text(f"int cuDriverGetVersion(int *version) {{ {says} }}")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", fake], check=True)
    monkeypatch.setattr(devices, "LIBCUDA", str(fake))
    assert devices.query_driver_cuda() == found


def test_without_a_driver_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("libnone-such.so.1", "libm.so.6"):
        monkeypatch.setattr(devices, "LIBCUDA", name)
        assert devices.query_driver_cuda() is None
