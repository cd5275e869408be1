"""Code that asks for the device: what it computes on a GPU is compared without one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, EXPERTS, GROUPED, Architecture, decoder
from test_diffusers import KINDS
from torch import nn
from torch.nn import functional as F

from hubaoti.artifact.schema import Input
from hubaoti.compiler.device_code import require_same_on_gpu, settle_autocast
from hubaoti.compiler.from_config import Source, load_source, use_attention
from hubaoti.compiler.from_module import make_source
from hubaoti.compiler.plan import GraphPlan, Plan, choose_tracing_attention, make_plan
from hubaoti.compiler.request import CompileRequest
from hubaoti.compiler.signature import CallSignature
from hubaoti.compiler.traced import choose_trace_sizes
from hubaoti.errors import CompileFailed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FACE = CallSignature(
    {"args": [{"tensor": 0}], "kwargs": {}},
    (Input(name="x", dtype="float32", shape=("rows", 8), values="real"),),
)
NEEDS_CUDA = pytest.mark.skipif(torch.version.cuda is None, reason="torch has no CUDA")


def cuda(test: Any) -> Any:
    """A test for a CUDA build of torch, without a GPU."""
    return pytest.mark.cuda(NEEDS_CUDA(test))


Forward = Callable[[Any, torch.Tensor], Any]


class Toy(nn.Module):
    """A layer, a buffer, and a tensor that is neither; `code` is what its forward does."""

    def __init__(self, code: Forward) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.table = torch.arange(8.0)
        self.register_buffer("ones", torch.ones(8))
        self.code = code
        self.count = 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


def ask(code: Forward, capability: int = 90) -> None:
    """Compare what a toy of this code computes."""
    require_same_on_gpu(Toy(code), FACE, [torch.ones(6, 8)], capability)


# What is the same on every device


def made_on_its_device(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return toy.linear(x) + torch.arange(8, device=x.device) + torch.tensor(2.0, device=x.device)


def made_anywhere(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """Lies where the graph lies, once it is compiled."""
    return x + torch.arange(8) + toy.table


def kept_where_it_is(toy: Any, x: torch.Tensor) -> torch.Tensor:
    toy.table = toy.table.to(x.device)
    toy.count += 1
    return x + toy.table


def attends(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """torch chooses another kernel."""
    heads = x.reshape(1, 2, -1, 4)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).reshape(x.shape)


def normalizes(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """torch has another op, as cuDNN's."""
    return F.softmax(F.batch_norm(x, toy.ones, toy.ones), -1, dtype=torch.float32)


def recurrent(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """torch would ask cuDNN, and that for a driver."""
    layer = nn.LSTM(8, 8).to(x.device)
    answer: torch.Tensor = layer(x)[0]
    return answer


def multihead(toy: Any, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = nn.MultiheadAttention(8, 2, device=x.device).eval()(x, x, x)[0]
    return answer


def autocast_off(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """As transformers computes rotary embeddings."""
    with torch.autocast(x.device.type, enabled=False):
        answer: torch.Tensor = toy.linear(x)
    return answer


def autocast_of_its_device(toy: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        answer: torch.Tensor = toy.linear(x)
    return answer


def float64_but_for_mps(toy: Any, x: torch.Tensor) -> torch.Tensor:
    wide = x if x.device.type == "mps" else x.double()
    return wide * torch.tensor(0.1, dtype=torch.float64, device=x.device)


def counts(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """As grouped experts count tokens: torch.histc takes other dtypes on the CPU."""
    ids = x.argmax(-1)
    numbers = ids.int() if x.is_cuda else ids.float()
    return torch.cumsum(torch.histc(numbers, 8, min=0, max=7), 0, dtype=torch.int32)


def looks_at_values(toy: Any, x: torch.Tensor) -> torch.Tensor:
    """Which is export's to refuse."""
    return x + 1 if bool(x.sum() > 0) else x


HARMLESS = [
    made_on_its_device,
    made_anywhere,
    kept_where_it_is,
    attends,
    normalizes,
    autocast_off,
    autocast_of_its_device,
    float64_but_for_mps,
    counts,
    looks_at_values,
]


@pytest.mark.parametrize("code", HARMLESS)
def test_what_is_the_same_on_a_gpu_passes(code: Forward) -> None:
    ask(code)


@cuda
@pytest.mark.parametrize("code", [recurrent, multihead])
def test_layers_that_are_made_there_pass_without_a_driver(code: Forward) -> None:
    ask(code)


@cuda
def test_what_is_written_on_one_of_both_only_is_refused() -> None:
    with pytest.raises(CompileFailed, match="on a GPU: torch.Tensor.__setitem__ .*nothing more"):
        ask(written)


@cuda
def test_rows_laid_out_for_a_gpu_only_pass() -> None:
    ask(lambda toy, x: (x.t().contiguous() if x.is_cuda else x.t()) + 1)


@cuda
def test_what_is_computed_on_the_cpu_meanwhile_passes_and_an_answer_there_does_not() -> None:
    ask(lambda toy, x: (x.cpu() + 1).to(x.device))
    with pytest.raises(CompileFailed, match="answers something else on a GPU: .*not all of it"):
        ask(lambda toy, x: x.cpu() + 1)


# What is not


def device_type(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x.half().float() if x.device.type == "cuda" else x


def is_cuda(toy: Any, x: torch.Tensor) -> torch.Tensor:
    answer: torch.Tensor = toy.linear(x) * (2.0 if x.is_cuda else 1.0)
    return answer


def device_number(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x + x.get_device()


def device_of_a_weight(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x.relu() if toy.linear.weight.is_cuda else x.tanh()


def autocast_of_gpus(toy: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        answer: torch.Tensor = toy.linear(x)
    return answer


def autocast_asked_for(toy: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        on = torch.is_autocast_enabled("cuda")
    return x.bfloat16() if on else x


def available(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1 if torch.cuda.is_available() else x


def counted(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.cuda.device_count())


def accelerated(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1 if torch.accelerator.is_available() else x


def other_accumulator(toy: Any, x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, dtype=torch.float32 if x.is_cuda else torch.float64)


def written(toy: Any, x: torch.Tensor) -> torch.Tensor:
    answer = torch.zeros_like(x)
    if x.is_cuda:
        answer[0] = 1.0
    return answer


ASKING = [
    device_type,
    is_cuda,
    device_number,
    device_of_a_weight,
    autocast_of_gpus,
    autocast_asked_for,
    available,
    counted,
    accelerated,
    other_accumulator,
]


@pytest.mark.parametrize("code", ASKING)
def test_code_that_asks_for_the_device_is_refused_with_what_differs(code: Forward) -> None:
    with pytest.raises(CompileFailed) as caught:
        ask(code)
    found = re.fullmatch(
        r"source: Toy computes something else on a GPU: (.+), and on the CPU (.+)",
        str(caught.value),
    )
    assert found and found[1] != found[2]
    line = code.__code__.co_firstlineno
    named = [int(number) for number in re.findall(r"at test_device_code\.py:(\d+)", str(found[0]))]
    assert named and all(line < number < line + 6 for number in named), "it names the line"
    assert "--regions" in caught.value.hint


def test_a_capability_is_asked_for_as_well() -> None:
    def newest(toy: Any, x: torch.Tensor) -> torch.Tensor:
        new = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
        return x.bfloat16() if new else x

    ask(newest, 80)
    with pytest.raises(CompileFailed, match="bfloat16"):
        ask(newest, 90)


def test_an_answer_that_tells_of_the_device_is_refused() -> None:
    with pytest.raises(CompileFailed, match="answers something else on a GPU: .*True.*False"):
        ask(lambda toy, x: (x + 1, x.is_cuda))


def test_what_fails_on_one_of_both_only_is_refused_in_its_words() -> None:
    def raises(toy: Any, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            raise ValueError("there is no kernel for this")
        return x

    with pytest.raises(CompileFailed, match="fails on a GPU only: ValueError: there is no kernel"):
        ask(raises)


@cuda
def test_code_that_moves_to_a_gpu_by_itself_is_refused() -> None:
    with pytest.raises(CompileFailed, match="moves tensors to a GPU by itself.*test_device_code"):
        ask(lambda toy, x: x.to("cuda") + 1)


def test_a_module_is_left_as_it_was() -> None:
    toy = Toy(kept_where_it_is)
    table, weight = toy.table, toy.linear.weight
    require_same_on_gpu(toy, FACE, [torch.ones(6, 8)], 90)
    assert toy.table is table and type(table) is torch.Tensor and toy.count == 0
    assert toy.linear.weight is weight
    assert not torch.compiler.is_compiling()


# Real models


def plan(architecture: Architecture, dtype: str, device: torch.device = CPU) -> Plan:
    """The plan of a tiny model."""
    task = "generate" if architecture.generates else "forward"
    request = CompileRequest(task=task, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        architecture.config.save_pretrained(folder)
        source = load_source(Path(folder), request, CPU)
    return make_plan(source, request, device)


def ask_unit(source: Source, unit: GraphPlan, capability: int = 90) -> None:
    """Compare what a unit of a plan computes."""
    sizes = choose_trace_sizes(source, unit)
    tensors = unit.face.make_empty_inputs(sizes, "meta")
    with use_attention(source.model, choose_tracing_attention(source)):
        module = source.model.get_submodule(unit.region)
        require_same_on_gpu(module, unit.face, tensors, capability)


MODELS = ["llama", "qwen2", "gemma2", "gpt2", "bloom", "phi3", "falcon"]
MODELS += ["bert", "modernbert", "t5", "vit", "clip"]


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_the_same_on_a_gpu(name: str, dtype: str) -> None:
    made = plan(ARCHITECTURES[name], dtype)
    for unit in made.units:
        ask_unit(made.source, unit)


@cuda
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_for_a_gpu_that_is_not_there_has_the_graphs_of_one_for_the_cpu(name: str) -> None:
    here, there = (plan(ARCHITECTURES[name], "bfloat16", device) for device in (CPU, GPU))
    assert [(unit.id, unit.modules, unit.bounds) for unit in here.units] == [
        (unit.id, unit.modules, unit.bounds) for unit in there.units
    ]
    assert [unit.face for unit in here.units] == [unit.face for unit in there.units]


MIXTURES = {
    "mixtral": decoder("Mixtral", **GROUPED, num_local_experts=4),
    "qwen2_moe": decoder("Qwen2Moe", **GROUPED, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": decoder("Qwen3Moe", **GROUPED, **EXPERTS, head_dim=16),
    "olmoe": decoder("Olmoe", **GROUPED, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": decoder(
        "GptOss",
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granitemoe": decoder("GraniteMoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
}


@cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_the_same_on_a_gpu(name: str, dtype: str) -> None:
    made = plan(MIXTURES[name], dtype)
    for unit in made.units:
        ask_unit(made.source, unit)


@cuda
@pytest.mark.parametrize("name", KINDS)
def test_blocks_of_diffusers_are_the_same_on_a_gpu(name: str) -> None:
    model = KINDS[name].make()
    request = CompileRequest(calls=KINDS[name].calls(model))
    source, _ = make_source(model, request)
    for unit in make_plan(source, request, CPU).units:
        ask_unit(source, unit)


# Autocast


class Mixed(nn.Module):
    """A product in bfloat16, and one without, beside attention; it writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.linear(x)
        with torch.autocast(x.device.type, enabled=False):
            y = y.float() @ x.transpose(1, 2)
        kept.copy_(y)
        return F.scaled_dot_product_attention(x, x, x)


def test_regions_of_autocast_become_what_they_did() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    given = (torch.randn(2, 5, 8), torch.zeros(2, 5, 5))
    program = torch.export.export(
        Mixed().eval(), given, dynamic_shapes=({1: rows}, {1: rows, 2: rows}), strict=False
    )
    assert "wrap_with_autocast" in str(program.graph)
    settled = settle_autocast(program)
    code = str(settled.graph)
    assert "wrap_with_autocast" not in code
    assert "aten.scaled_dot_product_attention" in code, "which stays one node"
    assert settled.graph_signature.user_inputs_to_mutate
    (linear,) = [node for node in settled.graph.nodes if "aten.linear" in str(node.target)]
    assert linear.meta["val"].dtype == torch.bfloat16
    x = torch.randn(2, 9, 8)
    answers = [each.module()(x, torch.zeros(2, 9, 9)) for each in (program, settled)]
    assert torch.equal(*answers)
    assert settle_autocast(settled) is settled


def test_a_call_that_names_its_gpu_is_traced_where_its_tensors_are() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor, device: Any = None) -> torch.Tensor:
            return x + torch.ones(8, device=device)

    face = CallSignature(
        {"args": [{"tensor": 0}], "kwargs": {"device": {"device": "cuda:0"}}}, FACE.inputs
    )
    require_same_on_gpu(Named(), face, [torch.ones(6, 8)], 90)
