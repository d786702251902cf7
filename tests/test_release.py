"""What a release says of itself, in the files that no tool compares. What it holds: scripts/ci/wheel.sh."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import dmfast

ROOT = Path(__file__).parent.parent
# not where the tests stand alone, as beside an installed wheel
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="no source tree")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    assert re.match(r"# Changelog\n\n## (\S+)", text("CHANGELOG.md"))[1] == dmfast.__version__
    for name in ("pyproject.toml", "setup.py", "README.md", "CITATION.cff"):
        assert not re.search(rf"\b{re.escape(dmfast.__version__)}\b", text(name)), name
    assert 'version = { attr = "dmfast.__version__" }' in text("pyproject.toml")


def test_the_citation_is_the_paper():
    found = yaml.safe_load(text("CITATION.cff"))
    assert found["cff-version"] == "1.2.0"
    assert found["message"]
    assert found["authors"]
    paper = found["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Korbak", "Elsahar", "Kruszewski", "Dymetman"]
    assert paper["url"] == "https://arxiv.org/abs/2206.00761"


def test_every_wheel_leaves_the_openmp_runtime_to_torch():
    repairs = [line for name in ("pyproject.toml", "scripts/ci/wheel.sh") for line in text(name).splitlines()
               if "auditwheel repair" in line]  # fmt: skip
    assert len(repairs) == 2
    assert all("--exclude libgomp.so.1" in line for line in repairs)
