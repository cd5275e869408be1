"""The text of trust.toml: entries of its tables found, added and dropped; comments in it stay."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from hubaoti.settings import split_login

LOOKS_LIKE_DIGEST = re.compile("[0-9A-Fa-f]{6,64}")


def format_command(verb: str, who: Mapping[str, str]) -> str:
    """The command that says something of somebody: at his endpoint, whichever today's is."""
    if "digest" in who:
        return f"hubaoti trust {verb} {who['digest']}"
    owner = who["owner"]
    owner = f"owner:{owner}" if LOOKS_LIKE_DIGEST.fullmatch(owner) else owner
    return f"hubaoti trust {verb} {owner} --endpoint {shlex.quote(who['endpoint'])}"


def find_entries(
    document: Mapping[str, Any], table: str, who: Mapping[str, str], exactly: bool = False
) -> list[int]:
    """Where in a table the entries of somebody are, in whichever letters or `exactly` so."""
    entries = [_name(each) for each in document.get(table, ())]
    if exactly:
        return [at for at, each in enumerate(entries) if each == dict(who)]
    return [at for at, each in enumerate(entries) if _fold(each) == _fold(who)]


def _fold(who: Mapping[str, str]) -> dict[str, str]:
    """Who is meant, whatever the letters of his name: the Hub makes no difference between them."""
    return {name: each.casefold() if name == "owner" else each for name, each in who.items()}


def _name(entry: Mapping[str, Any]) -> dict[str, str]:
    """Of whom an entry is, its endpoint as it is kept today."""
    who = {name: str(entry[name]) for name in ("endpoint", "owner", "digest") if name in entry}
    if "endpoint" in who:
        who["endpoint"] = split_login(who["endpoint"])[0]
    return who


def append_entry(document: Any, table: str, who: Mapping[str, str]) -> None:
    """Add an entry of somebody to a table of a document of tomlkit's, since today."""
    import tomlkit

    entry = tomlkit.table()
    entry.update({**who, "since": datetime.now(UTC).date()})
    if table not in document:
        document[table] = tomlkit.aot()
    document[table].append(entry)


def drop_entries(text: str, table: str, who: Mapping[str, str]) -> str:
    """The file's text without what a table has of somebody; comments stay, behind it and within."""
    found = tomllib.loads(text)
    if not (places := find_entries(found, table, who)):
        return text
    lines, at, is_gone = list[str](), -1, False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("["):
            is_ours = re.match(rf"\s*\[\[\s*{table}\s*\]\]", line) is not None
            at += is_ours
            is_gone = is_ours and at in places
        if not is_gone or not line.strip() or line.lstrip().startswith("#"):
            lines.append(line)
    rest = "".join(lines)
    kept = [each for place, each in enumerate(found.pop(table)) if place not in places]
    wanted = found | ({table: kept} if kept else {})
    with suppress(tomllib.TOMLDecodeError):
        if tomllib.loads(rest) == wanted:
            return rest
    return _drop_written_otherwise(text, table, places)


def _drop_written_otherwise(text: str, table: str, places: Sequence[int]) -> str:
    """The same where a table is not written line by line: of comments, what tomlkit keeps."""
    import tomlkit

    document: Any = tomlkit.parse(text)
    for at in reversed(places):
        del document[table][at]
    if not len(document[table]):
        del document[table]
    return tomlkit.dumps(document)
