"""A part of a page that a script makes: what stands between the marks of its name."""

from __future__ import annotations

from pathlib import Path

from aot import stale


def brought_up_to_date(name: str, made: str, files: list[str]) -> int:
    """Write a page with what was made between its marks, and return the exit status: 1 where the page is out of date.

    Args:
        name: that of the marks.
        made: what belongs between them.
        files: the page, and where to write it as it should be; none of them prints what was made.
    """
    if not files:
        print(made, end="")
        return 0
    page, written = map(Path, files)
    before, rest = page.read_text().split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- end of {name} -->\n")[1]
    made = f"{before}<!-- {name} -->\n{made}<!-- end of {name} -->\n{after}"
    written.write_text(made)
    if difference := stale(page, made):
        print(f"{difference}{page} is out of date: cp {written} {page}")
        return 1
    return 0
