"""A model whose weights are quantized as its graphs have them: what it holds, what it answers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import hubaoti
from gpu.attached import (
    answer_prompt,
    compile_blocks,
    describe,
    make_config,
    make_model,
    make_prompt,
)
from gpu.blocks import skip_impossible
from gpu.conftest import Found
from gpu.measure import measure_error
from hubaoti.artifact.bundle import Bundle
from hubaoti.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(device: torch.device, folder: Path, offline: Settings) -> Bundle:
    """The blocks, compiled once."""
    skip_impossible("int8wo", device)
    config = make_config(device)
    return compile_blocks(device, config, folder / device.type, offline, quantize="int8wo")


def test_compile(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts)


def test_memory(bundle: Bundle, device: torch.device, offline: Settings, found: Found) -> None:
    """Attached with quantize=True: what the model holds, and its answers beside its own after."""
    model = make_model(device, make_config(device))
    ids = make_prompt(model)
    plain, before = answer_prompt(model, ids), count_bytes(model)
    attachment = hubaoti.attach(model, bundle, quantize=True, strict=True, settings=offline)
    gc.collect()
    after, ours = count_bytes(model), answer_prompt(model, ids)
    attachment.detach()
    theirs = answer_prompt(model, ids)
    off, off_plain = measure_error(ours, theirs), measure_error(ours, plain)
    same = (ours.argmax(-1) == plain.argmax(-1)).float().mean().item()
    said = f"{after / before:.2f} of {before / 1e6:.1f} MB, {off:.1e} off its own answers, "
    said += f"{off_plain:.1e} off the plain model's, {same:.1%} of words alike"
    found(said, before=before, after=after, off=off, off_plain=off_plain, same_words_as_plain=same)
    assert after <= 0.85 * before, said
    assert off <= (0.1 if device.type == "cuda" else 1e-4), said


def count_bytes(model: Any) -> int:
    """What the tensors of a model take; on a GPU all that torch has given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        return torch.cuda.memory_allocated(model.device)
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
