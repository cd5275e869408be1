"""`hubaoti compile --matrix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubaoti.cli.output import Steps, print_json, print_line

if TYPE_CHECKING:
    from hubaoti.api.matrix import Outcome

_SAID = {
    "there": "is there already",
    "missing": "is missing",
    "pushed": "pushed",
    "failed": "failed",
}


def fill_matrix(path: Path, as_json: bool, quiet: bool, options: Mapping[str, Any]) -> None:
    """Compile and push what a table of builds has and its repos lack; each is said as it comes.

    `options` are those of `compile_matrix`.

    Raises:
        HubaotiError: of the first build that failed, once the others are done.
    """
    from hubaoti.api.matrix import compile_matrix, join_failures

    outcomes = []
    with Steps(quiet) as progress:
        for each in compile_matrix(path, progress=progress, **options):
            progress.end()
            outcomes.append(each)
            if not (as_json or quiet):
                _print_outcome(each)
    if as_json:
        print_json([_serialize_outcome(each) for each in outcomes])
    if error := join_failures(outcomes):
        raise error


def _print_outcome(each: Outcome) -> None:
    """What came of a build, in words."""
    what = f"{each.repo} {each.path}" if each.path else f"{each.repo}, {each.model} for {each.kind}"
    where = f", and built already in {each.built}" if each.built and each.state == "missing" else ""
    why = f": {each.error}" if each.error else ""
    print_line(f"{what} {_SAID[each.state]}{where}{why}")


def _serialize_outcome(each: Outcome) -> dict[str, str | None]:
    """What came of a build, as plain values."""
    return {
        "model": each.model,
        "repo": each.repo,
        "for": each.kind,
        "state": each.state,
        "path": each.path or None,
        "key": each.key or None,
        "built": each.built,
        "error": None if each.error is None else str(each.error),
    }
