"""Store the results of the runs.

Each run leaves a JSON file when it ends. Once the files are packed, one compressed archive holds all of them. The
archive has a line for each run, ``{"name": "main/women-gdc-seed0.json", "result": {...}}``, sorted by name.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

ARCHIVE = "archive.jsonl.xz"


def files(folder: Path) -> dict[str, Path]:
    """Return the JSON files that are not packed yet, by name."""
    return {path.relative_to(folder).as_posix(): path for path in folder.glob("*/*.json")}


def read(folder: Path) -> dict[str, Any]:
    """Return all results below a folder, sorted by name. A file replaces the entry of the same name in the archive."""
    found: dict[str, Any] = {}
    if (folder / ARCHIVE).exists():
        with lzma.open(folder / ARCHIVE, "rt", encoding="utf-8") as lines:
            found = {each["name"]: each["result"] for each in map(json.loads, lines)}
    found |= {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files(folder).items()}
    return dict(sorted(found.items()))


def pack(folder: Path) -> bool:
    """Move all JSON files below a folder into its archive, whose bytes depend on the results alone.

    Returns:
        Whether there were any.
    """
    loose = files(folder)
    if not loose:
        return False
    partial = folder / f"{ARCHIVE}.part"
    with lzma.open(partial, "wt", preset=9 | lzma.PRESET_EXTREME, encoding="utf-8", newline="\n") as lines:
        for name, result in read(folder).items():
            line = json.dumps({"name": name, "result": result}, ensure_ascii=False, separators=(",", ":"))
            lines.write(line + "\n")
    partial.replace(folder / ARCHIVE)
    for path in loose.values():
        path.unlink()
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    return True
