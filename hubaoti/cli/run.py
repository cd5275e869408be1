"""`hubaoti run`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from hubaoti.cli.output import Steps, print_json, print_table
from hubaoti.errors import BadRequest

if TYPE_CHECKING:
    import torch


@click.command("run")
@click.argument("repo")
@click.option("--model", required=True, help="whose weights and tokenizer: a Hub id or a folder")
@click.option("--text", "texts", multiple=True, required=True, help="may be given many times")
@click.option("--recipe", help="only this one, as bfloat16-sdpa")
@click.option("--trust", is_flag=True, help="trust the publisher, now and from now on")
@click.option("--eager", is_flag=True, help="the same through transformers, for comparison")
@click.option("--device", help="cpu or cuda:0; by default what the artifact is for")
@click.option("--json", "as_json", is_flag=True, help="print all values as JSON")
@click.option("-q", "--quiet", is_flag=True, help="print nothing while it runs")
def run_command(
    repo: str, texts: tuple[str, ...], eager: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Answer texts with the graph of REPO (owner/name[@revision]) and a model's weights."""
    from hubaoti import api

    if eager:
        refuse_unread(options)
    started = time.perf_counter()
    with Steps(quiet or as_json) as say:
        if eager:
            answer = api.eager(options["model"], texts, repo=repo, say=say)
        else:
            answer = api.run(repo, texts=texts, say=say, **options)
    seconds = time.perf_counter() - started
    if as_json:
        facts = {"repo": repo, "task": answer.task, "eager": eager, "seconds": round(seconds, 3)}
        print_json(facts | {"texts": list(texts), "values": answer.values.tolist()})
    elif answer.task == "embed" and len(texts) > 1:
        print_similarity(texts, answer.values)
    else:
        print_values(texts, answer.values)


def refuse_unread(options: dict[str, Any]) -> None:
    """Refuse what says something about a graph, where none is opened.

    Raises:
        BadRequest: it was given.
    """
    for name in ("recipe", "device"):
        if options[name] is not None:
            raise BadRequest(
                f"--{name} is of the graph, and --eager opens none: it runs on the CPU, through "
                "transformers",
                hint=f"leave out --{name} or --eager",
            )


def print_similarity(texts: tuple[str, ...], vectors: torch.Tensor) -> None:
    """The cosine of each two texts' vectors."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    rows = (unit @ unit.T).tolist()
    numbers = [str(at) for at in range(1, len(texts) + 1)]
    cells = [
        (number, text, *(f"{value:.3f}" for value in row))
        for number, text, row in zip(numbers, texts, rows, strict=True)
    ]
    print_table(["", "text", *numbers], cells)


def print_values(texts: tuple[str, ...], values: torch.Tensor) -> None:
    """The shape of each text's answer, and where it begins."""
    for text, value in zip(texts, values, strict=True):
        begin = ", ".join(f"{number:.4f}" for number in value.flatten()[:8].tolist())
        dots = ", …" if value.numel() > 8 else ""
        click.echo(f"{text}: {list(value.shape)} [{begin}{dots}]")
