"""Test what a release says of itself in files that no tool compares. scripts/ci/wheel.sh tests what it contains."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import of_scripts
import pytest
import tomllib
import yaml

import dmfast
from dmfast import moved

ROOT = Path(__file__).parent.parent
# the tests may stand alone, such as beside an installed wheel
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


def test_a_release_has_no_relative_link_and_the_addresses_of_its_repository(tmp_path):
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text(text(name), encoding="utf-8")
    repository = "https://example.org/someone/dmfast"
    for_release = of_scripts.load("for_release")
    for_release.main(tmp_path, f"{repository}/", "v1.2")
    made = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", made)
    ours = [re.fullmatch(rf"{repository}/(raw|blob)/v1\.2/([^#]+)(#.*)?", link) for link in links]
    assert all(link.startswith("https://") for link in links) and sum(map(bool, ours)) > 15
    for link in filter(None, ours):
        assert (ROOT / link[2]).is_file() and (link[1] == "raw") == link[2].endswith(".png")
    assert "pip install 'dmfast[train]'" in made
    back = {f"{repository}/raw/v1.2/": "", f"{repository}/blob/v1.2/": "", "'dmfast[train]'": "'.[train]'"}
    for of_release, ours_before in back.items():
        made = made.replace(of_release, ours_before)
    assert made == text("README.md")
    found = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    urls = found["project"].pop("urls")
    assert set(urls) == {"Source", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(repository) for url in urls.values())
    assert found == tomllib.loads(text("pyproject.toml"))
    with pytest.raises(SystemExit, match=r"no such table yet"):
        for_release.main(tmp_path, repository, "v1.2")
    steps = [
        step.get("run", "") for step in yaml.safe_load(text(".github/workflows/release.yml"))["jobs"]["sdist"]["steps"]
    ]
    place = [i for i, step in enumerate(steps) if "for_release.py" in step or "build --sdist" in step]
    assert len(place) == 2 and "for_release.py" in steps[place[0]]


GOOD = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "transformers": "5.24.0", "accelerate": "1.15.0", "vllm": "0.33.0",
        "deepspeed": "0.19.8"}  # fmt: skip
RESOLVED = {
    "right": (GOOD, None),
    "what vLLM once brought": ({**GOOD, "transformers": "4.57.6"}, "transformers 4.57.6 is older than 5.0"),
    "an old vLLM": ({**GOOD, "vllm": "0.9.2"}, "vllm 0.9.2 is older than 0.32"),
    "an extra that brings nothing": ({k: v for k, v in GOOD.items() if k != "vllm"}, "vllm is missing"),
}


@pytest.mark.parametrize("case", RESOLVED)
def test_an_extra_that_resolves_to_what_dmfast_refuses_is_found(case):
    resolved, fault = RESOLVED[case]
    found = of_scripts.load("ci/extras").faults(["vllm"], resolved)
    assert [fault in each for each in found] == [True] * (fault is not None), found


def test_the_extra_of_deepspeed_is_held_to_what_the_trainer_refuses():
    from dmfast.training.deepspeed import TRIED

    extras = of_scripts.load("ci/extras")
    assert extras.tried("deepspeed") == TRIED
    older = {**GOOD, "transformers": "5.20.2"}
    assert not extras.faults(["vllm"], older)
    assert "transformers 5.20.2 is older than 5.24" in extras.faults(["deepspeed"], older)[0]
    lines = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]["deepspeed"]
    assert [f"{package}>={floor}" in lines for package, floor in TRIED.items()] == [True] * len(TRIED)


@pytest.mark.parametrize("name", moved.MOVED)
def test_a_name_of_0_1_is_found_and_says_where_it_went(name):
    with pytest.warns(DeprecationWarning, match=rf"from {re.escape(moved.MOVED[name])} import {name}\b") as caught:
        found = getattr(dmfast, name)
    assert [warning.filename for warning in caught] == [__file__]  # the warning points at the line that uses the name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found is getattr(importlib.import_module(moved.MOVED[name]), name)
    assert name not in dmfast.__all__


def test_a_name_that_never_was_is_no_deprecation():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match="no attribute 'estimates'"):
            _ = dmfast.estimates
