"""Models with quantized weights, as their graphs have them: their bytes, their answers."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import hubaoti
from gpu import llama
from gpu.conftest import Found
from gpu.llama import answer_prompt, make_config, make_model, make_prompt
from gpu.measure import measure_error
from gpu.place import Place, describe
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import CompileFailed
from hubaoti.runtime.recipes import check_recipe

pytestmark = pytest.mark.gpu  # with --device cpu on a CPU, too: it takes a minute


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe of quantization, and how much of the plain model's bytes is left."""

    quantize: str
    left: float

    @property
    def name(self) -> str:
        """What its checks are called by."""
        return f"quantized-{self.quantize}"

    def compile(self, place: Place) -> Bundle:
        """The blocks of a model of 8B."""
        config = make_config(place.device)
        return llama.compile_blocks(place, self.name, config, quantize=self.quantize)


RECIPES = Recipe("int8wo", 0.85), Recipe("float8dq", 0.85)


def list_cases(every: bool) -> tuple[Recipe, ...]:
    """On a CPU one stands for both."""
    return RECIPES if every else RECIPES[:1]


def skip_impossible(quantize: str, device: torch.device) -> None:
    """Skip a recipe that this machine cannot have, with the reason."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    try:
        major, minor = (0, 0)
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
        check_recipe(quantize, device.type, 10 * major + minor)
    except CompileFailed as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bundle(place: Place, case: Recipe) -> Bundle:
    """The blocks, compiled once."""
    skip_impossible(case.quantize, place.device)
    return place.get_bundle(case.name, case.compile)


def test_built(bundle: Bundle, found: Found) -> None:
    said, facts = describe(bundle)
    found(said, **facts)


def test_answer(bundle: Bundle, case: Recipe, place: Place, found: Found) -> None:
    """Attached with quantize=True: what the model holds, and its answers beside its own after."""
    model = make_model(place.device, make_config(place.device))
    ids = make_prompt(model)
    plain, before = answer_prompt(model, ids), count_bytes(model)
    attachment = hubaoti.attach(
        model, bundle, quantize=True, strict=True, trust=True, settings=place.settings
    )
    gc.collect()
    after, ours = count_bytes(model), answer_prompt(model, ids)
    attachment.detach()
    theirs = answer_prompt(model, ids)
    off, off_plain = measure_error(ours, theirs), measure_error(ours, plain)
    said = f"{after / before:.2f} of {before / 1e6:.1f} MB, {off:.1e} off its own answers, "
    said += f"{off_plain:.1e} off the plain model's"
    found(said, before=before, after=after, off=off, off_plain=off_plain)
    assert after <= case.left * before, said
    assert off <= (0.1 if place.is_gpu else 1e-4), said


def count_bytes(model: Any) -> int:
    """What the tensors of a model take; on a GPU all that torch has given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        return torch.cuda.memory_allocated(model.device)
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def test_a_recipe_that_this_device_cannot_have_is_skipped_with_the_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="is for cuda sm89, not for cpu"):
        skip_impossible("float8dq", torch.device("cpu"))
