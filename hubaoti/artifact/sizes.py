"""How many, and how many bytes, in words: the same in every table, message, card and page."""

from __future__ import annotations


def format_size(size: float | None) -> str:
    """Bytes in the unit that a person would say."""
    if size is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_count(number: int, what: str) -> str:
    """So many of something, which has its plural with an s."""
    return f"{number} {what}{'' if number == 1 else 's'}"
