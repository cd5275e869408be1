"""Quantized weights for GPUs that are not here: built, and asked what they answer."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.compiler.options import find_measuring, merge_options, refuse_measuring
from hubaoti.compiler.precision import InFloat32, ScaledOnCpu, multiply_scaled
from hubaoti.errors import BadRequest, CompileFailed
from hubaoti.runtime.quantize import quantize
from hubaoti.settings import Settings


class Gate(nn.Module):
    """Two products, of which one has a bias, and what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def make_module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Gate().to(torch.bfloat16).eval().requires_grad_(False)


def compile_module(recipe: str, capabilities: str, folder: Path) -> list[Bundle]:
    module = make_module()
    with hubaoti.capture(module) as calls:
        module(torch.zeros(2, 12, 64, dtype=torch.bfloat16))
        module(torch.zeros(3, 5, 64, dtype=torch.bfloat16))
    settings = Settings.from_env({"HUBAOTI_HOME": str(folder / "home"), "HOME": str(folder)})
    shapes = {"x": ("batch", "seq", None)}
    words = {"calls": calls, "shapes": shapes, "quantize": recipe, "settings": settings}
    return [*hubaoti.compile_for(module, capabilities, folder / "bundles", **words)]  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["int8wo", pytest.param("float8dq", marks=pytest.mark.slow)])
def bundles(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Bundle]:
    capabilities = {"int8wo": "sm80,sm90,sm120", "float8dq": "sm90,sm120"}[request.param]
    return compile_module(request.param, capabilities, tmp_path_factory.mktemp(request.param))


@pytest.mark.cuda
def test_a_quantized_graph_for_a_gpu_answers_as_eager_does(bundles: list[Bundle]) -> None:
    for bundle in bundles:
        (graph,) = bundle.manifest.graphs
        assert graph.not_interpreted is msgspec.UNSET
        checks = bundle.manifest.checks
        on_cpu = [each for each in checks if each.where == "cpu"]
        assert {each.dtype for each in on_cpu} >= {"float32"}
        assert all(each.max_relative <= 1e-4 for each in on_cpu if each.dtype == "float32")
        interpreted = [each for each in checks if each.where == "interpreted"]
        assert len({tuple(each.dims.items()) for each in interpreted}) >= 3


@pytest.mark.cuda
def test_its_constants_are_made_of_the_checkpoint_s_weights(bundles: list[Bundle]) -> None:
    for bundle in bundles:
        (graph,) = bundle.manifest.graphs
        recipe = bundle.manifest.build.quantization
        made = {c.origin.transform for c in graph.constants if c.origin.transform}
        assert made == {f"{recipe}.qdata", f"{recipe}.scale"}


@pytest.mark.cuda
@pytest.mark.parametrize(
    "recipe, capabilities, words",
    [("float8dq", "sm90,sm80", "cuda sm89, not for cuda sm80"), ("int4wo", "sm90", "own")],
)
def test_what_a_gpu_cannot_is_refused_before_anything_is_built(
    recipe: str, capabilities: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(CompileFailed, match=words) as refused:
        compile_module(recipe, capabilities, tmp_path)
    assert "int8wo" in refused.value.hint
    assert not (tmp_path / "home" / "stand-in").exists()


def test_what_is_measured_is_refused_for_gpus_that_are_not_here() -> None:
    for options in (
        merge_options("max-autotune", (), "cuda"),
        merge_options("default", ["coordinate_descent_tuning=true"], "cuda"),
    ):
        with pytest.raises(BadRequest, match="coordinate_descent_tuning.*GPU itself"):
            refuse_measuring(options)
    assert not find_measuring(merge_options("default", (), "cuda"))
    refuse_measuring(merge_options("reduce-overhead", (), "cuda"))


# Products of scaled tensors


@pytest.mark.parametrize("biased", [False, True])
def test_a_scaled_product_is_that_of_the_matrices_that_it_stands_for(biased: bool) -> None:
    torch.manual_seed(5)
    left = torch.randn(5, 32).to(torch.float8_e4m3fn)
    right = torch.randn(16, 32).to(torch.float8_e4m3fn).t()
    rows, columns = torch.rand(5, 1) + 0.5, torch.rand(1, 16) + 0.5
    bias = torch.randn(16, dtype=torch.bfloat16) if biased else None
    expected = (left.float() * rows) @ (right.float() * columns)
    expected = expected if bias is None else expected + bias.float()
    found = multiply_scaled(left, right, rows, columns, bias, None, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    with InFloat32(), ScaledOnCpu():
        wide = torch._scaled_mm(left, right, rows, columns, bias, None, torch.bfloat16)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)


def test_a_float8_program_needs_no_torchao_and_answers_as_its_module() -> None:
    from hubaoti.compiler.scales import write_out_scales

    module = make_module()
    quantize(module, "float8dq", "cuda", 90)
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    dims = {0: torch.export.Dim("batch", max=9), 1: torch.export.Dim("seq", max=99)}
    program = torch.export.export(module, (x,), dynamic_shapes=(dims,), strict=False)
    write_out_scales(program)
    assert not [node for node in program.graph.nodes if str(node.target).startswith("torchao")]
    for sizes in ((1, 1), (3, 33)):
        x = torch.randn(*sizes, 64, dtype=torch.bfloat16)
        x[0, 0] = 0
        with torch.no_grad(), ScaledOnCpu():
            assert torch.equal(program.module()(x), module(x))
        with torch.no_grad(), InFloat32(), ScaledOnCpu():
            assert torch.equal(program.module(check_guards=False)(x.float()), module(x.float()))
