"""Repos that have another name by now: an endpoint redirects whoever asks for the old one.

Whom a name trusts is its owner. The new name may be somebody else's, so nobody is led there.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from hubaoti.errors import RepoMoved
from hubaoti.escape import escape_line

# What of a path names a repo: in what is asked of it, and before its files.
_API = re.compile(r"/api/(?:models|datasets|spaces|kernels)/(?P<repo>[^/]+/[^/]+)")
_FILES = re.compile(r"/(?:(?:datasets|spaces|kernels)/)?(?P<repo>[^/]+/[^/]+)/resolve/")


def refuse_renamed(response: Any) -> None:
    """See that an answer does not lead from one repo to another; elsewhere it may lead.

    Raises:
        RepoMoved: it does.
    """
    location = response.headers.get("location")
    if location is None or not 300 <= response.status_code < 400:
        return
    url = str(response.request.url)
    here, there = _find_repo(url), _find_repo(urljoin(url, location))
    if here is not None and there is not None and here != there:
        host = urlsplit(url)
        raise describe_renamed(here, f"{host.scheme}://{host.netloc}", there)


def describe_renamed(repo: str, endpoint: str, name: str) -> RepoMoved:
    name = escape_line(name)
    return RepoMoved(
        f"{repo} at {endpoint} is called {name} now: its owner is whom that names",
        hint=f"see whose it is; if you trust them, ask for {name}",
    )


def _find_repo(url: str) -> str | None:
    """The repo that a URL asks, if it asks one."""
    path = urlsplit(url).path
    found = _API.search(path) or _FILES.search(path)
    return unquote(found["repo"]) if found else None
