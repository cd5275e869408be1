"""What came of the checks: a line of each, in a file that is whole after each, and as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

WAITING, RUNNING = "waiting", "running"  # until it has ended, or its process has


@dataclass(frozen=True, slots=True)
class Line:
    """How a check ended: passed, failed or skipped, what it found, or why it found nothing."""

    name: str
    result: str
    why: str = ""
    found: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    trace: str | None = None

    def __str__(self) -> str:
        seconds = f"{self.seconds:.1f} s" if self.seconds else ""
        result = f"{self.result}: {self.why}" if self.why else self.result
        return f"{self.name:<22} {seconds:>8}  {self.found:<76}  {result}"


@dataclass(slots=True)
class Results:
    """The lines so far, by their names, and the file where they stand."""

    device: str
    file: Path
    lines: dict[str, Line] = field(default_factory=dict)

    def read(self) -> None:
        """Take the lines that another process wrote."""
        if self.file.is_file():
            checks = [Line(**each) for each in json.loads(self.file.read_text())["checks"]]
            self.lines = {line.name: line for line in checks}

    def put(self, *lines: Line) -> None:
        """Keep some lines, in the file too, in the place of those of their names."""
        self.lines |= {line.name: line for line in lines}
        checks = [asdict(line) for line in self.lines.values()]
        part = self.file.with_name(f"{self.file.name}.part")
        part.write_text(json.dumps({"device": self.device, "checks": checks}, indent=2) + "\n")
        part.replace(self.file)

    def end(self, line: Line) -> None:
        """Keep the line of a check that has ended, and print it."""
        self.put(line)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def list_failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [line.name for line in self.lines.values() if line.result == "failed"]

    def close_part(self, ended: str, before: Sequence[str] = ()) -> None:
        """End what a process left that ended early: what it was at has failed, the rest is skipped.

        What shared something with the check that ended it is of no use. Those that failed `before`
        are of other processes.
        """
        lines = [*self.lines.values()]
        running = next((line for line in lines if line.result == RUNNING), None)
        failed = [name for name in self.list_failed() if name not in before]
        if running:
            self.end(replace(running, result="failed", why=ended))
        last = running.name if running else (failed or ["its process"])[-1]
        for line in lines:
            if line.result == WAITING:
                self.end(replace(line, result="skipped", why=f"{last} failed"))
