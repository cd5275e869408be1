"""`hubaoti mirror`: what is stored on this machine."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import click
import msgspec

from hubaoti.artifact.sizes import format_size
from hubaoti.cli.groups import Group
from hubaoti.cli.mirror_exchange import export_command, import_command, rebuild_command
from hubaoti.cli.mirror_space import budget_command, gc_command, stats_command
from hubaoti.cli.output import print_json, print_line, print_table, print_text
from hubaoti.cli.verify import verify_command
from hubaoti.mirror import Mirror, Row
from hubaoti.mirror.facts import Facts, read_facts
from hubaoti.mirror.orphans import find_gone
from hubaoti.settings import Settings

_WHAT = click.argument("what", metavar="REPO|DIGEST")


@click.group("mirror", cls=Group)
def mirror_command() -> None:
    """What is stored on this machine."""


@mirror_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def ls_command(as_json: bool) -> None:
    """List the artifacts, the newest first, and the graphs that are not opened here."""
    with Mirror.open(Settings.from_env().mirror) as mirror:
        rows, problems, origins = mirror.ls(), mirror.index.problems(), _Origins.read(mirror)
        facts, gone = read_facts(mirror, [row.digest for row in rows]), find_gone(mirror)
    if as_json:
        print_json(
            [_to_dict(row, facts[row.digest]) | {"gone": row.digest in gone} for row in rows]
        )
        return
    cells = [
        (
            facts[row.digest].model or "unknown",
            facts[row.digest].task or "unknown",
            *origins.describe(row),
            row.recipe,
            row.variant,
            format_size(row.size),
            _format_date(row.added),
            row.digest[:12],
        )
        for row in rows
        if row.digest not in gone
    ]
    columns = [
        "model",
        "task",
        "repo",
        "commit",
        "recipe",
        "variant",
        "unpacked",
        "added",
        "digest",
    ]
    print_table(columns, cells)
    if not rows:
        hint = "nothing is here yet: hubaoti pull owner/name, or hubaoti compile MODEL -o DIR"
        print_line(hint, err=True)
    for row in rows:
        if row.digest in gone:
            print_line(
                f"gone: {_name(row)}, {origins.describe(row)[0]}: its files were removed; pull or "
                f"compile it again, or: hubaoti mirror rm {row.digest[:12]}"
            )
    for name, problem in problems:
        print_line(f"not opened: graph {_shorten(name)}: {problem}")
    if problems:
        print_line("to have them tried again: hubaoti mirror retry")


def _shorten(name: str) -> str:
    """A name with the beginnings of the digests in it."""
    return re.sub("[0-9a-f]{64}", lambda found: found[0][:12], name)


@mirror_command.command("show")
@_WHAT
@click.option("--json", "as_json", is_flag=True, help="print it as JSON")
def show_command(what: str, as_json: bool) -> None:
    """Say all that is known of the artifact of a DIGEST's beginning, or of those of a REPO."""
    from hubaoti.api.mirroring import show

    settings = Settings.from_env()
    with Mirror.open(settings.mirror) as mirror:
        found = [each.to_dict() for each in show(what, mirror, settings)]
    if as_json:
        print_json(found)
        return
    for each in found:
        facts = each.pop("row") | each
        facts["added"], facts["last_opened"] = map(
            _format_date, (facts["added"], each["last_opened"])
        )
        print_table(["fact", "value"], [(name, _join(value)) for name, value in facts.items()])


@contextmanager
def _finding(what: str, *, whole: bool = False) -> Iterator[tuple[Mirror, list[Row]]]:
    """The mirror, while it is open, and its artifacts that are called so, all `whole` or none."""
    from hubaoti.api.mirroring import find_artifacts, find_rows

    settings = Settings.from_env()
    with Mirror.open(settings.mirror) as mirror:
        rows = find_rows(what, mirror, settings)
        if whole:
            find_artifacts([what], mirror, settings)
        yield mirror, rows


@mirror_command.command("path")
@_WHAT
def path_command(what: str) -> None:
    """Print the folder with the manifest of the artifact that is called so, for scripts."""
    with _finding(what, whole=True) as (mirror, rows):
        for row in rows:
            print_text(str(mirror.root / "artifacts" / row.digest))


@mirror_command.command("rm")
@_WHAT
def rm_command(what: str) -> None:
    """Remove an artifact, or those of a REPO; what is pinned or open in a process stays (55)."""
    from hubaoti.mirror.removal import remove

    with _finding(what) as (mirror, rows):
        for row in rows:
            remove(mirror, row.digest)
            print_line(f"{_name(row)} is removed")


@mirror_command.command("pin")
@_WHAT
def pin_command(what: str) -> None:
    """Have an artifact stay, or those of a REPO, whatever else has to leave."""
    with _finding(what, whole=True) as (mirror, rows):
        for row in rows:
            mirror.usage.pin(row.digest)
            print_line(f"{_name(row)} stays")


@mirror_command.command("unpin")
@_WHAT
def unpin_command(what: str) -> None:
    """Have what was pinned leave again, when it is its turn."""
    with _finding(what) as (mirror, rows):
        for row in rows:
            was = mirror.usage.unpin(row.digest)
            files = " and ".join(mirror.usage.list_pins().get(row.digest, ()))
            said = "may leave" if was else "was not pinned"
            print_line(f"{_name(row)} {f'stays pinned by {files}' if files else said}")


for _command in (
    verify_command,
    gc_command,
    budget_command,
    stats_command,
    export_command,
    import_command,
    rebuild_command,
):
    mirror_command.add_command(_command)


@mirror_command.command("retry")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def retry_command(as_json: bool) -> None:
    """Forget why graphs are not opened here, and bring back from quarantine what is whole."""
    from hubaoti.mirror.retry import retry

    with Mirror.open(Settings.from_env().mirror) as mirror:
        retried = retry(mirror)
        origins = _Origins.read(mirror)
    if as_json:
        print_json(asdict(retried))
        return
    print_line(f"{retried.verdicts} verdicts are forgotten")
    for graph in retried.graphs:
        print_line(f"graph {graph[:12]} is back")
    for row in retried.artifacts:
        print_line(
            f"artifact {row.digest[:12]} is back: {origins.describe(row)[0]} "
            f"{row.recipe}/{row.variant}"
        )


def _name(row: Row) -> str:
    """An artifact, in words."""
    return f"{row.digest[:12]} {row.recipe}/{row.variant}"


def _format_date(seconds: float) -> str:
    """A time as people read it; never, if it is none."""
    if not seconds:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "minutes").removesuffix("+00:00")


def _join(value: object) -> object:
    """A fact on one line."""
    if isinstance(value, dict):
        return ", ".join(str(each) for each in value.values())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, slots=True)
class _Origins:
    """What is known of where artifacts came from, and went to."""

    built: Collection[str]
    pushed: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, mirror: Mirror) -> _Origins:
        """All that the mirror knows of it."""
        return cls(mirror.usage.list_built(), mirror.usage.list_pushed())

    def describe(self, row: Row) -> tuple[str, str]:
        """The repo that has an artifact, and its commit, in full; or why there is none."""
        repo, commit = row.origin.repo, row.origin.commit or ""
        if not repo:
            is_built = row.digest in self.built
            none = ("built here, not pushed" if is_built else "from a folder", "")
            repo, commit = self.pushed.get(row.digest, none)
        return repo, commit


def _to_dict(row: Row, said: Facts) -> dict[str, object]:
    """A row with its model and task, as JSON has it."""
    found: dict[str, object] = msgspec.to_builtins(row)
    return found | {"model": said.model, "task": said.task}
