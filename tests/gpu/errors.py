"""What answers are off, beside eager's, and when that is too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMES = 1.5  # what a graph may be off, as a multiple of what eager of the same dtype is
FLOOR = {"float32": 1e-5, "bfloat16": 1e-3}  # and on top of that


def word_worst(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The answer that is off most, and how far eager's is."""
    ours, theirs, size = max((each["off"], each["eager"], size) for size, each in facts.items())
    return f"{len(facts)} answers, {ours:.1e} off at most, eager {theirs:.1e}, at {size}"


def list_problems(facts: Mapping[str, Mapping[str, Any]], dtype: str) -> list[str]:
    """Which answers are off too far; an error that is no number is more than any."""
    return [
        f"{size}: {each['off']:.1e} off, {dtype} eager {each['eager']:.1e}"
        for size, each in facts.items()
        if not each["off"] <= TIMES * each["eager"] + FLOOR[dtype]
    ]
