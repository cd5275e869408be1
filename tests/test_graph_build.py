"""Unit: one graph of a plan, from modules without memory to a block that generates text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import hubaoti
from serving import Form, serving
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.package import unpack_all
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.compiler.from_config import Source, load_source
from hubaoti.compiler.materialize import lend_memory
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest
from hubaoti.compiler.traced import choose_trace_sizes, require_same_programs, trace_unit
from hubaoti.errors import BadInput, CompileFailed, OutOfBounds
from hubaoti.runtime import golden
from hubaoti.runtime.graph import Graph, open_graph
from hubaoti.settings import Settings, override_environment

CPU = torch.device("cpu")
GENERATE = CompileRequest(task="generate")


@pytest.fixture(scope="module")
def entry(decoder_bundle: Bundle) -> Entry:
    (graph,) = decoder_bundle.manifest.graphs
    return graph


@pytest.fixture(scope="module")
def unpacked(decoder_bundle: Bundle, entry: Entry, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("decoder") / "graph"
    unpack_all(decoder_bundle.path / entry.file, folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny_decoder: Path) -> Any:
    """The decoder with its own weights, in eager."""
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()


# What the bundle says


def test_two_equal_blocks_are_one_graph_that_serves_both(
    decoder_bundle: Bundle, entry: Entry
) -> None:
    decoder_bundle.check()
    manifest = decoder_bundle.manifest
    assert (manifest.program.task, manifest.build.regions) == ("generate", "auto")
    assert str(manifest.recipe) == "float32-sdpa"
    assert entry.id == "model.layers"
    assert entry.modules == ("model.layers.0", "model.layers.1")
    assert entry.bounds == {"batch": (1, 4), "seq": (1, 40), "filled": (1, 64), "cache": (16, 64)}


def test_a_decoder_s_graph_takes_its_cache_and_writes_it(entry: Entry) -> None:
    assert entry.cache is not None and entry.cache.position is not None
    assert entry.cache.kind == "static"
    keys, values = entry.inputs[entry.cache.keys], entry.inputs[entry.cache.values]
    assert keys.shape == values.shape == ("batch", 2, "cache", 8)
    assert [item.name for item in entry.inputs if item.mutated] == [keys.name, values.name]
    assert entry.inputs[entry.cache.position].values == "position"
    (mask,) = [item for item in entry.inputs if item.values == "mask"]
    assert (mask.dtype, mask.shape) == ("bool", ("batch", 1, "seq", "filled"))


def test_a_block_s_constants_are_named_as_in_the_block(entry: Entry, model: Any) -> None:
    own = dict(model.model.layers[1].named_parameters())
    assert {constant.fqn for constant in entry.constants} == own.keys()
    for constant in entry.constants:
        assert constant.origin.module == constant.fqn
        assert constant.origin.checkpoint == (constant.fqn,)
        assert constant.shape == tuple(own[constant.fqn].shape)


def test_every_corner_was_checked_and_what_was_written_with_it(decoder_bundle: Bundle) -> None:
    dims = [check.dims for check in decoder_bundle.manifest.checks]
    for name, size in {"batch": 4, "seq": 40, "filled": 64, "cache": 64}.items():
        assert any(each[name] == size for each in dims), name
    assert all(d["seq"] <= d["filled"] <= d["cache"] for d in dims)
    assert all(c.max_relative <= c.tolerance for c in decoder_bundle.manifest.checks)


def test_the_bundle_is_small(decoder_bundle: Bundle) -> None:
    assert decoder_bundle.manifest.size < 2 << 20


def test_its_golden_answers_are_what_it_answers(
    decoder_bundle: Bundle, entry: Entry, unpacked: Path
) -> None:
    assert entry.golden is not None
    expected = golden.load_expected(entry, decoder_bundle.path)
    assert {name.partition("/")[2] for name in expected} == {"keys", "values", "output"}
    found = golden.ask_golden(open_graph(unpacked, entry, CPU), decoder_bundle.path)
    assert golden.compare_golden_answers(found, expected, entry.golden.tolerances) == []
    wrong = {name: tensor + 1 for name, tensor in found.items()}
    assert len(golden.compare_golden_answers(wrong, expected, entry.golden.tolerances)) == 3


@pytest.mark.slow
def test_two_builds_of_one_key_have_the_same_graphs_byte_for_byte(
    decoder_bundle: Bundle, tiny_decoder: Path, built_at: Settings, tmp_path: Path
) -> None:
    """By another process, at another home, in another folder, with another seed for hashes."""
    words = [
        "--task",
        "generate",
        "--dim",
        "batch=1:4",
        "--dim",
        "seq=1:40",
        "--dim",
        "cache=16:64",
        "--force",
        "-q",
    ]
    settings = replace(built_at, home=tmp_path / "home")
    with override_environment(PYTHONHASHSEED="7"):
        done = hubaoti(settings, "compile", tiny_decoder, "-o", "again", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    again = Bundle.read(tmp_path / "again").manifest
    assert again.key == decoder_bundle.manifest.key
    hashes = [
        {graph.id: graph.sha256 for graph in m.graphs} for m in (again, decoder_bundle.manifest)
    ]
    assert hashes[0] == hashes[1]


# Generation


def opened(entry: Entry, unpacked: Path, block: nn.Module) -> Graph:
    """A graph of its own for a block, bound to the block's own tensors."""
    graph = open_graph(unpacked, entry, CPU)
    graph.bind({constant.fqn: block.get_parameter(constant.fqn) for constant in entry.constants})
    return graph


@contextmanager
def by_graphs(model: Any, entry: Entry, unpacked: Path) -> Iterator[list[Form]]:
    """All blocks of a model answer by their graphs."""
    forms = {
        path: Form(
            entry.call,
            entry.inputs,
            entry.cache,
            opened(entry, unpacked, model.get_submodule(path)),
        )
        for path in entry.modules
    }
    with serving(model, {path: {"static": form} for path, form in forms.items()}):
        yield [*forms.values()]


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
    """Greedy tokens with a static cache of 48 places."""
    cache = StaticCache(config=model.config, max_cache_len=48)
    cache.early_initialization(ids.shape[0], 2, 8, torch.float32, CPU)
    found = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
        disable_compile=True,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    more.setdefault("logits", []).extend(found.logits)
    return found.sequences  # type: ignore[no-any-return]


PROMPTS = {
    "one text": [[5, 6, 7, 8]],
    "one token": [[9]],
    "three of one length": [[5, 6, 7], [8, 9, 10], [11, 12, 13]],
    "padded on the left": [[0, 0, 0, 101, 7], [101, 8, 9, 10, 11]],
}


@pytest.mark.parametrize("case", PROMPTS)
def test_it_generates_the_tokens_that_eager_does(
    case: str, model: Any, entry: Entry, unpacked: Path
) -> None:
    ids = torch.tensor(PROMPTS[case])
    mask = (ids != 0).long()
    logits: dict[str, list[torch.Tensor]] = {"eager": [], "served": []}
    expected = generated(model, ids, mask, logits=logits["eager"])
    with by_graphs(model, entry, unpacked) as served:
        found = generated(model, ids, mask, logits=logits["served"])
    assert [each.calls for each in served] == [20, 20]
    assert torch.equal(found, expected)
    for ours, theirs in zip(logits["served"], logits["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def decoding(
    entry: Entry, batch: int = 2, seq: int = 3, filled: int = 5, cache: int = 16
) -> list[torch.Tensor]:
    """Inputs of the block's graph."""
    sizes = {"batch": batch, "seq": seq, "filled": filled, "cache": cache}
    return golden.make_golden_inputs(entry, sizes)


@pytest.fixture(scope="module")
def graph(entry: Entry, unpacked: Path, model: Any) -> Graph:
    return opened(entry, unpacked, model.model.layers[0])


def test_only_the_given_places_of_a_cache_are_written(entry: Entry, graph: Graph) -> None:
    assert entry.cache is not None
    inputs = decoding(entry)
    keys = inputs[entry.cache.keys]
    before = keys.clone()
    graph(*inputs)
    changed = (keys != before).any(-1).any(1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [[2, 3, 4]] * 2


def test_what_lies_beyond_the_filled_places_does_not_matter(entry: Entry, graph: Graph) -> None:
    assert entry.cache is not None
    inputs, other = decoding(entry), decoding(entry)
    for at in (entry.cache.keys, entry.cache.values):
        other[at][:, :, 5:] = float("nan")
    assert torch.equal(graph(*inputs)[0], graph(*other)[0])


def test_a_longer_cache_answers_the_same(entry: Entry, graph: Graph) -> None:
    assert entry.cache is not None
    short, long = decoding(entry, cache=16), decoding(entry, cache=64)
    for at in (entry.cache.keys, entry.cache.values):
        long[at][:, :, :16] = short[at]
    torch.testing.assert_close(graph(*short)[0], graph(*long)[0])


def test_more_than_the_cache_holds_is_refused(entry: Entry, graph: Graph) -> None:
    with pytest.raises(OutOfBounds, match="filled is 17, the cache holds 16"):
        graph(*decoding(entry, filled=17))


def test_a_part_of_a_cache_is_refused(entry: Entry, graph: Graph) -> None:
    """Its strides are others, and writes through them would go elsewhere."""
    assert entry.cache is not None
    inputs = decoding(entry, cache=32)
    inputs[entry.cache.keys] = inputs[entry.cache.keys].narrow(2, 0, 16)
    inputs[entry.cache.values] = inputs[entry.cache.values].narrow(2, 0, 16)
    with pytest.raises(BadInput, match="keys is written by the graph"):
        graph(*inputs)


def test_a_place_beyond_the_cache_is_not_written(entry: Entry, graph: Graph) -> None:
    assert entry.cache is not None and entry.cache.position is not None
    inputs = decoding(entry, filled=16)
    inputs[entry.cache.position] += 1
    with pytest.raises(BadInput, match="position 16 is outside of a cache of 16 places"):
        graph(*inputs)


# The steps before it is compiled


@pytest.fixture(scope="module")
def bare(tiny_decoder: Path) -> Source:
    """The decoder without memory."""
    return load_source(tiny_decoder, GENERATE, CPU)


def blocks_of(source: Source) -> list[nn.Module]:
    return [source.model.get_submodule(f"model.layers.{at}") for at in range(2)]


def test_members_that_compute_something_else_are_refused(bare: Source) -> None:
    """What a group's signature did not see, the programs of two of its members say."""
    (unit,) = make_plan(bare, GENERATE, CPU).units
    blocks = blocks_of(bare)
    with lend_memory(blocks, CPU, live=False) as (module, twin):
        first = trace_unit(bare, unit, module, True)
        require_same_programs(first, trace_unit(bare, unit, twin, True), unit)
        attention: Any = twin.get_submodule("self_attn")
        before = attention.scaling
        attention.scaling = before * 2
        other = trace_unit(bare, unit, twin, True)
        attention.scaling = before
    with pytest.raises(CompileFailed, match=r"model\.layers\.0 and model\.layers\.1") as caught:
        require_same_programs(first, other, unit)
    assert "--regions model.layers.0" in caught.value.hint


def test_it_is_traced_at_sizes_of_a_call_where_they_fit(bare: Source) -> None:
    """Sizes of a module's calls may go together only; a size of one would be taken for constant."""
    (unit,) = make_plan(bare, GENERATE, CPU).units
    recorded = {"batch": (1, 2), "seq": (5, 7), "filled": (9, 11), "cache": (16, 20)}
    source = replace(bare, recorded=recorded)
    assert choose_trace_sizes(source, unit) == {"batch": 2, "seq": 7, "filled": 11, "cache": 20}
    beyond = replace(bare, recorded={**recorded, "batch": (40, 50)})
    assert choose_trace_sizes(beyond, unit) == choose_trace_sizes(bare, unit)
