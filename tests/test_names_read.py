"""Words: what code reads by name, and where that cannot be told."""

from __future__ import annotations

import ast

import pytest

from hubaoti.program.names_read import (
    collect_names_in_bytecode,
    collect_names_read,
    reads_by_computed_name,
)


def words(text: str) -> frozenset[str]:
    return collect_names_read(ast.parse(text))


def test_attributes_and_strings_are_read() -> None:
    text = "a = self.config.hidden_size + getattr(config, 'head_dim', 4) + rope['factor']"
    assert {"config", "hidden_size", "head_dim", "factor"} <= words(text)


@pytest.mark.parametrize(
    "text",
    [
        "self.width = width",
        "def make(width): return width",
        "def _init_weights(self, module): init.normal_(std=self.config.width)",
        "x = nn.Embedding(3, 4, config.width)",
        "x = nn.Embedding(3, 4, padding_idx=config.width)",
    ],
)
def test_what_is_set_named_or_only_trained_with_is_not_read(text: str) -> None:
    assert "width" not in words(text)


def test_the_size_of_an_embedding_is_read() -> None:
    assert "vocab_size" in words("x = nn.Embedding(config.vocab_size, 4, config.pad_token_id)")


def test_keeping_the_padding_id_is_not_computing_with_it() -> None:
    assert "pad_token_id" not in words("self.padding_idx = config.pad_token_id")
    assert "pad_token_id" in words("self.pad_token_id = config.pad_token_id")
    assert "padding_idx" in words("mask = ids.ne(self.padding_idx)")


@pytest.mark.parametrize(
    "text",
    [
        "getattr(config, f'{kind}_size')",
        "hasattr(self.config, name)",
        "vars(config)",
        "config.to_dict()",
        "self.config.__dict__",
        "Layer(**config)",
        "Layer(1, **self.layer_config)",
        "getattr(*config)",
    ],
)
def test_a_config_that_is_read_by_a_computed_name_is_noticed(text: str) -> None:
    assert reads_by_computed_name(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "getattr(config, 'head_dim', None)",
        "getattr(self, name)",
        "self.generation_config.to_dict()",
        "Layer(**kwargs)",
        "Layer(config)",
    ],
)
def test_plain_reading_is_no_computed_name(text: str) -> None:
    assert not reads_by_computed_name(ast.parse(text))


def test_bytecode_says_what_it_reads() -> None:
    class Reader:
        @property
        def size(self) -> int:
            return self.config.hidden_size + [getattr(self, "depth") for _ in "x"][0]  # noqa: B009

    assert {"config", "hidden_size", "depth"} <= collect_names_in_bytecode(Reader)
    assert collect_names_in_bytecode(3) == set()
