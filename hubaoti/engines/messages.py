"""What a model is asked, and what it answers: plain records, which travel between processes too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from sys import float_info
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from hubaoti.errors import BadInput, BadRequest
from hubaoti.host.wire import ErrorRecord

Message = dict[str, Any]
Prompt = str | list[Message]  # a text, or a conversation for the model's chat template


_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Finite = Annotated[float, Meta(gt=0, le=float_info.max)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How texts are generated; None is as the model's own generation config says.

    `max_new_tokens` are at most that many for each prompt. `stop` are texts that end an answer.
    A `temperature` of 0 is greedy. With a `seed` the same prompts are sampled alike, as long as no
    other model samples in the process meanwhile.
    """

    max_new_tokens: _Count = 128
    do_sample: bool | None = None
    temperature: _Finite | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: _Count | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: _Finite | None = None
    num_beams: _Count | None = None
    seed: Annotated[int, Meta(ge=0, le=2**62)] | None = None
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()

    @classmethod
    def of(cls, **kwargs: Any) -> Sampling:
        """From the arguments of a call.

        Raises:
            BadRequest: one is unknown, or has a value that it cannot have.
            BadInput: a text to stop at is not Unicode.
        """
        heat = kwargs.get("temperature")
        if heat == 0 and not isinstance(heat, bool):
            kwargs |= {"temperature": None, "do_sample": False}
        try:
            found = msgspec.convert(kwargs, cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise BadRequest(f"generate: {error}", hint=f"it takes: {known}") from error
        for text in found.stop:
            _require_encodable(text)
        return found


def read_prompts(value: Any) -> list[Prompt]:
    """Prompts from what a call gives: one text, or some texts and conversations.

    Raises:
        BadRequest: one is neither; BadInput: one is not Unicode.
    """
    if isinstance(value, str):
        value = [value]
    found: list[Prompt] = []
    for prompt in _read_list(value, "prompts"):
        is_talk = isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt)
        if not (isinstance(prompt, str) or (prompt and is_talk)):
            raise BadRequest(
                f"{prompt!r:.80} is no prompt",
                hint='a prompt is a text, or a list of {"role": "user", "content": "..."}',
            )
        _require_encodable(prompt)
        found.append(prompt)
    return found


def read_texts(value: Any) -> list[str]:
    """Texts from what a call gives: one, or some.

    Raises:
        BadRequest: one is none; BadInput: one is not Unicode.
    """
    found = [value] if isinstance(value, str) else _read_list(value, "texts")
    for text in found:
        if not isinstance(text, str):
            raise BadRequest(f"{text!r:.80} is no text", hint="give texts")
        _require_encodable(text)
    return found


def _read_list(value: Any, what: str) -> list[Any]:
    """What is a list, or another row of things; a mapping and bytes are refused."""
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, bytes)):
        raise BadRequest(f"{value!r:.80} are no {what}", hint=f"give a list of {what}")
    return [*value]


def _require_encodable(prompt: Prompt) -> None:
    """Refuse a prompt that cannot be written down: half a character, or what is not plain."""
    try:
        msgspec.json.encode(prompt)
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{prompt!r:.80} is not UTF-8", hint="give it as whole characters"
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRequest(
            f"{prompt!r:.80} is no prompt: {error}", hint="give plain texts"
        ) from error


class Begin(msgspec.Struct, frozen=True):
    """Which model: a folder, what it is for (`generate` or `embed`), where, and in which dtype.

    `digest` is the artifact of the mirror whose graphs answer, `ops` the modules that register what
    they call.
    """

    folder: str
    task: str
    device: str = "cpu"
    dtype: str | None = None
    digest: str | None = None
    trust_remote_code: bool = False
    ops: tuple[str, ...] = ()


class Hello(msgspec.Struct, frozen=True):
    """What a worker is told first: the model, and the settings as an environment says them.

    `search` is where its engine finds modules, for those that register ops.
    """

    begin: Begin
    env: dict[str, str]
    search: tuple[bytes, ...] = ()


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Go on with each prompt; answered by `Generated`."""

    prompts: list[Prompt]
    sampling: Sampling


class Generation(msgspec.Struct, frozen=True):
    """What follows a prompt: the text without special tokens, its tokens, and why it ended.

    `finish` is `stop` where the model, or one of the texts to stop at, ended it, else `length`.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish: str


class Generated(msgspec.Struct, frozen=True, tag=True):
    """An answer for each prompt, in their order."""

    answers: list[Generation]


class Measure(msgspec.Struct, frozen=True, tag=True):
    """How many tokens has each prompt, and is there room for what is to follow?"""

    prompts: list[Prompt]
    sampling: Sampling


class Measured(msgspec.Struct, frozen=True, tag=True):
    """The tokens of each prompt, in their order."""

    tokens: list[int]


class Item(msgspec.Struct, frozen=True):
    """A continuation to be scored after its context."""

    context: str
    continuation: str


def read_items(value: Any) -> list[Item]:
    """Items from what a call gives: some, each as a pair of texts, too.

    Raises:
        BadRequest: one is none; BadInput: one is not Unicode.
    """
    return [_read_item(item) for item in _read_list(value, "items")]


def _read_item(value: Any) -> Item:
    """An item as it is, or of a pair of texts; what is neither is refused."""
    if isinstance(value, Item):
        return value
    pair = value if isinstance(value, (tuple, list)) else ()
    if [*map(type, pair)] != [str, str]:
        raise BadRequest(
            f"{value!r:.80} is no item to score", hint="give a context and a continuation, as texts"
        )
    _require_encodable(pair[0] + pair[1])
    return Item(*pair)


class Score(msgspec.Struct, frozen=True, tag=True):
    """How likely is each continuation? Answered by `Scored`."""

    items: list[Item]


class Likelihood(msgspec.Struct, frozen=True):
    """The log-likelihood (natural, summed over `tokens`) of a continuation after its context.

    `is_greedy`: each of its tokens is the one that the model finds most likely.
    """

    logprob: float
    tokens: int
    is_greedy: bool


class Scored(msgspec.Struct, frozen=True, tag=True):
    """A likelihood for each item, in their order."""

    answers: list[Likelihood]


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Make one vector of each text; answered by `Embedded`."""

    texts: list[str]


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """Vectors of `width` numbers, float32, row after row."""

    width: int
    values: bytes


class Use(msgspec.Struct, frozen=True, tag=True):
    """Answer by the graphs of an artifact of the mirror from now on."""

    digest: str


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Say how the model stands; answered by `State`."""


class State(msgspec.Struct, frozen=True, tag=True):
    """How a model stands: the artifact whose graphs answer, the bytes that it holds, its calls.

    `compiled` and `eager` count calls of regions; `reasons` say how often, and why, it was eager.
    `host` is the kind of host that verdicts on graphs hold for.
    """

    task: str
    artifact: str | None
    bytes: int
    compiled: int
    eager: int
    reasons: dict[str, int]
    host: str


EngineRequest: TypeAlias = Generate | Measure | Score | Embed | Use | Tell
EngineResponse: TypeAlias = Generated | Measured | Scored | Embedded | State | ErrorRecord
# What each is answered by, where it does not fail.
REPLIES: dict[type[EngineRequest], type[EngineResponse]] = {
    **{Generate: Generated, Measure: Measured, Score: Scored, Embed: Embedded},
    **{Use: State, Tell: State},
}
