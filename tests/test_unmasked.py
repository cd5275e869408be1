"""A graph that decodes without a mask, where the mask of a call hides nothing.

It is planned for GPUs; here it is built for this CPU, whose answers can be looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DogeConfig

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import ModelSource
from hubaoti.attachment.attach import Attachment
from hubaoti.compiler.build import build
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.job import Job
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest, make_ranges
from hubaoti.compiler.targets import choose_targets
from hubaoti.host.probe import probe_host
from hubaoti.progress import report_nothing
from hubaoti.settings import Settings

CPU = torch.device("cpu")
NEW = 16  # tokens
STATIC: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "cache_implementation": "static",
}


@pytest.fixture(scope="module")
def bundle(tiny_decoder: Path, built_at: Settings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny decoder's blocks as they are planned for a GPU, built for this CPU."""
    host = probe_host(built_at)
    dims = make_ranges({"batch": (1, 4), "seq": (1, 40), "cache": (16, 64)})
    request = CompileRequest(task="generate", dims=dims, capabilities=(90,))
    here = CompileRequest(task="generate", dims=dims)
    plan = make_plan(load_source(tiny_decoder, request, CPU), request, CPU)
    (target,) = choose_targets(host, here)
    output = tmp_path_factory.mktemp("unmasked") / "bundle"
    jobs = {output: Job.of(plan, here, target)}
    return build(jobs, ModelSource(model="tiny"), host, report_nothing)[0]


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


@pytest.fixture
def attached(model: Any, bundle: Bundle, settings: Settings) -> Iterator[Attachment]:
    with hubaoti.attach(model, bundle, trust=True, settings=settings) as attachment:
        yield attachment


def count_calls(attached: Attachment) -> dict[str, int]:
    """How many calls of the first block each graph answered."""
    counts: dict[str, int] = attached.stats()["regions"]["model.layers.0"]["compiled"]
    return counts


def test_it_stands_before_the_graph_for_all_sizes_and_takes_what_that_takes(bundle: Bundle) -> None:
    decode, whole = bundle.manifest.graphs
    assert (decode.id, decode.unmasked, decode.bounds["seq"]) == (
        "model.layers-decode",
        True,
        (1, 1),
    )
    assert whole.id == "model.layers" and whole.unmasked is not True
    assert [item.name for item in decode.inputs] == [item.name for item in whole.inputs]
    assert decode.order < whole.order
    assert bundle.manifest.schema == 3


def test_a_block_that_makes_a_mask_of_its_own_has_no_such_graph(tmp_path: Path) -> None:
    """Doge keeps of all places those that it finds worth most."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    config = DogeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="generate", capabilities=(90,))
    plan = make_plan(load_source(tmp_path, request, CPU), request, CPU)
    assert [unit.id for unit in plan.units] == ["model.layers"]


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_without_padding_are_answered_without_a_mask(
    rows: int, model: Any, attached: Attachment
) -> None:
    ids = torch.arange(5, 5 + 4 * rows).reshape(rows, 4)
    found = model.generate(input_ids=ids, **STATIC)
    counts = count_calls(attached)
    plain = copy.deepcopy(model)  # graphs are not copied
    assert torch.equal(found, plain.generate(input_ids=ids, **STATIC))
    assert counts == {"model.layers-decode": NEW - 1, "model.layers": 1}
    assert attached.stats()["eager"] == 0


def test_padded_rows_are_answered_with_their_mask(
    tiny_decoder: Path, model: Any, attached: Attachment
) -> None:
    ids = torch.tensor([[0, 0, 101, 7], [101, 8, 9, 10]])
    asked = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    plain = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    assert torch.equal(model.generate(**asked, **STATIC), plain.generate(**asked, **STATIC))
    assert count_calls(attached) == {"model.layers-decode": 0, "model.layers": NEW}


def test_a_mask_that_is_written_between_two_steps_is_looked_at_again(
    tiny_decoder: Path, model: Any, attached: Attachment
) -> None:
    """The same tensor, first hiding nothing and then its first place."""
    from transformers import StaticCache

    plain = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    answers: dict[str, list[torch.Tensor]] = {"plain": [], "ours": []}
    for name, each in (("plain", plain), ("ours", model)):
        cache = StaticCache(config=each.config, max_cache_len=16)
        mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
        mask[..., 4:] = False
        with torch.no_grad():
            each(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
            for hidden in (False, True):
                mask[..., 0] = not hidden
                mask[..., : 4 + hidden][..., 3:] = True
                token = torch.tensor([[8 + hidden]])
                answer = each(token, attention_mask=mask, past_key_values=cache, use_cache=True)
                answers[name].append(answer.logits)
    for ours, theirs in zip(answers["ours"], answers["plain"], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert count_calls(attached) == {"model.layers-decode": 1, "model.layers": 2}


def test_in_inference_mode_the_mask_is_kept(model: Any, attached: Attachment) -> None:
    """A mask that is made there cannot be known from one step to the next."""
    with torch.inference_mode():
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), **STATIC)
    assert attached.stats()["eager"] == 0
