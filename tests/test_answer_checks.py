"""What a manifest says of a graph's answers has to be so, when it is first opened and called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from bundles import put_trusted
from test_golden import FakeRunner, block

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Output, Outputs
from hubaoti.errors import BadInput, NotTried
from hubaoti.mirror import Mirror
from hubaoti.runtime.answer_checks import read_dim_sizes, require_described
from hubaoti.runtime.first_open import require_sound
from hubaoti.runtime.golden import (
    answer_golden_inputs,
    ask_golden,
    choose_smallest_dims,
    make_golden_constants,
    make_golden_inputs,
)
from hubaoti.runtime.graph import Graph
from hubaoti.settings import Settings

CPU, NOWHERE = torch.device("cpu"), Path("/nowhere")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    settings = Settings(home=tmp_path / "home", endpoint="http://127.0.0.1:9")
    with Mirror.open(settings.mirror) as found:
        yield found


def claiming(entry: Entry, **fields: Any) -> Entry:
    """A graph's entry that says something else of its first answer."""
    output = msgspec.structs.replace(entry.outputs.tensors[0], **fields)
    tensors = (output, *entry.outputs.tensors[1:])
    outputs = msgspec.structs.replace(entry.outputs, tensors=tensors)
    return msgspec.structs.replace(entry, outputs=outputs)


LIES = {
    "another dtype": {"dtype": "float16"},
    "another size": {"shape": ("batch", "seq", 12)},
    "a dim that is another": {"shape": ("batch", "cache", 32)},
    "fewer axes": {"shape": ("batch", "seq")},
    "more than a dim": {"shape": ("batch", "seq+1", 32)},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_the_manifest_does_not_describe_is_refused(lie: str) -> None:
    entry = claiming(block(), **LIES[lie])
    with pytest.raises(BadInput, match=r"layers answers float32 \[1, 1, 32\] as output") as caught:
        ask_golden(Graph(entry, FakeRunner(), CPU), NOWHERE)
    assert "its manifest says" in str(caught.value)
    assert "compile it again" in caught.value.hint


def test_golden_questions_do_not_rely_on_the_graph_for_it() -> None:
    graph = Graph(claiming(block(), dtype="float16"), FakeRunner(), CPU)
    graph.bind(make_golden_constants(graph.entry, NOWHERE, CPU))
    graph.is_called = True  # as a program that stands for a graph has no such check
    with pytest.raises(BadInput, match="its manifest says float16"):
        answer_golden_inputs(graph)


def test_a_size_that_nobody_knows_may_be_any() -> None:
    ask_golden(Graph(claiming(block(), shape=(None, "seq", None)), FakeRunner(), CPU), NOWHERE)


@pytest.mark.parametrize("lie", LIES)
def test_a_first_call_tells_where_no_question_was_asked(lie: str) -> None:
    """A graph whose bytes were tried before, with another manifest, is not tried again."""
    honest = block()
    graph = Graph(claiming(honest, **LIES[lie]), FakeRunner(), CPU)
    graph.bind(make_golden_constants(honest, NOWHERE, CPU))
    inputs = make_golden_inputs(honest, choose_smallest_dims(honest) | {"batch": 3})
    for _ in range(2):
        with pytest.raises(BadInput, match=r"answers float32 \[3, 1, 32\] as output at batch=3"):
            graph(*inputs)


def test_dims_are_read_of_the_inputs_and_of_what_follows_from_them() -> None:
    entry = block()
    shapes = ("2*seq+1", "batch"), ("batch", "seq+filled")
    inputs = [
        msgspec.structs.replace(entry.inputs[0], shape=shape, name=f"{at}")
        for at, shape in enumerate(shapes)
    ]
    entry = msgspec.structs.replace(entry, inputs=tuple(inputs))
    sizes = read_dim_sizes(entry, [torch.zeros(7, 5), torch.zeros(5, 9)])
    assert sizes == {"seq": 3, "batch": 5}
    output = Output(name="x", dtype="float32", shape=("filled", "seq+batch"))
    entry = msgspec.structs.replace(entry, outputs=Outputs(template=None, tensors=(output,)))
    require_described(entry, [torch.zeros(99, 8)], sizes)
    with pytest.raises(BadInput):
        require_described(entry, [torch.zeros(99, 9)], sizes)


def test_calls_after_the_first_are_not_asked() -> None:
    entry = block()
    graph = Graph(entry, FakeRunner(), CPU)
    graph.bind(make_golden_constants(entry, NOWHERE, CPU))
    inputs = make_golden_inputs(entry, choose_smallest_dims(entry))
    graph(*inputs)
    graph.entry = claiming(entry, dtype="float16")
    graph(*inputs)


def test_a_lie_about_the_answer_is_told_by_the_first_open_and_held_against_no_graph(
    decoder_bundle: Bundle, mirror: Mirror
) -> None:
    honest = decoder_bundle.manifest
    graphs = (claiming(honest.graphs[0], dtype="float16"), *honest.graphs[1:])
    lying = Bundle(decoder_bundle.path, msgspec.structs.replace(honest, graphs=graphs))
    artifact = put_trusted(lying, mirror)
    with pytest.raises(NotTried, match="its manifest says float16"):
        require_sound(artifact, mirror, CPU, lambda _: None)
    good = put_trusted(decoder_bundle, mirror)
    require_sound(good, mirror, CPU, lambda _: None)
