"""Load prompts from a data set of the Hugging Face hub, or from a folder that ``datasets`` reads as one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_KEYS = ("dataset", "name", "split", "column", "revision")


def prompts_of(entry: Mapping[str, Any]) -> Any:
    """Return the rows of a recipe's ``prompts: {dataset: ...}`` as a ``datasets.Dataset`` with a column ``prompt``.

    Args:
        entry: a mapping. ``dataset`` is a name on the hub or a folder, and ``name`` is one of its configurations.
            ``split`` has the form that ``datasets`` takes, such as ``train[:1000]``; the default is ``train``.
            ``column`` names the column with strings or chats; the default is ``prompt``. ``revision`` is a branch, tag
            or commit.

    Raises:
        ValueError: there is an unknown entry, no data set of that name, or no such split or column; or the hub can't be
            reached.
        ImportError: ``datasets`` is not installed.
    """
    entry = {key: value for key, value in entry.items() if value is not None}
    for key, value in entry.items():
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(_KEYS)}"
            raise ValueError(f"an unknown entry {key!r}; {hint}")
        if not (isinstance(value, str) and value):
            raise ValueError(f"{key} must be a string, got {value!r}")
    if "dataset" not in entry:
        raise ValueError("dataset is missing, the name of a data set on the hub or a folder")
    name, split, column = entry["dataset"], entry.get("split", "train"), entry.get("column", "prompt")
    try:
        import datasets
    except ImportError as error:
        raise ImportError("a data set of the hub needs the package datasets: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, entry.get("name"), split=split, revision=entry.get("revision"))
    # these are the hub's errors, those of the file system, and that of a data set which is a script
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"can't load split {split!r} of the data set {name!r}: {type(error).__name__}: {error}. Check the name and "
            "whether this machine reaches the hub; a folder of .parquet or .jsonl files may stand in its place"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"the data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    if column == "prompt":
        return rows
    if "prompt" in rows.column_names:
        rows = rows.remove_columns("prompt")
    return rows.rename_column(column, "prompt")
