"""Find the model that ships with dmfast by its name."""

from __future__ import annotations

import os
from pathlib import Path

#: The folder of tiny-bios, a GPT-2 of 2 layers that writes biographies.
TINY_BIOS = Path(__file__).parent / "data" / "tiny_bios"


def located(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of the model named ``tiny-bios``, and any other name or path as it is."""
    return TINY_BIOS if name_or_path == "tiny-bios" else name_or_path
