"""A file of prompts, and the file of their answers, which goes on where it stopped.

Both are lines of JSON. An answer is written whole, and synced, before the next prompts are asked;
what a killed run left of a line is cut off. So no prompt is answered twice, and none is left out.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.canonical import canonical
from hubaoti.disks import explained
from hubaoti.engines.asks import Generation, Prompt
from hubaoti.engines.lightweight import LightweightEngine
from hubaoti.errors import BadRequest, Conflict, OutputExists

TOGETHER = 16  # prompts that are asked before their answers are written
BEGIN = b'{"line":'  # of each answer
SHAPE = 'a line is {"prompt": "..."}, {"messages": [...]} or "...", each with an "id" if you like'


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt of a file: its line, counted from one, and its own id, where it has one."""

    line: int
    prompt: Prompt
    id: str | int | None = None


class Written(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of answers; `asked` stands for how they were sampled."""

    line: int
    model: str
    prompt: Prompt
    text: str
    tokens: int
    finish: str
    asked: str
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked, and how: the words of `generate`."""

    model: str
    sampling: dict[str, Any]

    @property
    def digest(self) -> str:
        """The same for the same words."""
        return hashlib.sha256(canonical(self.sampling)).hexdigest()[:12]

    def at(self, line: int) -> dict[str, Any]:
        """The words for prompts from a line on: a seed is another for each batch."""
        seed = self.sampling.get("seed")
        return self.sampling if seed is None else {**self.sampling, "seed": seed + line}


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of all prompts have answers, `before` of them from an earlier run.

    `tokens` were generated in `seconds` by this one.
    """

    answered: int
    prompts: int
    before: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def answer_file(
    engine: LightweightEngine,
    model: str,
    prompts: Path,
    out: Path,
    sampling: dict[str, Any],
    told: Callable[[Progress], None],
) -> Progress:
    """Answer every prompt of a file that has no answer yet, in their order.

    Raises:
        BadRequest: a line is no prompt; nothing was answered.
        OutOfBounds: a prompt is longer than the cache; nothing was answered.
        OutputExists: `out` holds something else than answers to these prompts.
        Conflict: another run writes `out`.
    """
    lines, asked = lines_in(prompts), Asked(model, sampling)
    with opened(out) as file:
        before = answered_in(file, out, lines, asked)
        engine.measure(model, [line.prompt for line in lines], **sampling)
        started, tokens = time.perf_counter(), 0
        progress = Progress(before, len(lines), before, 0, 0.0)
        told(progress)
        for few in batches_from(before, lines):
            words = asked.at(few[0].line)
            answers = engine.generate(model, [line.prompt for line in few], **words)
            write(file, out, [written(*each, asked) for each in zip(few, answers, strict=True)])
            tokens += sum(len(answer.tokens) for answer in answers)
            spent = time.perf_counter() - started
            answered = progress.answered + len(few)
            progress = Progress(answered, len(lines), before, tokens, spent)
            told(progress)
        return progress


def batches_from(before: int, lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    """The prompts that are left, in the batches that a run without a stop would ask."""
    at = before
    while at < len(lines):
        end = (at // TOGETHER + 1) * TOGETHER
        yield lines[at:end]
        at = end


def lines_in(path: Path) -> list[Line]:
    """The prompts of a file; empty lines are none.

    Raises:
        BadRequest: it cannot be read, or a line is no prompt.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as why:
        raise BadRequest(f"{path} cannot be read: {why.strerror}", hint="give a file") from why
    found = [line_of(at, text, path) for at, text in enumerate(lines, 1) if text.strip()]
    if not found:
        raise BadRequest(f"{path} has no prompt", hint=SHAPE)
    return found


def line_of(at: int, text: bytes, path: Path) -> Line:
    """A prompt from a line."""
    try:
        said = msgspec.json.decode(text)
        if isinstance(said, str):
            said = {"prompt": said}
        prompt = said["prompt"] if "prompt" in said else said["messages"]
        words = {"line": at, "prompt": prompt, "id": said.get("id")}
        return msgspec.convert(words, Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as why:
        raise BadRequest(f"{path}, line {at} is no prompt: {why!r:.120}", hint=SHAPE) from why


@contextmanager
def opened(out: Path) -> Iterator[int]:
    """A file for answers, for us alone.

    Raises:
        Conflict: another run has it.
        BadRequest: it cannot be written.
    """
    try:
        file = os.open(out, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as why:
        raise BadRequest(f"{out} cannot be written: {why.strerror}", hint="give a file") from why
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadRequest(f"{out} is no file that keeps what is written", hint="give a file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as why:
            hint = "wait for it, or name another"
            raise Conflict(f"another run writes {out}", hint=hint) from why
        yield file
    finally:
        os.close(file)


def answered_in(file: int, out: Path, lines: Sequence[Line], asked: Asked) -> int:
    """How many prompts have answers already; the rest of a line that was never finished is cut.

    Raises:
        OutputExists: what is there is no answers of this model to these prompts.
    """
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(0)
        content = reader.read()
    whole = content.rfind(b"\n") + 1
    found = content[:whole].splitlines()
    for at, text in enumerate(found):
        try:
            answer = msgspec.json.decode(text, type=Written)
            same = at < len(lines) and is_of(answer, lines[at], asked)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            same = False
        if not same:
            raise OutputExists(
                f"{out}, line {at + 1} is no answer of {asked.model}, sampled like this, to prompt "
                f"{at + 1}",
                hint="name another file: this one is left as it is",
            )
    rest = content[whole:]
    if rest[: len(BEGIN)] != BEGIN[: len(rest)]:
        raise OutputExists(f"{out} ends with something else than an answer", hint="name another")
    os.ftruncate(file, whole)
    os.lseek(file, 0, os.SEEK_END)
    return len(found)


def is_of(answer: Written, line: Line, asked: Asked) -> bool:
    """Whether an answer is a model's to a prompt, sampled as it is asked for."""
    found = (answer.line, answer.prompt, answer.model, answer.asked)
    return found == (line.line, line.prompt, asked.model, asked.digest)


def written(line: Line, answer: Generation, asked: Asked) -> Written:
    """The line of an answer."""
    return Written(
        line=line.line,
        model=asked.model,
        prompt=line.prompt,
        text=answer.text,
        tokens=len(answer.tokens),
        finish=answer.finish,
        asked=asked.digest,
        id=line.id,
    )


def write(file: int, out: Path, answers: Sequence[Written]) -> None:
    """Write answers, and see that they stay."""
    content = memoryview(b"".join(msgspec.json.encode(each) + b"\n" for each in answers))
    with explained(out.absolute().parent):
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
