"""Forms of a block: compiled, asked again, opened, compared, timed; what the checks would see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu import blocks, llama
from gpu.blocks import SPARE, Form, Opened
from gpu.conftest import Found
from gpu.llama import Size
from gpu.measure import QUEUED, Peak, stopwatch, time_calls
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.runtime import golden
from hubaoti.runtime.graph import open_graph
from hubaoti.settings import Settings

BOTH = Form("block-both", task="generate", quantize="int8wo")  # all that a form can be, at once
ANSWERS = ("output", "keys", "values")
CPU = torch.device("cpu")
FROM = ("float32 eager", "float32 of int8wo")


def list_cases(every: bool) -> tuple[Form, ...]:
    """The forms that are checked: on a GPU all, else one that is several of them at once."""
    return blocks.FORMS if every else (BOTH,)


@pytest.fixture(scope="module")
def bundle(device: torch.device, case: Form, folder: Path, offline: Settings) -> Bundle:
    """Compiled from the config alone; hubaoti compares with eager of the same dtype itself."""
    blocks.skip_impossible(case.quantize, device)
    return blocks.compile_with_report(
        llama.write_config(device, folder / f"llama-{device.type}"),
        folder / "bundles" / f"{case.name}-{device.type}",
        task=case.task,
        regions="auto",
        dims=case.make_dims(device),
        dtype=llama.choose_dtype(device),
        quantize=case.quantize,
        mode=case.mode,
        device=str(device),
        settings=offline,
    )


@pytest.fixture(scope="module")
def graph(bundle: Bundle, device: torch.device, folder: Path) -> Any:
    """Its graph, opened and not bound."""
    (entry,) = bundle.manifest.graphs
    unpacked = folder / "unpacked" / bundle.path.name
    unpack_all(bundle.path / entry.file, unpacked)
    return lambda: open_graph(unpacked, entry, device)


@pytest.fixture(scope="module")
def opened(bundle: Bundle, graph: Any, device: torch.device, case: Form) -> Opened:
    """Its graph, bound to a block by reference where nothing has to be made."""
    of = llama.make_llama(device)
    found = graph()
    found.bind(blocks.collect_constants(found, of.block, bundle.path))
    peer, exact = of.block, {"float32 eager": of.exact}
    if case.quantize:
        peer = llama.quantize_block(of.block, case.quantize)
        exact[f"float32 of {case.quantize}"] = llama.round_weights(peer, of.exact)
    return Opened(found, of, peer, exact)


def test_compile(bundle: Bundle, case: Form, found: Found) -> None:
    said, facts = blocks.describe_manifest(bundle.manifest)
    found(said, **facts)
    if case is BOTH:
        assert facts["recipe"].endswith("-sdpa-int8wo")
    assert facts["graphs"] == {"model.layers": ("model.layers.0", "model.layers.1")}


def test_golden(bundle: Bundle, graph: Any, device: torch.device, found: Found) -> None:
    """Asked again, the golden questions have the answers that the bundle ships."""
    opened = graph()
    asked = opened.entry.golden
    peak = Peak.of(device) if device.type == "cuda" else None
    wrong = compare_golden(opened, bundle)
    facts = {"dims": asked.dims, "tolerances": asked.tolerances, "memory": asked.memory}
    found(f"as shipped at {asked.dims}", **facts, device_peak_bytes=peak.bytes if peak else None)
    assert not wrong, "; ".join(wrong)


def compare_golden(opened: Any, bundle: Bundle) -> list[str]:
    """What is wrong with a graph's answers to the golden questions."""
    answers = golden.ask_golden(opened, bundle.path)
    expected = golden.load_expected(opened.entry, bundle.path)
    return golden.compare_golden_answers(answers, expected, opened.entry.golden.tolerances)


def test_golden_answers_of_another_graph_fail(bundle: Bundle, graph: Any) -> None:
    file = bundle.path / "golden.safetensors"
    kept = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({name: tensor * 1.1 for name, tensor in kept.items()}, file)
    try:
        wrong = compare_golden(graph(), bundle)
    finally:
        save_file(kept, file)
    assert "is off by" in "; ".join(wrong)


def test_open(opened: Opened, graph: Any, bundle: Bundle, case: Form, found: Found) -> None:
    with stopwatch() as opening:
        again = graph()
    with stopwatch() as binding:
        again.bind(blocks.collect_constants(again, opened.of.block, bundle.path))
    constants = again.entry.constants
    made = sorted({each.origin.transform for each in constants if each.origin.transform})
    said = f"{opening[0]:.2f} ms, bound in {binding[0]:.1f} ms"
    said += f", of {len(constants)} constants some made: {', '.join(made)}" if made else ""
    found(said, open_ms=opening[0], bind_ms=binding[0], made=made)
    wanted = ["int8wo.qdata", "int8wo.scale"] if case.quantize == "int8wo" else made
    assert made == wanted and bool(made) is bool(case.quantize)


def test_answer(opened: Opened, case: Form, device: torch.device, found: Found) -> None:
    """Every size against float32 eager, beside eager of the same dtype; writes to a cache too."""
    facts = blocks.compare_sizes(opened, case, device)
    found(blocks.word_worst(facts), **facts)
    assert not facts["problems"], "; ".join(facts["problems"])
    assert [*facts] == [*map(str, case.list_sizes(device)), "problems"]
    if case is not BOTH:
        return
    for size in case.list_sizes(device):
        ours, theirs = facts[str(size)]["hubaoti"], facts[str(size)]["eager"]
        assert {*ours} == {*theirs} == {f"{a} from {b}" for a in ANSWERS for b in FROM}
        # Eight bits are seen from float32; beside that the graph is as near as eager is.
        assert 1e-4 < ours[f"output from {FROM[0]}"] < 0.1
        assert ours[f"output from {FROM[1]}"] < 1e-5


def test_a_graph_bound_to_other_weights_fails(
    opened: Opened, bundle: Bundle, case: Form, device: torch.device
) -> None:
    if device.type == "cuda":
        pytest.skip("a thousandth is less than bfloat16 tells apart")
    constants = blocks.collect_constants(opened.graph, opened.of.block, bundle.path)
    norm = "input_layernorm.weight"
    opened.graph.bind(constants | {norm: constants[norm] * 1.001})
    try:
        facts = blocks.compare_sizes(opened, case, device)
    finally:
        opened.graph.bind(constants)
    first = str(case.list_sizes(device)[0])
    words = f"{first}: output from float32" + (f" of {case.quantize}" if case.quantize else "")
    assert any(words in problem for problem in facts["problems"])
    assert [*facts][:-1] == [str(size) for size in case.list_sizes(device)]


@pytest.mark.gpu("memory is counted on a GPU only")
def test_memory(opened: Opened, case: Form, device: torch.device, found: Found) -> None:
    if case.task != "generate":
        pytest.skip("it writes into no cache")
    facts = {str(size): blocks.weigh(opened, size) for size in case.list_sizes(device)}
    words = {
        size: f"{size}: {each['hubaoti'] / 1e6:.1f} MB, eager {each['eager'] / 1e6:.1f}"
        for size, each in facts.items()
    }
    found("; ".join(words.values()), **facts)
    over = [size for size, each in facts.items() if each["hubaoti"] > each["eager"] + SPARE]
    assert not over, "; ".join(words[size] for size in over)


def test_time(opened: Opened, case: Form, device: torch.device, found: Found) -> None:
    """A call through eager, `torch.compile` and hubaoti, in turn, several behind each other."""
    modules, caches = blocks.make_sides(device, case, opened.peer), dict[int, Any]()
    facts, said = dict[str, Any](), []
    with torch._dynamo.config.patch(recompile_limit=blocks.RECOMPILES), torch.no_grad():
        for size in case.list_timed(device):
            known = llama.make_inputs(opened.of, size)
            # Another cache of the same shape would be compiled for again.
            if size.batch not in caches:
                caches[size.batch] = llama.fill_cache(opened.of, known)
            cache = caches[size.batch]
            calls = {name: llama.bind_eager(each, known, cache) for name, each in modules.items()}
            calls["hubaoti"] = llama.bind_graph(opened.graph, known)
            started, lost = blocks.start_calls(calls)
            times = time_calls(device, started, pace=QUEUED)
            facts[str(size)] = {"times": times, "lost": lost}
            said.append(blocks.word_times(size, times, lost))
    torch._dynamo.reset()
    found("; ".join(said), **facts)
    assert not any("hubaoti" in each["lost"] for each in facts.values()), "; ".join(said)
    if case is BOTH and device.type == "cpu":
        assert [*facts] == ["3x8 at 32 of 64"] and facts["3x8 at 32 of 64"]["lost"] == {}
        sides = {"eager", "torch.compile dynamic", "torch.compile", "hubaoti"}
        assert {*facts["3x8 at 32 of 64"]["times"]} == sides


# What the checks would see, with nothing compiled


@pytest.fixture(scope="module")
def of() -> llama.Llama:
    """The block, narrow."""
    return llama.make_llama(CPU)


def test_a_recipe_that_this_device_cannot_have_is_skipped_with_the_reason() -> None:
    with pytest.raises(pytest.skip.Exception, match="is for cuda sm89, not for cpu"):
        blocks.skip_impossible("float8dq", CPU)


@pytest.mark.parametrize("task", ["forward", "generate"])
def test_calls_are_what_the_graph_of_a_form_takes(
    of: llama.Llama, task: str, tmp_path: Path, offline: Settings
) -> None:
    form = Form("form", task=task)
    explained = api.explain(
        llama.write_config(CPU, tmp_path / "llama"),
        task=task,
        regions="auto",
        dims=form.make_dims(CPU),
        settings=offline,
    )
    (graph,) = explained.graphs
    for size in form.list_sizes(CPU):
        known = llama.make_inputs(of, size)
        dims = {"batch": size.batch, "seq": size.seq, "filled": size.filled, "cache": size.cache}
        for name, shape in graph["inputs"].items():
            assert [*known[name].shape] == [dims.get(each, each) for each in shape]
            assert known[name].is_contiguous()


def test_every_token_sees_itself_and_nothing_after_it(of: llama.Llama) -> None:
    known = llama.make_inputs(of, Size(3, 8, 32, 64))
    seen, whole = known["attention_mask"], known["whole_mask"]
    assert torch.equal(whole[..., :32], seen) and not whole[..., 32:].any()
    rows = torch.arange(8)
    assert seen[:, 0, rows, 24 + rows].all()
    assert not any(seen[:, 0, row, 25 + row :].any() for row in range(7))
    assert seen[0].sum() > seen[-1].sum()  # a row that is padded on the left


def test_eager_over_a_cache_answers_as_eager_without_one(of: llama.Llama) -> None:
    held = llama.make_inputs(of, Size(3, 8, 8, 64))
    plain = {name: held[name] for name in held if name not in {"keys", "values"}}
    plain["whole_mask"] = held["attention_mask"]
    over = llama.answer_eagerly(of, of.block, held)
    assert {*over} == {"output", "keys", "values"}
    torch.testing.assert_close(over["output"], llama.answer_eagerly(of, of.block, plain)["output"])


def test_a_write_beside_the_new_places_is_seen(of: llama.Llama) -> None:
    known = llama.make_inputs(of, Size(1, 1, 16, 64))
    after = {name: known[name].clone() for name in ("keys", "values")}
    after["keys"][:, :, 15] = 7
    assert llama.find_other_writes(known, after) == []
    after["values"][0, 0, 16, 0] += 1
    assert llama.find_other_writes(known, after) == ["values"]


@pytest.mark.parametrize("ours, wrong", [(1.4e-2, False), (2e-2, True), (float("nan"), True)])
def test_a_graph_may_be_off_as_eager_of_its_dtype_is(ours: float, wrong: bool) -> None:
    found = {"hubaoti": {"keys": ours}, "eager": {"keys": 9e-3}, "elsewhere": []}
    problems = [*blocks.list_problems("4x1", found, "bfloat16")]
    assert bool(problems) is wrong
    assert all("4x1: keys" in each and "bfloat16 eager 9.0e-03" in each for each in problems)


def test_a_side_that_cannot_start_hides_no_other() -> None:
    def breaks() -> Any:
        raise RuntimeError("no such kernel\nand more")

    started, lost = blocks.start_calls({"torch.compile": breaks, "hubaoti": lambda: None})
    assert [*started] == ["hubaoti"]
    words = blocks.word_times(Size(1, 1), {"hubaoti": {"median": 2.0}}, lost)
    assert words == "1x1: 2.000 ms, torch.compile failed (RuntimeError: no such kernel)"


def test_two_equal_blocks_that_became_two_graphs_fail() -> None:
    graphs = [SimpleNamespace(id=name, modules=(name,)) for name in ("a", "b")]
    with pytest.raises(AssertionError, match="two equal blocks"):
        blocks.describe_manifest(SimpleNamespace(graphs=graphs))
