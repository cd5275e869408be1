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
    from hubaoti.engines.lightweight import LightweightEngine
    from hubaoti.engines.messages import State


def answer_prompts(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Answer prompts, and print the answers or write them to a file."""
    from hubaoti.engines.messages import Sampling

    _refuse_odd(options)
    Sampling.of(**_read_sampling(options))  # before a model is loaded for it
    model = options["model"]
    with _load_engine(options, quiet or as_json) as engine:
        if options["file"] is not None:
            _write_answers(engine, options, as_json, quiet)
        else:
            _print_answers(engine, options, as_json)
        if not (quiet or as_json):
            why = "--eager says so" if options["eager"] else engine.models()[0].why
            print_line(_summarize_state(engine.state(model), why), err=True)


def _refuse_odd(options: dict[str, Any]) -> None:
    """Refuse what would not be read."""
    if (options["file"] is None) != (options["out"] is None):
        given, other = ("--out", "--file") if options["file"] is None else ("--file", "--out")
        raise BadRequest(f"{given} without {other}", hint=f"say {other} too")
    fill = ("missing", "push_back")
    if options["eager"]:
        refuse_given(options, ("recipe", "ops", *fill), "of the graphs, and --eager opens none")
    if options["repo"] is None:
        refuse_given(options, fill, "of what REPO lacks, and none is named")


@contextmanager
def _load_engine(options: dict[str, Any], quiet: bool) -> Iterator[LightweightEngine]:
    """An engine with the model, and the graphs of the repo where one is named."""
    from hubaoti import api
    from hubaoti.engines.lightweight import LightweightEngine

    settings = Settings.from_env()
    settings = replace(settings, graphs=settings.graphs and not options["eager"])
    with Steps(quiet) as progress:
        artifact = None
        if options["repo"] is not None and settings.graphs:
            artifact = api.pull(
                options["repo"],
                recipe=options["recipe"],
                trust=options["trust"],
                missing=options["missing"],
                push_back=options["push_back"],
                settings=settings,
                progress=progress,
            )
        engine = LightweightEngine(
            settings,
            memory=options["memory"],
            device=options["device"],
            isolate=options["isolate"],
            ops=options["ops"],
            progress=progress,
        )
        engine.load(options["model"], artifact, task="generate")
    with engine:
        yield engine


def _read_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The options as arguments of `generate`; a temperature of 0 is greedy."""
    names = ("max_new_tokens", "seed")
    kwargs = {name: options[name] for name in names if options[name] is not None}
    heat = options["temperature"]
    if heat is not None:
        kwargs |= {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
    return kwargs


def _print_answers(engine: LightweightEngine, options: dict[str, Any], as_json: bool) -> None:
    """What follows each prompt, as text or as JSON."""
    model, prompts = options["model"], options["prompts"]
    started = time.perf_counter()
    answers = engine.generate(model, prompts, **_read_sampling(options))
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
        facts = {
            "model": model,
            "seconds": round(seconds, 3),
            **_serialize_state(engine.state(model)),
        }
        print_json(facts | {"answers": found})
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print_text(f"{prompt}{answer.text if answer.text[:1].isspace() else ' ' + answer.text}")


def _write_answers(
    engine: LightweightEngine, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Answer a file's prompts into another file, and print how many, and how fast."""
    from hubaoti.engines.batch_file import answer_file

    model, out = options["model"], options["out"]
    kwargs = _read_sampling(options)
    with _show_progress_bar(quiet or as_json) as show:
        done = answer_file(engine, model, options["file"], out, kwargs, show)
    facts = {"out": str(out), "prompts": done.prompts, "answered_before": done.before}
    facts |= {"tokens": done.tokens, "seconds": round(done.seconds, 3)}
    facts |= {"tokens_per_second": round(done.rate, 1)}
    if as_json:
        print_json(facts | _serialize_state(engine.state(model)))
    elif not quiet:
        before = f", {done.before} of them before" if done.before else ""
        print_line(f"{done.prompts} answers in {out}{before}; {done.rate:.0f} tokens/s", err=True)


@contextmanager
def _show_progress_bar(quiet: bool) -> Iterator[Any]:
    """Show a bar on standard error; the block is given what updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("  answers"), BarColumn(), MofNCompleteColumn())
    rate = TextColumn("{task.fields[rate]:.0f} tokens/s")
    with Progress(*columns, rate, console=Console(stderr=True), disable=quiet) as shown:
        task = shown.add_task("answers", rate=0.0, visible=False)  # until it is known how many

        def show(found: Any) -> None:
            counts = {"completed": found.answered, "total": found.prompts}
            shown.update(task, **counts, rate=found.rate, visible=True)

        yield show


def _serialize_state(state: State) -> dict[str, Any]:
    facts = {"artifact": state.artifact, "compiled": state.compiled, "eager": state.eager}
    return facts | {"reasons": state.reasons}


def _summarize_state(state: State, why: str) -> str:
    """How many calls the graphs answered, how many the model itself, and why; one line."""
    if state.artifact is None:
        return f"  answered without graphs: {why}"
    reasons = ", ".join(f"{reason} {calls}" for reason, calls in state.reasons.items())
    own = f", the model itself {state.eager} ({reasons})" if state.eager else ""
    return f"  graphs answered {state.compiled} calls of blocks{own}"
