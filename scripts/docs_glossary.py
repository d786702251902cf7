"""Write docs/glossary.md, the page of words and symbols, from the glossary of the report (dmfast/report/words.py).

    python scripts/docs_glossary.py

tests/test_docs_cli.py compares the page with the words, so that it can't go stale.
"""

from __future__ import annotations

from pathlib import Path

from dmfast.report.words import WORDS

PAGE = Path(__file__).parent.parent / "docs" / "glossary.md"
_BEFORE = """# Glossary

These words and symbols are used in logs, in tables and on the page of `dmfast report`, which has the same glossary at
its end. [The method](method.md) has the formulas. `scripts/docs_glossary.py` makes this page.

| word | meaning |
| --- | --- |
"""


def page() -> str:
    """Return the page."""
    rows = [f"| {_cell(name)} | {_cell(meaning)} |" for name, meaning in WORDS.items()]
    return _BEFORE + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
