"""Read the prompts of a file, one a row: .txt, .jsonl, .csv or .parquet."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

from .data import fault_of_row


def read_prompts(path: Path) -> list[Any]:
    """Return the rows of a file of prompts.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is of another kind or has another form; the message names the line.
        ImportError: the file is a .parquet file, and pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        rows: list[Any] = parquet.read_table(path).to_pylist()
        return rows
    if path.suffix not in (".txt", ".jsonl", ".csv", ""):
        raise ValueError(f"a file of prompts is .txt (one a line), .jsonl, .csv or .parquet, got {path.suffix!r}")
    if path.suffix == ".csv":
        return _read_csv(path)
    text = path.read_text(encoding="utf-8-sig")  # Excel begins a file with a byte order mark
    if path.suffix != ".jsonl":
        return [line for line in text.split("\n") if line]
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:  # its own text would call every line "line 1"
            raise ValueError(f"line {number} is not JSON: {error.msg}, at column {error.colno}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        fault = fault_of_row(row)
        if fault is not None:
            raise ValueError(f"line {number} {fault}")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Any]:
    """Return the rows of a CSV file, whose first line names its columns.

    Raises:
        OSError, ValueError: as ``read_prompts``.
    """
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:  # the csv module tells the ends of lines itself
        table = csv.reader(file, strict=True)
        try:
            columns = next(table, [])
            if "prompt" not in columns:
                raise ValueError(f"its first line must name a column 'prompt', got {', '.join(columns)}")
            for row in table:
                if not row:
                    continue
                if len(row) != len(columns):
                    cells_of_line = f"line {table.line_num} has {len(row)} cell{'s' * (len(row) != 1)}"
                    named = f"{len(columns)} column{'s' * (len(columns) > 1)}"
                    raise ValueError(f"{cells_of_line}, and the first line names {named}: a cell with a comma or an "
                                     "end of line needs double quotes around it")  # fmt: skip
                rows.append(dict(zip(columns, row, strict=True)))
        except csv.Error as error:
            raise ValueError(f"line {table.line_num}: {error}") from error
    return rows
