"""Constants: where a runtime finds the values that a graph reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hubaoti.artifact.schema import ConstantOrigin
from hubaoti.compiler.constants import (
    BUFFERS,
    ConstantsFile,
    collect_named_tensors,
    describe_constants,
    find_checkpoint_origin,
    find_tied,
    save_tensors,
)
from hubaoti.errors import CompileFailed
from hubaoti.runtime.quantize import quantize

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}


def traced(module: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), inputs, strict=False)


class Small(nn.Module):
    """A weight, a saved buffer, one that is not saved, and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("saved", torch.randn(4))
        self.register_buffer("table", torch.randn(4, 4).t(), persistent=False)
        self.loose = torch.arange(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        saved: Any = self.saved
        table: Any = self.table
        return (x @ self.weight.t() + saved) @ table + self.loose


def test_saved_tensors_come_from_the_checkpoint_and_the_others_are_shipped() -> None:
    module = Small()
    program = traced(module, torch.ones(2, 3))
    loose = [*program.constants][0]
    listed, shipped = describe_constants(
        ["weight", "saved", "table", loose], ConstantsFile(module, "", module), program
    )
    origins = {constant.fqn: constant.origin for constant in listed}
    assert origins["weight"].checkpoint == ("weight",)
    assert origins["saved"].checkpoint == ("saved",)
    assert origins["table"].file == origins[loose].file == BUFFERS
    assert shipped.keys() == {"table", loose}
    assert torch.equal(shipped["table"], module.table)  # type: ignore[arg-type]
    assert torch.equal(shipped[loose], module.loose)


def test_a_constant_has_the_dtype_shape_and_stride_that_the_graph_reads() -> None:
    module = Small().to(torch.float64)
    listed, _ = describe_constants(
        ["weight"], ConstantsFile(module, "", module), traced(module, torch.ones(2, 3).double())
    )
    (weight,) = listed
    assert (weight.dtype, weight.shape, weight.stride) == ("float64", (4, 3), (3, 1))


def test_a_tensor_that_nobody_has_fails_the_compile() -> None:
    module = Small()
    with pytest.raises(CompileFailed, match="reads ghost"):
        describe_constants(
            ["ghost"], ConstantsFile(module, "", module), traced(module, torch.ones(2, 3))
        )


def test_a_region_s_constants_are_those_of_the_module_that_it_serves() -> None:
    model = nn.ModuleDict({"first": Small(), "second": Small()})
    program = traced(model["first"], torch.ones(2, 3))
    loose = [*program.constants][0]
    place = ConstantsFile(model, "first", model["first"], "buffers/first.safetensors")
    listed, shipped = describe_constants(["weight", "saved", "table", loose], place, program)
    origins = {constant.fqn: constant.origin for constant in listed}
    assert origins["weight"] == ConstantOrigin(checkpoint=("weight",), module="weight")
    assert origins["saved"] == ConstantOrigin(file=place.file, module="saved")
    assert origins["table"] == ConstantOrigin(file=place.file, module="table")
    assert origins[loose] == ConstantOrigin(file=place.file)
    assert {c.fqn: c.shared_by_all_modules for c in listed} == {
        "weight": False,
        "saved": False,
        "table": False,
        loose: True,
    }
    assert shipped.keys() == {"saved", "table", loose}
    assert torch.equal(shipped["table"], model["first"].table)  # type: ignore[arg-type]


def test_a_layer_s_names_in_a_checkpoint_are_relative_to_the_layer() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    path = "model.layers.0"
    place = ConstantsFile(model, path, model.get_submodule(path))
    names = [*collect_named_tensors(place.module)]
    listed, shipped = describe_constants(names, place, traced(Small(), torch.ones(2, 3)))
    saved = model.state_dict().keys()
    assert listed and not shipped
    for constant in listed:
        assert constant.origin == ConstantOrigin(checkpoint=(constant.fqn,), module=constant.fqn)
        assert f"{path}.{constant.fqn}" in saved


def test_a_quantized_weight_is_made_of_the_tensor_of_the_checkpoint() -> None:
    """Of a copy of the layer, whose parameters are the quantized parts of the weights."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    path = "model.layers.0"
    module = copy.deepcopy(model.get_submodule(path))
    made = quantize(module, "int8wo", "cpu").made
    place = ConstantsFile(model, path, module, made=made, recipe="int8wo")
    listed, shipped = describe_constants(
        collect_named_tensors(module), place, traced(Small(), torch.ones(2, 3))
    )
    origins = {constant.fqn: constant.origin for constant in listed}
    saved = model.state_dict()
    assert made and made.keys() <= origins.keys() and not shipped
    for fqn, origin in origins.items():
        (name,) = origin.checkpoint
        assert f"{path}.{name}" in saved
        if fqn in made:
            assert origin.transform == made[fqn].transform
            assert (origin.dtype, origin.module) == ("float32", made[fqn].source)
        else:
            assert (origin.transform, origin.module) == (None, fqn)


def test_files_of_tensors_may_be_read_by_whoever_may_read_the_bundle(tmp_path: Path) -> None:
    save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_is_shipped_is_a_copy() -> None:
    module = Small()
    _, shipped = describe_constants(
        ["table"], ConstantsFile(module, "", module), traced(module, torch.ones(2, 3))
    )
    before = shipped["table"].clone()
    module.table.zero_()  # type: ignore[operator,union-attr]
    assert torch.equal(shipped["table"], before)
    assert shipped["table"].is_contiguous()


def test_a_checkpoint_is_searched_with_and_without_the_head_s_prefix() -> None:
    config = transformers.BertConfig(**TINY)
    fqn = "embeddings.word_embeddings.weight"
    base = transformers.BertModel(config)
    headed = transformers.BertForSequenceClassification(config)
    names = {
        find_checkpoint_origin(model, name, collect_named_tensors(model)[name], ()).checkpoint
        for model, name in ((base, fqn), (headed, f"bert.{fqn}"))
    }
    assert names == {(fqn, f"bert.{fqn}"), (f"bert.{fqn}", fqn)}


def test_every_name_of_a_tied_weight_is_looked_for() -> None:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    both = {"lm_head.weight", "model.embed_tokens.weight"}
    aliases = find_tied(collect_named_tensors(model))
    for name in both:
        assert {name, *aliases[name]} == both
        origin = find_checkpoint_origin(
            model, name, collect_named_tensors(model)[name], aliases[name]
        )
        assert both <= {*origin.checkpoint}
        assert origin.checkpoint[0] == name
        assert origin.transform is None


@pytest.mark.parametrize(
    ("make_config", "head"),
    [
        (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    ],
)
def test_experts_that_transformers_fuse_are_not_taken_for_tensors_of_the_checkpoint(
    make_config: Any, head: Any
) -> None:
    experts = {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8}
    model = head(make_config(**TINY, **experts, num_experts_per_tok=1, num_key_value_heads=1))
    origins = {
        name: find_checkpoint_origin(model, name, tensor, ())
        for name, tensor in collect_named_tensors(model).items()
        if name in model.state_dict()
    }
    fused = {name for name in origins if ".experts." in name}
    assert fused
    assert {name for name, origin in origins.items() if origin.transform} == fused
