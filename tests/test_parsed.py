"""Parsed: what a source says is worked out once, and what was kept is only used for its text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

from hubaoti.compiler.modelcode import text_of
from hubaoti.compiler.parsed import Import, noted, parsed, read
from hubaoti.errors import HubaotiError
from hubaoti.mirror.index import NOTES, Index

TEXT = """
import os, json as other
from .. import near
from torch import nn as n
try:
    from fast import kernel
except ImportError:
    kernel = None
if TYPE_CHECKING:
    from never import told

class Config:
    size = "beside"

    def width(self):
        return self.hidden_size

class Layer(n.Module):
    def forward(self, x):
        return x * getattr(self.config, name)
"""


class Kept(dict[str, bytes]):
    """Notes in memory."""

    def noted(self, digest: str) -> bytes | None:
        return self.get(digest)

    def note(self, digest: str, data: bytes) -> None:
        self[digest] = data


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    parsed.cache_clear()
    yield
    parsed.cache_clear()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made = Index(tmp_path / "index.sqlite3")
    yield made
    made.close()


def test_a_source_in_few_words() -> None:
    found = read(TEXT)
    assert found.imports == (
        Import(("os", "json")),
        Import(("near",), "", 2),
        Import(("n",), "torch", 0),
        Import(("kernel",), "fast", 0),
    )
    config, layer = found.statements[-2:]
    assert (config.defines, config.has_forward, config.by_computed_name) == ("Config", False, False)
    assert config.methods == {"hidden_size"}
    assert config.words == {"hidden_size", "beside"}
    assert (layer.defines, layer.has_forward, layer.by_computed_name) == ("Layer", True, True)


@pytest.mark.parametrize("module", [modeling_llama, modeling_bert])
def test_what_was_kept_is_what_parsing_says(
    module: object, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(module) or ""  # type: ignore[arg-type]
    with noted(index):
        first = parsed(text)
        parsed.cache_clear()
        monkeypatch.setattr(ast, "parse", None)
        assert parsed(text) == first
    parsed.cache_clear()
    monkeypatch.undo()
    assert parsed(text) == first


def test_another_text_is_parsed() -> None:
    kept = Kept()
    with noted(kept):
        assert parsed("a.b").statements[0].words == {"b"}
        assert parsed("a.c").statements[0].words == {"c"}
    assert len(kept) == 2


def test_other_rules_for_reading_make_what_was_kept_useless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = Kept()
    for rules in ("these", "those"):
        parsed.cache_clear()
        monkeypatch.setattr("hubaoti.compiler.parsed.digest_of_rules", lambda rules=rules: rules)
        with noted(kept):
            parsed("a.b")
    assert len(kept) == 2


@pytest.mark.parametrize("junk", [b"", b"{}", b'[[],[["a"]]]', b"\xff", b"[[],[]] and more"])
def test_what_cannot_be_read_is_worked_out_and_kept_again(junk: bytes) -> None:
    kept = Kept()
    with noted(kept):
        parsed("a.b")
        (digest,) = kept
        good, kept[digest] = kept[digest], junk
        parsed.cache_clear()
        assert parsed("a.b").statements[0].words == {"b"}
    assert kept == {digest: good}


def test_the_oldest_notes_are_forgotten(index: Index) -> None:
    for at in range(NOTES + 3):
        index.note(f"{at}", b"%d" % at)
    assert index.noted("2") is None
    assert [index.noted(f"{at}") for at in (3, NOTES + 2)] == [b"3", b"%d" % (NOTES + 2)]


def test_an_index_that_is_only_read_keeps_nothing_and_does_not_mind(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    made = Index(path)
    made.note("a", b"kept")
    made.close()
    readable = Index(path, is_writable=False)
    readable.note("b", b"lost")
    assert (readable.noted("a"), readable.noted("b")) == (b"kept", None)
    readable.close()


def test_where_nothing_can_be_written_nothing_fails(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise HubaotiError("the disk is full")

    monkeypatch.setattr(index, "require_writable", full)
    index.note("a", b"lost")
    assert index.noted("a") is None
