"""Update the part of a page that a script makes, which stands between two marks."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path


def brought_up_to_date(name: str, made: str, files: list[str]) -> int:
    """Write a page with new text between its marks, and return the exit status, which is 1 if the page is out of date.

    Args:
        name: the name of the marks.
        made: the text that belongs between them.
        files: the page, and the file to which the updated page is written. If it is empty, the text is printed.
    """
    if not files:
        print(made, end="")
        return 0
    page, written = map(Path, files)
    old = page.read_text()
    before, rest = old.split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- end of {name} -->\n")[1]
    made = f"{before}<!-- {name} -->\n{made}<!-- end of {name} -->\n{after}"
    written.write_text(made)
    if made != old:
        difference = "".join(unified_diff(old.splitlines(True), made.splitlines(True), str(page), "now", n=0))
        print(f"{difference}{page} is out of date: cp {written} {page}")
        return 1
    return 0
