"""What callers in Python switch on or off: a text such as "no" would switch it on."""

from __future__ import annotations

from hubaoti.errors import BadRequest


def require_flags(**flags: object) -> None:
    """See that each of some keywords is True or False.

    Raises:
        BadRequest: one is something else.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise BadRequest(f"{name}={value!r:.80} is no bool", hint="say True or False")
