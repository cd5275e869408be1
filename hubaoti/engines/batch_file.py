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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from hubaoti.artifact.canonical import encode_canonical
from hubaoti.disk import explain_disk_errors
from hubaoti.engines.lightweight import LightweightEngine
from hubaoti.engines.messages import Generation, Prompt, Sampling
from hubaoti.errors import BadRequest, Conflict, OutputExists

_PROMPTS_A_BATCH = 16  # prompts that are asked before their answers are written
_BEGIN = b'{"line":'  # of each answer
_SHAPE = 'a line is {"prompt": "..."}, {"messages": [...]} or "...", each with an "id" if you like'


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
class BatchRequest:
    """Who is asked, and how: the arguments of `generate`."""

    model: str
    sampling: dict[str, Any]

    @property
    def digest(self) -> str:
        """Twelve hex digits that are the same for the same arguments of `generate`."""
        return hashlib.sha256(encode_canonical(self.sampling)).hexdigest()[:12]

    def make_kwargs(self, line: int) -> dict[str, Any]:
        """The arguments for prompts from a line on: a seed is another for each batch."""
        seed = self.sampling.get("seed")
        return self.sampling if seed is None else {**self.sampling, "seed": seed + line}

    def make_line(self, line: Line, answer: Generation) -> Written:
        """An answer as its line in the file, which `count_answered` knows again."""
        return Written(
            line=line.line,
            model=self.model,
            prompt=line.prompt,
            text=answer.text,
            tokens=len(answer.tokens),
            finish=answer.finish,
            asked=self.digest,
            id=line.id,
        )


@dataclass(frozen=True, slots=True)
class BatchProgress:
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
        """New tokens a second in this run; 0 before the first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0


def answer_file(
    engine: LightweightEngine,
    model: str,
    prompts: Path,
    out: Path,
    sampling: dict[str, Any],
    report: Callable[[BatchProgress], None],
) -> BatchProgress:
    """Answer every prompt of a file that has no answer yet, in their order.

    Raises:
        BadRequest: a line is no prompt, or they cannot be sampled so; nothing was answered.
        OutOfBounds: a prompt is longer than the cache; nothing was answered.
        OutputExists: `out` holds something else than answers to these prompts.
        Conflict: another run writes `out`.
    """
    most = Sampling.of(**sampling).max_new_tokens
    lines, request = read_prompt_file(prompts), BatchRequest(model, sampling)
    with open_answers(out) as file:
        before = count_answered(file, out, lines, request)
        engine.measure(model, [line.prompt for line in lines], max_new_tokens=most)
        started = time.perf_counter()
        progress = BatchProgress(before, len(lines), before, 0, 0.0)
        report(progress)
        for few in batch_remaining(before, lines):
            kwargs = request.make_kwargs(few[0].line)
            answers = engine.generate(model, [line.prompt for line in few], **kwargs)
            pairs = zip(few, answers, strict=True)
            _write_lines(file, out, [request.make_line(*pair) for pair in pairs])
            progress = replace(
                progress,
                answered=progress.answered + len(few),
                tokens=progress.tokens + sum(len(answer.tokens) for answer in answers),
                seconds=time.perf_counter() - started,
            )
            report(progress)
        return progress


def batch_remaining(before: int, lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    """The prompts that are left, in the batches that a run without a stop would ask."""
    start = before
    while start < len(lines):
        end = (start // _PROMPTS_A_BATCH + 1) * _PROMPTS_A_BATCH
        yield lines[start:end]
        start = end


def read_prompt_file(path: Path) -> list[Line]:
    """The prompts of a file; empty lines are none.

    Raises:
        BadRequest: it cannot be read, or a line is no prompt.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}", hint="give a file") from error
    found = [
        _parse_line(number, text, path) for number, text in enumerate(lines, 1) if text.strip()
    ]
    if not found:
        raise BadRequest(f"{path} has no prompt", hint=_SHAPE)
    return found


def _parse_line(number: int, text: bytes, path: Path) -> Line:
    """A prompt from a line of JSON; what is none is refused with its number."""
    try:
        value = msgspec.json.decode(text)
        if isinstance(value, str):
            value = {"prompt": value}
        fields = {"line": number, "prompt": _choose_prompt(value), "id": value.get("id")}
        return msgspec.convert(fields, Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"{path}, line {number} is no prompt: {error!s:.120}", hint=_SHAPE
        ) from error


def _choose_prompt(value: Any) -> Any:
    """What a line has as its prompt.

    Raises:
        msgspec.ValidationError: it has none.
    """
    if not isinstance(value, dict):
        raise msgspec.ValidationError("it is neither a text nor an object")
    for name in ("prompt", "messages"):
        if name in value:
            return value[name]
    there = f"only {', '.join(value)}" if value else "nothing"
    raise msgspec.ValidationError(f"it has no prompt and no messages, {there}")


@contextmanager
def open_answers(out: Path) -> Iterator[int]:
    """A file for answers, for us alone.

    Raises:
        Conflict: another run has it.
        BadRequest: it cannot be written.
    """
    try:
        file = os.open(out, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise BadRequest(
            f"{out} cannot be written: {error.strerror}", hint="give a file"
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadRequest(f"{out} is no file that keeps what is written", hint="give a file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it, or name another"
            raise Conflict(f"another run writes {out}", hint=hint) from error
        yield file
    finally:
        os.close(file)


def count_answered(file: int, out: Path, lines: Sequence[Line], request: BatchRequest) -> int:
    """How many prompts have answers already; the rest of a line that was never finished is cut.

    Raises:
        OutputExists: what is there is no answers of this model to these prompts.
    """
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(0)
        content = reader.read()
    whole = content.rfind(b"\n") + 1
    found = content[:whole].splitlines()
    for index, text in enumerate(found):
        try:
            answer = msgspec.json.decode(text, type=Written)
            line = lines[index]
            ours = (answer.line, answer.prompt, answer.model, answer.asked)
            same = ours == (line.line, line.prompt, request.model, request.digest)
        except (msgspec.MsgspecError, UnicodeDecodeError, IndexError):
            same = False
        if not same:
            raise OutputExists(
                f"{out}, line {index + 1} is no answer of {request.model}, sampled like this, to "
                f"prompt {index + 1}",
                hint="name another file: this one is left as it is",
            )
    rest = content[whole:]
    if rest[: len(_BEGIN)] != _BEGIN[: len(rest)]:
        raise OutputExists(f"{out} ends with something else than an answer", hint="name another")
    os.ftruncate(file, whole)
    os.lseek(file, 0, os.SEEK_END)
    return len(found)


def _write_lines(file: int, out: Path, answers: Sequence[Written]) -> None:
    """Write answers, and see that they stay."""
    content = memoryview(b"".join(msgspec.json.encode(each) + b"\n" for each in answers))
    with explain_disk_errors(out.absolute().parent):
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
