"""GPUs as torch counts them: which one an artifact is opened on, and which it is refused on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import CUDA, changed, make_bundle

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.requirements import Requirements
from hubaoti.errors import BadRequest, NoMatch
from hubaoti.host.probe import STAND_IN, Gpu
from hubaoti.runtime import gpus
from hubaoti.runtime.gpus import choose_device, computes, require_gpu


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """For a GPU of capability 9.0."""
    return make_bundle(tmp_path / "bundle", CUDA)


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *sms: int) -> None:
    """What torch would say of GPUs in its own order; none is here."""
    fakes = [Gpu(f"Fake {sm}", sm, 80 << 30) for sm in sms]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(fakes))
    monkeypatch.setattr(gpus, "query_gpu", lambda device: fakes[device.index])


@pytest.mark.parametrize(
    ("sms", "index"), [((90,), 0), ((120, 90), 1), ((90, 120, 90), 0), ((80, 120, 90, 90), 2)]
)
def test_a_graph_is_opened_on_the_gpu_that_it_fits_as_torch_counts_them(
    bundle: Bundle, sms: tuple[int, ...], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, *sms)
    assert choose_device(bundle.manifest) == torch.device("cuda", index)


def test_an_exact_one_goes_before_one_that_its_ptx_would_do_for(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, 120, 90)
    requires = Requirements(**CUDA, ptx=90, glibc="2.17")
    assert choose_device(changed(bundle, requires=requires).manifest).index == 1
    fake_gpus(monkeypatch, 120)
    assert choose_device(changed(bundle, requires=requires).manifest).index == 0


def test_where_none_fits_each_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 80, 120)
    with pytest.raises(NoMatch, match=r"sm_80 \(Fake 80\).*sm_120 \(Fake 120\)") as caught:
        choose_device(bundle.manifest)
    assert "sm80" in caught.value.hint


def test_where_torch_sees_none_that_is_said(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a torch without CUDA, or one from which CUDA_VISIBLE_DEVICES hides all."""
    fake_gpus(monkeypatch)
    with pytest.raises(
        NoMatch, match=r"needs an NVIDIA GPU of sm_90; torch .* sees none"
    ) as caught:
        choose_device(bundle.manifest)
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint


@pytest.mark.parametrize(("sms", "wanted"), [((), "cuda"), ((90,), "cuda:1")])
def test_one_that_is_named_has_to_be_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, sms: tuple[int, ...], wanted: str
) -> None:
    fake_gpus(monkeypatch, *sms)
    with pytest.raises(NoMatch, match=r"(?m)sees no cuda:[01]$"):
        choose_device(bundle.manifest, wanted)


def test_one_that_is_named_is_taken_and_still_has_to_fit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, 90, 120)
    device = choose_device(bundle.manifest, "cuda:1")
    assert device == torch.device("cuda", 1)
    with pytest.raises(NoMatch, match=r"needs sm_90 .*, here is sm_120 \(Fake 120\)"):
        require_gpu(bundle.manifest.requires, device)
    require_gpu(bundle.manifest.requires, torch.device("cuda", 0))


def test_more_shared_memory_than_a_block_can_have_there_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    requires = Requirements(**{**CUDA, "sm": 86}, shared_memory=160 << 10, glibc="2.17")
    fake_gpus(monkeypatch, 86)
    with pytest.raises(NoMatch, match="163840 bytes of shared memory a block"):
        require_gpu(requires, torch.device("cuda", 0))


def test_a_cpu_is_asked_nothing(tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "bundle").manifest
    assert choose_device(manifest) == torch.device("cpu")
    require_gpu(manifest.requires, torch.device("cpu"))
    assert computes(torch.device("cpu"))
    with pytest.raises(BadRequest, match="built for cpu, not for cuda"):
        choose_device(manifest, "cuda:0")


def test_a_device_that_stands_in_says_so_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for name, found in (("NVIDIA H200", True), (f"NVIDIA H200 {STAND_IN}", False)):
        monkeypatch.setattr(gpus, "query_gpu", lambda _, name=name: Gpu(name, 90, 1))
        assert computes(device) is found
