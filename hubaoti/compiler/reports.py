"""The whole report of a compile that failed, in a file beside its output."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hubaoti import __version__
from hubaoti.errors import HubaotiError


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
