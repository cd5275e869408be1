"""Texts as tokens: a model's own tokenizer, and rows of tokens as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import transformers

from hubaoti.engines.messages import Prompt
from hubaoti.errors import ModelNotFound, first_line
from hubaoti.program.silence import silence_transformers
from hubaoti.runtime.text import shorten_text

Pair = tuple[list[int], list[int]]  # the tokens of a context, and of what may follow it
_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")


def load_tokenizer(folder: Path, trust: bool) -> Any:
    """A model's own tokenizer.

    Raises:
        ModelNotFound: there is none that transformers can read.
    """
    try:
        with silence_transformers():
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # of many kinds, as files are missing or odd
        raise ModelNotFound(
            f"transformers cannot read a tokenizer in {folder}: {first_line(error)}",
            hint="give the model's whole folder, or its Hub id",
        ) from error


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


def answer_by_length(
    questions: Sequence[_Question],
    rows: int,
    answer: Callable[[list[_Question]], Iterable[_Answer]],
    measure: Callable[[_Question], int] = len,  # type: ignore[assignment]
) -> list[_Answer]:
    """An answer to each, in their order; so many are asked together, long ones beside long ones."""
    order = sorted(range(len(questions)), key=lambda index: -measure(questions[index]))
    answers: dict[int, _Answer] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        answers |= zip(batch, answer([questions[index] for index in batch]), strict=True)
    return [answers[index] for index in range(len(questions))]


def find_common_prefix(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The longest row of tokens with which both begin."""
    pairs = zip(first, second, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
