"""`hubaoti run` of prompts: one, some, or a file of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hubaoti.cli.output import Steps, print_json, print_line, print_text
from hubaoti.cli.run import refuse_given
from hubaoti.errors import BadRequest
from hubaoti.settings import Settings

if TYPE_CHECKING:
    from hubaoti.engines.asks import State
    from hubaoti.engines.lightweight import LightweightEngine


def answer_prompts(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Answer prompts, and print the answers or write them to a file."""
    refuse_odd(options)
    model = options["model"]
    with loaded(options, quiet or as_json) as engine:
        if options["file"] is not None:
            write_answers(engine, options, as_json, quiet)
        else:
            print_answers(engine, options, as_json)
        if not (quiet or as_json):
            print_line(counted(engine.state(model), engine.models()[0].why), err=True)


def refuse_odd(options: dict[str, Any]) -> None:
    """Refuse what would not be read.

    Raises:
        BadRequest: it was given, or what belongs to it was not.
    """
    if (options["file"] is None) != (options["out"] is None):
        given, other = ("--out", "--file") if options["file"] is None else ("--file", "--out")
        raise BadRequest(f"{given} without {other}", hint=f"say {other} too")
    if options["eager"]:
        refuse_given(options, ("recipe", "ops"), "of the graphs, and --eager opens none")


@contextmanager
def loaded(options: dict[str, Any], quiet: bool) -> Iterator[LightweightEngine]:
    """An engine with the model, and the graphs of the repo where one is named."""
    from hubaoti import api
    from hubaoti.engines.lightweight import LightweightEngine

    settings = Settings.from_env()
    settings = replace(settings, graphs=settings.graphs and not options["eager"])
    with Steps(quiet) as say:
        artifact = None
        if options["repo"] is not None and settings.graphs:
            artifact = api.pull(
                options["repo"],
                recipe=options["recipe"],
                trust=options["trust"],
                settings=settings,
                say=say,
            )
        engine = LightweightEngine(
            settings,
            memory=options["memory"],
            device=options["device"],
            isolate=options["isolate"],
            ops=options["ops"],
            say=say,
        )
        engine.load(options["model"], artifact, task="generate")
    with engine:
        yield engine


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """The words of `generate`."""
    names = ("max_new_tokens", "seed")
    words = {name: options[name] for name in names if options[name] is not None}
    heat = options["temperature"]
    if heat is not None:
        words |= {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
    return words


def print_answers(engine: LightweightEngine, options: dict[str, Any], as_json: bool) -> None:
    """What follows each prompt, as text or as JSON."""
    model, prompts = options["model"], options["prompts"]
    started = time.perf_counter()
    answers = engine.generate(model, prompts, **sampling_of(options))
    seconds = time.perf_counter() - started
    if as_json:
        found = [
            {
                "prompt": prompt,
                "text": answer.text,
                "tokens": answer.tokens,
                "finish": answer.finish,
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        facts = {"model": model, "seconds": round(seconds, 3), **told(engine.state(model))}
        print_json(facts | {"answers": found})
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print_text(f"{prompt}{answer.text if answer.text[:1].isspace() else ' ' + answer.text}")


def write_answers(
    engine: LightweightEngine, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Answer a file's prompts, with progress."""
    from hubaoti.engines.answers import answer_file

    model, out = options["model"], options["out"]
    words = sampling_of(options)
    with bar(quiet or as_json) as show:
        done = answer_file(engine, model, options["file"], out, words, show)
    facts = {"out": str(out), "prompts": done.prompts, "answered_before": done.before}
    facts |= {"tokens": done.tokens, "seconds": round(done.seconds, 3)}
    facts |= {"tokens_per_second": round(done.rate, 1)}
    if as_json:
        print_json(facts | told(engine.state(model)))
    elif not quiet:
        before = f", {done.before} of them before" if done.before else ""
        print_line(f"{done.prompts} answers in {out}{before}; {done.rate:.0f} tokens/s", err=True)


@contextmanager
def bar(quiet: bool) -> Iterator[Any]:
    """What shows progress on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("  answers"), BarColumn(), MofNCompleteColumn())
    rate = TextColumn("{task.fields[rate]:.0f} tokens/s")
    with Progress(*columns, rate, console=Console(stderr=True), disable=quiet) as shown:
        task = shown.add_task("answers", rate=0.0)

        def show(found: Any) -> None:
            shown.update(task, completed=found.answered, total=found.prompts, rate=found.rate)

        yield show


def told(state: State) -> dict[str, Any]:
    """Who answered, as JSON."""
    facts = {"artifact": state.artifact, "compiled": state.compiled, "eager": state.eager}
    return facts | {"reasons": state.reasons}


def counted(state: State, why: str) -> str:
    """Who answered, in a line."""
    if state.artifact is None:
        return f"  answered without graphs: {why}"
    why = ", ".join(f"{reason} {calls}" for reason, calls in state.reasons.items())
    own = f", the model itself {state.eager} ({why})" if state.eager else ""
    return f"  graphs answered {state.compiled} calls of blocks{own}"
