"""RFC 8785 canonical JSON: one spelling of a value, so that it has one digest."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
import rfc8785

SAFE = 2**53 - 1  # the largest integer that is no other one's double
_LARGEST_DOUBLE = 2**1023
# In JSON's text: whatever number is not surely an integer that every double holds.
_DOUBLE = re.compile(rb"[:,\[](-?\d+(?:[.eE][\d.eE+-]+|(?<=\d{16}))(?=[,\]}]))")


def encode_canonical(value: Any) -> bytes:
    """RFC 8785: sorted keys, no spaces, one spelling for each number.

    Raises:
        ValueError: it is no JSON.
    """
    return msgspec.json.encode(_normalize_value(value))


def is_canonical(text: bytes, value: Any) -> bool:
    """Whether a text is the canonical form of the value that was read from it.

    Of an object without rare letters msgspec writes all but the doubles so, in C. A string of the
    text in which something looks like one would be changed with them, and is compared the slow way.

    Raises:
        ValueError: the value is no JSON.
    """
    if type(value) is dict and text.isascii():
        sorted_text = msgspec.json.encode(value, order="sorted")
        if _DOUBLE.sub(_write_double, sorted_text) == text:
            return True
    return encode_canonical(value) == text


def _write_double(found: re.Match[bytes]) -> bytes:
    """A number as the canonical form has it, after what stands before it."""
    return found[0][:1] + rfc8785.dumps(convert_large_integers(msgspec.json.decode(found[1])))


def _normalize_value(value: Any) -> Any:
    """A value in which all is spelled that msgspec, which is written in C, would write otherwise.

    Of what others publish this is made before anything else is known of it, so it is fast: only
    numbers that are doubles, and types of other libraries, are left to the reference.
    """
    kind = type(value)
    if kind is dict:
        return {name: _normalize_value(value[name]) for name in _sort_keys(value)}
    if kind is list or kind is tuple:
        return [_normalize_value(each) for each in value]
    if kind is str or kind is bool or value is None or (kind is int and -SAFE <= value <= SAFE):
        return value
    return msgspec.Raw(rfc8785.dumps(convert_large_integers(value)))


def _sort_keys(names: dict[Any, Any]) -> list[str]:
    """Keys in the order of their UTF-16, which is that of their characters but for the rarest."""
    if not all(type(name) is str for name in names):
        raise ValueError("a key is no text")
    if "".join(names).isascii():
        return sorted(names)
    return sorted(names, key=lambda name: name.encode("utf-16-be"))


def convert_large_integers(value: Any) -> Any:
    """JSON's numbers are doubles: a large integer that is one, or is spelled as one, is a float.

    Else a float of 2**53 or more, which is written without a point, could not be read back.
    """
    if isinstance(value, dict):
        return {name: convert_large_integers(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [convert_large_integers(each) for each in value]
    if isinstance(value, int) and SAFE < abs(value) < _LARGEST_DOUBLE:
        double = float(value)
        if double == value or rfc8785.dumps(double) == str(value).encode():
            return double
    return value


def digest_canonical(value: Any) -> str:
    """The sha256 of a value's canonical JSON."""
    return hashlib.sha256(encode_canonical(value)).hexdigest()
