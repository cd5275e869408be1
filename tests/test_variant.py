"""Variant and Recipe: one spelling each, and nothing invalid exists."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubaoti.artifact.variant import Recipe, Variant
from hubaoti.errors import BadRequest

# A deadline would measure whoever shares the machine.
unhurried = settings(deadline=None)

parts = st.text("abcxyz0189", min_size=1, max_size=8)
tokens = st.lists(parts, min_size=1, max_size=3).map("_".join)
levels = st.sampled_from(["x86_64", "x86_64_v3", "x86_64_v4", "aarch64", "armv8.1a", "power9le"])
releases = st.tuples(st.integers(0, 30), st.integers(0, 99)).map("{0[0]}.{0[1]}".format)
devices = st.one_of(
    st.just((None, None)),
    st.tuples(
        st.tuples(st.integers(1, 99), st.integers(0, 9)).map("{0[0]}.{0[1]}".format),
        st.integers(10, 999),
    ),
)
systems = st.sampled_from(["linux", "darwin", "windows"])
variants = st.builds(
    lambda torch, device, level, os: Variant(torch, device[0], device[1], level, os),
    releases,
    devices,
    levels,
    systems,
)
recipes = st.builds(Recipe, tokens, tokens, st.none() | tokens, st.none() | tokens)

# Arbitrary text, and text that nearly is one: words of the grammar in any order.
words = st.sampled_from(
    ["torch2.13", "cpu", "cu130", "cu9", "sm90", "sm0", "x86_64_v3", "linux", "bfloat16", "fa3"]
    + ["sdpa", "int8wo", "-", "+", "decode", "_", ".", "/", "..", "X", "٣", "\n", "", "0"]
)
texts = st.text() | st.lists(words).map("".join) | st.lists(words).map("-".join)
texts = texts | variants.map(str) | recipes.map(str)

GPU = Variant("2.13", "13.0", 90, "x86_64_v3", "linux")
CPU = Variant("2.13", None, None, "x86_64_v3", "linux")


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("torch2.13-cu130-sm90-x86_64_v3-linux", GPU),
        ("torch2.13-cpu-x86_64_v3-linux", CPU),
        ("torch2.9-cu92-sm121-aarch64-linux", Variant("2.9", "9.2", 121, "aarch64", "linux")),
    ],
)
def test_a_variant_is_written_as_the_design_says(text: str, variant: Variant) -> None:
    assert str(variant) == text
    assert Variant.parse(text) == variant


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("bfloat16-fa3", Recipe("bfloat16", "fa3")),
        ("float32-sdpa", Recipe("float32", "sdpa")),
        ("bfloat16-sdpa-int8wo+decode", Recipe("bfloat16", "sdpa", "int8wo", "decode")),
        ("bfloat16-sdpa+seq_4096", Recipe("bfloat16", "sdpa", None, "seq_4096")),
    ],
)
def test_a_recipe_is_written_as_the_design_says(text: str, recipe: Recipe) -> None:
    assert str(recipe) == text
    assert Recipe.parse(text) == recipe


@unhurried
@given(variants)
def test_parse_reads_what_str_of_a_variant_writes(variant: Variant) -> None:
    assert Variant.parse(str(variant)) == variant


@unhurried
@given(recipes)
def test_parse_reads_what_str_of_a_recipe_writes(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe


@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("kind", [Variant, Recipe])
@given(text=texts)
def test_any_text_is_the_only_spelling_of_its_value_or_is_refused_with_a_hint(
    kind: type[Variant] | type[Recipe], text: str
) -> None:
    try:
        parsed = kind.parse(text)
    except BadRequest as error:
        assert error.hint
    else:
        assert str(parsed) == text


@unhurried
@given(variants | recipes)
def test_either_is_one_safe_folder_name(value: Variant | Recipe) -> None:
    name = str(value)
    assert PurePosixPath(name).parts == (name,)
    assert name.isascii() and name == name.lower() and len(name) <= 255
    assert ".." not in name and not name.startswith(".") and not name.endswith((".", ".lock"))


@pytest.mark.parametrize(
    "values",
    [
        ("2", None, None, "x86_64_v3", "linux"),
        ("2.13.0", None, None, "x86_64_v3", "linux"),
        ("2.013", None, None, "x86_64_v3", "linux"),
        ("2.13\n", None, None, "x86_64_v3", "linux"),
        (2.13, None, None, "x86_64_v3", "linux"),
        ("2.13", "13", 90, "x86_64_v3", "linux"),
        ("2.13", "13.10", 90, "x86_64_v3", "linux"),
        ("2.13", "13.0", None, "x86_64_v3", "linux"),
        ("2.13", None, 90, "x86_64_v3", "linux"),
        ("2.13", "13.0", 9, "x86_64_v3", "linux"),
        ("2.13", "13.0", True, "x86_64_v3", "linux"),
        ("2.13", "13.0", "90", "x86_64_v3", "linux"),
        ("2.13", "13.0", 90, "x86-64-v3", "linux"),
        ("2.13", "13.0", 90, "native/..", "linux"),
        ("2.13", "13.0", 90, "a" * 41, "linux"),
        ("2.13", "13.0", 90, "x86_64_v3", "Linux"),
        ("2.13", "13.0", 90, "x86_64_v3", ["linux"]),
    ],
)
def test_an_invalid_variant_cannot_exist(values: tuple[Any, ...]) -> None:
    with pytest.raises(BadRequest) as refused:
        Variant(*values)
    assert refused.value.hint


@pytest.mark.parametrize(
    "values",
    [
        ("", "sdpa"),
        ("bfloat16", ""),
        ("bfloat16", "sdpa", ""),
        ("bfloat16", "sdpa", None, ""),
        ("BF16", "sdpa"),
        ("bfloat16", "sd-pa"),
        ("bfloat16", "sdpa", None, "v1.lock"),
        ("bfloat16", "sdpa", None, "a+b"),
        ("bfloat16", "sdpa", None, "../x"),
        ("bfloat16", "sdpa", None, "a__b"),
        ("bfloat16", None),
    ],
)
def test_an_invalid_recipe_cannot_exist(values: tuple[Any, ...]) -> None:
    with pytest.raises(BadRequest) as refused:
        Recipe(*values)
    assert refused.value.hint


@pytest.mark.parametrize(
    "text",
    ["torch2.13-cuda-linux", "torch2.13-cu13-sm9-x86_64_v3-linux", "2.13-cpu-x86_64_v3-linux"],
)
def test_a_refusal_names_what_was_written(text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        Variant.parse(text)


def test_a_variant_knows_its_device() -> None:
    assert (GPU.device, CPU.device) == ("cuda", "cpu")
