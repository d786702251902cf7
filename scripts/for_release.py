"""Make the links of README.md absolute and add the project's addresses to pyproject.toml, for a release.

    python scripts/for_release.py https://HOST/OWNER/REPOSITORY TAG

A package index shows README.md away from its repository, where relative links lead nowhere. No file of the repository
has its address, so that a fork releases with its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://|#)([^)\s]+)\)")


def absolute(readme: str, repository: str, tag: str) -> str:
    """Return the text with absolute links to the files of a tag, and with the command that installs the package."""

    def link(found: re.Match[str]) -> str:
        image, text, path = found.groups()
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/{tag}/{path})"

    return LINK.sub(link, readme).replace("pip install '.[", "pip install 'dmfast[")


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    """Return the text with the addresses of the repository, its documents, its changes and its issues."""
    urls = {"Source": repository, "Documentation": f"{repository}/tree/{tag}/docs",
            "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md", "Issues": f"{repository}/issues"}  # fmt: skip
    table = "[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    before, scripts, after = pyproject.partition("[project.scripts]\n")
    if not scripts or "[project.urls]" in pyproject:
        raise SystemExit(
            "pyproject.toml must have [project.scripts], before which [project.urls] goes, and no such table yet"
        )
    return f"{before}{table}\n{scripts}{after}"


def main(folder: Path, repository: str, tag: str) -> None:
    """Rewrite both files of a folder."""
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = folder / name
        path.write_text(change(path.read_text(encoding="utf-8"), repository.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(Path.cwd(), *sys.argv[1:])
