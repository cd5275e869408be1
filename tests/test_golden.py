"""Golden answers: a graph that anyone opens is asked the same, and what differs is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Cache, Constant, ConstantOrigin, Input, Output, Outputs
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput, MissingConstant
from hubaoti.runtime import golden
from hubaoti.runtime.golden import (
    GOLDEN,
    LARGEST_GOLDEN,
    answer_golden_inputs,
    ask_golden,
    choose_smallest_dims,
    choose_tolerances,
    compare_golden_answers,
    describe_golden,
    estimate_answer_memory,
    load_expected,
    make_golden_constants,
    make_golden_inputs,
    pack_four_bits,
    sample_answers,
    sample_tensor,
)
from hubaoti.runtime.graph import Graph, open_graph
from hubaoti.runtime.input_checks import check_constant
from hubaoti.runtime.synthetic import make_synthetic

CPU = torch.device("cpu")
WEIGHT = Constant(
    fqn="up.weight",
    dtype="float32",
    shape=(48, 32),
    stride=(1, 48),
    origin=ConstantOrigin(checkpoint=("up.weight",)),
)
STATIC = Cache(kind="static", keys=2, values=3, position=4)


def block(**fields: Any) -> Entry:
    """A decoder block's graph, with a static cache."""
    entry = Entry(
        id="layers",
        file="graphs/layers.pt2",
        sha256="0" * 64,
        size=1,
        members=(),
        modules=("model.layers.0",),
        bounds={"batch": (1, 16), "seq": (1, 64), "filled": (1, 512), "cache": (16, 512)},
        call={},
        inputs=(
            Input(name="hidden_states", dtype="float32", shape=("batch", "seq", 32), values="real"),
            Input(name="mask", dtype="bool", shape=("batch", 1, "seq", "filled"), values="mask"),
            cached("keys"),
            cached("values"),
            Input(name="position", dtype="int64", shape=("seq",), values="position"),
        ),
        outputs=Outputs(
            template={"tensor": 0},
            tensors=(Output(name="output", dtype="float32", shape=("batch", "seq", 32)),),
        ),
        constants=(WEIGHT,),
        cache=STATIC,
    )
    return msgspec.structs.replace(entry, **fields)


def cached(name: str) -> Input:
    return Input(
        name=name, dtype="float32", shape=("batch", 2, "cache", 8), values="real", mutated=True
    )


class FakeRunner:
    """Stands for native code: writes the new places of the cache, answers with their sum."""

    def __init__(self, outputs: int = 1) -> None:
        self.outputs = outputs
        self.weight = torch.zeros(48, 32)

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        hidden, mask, keys, values, position = inputs
        keys[:, :, position] = hidden[:, None, :, :8]
        values[:, :, position] = hidden[:, None, :, 8:16]
        looked = keys[:, :, : mask.shape[-1]].sum() + self.weight.sum()
        return [hidden + looked] * self.outputs

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {"up_weight": "up.weight"}

    def update_constant_buffer(self, tensors: dict[str, torch.Tensor], *_: object) -> None:
        self.weight = tensors["up_weight"]


# Dims and inputs


def test_the_smallest_dims_are_the_bounds_lows_and_hold_a_cache() -> None:
    bounds = {"batch": (0, 4), "seq": (5, 64), "filled": (1, 512), "cache": (2, 512)}
    assert choose_smallest_dims(block(bounds=bounds)) == {
        "batch": 1,
        "seq": 5,
        "filled": 5,
        "cache": 5,
    }
    assert choose_smallest_dims(block()) == {"batch": 1, "seq": 1, "filled": 1, "cache": 16}
    assert choose_smallest_dims(block(bounds=bounds, cache=None))["filled"] == 1


def test_the_smallest_dims_are_multiples_of_their_steps() -> None:
    bounds = {"batch": (1, 4), "seq": (5, 64), "filled": (1, 512), "cache": (2, 512)}
    steps = {"batch": 2, "seq": 3, "cache": 16}
    found = choose_smallest_dims(block(bounds=bounds, steps=steps))
    assert found == {"batch": 2, "seq": 6, "filled": 6, "cache": 16}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_inputs_are_valid_at_any_dims(given: st.DataObject) -> None:
    seq = given.draw(st.integers(1, 20))
    filled = given.draw(st.integers(seq, 40))
    cache = given.draw(st.integers(filled, 64))
    sizes = {"batch": given.draw(st.integers(1, 3)), "seq": seq, "filled": filled, "cache": cache}
    hidden, mask, keys, values, position = make_golden_inputs(block(), sizes)
    assert position.tolist() == [*range(filled - seq, filled)]
    assert position.max() < cache
    assert mask.any(-1).all()
    assert mask[..., -1, :].all(), "the last token sees all that is filled"
    seen = torch.arange(filled) <= position[:, None]
    assert (mask == seen).all(), "a token sees those before it, and itself"
    assert hidden.isfinite().all()
    assert keys.shape == values.shape == (sizes["batch"], 2, cache, 8)
    assert keys.ne(values).any()


def test_a_sliding_cache_is_asked_for_its_window_and_the_new_places() -> None:
    inputs = list(block().inputs)
    inputs[1] = msgspec.structs.replace(inputs[1], shape=("batch", 1, "seq", "cache+seq-1"))
    cache = Cache(kind="sliding", keys=2, values=3, position=4, window=16)
    entry = block(inputs=tuple(inputs), cache=cache)
    found = make_golden_inputs(entry, {"batch": 1, "seq": 3, "filled": 1, "cache": 16})
    assert found[1].shape == (1, 1, 3, 18)
    assert found[4].tolist() == [0, 1, 2]


def test_without_a_mask_positions_end_with_the_cache() -> None:
    inputs = (
        block().inputs[0],
        msgspec.structs.replace(block().inputs[1], values="real"),
        *block().inputs[2:],
    )
    found = make_golden_inputs(
        block(inputs=inputs), {"batch": 1, "seq": 3, "filled": 3, "cache": 16}
    )
    assert found[4].tolist() == [13, 14, 15]


def test_dims_that_are_missing_or_impossible_are_named() -> None:
    with pytest.raises(BadInput, match="'filled'"):
        make_golden_inputs(block(), {"batch": 1, "seq": 1, "cache": 4})
    hidden = msgspec.structs.replace(block().inputs[0], shape=("batch", "seq-9", 32))
    entry = block(inputs=(hidden, *block().inputs[1:]))
    with pytest.raises(BadInput, match=r"seq-9.* at .*'seq': 1"):
        make_golden_inputs(entry, choose_smallest_dims(entry))


# Constants


def test_constants_lie_as_the_manifest_says() -> None:
    (found,) = make_golden_constants(block(), Path("/nowhere"), CPU).values()
    check_constant(WEIGHT, found, CPU)
    assert torch.equal(found, make_synthetic("up.weight", (48, 32), torch.float32, "constant"))


def test_a_shipped_constant_is_the_artifact_s(tmp_path: Path) -> None:
    place = torch.arange(48 * 32, dtype=torch.float32).view(48, 32)
    save_file({"up.weight": place, "other": torch.zeros(1)}, tmp_path / "buffers.safetensors")
    shipped = msgspec.structs.replace(WEIGHT, origin=ConstantOrigin(file="buffers.safetensors"))
    (found,) = make_golden_constants(block(constants=(shipped,)), tmp_path, CPU).values()
    check_constant(shipped, found, CPU)
    assert torch.equal(found, place)
    for wrong in ({"fqn": "down.weight"}, {"shape": (32, 48)}):
        lacking = msgspec.structs.replace(shipped, **wrong)
        with pytest.raises(MissingConstant, match=lacking.fqn):
            make_golden_constants(block(constants=(lacking,)), tmp_path, CPU)


def test_four_bit_weights_are_the_same_on_every_cpu() -> None:
    """What lies in memory differs between CPUs, so it is read back through the kernel."""
    constant = msgspec.structs.replace(
        WEIGHT,
        fqn="up.parametrizations.weight.original0",
        dtype="uint8",
        shape=(592, 256),
        stride=(256, 1),
        origin=ConstantOrigin(checkpoint=("up.weight",), transform="int4wo.qdata"),
    )
    (packed,) = make_golden_constants(block(constants=(constant,)), Path("/nowhere"), CPU).values()
    scales = torch.tensor([1.0, 0.0]).expand(4, 592, 2).contiguous()
    read = torch.ops.aten._weight_int4pack_mm_for_cpu(torch.eye(512), packed, 128, scales).T
    weight = make_synthetic(constant.fqn, (128, 512), torch.float32)
    groups = weight.view(128, 4, 128)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    steps = (groups - low) / ((high - low) / 15) - 8
    assert (read[:128] - steps.view(128, 512)).abs().max() <= 0.5 + 1e-4
    assert torch.equal(read[384:512], read[:128])
    assert torch.equal(read[512:], read[:80])


def test_four_bit_weights_of_few_rows_are_packed_too() -> None:
    packed = torch.zeros(16, 128, dtype=torch.uint8)
    pack_four_bits(packed, "up")
    assert packed.unique().numel() > 100


# Memory and tolerances


def test_memory_is_more_than_what_is_counted() -> None:
    sizes = {"batch": 2, "seq": 3, "filled": 5, "cache": 16}
    counted = 4 * (48 * 32 + 2 * 2 * 3 * 32 + 2 * 2 * 2 * 16 * 8) + 2 * 3 * 5 + 3 * 8
    found = estimate_answer_memory(block(), sizes)
    assert counted + 4 * 48 * 32 < found
    assert found - estimate_answer_memory(block(constants=()), sizes) == 2 * 4 * 48 * 32
    large = estimate_answer_memory(block(), sizes | {"cache": 32768})
    assert large - found > 2 * 2 * 2 * 32000 * 8 * 4


def test_the_coarsest_dtype_sets_the_tolerance() -> None:
    answers = {"layers/output": torch.zeros(1), "layers/ids": torch.zeros(1, dtype=torch.int64)}
    assert choose_tolerances(block(), answers) == {"layers/output": 1e-3, "layers/ids": 0.0}
    coarse = msgspec.structs.replace(WEIGHT, dtype="bfloat16")
    found = choose_tolerances(block(constants=(WEIGHT, coarse)), answers)
    assert found == {"layers/output": 6e-2, "layers/ids": 0.0}


# Samples


def test_a_sample_goes_from_the_first_to_the_last() -> None:
    tensor = torch.arange(100_000).view(100, 1000)
    found = sample_tensor(tensor, 333)
    assert found.shape == (333,)
    assert found[0] == 0
    assert found[-1] == 99_999
    assert 299 <= found.diff().min() <= found.diff().max() <= 302
    assert (found % 1000).unique().numel() > 100, "of many columns"
    assert sample_tensor(tensor, 100_000) is tensor
    assert sample_tensor(tensor, 1).tolist() == [0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=12), st.integers(1, 60))
def test_all_answers_together_have_a_limit(lengths: list[int], long: int) -> None:
    answers = {
        f"{'n' * long}/{at}": torch.zeros(length, dtype=torch.bfloat16)
        for at, length in enumerate(lengths)
    }
    found = sample_answers(answers)
    assert [*found] == [*answers]
    assert len(save(found)) <= LARGEST_GOLDEN
    share = LARGEST_GOLDEN // len(answers) - 300
    for name, tensor in found.items():
        assert tensor.nbytes >= min(answers[name].nbytes, share), "small ones are whole"
    assert compare_golden_answers(answers, found, {}) == []


def test_a_wrong_tail_is_noticed_in_a_sample() -> None:
    logits = make_synthetic("logits", (1, 16, 152_064), torch.float32)
    golden = sample_answers({"root/logits": logits})
    assert golden["root/logits"].nbytes > 0.9 * LARGEST_GOLDEN
    for wrong in (logits[..., -1:], logits[:, -1:], logits[:, :1, :100]):
        before = wrong.clone()
        wrong += 1
        assert compare_golden_answers({"root/logits": logits}, golden, {"root/logits": 1e-3})
        wrong.copy_(before)
    assert not compare_golden_answers({"root/logits": logits}, golden, {"root/logits": 1e-3})


# Differences


def told(found: torch.Tensor, theirs: torch.Tensor, allowed: float = 0.01) -> list[str]:
    return compare_golden_answers({"g/y": found}, {"g/y": theirs}, {"g/y": allowed})


def test_a_difference_within_its_tolerance_is_none() -> None:
    theirs = torch.tensor([1.0, -100.0, 0.0])
    assert told(theirs + 0.9, theirs) == []
    (reason,) = told(theirs + 2, theirs)
    assert reason == "g/y is off by 2.0e-02 of its largest value; 1e-02 is allowed"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_near(wrong: float) -> None:
    theirs = torch.tensor([1.0, 2.0])
    assert told(torch.tensor([1.0, wrong]), theirs, 1e9)
    assert told(theirs, torch.tensor([1.0, wrong]), 1e9)
    same = torch.tensor([1.0, wrong])
    assert told(same, same.clone()) == []


def test_another_shape_or_dtype_or_none_at_all_is_named() -> None:
    theirs = torch.zeros(2, 3)
    assert told(torch.zeros(3, 2), theirs) == ["g/y is float32 [3, 2]; expected is float32 [2, 3]"]
    assert "bfloat16" in told(theirs.bfloat16(), theirs)[0]
    assert told(torch.zeros(2, 4), theirs)
    assert told(torch.zeros(2, 2), theirs)
    assert compare_golden_answers({}, {"g/y": theirs}, {}) == ["g/y is missing"]
    assert compare_golden_answers({"g/y": theirs}, {}, {}) == ["there is no golden answer"]


def test_whole_numbers_must_be_equal() -> None:
    theirs = torch.tensor([1000, 2])
    assert told(theirs.clone(), theirs, 0.0) == []
    assert told(theirs + 1, theirs, 0.0)


def test_every_difference_is_told() -> None:
    theirs = {name: torch.ones(2) for name in ("a/x", "a/y", "b/x")}
    found = {"a/x": torch.zeros(2), "a/y": torch.ones(2), "b/x": torch.zeros(2)}
    assert [line[:3] for line in compare_golden_answers(found, theirs, {})] == ["a/x", "b/x"]


def test_a_file_of_answers_is_read_by_graph(tmp_path: Path) -> None:
    names = [f"layers/{name}" for name in ("keys", "values", "output")]
    answers = {name: torch.ones(2) for name in names}
    save_file(answers | {"layers-step/output": torch.zeros(2)}, tmp_path / GOLDEN)
    found = load_expected(block(), tmp_path)
    assert sorted(found) == sorted(names)
    assert torch.equal(found["layers/output"], torch.ones(2))
    for name in names:  # what is not asked, or asked of nothing, would be answered by anything
        for odd in ({}, {name: torch.zeros(0)}):
            others = {each: tensor for each, tensor in answers.items() if each != name}
            save_file(others | odd, tmp_path / GOLDEN)
            with pytest.raises(MissingConstant, match=f"has no {name}"):
                load_expected(block(), tmp_path)


def test_a_file_that_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingConstant, match=GOLDEN):
        load_expected(block(), tmp_path)
    (tmp_path / GOLDEN).write_bytes(b"golden" * 9)
    with pytest.raises(MissingConstant, match=GOLDEN):
        load_expected(block(), tmp_path)


# Graphs


def test_a_block_s_answers_are_its_cache_and_its_output() -> None:
    entry = block()
    found = ask_golden(Graph(entry, FakeRunner(), CPU), Path("/nowhere"))
    assert [*found] == ["layers/keys", "layers/values", "layers/output"]
    hidden, _, keys, _, position = make_golden_inputs(entry, choose_smallest_dims(entry))
    assert torch.equal(found["layers/keys"][0, 0, position[0]], hidden[0, 0, :8])
    assert torch.equal(found["layers/keys"][:, :, 1:], keys[:, :, 1:])


def test_the_manifest_s_dims_are_asked_before_the_smallest() -> None:
    first = ask_golden(Graph(block(), FakeRunner(), CPU), Path("/nowhere"))
    described = describe_golden(block(), first)
    assert described.dims == choose_smallest_dims(block())
    assert described.tolerances == dict.fromkeys(first, 1e-3)
    assert described.memory == estimate_answer_memory(block(), described.dims)
    dims = {"seq": 2, "filled": 7}
    entry = block(golden=msgspec.structs.replace(described, dims=dims))
    found = ask_golden(Graph(entry, FakeRunner(), CPU), Path("/nowhere"))
    assert found["layers/output"].shape == (1, 2, 32)


def test_a_graph_that_gives_too_little_is_told() -> None:
    golden = ask_golden(Graph(block(), FakeRunner(), CPU), Path("/nowhere"))
    found = ask_golden(Graph(block(), FakeRunner(0), CPU), Path("/nowhere"))
    assert compare_golden_answers(found, golden, {}) == ["layers/output is missing"]


def test_two_answers_of_one_name_are_refused() -> None:
    output = Output(name="keys", dtype="float32", shape=("batch", "seq", 32))
    entry = block(outputs=Outputs(template={"tensor": 0}, tensors=(output,)))
    with pytest.raises(BadInput, match="layers has two answers of one name"):
        ask_golden(Graph(entry, FakeRunner(), CPU), Path("/nowhere"))


def test_complex_answers_are_pairs() -> None:
    assert golden.to_plain(torch.ones(3, dtype=torch.complex64)).tolist() == [[1.0, 0.0]] * 3


@pytest.fixture(scope="module")
def entry(roberta_bundle: Bundle) -> Entry:
    return roberta_bundle.manifest.graphs[0]


def test_a_compiled_graph_is_tested_without_weights(
    roberta_bundle: Bundle, roberta_unpacked: Path, entry: Entry, tmp_path: Path
) -> None:
    graph = open_graph(roberta_unpacked, entry, CPU)
    answers = ask_golden(graph, roberta_bundle.path)
    save_file(sample_answers(answers), tmp_path / GOLDEN)
    described = describe_golden(entry, answers)
    assert (tmp_path / GOLDEN).stat().st_size <= LARGEST_GOLDEN
    theirs, allowed = load_expected(entry, tmp_path), described.tolerances
    assert theirs.keys() == allowed.keys() == answers.keys()
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in theirs.values())

    again = ask_golden(open_graph(roberta_unpacked, entry, CPU), roberta_bundle.path)
    assert all(torch.equal(again[name], answers[name]) for name in answers)
    assert compare_golden_answers(again, theirs, allowed) == []

    last = next(reversed(again))
    again[last].view(-1)[-1] += 0.01 * again[last].abs().max()
    assert compare_golden_answers(again, theirs, allowed)

    unnoticed = []
    constants = make_golden_constants(entry, roberta_bundle.path, CPU)
    for fqn, tensor in constants.items():
        graph.bind(constants | {fqn: torch.zeros_like(tensor)})
        if not compare_golden_answers(answer_golden_inputs(graph), theirs, allowed):
            unnoticed.append(fqn)
    # A softmax takes no notice of the keys' bias; the types of the tokens are zeros as it is.
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in unnoticed] == [
        "embeddings",
        "key",
    ]
