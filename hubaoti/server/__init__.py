"""An endpoint that speaks the Hub's protocol: what the official clients call, and no more.

Under the root: `hub.sqlite3` (repos, refs, commits), `objects/` (files under their SHA-256),
`xorbs/` (Xet uploads not yet taken apart), `tmp/` (files being written, emptied at the start) and
`lock`. A file is stored before the commit that names it, and a commit is one transaction, so a
kill leaves all of it or none. Deleting a repo leaves its objects, for others may name them too,
until `gc` looks which ones nobody does.
"""

from hubaoti.errors import MissingDependency

try:
    from hubaoti.server.app import create_app
    from hubaoti.server.hub import Service
    from hubaoti.server.run import Endpoint, serve, serve_in_thread
    from hubaoti.server.upstream import Upstream
except ModuleNotFoundError as _error:
    if _error.name is None or _error.name.partition(".")[0] == "hubaoti":
        raise
    raise MissingDependency(
        f"serving needs {_error.name}, which is not installed",
        hint="pip install blake3 lz4 starlette uvicorn",
    ) from _error

__all__ = ["Endpoint", "Service", "Upstream", "create_app", "serve_in_thread", "serve"]
