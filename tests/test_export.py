"""Export: one trace for every size of the dims, or words that say why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hubaoti.compiler.export import constraint, export
from hubaoti.compiler.request import Range
from hubaoti.compiler.source import Source, load
from hubaoti.compiler.verify import attempt
from hubaoti.errors import BadDim, CompileFailed

CPU = torch.device("cpu")
DIMS = {"batch": Range(1, 8), "seq": Range(2, 32)}


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Source:
    """A model whose forward the tests replace."""
    return load(tiny_llama, None, "float32", CPU)


class Odd(nn.Module):
    """A model of ids and mask that does one odd thing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.register_buffer("seen", torch.zeros(()))


class WritesItsBuffer(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        seen: Any = self.seen
        seen.add_(1)
        return (self.embedding(input_ids) * seen * attention_mask.unsqueeze(-1),)


class ReplacesItsBuffer(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        self.seen = self.seen + input_ids.shape[1]
        return (self.embedding(input_ids) * self.seen * attention_mask.unsqueeze(-1),)


class TakesOneSeq(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        rows = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        return (rows.view(-1, 4, 8),) if input_ids.shape[1] == 4 else (rows,)


class LooksAtItsInput(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        rows = self.embedding(input_ids)
        return (rows * 2,) if int(attention_mask.sum()) > 3 else (rows,)


class BreaksWhenLong(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        if input_ids.shape[1] > 20:
            raise IndexError("index out of range in self")
        return (self.embedding(input_ids) * attention_mask.unsqueeze(-1),)


class WantsMore(Odd):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        raise ValueError("You have to specify pixel_values")


def test_inputs_and_outputs_are_named_with_their_dims(source: Source) -> None:
    exported = export(source, DIMS, CPU)
    assert {(i.name, i.values) for i in exported.inputs} == {
        ("input_ids", f"ids<{source.vocabulary}"),
        ("attention_mask", "mask"),
    }
    (output,) = exported.outputs.tensors
    assert (output.name, output.shape) == ("logits", ("batch", "seq", source.vocabulary))
    assert exported.outputs.template == [{"tensor": 0}]


@pytest.mark.parametrize("odd", [WritesItsBuffer, ReplacesItsBuffer])
def test_a_model_that_writes_its_own_buffer_stays_eager(odd: Any, source: Source) -> None:
    with pytest.raises(CompileFailed, match="writes to its own seen") as caught:
        attempt(replace(source, model=odd().eval()), DIMS, CPU)
    assert "eager" in caught.value.hint


def test_a_model_that_takes_one_size_of_a_dim_says_which_dim(source: Source) -> None:
    with pytest.raises(BadDim, match="seq") as caught:
        export(replace(source, model=TakesOneSeq().eval()), DIMS | {"seq": Range(4, 4 + 1)}, CPU)
    assert "--dim" in caught.value.hint
    assert len(str(caught.value)) < 500


def test_a_model_that_branches_on_values_stays_eager(source: Source) -> None:
    with pytest.raises(CompileFailed, match="export: ") as caught:
        export(replace(source, model=LooksAtItsInput().eval()), DIMS, CPU)
    assert "traced" in caught.value.hint
    assert len(str(caught.value)) < 500


def test_what_eager_cannot_do_is_said_before_it_is_compiled(source: Source) -> None:
    with pytest.raises(BadDim, match="seq = 32 eager itself fails: index out of range") as caught:
        attempt(replace(source, model=BreaksWhenLong().eval()), DIMS, CPU)
    assert "--dim" in caught.value.hint
    with pytest.raises(CompileFailed, match="pixel_values") as failed:
        attempt(replace(source, model=WantsMore().eval()), DIMS, CPU)
    assert failed.value.hint


def test_of_torch_s_message_the_line_is_told_that_names_the_dim() -> None:
    text = "Constraints violated (seq)!\n  - Not all values of seq satisfy it.\nmore"
    assert constraint(text) == "Not all values of seq satisfy it."
    assert constraint("one line") == "one line"
