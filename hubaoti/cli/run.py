"""`hubaoti run`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from hubaoti.cli.output import Steps, print_json, print_line, print_table
from hubaoti.cli.paths import GivenPath
from hubaoti.errors import BadRequest
from hubaoti.escape import escape_line

if TYPE_CHECKING:
    import torch

_FILE = GivenPath(dir_okay=False)
_GENERATES = ("out", "max_new_tokens", "temperature", "seed", "isolate", "memory")


@click.command("run")
@click.argument("repo", required=False)
@click.option("--model", required=True, help="whose weights and tokenizer: a Hub id or a folder")
@click.option("--text", "texts", multiple=True, help="to be embedded; may be given many times")
@click.option("--prompt", "prompts", multiple=True, help="to go on with; may be given many times")
@click.option("--file", type=_FILE, help='lines of {"prompt": "..."}')
@click.option("--out", type=_FILE, help="where their answers go; goes on where it stopped")
@click.option("--max-new-tokens", type=int, help="for each prompt  [default: 128]")
@click.option("--temperature", type=float, help="0 is greedy; by default as the model's files say")
@click.option("--seed", type=int, help="sample alike again")
@click.option("--isolate", is_flag=True, help="the model in a process of its own")
@click.option("--memory", help="refuse a model that takes more, as 8GB")
@click.option("--recipe", help="only this one, as bfloat16-sdpa")
@click.option("--trust", is_flag=True, help="trust the publisher, now and from now on")
@click.option("--missing", metavar="compile", help="what REPO lacks for this host is compiled here")
@click.option("--push-back", is_flag=True, help="into REPO what was compiled, for other machines")
@click.option("--ops", multiple=True, help="a module whose ops graphs call, as my.ops")
@click.option("--eager", is_flag=True, help="the same through transformers, for comparison")
@click.option("--device", help="cpu or cuda:0; by default what the artifact is for")
@click.option("--json", "as_json", is_flag=True, help="print all values as JSON")
@click.option("-q", "--quiet", is_flag=True, help="print the answers alone, and no steps")
def run_command(as_json: bool, quiet: bool, **options: Any) -> None:
    """Answer texts or prompts by the graphs of REPO (owner/name[@revision]) over a model's weights.

    Without REPO, prompts are answered by what the mirror has for the model.
    """
    given = [name for name in ("texts", "prompts", "file") if options[name]]
    if len(given) != 1:
        raise click.UsageError("Give one of --text, --prompt and --file.")
    if given == ["texts"]:
        refuse_given(options, _GENERATES, "of prompts, and --text only embeds or classifies")
        _answer_texts(options, as_json, quiet)
    else:
        from hubaoti.cli.prompts import answer_prompts

        answer_prompts(options, as_json, quiet)


def _answer_texts(options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Print what a whole graph, or eager, says to texts."""
    from hubaoti import api

    repo, texts = options["repo"], options["texts"]
    if repo is None:
        raise click.UsageError("Missing argument 'REPO': --text is answered by a repo's graph.")
    names = ("recipe", "device", "ops", "missing", "push_back")
    words = {name: options[name] for name in ("trust", *names)}
    if options["eager"]:
        refuse_given(options, names, "of the graph, and --eager opens none")
    started = time.perf_counter()
    with Steps(quiet or as_json) as progress:
        if options["eager"]:
            answer = api.eager(options["model"], texts, repo=repo, progress=progress)
        else:
            answer = api.run(repo, options["model"], texts, progress=progress, **words)
    seconds = time.perf_counter() - started
    if as_json:
        facts = {"repo": repo, "task": answer.task, "eager": options["eager"]}
        facts |= {"seconds": round(seconds, 3), "texts": list(texts)}
        print_json(facts | {"values": answer.values.tolist()})
    elif answer.task == "embed" and len(texts) > 1:
        print_similarity(texts, answer.values)
    else:
        _print_values(texts, answer.values)


def refuse_given(options: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    """Refuse what would not be read.

    Raises:
        BadRequest: it was given.
    """
    for name in names:
        if options[name] not in (None, False, ()):
            option = f"--{name.replace('_', '-')}"
            raise BadRequest(f"{option} is {reason}", hint=f"leave out {option}")


def print_similarity(texts: tuple[str, ...], vectors: torch.Tensor) -> None:
    """The cosine of each two texts' vectors."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    rows = (unit @ unit.T).tolist()
    numbers = [str(index) for index in range(1, len(texts) + 1)]
    cells = [
        (number, text, *(f"{value:.3f}" for value in row))
        for number, text, row in zip(numbers, texts, rows, strict=True)
    ]
    print_table(["", "text", *numbers], cells)


def _print_values(texts: tuple[str, ...], values: torch.Tensor) -> None:
    """The shape of each text's answer, and where it begins."""
    for text, value in zip(texts, values, strict=True):
        begin = ", ".join(f"{number:.4f}" for number in value.flatten()[:8].tolist())
        dots = ", …" if value.numel() > 8 else ""
        print_line(f"{escape_line(text)}: {list(value.shape)} [{begin}{dots}]")
