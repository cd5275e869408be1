"""Who may read and write what: named tokens, kept as hashes."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from sqlite3 import Connection

from hubaoti.errors import BadRequest
from hubaoti.server import repos
from hubaoti.server.validation import is_owner

READ, WRITE = "read", "write"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token lets its holder do: read private repos, or write too; of all owners, or some."""

    name: str
    role: str
    owners: tuple[str, ...] = ()
    created: str = ""

    def may_read(self, owner: str) -> bool:
        """Whether this owner's private repos are shown."""
        return not self.owners or owner in self.owners

    def may_write(self, owner: str) -> bool:
        """Whether this owner's repos may be made, changed and deleted."""
        return self.role == WRITE and self.may_read(owner)


def add_token(db: Connection, name: str, role: str, owners: tuple[str, ...]) -> str:
    """A new token of this name, which is shown this once: only its hash is kept.

    Raises:
        BadRequest: the name, or an owner's, cannot be one, or there is a token of this name.
    """
    for word in (name, *owners):
        if not is_owner(word):
            raise BadRequest(f"nothing can be named {word!r:.100}", hint="write it as ci-runners")
    token = f"hf_{secrets.token_urlsafe(32)}"
    row = (name, _hash(token), role, json.dumps(owners), repos.now())
    if not db.execute("insert or ignore into token values (?, ?, ?, ?, ?)", row).rowcount:
        hint = "choose another name, or remove that one: hubaoti serve token rm"
        raise BadRequest(f"there is a token named {name} already", hint=hint)
    return token


def list_tokens(db: Connection) -> list[Grant]:
    """Every named token, by name, without what it is told by."""
    rows = db.execute("select name, role, owners, created from token order by name")
    return [Grant(name, role, tuple(json.loads(owners)), when) for name, role, owners, when in rows]


def remove_token(db: Connection, name: str) -> None:
    """Have a token open nothing any more, at once.

    Raises:
        BadRequest: there is none of this name.
    """
    if not db.execute("delete from token where name = ?", (name,)).rowcount:
        hint = "see: hubaoti serve token ls"
        raise BadRequest(f"there is no token named {name!r:.100}", hint=hint)


def find_grant(db: Connection, token: str) -> Grant | None:
    """What this token allows; it is compared with all there are, each in constant time."""
    given, found = _hash(token), None
    for name, known, role, owners, when in db.execute("select * from token"):
        if hmac.compare_digest(given, known):
            found = Grant(name, role, tuple(json.loads(owners)), when)
    return found


def _hash(token: str) -> str:
    # A token is 32 random bytes: nobody finds it by trying, so a plain hash is enough.
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
