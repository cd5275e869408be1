"""Texts as tokens: a model's own tokenizer, and rows of tokens as batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers

from hubaoti.compiler.from_config import silence_transformers
from hubaoti.engines.messages import Prompt
from hubaoti.errors import ModelNotFound, first_line
from hubaoti.runtime.text import shorten_text


def load_tokenizer(folder: Path, trust: bool) -> Any:
    """A model's own tokenizer.

    Raises:
        ModelNotFound: there is none that transformers can read.
    """
    try:
        with silence_transformers():
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as why:  # of many kinds, as files are missing or odd
        raise ModelNotFound(
            f"transformers cannot read a tokenizer in {folder}: {first_line(why)}",
            hint="give the model's whole folder, or its Hub id",
        ) from why


def find_starting_tokens(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text."""
    bare, whole = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (False, True))
    places = (index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
    return [int(token) for token in whole[: next(places, 0)]]


def shorten_prompt(prompt: Prompt) -> str:
    """The beginning of a prompt, or of its last message, for an error."""
    if isinstance(prompt, str):
        return shorten_text(prompt)
    return shorten_text(str(prompt[-1].get("content", ""))) if prompt else ""


def batch_by_length(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Numbers of rows that are answered together: long ones beside long ones."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


def split_rows(rows: int, each: int, most: int) -> Iterator[slice]:
    """Rows that take `most` bytes together, or one that takes more; `each` is what one takes."""
    few = max(1, most // max(1, each))
    for start in range(0, rows, few):
        yield slice(start, min(start + few, rows))


def pad_batch(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of (rows, the longest)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row, dtype=torch.int64)
        mask[at, place] = 1
    return ids.to(device), mask.to(device)


def find_common_prefix(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The longest row of tokens with which both begin."""
    pairs = zip(first, second, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
