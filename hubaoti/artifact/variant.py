"""Variant and Recipe: the two halves of an artifact's path, and their grammar.

    recipe   dtype "-" attention ["-" quantization] ["+" label]
    variant  "torch" M "." N "-" ("cpu" | "cu" NNN "-sm" NN) "-" level "-" os

    bfloat16-fa3    float32-sdpa    bfloat16-sdpa-int8wo+decode
    torch2.13-cu130-sm90-x86_64_v3-linux    torch2.13-cpu-x86_64_v3-linux

`str` and `parse` are inverses: each value has one spelling, and every other spelling is refused.
Both strings become folders of a repo and parts of a git branch, on disks that may fold case: so
lower case only, no `/`, no `..`, no dot in a label (a branch may not end in `.lock`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hubaoti.errors import BadRequest

# Long enough for every name in use; two of these folders stay far below a path's limit.
_LONGEST = 40  # characters of a part

_SYSTEMS = ("linux", "darwin", "windows")

_VARIANT_HINT = "write it as torch2.13-cu130-sm90-x86_64_v3-linux or torch2.13-cpu-x86_64_v3-linux"
_RECIPE_HINT = "write it as bfloat16-fa3, float32-sdpa or bfloat16-sdpa-int8wo+decode"

_NUMBER = r"(?:0|[1-9][0-9]{0,3})"
_TORCH = re.compile(rf"{_NUMBER}\.{_NUMBER}")
# The minor is one digit, as in every CUDA release, so `cu130` can only be 13.0 (and 92 only 9.2).
_CUDA = re.compile(r"[1-9][0-9]?\.[0-9]")
_CUDA_PART = re.compile(r"cu(?P<major>[1-9][0-9]?)(?P<minor>[0-9])")
_SM_PART = re.compile(r"sm(?P<sm>[1-9][0-9]{1,2})")
# archspec's names: x86_64_v3, aarch64, armv8.1a.
_LEVEL = re.compile(r"[a-z][a-z0-9]*(?:[._][a-z0-9]+)*")
_TOKEN = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")


@dataclass(frozen=True, slots=True)
class Variant:
    """The kind of host that graphs were built for; only valid ones exist.

    `cuda` (toolkit, "13.0") and `sm` (compute capability, 90 for 9.0) are both None for a CPU.

    Raises:
        BadRequest: a part is malformed.
    """

    torch: str
    cuda: str | None
    sm: int | None
    level: str
    os: str = "linux"

    def __post_init__(self) -> None:
        _require(_matches(_TORCH, self.torch), "torch", self.torch, _VARIANT_HINT)
        if self.cuda is None:
            _require(self.sm is None, "sm without CUDA", self.sm, _VARIANT_HINT)
        else:
            _require(_matches(_CUDA, self.cuda), "CUDA", self.cuda, _VARIANT_HINT)
            # bool is an int, and True would be written "smTrue".
            known = type(self.sm) is int and 10 <= self.sm <= 999
            _require(known, "sm", self.sm, _VARIANT_HINT)
        _require(_matches(_LEVEL, self.level), "CPU level", self.level, _VARIANT_HINT)
        _require(self.os in _SYSTEMS, "operating system", self.os, _VARIANT_HINT)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read what `str` writes, and nothing else.

        Raises:
            BadRequest: the text is no variant in its only spelling.
        """
        parts = text.split("-")
        _require(parts[0].startswith("torch"), "variant", text, _VARIANT_HINT)
        torch = parts[0].removeprefix("torch")
        if len(parts) == 4 and parts[1] == "cpu":
            return cls(torch, None, None, *parts[2:])
        _require(len(parts) == 5, "variant", text, _VARIANT_HINT)
        cuda, sm = _CUDA_PART.fullmatch(parts[1]), _SM_PART.fullmatch(parts[2])
        if cuda is None or sm is None:
            raise _describe_malformed("variant", text, _VARIANT_HINT)
        return cls(torch, f"{cuda['major']}.{cuda['minor']}", int(sm["sm"]), *parts[3:])

    def __str__(self) -> str:
        device = "cpu" if self.cuda is None else f"cu{self.cuda.replace('.', '')}-sm{self.sm}"
        return f"torch{self.torch}-{device}-{self.level}-{self.os}"

    @property
    def device(self) -> str:
        """The kind of device: `"cpu"`, or `"cuda"` where the variant names a toolkit."""
        return "cpu" if self.cuda is None else "cuda"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A label for how graphs were built; only valid ones exist.

    Each part is lower-case letters and digits, words joined by single underscores. Which dtypes,
    attentions and quantizations there are is the compiler's to say: a recipe of a newer hubaoti
    must still be readable here.

    Raises:
        BadRequest: a part is malformed.
    """

    dtype: str
    attention: str
    quantization: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        _require(_matches(_TOKEN, self.dtype), "dtype", self.dtype, _RECIPE_HINT)
        _require(_matches(_TOKEN, self.attention), "attention", self.attention, _RECIPE_HINT)
        for name, value in (("quantization", self.quantization), ("label", self.label)):
            _require(value is None or _matches(_TOKEN, value), name, value, _RECIPE_HINT)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read what `str` writes, and nothing else.

        Raises:
            BadRequest: the text is no recipe in its only spelling.
        """
        parts, plus, label = text.partition("+")
        dtype, *rest = parts.split("-")
        _require(1 <= len(rest) <= 2, "recipe", text, _RECIPE_HINT)
        return cls(dtype, rest[0], rest[1] if len(rest) == 2 else None, label if plus else None)

    def __str__(self) -> str:
        parts = [self.dtype, self.attention]
        if self.quantization is not None:
            parts.append(self.quantization)
        return "-".join(parts) + ("" if self.label is None else f"+{self.label}")


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    """Whether a value, of any type, is a short string of the pattern."""
    return isinstance(value, str) and len(value) <= _LONGEST and bool(pattern.fullmatch(value))


def _require(condition: bool, what: str, value: object, hint: str) -> None:
    if not condition:
        raise _describe_malformed(what, value, hint)


def _describe_malformed(what: str, value: object, hint: str) -> BadRequest:
    return BadRequest(f"malformed {what}: {value!r:.120}", hint=hint)
