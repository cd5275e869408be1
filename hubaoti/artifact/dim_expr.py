"""Extents: a size that follows from dims, as `seq`, `2*seq` or `image+text-1`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TERM = r"(?:[1-9][0-9]{0,8}\*)?[a-z][a-z0-9_]*"
PATTERN = rf"^-?{_TERM}(?:[+-]{_TERM})*(?:[+-][1-9][0-9]{{0,8}})?\Z"


@dataclass(frozen=True, slots=True)
class DimExpr:
    """A sum of dims, each times a whole number, and a number; `str` and `parse` are inverses.

    Terms are kept in the order of the dims' names, none of them zero.
    """

    terms: tuple[tuple[str, int], ...]
    plus: int = 0

    @classmethod
    def of(cls, terms: Mapping[str, int], plus: int = 0) -> DimExpr:
        """An extent from each dim's factor; a factor of zero leaves its dim out."""
        kept = tuple((name, factor) for name, factor in sorted(terms.items()) if factor)
        return cls(kept, plus)

    @classmethod
    def parse(cls, text: str) -> DimExpr:
        """Read an extent.

        Raises:
            ValueError: it is none.
        """
        if not re.match(PATTERN, text):
            raise ValueError(f"{text!r} is no extent; write it as seq, 2*seq or image+text")
        terms: dict[str, int] = {}
        plus = 0
        for sign, factor, name, number in re.findall(
            r"([+-]?)(?:(?:([0-9]+)\*)?([a-z][a-z0-9_]*)|([0-9]+))", text
        ):
            unit = -1 if sign == "-" else 1
            if name:
                terms[name] = terms.get(name, 0) + unit * int(factor or 1)
            else:
                plus += unit * int(number)
        return cls.of(terms, plus)

    def __str__(self) -> str:
        words = []
        for name, factor in self.terms:
            sign = "-" if factor < 0 else "+"
            words.append(sign + (f"{abs(factor)}*" if abs(factor) != 1 else "") + name)
        if self.plus or not words:
            words.append(f"{self.plus:+d}")
        return "".join(words).removeprefix("+")

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dims that it follows from, sorted."""
        return tuple(name for name, _ in self.terms)

    @property
    def plain(self) -> bool:
        """Whether it is a dim and nothing more."""
        return self.plus == 0 and len(self.terms) == 1 and self.terms[0][1] == 1

    def at(self, sizes: Mapping[str, int]) -> int:
        """Its size where the dims have these sizes."""
        return self.plus + sum(factor * sizes[name] for name, factor in self.terms)

    def solve(self, size: int) -> int | None:
        """The size of its only dim at which it is `size`; None where no whole number is."""
        if len(self.terms) != 1:
            return None
        found, rest = divmod(size - self.plus, self.terms[0][1])
        return None if rest else found
