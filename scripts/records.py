"""What the scripts have measured: kept as JSON in docs/, and shown between marks of a page."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"

Found = dict[str, Any]


class Section(NamedTuple):
    """A part of a record, and the part of a page that shows it.

    Attributes:
      name: of both.
      record: the JSON file.
      page: the Markdown file, in which the lines `<!-- name: start -->` and `<!-- name: end -->`
        stand around it.
      show: what stands there, of what was found.
    """

    name: str
    record: Path
    page: Path
    show: Callable[[Found], str]

    def check(self) -> None:
        """End the process where the page has no marks: before what is to be kept takes long."""
        self._around()

    def read(self) -> Found:
        """What was kept before."""
        return read(self.record, self.name)

    def keep(self, found: Found) -> None:
        """Put it in the record and in the page; their other parts stay."""
        before, after = self._around()
        write(self.record, self.name, found)
        self.page.write_text(f"{before}{self.show(found)}\n{after}")

    def _around(self) -> tuple[str, str]:
        """The page up to and from the section, marks included."""
        start, end = f"<!-- {self.name}: start -->\n", f"<!-- {self.name}: end -->"
        text = self.page.read_text() if self.page.exists() else ""
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            sys.exit(f"{self.page}: needs the lines {start.strip()} and {end}, in this order")
        return before + start, end + after


def read(record: Path, name: str) -> Found:
    """A part of a record; empty where there is none."""
    return json.loads(record.read_text()).get(name, {}) if record.exists() else {}


def write(record: Path, name: str, found: Found) -> None:
    """Put a part into a record; the others stay."""
    parts = json.loads(record.read_text()) if record.exists() else {}
    record.write_text(json.dumps({**parts, name: found}, indent=2) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, a line of text for each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
