"""Make ``docs/tutorial.md`` and its pictures from ``examples/tutorial.py``.

    python scripts/tutorial_page.py       # runs the tutorial, a few minutes on a CPU

The cells of text become the page's text. The cells of code become its blocks, each followed by what it printed and by
the pictures that it saved. ``tests/test_tutorial.py`` compares the page's text and code with the script, and
``tests/test_docs.py`` runs the blocks with fewer samples.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SCRIPT, PAGE = ROOT / "examples" / "tutorial.py", ROOT / "docs" / "tutorial.md"
PICTURES = ROOT / "docs" / "assets" / "tutorial"
#: These settings make the tutorial long. tests/test_docs.py puts the smaller ones there.
SMALLER = {
    "STEPS, SEQUENCES, SAMPLES = 60, 192, 2048": "STEPS, SEQUENCES, SAMPLES = 2, 4, 16",
    "fit(max_new_tokens": "fit(n=256, max_new_tokens",
}
CELL = re.compile(r"^# %%( \[markdown\])?\n", re.M)


class Cell(NamedTuple):
    """Hold a cell of prose or of code, as it stands on the page."""

    is_prose: bool
    text: str


def cells() -> list[Cell]:
    """Return the cells of the tutorial."""
    _, *parts = CELL.split(SCRIPT.read_text(encoding="utf-8"))
    found = []
    for marker, text in zip(parts[::2], parts[1::2], strict=True):
        prose = re.sub(r"^# ?", "", text, flags=re.M) if marker else text
        found.append(Cell(bool(marker), prose.strip() + "\n"))
    return found


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(all_cells: Sequence[Cell]) -> list[str]:
    """Run the code cells in order in an empty folder, keep their pictures, and return what each of them printed."""
    import matplotlib as mpl

    mpl.use("Agg")
    names: dict[str, Any] = {}
    printed = []
    with tempfile.TemporaryDirectory() as folder, _inside(folder):
        for cell in all_cells:
            if not cell.is_prose:
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(cell.text, str(SCRIPT), "exec"), names)
                printed.append(out.getvalue())
        PICTURES.mkdir(parents=True, exist_ok=True)
        for picture in Path().glob("*.png"):
            shutil.copy(picture, PICTURES / picture.name)
    return printed


def page(all_cells: Sequence[Cell], printed: Sequence[str]) -> str:
    """Return the page, with what the code cells printed, one string for each of them."""
    rest, parts = iter(printed), []
    for cell in all_cells:
        if cell.is_prose:
            parts.append(cell.text)
            continue
        small = "".join(f"<!-- test: replace {a} => {b} -->\n" for a, b in SMALLER.items() if a in cell.text)
        parts.append(f"{small}```python\n{cell.text}```\n")
        if lines := next(rest).splitlines():
            parts.append("".join(f"    {line}".rstrip() + "\n" for line in lines))
        for name in re.findall(r'savefig\("(\S+)"', cell.text):
            titles = re.findall(r'title(?:=|\()f?"([^"{]+)', cell.text)
            parts.append(
                f"![{'; '.join(title.removesuffix(', of ') for title in titles) or name}](assets/tutorial/{name})\n"
            )
    return "\n".join(parts)


def without_output(text: str) -> str:
    """Return a page without what its blocks printed."""
    kept, in_block = [], False
    for line in text.splitlines():
        in_block ^= line.startswith("```")
        if in_block or not line.startswith("    "):
            kept.append(line)
    return re.sub(r"\n{2,}", "\n\n", "\n".join(kept))


if __name__ == "__main__":
    found = cells()
    PAGE.write_text(page(found, run(found)), encoding="utf-8")
