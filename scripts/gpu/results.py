"""Store what a part found in one folder, where every file is complete at any time, however a process ends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Return the folder that run.py named."""
    return Path(os.environ["DMFAST_GPU_OUT"])


def write_text(path: Path, text: str) -> None:
    """Replace a file at once. If the process is killed meanwhile, the old file stays."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text)
    os.replace(partial, path)


def write(path: Path, found: Any) -> None:
    """Replace a file by JSON."""
    write_text(path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> Any:
    """Return the content of a file, or None."""
    return json.loads(path.read_text()) if path.exists() else None
