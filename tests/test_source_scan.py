"""Parsed: what a source says is worked out once, and what was kept is only used for its text."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import HubaotiError
from hubaoti.mirror.index import KEPT, STEPS, Index
from hubaoti.program.model_code import collect_code_of_types, module_text
from hubaoti.program.source_scan import Import, parse_source, scan_source, use_scan_cache
from hubaoti.settings import Settings

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

    def read_note(self, digest: str) -> bytes | None:
        return self.get(digest)

    def note(self, found: Mapping[str, bytes]) -> None:
        self.update(found)


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    scan_source.cache_clear()
    yield
    scan_source.cache_clear()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made = Index(tmp_path / "index.sqlite3")
    yield made
    made.close()


def test_a_source_in_few_words() -> None:
    found = parse_source(TEXT)
    assert found.imports == (
        Import(("os", "json"), originals=("os", "other")),
        Import(("near",), "", 2, ("near",)),
        Import(("n",), "torch", 0, ("nn",)),
        Import(("kernel",), "fast", 0, ("kernel",)),
    )
    assert found.assigned == {
        "kernel": "None",
        "Config.size": "'beside'",
        **dict.fromkeys(("Config.width()", "Layer.forward()"), "()"),
        **dict.fromkeys(("Config.width(*)", "Layer.forward(*)"), "{}"),
    }
    config, layer = found.statements[-2:]
    assert (config.defines, config.has_forward, config.by_computed_name) == ("Config", False, False)
    assert config.methods == {"hidden_size"}
    assert config.words == {"hidden_size", "beside"}
    assert (layer.defines, layer.has_forward, layer.by_computed_name) == ("Layer", True, True)


@pytest.mark.parametrize("module", [modeling_llama, modeling_bert])
def test_what_was_kept_is_what_parsing_says(
    module: object, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = module_text(module) or ""  # type: ignore[arg-type]
    with use_scan_cache(index):
        first = scan_source(text)
    scan_source.cache_clear()
    monkeypatch.setattr("hubaoti.program.source_scan.parse_source", None)
    with use_scan_cache(index):
        assert scan_source(text) == first
    scan_source.cache_clear()
    monkeypatch.undo()
    assert scan_source(text) == first


def test_another_text_is_parsed() -> None:
    kept = Kept()
    with use_scan_cache(kept):
        assert scan_source("a.b").statements[0].words == {"b"}
        assert scan_source("a.c").statements[0].words == {"c"}
    assert len(kept) == 2


def test_other_rules_for_reading_make_what_was_kept_useless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = Kept()
    for rules in ("these", "those"):
        scan_source.cache_clear()
        monkeypatch.setattr(
            "hubaoti.program.source_scan.digest_scan_rules", lambda rules=rules: rules
        )
        with use_scan_cache(kept):
            scan_source("a.b")
    assert len(kept) == 2


JUNK = [b"", b"{}", b'[[],[["a"]]]', b"\xff", b"[[],[]] and more"]


@pytest.mark.parametrize("junk", [*JUNK, b'[[],[["\xff",false,[],false,[]]]]'])
def test_what_cannot_be_read_is_worked_out_and_kept_again(junk: bytes) -> None:
    kept = Kept()
    with use_scan_cache(kept):
        scan_source("a.b")
    (digest,) = kept
    good, kept[digest] = kept[digest], junk
    scan_source.cache_clear()
    with use_scan_cache(kept):
        assert scan_source("a.b").statements[0].words == {"b"}
    assert kept == {digest: good}


def test_half_a_character_is_read_and_not_kept() -> None:
    kept = Kept()
    with use_scan_cache(kept):
        assert scan_source(r'a.b = "\ud800"').statements[0].words == {"\ud800"}
    assert not kept


def test_the_oldest_notes_are_forgotten(index: Index) -> None:
    for at in range(KEPT + 3):
        index.note({f"{at}": b"%d" % at})
    assert index.read_note("2") is None
    assert [index.read_note(f"{at}") for at in (3, KEPT + 2)] == [b"3", b"%d" % (KEPT + 2)]


def test_an_index_that_is_only_read_keeps_nothing_and_does_not_mind(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    made = Index(path)
    made.note({"a": b"kept"})
    made.close()
    readable = Index(path, is_writable=False)
    readable.note({"b": b"lost"})
    assert (readable.read_note("a"), readable.read_note("b")) == (b"kept", None)
    readable.close()


def test_where_nothing_can_be_written_nothing_fails(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise HubaotiError("the disk is full")

    monkeypatch.setattr(index, "require_writable", full)
    index.note({"a": b"lost"})
    assert index.read_note("a") is None


def test_a_writer_that_takes_its_time_is_not_waited_for(index: Index, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "index.sqlite3", isolation_level=None)
    other.execute("begin immediate")
    start = time.perf_counter()
    index.note({"a": b"lost"})
    assert time.perf_counter() - start < 5
    other.execute("rollback")
    other.close()
    assert index.read_note("a") is None
    index.note({"a": b"kept"})
    assert index.read_note("a") == b"kept"


def test_a_table_that_is_damaged_knows_nothing(index: Index, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "index.sqlite3", isolation_level=None)
    other.execute("drop table notes")
    other.close()
    index.note({"a": b"lost"})
    assert index.read_note("a") is None


@pytest.mark.parametrize("steps", [1, 2])
def test_an_index_of_before_is_read_as_it_is(steps: int, tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite3"
    old = sqlite3.connect(path, isolation_level=None)
    for step in STEPS[:steps]:
        old.executescript(step)
    old.execute(f"pragma user_version = {steps}")
    old.close()
    readable = Index(path, is_writable=False)
    assert (readable.read_note("a"), readable.find_problem("a", "host"), readable.rows()) == (
        None,
        None,
        [],
    )
    readable.close()
    made = Index(path)
    made.note({"a": b"kept"})
    assert made.read_note("a") == b"kept"
    made.close()


def test_attach_looks_there(
    decoder_bundle: Bundle, tiny_decoder: Path, built_at: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    for again in (False, True):
        collect_code_of_types.cache_clear()
        scan_source.cache_clear()
        if again:
            monkeypatch.setattr("hubaoti.program.source_scan.parse_source", None)
        with hubaoti.attach(model, decoder_bundle, settings=built_at) as attachment:
            assert attachment.stats()["compiled"] == 0
