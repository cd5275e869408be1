"""`hubaoti doctor`: this host as facts, and what it lacks to compile."""

from __future__ import annotations

from dataclasses import asdict

import click

from hubaoti.artifact.sizes import format_size
from hubaoti.cli.output import print_json, print_line, print_table
from hubaoti.errors import MissingDependency
from hubaoti.host.build_tools import find_missing_build_tools, find_missing_for_cpu
from hubaoti.host.confinement import list_gaps
from hubaoti.host.match import Refusal
from hubaoti.host.probe import Host, find_torch, probe_host
from hubaoti.settings import Settings


@click.command("doctor")
@click.option("--build", is_flag=True, help="print what it lacks to compile, and how to get it")
@click.option("--json", "as_json", is_flag=True, help="print the facts as JSON")
def doctor_command(build: bool, as_json: bool) -> None:
    """Print this host as the facts that artifacts are judged by; nothing is changed.

    With --build the exit code is 0 only where a build for GPUs, as of compile --for, lacks nothing.
    """
    if build:
        _print_missing(as_json)
        return
    host = probe_host(Settings.from_env())
    if as_json:
        print_json(host.to_dict())
    else:
        print_table(["fact", "value"], _list_facts(host))


def _print_missing(as_json: bool) -> None:
    """What compiling needs, for this CPU and for a GPU, and is not here; a GPU is not among it.

    As JSON it is what a build for a GPU needs.

    Raises:
        MissingDependency: after all is printed, where anything is, as `compile --for` would.
    """
    missing = find_missing_build_tools(find_torch([]))
    if as_json:
        print_json([asdict(each) for each in missing])
    else:
        _print_lacking("for this CPU", find_missing_for_cpu())
        _print_lacking("for a GPU", missing)
    if missing:
        raise MissingDependency(
            f"{len(missing)} missing of what a build for a GPU needs",
            hint="each is listed with what to do",
        )


def _print_lacking(target: str, missing: list[Refusal]) -> None:
    """What is missing to compile for something, with what to do about it; or that nothing is."""
    if not missing:
        print_line(f"nothing is missing to compile {target}")
        return
    print_line(f"missing to compile {target}:")
    columns = ["needed", "here", "advice"]
    print_table(columns, [(each.need, each.have, each.advice) for each in missing])


def _list_facts(host: Host) -> list[tuple[str, str]]:
    """The facts that a person wants, in words."""
    torch = host.torch
    rows = [
        ("system", f"{host.os} {host.machine}, Python {host.python}"),
        ("CPU", f"{host.cpu}, level {host.level}, {host.cores} cores"),
        ("memory", format_size(host.memory)),
        ("torch", f"{torch.version} at {torch.path}" if torch else "not installed"),
        ("CUDA of torch", (torch and torch.cuda) or "none"),
        ("driver", f"{host.driver}, up to CUDA {host.driver_cuda}" if host.driver else "none"),
    ]
    for index, gpu in enumerate(host.gpus):
        rows.append((f"GPU {index}", f"{gpu.name}, sm {gpu.sm}, {format_size(gpu.memory)}"))
    rows += [
        ("glibc", host.glibc or "unknown"),
        ("libstdc++", f"GLIBCXX {host.glibcxx}, CXXABI {host.cxxabi}"),
        ("free disk", format_size(host.disk_free)),
        ("endpoint", f"{host.endpoint}{' (offline)' if host.offline else ''}"),
        ("mirror", str(host.mirror)),
        ("first opens", "confined in part" if list_gaps() else "confined"),
    ]
    return rows + [("note", note) for note in host.notes]
