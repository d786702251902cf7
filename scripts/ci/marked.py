"""A part of a page that a script makes: what stands between the marks of its name."""

from __future__ import annotations

from pathlib import Path

from aot import stale


def brought_up_to_date(name: str, made: str, files: list[str]) -> int:
    """The exit status: whether the page FILE holds what was made; WRITTEN then does. Without files it is printed."""
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
