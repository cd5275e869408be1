"""What a repo of the Hub may be called: one rule for who asks for one, and for what pins one."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_LONGEST = 96  # characters


def is_repo(text: object) -> bool:
    """Whether a repo may be called so, as `owner/name`; neither half can leave its folder."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return False
    owner, slash, name = text.partition("/")
    return bool(slash) and is_name(owner) and is_name(name)


def is_name(text: str) -> bool:
    """Whether an owner or a repo may be called so."""
    odd = "--" in text or ".." in text or text.endswith(".git")
    return _NAME.fullmatch(text) is not None and not odd
