"""What huggingface_hub says, in our words: its errors become ours, its printing nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubaoti.disk import DISK_CLOSED, DISK_FULL, describe_disk_error, describe_no_room
from hubaoti.errors import (
    AuthFailed,
    BadRequest,
    Conflict,
    HubaotiError,
    HubUnreachable,
    OverQuota,
    RepoNotFound,
)
from hubaoti.escape import escape_line
from hubaoti.hub.retry import BUSY, find_response_status, find_retry_after, is_upstream_gone
from hubaoti.hub.silence import is_silence
from hubaoti.settings import ENDPOINT, Settings, override_environment

_BUSY_HUB = "the endpoint is overloaded, or starts anew: try again in some minutes"
NO_HUB = "see whether the endpoint is up and HF_ENDPOINT names it, then try again"


class StaleParent(Exception):
    """The branch moved since it was read: read it again and try again."""


class AnswerLost(StaleParent):
    """It moved, and perhaps by the very commit that was sent, whose answer never came."""


@dataclass(frozen=True, slots=True)
class ErrorTranslator:
    """The words for errors of an endpoint; none of them holds `token`, or the stored login's.

    `stored` says that the endpoint is sent huggingface_hub's stored login for want of a `token`.
    """

    endpoint: str
    token: str | None
    cache: Path
    stored: bool = False

    def translate(self, error: Exception, what: str, writing: bool) -> Exception:
        """The error of ours for a foreign one; `what` was asked for."""
        from huggingface_hub import errors

        cause = error.__cause__
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
            return self.translate(cause, what, writing)
        if isinstance(error, errors.HfHubHTTPError):
            return self._translate_status(error, what, writing)
        if isinstance(error, errors.HFValidationError):
            return BadRequest(
                f"{what}: {self.first_line(error)}", hint="write a repo as owner/name"
            )
        if _is_full(error):
            return describe_no_room(self.cache, 0)
        if isinstance(error, OSError) and error.errno in DISK_CLOSED:
            return describe_disk_error(error, self.cache)
        if (unreachable := self._describe_network(error, what)) is not None:
            return unreachable
        hint = "see whether the repo's card or files are odd; it is not the network"
        message = f"{type(error).__name__}: {self.first_line(error)}"
        return HubaotiError(f"huggingface_hub failed on {what}: {message}", hint=hint)

    def _describe_network(self, error: Exception, what: str) -> HubUnreachable | None:
        """The error where the endpoint, or the way to it, is to blame."""
        if is_silence(error):
            return self._describe_silent(what)
        # huggingface_hub stumbles over the body of a refusal that is no JSON object.
        refusal = error.__context__
        if isinstance(refusal, Exception) and (find_response_status(refusal) or 0) >= 500:
            return self._describe_unreachable(refusal, what, NO_HUB)
        return self._describe_unreachable(error, what, NO_HUB) if _is_of_network(error) else None

    def _translate_status(self, error: Any, what: str, writing: bool) -> Exception:
        """The error for an answer's status, which is no success."""
        from huggingface_hub import errors

        status = error.response.status_code if error.response is not None else 0
        if status == 412:
            return StaleParent(what)
        if isinstance(error, errors.GatedRepoError):
            hint = f"ask for access at {self.endpoint}/{what}, then set HF_TOKEN"
            return AuthFailed(f"{what} is gated", hint=hint)
        missing = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        if status == 404 or (isinstance(error, missing) and not writing):
            known = not isinstance(error, errors.RevisionNotFoundError)
            thing = "repo or file" if known else "revision"
            hint = (
                "check the name; if the repo is private, set HF_TOKEN to a token that may read it"
            )
            return RepoNotFound(f"{self.endpoint} shows no such {thing}: {what}", hint=hint)
        if status in (401, 403):
            return self._describe_unauthorized(error, what)
        if status in (409, 413):
            return self._describe_refusal(error, what, status)
        if status == 429:
            return self._describe_limited(error, what)
        if status >= 500 or status == 0:
            return self._describe_failure(error, what, status)
        hint = "see whether the endpoint serves the Hub's protocol"
        message = self.first_line(getattr(error, "server_message", None) or error)
        return HubaotiError(f"{self.endpoint} refused {what}: {message}", hint=hint)

    def _describe_refusal(self, error: Exception, what: str, status: int) -> HubaotiError:
        if status == 409:
            return Conflict(f"{what}: {self.first_line(error)}", hint="choose another name")
        hint = "have some removed there and gc run, or more allowed: hubaoti serve --max-bytes"
        message = self.first_line(getattr(error, "server_message", None) or error)
        return OverQuota(f"{self.endpoint} refused {what}: {message}", hint=hint)

    def _describe_unauthorized(self, error: Exception, what: str) -> AuthFailed:
        if self._find_token() is None:
            hint = "set HF_TOKEN, or log in with: hf auth login"
            if not self.stored:
                hint = "set HF_TOKEN; what `hf auth login` stored is for https://huggingface.co"
            return AuthFailed(f"{self.endpoint} wants a token for {what}", hint=hint)
        hint = "set HF_TOKEN to a token of this endpoint that may do this"
        message = f"{self.endpoint} refused the token for {what}: {self.first_line(error)}"
        return AuthFailed(message, hint=hint)

    def _describe_unreachable(self, error: Exception, what: str, hint: str) -> HubUnreachable:
        message = f"{self.endpoint} could not be asked for {what}: {self.first_line(error)}"
        return HubUnreachable(message, hint=hint)

    def _describe_silent(self, what: str) -> HubUnreachable:
        return HubUnreachable(
            f"{self.endpoint} is silent: {what} was waited for, and not a byte came",
            hint="see whether the endpoint is well and HF_ENDPOINT names it, then try again; files "
            "that came whole are kept",
        )

    def _describe_failure(self, error: Any, what: str, status: int) -> HubUnreachable:
        """The error of an endpoint that fails, is busy, or cannot ask its upstream."""
        if not is_upstream_gone(getattr(error, "response", None)):
            return self._describe_unreachable(error, what, _BUSY_HUB if status in BUSY else NO_HUB)
        said = self.first_line(error.server_message or error)
        return HubUnreachable(
            f"{self.endpoint} has no copy of {what}, and cannot reach its upstream: {said}",
            hint="see whether its upstream is up, then try again; what it has copied works",
        )

    def _describe_limited(self, error: Exception, what: str) -> HubUnreachable:
        seconds = find_retry_after(error)
        when = "in some minutes" if seconds is None else f"in {seconds:.0f} s"
        token = ", or set HF_TOKEN: who has a token may ask more often"
        return HubUnreachable(
            f"{self.endpoint} is asked too often, and did not answer for {what} "
            f"(429 Too Many Requests)",
            hint=f"try again {when}{'' if self._find_token() else token}",
        )

    def first_line(self, error: BaseException) -> str:
        """The first line of a foreign message, without the token."""
        lines = (line.strip() for line in str(error).splitlines())
        words = next(filter(None, lines), type(error).__name__)
        if token := self._find_token():
            for spelling in (token, repr(token)[1:-1]):
                words = words.replace(spelling, "***")
        return escape_line(words)

    def _find_token(self) -> str | None:
        """The token that our requests carry; None where they carry none."""
        from huggingface_hub import get_token

        return self.token or (get_token() if self.stored else None)


def _is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full.

    hf_xet says it in words only; huggingface_hub warns of it, which is an error where the user
    made warnings errors.
    """
    words = ("No space left", "Not enough free disk space")
    numbered = isinstance(error, OSError) and error.errno in DISK_FULL
    return numbered or any(each in str(error) for each in words)


def _is_of_network(error: BaseException) -> bool:
    """Whether the endpoint, or the way to it, is to blame.

    hf_xet's errors are plain RuntimeErrors; huggingface_hub's own OSErrors, as of a file that came
    too short, have no number. What is no JSON came from something that is no Hub.
    """
    from huggingface_hub import errors

    numberless = isinstance(error, OSError) and error.errno is None
    # Its transport's root, which is httpx in its releases 1 and httpx2 in 2.
    root = errors.HTTPError  # type: ignore[attr-defined]
    kinds = (root, ConnectionError, TimeoutError, json.JSONDecodeError)
    return isinstance(error, kinds) or numberless or type(error) is RuntimeError


@contextmanager
def hide_stored_login(settings: Settings) -> Iterator[None]:
    """While libraries that ask the Hub by themselves keep the stored login from other endpoints.

    An explicit HF_TOKEN they send as our own requests do.
    """
    from huggingface_hub import constants

    if settings.token or {settings.endpoint, constants.ENDPOINT} == {ENDPOINT}:
        yield
        return
    before = constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    try:
        with override_environment(HF_HUB_DISABLE_IMPLICIT_TOKEN="1"):  # for processes of our own
            yield
    finally:
        constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = before


@contextmanager
def silence_hub() -> Iterator[None]:
    """No progress bars and no log lines, as of retries, unless the user's environment asks.

    Both are switches of the whole process: around work in threads, hold this outside of them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as log
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    with ExitStack() as undo:
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled():
            disable_progress_bars()
            undo.callback(enable_progress_bars)
        if log.get_verbosity() == logging.WARNING:  # which no user changed
            log.set_verbosity(logging.ERROR)
            undo.callback(log.set_verbosity, logging.WARNING)
        yield
