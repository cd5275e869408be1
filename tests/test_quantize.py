"""`hubaoti.runtime.quantize`: torchao's modules export, and plain torch makes their constants."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from hubaoti.compiler.precision import ScaledOnCpu
from hubaoti.errors import BadRequest, CompileFailed, MissingConstant, MissingDependency
from hubaoti.runtime import quantize as quantizing
from hubaoti.runtime.quantize import (
    Made,
    make_lowering_constant,
    make_quantized,
    quantize,
)
from hubaoti.runtime.recipes import FITS, RECIPES, LayerFit, check_recipe

CPU = torch.device("cpu")
GPU = ("cuda", 90)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Mlp(nn.Module):
    """Linear, gelu, Linear."""

    def __init__(self, width: int = 128, wide: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Decoder(nn.Module):
    """A Llama layer and its rotary table, as a function of hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama as llama

        config = LlamaConfig(
            hidden_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=256,
            attn_implementation="sdpa",
        )
        self.layer = llama.LlamaDecoderLayer(config, 0)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        tables = self.rotary(x, positions)
        return self.layer(x, attention_mask=mask[None, None], position_embeddings=tables)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        yield


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module with values of a trained model's size."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.05)
    return module.to(dtype).eval()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def relative(found: Tensor, expected: Tensor) -> float:
    """The size of a difference, by the size of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def assert_remade(module: nn.Module, made: dict[str, Made], before: dict[str, Tensor]) -> None:
    """Each new tensor is what `make_quantized` makes of the one before, bit for bit, as it lies."""
    after = tensors(module)
    assert after.keys() - before.keys() == made.keys()
    for fqn, each in made.items():
        source = before[each.source]
        assert (each.dtype, each.shape) == (str(source.dtype)[6:], tuple(source.shape))
        ours, theirs = make_quantized(each.transform, source.detach()), after[fqn].detach()
        assert (ours.dtype, ours.shape, ours.stride()) == (
            theirs.dtype,
            theirs.shape,
            theirs.stride(),
        )
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), fqn


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out, width", [(16, 128), (48, 384), (272, 1024), (1024, 256)])
@pytest.mark.parametrize("recipe", ["int8wo", "int4wo"])
def test_a_runtime_makes_torchao_s_constants_from_the_checkpoint_s(
    recipe: str, out: int, width: int, dtype: torch.dtype
) -> None:
    """Against torchao itself: `quantize` would put ours in its place."""
    module = nn.Sequential(nn.Linear(width, out)).to(dtype)
    module[0].weight[1] = 0  # a scale that would be zero
    module[0].weight[2] *= 1e-6
    module[0].weight[3] = module[0].weight[3].abs() * 40
    before = dict(tensors(module))
    parts = quantizing.quantize_with_torchao(module, recipe, CPU, {"0": module[0]})["0"]
    after = tensors(module)
    for at, part in enumerate(parts):
        theirs = after[f"0.parametrizations.weight.original{at}"]
        ours = make_quantized(f"{recipe}.{part}", before["0.weight"])
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours, theirs), part


@pytest.mark.parametrize("out, width", [(16, 16), (48, 384), (1024, 256)])
def test_float8_constants_are_torchao_s(out: int, width: int) -> None:
    module = nn.Sequential(nn.Linear(width, out)).to(torch.bfloat16)
    before = dict(tensors(module))
    quantizing.quantize_with_torchao(module, "float8dq", CPU, {"0": module[0]})
    values, scale = (tensors(module)[f"0.parametrizations.weight.original{at}"] for at in (0, 1))
    assert torch.equal(make_quantized("float8dq.qdata", before["0.weight"]).float(), values.float())
    assert torch.equal(make_quantized("float8dq.scale", before["0.weight"]), scale)


def test_in_float8_neither_a_row_nor_a_token_of_zeros_becomes_nan() -> None:
    """torchao alone divides both by zero."""
    module = Mlp().to(torch.bfloat16)
    module.up.weight[5] = 0
    before = dict(tensors(module))
    found = quantize(module, "float8dq", *GPU)
    assert_remade(module, found.made, before)
    assert not make_quantized("float8dq.qdata", before["up.weight"]).float()[5].any()
    token = torch.zeros(1, 2, 128, dtype=torch.bfloat16)
    with ScaledOnCpu():
        assert module(token).isfinite().all()


@pytest.mark.parametrize(
    "block, recipe, dtype, error",
    [
        (Mlp, "int8wo", torch.bfloat16, 0.03),
        (Mlp, "int4wo", torch.float32, 0.3),
        (Decoder, "int8wo", torch.float32, 0.02),
        (Decoder, "int4wo", torch.bfloat16, 0.3),
        (Decoder, "float8dq", torch.bfloat16, 0.1),
    ],
)
def test_a_quantized_block_exports_with_dynamic_batch_and_seq(
    block: type[nn.Module], recipe: str, dtype: torch.dtype, error: float
) -> None:
    module = filled(block(), dtype)
    original, before = copy.deepcopy(module), dict(tensors(module))
    linears = sum(isinstance(each, nn.Linear) for each in module.modules())
    found = quantize(module, recipe, *(GPU if recipe == "float8dq" else ("cpu",)))
    assert len({each.source for each in found.made.values()}) == linears
    assert found.left == {}
    assert_remade(module, found.made, before)
    assert all(type(each) in (Tensor, nn.Parameter) for each in tensors(module).values())

    x = torch.randn(2, 7, 128, dtype=dtype)
    dims = {0: Dim("batch", min=1, max=16), 1: Dim("seq", min=1, max=64)}
    program = export(module, (x,), dynamic_shapes=(dims,), strict=False)
    assert {*program.state_dict} >= {fqn for fqn in found.made if "original0" in fqn}
    for sizes in ((1, 1), (3, 33)):
        x = torch.randn(*sizes, 128, dtype=dtype)
        with ScaledOnCpu():
            assert torch.equal(program.module()(x), module(x))
            assert relative(module(x) - x, original(x) - x) < error


def test_a_module_that_is_a_linear_is_quantized_too() -> None:
    layer = nn.Linear(128, 16)
    found = quantize(layer, "int8wo", "cpu")
    assert found.made["parametrizations.weight.original0"] == Made(
        "weight", "int8wo.qdata", "float32", (16, 128)
    )
    assert layer(torch.randn(3, 128)).shape == (3, 16)


def test_what_does_not_fit_is_left_and_named() -> None:
    module = nn.ModuleDict(
        {
            "fits": nn.Linear(256, 32),
            "thin": nn.Linear(100, 32),
            "odd": nn.Linear(256, 10),
            "float64": nn.Linear(256, 32).double(),
            "attention": nn.MultiheadAttention(128, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(256, 32)),
        }
    )
    found = quantize(module, "int4wo", "cpu")
    assert {each.source for each in found.made.values()} == {"fits.weight"}
    assert found.left == {
        "thin": "in_features is 100, no multiple of 128",
        "odd": "out_features is 10, no multiple of 16",
        "float64": "its weight is float64, not float32 or bfloat16 or float16",
        "attention.out_proj": "the module around it reads its weight",
        "normed": "its weight is computed from others",
    }
    assert module["thin"](torch.randn(1, 100)).shape == (1, 32)


def test_a_tied_weight_is_left_since_its_other_holder_keeps_it() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(64, 128), "head": nn.Linear(128, 64)})
    module["up"] = nn.Linear(128, 64)
    module["head"].weight = module["embed"].weight
    found = quantize(module, "int8wo", "cpu")
    assert found.left == {"head": "its weight is embed.weight too, which stays"}
    assert module["head"].weight is module["embed"].weight


def test_fused_experts_stay_as_they_are() -> None:
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.randn(4, 256, 128))
    module.router = nn.Linear(128, 4)
    experts = module.gate_up_proj
    found = quantize(module, "int8wo", "cpu")
    assert {each.source for each in found.made.values()} == {"router.weight"}
    assert module.gate_up_proj is experts


@pytest.mark.parametrize(
    "module, words",
    [(nn.Sequential(nn.GELU()), "it has no Linear"), (nn.Linear(64, 16), "in_features is 64")],
)
def test_a_module_that_nothing_fits_is_refused(module: nn.Module, words: str) -> None:
    with pytest.raises(CompileFailed, match=words):
        quantize(module, "int4wo", "cpu")


@pytest.mark.parametrize(
    "recipe, device, sm, words, instead",
    [
        ("float8dq", "cpu", 0, "(?m)float8dq is for cuda sm89, not for cpu$", "int8wo or int4wo"),
        ("float8dq", "cuda", 80, "(?m)float8dq is for cuda sm89, not for cuda sm80$", "int8wo"),
        (
            "int4wo",
            "cuda",
            90,
            "for cpu, not for cuda sm90, since a GPU",
            "int8wo or float8dq",
        ),
        ("int4wo", "cuda", 86, "for cpu, not for cuda sm86, since a GPU", "int8wo"),
    ],
)
def test_a_device_that_cannot_is_refused_with_what_it_can(
    recipe: str, device: str, sm: int, words: str, instead: str
) -> None:
    with pytest.raises(CompileFailed, match=words) as refused:
        check_recipe(recipe, device, sm)
    assert refused.value.hint == f"try --quantize {instead}"
    with pytest.raises(CompileFailed, match=words):
        quantize(Mlp(), recipe, device, sm)


@pytest.mark.parametrize("sm", [89, 90, 120])
def test_what_fits_is_the_target_s(sm: int) -> None:
    """Not what this machine, which quantizes, could run."""
    module = nn.ModuleDict({"fits": nn.Linear(32, 16), "odd": nn.Linear(40, 16)}).bfloat16()
    module["wide"] = nn.Linear(32, 16)
    found = quantize(module, "float8dq", "cuda", sm)
    assert {each.source for each in found.made.values()} == {"fits.weight"}
    assert found.left == {
        "odd": "in_features is 40, no multiple of 16",
        "wide": "its weight is float32, not bfloat16",
    }


def test_an_unknown_recipe_names_the_near_one() -> None:
    with pytest.raises(BadRequest, match="int8w") as refused:
        check_recipe("int8w", "cpu")
    assert "int8wo" in refused.value.hint
    with pytest.raises(BadRequest) as refused:
        check_recipe("awq", "cpu")
    assert all(recipe in refused.value.hint for recipe in RECIPES)


def test_an_unknown_transform_is_a_newer_hubaoti_s() -> None:
    with pytest.raises(MissingConstant, match="int2wo.qdata") as refused:
        make_quantized("int2wo.qdata", torch.zeros(2, 2))
    assert "upgrade" in refused.value.hint


def test_without_torchao_compiling_says_so_and_running_does_not_care(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert make_quantized("int8wo.qdata", torch.ones(2, 128)).tolist() == [[127] * 128] * 2
    with pytest.raises(MissingDependency, match="torchao"):
        quantize(Mlp(), "int8wo", "cpu")


def test_a_torchao_that_means_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = quantizing.compute_int8_scale
    monkeypatch.setitem(quantizing.MAKERS, "int8wo.scale", lambda weight: other(weight) * 1.01)
    with pytest.raises(CompileFailed, match="int8wo.scale of up.weight"):
        quantize(Mlp(), "int8wo", "cpu")
    monkeypatch.setitem(quantizing.MAKERS, "int8wo.scale", lambda weight: other(weight).half())
    with pytest.raises(CompileFailed, match="int8wo.scale of up.weight"):
        quantize(Mlp(), "int8wo", "cpu")


def test_a_torchao_that_fails_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITS, "int4wo", {"cpu": LayerFit(sizes=(1, 128))})
    with pytest.raises(CompileFailed, match="dividable by 16"):
        quantize(nn.Linear(128, 10), "int4wo", "cpu")


def test_the_lowering_s_own_constant_is_the_size_of_a_group() -> None:
    group = make_lowering_constant("int4wo", CPU, "constant17")
    assert group is not None
    assert (int(group), group.dtype, group.shape) == (128, torch.int64, torch.Size([]))
    assert make_lowering_constant("int4wo", CPU, "up.weight") is None
    assert make_lowering_constant("int8wo", CPU, "constant17") is None


def test_inductor_s_options_stay_as_they_were() -> None:
    """torchao would set those that it recommends, and no manifest would tell."""
    from torch._inductor import config

    before = config.save_config_portable()
    for recipe in ("int8wo", "int4wo"):
        quantize(Mlp(), recipe, "cpu")
    assert config.save_config_portable() == before


QUIETLY = """
import torch
from hubaoti.runtime.quantize import quantize
quantize(torch.nn.Linear(128, 16), "int8wo", "cpu")
"""


def test_torchao_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", QUIETLY], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.gpu
@pytest.mark.parametrize("out, width", [(16, 128), (96, 384), (1024, 4096)])
@pytest.mark.parametrize("recipe", ["int8wo", "float8dq"])
def test_on_a_gpu_a_runtime_makes_the_same_constants(recipe: str, out: int, width: int) -> None:
    """As were made on the CPU for it, bit for bit."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    module = nn.Sequential(nn.Linear(width, out)).to(torch.bfloat16)
    before = dict(tensors(module))
    found = quantize(module, recipe, "cuda", 90)
    assert_remade(module, found.made, before)
    for fqn, each in found.made.items():
        made = make_quantized(each.transform, before[each.source].detach().cuda()).cpu()
        ours = tensors(module)[fqn].detach()
        assert torch.equal(made.view(torch.uint8), ours.view(torch.uint8)), fqn
