"""Requests of an endpoint that is busy: asked again after a while, a bounded number of times.

Some of huggingface_hub's calls (trees, downloads, uploads) repeat their requests by themselves,
with its `http_backoff`. It waits as long as the endpoint says, however long: `heed_answers` bounds
that. All others are repeated here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from hubaoti.hub.bounds import bound_answer, describe_too_long
from hubaoti.hub.renames import refuse_renamed
from hubaoti.hub.silence import Silence, Silent
from hubaoti.progress import Progress, report_nothing

if TYPE_CHECKING:
    from tenacity import RetryCallState

_T = TypeVar("_T")

LIBRARY = "hubaoti"  # as our requests name us
BUSY = frozenset({429, 502, 503, 504})
"""Answers that pass by themselves."""
_UPSTREAM_GONE = "UpstreamGone"  # X-Error-Code of `hubaoti serve --upstream`, which waits by itself
ATTEMPTS = 6
FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 8.0  # seconds, where the endpoint names none
LONGEST_WAIT = 300.0  # seconds, of all waits together: the Hub counts in windows of as many
MOST_ANSWERS = 2000  # to one request of ours, which may be of many pages
# httpx's and httpx2's, of connections that were there: the request may have been answered already.
_DROPPED = {"ReadError", "WriteError", "RemoteProtocolError"}
_patience: ContextVar[Patience | None] = ContextVar("patience", default=None)
_open: list[Patience] = []  # of all threads
# Of a thread of huggingface_hub's own it is that thread's, which asks one thing after the other.
_silence: ContextVar[Silence | None] = ContextVar("silence", default=None)
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})\b")


@dataclass(slots=True, eq=False)
class Patience:
    """What one request is waited for, who is told of it, and what it has taken until now.

    `of_files` says that it asks for a file's bytes, too, which those who asked for it count. It
    `follows` repos to the names that they have now, where nobody's trust is asked about.
    """

    progress: Progress
    of_files: bool = False
    follows: bool = False
    waits: float = 0.0  # seconds that were asked for
    answers: int = 0
    is_over: bool = False  # the endpoint was silent for too long, to one thread of its

    def is_file(self, response: Any) -> bool:
        """Whether an answer is a file that was asked for: no page, no refusal and no receipt."""
        request = response.request
        is_there = request.method == "GET" and response.status_code in {200, 206}
        return self.of_files and is_there and "/api/" not in request.url.path

    def is_spent(self, status: int, seconds: float) -> bool:
        """Whether an endpoint that is busy asks for more seconds than all waits may take."""
        wish = f", and asks to wait {seconds:.0f} s" if seconds else ""
        self.progress(f"the endpoint is busy ({status}){wish}")
        self.waits += seconds
        return self.waits > LONGEST_WAIT


def retry_request(request: Callable[[bool], _T], progress: Progress) -> _T:
    """What a request brings, repeated while the endpoint is busy or drops the connection.

    The request is called with whether it is a repetition. The last error is raised as it is.
    """
    from tenacity import Retrying, retry_if_exception

    def tell(state: RetryCallState) -> None:
        status = find_response_status(_find_error(state))
        if status is None:  # of a busy one, `heed_answers` has told
            progress(f"the connection was dropped: asking again in {state.upcoming_sleep:.1f} s")

    retrying = Retrying(
        retry=retry_if_exception(_is_passing),
        wait=_choose_wait,
        stop=_is_enough,
        before_sleep=tell,
        reraise=True,
    )
    return retrying(lambda: request(retrying.statistics["attempt_number"] > 1))


def _is_passing(error: BaseException) -> bool:
    """Whether the same request may be answered a little later."""
    if is_upstream_gone(getattr(error, "response", None)):
        return False
    return find_response_status(error) in BUSY or type(error).__name__ in _DROPPED


def _is_enough(state: RetryCallState) -> bool:
    """Whether to give up: after so many attempts, or if the next would be too far away."""
    patience = _patience.get()
    waits = 0.0 if patience is None else patience.waits
    seconds: float = max(waits, state.idle_for + state.upcoming_sleep)
    return seconds > LONGEST_WAIT or state.attempt_number >= ATTEMPTS


def _choose_wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asks for, else twice as many each time."""
    from tenacity import wait_exponential, wait_random

    backoff = wait_exponential(FIRST_WAIT, _LONGEST_BACKOFF) + wait_random(0, FIRST_WAIT / 2)
    return find_retry_after(_find_error(state)) or backoff(state)


@contextmanager
def heed_answers(
    progress: Progress, of_files: bool = False, follows: bool = False
) -> Iterator[None]:
    """While `progress` is told of each busy answer; answers that are not `of_files` are bounded.

    Without `follows`, a repo that has another name now is an error.

    From now on huggingface_hub's waits are bounded, too.
    """
    _heed_all_sessions()
    patience = Patience(progress, of_files, follows)
    before, silence = _patience.set(patience), _silence.set(Silence())
    _open.append(patience)
    try:
        yield
    finally:
        _open.remove(patience)
        _patience.reset(before)
        _silence.reset(silence)


def _heed_all_sessions() -> None:
    """Have huggingface_hub's session heed answers, and any that it makes anew within a call.

    Private, checked on huggingface_hub 1.30 to 2.4: `_http._GLOBAL_CLIENT_FACTORY`, which makes
    them. Where it has another name, one that is made anew is heeded from the next call on.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    make: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY", None)
    if make is not None and not isinstance(make, _HeedingFactory):
        _http._GLOBAL_CLIENT_FACTORY = _HeedingFactory(make)
    _add_heed_hook(get_session())


@dataclass(frozen=True, slots=True)
class _HeedingFactory:
    """Makes sessions as somebody else does, which heed answers."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        """A session that heeds answers."""
        return _add_heed_hook(self.make())


def _add_heed_hook(client: Any) -> Any:
    """A session that heeds answers, and does not wait for ever for the next byte of one."""
    for when, hook in (("request", _limit_wait), ("response", _heed)):
        if hook not in (hooks := client.event_hooks[when]):
            hooks.append(hook)
    if client.timeout.read is None:
        client.timeout = LONGEST_WAIT
    return client


def _limit_wait(request: Any) -> None:
    """Have a request of ours wait for no longer than an endpoint may be silent.

    Raises:
        Silent: it was, to this call.
    """
    if not _is_ours(request):
        return
    patience = _patience.get() or next(reversed(_open), None)
    if patience is not None and patience.is_over:
        raise Silent
    silence = _silence.get()
    if silence is None:
        _silence.set(silence := Silence())
    try:
        silence.begin(request)
    except Silent:
        if patience is not None:
            patience.is_over = True
        raise


def _is_ours(request: Any) -> bool:
    return bool(request.headers.get("user-agent", "").startswith(f"{LIBRARY}/"))


def _heed(response: Any) -> None:
    """Bound an answer to us, and tell of a busy one.

    One that asks for too long a wait is an error here already.

    Raises:
        HfHubHTTPError: as huggingface_hub would raise it, which does not repeat the request then.
    """
    from huggingface_hub import hf_raise_for_status

    if not _is_ours(response.request):
        return
    # A thread of huggingface_hub's own has none, and brings files or takes them.
    own = _patience.get()
    patience = own or Patience(report_nothing, of_files=True)
    if not patience.is_file(response):
        patience.answers += 1
        if patience.answers > MOST_ANSWERS:
            raise describe_too_long(response, f"more than {MOST_ANSWERS} answers")
        response.stream = bound_answer(response)
    if own is not None and not own.follows:
        refuse_renamed(response)
    if silence := _silence.get():
        response.stream = silence.answer(response)
    if response.status_code not in BUSY:
        return
    waiting = own or next(reversed(_open), patience)  # such a thread's is that of who asked last
    if is_upstream_gone(response) or _is_enough_of(response, waiting):
        response.read()
        hf_raise_for_status(response)


def _is_enough_of(response: Any, waiting: Patience) -> bool:
    """Whether a busy answer is one too many, or one to a question that is not asked again."""
    spent = waiting.is_spent(response.status_code, read_retry_after(response.headers) or 0)
    # Of this one huggingface_hub reads the body, which may be no JSON, before the status.
    return spent or bool(response.request.url.path.endswith("/validate-yaml"))


def _find_error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def is_upstream_gone(response: Any) -> bool:
    """Whether an endpoint says that it is well, and the one that it pulls through is not."""
    is_busy = response is not None and response.status_code in BUSY
    return is_busy and response.headers.get("x-error-code") == _UPSTREAM_GONE


def find_response_status(error: BaseException | None) -> int | None:
    """The status of the answer that an error tells of."""
    return getattr(getattr(error, "response", None), "status_code", None)


def find_retry_after(error: BaseException | None) -> float | None:
    """How long the answer that an error tells of asks to wait; None where it does not say."""
    response = getattr(error, "response", None)
    return None if response is None else read_retry_after(response.headers)


def read_retry_after(headers: Any) -> float | None:
    """The seconds of Retry-After, a number or a date, or until the Hub's rate limit is reset."""
    text = str(headers.get("retry-after", "")).strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    spent = _RATE_LIMIT.search(str(headers.get("ratelimit", "")))
    return float(spent[1]) if spent else None
