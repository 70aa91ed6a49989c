"""Tables (CSV): rows with the numbers a spreadsheet shows, and one sentence for every bad one."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

__all__ = ["Problems", "Row", "as_integer", "read_table", "require_columns"]


@dataclass(frozen=True)
class Row:
    """One row: its number as a spreadsheet shows it (the header is row 1) and its cells by column."""

    number: int
    cells: dict[str, str]


class Problems:
    """Collects one sentence for every bad row, so that a table is put right in one go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sentences: list[str] = []

    def add(self, row: Row | None, column: str | None, sentence: str) -> None:
        """Add a sentence; cells are pointed at by row and column, never quoted, as they may identify a patient."""
        where = "" if row is None else f"row {row.number}" + (f", column {column}: " if column else ": ")
        self.sentences.append(where + sentence)

    def raise_if_any(self) -> None:
        """Raise an InputError with every sentence on its own line.

        Raises:
            InputError: when there is at least one.
        """
        if self.sentences:
            count = f"{len(self.sentences)} problem{'s' if len(self.sentences) > 1 else ''}"
            raise InputError("\n  ".join([f"{self.path}: {count}; nothing was written", *self.sentences]))


def read_table(path: Path, problems: Problems) -> tuple[list[str], list[Row]]:
    """Read a CSV table (comma, semicolon or tab; UTF-8), with white space around cells removed and blank rows left out.

    Args:
        path: the CSV file.
        problems: gets a sentence for every row with more cells than the header.

    Returns:
        The column names in order, and the rows.

    Raises:
        InputError: it is missing, no text, no CSV, has no rows, no or doubled column names.
    """
    if not path.is_file():
        raise InputError(f"there is no table {path}: check the path")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if "\0" in text:
        raise InputError(f"{path} is not a text table in UTF-8: save it from the spreadsheet as 'CSV UTF-8'")
    first = text.split("\n", 1)[0]
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a well-formed CSV table ({error}): save it again as CSV") from None
    columns = [name.strip() for name in records[0]] if records else []
    if not any(columns):
        raise InputError(f"{path} has no header: its first row names the columns")
    doubled = sorted({name for name in columns if name and columns.count(name) > 1})
    if doubled:
        raise InputError(f"{path} has two columns named {', '.join(doubled)}: rename one")
    rows = []
    for number, record in enumerate(records[1:], start=2):
        cells = [cell.strip() for cell in record]
        if not any(cells):
            continue
        row = Row(number, dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=False)))
        if any(cells[len(columns) :]):
            problems.add(
                row, None, f"it has {len(cells)} cells, but the header {len(columns)}: quote cells with commas"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows below its header: nothing to do")
    return columns, rows


def require_columns(path: Path, columns: list[str], wanted: dict[str, str]) -> None:
    """Refuse a table without the columns `wanted` (option -> column name), naming those that exist."""
    missing = [f"{name} (--{option})" for option, name in wanted.items() if name not in columns]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}: it has {', '.join(filter(None, columns))}; "
            "name the right ones with these options"
        )


def as_integer(text: str) -> int | None:
    """The integer a cell holds, also where a spreadsheet wrote 1 as 1.0; None where it holds none."""
    match = re.fullmatch(r"([+-]?[0-9]{1,9})(\.0*)?", text)
    return int(match.group(1)) if match else None
