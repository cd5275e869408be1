"""Text: padded as the model wants it, in batches that the graph takes, never cut silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from bundles import describe, make_bundle
from tokenizers import Tokenizer

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Input
from hubaoti.errors import BadInput, ModelNotFound, OutOfBounds
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.text import TextEncoder, TextModel, shorten_text

CPU = torch.device("cpu")
SHORT, LONG = "cat", "the cat sits on the warm windowsill"


@pytest.fixture
def folder(minilm: Path, tmp_path: Path) -> Path:
    shutil.copy(minilm / "tokenizer.json", tmp_path)
    return tmp_path


def rewritten(folder: Path, **fields: object) -> Path:
    """The tokenizer with other fields."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def padding(direction: str, pad_id: int) -> dict[str, object]:
    return {
        "strategy": "BatchLongest",
        "direction": direction,
        "pad_to_multiple_of": 8,
        "pad_id": pad_id,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }


def test_ids_are_the_tokenizer_s_own_and_the_mask_says_which_are_real(folder: Path) -> None:
    encoded = TextEncoder(folder).encode([LONG, SHORT])
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    for row, text in enumerate((LONG, SHORT)):
        ids = own.encode(text).ids
        assert encoded.input_ids[row, : len(ids)].tolist() == ids
        assert encoded.attention_mask[row].tolist() == [1] * len(ids) + [0] * (
            encoded.input_ids.shape[1] - len(ids)
        )
    assert encoded.input_ids.dtype == encoded.attention_mask.dtype == torch.int64


def test_padding_stands_on_the_side_that_the_tokenizer_says(folder: Path) -> None:
    encoded = TextEncoder(rewritten(folder, padding=padding("Left", 9))).encode([LONG, SHORT])
    ids, mask = encoded.input_ids[1].tolist(), encoded.attention_mask[1].tolist()
    assert mask == sorted(mask)
    assert ids[: mask.count(0)] == [9] * mask.count(0) != []


@pytest.mark.parametrize(("given", "used"), [(None, 9), (1, 1), (0, 0)])
def test_padding_is_the_model_s_id_where_it_computes_with_it(
    given: int | None, used: int, folder: Path
) -> None:
    encoder = TextEncoder(rewritten(folder, padding=padding("Right", 9)), given)
    encoded = encoder.encode([LONG, SHORT])
    assert {*encoded.input_ids[encoded.attention_mask == 0].tolist()} == {used}


def test_a_tokenizer_without_padding_pads_with_zeros_on_the_right(folder: Path) -> None:
    encoded = TextEncoder(rewritten(folder, padding=None)).encode([LONG, SHORT])
    assert encoded.attention_mask[1, 0] == 1
    assert encoded.input_ids[1, -1] == 0


def test_a_tokenizer_s_own_truncation_is_not_used(folder: Path) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    encoder = TextEncoder(rewritten(folder, truncation=cut))
    assert encoder.encode([LONG]).input_ids.shape[1] > 4


def test_short_texts_are_padded_to_the_smallest_seq(folder: Path) -> None:
    encoded = TextEncoder(folder).encode([SHORT], low=11)
    assert encoded.input_ids.shape == (1, 11)
    assert encoded.attention_mask.sum() == 3


def test_a_text_beyond_the_bound_is_refused_with_its_tokens(folder: Path) -> None:
    encoder = TextEncoder(folder)
    tokens = encoder.encode([LONG]).input_ids.shape[1]
    assert encoder.encode([LONG], 2, tokens).input_ids.shape[1] == tokens
    with pytest.raises(OutOfBounds, match=f"has {tokens} tokens; .* up to {tokens - 1}") as caught:
        encoder.encode([SHORT, LONG], 2, tokens - 1)
    assert f"--dim seq=2:{tokens}" in caught.value.hint


def test_no_graph_is_proposed_for_more_positions_than_the_model_has(folder: Path) -> None:
    encoder = TextEncoder(folder)
    tokens = encoder.encode([LONG]).input_ids.shape[1]
    for config, told in (
        ({"max_position_embeddings": tokens - 1}, f"this one has {tokens - 1} positions"),
        ({"text_config": {"n_positions": tokens - 1}}, f"this one has {tokens - 1} positions"),
        ({"max_position_embeddings": tokens}, f"--dim seq=1:{tokens}"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(OutOfBounds) as caught:
            encoder.encode([LONG], high=4)
        assert told in caught.value.hint
        assert ("--dim" in caught.value.hint) == ("--dim" in told)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    text = b"caf\xe9".decode(errors="surrogateescape")  # as Python reads a command line
    with pytest.raises(BadInput, match="not UTF-8") as caught:
        TextEncoder(folder).encode([SHORT, text])
    assert caught.value.hint


def test_a_long_text_is_shown_by_its_beginning() -> None:
    assert shorten_text("a" * 40) == "a" * 40
    assert shorten_text("a" * 41) == "a" * 39 + "…"


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"model": 1}', b"\xff\xfe"])
def test_a_tokenizer_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json") as caught:
        TextEncoder(tmp_path)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


class FakeRunner:
    """Stands for native code: answers each row with its real tokens' sum; remembers its calls."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        ids, mask = inputs
        self.shapes.append(tuple(ids.shape))
        return [(ids * mask).sum(1, keepdim=True).float()]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {}

    def update_constant_buffer(self, *_: object) -> None:
        raise AssertionError("this graph has no constants")


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    make_bundle(tmp_path / "bundle")
    ids = Input(name="input_ids", dtype="int64", shape=("batch", "seq"), values="ids<30522")
    mask = msgspec.structs.replace(ids, name="attention_mask", values="mask")
    bounds = {"batch": (1, 4), "seq": (2, 24)}
    whole = describe(tmp_path / "bundle", "root")
    return msgspec.structs.replace(whole, inputs=(ids, mask), bounds=bounds)


def sums(folder: Path, texts: list[str]) -> Iterator[float]:
    encoder = TextEncoder(folder)
    for text in texts:
        yield float(encoder.encode([text]).input_ids.sum())


def test_more_texts_than_a_batch_takes_are_answered_in_their_order(
    runner: FakeRunner, entry: Entry, folder: Path
) -> None:
    model = TextModel(Graph(entry, runner, CPU), TextEncoder(folder))
    texts = [" ".join(["cat"] * (count % 7 + 1)) for count in range(10)]
    assert model(texts).flatten().tolist() == [*sums(folder, texts)]
    assert [shape[0] for shape in runner.shapes] == [4, 4, 2]


def test_fewer_texts_than_a_batch_takes_are_filled_up_and_the_filling_is_not_answered(
    runner: FakeRunner, entry: Entry, folder: Path
) -> None:
    entry = msgspec.structs.replace(entry, bounds={"batch": (3, 4), "seq": (2, 24)})
    model = TextModel(Graph(entry, runner, CPU), TextEncoder(folder))
    texts = [SHORT, LONG, SHORT, SHORT, LONG]
    assert model(texts).flatten().tolist() == [*sums(folder, texts)]
    assert [shape[0] for shape in runner.shapes] == [4, 3]


def test_no_text_is_no_question(runner: FakeRunner, entry: Entry, folder: Path) -> None:
    with pytest.raises(BadInput, match="no text") as caught:
        TextModel(Graph(entry, runner, CPU), TextEncoder(folder))([])
    assert caught.value.hint


def test_an_id_that_the_model_does_not_know_never_reaches_the_graph(
    runner: FakeRunner, entry: Entry, folder: Path
) -> None:
    few = [msgspec.structs.replace(item) for item in entry.inputs]
    few[0] = msgspec.structs.replace(few[0], values="ids<200")
    model = TextModel(
        Graph(msgspec.structs.replace(entry, inputs=tuple(few)), runner, CPU), TextEncoder(folder)
    )
    with pytest.raises(BadInput, match="ids below 200") as caught:
        model([SHORT])
    assert "--model" in caught.value.hint
    assert runner.shapes == []


def test_a_graph_of_other_inputs_takes_no_texts(
    runner: FakeRunner, entry: Entry, folder: Path
) -> None:
    odd = msgspec.structs.replace(entry.inputs[0], name="pixels")
    whole = msgspec.structs.replace(entry, inputs=(odd, entry.inputs[1]))
    with pytest.raises(BadInput, match="takes attention_mask, pixels, not texts") as caught:
        TextModel(Graph(whole, runner, CPU), TextEncoder(folder))
    assert caught.value.hint


def test_a_graph_without_dims_takes_no_texts(
    runner: FakeRunner, entry: Entry, folder: Path
) -> None:
    fixed = tuple(msgspec.structs.replace(item, shape=(1, "seq")) for item in entry.inputs)
    for inputs in (fixed, ()):
        whole = msgspec.structs.replace(entry, inputs=inputs, bounds={"seq": (2, 24)})
        with pytest.raises(BadInput, match="not texts"):
            TextModel(Graph(whole, runner, CPU), TextEncoder(folder))
