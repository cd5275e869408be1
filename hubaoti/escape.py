"""Text from outside, as a terminal may be given it.

Nothing in it moves the cursor, changes a colour or a title, turns the direction of what is read, or
passes for a line of ours; and it has an end.
"""

from __future__ import annotations

import re

LINE = 300  # characters of somebody else's words within a line of ours
LONGEST = 2000  # characters of a line of their own
WHOLE = 1 << 16  # characters of a message: one of ours may name each tensor of a model

# The controls but for tab and line feed; separators of lines; marks that reorder; lone surrogates.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_OBEYED_IN_LINES = re.compile(f"[\t\n]|{_OBEYED.pattern}")


def escape(text: str) -> str:
    """Text of any number of lines: these stay, what a terminal would obey is spelled out."""
    return _OBEYED.sub(_escape_character, text)


def escape_line(text: str, longest: int = LINE) -> str:
    """Text as a part of a line: its line breaks are spelled out, too, and it is cut."""
    if len(text) <= longest and text.isascii() and text.isprintable():
        return text  # as nearly all is, of long tables too
    return _cut(_OBEYED_IN_LINES.sub(_escape_character, text[: longest + 1]), longest)


def bound_message(text: str) -> str:
    """A message, which may have some lines: escaped, and cut where it has no end."""
    return _cut(escape(text[: WHOLE + 1]), WHOLE)


def _escape_character(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
