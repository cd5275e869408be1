"""Every "no" that the endpoint answers: a status, words for people, and the code that clients map.

The official client reads `X-Error-Code` (which exception to raise) and `X-Error-Message`; the body
says the same as JSON for everyone else.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Mapping

from starlette.responses import JSONResponse

BAD_TOKEN = "Invalid credentials in Authorization header"
"""The one message by which the client tells a wrong token from a hidden repo."""

NO_TOKEN = "This request needs a token: Authorization: Bearer <token>"

UPSTREAM_GONE = "UpstreamGone"
"""The code of what upstream was not asked, or did not answer: here it passes by no retry."""


class ServerError(Exception):
    """A request that is refused; raised from anywhere, rendered at the app's one boundary."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.more = dict(more or {})

    def response(self) -> JSONResponse:
        """The answer to send; whatever the message quotes, its header stays one line of ASCII."""
        headers = {"X-Error-Message": _header_line(self.message), **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        message = self.message.encode("utf-8", "replace").decode()
        return JSONResponse({"error": message, **self.more}, self.status, headers)


def _header_line(message: str) -> str:
    line = message.encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in line)[:500].strip()


def malformed_request(message: str) -> ServerError:
    """400: the request itself is wrong."""
    return ServerError(400, message)


def too_large(what: str, limit: int) -> ServerError:
    """413: more bytes than this endpoint takes in one piece."""
    return ServerError(413, f"{what} is larger than {limit} bytes")


def repo_not_found(repo: object, *, trusted: bool) -> ServerError:
    """404 to who may know; to others 401, the same for a hidden repo and for none at all."""
    status, advice = (404, "") if trusted else (401, "; if it is private, send a valid token")
    return ServerError(status, f"Repository not found: {repo}{advice}", code="RepoNotFound")


def disk_full() -> ServerError:
    """507: there is no room; nothing half-written stays."""
    return ServerError(507, "The disk of the endpoint is full")


def over_quota(size: int, limit: int) -> ServerError:
    """413: more than the endpoint is allowed to store; nothing half-written stays."""
    words = f"{size} bytes more than are stored do not go into the {limit} bytes of this endpoint"
    return ServerError(413, f"{words}: remove some and run its gc", code="OverQuota")


def upstream_gone(message: str) -> ServerError:
    """504: what is not here could not be asked for; our client does not ask again, by this code."""
    return ServerError(504, message, code=UPSTREAM_GONE)


def says_full(error: Exception) -> bool:
    """Whether an error of the system's or of SQLite's says that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    # SQLite calls it an I/O error when there is no room for its shared memory.
    full = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
    return getattr(error, "sqlite_errorcode", None) in full


def revision_not_found(revision: str) -> ServerError:
    """404: no such branch, tag or commit."""
    return ServerError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def entry_removed(path: str, commit: str) -> ServerError:
    """404: the commit names the file, whose bytes are not here any more."""
    error = entry_not_found(path, commit)
    words = "was removed by gc: no branch and no tag has it, or upstream is not asked any more"
    error.message = f"{path} of {commit} {words}"
    return error


def entry_not_found(path: str, commit: str) -> ServerError:
    """404: the commit has no such file or folder."""
    headers = {"X-Repo-Commit": commit}
    return ServerError(404, f"Entry not found: {path}", code="EntryNotFound", headers=headers)
