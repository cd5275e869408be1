"""RFC 8785 canonical JSON: one spelling of a value, so that it has one digest."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

SAFE = 2**53 - 1  # the largest integer that is no other one's double
LARGEST_DOUBLE = 2**1023


def canonical(value: Any) -> bytes:
    """RFC 8785: sorted keys, no spaces, one spelling for each number."""
    return rfc8785.dumps(as_doubles(value))


def as_doubles(value: Any) -> Any:
    """JSON's numbers are doubles: a large integer that is one, or is spelled as one, is a float.

    Else a float of 2**53 or more, which is written without a point, could not be read back.
    """
    if isinstance(value, dict):
        return {name: as_doubles(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_doubles(each) for each in value]
    if isinstance(value, int) and SAFE < abs(value) < LARGEST_DOUBLE:
        double = float(value)
        if double == value or rfc8785.dumps(double) == str(value).encode():
            return double
    return value


def digest_of(value: Any) -> str:
    """The sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()
