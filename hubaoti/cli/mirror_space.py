"""`hubaoti mirror gc` and its like: how much the mirror may have, and what leaves it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from hubaoti.artifact.misses import read_misses
from hubaoti.artifact.sizes import format_count, format_size
from hubaoti.cli.output import (
    format_time,
    print_json,
    print_line,
    print_some,
    print_table,
    print_text,
)
from hubaoti.cli.paths import GivenPath
from hubaoti.errors import BadRequest
from hubaoti.mirror import Mirror
from hubaoti.mirror.answers import HUB, MIRROR
from hubaoti.mirror.gc import BUDGET, collect, count_held, read_budget
from hubaoti.mirror.removal import refuse_stuck
from hubaoti.mirror.stats import Stats, Unused, format_prometheus, summarize
from hubaoti.settings import Settings

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_NUMBER = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """A number of bytes, as 20GB or 500MiB.

    Raises:
        BadRequest: it is none.
    """
    return int(_parse(text, _BYTES, "20GB or 500MiB"))


def parse_age(text: str) -> float:
    """A time in seconds, as 30d or 12h.

    Raises:
        BadRequest: it is none.
    """
    return _parse(text, _SECONDS, "30d or 12h")


def _parse(text: str, units: Mapping[str, int], examples: str) -> float:
    """A number with its unit."""
    found = _NUMBER.fullmatch(text.strip())
    unit = units.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise BadRequest(f"{text!r:.40} is no amount", hint=f"write it as {examples}")
    return float(found[1]) * unit


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="only say what would leave")
@click.option("--older-than", type=parse_age, metavar="30d", help="also what was not opened since")
@click.option("--max-bytes", type=parse_size, metavar="20GB", help="instead of the budget")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def gc_command(
    dry_run: bool, older_than: float | None, max_bytes: int | None, as_json: bool
) -> None:
    """Remove what nobody needs: left-overs, what may not be opened here, what is over the budget.

    What is pinned, open in a process, or built here and not pushed stays.
    """
    with Mirror.open(Settings.from_env().mirror) as mirror:
        found = collect(mirror, older_than=older_than, max_bytes=max_bytes, dry_run=dry_run)
        held = count_held(mirror) if found.after > found.budget else {}
    if as_json:
        print_json(asdict(found))
        refuse_stuck(found.stuck)
        return
    columns = ["digest", "recipe", "variant", "size", "why"]
    cells = [
        (e.digest[:12], e.recipe, e.variant, format_size(e.size), e.why) for e in found.artifacts
    ]
    if cells:
        print_table(columns, cells)
    for each in found.blocked:
        print_line(f"stays: {each.digest[:12]} {each.recipe}/{each.variant}: {each.why}")
    for path in found.orphans:
        print_line(f"stray: {path}")
    removed, used = ("would remove", "would be used") if dry_run else ("removed", "used")
    print_line(
        f"{removed} {format_count(len(cells), 'artifact')} "
        f"({format_size(found.before - found.after)}) and "
        f"{format_count(len(found.orphans), 'stray file')}; {format_size(found.after)} of "
        f"{format_size(found.budget)} {used}"
    )
    for why, size in held.items():
        print_line(f"  {format_size(size)} stay, because they are {why}")
    refuse_stuck(found.stuck)


@click.command("budget")
@click.argument("size", required=False, metavar="[SIZE|default]")
def budget_command(size: str | None) -> None:
    """Say how many bytes of artifacts the mirror may have, or have it be SIZE, as 20GB.

    By default it is 20 % of the disk, from 1 to 50 GB. What was built here is stored, however
    little room there is.
    """
    with Mirror.open(Settings.from_env().mirror) as mirror:
        if size is not None:
            said = None if size == "default" else parse_size(size)
            mirror.usage.record_number(BUDGET, said)
        budget, used = read_budget(mirror), mirror.usage.count_bytes()
    print_line(f"{format_size(used)} of {format_size(budget)} are used")


@click.command("stats")
@click.option(
    "--misses",
    "files",
    multiple=True,
    type=GivenPath(),
    help="a file of attachment.save_misses, for the dims to compile next",
)
@click.option("--json", "as_json", is_flag=True, help="print them as JSON")
@click.option("--prometheus", is_flag=True, help="print the counts in Prometheus' text format")
def stats_command(files: tuple[Path, ...], as_json: bool, prometheus: bool) -> None:
    """Say who answered how often, what that saved, what to compile next, and what nobody uses."""
    with Mirror.open(Settings.from_env().mirror) as mirror:
        stats = summarize(mirror, [read_misses(each) for each in files])
    if prometheus:
        print_text(format_prometheus(stats))
    elif as_json:
        print_json(asdict(stats))
    else:
        _print_stats(stats)


def _print_stats(stats: Stats) -> None:
    """The same in words."""
    used = f"{format_size(stats.bytes)} of {format_size(stats.budget)}"
    print_line(f"{format_count(stats.artifacts, 'artifact')}, {used}")
    calls = ", ".join(f"{name} {tier.calls}" for name, tier in stats.tiers.items())
    rate = "nothing was asked for yet" if stats.hit_rate is None else f"{stats.hit_rate:.0%} hits"
    print_line(f"answers: {calls}, nobody {sum(e.calls for e in stats.misses)}; {rate}")
    if found := stats.tiers[MIRROR].calls + stats.tiers[HUB].calls:
        mirrored = format_count(stats.tiers[MIRROR].calls, "answer")
        print_line(
            f"a compile for each of {format_count(found, 'answer')} by mirror or hub would have "
            f"taken {format_time(stats.saved_compile_seconds)} in all, a download for each of "
            f"{mirrored} by mirror {format_size(stats.saved_bytes)}"
        )
    print_some([f"to compile: {line}" for line in stats.compile_next])
    print_some([f"nobody uses: {_describe_unused(each)}" for each in stats.unused])


def _describe_unused(each: Unused) -> str:
    name = f"{each.digest[:12]} {each.recipe}/{each.variant}, {format_size(each.size)}"
    days = each.idle_seconds / _SECONDS["d"]
    idle = f"opened {format_count(each.opens, 'time')}, not for {days:.0f} days"
    return f"{name}, {idle}" + (f", {each.kept}" if each.kept else "")
