"""The whole report of a compile that failed, in a file beside its output."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hubaoti import __version__
from hubaoti.errors import HubaotiError

if TYPE_CHECKING:
    from hubaoti.compiler.job import Job


@contextmanager
def report_failure(
    output: Path, facts: Sequence[str], kinds: tuple[type[HubaotiError], ...]
) -> Iterator[None]:
    """Around a step: the whole report of a failure goes to a file beside the output.

    Raises:
        HubaotiError: as it came; one of `kinds` with the report's path in the hint.
    """
    try:
        yield
    except kinds as error:
        path = output.absolute().with_name(f"{output.absolute().name}.report.txt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_render_report(error, facts))
        except OSError:
            raise error from error.__cause__
        hint = f"{error.hint}; the whole report: {path}"
        raise type(error)(str(error), hint=hint) from error.__cause__


def describe_jobs(jobs: Sequence[Job]) -> list[str]:
    """What was to be built: targets before the build that they have in common, and the graphs."""
    targets = dict[str, list[str]]()
    for job in jobs:
        targets.setdefault(str(job.build), []).append(str(job.target))
    lines = [line for build, those in targets.items() for line in (*those, build, "")]
    return [*lines, "graphs", *(f"  {unit.id}: {unit.bounds}" for unit in jobs[0].plan.units)]


def join_errors(errors: Sequence[HubaotiError], kept: Sequence[Path] = ()) -> HubaotiError:
    """One error for those of several bundles, of the first one's kind; notes have all traces.

    Its hint has the remedy of each, and the bundles that are whole: those that were `kept`.
    """
    first, hint = errors[0], "; ".join(dict.fromkeys(each.hint for each in errors if each.hint))
    if kept:
        are = "is" if len(kept) == 1 else "are"
        hint += f"; {', '.join(map(str, kept))} {are} whole: the same command builds only the rest"
    joined = type(first)("; ".join(dict.fromkeys(map(str, errors))), hint=hint)
    for error in errors:
        joined.add_note("\n".join([str(error), *error.notes]))
    return joined


def _render_report(error: Exception, facts: Sequence[str]) -> str:
    """All that is known of a failure."""
    import torch
    import transformers

    versions = (
        f"hubaoti {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )
    trace = "".join(traceback.format_exception(error))
    return "\n".join([str(error), "", versions, *facts, "", trace])
