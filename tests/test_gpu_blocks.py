"""`scripts/gpu_blocks`: one form of a block compiled on a CPU, and what its checks would see."""

import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import gpu_blocks
import gpu_llama
from gpu_blocks import Form, checks_of
from gpu_llama import Size
from gpu_road import Failed, Line, Road, run_all, run_one

from hubaoti import api
from hubaoti.settings import Settings

BOTH = Form("block-both", task="generate", quantize="int8wo")  # all that a form can be, at once
ANSWERS = ("output", "keys", "values")
FROM = ("float32 eager", "float32 of int8wo")


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """What the checks share."""
    return Road("cpu", tmp_path_factory.mktemp("road"), ExitStack())


@pytest.fixture(scope="module")
def of(road: Road) -> gpu_llama.Llama:
    """The block, narrow."""
    return gpu_llama.llama(road)


@pytest.fixture(scope="module")
def lines(road: Road) -> dict[str, Line]:
    """How the checks of a quantized block over its cache end here; it is compiled once."""
    return {line.name.split()[1]: line for line in run_all([*checks_of(BOTH)], road)}


@pytest.mark.slow
def test_a_quantized_block_over_its_cache_passes_on_a_cpu(lines: dict[str, Line]) -> None:
    ends = {name: (line.result, line.why) for name, line in lines.items()}
    assert ends.pop("memory") == ("skipped", "memory is counted on a GPU only")
    assert ends == dict.fromkeys(("compile", "golden", "open", "answer", "time"), ("passed", ""))
    assert lines["compile"].facts["recipe"] == "float32-sdpa-int8wo"
    assert lines["compile"].facts["graphs"] == {
        "model.layers": ("model.layers.0", "model.layers.1")
    }
    assert lines["open"].facts["made"] == ["int8wo.qdata", "int8wo.scale"]


@pytest.mark.slow
def test_its_answers_and_writes_are_compared_at_every_size(lines: dict[str, Line]) -> None:
    facts = lines["answer"].facts
    assert [*facts] == [str(size) for size in gpu_blocks.FEW_STEPS]
    for each in facts.values():
        assert (
            {*each["hubaoti"]}
            == {*each["eager"]}
            == {f"{a} from {b}" for a in ANSWERS for b in FROM}
        )
        # Eight bits are seen from float32; beside that the graph is as near as eager is.
        assert 1e-4 < each["hubaoti"][f"output from {FROM[0]}"] < 0.1
        assert each["hubaoti"][f"output from {FROM[1]}"] < 1e-5


@pytest.mark.slow
def test_its_time_stands_beside_those_of_eager_and_torch_compile(lines: dict[str, Line]) -> None:
    ((size, found),) = lines["time"].facts.items()
    assert size == "3x8 at 32 of 64"
    assert {*found["times"]} == {"eager", "torch.compile dynamic", "torch.compile", "hubaoti"}
    assert found["lost"] == {}


@pytest.mark.slow
def test_golden_answers_of_another_graph_fail(road: Road, lines: dict[str, Line]) -> None:
    file = road.made[BOTH.name, "bundle"].path / "golden.safetensors"
    kept = load_file(file)
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    save_file({name: tensor * 1.1 for name, tensor in kept.items()}, file)
    check = next(each for each in checks_of(BOTH) if each.name.endswith("golden"))
    try:
        line = run_one(check, road)
    finally:
        save_file(kept, file)
    assert line.result == "failed" and "is off by" in line.why


@pytest.mark.slow
def test_a_graph_bound_to_other_weights_fails(road: Road, lines: dict[str, Line]) -> None:
    made = road.made[BOTH.name]
    constants = gpu_blocks.constants_of(
        made.graph, made.of.block, road.made[BOTH.name, "bundle"].path
    )
    norm = "input_layernorm.weight"
    made.graph.bind(constants | {norm: constants[norm] * 1.001})
    try:
        with pytest.raises(
            Failed, match="1x1 at 16 of 64: output from float32 of int8wo"
        ) as caught:
            gpu_blocks.answered(road, BOTH)
    finally:
        made.graph.bind(constants)
    assert [*caught.value.facts] == [str(size) for size in gpu_blocks.FEW_STEPS]


def test_a_recipe_that_this_device_cannot_have_is_skipped_with_the_reason(road: Road) -> None:
    form = next(form for form in gpu_blocks.FORMS if form.quantize == "float8dq")
    lines = [*run_all([*checks_of(form)], road)]
    assert {line.result for line in lines} == {"skipped"}
    assert "needs cuda 8.9; here is cpu" in lines[0].why


@pytest.mark.parametrize("task", ["forward", "generate"])
def test_calls_are_what_the_graph_of_a_form_takes(
    road: Road, of: gpu_llama.Llama, task: str, tmp_path: Path
) -> None:
    form = Form("form", task=task)
    told = api.explain(
        gpu_llama.write_config(road, tmp_path / "llama"),
        task=task,
        regions="auto",
        dims=form.dims(road),
        settings=Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9"),
    )
    (graph,) = told.graphs
    for size in form.sizes(road):
        known = gpu_llama.inputs_at(of, size)
        dims = {"batch": size.batch, "seq": size.seq, "filled": size.filled, "cache": size.cache}
        for name, shape in graph["inputs"].items():
            assert [*known[name].shape] == [dims.get(each, each) for each in shape]
            assert known[name].is_contiguous()


def test_every_token_sees_itself_and_nothing_after_it(of: gpu_llama.Llama) -> None:
    known = gpu_llama.inputs_at(of, Size(3, 8, 32, 64))
    seen, whole = known["attention_mask"], known["whole_mask"]
    assert torch.equal(whole[..., :32], seen) and not whole[..., 32:].any()
    rows = torch.arange(8)
    assert seen[:, 0, rows, 24 + rows].all()
    assert not any(seen[:, 0, row, 25 + row :].any() for row in range(7))
    assert seen[0].sum() > seen[-1].sum()  # a row that is padded on the left


def test_eager_over_a_cache_answers_as_eager_without_one(of: gpu_llama.Llama) -> None:
    held = gpu_llama.inputs_at(of, Size(3, 8, 8, 64))
    plain = {name: held[name] for name in held if name not in {"keys", "values"}}
    plain["whole_mask"] = held["attention_mask"]
    over = gpu_llama.answers(of, of.block, held)
    assert {*over} == {"output", "keys", "values"}
    torch.testing.assert_close(over["output"], gpu_llama.answers(of, of.block, plain)["output"])


def test_a_write_beside_the_new_places_is_seen(of: gpu_llama.Llama) -> None:
    known = gpu_llama.inputs_at(of, Size(1, 1, 16, 64))
    after = {name: known[name].clone() for name in ("keys", "values")}
    after["keys"][:, :, 15] = 7
    assert gpu_llama.elsewhere(known, after) == []
    after["values"][0, 0, 16, 0] += 1
    assert gpu_llama.elsewhere(known, after) == ["values"]


@pytest.mark.parametrize("ours, wrong", [(1.4e-2, False), (2e-2, True), (float("nan"), True)])
def test_a_graph_may_be_off_as_eager_of_its_dtype_is(ours: float, wrong: bool) -> None:
    found = {"hubaoti": {"keys": ours}, "eager": {"keys": 9e-3}, "elsewhere": []}
    told = [*gpu_blocks.problems("4x1", found, "bfloat16")]
    assert bool(told) is wrong
    assert all("4x1: keys" in each and "bfloat16 eager 9.0e-03" in each for each in told)


def test_a_side_that_cannot_start_hides_no_other() -> None:
    def breaks() -> Any:
        raise RuntimeError("no such kernel\nand more")

    started, lost = gpu_blocks.first_calls({"torch.compile": breaks, "hubaoti": lambda: None})
    assert [*started] == ["hubaoti"]
    words = gpu_blocks.in_words(Size(1, 1), {"hubaoti": {"median": 2.0}}, lost)
    assert words == "1x1: 2.000 ms, torch.compile failed (RuntimeError: no such kernel)"


def test_two_equal_blocks_that_became_two_graphs_fail() -> None:
    graphs = [SimpleNamespace(id=name, modules=(name,)) for name in ("a", "b")]
    with pytest.raises(Failed, match="two equal blocks"):
        gpu_blocks.described(SimpleNamespace(graphs=graphs))
