"""The one door to the Hub: huggingface_hub's client, with our errors and nothing printed.

huggingface_hub takes half a second to import, so it is imported by the first request, not before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from hubaoti.errors import AuthFailed, HubaotiError, HubUnreachable
from hubaoti.hub.bounds import TooLong
from hubaoti.hub.errors import NO_HUB, ErrorTranslator, StaleParent, silence_hub
from hubaoti.hub.retry import LIBRARY, heed_answers, retry_request
from hubaoti.progress import Progress, report_nothing
from hubaoti.settings import ENDPOINT, Settings

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_T = TypeVar("_T")


class Door:
    """How the Hub at `settings.endpoint` is asked, whatever for.

    `progress` is told when the endpoint is busy and has to be waited for.
    """

    def __init__(self, settings: Settings, progress: Progress = report_nothing) -> None:
        self._settings, self._progress = settings, progress
        self.endpoint = settings.endpoint
        # A commit id proves nothing about an endpoint: what one says must not answer for another.
        self.cache = settings.mirror / "hub" / endpoint_folder(settings.endpoint)
        # In whose name one is logged in there is no other endpoint's affair.
        self._stored = self.endpoint == ENDPOINT and settings.login is None
        self._words = ErrorTranslator(self.endpoint, settings.token, self.cache, self._stored)

    @property
    def is_offline(self) -> bool:
        """Whether `HF_HUB_OFFLINE` is set, so that nothing may be asked for."""
        return self._settings.offline

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi, constants

        # Else each process first asks its endpoint for a list of the tools that it may run in.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        # What did not fill a piece when a download is cut is not kept: 10 MiB by default.
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 20
        given = self._settings.token
        if given is not None and not given.isascii():
            hint = "set it to what the endpoint gave you, letter by letter; as hf_…"
            raise AuthFailed("HF_TOKEN is no token: it has letters that no token has", hint=hint)
        token = given or (None if self._stored else False)
        more = {"accept-encoding": "identity"}  # what is packed has no bound
        if self._settings.basic is not None:
            more["authorization"] = self._settings.basic
        return HfApi(self.endpoint, token=token, library_name=LIBRARY, headers=more)

    def _ask(
        self,
        what: str,
        request: Callable[[bool], _T],
        *,
        writing: bool = False,
        local: bool = False,
        of_files: bool = False,
        follows: bool = False,
    ) -> _T:
        """What a request brings. While the endpoint is busy it is repeated, and told that it is."""
        with self._door(what, writing, local, of_files, follows):
            return retry_request(request, self._progress)

    def _convert(self, found: Any, kind: Any, how: str) -> Any:
        """What the endpoint said, as the type of the Hub's protocol; `how` says it is of none."""
        try:
            return msgspec.convert(found, kind)
        except (msgspec.ValidationError, UnicodeError) as error:
            message = f"{self.endpoint} {how}: {self._words.first_line(error)}"
            raise HubUnreachable(message, hint=NO_HUB) from error

    @contextmanager
    def _door(
        self,
        what: str,
        writing: bool = False,
        local: bool = False,
        of_files: bool = False,
        follows: bool = False,
    ) -> Iterator[None]:
        """Around every request: foreign errors become ours, and nothing is printed."""
        if self._settings.offline and not local:
            raise HubUnreachable(
                f"{what} is not asked for at {self.endpoint}: HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE; with it, hubaoti pull gives what it gave before by a "
                "full commit id, a digest or a lockfile, and nothing else is answered",
            )
        heeded = nullcontext() if local else heed_answers(self._progress, of_files, follows)
        try:
            with silence_hub(), heeded:
                yield
        except (HubaotiError, StaleParent, TooLong):
            raise
        except Exception as error:
            raise self._words.translate(error, what, writing) from error


def endpoint_folder(endpoint: str) -> str:
    """A folder's name for an endpoint: one that people recognize, and no other endpoint has."""
    host = re.sub(r"[^A-Za-z0-9.-]", "_", endpoint.partition("://")[2])[:60]
    return f"{host}~{hashlib.sha256(endpoint.encode()).hexdigest()[:8]}"
