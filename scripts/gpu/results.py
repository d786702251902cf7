"""Where a part leaves what it found: one folder, in which every file is whole at any time, however a process ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Return the folder that run.py named."""
    return Path(os.environ["DMFAST_GPU_OUT"])


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: who is killed in between leaves the old one."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text)
    os.replace(partial, path)


def write(path: Path, found: Any) -> None:
    """Replace a file by JSON."""
    write_text(path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> Any:
    """Return what is there, else None."""
    return json.loads(path.read_text()) if path.exists() else None
