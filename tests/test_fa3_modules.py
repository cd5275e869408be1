"""FlashAttention-3 of modules from Python: what is transformers' attention is told what masks say.

Planned for a GPU; what is built is built for this CPU, where plain torch answers the ops.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fa3 import build_here
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.attachment.attach import Attachment
from hubaoti.attachment.dispatch import Dispatcher
from hubaoti.compiler.from_module import make_source
from hubaoti.compiler.plan import Plan, add_fa3_graphs, make_plan
from hubaoti.compiler.request import CompileRequest
from hubaoti.runtime.fallback import CannotServe
from hubaoti.settings import Settings

CPU = torch.device("cpu")
SIZES = ((1, 4), (2, 6), (3, 9))  # rows and places of calls


def call_padded(model: Any, rows: int, places: int) -> Any:
    """Texts, of which the first is shorter than the others."""
    ids = torch.arange(5, 5 + rows * places).reshape(rows, places)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    words = {} if isinstance(model, BertModel) else {"use_cache": False}
    return model(input_ids=ids, attention_mask=mask, **words)


def plan_fa3(model: Any, module: nn.Module, call: Callable[..., Any], **words: Any) -> Plan:
    """The plan of a module within a model that is called, with graphs for the kernel."""
    with torch.no_grad(), hubaoti.capture(module) as calls:
        for rows, places in SIZES:
            call(model, rows, places)
    request = CompileRequest(calls=calls, capabilities=(90,), **words)
    return add_fa3_graphs(make_plan(make_source(module, request)[0], request, CPU))


@pytest.fixture
def model(tiny_decoder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


def list_units(plan: Plan) -> list[tuple[str, str | None]]:
    return [(unit.id, unit.masks) for unit in plan.units]


def test_a_model_and_its_parts_have_the_graph_that_is_made_from_a_config(model: Any) -> None:
    whole = plan_fa3(model, model, call_padded)
    assert list_units(whole) == [("model.layers-causal", "causal"), ("model.layers", None)]
    block = model.model.layers[0]
    for part in (block, block.self_attn):
        plan = plan_fa3(model, part, call_padded)
        assert plan.source.attention == "sdpa"
        assert list_units(plan) == [("root-causal", "causal"), ("root", None)]


class Attends(nn.Module):
    """Attention that is a module's own, whatever it says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.is_causal = True

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x)[:, None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)


def call_attends(model: nn.Module, rows: int, places: int) -> Any:
    seen = torch.ones(rows, 1, places, places, dtype=torch.bool).tril()
    return model(torch.randn(rows, places, 8), seen)


def test_an_encoder_and_a_module_that_attends_by_itself_have_none() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(**sizes, intermediate_size=64, vocab_size=99)).eval()
    plan = plan_fa3(bert, bert, call_padded)
    assert list_units(plan) == [("encoder.layer", None)]
    assert plan.units[0].face.inputs[1].values == "mask"
    plain = Attends().eval()
    assert list_units(plan_fa3(plain, plain, call_attends)) == [("root", None)]


class Changed(nn.Module):
    """Attention that is given what is made of its mask."""

    def __init__(self, attention: nn.Module, change: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.attention, self.change = attention, change

    def forward(self, attention_mask: torch.Tensor, **given: Any) -> Any:
        return self.attention(**self.change(attention_mask), **given)


CHANGES: dict[str, Callable[[torch.Tensor], dict[str, Any]]] = {
    "a window": lambda mask: {"attention_mask": mask & mask.triu(-1)},
    "a bias": lambda mask: {"attention_mask": mask, "position_bias": mask.float().cumsum(-1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_block_adds_to_its_mask_is_left_out_by_no_graph(change: str, model: Any) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for layer in model.model.layers:
        layer.self_attn = Changed(layer.self_attn, CHANGES[change])
    for part in (model, model.model.layers[0]):
        assert [told for _, told in list_units(plan_fa3(model, part, call_padded))] == [None]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


class Both(nn.Module):
    """Two models, of which each has an attention of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, **given: Any) -> Any:
        return self.first(**given).logits + self.second(**given).logits

    def list_attentions(self) -> list[str]:
        return [each.config._attn_implementation for each in (self.first, self.second)]


@pytest.mark.parametrize(("name", "found"), [("eager", "native"), ("sdpa", "sdpa")])
def test_what_is_made_of_models_has_their_attention_or_leaves_each_its_own(
    name: str, found: str, model: Any, tiny_decoder: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_decoder, attn_implementation=name).eval()
    both = Both(model, other)
    plan = plan_fa3(both, both, call_padded)
    assert plan.source.attention == found
    told = [unit.modules for unit in plan.units if unit.masks]
    paths = [f"{each}.model.layers.{index}" for each in ("first", "second") for index in (0, 1)]
    assert told == ([(*paths,)] if found == "sdpa" else [])
    assert both.list_attentions() == ["sdpa", name]


# What they answer


@pytest.fixture(scope="module")
def bundle(
    tiny_decoder: Path,
    ops: list[str],
    built_at: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """A block of a decoder, compiled by itself."""
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    plan = plan_fa3(model, model.model.layers[0], call_padded)
    return build_here(plan, built_at, tmp_path_factory.mktemp("fa3") / "block")


def test_a_block_by_itself_is_answered_by_what_its_mask_says(
    bundle: Bundle, model: Any, ops: list[str], settings: Settings
) -> None:
    assert [graph.masks or None for graph in bundle.manifest.graphs] == ["causal", None]
    block, plain = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    hidden, places = torch.randn(2, 7, 32), torch.arange(7)[None]
    given = {"position_embeddings": model.model.rotary_emb(hidden, places), "position_ids": places}
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    window = causal.triu(-3)
    with hubaoti.attach(block, bundle, ops=ops, trust=True, settings=settings) as attached:
        for mask in (causal, window, causal, window):  # the first of each is compared
            with torch.no_grad():
                ours, theirs = (
                    each(
                        hidden, attention_mask=mask, past_key_values=None, use_cache=False, **given
                    )
                    for each in (block, plain)
                )
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert count_calls(attached) == {"root-causal": 1, "root": 1}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("attention", "graph"), [("sdpa", "root-causal"), ("eager", "root")])
def test_a_block_of_transformers_by_itself_is_answered_where_its_mask_is_left_out(
    attention: str,
    graph: str,
    bundle: Bundle,
    model: Any,
    ops: list[str],
    settings: Settings,
) -> None:
    model.set_attn_implementation(attention)
    block, plain = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    hidden, places = torch.randn(2, 7, 32), torch.arange(7)[None]
    given = {"position_embeddings": model.model.rotary_emb(hidden, places), "position_ids": places}
    given |= {"attention_mask": None, "past_key_values": None, "use_cache": False}
    with (
        torch.no_grad(),
        hubaoti.attach(block, bundle, ops=ops, trust=True, settings=settings) as attached,
    ):
        for _ in range(2):  # the first is compared
            torch.testing.assert_close(
                block(hidden, **given), plain(hidden, **given), atol=1e-5, rtol=1e-5
            )
        counts = count_calls(attached)
        assert counts.pop(graph) == 1 and not any(counts.values())


def test_what_a_mask_says_that_is_left_out_nobody_knows_of_blocks_that_are_not_transformers(
    bundle: Bundle, model: Any
) -> None:
    """Nor of one whose attention looks both ways: the mask may be of either."""

    def refuse(block: Any, message: str) -> None:
        dispatcher = Dispatcher(bundle.manifest.graphs, block, CPU, False, "sdpa")
        hidden = torch.randn(2, 7, 32)
        inputs = [hidden, None, *model.model.rotary_emb(hidden, places), places]
        with torch.no_grad(), pytest.raises(CannotServe, match=message):
            dispatcher.find_route(inputs, (), None, "")

    class Other(LlamaDecoderLayer):
        """With code of its own for a mask that is None, as anybody's may have."""

    block, places = model.model.layers[0], torch.arange(7)[None]
    block.mlp.is_causal = False
    refuse(block, "attention_mask is left out")
    del block.mlp.is_causal
    block.__class__ = Other
    refuse(block, "attention_mask is left out")


def count_calls(attached: Attachment) -> dict[str, int]:
    """How many calls each graph answered."""
    assert attached.stats()["eager"] == 0
    counts: dict[str, int] = attached.stats()["regions"][""]["compiled"]
    return counts
