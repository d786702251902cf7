"""Test the page of the tutorial against its script. ``test_docs.py`` runs the page's blocks."""

from __future__ import annotations

import re

import of_scripts

tutorial_page = of_scripts.load("tutorial_page")


def test_the_page_has_the_text_and_the_code_of_the_script():
    cells = tutorial_page.cells()
    made = tutorial_page.page(cells, [""] * sum(not cell.is_prose for cell in cells))
    found = tutorial_page.without_output(tutorial_page.PAGE.read_text(encoding="utf-8"))
    assert found == tutorial_page.without_output(made), "python scripts/tutorial_page.py makes the page again"
    assert all(old in made for old in tutorial_page.SMALLER)


def test_the_page_shows_every_picture_that_is_there():
    shown = set(re.findall(r"\]\(assets/tutorial/(\S+)\)", tutorial_page.PAGE.read_text(encoding="utf-8")))
    assert shown == {path.name for path in tutorial_page.PICTURES.iterdir()} and len(shown) == 4


def test_a_page_of_two_cells(tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(
        '"""About."""\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nprint("seen")\n'
        'open("a.png", "w").write("")  # savefig("a.png"\n'
    )
    monkeypatch.setattr(tutorial_page, "SCRIPT", tmp_path / "two.py")
    monkeypatch.setattr(tutorial_page, "PICTURES", tmp_path / "pictures")
    cells = tutorial_page.cells()
    assert cells[0] == (True, "# Title\n\nText.\n")
    text = tutorial_page.page(cells, tutorial_page.run(cells))
    assert text.startswith("# Title\n\nText.\n\n```python\nprint(")
    assert text.endswith("```\n\n    seen\n\n![a.png](assets/tutorial/a.png)\n")
    assert "    seen" not in tutorial_page.without_output(text)
    assert (tmp_path / "pictures" / "a.png").exists()
