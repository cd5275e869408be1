"""What a model is asked, and what it answers: plain records, which travel between processes too."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from hubaoti.errors import BadRequest

Message = dict[str, Any]
Prompt = str | list[Message]  # a text, or a conversation for the model's chat template


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How texts are generated; None is as the model's own generation config says.

    `max_new_tokens` are at most that many for each prompt. `stop` are texts that end an answer.
    With a `seed` the same prompts are sampled alike.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, words: dict[str, Any]) -> Sampling:
        """From the words of a call.

        Raises:
            BadRequest: one is unknown, or has a value that it cannot have.
        """
        try:
            found = msgspec.convert(words, cls)
        except msgspec.ValidationError as why:
            known = ", ".join(cls.__struct_fields__)
            raise BadRequest(f"generate: {why}", hint=f"it takes: {known}") from why
        if found.max_new_tokens < 1:
            raise BadRequest(
                f"max_new_tokens is {found.max_new_tokens}", hint="one or more are generated"
            )
        return found


class Begin(msgspec.Struct, frozen=True):
    """Which model: a folder, what it is for (`generate` or `embed`), where, and in which dtype.

    `digest` is the artifact of the mirror whose graphs answer.
    """

    folder: str
    task: str
    device: str = "cpu"
    dtype: str | None = None
    digest: str | None = None
    trust_remote_code: bool = False


class Hello(msgspec.Struct, frozen=True):
    """What a worker is told first: the model, and the settings as an environment says them."""

    begin: Begin
    env: dict[str, str]


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Go on with each prompt."""

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


def item_of(said: Any) -> Item:
    """An item from a pair of texts.

    Raises:
        BadRequest: it is none.
    """
    if isinstance(said, Item):
        return said
    if isinstance(said, str) or [*map(type, said)] != [str, str]:
        raise BadRequest(
            f"{said!r:.80} is no item to score", hint="give a context and a continuation, as texts"
        )
    return Item(*said)


class Score(msgspec.Struct, frozen=True, tag=True):
    """How likely is each continuation?"""

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
    """One vector for each text."""

    texts: list[str]


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """Vectors of `width` numbers, float32, row after row."""

    width: int
    values: bytes


class Use(msgspec.Struct, frozen=True, tag=True):
    """Answer by the graphs of an artifact of the mirror from now on."""

    digest: str


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Say how it stands."""


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


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request that failed, as the error that it was."""

    kind: str
    message: str
    hint: str


Ask: TypeAlias = Generate | Measure | Score | Embed | Use | Tell
Reply: TypeAlias = Generated | Measured | Scored | Embedded | State | Failed
